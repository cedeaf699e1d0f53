"""Reports the resources of every CUDA kernel of the built library, and what it executes at AlexNet's layers.

    python benchmarks/cuda_resources.py [--library PATH] [--out benchmarks/results/cuda_resources]

Needs no GPU. cuobjdump, from the CUDA toolkit or the triton package, prints the registers, stack and shared memory
that ptxas recorded, and the machine code, whose instructions are counted; cuda_budget.py counts what launches execute,
convolution_budget.py predicts the times of the convolution kernels. Writes OUT.json and OUT.md. Fails if a kernel uses
local memory (spills, or arrays outside of registers), if a vectorised kernel lacks 128-bit loads or stores, or if a
kernel for tensor cores does not use them, and TMA on Hopper, as it should.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import convolution_budget
import cuda_budget
from cubin import architectures, compiler, demangle, disassemble, find_cuobjdump, parse_name, rank, run
from cuda_budget import Budget, Recorded

from alexnet_kernels import _library

# Kernels that move single elements, and kernels that load single elements but store vectors.
ELEMENTS = {"lrn_bases", "lrn_backward_any", "lrn_forward_any", "forward_any", "pooled_gradient"}
ELEMENTS |= {"augment_pixels", "combine_bias_sums", "combine_moments", "combine_sums", "turn_filters"}
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
    # Number of instructions of tensor cores and of copies to shared memory, as "HGMMA.64x96x16" and "LDGSTS.128".
    matrix: dict[str, int] = field(default_factory=dict)
    # Of the products of a warpgroup (HGMMA), those that the warp does not wait for before it starts the next.
    overlapped: int = 0

    @property
    def title(self) -> str:
        return cuda_budget.title_of(self.name, self.arguments)

    @property
    def moves_vectors(self) -> bool:
        """Whether the kernel is compiled for vectors of 16 bytes."""
        if self.has("HMMA"):
            return "false" not in self.arguments
        sizes = [argument for argument in self.arguments[1:] if argument.isdigit()]
        return self.name not in ELEMENTS and (not sizes or int(sizes[0]) > 1)

    @property
    def copies_vectors(self) -> bool:
        """Whether it copies 16 bytes or more at once to shared memory."""
        return self.has("UTMALDG") or "LDGSTS.128" in self.matrix

    @property
    def store_bits(self) -> int:
        """The widest that its vectors allow.

        In float, threads store the pairs of elements that tensor cores give. The weight's gradient by wgmma stores its
        sums transposed: eight threads 32 consecutive bytes.
        """
        if self.name == "weight_gradient" and self.has("HGMMA"):
            return 32
        return 64 if self.has("HMMA") and self.arguments[:1] == ["fp32"] else 128

    def has(self, name: str) -> bool:
        return self.count(name) > 0

    def count(self, name: str) -> int:
        """Instructions of tensor cores or copies of this name, of all shapes."""
        return sum(count for key, count in self.matrix.items() if key.split(".")[0] == name)


MATRIX = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "SYNCS")
BITS = re.compile(r"\.(?:U|S)?(8|16|64|128)\b")


def matrix_key(name: str, modifiers: str) -> str:
    """ "HGMMA.64x96x16", "HMMA.16816", "LDGSTS.128"; of other instructions the name."""
    if name in ("HGMMA", "HMMA"):
        return f"{name}.{modifiers.split('.')[1]}"
    if name == "LDGSTS":
        bits = BITS.search(modifiers)
        return f"{name}.{bits[1] if bits else '32'}"
    return name


def inspect(library: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels of a library or a cubin, for each architecture with machine code."""
    found: dict[tuple[str, str], Kernel] = {}
    arch = architectures(library, cuobjdump)[0]  # cuobjdump names them of a library only
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
        kernel, loads, stores, matrix = None, Counter[str](), Counter[str](), Counter[str]()
        ends_group = False
        for line in disassemble(library, cuobjdump, arch).splitlines():
            if "Function : " in line:
                kernel = found[arch, line.split("Function : ")[1].strip()]
                loads, stores, matrix = Counter(), Counter(), Counter()
            match = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)([.\w]*)([^;]*)", line)
            if kernel is None or match is None:
                continue
            kernel.instructions += 1
            if match[1] in ("LDL", "STL"):
                kernel.local_accesses += 1
            if match[1] in ("LDG", "STG"):
                bits = BITS.search(match[2])
                (loads if match[1] == "LDG" else stores)[bits[1] if bits else "32"] += 1
            if match[1] in MATRIX:
                matrix[matrix_key(match[1], match[2])] += 1
                # The last of a group sets the scoreboard for which the warp waits.
                kernel.overlapped += match[1] == "HGMMA" and "gsb0" not in match[3]
                ends_group = match[1] == "HGMMA" and "gsb0" in match[3]
            if match[1] == "WARPGROUP" and ".DEPBAR.LE" in match[2]:
                # A wait for the groups before the last one.
                kernel.overlapped += ends_group and not match[3].strip().endswith("0x0")
                ends_group = False
            kernel.matrix = dict(sorted(matrix.items()))
            kernel.loads, kernel.stores = dict(sorted(loads.items())), dict(sorted(stores.items()))
    return sorted(found.values(), key=lambda k: (k.source, k.name, k.arguments, rank(k.arch)))


