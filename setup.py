"""Builds the native library: CPU kernels always, CUDA kernels if nvcc is found.

The library uses only LibTorch's stable ABI: one build loads in every torch >= 2.11, for any Python, with or without
CUDA. It is an operator library, not a Python extension module, and is built by a ninja file written here.

Environment:
    ALEXNET_KERNELS_CUDA    1: build CUDA kernels, or fail; 0: build none; unset: build them if nvcc is found
    ALEXNET_KERNELS_ARCHS   CUDA architectures (default "8.0;9.0;10.0+PTX")
    CUDA_HOME               the CUDA toolkit, if nvcc isn't on PATH
    CXX, CXXFLAGS           the C++ compiler and additional flags
    MAX_JOBS                number of parallel compilations
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ARCHS = "8.0;9.0;10.0+PTX"
LIBRARY = "alexnet_kernels._C"
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]

# Compiler flags of each instruction set of the CPU kernels; csrc/cpu/isa.h describes the selection at run time.
# In this link order, the linker keeps the generic copy of every inline function that they share.
ISAS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    }


def find_nvcc() -> str | None:
    requested = os.environ.get("ALEXNET_KERNELS_CUDA", "")
    if requested not in ("", "0", "1"):
        raise SystemExit(f"ALEXNET_KERNELS_CUDA={requested!r}: 0, 1 or nothing expected")
    if requested == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((path for path in candidates if path and Path(path).exists()), None)
    if nvcc is None and requested == "1":
        raise SystemExit("ALEXNET_KERNELS_CUDA=1, but there is no nvcc: install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def gencode(archs: str) -> list[str]:
    flags = []
    for arch in archs.replace(",", ";").split(";"):
        number, plus, _ = arch.strip().partition("+PTX")
        major, dot, minor = number.partition(".")
        if not (major.isdigit() and dot and minor.rstrip("af").isdigit()):
            raise SystemExit(f"ALEXNET_KERNELS_ARCHS={archs!r}: a list such as '8.0;9.0;10.0+PTX' expected")
        sm = major + minor
        flags.append(f"-gencode=arch=compute_{sm},code=sm_{sm}")
        if plus:
            flags.append(f"-gencode=arch=compute_{sm},code=compute_{sm}")
    return flags


def cuda_archs() -> str:
    return os.environ.get("ALEXNET_KERNELS_ARCHS", ARCHS)


def toolkit_root(nvcc: str) -> Path:
    """The CUDA toolkit of an nvcc, which may be a wrapper script."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    for line in dry_run.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            return Path(value).resolve()
    return Path(nvcc).resolve().parent.parent


def ninja_path() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise SystemExit("alexnet_kernels builds with ninja: pip install ninja") from None
        return found


def compiler_flags() -> tuple[list[str], list[str], list[str]]:
    """Flags of every compiler, of the C++ compiler, and of the linker."""
    import torch.utils.cpp_extension as torch_build

    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}"]
    include += [f"-isystem {path}" for path in torch_build.include_paths()]
    common = ["-O3", "-std=c++20", *TARGET, *include]
    cxx = [*common, "-fvisibility=hidden", "-fPIC", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized"]
    cxx += os.environ.get("CXXFLAGS", "").split()
    link = [f"-L{path}" for path in torch_build.library_paths()]
    link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    link += ["-Wl,--exclude-libs,ALL", "-s"]
    return common, cxx, link


def write_ninja(build: Path, output: Path) -> None:
    """Writes build.ninja: csrc/library.cpp, csrc/cpu/*.cpp once for each instruction set, csrc/cuda/*.cu."""
    nvcc = find_nvcc()
    cuda_sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if nvcc else []
    common, cxx, link = compiler_flags()
    objects: list[str] = []
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule cxx",
        "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compiling $out",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "  description = linking $out",
    ]

    def compile_(rule: str, source: Path, name: str, flags: list[str]) -> None:
        objects.append(name)
        lines.extend([f"build {name}: {rule} {source}", f"  flags = {' '.join(flags)}"])

    digest = runpy.run_path(str(ROOT / "alexnet_kernels" / "_sources.py"))["digest"](ROOT / "csrc")
    about = f"sources={digest} archs={cuda_archs().replace(',', ';') if cuda_sources else ''}"
    compile_("cxx", ROOT / "csrc" / "library.cpp", "library.o", [*cxx, f"'-DALEXNET_BUILD=\"{about}\"'"])
    for isa, flags in ISAS.items():
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            once = ["-DALEXNET_REGISTER"] if isa == "generic" else []
            compile_("cxx", source, f"{source.stem}.{isa}.o", [*cxx, f"-DALEXNET_ISA={isa}", *once, *flags])
    if cuda_sources:
        archs = gencode(cuda_archs())
        lines += [f"nvcc = {nvcc}", "rule nvcc", "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = compiling $out"]
        host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "--expt-relaxed-constexpr", "-lineinfo"]
        host += ["-Xfatbin=-compress-all"]
        for source in cuda_sources:
            compile_("nvcc", source, f"{source.stem}.cu.o", [*common, *host, *archs])
        toolkit = toolkit_root(nvcc)
        lib = next(p for p in (toolkit / "lib64", toolkit / "lib", toolkit / "targets/x86_64-linux/lib") if p.exists())
        link += [f"-L{lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    lines += [f"build {output}: link {' '.join(objects)}", f"  flags = {' '.join(link)}", f"default {output}", ""]
    (build / "build.ninja").write_text("\n".join(lines))


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        write_ninja(build, output)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        verbose = ["-v"] if self.verbose > 1 else []
        subprocess.run([ninja_path(), "-C", str(build), *jobs, *verbose], check=True, stdout=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"


class AnyPythonWheel(bdist_wheel):
    """The library uses no Python symbols: one wheel serves every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPythonWheel},
    distclass=BinaryDistribution,
)
