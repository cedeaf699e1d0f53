"""Counts the instructions that warps execute, from NVIDIA machine code; needs no GPU.

    python benchmarks/sass.py FILE KERNEL --grid N [--block N] [--argument BITS:VALUE ...] [--warps N]

Warps drawn evenly from the grid are interpreted (sass_machine.py), so that no trip count is given by hand. An
instruction whose predicate is false is issued, and counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cubin import disassemble, find_cuobjdump, hopper
from numpy.typing import NDArray
from sass_machine import CONTROL, LANES, Machine, UnknownError
from sass_text import Function, parse, split

# Where constant bank 0 holds the parameters.
PARAMETERS = {"sm_80": 0x160, "sm_86": 0x160, "sm_89": 0x160, "sm_90": 0x210, "sm_90a": 0x210}

# The pipe that executes an instruction on sm_90, and for how many clocks a warp's holds that pipe of its quarter of the
# multiprocessor: by the CUDA programming guide's results a clock for compute capability 9.0 (128 for float32, 64 for
# integers and comparisons, 16 for special functions, 32 for shuffles), and by Nsight Compute's description of the pipes
# (conversions between integers and floats are the special functions' pipe's). The L1 cache moves 128 bytes a clock.
FLOAT = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
INTEGER_ON_FMA = {"IMAD", "IDP"}
CONVERSIONS = {"F2F", "F2I", "I2F", "FRND"}
SPECIAL = {"MUFU", "POPC", "FLO", "BREV"} | CONVERSIONS
DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
GLOBAL = {"LDG": "global loads", "STG": "global stores", "LDGSTS": "global loads", "RED": "global stores"}
MEMORY = {
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDGSTS",
    "LD",
    "ST",
    "SHFL",
    "ATOMG",
    "ATOMS",
    "RED",
    "LDL",
    "STL",
}
BRANCHES = set(CONTROL) | {"WARPSYNC", "BAR", "NOP", "YIELD"}
MATRIX = {"HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "WARPGROUP"}
PIPES = ("issue", "ALU", "FMA", "special", "LSU", "FP64")


def pipe_of(opcode: str) -> tuple[str, float]:
    """The pipe of an opcode, and the clocks that a warp's instruction holds it; "issue" for those without a limit."""
    name, *modifiers = opcode.split(".")
    if name in SPECIAL:
        return "special", 8
    if name in FLOAT:
        return "FMA", 1
    if name in INTEGER_ON_FMA:
        return "FMA", 2
    if name in DOUBLE:
        return "FP64", 2
    if name in MEMORY:
        bits = next((int(m) for m in modifiers if m in ("64", "128")), 32)
        return "LSU", 4 * bits / 32
    if name in BRANCHES or name in MATRIX or name in ("LDC", "S2R", "CS2R") or name.startswith("U"):
        return "issue", 0
    return "ALU", 2


def kind_of(opcode: str) -> str:
    """What an instruction does, for the mix."""
    name = opcode.split(".")[0]
    if name in GLOBAL:
        return GLOBAL[name]
    if name in ("LDS", "STS", "LDSM", "STSM", "ATOMS"):
        return "shared memory"
    if name == "SHFL":
        return "shuffles"
    if name == "MUFU":
        return "special functions"
    if name in BRANCHES:
        return "control"
    if name in MATRIX:
        return "matrix"
    if name in CONVERSIONS or name in ("F2FP", "I2FP"):
        return "conversions"
    if name in FLOAT or name in ("FSETP", "FSEL", "FMNMX") or name in DOUBLE:
        return "floating point"
    if name in ("LDC", "S2R", "S2UR", "CS2R", "ULDC"):
        return "constants"
    return "integer"


