"""The CUDA kernels on the CPU: builds csrc/cuda/*.cu with the emulation of tests/emulation/cuda.h, and loads them.

Inside `with emulated():` backend "cuda" takes CPU tensors. ninja keeps the build directory, build/emulation-*, up to
date.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11
import torch
import torch.utils.cpp_extension as torch_build

from alexnet_kernels import backends
from alexnet_kernels._dispatch.contracts import CONTRACTS
from alexnet_kernels._dispatch.registration import implement

ROOT = Path(__file__).parents[2]
NAMESPACE = "alexnet_kernels_emulated"
COMPILER = os.environ.get("CXX", "g++")
BUILD = ROOT / "build" / f"emulation-torch{torch.__version__}-python{sysconfig.get_python_version()}"
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
MODULE = BUILD / "cuda_emulation.so"
# The flags of the executables that replay calls of operators under a sanitizer. AddressSanitizer's checks are function
# calls, which compile in half the time of inline checks.
SANITIZERS = {
    "address": [
        "-fsanitize=address,alignment,bounds",
        "-fno-sanitize-recover=all",
        "--param asan-instrumentation-with-call-threshold=0",
    ],
    "thread": ["-fsanitize=thread"],
}


def _write_ninja() -> None:
    """Writes build.ninja, for the module that tests import and one executable for each sanitizer."""
    include = [ROOT / "csrc", ROOT / "tests"]
    system = [pybind11.get_include(), sysconfig.get_path("include"), *torch_build.include_paths()]
    flags = ["-O2", "-std=c++20", "-w", "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", f"-DALEXNET_NAMESPACE={NAMESPACE}"]
    flags.append("-DALEXNET_SM90A")
    flags += [f"-I{path}" for path in include] + [f"-isystem {path}" for path in system]
    torch_lib = torch_build.library_paths()[0]
    link = [f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    lines = [
        f"cxx = {COMPILER}",
        f"flags = {' '.join(flags)}",
        f"libs = {' '.join(link)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags $extra -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $extra -pthread -o $out $in $libs",
    ]

    def target(output: str, sources: list[Path], suffix: str, compiled: list[str], linked: list[str]) -> None:
        objects = ["library.o"]
        for source in sources:
            objects.append(f"{source.stem}{suffix}.o")
            lines.extend([f"build {objects[-1]}: compile {source}", f"  extra = {' '.join(compiled)}"])
        lines.extend([f"build {output}: link {' '.join(objects)}", f"  extra = {' '.join(linked)}"])

    here = Path(__file__).parent
    lines.append(f"build library.o: compile {ROOT / 'csrc' / 'library.cpp'}")
    target(MODULE.name, [here / "module.cpp", *SOURCES], "", [], ["-shared"])
    for name, extra in SANITIZERS.items():
        target(name, [here / "sanitize.cpp", *SOURCES], f".{name}", ["-O1", "-g1", *extra], extra)
    text = "\n".join([*lines, ""])
    file = BUILD / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


_failures: dict[str, str] = {}


def build(target: str) -> Path:
    """Builds a target, if it is out of date, and returns its path."""
    import ninja

    if target in _failures:
        raise RuntimeError(_failures[target])
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(BUILD), target]
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one ninja at a time
        _write_ninja()
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        _failures[target] = f"building {target} failed:\n{done.stdout[-4000:]}"
        raise RuntimeError(_failures[target])
    return BUILD / target


@functools.cache
def load() -> ModuleType:
    """The module `cuda_emulation`. Loading it registers the operators."""
    path = build(MODULE.name)
    spec = importlib.util.spec_from_file_location("cuda_emulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in CONTRACTS:
        if hasattr(getattr(torch.ops, NAMESPACE), op):
            implement(NAMESPACE, op)
    return module


@contextmanager
def emulated() -> Iterator[ModuleType]:
    """Backend "cuda" takes CPU tensors inside the `with` block."""
    module = load()
    emulation = dataclasses.replace(
        backends.registered("cuda"),
        namespace=NAMESPACE,
        devices=("cpu",),
        missing=lambda op: None,
        automatic=lambda op: False,
    )
    with backends.substituted(emulation):
        yield module
