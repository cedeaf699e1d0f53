"""setuptools' commands."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

from native_build.ninja_file import PROBE, ROOT, write_ninja
from native_build.run_ninja import run_ninja
from native_build.toolkit import Unusable, do_without, find_toolkit


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = self._build_folder()
        for folder in (output.parent, build):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            toolkit = find_toolkit()
            write_ninja(build, output, toolkit)
            if toolkit and (failure := run_ninja(build, PROBE)):
                raise Unusable(f"{toolkit.nvcc} can't build a small program: {failure.errors()[0]}")
        except Unusable as reason:
            do_without(reason)
            write_ninja(build, output, None)
        if failure := run_ninja(build, verbose=self.verbose > 1):
            raise SystemExit(failure.explain())

    def _build_folder(self) -> Path:
        """The folder of the objects. For an editable install setuptools names a new one each time."""
        if self.editable_mode:
            return ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        return Path(self.build_temp).resolve()

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPythonWheel(bdist_wheel):
    """The library uses no Python symbols: one wheel serves every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True