def faults(kernels: list[Kernel]) -> list[str]:
    """One message for each use of local memory, and for each missing 128-bit access or use of tensor cores."""
    texts = []
    for kernel in kernels:
        where = f"{kernel.title} of {kernel.source} on {kernel.arch}"
        if kernel.stack or kernel.local or kernel.local_accesses:
            texts.append(
                f"{where}: {kernel.stack} bytes of stack, {kernel.local} of local memory, "
                f"{kernel.local_accesses} instructions on it"
            )
        if kernel.moves_vectors and str(kernel.store_bits) not in kernel.stores and not kernel.has("UTMASTG"):
            texts.append(f"{where}: no {kernel.store_bits}-bit store")
        gathers = kernel.name in GATHERS or kernel.copies_vectors
        if kernel.moves_vectors and not gathers and "128" not in kernel.loads:
            texts.append(f"{where}: no 128-bit load")
        hopper = kernel.source.endswith("_sm90a.cu")
        wanted = ["HGMMA", "UTMALDG"] if hopper or kernel.has("HGMMA") else []
        wanted += ["HMMA"] if kernel.source.endswith("_sm80.cu") else []
        if missing := [name for name in wanted if not kernel.has(name)]:
            texts.append(f"{where}: no {', no '.join(missing)}")
        if kernel.has("HGMMA") and not kernel.overlapped:
            texts.append(f"{where}: it waits for every HGMMA before the next (serialised)")
    return texts


def markdown(kernels: list[Kernel], launches: list[Recorded], budgets: list[Budget], compiler: str) -> str:
    archs = sorted({k.arch for k in kernels}, key=rank)
    faulty = sum(bool(faults([kernel])) for kernel in kernels)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Written by `python benchmarks/cuda_resources.py`; {compiler}. {faulty} of {len(kernels)} kernels",
        "use local memory, lack 128-bit accesses or lack tensor cores. Registers are those of a thread on each",
        f"architecture. Loads and stores are instructions on global memory on {archs[-1]}, or on the kernel's only",
        "architecture, as count x bits of a thread.",
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
        by_arch = {row.arch: str(row.registers) for row in rows}
        registers = " / ".join(by_arch.get(arch, "-") for arch in archs)
        lines.append(
            f"| {source} | `{title}` | {registers} | {accesses(last.loads)} | {accesses(last.stores)} | "
            f"{max(row.shared for row in rows)} B | {last.instructions} |"
        )
    lines += ["", *matrix_markdown(kernels), "", *convolution_budget.markdown(launches, kernels)]
    return "\n".join([*lines, "", *cuda_budget.markdown(budgets), ""])


def matrix_markdown(kernels: list[Kernel]) -> list[str]:
    """A table of the kernels for tensor cores."""
    lines = [
        "## Tensor cores",
        "",
        "Instructions in the machine code of the kernels that multiply by tensor cores: products of a warpgroup",
        "(HGMMA) and of a warp (HMMA), by shape; loads of matrices from shared memory (LDSM); copies to it by TMA",
        "(UTMALDG) and by threads (LDGSTS, with the bits of a thread); operations on its barriers (SYNCS).",
        "**Overlapped**: the HGMMA that the warp does not wait for before it starts the next.",
        "",
        "| kernel | architecture | registers | products | overlapped | copies, barriers |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in kernels:
        if kernel.has("HGMMA") or kernel.has("HMMA"):
            products, others = (
                ", ".join(f"{count} {key}" for key, count in kernel.matrix.items() if ("MMA" in key) == wanted)
                for wanted in (True, False)
            )
            overlapped = kernel.overlapped if kernel.has("HGMMA") else "-"
            lines.append(
                f"| `{kernel.title}` | {kernel.arch} | {kernel.registers} | {products} | {overlapped} | {others} |"
            )
    return lines


def report(kernels: list[Kernel], launches: list[Recorded], budgets: list[Budget], compiler: str) -> str:
    """JSON with one line for each budget."""
    about = {
        "compiler": compiler,
        "kernels": [asdict(kernel) for kernel in kernels],
        "convolutions": [asdict(launch) for launch in launches],
    }
    head = json.dumps(about, indent=1)
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
    code, budgets, launches = cuda_budget.Code(options.library, cuobjdump), [], []
    if code.functions:
        launches, budgets = cuda_budget.convolutions(), list(cuda_budget.budgets(code))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(report(kernels, launches, budgets, compiler()))
    options.out.with_suffix(".md").write_text(markdown(kernels, launches, budgets, compiler()))
    texts = faults(kernels)
    for text in texts:
        print(text, file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(texts)} faults: {options.out}.json, {options.out}.md")
    return 1 if texts else 0


if __name__ == "__main__":
    raise SystemExit(main())
