"""Reports the resources of every CUDA kernel of the built library, and what it executes at AlexNet's layers.

    python benchmarks/cuda_resources.py [--library PATH] [--out benchmarks/results/cuda_resources]

Needs no GPU. cuobjdump, from the CUDA toolkit or the triton package, prints the registers, stack and shared memory
that ptxas recorded, and the machine code, whose instructions are counted; cuda_budget.py counts what launches execute.
Writes OUT.json and OUT.md. Fails if a kernel uses local memory (spills, or arrays outside of registers), or if a
vectorised kernel lacks 128-bit loads or stores.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cuda_budget
from cubin import compiler, demangle, disassemble, find_cuobjdump, parse_name, run
from cuda_budget import Budget

from alexnet_kernels import _library

# Kernels that move single elements, and kernels that load single elements but store vectors.
ELEMENTS = {"lrn_bases", "lrn_backward_any", "lrn_forward_any", "forward_any", "pooled_gradient"}
ELEMENTS |= {"augment_pixels", "combine_bias_sums", "combine_moments", "combine_sums"}
GATHERS = {"augment_colours", "colours_to_depth", "planes_to_depth", "to_depth", "to_space"}


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
        for line in disassemble(library, cuobjdump, arch).splitlines():
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


def markdown(kernels: list[Kernel], budgets: list[Budget], compiler: str) -> str:
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
    return "\n".join([*lines, "", *cuda_budget.markdown(budgets), ""])


def report(kernels: list[Kernel], budgets: list[Budget], compiler: str) -> str:
    """JSON with one line for each budget."""
    head = json.dumps({"compiler": compiler, "kernels": [asdict(kernel) for kernel in kernels]}, indent=1)
    lines = ",\n".join(f"  {json.dumps(asdict(budget))}" for budget in budgets)
    return f'{head[:-2]},\n "budgets": [\n{lines}\n ]\n}}\n'


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
    budgets = []
    if any(kernel.arch == cuda_budget.ARCH for kernel in kernels):
        budgets = list(cuda_budget.budgets(cuda_budget.Code(options.library, cuobjdump)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(report(kernels, budgets, compiler()))
    options.out.with_suffix(".md").write_text(markdown(kernels, budgets, compiler()))
    texts = faults(kernels)
    for text in texts:
        print(text, file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(texts)} faults: {options.out}.json, {options.out}.md")
    return 1 if texts else 0


if __name__ == "__main__":
    raise SystemExit(main())
