"""Reports the registers, shared memory and memory instructions of every CUDA kernel of the built library.

    python benchmarks/cuda_resources.py [--library PATH] [--out benchmarks/results/cuda_resources]

Needs no GPU. cuobjdump, from the CUDA toolkit or the triton package, prints the registers, stack and shared memory
that ptxas recorded, and the machine code, whose instructions are counted. Writes OUT.json and OUT.md. Fails if a kernel
uses local memory (spills, or arrays outside of registers), or if a vectorised kernel lacks 128-bit loads or stores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

from alexnet_kernels import _library

# Kernels that move single elements, and kernels that load single elements but store vectors.
ELEMENTS = {"lrn_bases", "lrn_backward_any", "lrn_forward_any", "forward_any", "pooled_gradient"}
ELEMENTS |= {"augment_pixels", "combine_moments", "combine_sums"}
GATHERS = {"augment_colours", "colours_to_depth", "planes_to_depth", "to_depth", "to_space"}
DTYPES = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32", "double": "fp64"}


@dataclass
class Kernel:
    """One kernel for one architecture. Sizes are bytes per thread; shared memory is per block."""

    source: str
    name: str
    arguments: list[str]  # template arguments
    arch: str
    registers: int
    stack: int
    local: int
    shared: int
    # Number of global memory instructions by bits per thread; JSON requires text as keys.
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    local_accesses: int = 0
    instructions: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name

    @property
    def moves_vectors(self) -> bool:
        """Whether the kernel is compiled for vectors of 16 bytes."""
        sizes = [argument for argument in self.arguments[1:] if argument.isdigit()]
        return self.name not in ELEMENTS and (not sizes or int(sizes[0]) > 1)


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
    arguments = [DTYPES.get(a, re.sub(r"^\((?:int|bool)\)", "", a)) for a in arguments]
    return (f"{source[1]}.cu" if source else "headers"), match[1], arguments


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inspect(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels of the library, for each architecture with machine code."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = ""
    usage = run(cuobjdump, "-res-usage", str(library)).splitlines()
    mangled = [line.split()[1].rstrip(":") for line in usage if line.startswith(" Function ")]
    names = dict(zip(mangled, demangle(mangled), strict=True))
    for line, following in zip(usage, [*usage[1:], ""], strict=True):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            name = line.split()[1].rstrip(":")
            sizes = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", following)}
            found[arch, name] = Kernel(
                *parse_name(name, names[name]), arch, sizes["REG"], sizes["STACK"], sizes["LOCAL"], sizes["SHARED"]
            )
    for arch in sorted({arch for arch, _ in found}):
        kernel, loads, stores = None, Counter[str](), Counter[str]()
        for line in run(cuobjdump, "-sass", "-arch", arch, str(library)).splitlines():
            if "Function : " in line:
                kernel = found[arch, line.split("Function : ")[1].strip()]
                loads, stores = Counter(), Counter()
            match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)([.\w]*)", line)
            if kernel is None or match is None:
                continue
            kernel.instructions += 1
            if match[1] in ("LDL", "STL"):
                kernel.local_accesses += 1
            if match[1] in ("LDG", "STG"):
                bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[2])
                (loads if match[1] == "LDG" else stores)[bits[1] if bits else "32"] += 1
            kernel.loads, kernel.stores = dict(sorted(loads.items())), dict(sorted(stores.items()))
    return sorted(found.values(), key=lambda k: (k.source, k.name, k.arguments, int(k.arch.removeprefix("sm_"))))


def faults(kernels: list[Kernel]) -> list[str]:
    """One message for each use of local memory and for each missing 128-bit access."""
    texts = []
    for kernel in kernels:
        where = f"{kernel.title} of {kernel.source} on {kernel.arch}"
        if kernel.stack or kernel.local or kernel.local_accesses:
            texts.append(
                f"{where}: {kernel.stack} bytes of stack, {kernel.local} of local memory, "
                f"{kernel.local_accesses} instructions on it"
            )
        if kernel.moves_vectors and "128" not in kernel.stores:
            texts.append(f"{where}: no 128-bit store")
        if kernel.moves_vectors and kernel.name not in GATHERS and "128" not in kernel.loads:
            texts.append(f"{where}: no 128-bit load")
    return texts


def markdown(kernels: list[Kernel], compiler: str) -> str:
    archs = sorted({k.arch for k in kernels}, key=lambda a: int(a.removeprefix("sm_")))
    faulty = sum(bool(faults([kernel])) for kernel in kernels)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Written by `python benchmarks/cuda_resources.py`; {compiler}. {faulty} of {len(kernels)} kernels",
        "use local memory or lack 128-bit accesses. Registers are those of a thread on each architecture. Loads and",
        f"stores are instructions on global memory on {archs[-1]}, as count x bits of a thread.",
        "",
        f"| source | kernel | registers ({' / '.join(archs)}) | loads | stores | shared memory | instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    by_title: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        by_title.setdefault((kernel.source, kernel.title), []).append(kernel)

    def accesses(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} x {bits}" for bits, count in sorted(counts.items(), key=lambda i: -int(i[0]))) or "-"

    for (source, title), rows in by_title.items():
        last = rows[-1]
        registers = " / ".join(str(row.registers) for row in rows)
        lines.append(
            f"| {source} | `{title}` | {registers} | {accesses(last.loads)} | {accesses(last.stores)} | "
            f"{max(row.shared for row in rows)} B | {last.instructions} |"
        )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=_library.PATH)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cuda_resources"))
    options = parser.parse_args(argv)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        parser.error("cuobjdump is in neither PATH, CUDA_HOME nor the triton package")
    if not options.library.exists():
        parser.error(f"{options.library} does not exist")
    kernels = inspect(options.library, cuobjdump)
    if not kernels:
        parser.error(f"{options.library} holds no CUDA kernels")
    nvcc = shutil.which("nvcc")
    compiler = "nvcc " + re.search(r"V([\d.]+)", run(nvcc, "--version"))[1] if nvcc else "nvcc of unknown version"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"compiler": compiler, "kernels": [asdict(kernel) for kernel in kernels]}
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(kernels, compiler))
    texts = faults(kernels)
    for text in texts:
        print(text, file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(texts)} faults: {options.out}.json, {options.out}.md")
    return 1 if texts else 0


if __name__ == "__main__":
    raise SystemExit(main())
