"""Reads the kernels of a library or a cubin with cuobjdump, from the CUDA toolkit or the triton package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

DTYPES = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32", "double": "fp64"}


def find_cuobjdump() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("cuobjdump"), *(f"{home}/bin/cuobjdump" for home in homes if home)]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and Path(path).exists()), None)


def demangle(names: list[str]) -> list[str]:
    """Demangles C++ names by c++filt."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def split_arguments(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "<(") - (letter in ">)")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def parse_name(mangled: str, demangled: str) -> tuple[str, str, list[str]]:
    """(source file, kernel, template arguments)."""
    # <hash>_<length>_<file>_cu_<hash>: a hash may be all digits, but a file name starts with a letter.
    source = re.search(r"_\d+_([a-z]\w*?)_cu_", mangled)
    plain = demangled.replace("(anonymous namespace)::", "")
    plain = re.sub(r"_GLOBAL__N__\w+?::|_NV_ANON_NAMESPACE::|_INTERNAL_\w+?::", "", plain)
    match = re.match(r"(?:void )?alexnet_kernels::cuda::(\w+)(<.*>)?\(", plain)
    assert match is not None, plain
    arguments = split_arguments((match[2] or "<>")[1:-1])
    arguments = [DTYPES.get(a, re.sub(r"\((?:int|bool)\)|alexnet_kernels::cuda::", "", a)) for a in arguments]
    return (f"{source[1]}.cu" if source else "headers"), match[1], arguments


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures(path: Path, cuobjdump: str) -> list[str]:
    """Those for which a library or a cubin has machine code, as "sm_90a", in ascending order."""
    found = re.findall(r"\.(sm_\w+)\.cubin$", run(cuobjdump, "--list-elf", str(path)), re.MULTILINE)
    return sorted(set(found), key=rank)


def rank(arch: str) -> tuple[int, str]:
    """By which architectures are ordered: sm_90, sm_90a, sm_100."""
    return int(arch.removeprefix("sm_").rstrip("af")), arch


def hopper(path: Path, cuobjdump: str) -> str:
    """The architecture of the machine code for compute capability 9.0: "sm_90a", or "sm_90" where there is no such."""
    return "sm_90a" if "sm_90a" in architectures(path, cuobjdump) else "sm_90"


def disassemble(path: Path, cuobjdump: str, arch: str) -> str:
    """The machine code for an architecture; a cubin's is for its own."""
    choice = () if path.suffix == ".cubin" else ("-arch", arch)
    return run(cuobjdump, "-sass", *choice, str(path))


def compiler() -> str:
    nvcc = shutil.which("nvcc")
    return "nvcc " + re.search(r"V([\d.]+)", run(nvcc, "--version"))[1] if nvcc else "nvcc of unknown version"
