"""What the build needs of its environment. With --no-build-isolation nobody has installed it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path

import setuptools

SETUPTOOLS = (77, 0)
TORCH = (2, 11)


def check_setuptools() -> None:
    """Ends the build if setuptools is too old."""
    _check("setuptools", setuptools.__version__, SETUPTOOLS)


def torch_folder() -> tuple[Path, str]:
    """The folder and the version of torch, which is not imported; ends the build if it is missing or too old."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    spec = importlib.util.find_spec("torch")
    _check("torch", version if spec and spec.origin else "none", TORCH)
    return Path(spec.origin).parent, version  # type: ignore[union-attr, arg-type]


def _check(package: str, version: str, least: tuple[int, int]) -> None:
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    if found is None or (int(found[1]), int(found[2] or 0)) < least:
        wanted = ".".join(map(str, least)).removesuffix(".0")
        raise SystemExit(
            f"alexnet_kernels builds with {package} {wanted} or later, and this environment has {version}: "
            f"pip install -U '{package}>={wanted}', or install without --no-build-isolation"
        )


def compiler() -> list[str]:
    """The C++ compiler as the words of a command: CXX, or g++. Ends the build if there is none."""
    text = os.environ.get("CXX", "").strip() or "g++"
    words = [text] if shutil.which(text) else shlex.split(text)
    if shutil.which(words[0]) is None:
        raise SystemExit(
            f"alexnet_kernels builds with a C++ compiler, and there is no {words[0]!r}: install g++ 11 or later "
            "(Debian and Ubuntu: apt install g++), or set CXX"
        )
    return words


def ninja() -> str:
    """The path of ninja; ends the build if there is none."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("alexnet_kernels builds with ninja: pip install ninja") from None
        return found


def jobs() -> list[str]:
    """Ninja's option for MAX_JOBS; none where that is unset, empty or 0."""
    text = os.environ.get("MAX_JOBS", "").strip() or "0"
    if not text.isdecimal():
        raise SystemExit(f"MAX_JOBS={text!r}: a number of parallel compilations expected")
    return ["-j", text] if int(text) else []