@dataclass
class Count:
    """The instructions that a launch executes."""

    warps: int  # of the launch
    # Instructions of a warp, on average: those issued, and those whose predicate held for a lane.
    opcodes: Counter[str] = field(default_factory=Counter)
    executed: Counter[str] = field(default_factory=Counter)

    @property
    def instructions(self) -> float:
        """Of a warp, on average."""
        return sum(self.opcodes.values())

    def of(self, *names: str) -> float:
        """Instructions of these names."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.split(".")[0] in names)

    def mix(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for opcode, count in self.opcodes.items():
            total[kind_of(opcode)] += count
        return dict(total.most_common())

    def clocks(self) -> dict[str, float]:
        """By pipe, the clocks that a warp holds it; a quarter of a multiprocessor issues one instruction a clock."""
        total = dict.fromkeys(PIPES, 0.0)
        total["issue"] = self.instructions
        for opcode, count in self.executed.items():
            pipe, clocks = pipe_of(opcode)
            if pipe != "issue":
                total[pipe] += clocks * count
        return total


def draw_warps(count: int, wanted: int) -> NDArray[np.int64]:
    """Distinct warps, spread over 0 ... count - 1 by the golden ratio, which no period of a layout divides."""
    if count <= wanted:
        return np.arange(count)
    places = np.modf((np.arange(wanted) + 0.5) * 0.6180339887498949)[0]
    return np.unique((places * count).astype(np.int64))


def constant_bank(
    arch: str, arguments: bytes, grid: Sequence[int], block: Sequence[int], known: Sequence[bool] | None
) -> tuple[bytes, list[bool]]:
    base = PARAMETERS[arch]
    sizes = np.array([*block, *grid], np.uint32).tobytes()
    bank = sizes.ljust(base, b"\0") + arguments
    return bank, [i < len(sizes) for i in range(base)] + list(known if known is not None else [True] * len(arguments))


def pack(values: Sequence[tuple[int, int | None]]) -> tuple[bytes, list[bool]]:
    """Parameters as constant memory holds them, and which bytes are known, of (bits, integer or None) each."""
    packed, known = b"", []
    for bits, value in values:
        padding = -len(packed) % (bits // 8)
        packed += bytes(padding) + ((value or 0) % (1 << bits)).to_bytes(bits // 8, "little")
        known += [True] * padding + [value is not None] * (bits // 8)
    return packed, known


def count(
    code: Function | str,
    arguments: bytes,
    grid: Sequence[int],
    block: Sequence[int],
    *,
    arch: str = "sm_90",
    known: Sequence[bool] | None = None,
    warps: int = 256,
) -> Count:
    """Counts the instructions of a launch from some of its warps.

    code: the text of a function (`split`), or what `parse` made of it
    arguments: the parameters as constant memory holds them, each aligned to its size
    known: which of these bytes are given; by default all
    grid, block: up to three sizes
    """
    grid, block = ([*sizes, 1, 1][:3] for sizes in (grid, block))
    per_block = -(-(block[0] * block[1] * block[2]) // LANES)
    total = grid[0] * grid[1] * grid[2] * per_block
    bank, bank_known = constant_bank(arch, arguments, grid, block, known)
    drawn = draw_warps(total, warps)
    machine = Machine(parse(code) if isinstance(code, str) else code, bank, bank_known, grid, block, drawn)
    with np.errstate(all="ignore"):
        machine.run()
    found = Count(total)
    for counter, counts in ((found.opcodes, machine.issued), (found.executed, machine.executed)):
        for instruction, number in zip(machine.function, counts, strict=True):
            if number:
                counter[instruction.opcode] += int(number) / len(drawn)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a library or a cubin")
    parser.add_argument("kernel", help="a regular expression of mangled names")
    parser.add_argument("--grid", type=int, nargs="+", default=[1000])
    parser.add_argument("--block", type=int, nargs="+", default=[256])
    parser.add_argument("--argument", action="append", default=[], help="BITS:VALUE, in order; BITS:? if unknown")
    parser.add_argument("--arch", help="by default that of compute capability 9.0")
    parser.add_argument("--warps", type=int, default=256)
    options = parser.parse_args(argv)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        parser.error("cuobjdump is in neither PATH, CUDA_HOME nor the triton package")
    arch = options.arch or hopper(options.file, cuobjdump)
    code = disassemble(options.file, cuobjdump, arch)
    values = []
    for argument in options.argument:
        bits, value = argument.split(":")
        values.append((int(bits), None if value == "?" else int(value, 0)))
    arguments, known = pack(values)
    for name, text in split(code).items():
        if re.search(options.kernel, name):
            print(name)
            try:
                found = count(text, arguments, options.grid, options.block, arch=arch, known=known, warps=options.warps)
            except UnknownError as error:
                print(f"  unknown: {error}")
                continue
            mix = ", ".join(f"{amount:.1f} {kind}" for kind, amount in found.mix().items())
            clocks = ", ".join(f"{pipe} {clocks:.0f}" for pipe, clocks in found.clocks().items())
            print(f"  {found.instructions:.1f} instructions a warp of {found.warps}: {mix}\n  clocks by pipe: {clocks}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
