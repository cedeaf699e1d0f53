"""The ninja file of the native library.

A command changes, and ninja runs it again, only if the compiler, its flags or torch change. So paths are relative to
the build folder, which holds a link to torch: pip's isolated builds have torch in another place each time, with other
times of its headers. Commands carry versions as a comment in place of those times.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from native_build import requirements
from native_build.toolkit import HOPPER, Toolkit, gencode

ROOT = Path(__file__).resolve().parent.parent
PROBE = "probe.so"
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

# Compiler flags of each instruction set of the CPU kernels; csrc/cpu/isa.h describes the selection at run time.
# In this link order, the linker keeps the generic copy of every inline function that they share.
ISAS: dict[str, list[str]] = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    }


def ninja_path(path: str | Path) -> str:
    """A path, or a list of one, as it stands in a build statement."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def ninja_command(words: Sequence[str]) -> str:
    """Words of a shell command, as they stand in a variable."""
    return shlex.join(words).replace("$", "$$")


class NinjaFile:
    """Statements of a build folder, which write the objects into it and link them."""

    def __init__(self, build: Path) -> None:
        self.build = build
        self.lines: list[str] = []

    def relative(self, path: Path) -> str:
        return os.path.relpath(path, self.build)

    def rule(self, name: str, action: str, command: Sequence[str], arguments: str, versions: str) -> None:
        self.lines += [
            f"rule {name}",
            f"  command = {ninja_command(command)} {arguments} # {re.sub(r'[^-+.() A-Za-z0-9]', '', versions)}",
            f"  description = {action} $out",
        ]

    def compilers(self, name: str, command: Sequence[str], versions: str) -> None:
        """The rule of a compiler. Its dependencies leave out the headers of system folders."""
        self.rule(name, "compiling", command, "-MMD -MF $out.d $flags -c $in -o $out", versions)
        self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def add(self, rule: str, output: str, inputs: Sequence[str], flags: Sequence[str]) -> str:
        self.lines += [
            f"build {ninja_path(output)}: {rule} {' '.join(map(ninja_path, inputs))}",
            f"  flags = {ninja_command(flags)}",
        ]
        return output

    def write(self, default: str) -> None:
        text = "\n".join([*self.lines, f"default {ninja_path(default)}", ""])
        (self.build / "build.ninja").write_text(text)


def link_torch(build: Path) -> str:
    """Makes build/torch a link to the package torch; returns its version."""
    folder, version = requirements.torch_folder()
    link = build / "torch"
    if not link.is_symlink() or link.readlink() != folder:
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
    return version


def first_line(command: Sequence[str]) -> str:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    return said.partition("\n")[0]


def write_ninja(build: Path, output: Path, toolkit: Toolkit | None) -> None:
    """Writes build.ninja: csrc/library.cpp, csrc/cpu/*.cpp once for each instruction set, csrc/cuda/*.cu.

    Of these, *_sm90a.cu are compiled for 9.0a alone, and only if it is among the architectures; then all are compiled
    with -DALEXNET_SM90A.

    With a toolkit there is also PROBE, which is small and tells whether the toolkit compiles and links.
    """
    compiler, torch = requirements.compiler(), f"torch {link_torch(build)}"
    file = NinjaFile(build)
    cpu, cuda = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"
    include = [f"-I{file.relative(cpu.parent)}", f"-I{file.relative(cpu)}"]
    include += ["-isystem", "torch/include", "-isystem", "torch/include/torch/csrc/api/include"]
    common = ["-O3", "-std=c++20", *TARGET, *include]
    cxx = [*common, "-fvisibility=hidden", "-fPIC", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
    given = shlex.split(os.environ.get("CXXFLAGS", ""))
    cxx += given
    link = ["-Ltorch/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    link.append("-Wl,--exclude-libs,ALL")
    if not any(flag.startswith("-g") and flag != "-g0" for flag in given):
        link.append("-s")

    version = first_line(compiler)
    file.compilers("cxx", compiler, f"{torch}, {version}")
    file.rule("link", "linking", compiler, "-shared -o $out $in $flags", torch)
    digest = runpy.run_path(str(ROOT / "alexnet_kernels" / "_sources.py"))["digest"](ROOT / "csrc")
    about = f"sources={digest} archs={';'.join(toolkit.archs) if toolkit else ''}"
    library = [file.relative(ROOT / "csrc" / "library.cpp")]
    objects = [file.add("cxx", "library.o", library, [*cxx, f'-DALEXNET_BUILD="{about}"'])]
    for isa, flags in ISAS.items():
        for source in sorted(cpu.glob("*.cpp")):
            defines = [f"-DALEXNET_ISA={isa}", *(["-DALEXNET_REGISTER"] if isa == "generic" else [])]
            name = f"{source.stem}.{isa}.o"
            objects.append(file.add("cxx", name, [file.relative(source)], [*cxx, *defines, *flags]))
    if toolkit:
        file.compilers("nvcc", [toolkit.nvcc], f"{torch}, nvcc {toolkit.version}, {version}")
        flags = [*common, "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
        flags += ["-lineinfo", "-Xfatbin=-compress-all", *(["-DALEXNET_SM90A"] if HOPPER in toolkit.archs else [])]
        every = [*flags, *(flag for arch in toolkit.archs for flag in gencode(arch))]
        link += [f"-L{toolkit.libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        probe = file.add("nvcc", "probe.cu.o", [file.relative(ROOT / "native_build" / "probe.cu")], every)
        file.add("link", PROBE, [probe], link)
        for source in sorted(cuda.glob("*.cu")):
            hopper = source.stem.endswith("_sm90a")
            if not hopper or HOPPER in toolkit.archs:
                chosen = [*flags, *gencode(HOPPER)] if hopper else every
                objects.append(file.add("nvcc", f"{source.stem}.cu.o", [file.relative(source)], chosen))
    file.write(file.add("link", file.relative(output), objects, link))
