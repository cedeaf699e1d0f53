"""Parses NVIDIA machine code as `cuobjdump -sass` prints it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Operand:
    kind: str  # R, UR, P, UP, integer, float, constant, memory, special, barrier, other
    index: int = 0  # of a register, predicate or barrier; the bits of an immediate; a constant's offset
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    bank: int = 0
    register: Operand | None = None  # that is added to a constant's offset
    text: str = ""

    @property
    def predicate(self) -> bool:
        return self.kind in ("P", "UP")

    def at(self, i: int) -> Operand:
        """The i-th of consecutive registers or constants."""
        zero = self.kind in ("R", "UR") and self.index == 255
        step = 4 * i if self.kind == "constant" else 0 if zero else i
        return Operand(self.kind, self.index + step, bank=self.bank, register=self.register)


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: Operand | None
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))


Function = tuple[Instruction, ...]


@functools.cache
def parse_operand(text: str) -> Operand:
    plain = text.replace(".reuse", "").strip()
    negated = plain.startswith(("-", "!")) and not re.match(r"-(\d|INF|QNAN)", plain)
    inverted = plain.startswith("~")
    body = plain[1:] if negated or inverted else plain
    absolute = body.startswith("|")
    body = body.strip("|")
    signs = {"negated": negated, "inverted": inverted, "absolute": absolute, "text": plain}
    if match := re.fullmatch(r"(U?)R(\d+|Z)((?:\.\w+)*)", body):
        return Operand(f"{match[1]}R", 255 if match[2] == "Z" else int(match[2]), **signs)
    if match := re.fullmatch(r"(U?P)(\d|T)", body):
        return Operand(match[1], 7 if match[2] == "T" else int(match[2]), **signs)
    if match := re.fullmatch(r"c\[(0x[0-9a-f]+)\]\[(?:(U?R(?:\d+|Z))\+?)?(-?0x[0-9a-f]+)?\](?:\.\w+)*", body):
        register = parse_operand(match[2]) if match[2] else None
        return Operand("constant", int(match[3] or "0", 16), bank=int(match[1], 16), register=register, **signs)
    if re.fullmatch(r"-?0x[0-9a-f]+", body):
        return Operand("integer", int(body, 16) & 0xFFFFFFFF, text=plain)
    if re.fullmatch(r"[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|INF|QNAN)", body):
        value = float(body.replace("QNAN", "nan"))
        return Operand("float", int(np.float32(value).view(np.uint32)) if abs(value) < 3e38 else 0x7F800000, **signs)
    if match := re.fullmatch(r"B(\d+)", body):
        return Operand("barrier", int(match[1]), text=plain)
    if body.startswith("SR"):
        return Operand("special", text=body)
    return Operand("memory" if "[" in body else "other", text=plain)


def split(text: str) -> dict[str, str]:
    """The functions' texts in a disassembly, by mangled name."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse(text: str) -> Function:
    """The instructions of one function."""
    found = []
    for match in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)([^;\n]*);", text, re.MULTILINE):
        name, *modifiers = match[3].split(".")
        operands = match[4].split() if name == "RET" else [part.strip() for part in match[4].split(",")]
        guard = parse_operand(match[2]) if match[2] else None
        parsed = tuple(parse_operand(operand) for operand in operands if operand)
        found.append(Instruction(int(match[1], 16), guard, name, tuple(modifiers), parsed))
    return tuple(found)
