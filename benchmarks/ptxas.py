"""Compiles one CUDA source and reads what ptxas says of wgmma; needs no GPU.

    python benchmarks/ptxas.py FILE.cu ...

Prints the lines that tell of products of a warpgroup which cannot overlap, and fails if there are any. ptxas serialises
all products of a function in which other instructions touch an accumulator while it is being computed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]  # as the build's
SERIALISED = re.compile(r"wgmma\.mma_async instructions are serialized|warpgroup\.wait is injected")


def find_nvcc() -> str | None:
    return shutil.which("nvcc")


def compile_cubin(source: Path, output: Path, arch: str = "sm_90a") -> str:
    """Compiles a source as the build does, for one architecture; returns what ptxas says."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    include = Path(torch.origin).parent / "include"
    command = [find_nvcc() or "nvcc", "-cubin", f"-arch={arch}", "-Xptxas=-v", "-O3", "-std=c++20", *TARGET]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", "-isystem", str(include), "-isystem"]
    command += [str(include / "torch/csrc/api/include"), "-DUSE_CUDA", "-DALEXNET_SM90A", "--expt-relaxed-constexpr"]
    done = subprocess.run([*command, str(source), "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {source}:\n{done.stderr}")
    return done.stdout + done.stderr


def serialised(said: str) -> list[str]:
    """The lines that tell of products that are waited for."""
    return [line.strip() for line in said.splitlines() if SERIALISED.search(line)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    lines = []
    for file in parser.parse_args().files:
        with tempfile.TemporaryDirectory() as folder:
            lines += serialised(compile_cubin(file, Path(folder) / "out.cubin"))
    print("\n".join(lines) or "no product of a warpgroup is serialised")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
