"""Interprets the machine code of some warps of a launch.

Integers, predicates and branches have their values, taken from the kernel's arguments; lanes diverge and wait for each
other as the code's barriers say. What memory, shuffles and most floating-point instructions return is unknown. Rules
for the unknown:

- A forward branch that depends on it is taken by half of the active lanes: both sides are executed.
- If one side calls a subroutine at once, that side is the slow path of special operands (a division's or square root's
  subnormal numbers), and no lane takes it. FCHK, which asks for such a path, answers no.
- A loop or an exit that depends on it is an error.
- A wait for an asynchronous copy succeeds at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sass_text import Function, Instruction, Operand

LANES = 32
LIMIT = 200_000  # instructions that the warps together may execute

Bits = NDArray[np.uint32]
Flags = NDArray[np.bool_]


ALL_BITS = np.uint32(0xFFFFFFFF)


class UnknownError(Exception):
    """What a kernel executes depends on something that the interpreter does not know."""


Value = tuple[NDArray, Flags]
"""The lanes' values, and which are known."""

CARRY = ("IADD3", "UIADD3", "IMAD", "UIMAD", "LEA", "ULEA")
# Instructions without a result in registers, though their first operand may be one.
NO_RESULT = {"BAR", "WARPSYNC", "NOP", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "CCTL", "YIELD", "NANOSLEEP"}
NO_RESULT |= {"FENCE", "ACQBULK", "WARPGROUP", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UBLKCP", "LDGSTS", "RED"}
NO_RESULT |= {"PREEXIT", "BMOV", "USETMAXREG", "ARRIVES", "ENDCOLLECTIVE"}


class Machine:
    """Some warps of one launch."""

    def __init__(
        self,
        function: Function,
        bank: bytes,
        known: Sequence[bool],
        grid: Sequence[int],
        block: Sequence[int],
        warps: NDArray[np.int64],
    ) -> None:
        self.function = function
        self.at = {instruction.address: i for i, instruction in enumerate(function)}
        self.bank = np.frombuffer(bank, np.uint8)
        self.bank_known = np.asarray(known, bool)
        threads = block[0] * block[1] * block[2]
        per_block = -(-threads // LANES)
        self.lanes = len(warps) * LANES
        lane = np.tile(np.arange(LANES, dtype=np.int64), len(warps))
        thread = np.repeat(warps % per_block, LANES) * LANES + lane
        ctaid = np.repeat(warps // per_block, LANES)
        self.special = {
            "SR_TID.X": thread % block[0],
            "SR_TID.Y": thread // block[0] % block[1],
            "SR_TID.Z": thread // (block[0] * block[1]),
            "SR_CTAID.X": ctaid % grid[0],
            "SR_CTAID.Y": ctaid // grid[0] % grid[1],
            "SR_CTAID.Z": ctaid // (grid[0] * grid[1]),
            "SR_LANEID": lane,
            "SR_CgaCtaId": np.zeros_like(lane),
        }
        self.everything = np.ones(self.lanes, bool)
        self.nothing: Value = np.zeros(self.lanes, np.uint32), np.zeros(self.lanes, bool)
        self.constants: dict[tuple[int, type], NDArray] = {}
        shape = (256, self.lanes)
        self.values = {"R": np.zeros(shape, np.uint32), "UR": np.zeros(shape, np.uint32)}
        self.values |= {"P": np.zeros((8, self.lanes), bool), "UP": np.zeros((8, self.lanes), bool)}
        # Which bits of a register, and which predicates, are known.
        self.knowns = {kind: np.zeros_like(values) for kind, values in self.values.items()}
        for kind, last in (("R", 255), ("UR", 255), ("P", 7), ("UP", 7)):
            self.knowns[kind][last] = True if kind in ("P", "UP") else ALL_BITS
            self.values[kind][last] = kind in ("P", "UP")
        self.alive = thread < threads
        self.pc = np.zeros(self.lanes, np.int64)
        self.waiting = np.full(self.lanes, -1)
        self.group = np.zeros(self.lanes, np.int64)
        self.groups = 1
        self.barriers = np.zeros((16, self.lanes), bool)
        # Warps that issued each instruction, and those of which a lane executed it.
        self.issued = np.zeros(len(function), np.int64)
        self.executed = np.zeros(len(function), np.int64)
        # The lanes that execute the current instruction, and those of which its predicate does not tell.
        self.executing = self.alive
        self.perhaps = np.zeros(self.lanes, bool)

    # Operands.

    def everywhere(self, value: int, dtype: type = np.uint32) -> Value:
        if (value, dtype) not in self.constants:
            self.constants[value, dtype] = np.full(self.lanes, value, dtype)
        return self.constants[value, dtype], self.everything

    def constant(self, operand: Operand, size: int) -> Value:
        """`size` bytes of the constant bank."""
        if operand.bank != 0:
            return self.nothing
        if operand.register is None:
            bits = self.bank[operand.index : operand.index + size]
            known = len(bits) == size and bool(self.bank_known[operand.index : operand.index + size].all())
            return self.everywhere(int.from_bytes(bits.tobytes(), "little")) if known else self.nothing
        register, known = self.read(operand.register)
        where = operand.index + register.view(np.int32).astype(np.int64)
        value = np.zeros(self.lanes, np.uint32)
        for i in range(size):
            inside = (where + i >= 0) & (where + i < len(self.bank))
            place = np.where(inside, where + i, 0)
            known = known & inside & self.bank_known[place]
            value |= self.bank[place].astype(np.uint32) << np.uint32(8 * i)
        return value, known

    def raw(self, operand: Operand) -> Value:
        if operand.kind in self.values:
            known = self.knowns[operand.kind][operand.index]
            return self.values[operand.kind][operand.index], known if operand.predicate else known == ALL_BITS
        if operand.kind in ("integer", "float"):
            return self.everywhere(operand.index)
        if operand.kind == "constant":
            return self.constant(operand, 4)
        return self.nothing

    def read(self, operand: Operand) -> Value:
        """An integer or a predicate."""
        value, known = self.raw(operand)
        if operand.predicate:
            return value ^ operand.negated, known
        if operand.absolute:
            value = np.abs(value.view(np.int32)).view(np.uint32)
        if operand.inverted:
            value = ~value
        if operand.negated:
            value = np.uint32(0) - value
        return value, known

    def read_bits(self, operand: Operand) -> tuple[Bits, Bits]:
        """An integer, and which of its bits are known."""
        value, known = self.read(operand)
        if operand.kind in self.values and not operand.negated and not operand.absolute:
            return value, self.knowns[operand.kind][operand.index]
        return value, as_bits(known)

    def read_wide(self, operand: Operand) -> Value:
        """A 64-bit integer in two registers."""
        if operand.kind in ("integer", "float"):
            value, known = self.raw(operand)
            return value.view(np.int32).astype(np.int64).view(np.uint64), known
        (low, known), (high, also) = self.raw(operand.at(0)), self.raw(operand.at(1))
        value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        if operand.inverted:
            value = ~value
        if operand.negated:
            value = np.uint64(0) - value
        return value, known & also

    def read_float(self, operand: Operand) -> Value:
        value, known = self.raw(operand)
        if operand.absolute:
            value = value & np.uint32(0x7FFFFFFF)
        if operand.negated:
            value = value ^ np.uint32(0x80000000)
        return value.view(np.float32), known

    def first_active(self, values: NDArray) -> NDArray:
        """Each warp's value of its first active lane."""
        first = self.executing.reshape(-1, LANES).argmax(1) + np.arange(0, self.lanes, LANES)
        return np.repeat(values[first], LANES)

    def write(self, operand: Operand, value: NDArray, known: Flags) -> None:
        if operand.index == (7 if operand.predicate else 255):
            return
        if not operand.predicate and known.dtype == np.bool_:
            known = as_bits(known)
        values, knowns = self.values[operand.kind][operand.index], self.knowns[operand.kind][operand.index]
        executing, perhaps = self.executing, self.perhaps
        if operand.kind in ("UR", "UP") and executing is not self.everything:
            # A warp has one value: that of its first active lane.
            value, known = self.first_active(value), self.first_active(known)
            executing = np.repeat(executing.reshape(-1, LANES).any(1), LANES)
            perhaps = np.repeat(perhaps.reshape(-1, LANES).any(1), LANES)
        if executing is self.everything:
            values[:], knowns[:] = value, known
            return
        if perhaps is not self.nothing[1]:
            # Written or not: what both values agree in stays known.
            np.copyto(knowns, knowns & known & ~(values ^ value), where=perhaps)
        np.copyto(values, value, where=executing)
        np.copyto(knowns, known, where=executing)

    def write_wide(self, operand: Operand, value: NDArray[np.uint64], known: Flags) -> None:
        self.write(operand, value.astype(np.uint32), known)
        self.write(operand.at(1), (value >> np.uint64(32)).astype(np.uint32), known)

    # Control flow.

    def run(self) -> None:
        """Runs the lanes that are furthest behind, until all have ended."""
        total = 0
        while self.alive.any():
            runnable = self.alive & (self.waiting < 0)
            if not runnable.any():
                raise UnknownError("lanes wait at a barrier that others do not reach")
            at = int(self.pc[runnable].min())
            active = self.one_group(runnable & (self.pc == at))
            behind = self.pc[runnable & ~active]
            until = int(behind.min()) if len(behind) else len(self.function)
            warps = warps_of(active)
            if active.all():
                active = self.everything
            onward = True
            while onward:
                onward = self.step(at, active, warps) and at + 1 < until
                at += 1
                total += 1
            if total > LIMIT:
                raise UnknownError(f"more than {LIMIT} instructions: a loop that may depend on what is unknown")

    def one_group(self, lanes: Flags) -> Flags:
        """Of each warp, lanes that have not parted: a warp issues an instruction once for each group."""
        groups = np.where(lanes, self.group, self.groups)
        return lanes & (self.group == np.repeat(groups.reshape(-1, LANES).min(1), LANES))

    def part(self, lanes: Flags) -> None:
        """Makes these lanes of each warp a group."""
        self.group[lanes] = self.groups
        self.groups += 1

    def step(self, at: int, active: Flags, warps: int) -> bool:
        """Executes an instruction; whether the one after it is next for these lanes."""
        instruction = self.function[at]
        taken, known = self.everywhere(True, np.bool_)
        self.issued[at] += warps
        if instruction.guard is None:
            self.executing, self.perhaps = active, self.nothing[1]
            self.executed[at] += warps
        else:
            taken, known = self.read(instruction.guard)
            self.executing, self.perhaps = active & taken & known, active & ~known
            self.executed[at] += warps_of(self.executing | self.perhaps)
        control = CONTROL.get(instruction.name)
        if control is None:
            SEMANTICS.get(instruction.name, unknown_result)(self, instruction)
            if at + 1 == len(self.function):
                raise UnknownError("the function ends without an exit")
            self.pc[active] = at + 1
            return True
        if instruction.name in ("BRA", "BREAK"):
            for operand in instruction.operands:
                if operand.predicate:
                    taken, known = both(taken, known, *self.read(operand))
        control(self, at, active, taken, known)
        return False

    def target(self, address: int) -> int:
        if address not in self.at:
            raise UnknownError(f"a jump to {address:#x}, where the function has no instruction")
        return self.at[address]

    def branch(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        instruction = self.function[at]
        if "U" in instruction.modifiers:
            # ptxas puts it before a branch on the same predicate: taken only where all lanes of a warp agree.
            agree = (~active | (taken & known)).reshape(-1, LANES).all(1)
            taken, known = taken & np.repeat(agree, LANES), np.ones_like(known)
        unknown = active & ~known
        taken = taken & known
        target = at + 1
        if "DIV" not in instruction.modifiers:  # BRA.DIV asks whether lanes are missing at a collective
            target = self.target(instruction.operands[-1].index)
        if unknown.any():
            if target <= at:
                raise UnknownError(f"the trip count of the loop that ends at {instruction.address:#x}")
            slow = [calls_at_once(self.function, target), calls_at_once(self.function, at + 1)]
            if slow[1] and not slow[0]:
                taken = taken | unknown
            elif not slow[0]:
                rank = unknown.reshape(-1, LANES).cumsum(1).reshape(-1)
                taken = taken | (unknown & (rank % 2 == 0))
        if (active & taken).any():
            self.part(active & taken)
        self.pc[active] = np.where(taken, target, at + 1)[active]

    def call(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        if (active & taken & known).any():
            self.part(active & taken & known)
        self.pc[active] = np.where(taken & known, self.target(self.function[at].operands[-1].index), at + 1)[active]

    def back(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        register, offset = self.function[at].operands[:2]
        address, also = self.raw(register)
        leave = active & taken
        if not (known & also)[active].all():
            raise UnknownError(f"the return address at {self.function[at].address:#x}")
        self.pc[active] = at + 1
        for value in np.unique(address[leave]):
            self.pc[leave & (address == value)] = self.target(int(value) + offset.index)

    def end(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        if (active & ~known).any():
            raise UnknownError(f"the exit at {self.function[at].address:#x}")
        leave = active & taken
        self.pc[active] = at + 1
        self.alive = self.alive & ~leave
        self.barriers &= ~leave
        self.release(range(16))

    def mark(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        """BSSY: the active lanes of a warp will wait for each other at BSYNC."""
        warps = np.repeat(active.reshape(-1, LANES).any(1), LANES)
        mask = self.barriers[self.function[at].operands[0].index]
        mask[warps] = active[warps]
        self.pc[active] = at + 1

    def join(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        if not (taken & known)[active].all():
            raise UnknownError(f"the predicate of BSYNC at {self.function[at].address:#x}")
        barrier = self.function[at].operands[0].index
        self.pc[active] = at + 1
        self.waiting[active] = barrier
        self.release([barrier])

    def leave(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        """BREAK: lanes that a barrier no longer waits for."""
        if (active & ~known).any():
            raise UnknownError(f"the predicate of BREAK at {self.function[at].address:#x}")
        barrier = next(operand.index for operand in self.function[at].operands if operand.kind == "barrier")
        self.pc[active] = at + 1
        self.barriers[barrier] &= ~(active & taken)
        self.release([barrier])

    def refuse(self, at: int, active: Flags, taken: Flags, known: Flags) -> None:
        raise UnknownError(f"{self.function[at].opcode} at {self.function[at].address:#x} is not interpreted")

    def release(self, barriers: Sequence[int]) -> None:
        for barrier in barriers:
            here = self.waiting == barrier
            if here.any():
                missing = (self.barriers[barrier] & self.alive & ~here).reshape(-1, LANES).any(1)
                released = here & ~np.repeat(missing, LANES)
                self.waiting[released] = -1
                if released.any():
                    self.part(released)


CONTROL: dict[str, Callable[[Machine, int, Flags, Flags, Flags], None]] = {
    "BRA": Machine.branch,
    "CALL": Machine.call,
    "RET": Machine.back,
    "EXIT": Machine.end,
    "BSSY": Machine.mark,
    "BSYNC": Machine.join,
    "BREAK": Machine.leave,
    "BRX": Machine.refuse,
    "JMP": Machine.refuse,
    "JMX": Machine.refuse,
    "BPT": Machine.refuse,
}


def as_bits(flags: Flags) -> Bits:
    return np.uint32(0) - flags.astype(np.uint32)


def warps_of(lanes: Flags) -> int:
    return int(lanes.reshape(-1, LANES).any(1).sum())


def calls_at_once(function: Function, at: int) -> bool:
    """Whether the code from here calls a subroutine before it branches or ends."""
    for instruction in function[at:]:
        if instruction.name == "CALL":
            return True
        if instruction.name in CONTROL and instruction.name != "BSSY":
            return False
    return False


def both(a: Flags, a_known: Flags, b: Flags, b_known: Flags) -> tuple[Flags, Flags]:
    """The conjunction of two predicates: known where one is known to be false."""
    known = (a_known & b_known) | (a_known & ~a) | (b_known & ~b)
    return a & b & a_known & b_known, known


def either(a: Flags, a_known: Flags, b: Flags, b_known: Flags) -> tuple[Flags, Flags]:
    value, known = both(~a, a_known, ~b, b_known)
    return ~value, known


def combine(machine: Machine, how: Sequence[str], value: Flags, known: Flags, operand: Operand) -> tuple[Flags, Flags]:
    """The result of a comparison combined with a predicate, as the modifiers say."""
    other, other_known = machine.read(operand)
    if "OR" in how:
        return either(value, known, other, other_known)
    if "XOR" in how:
        return value ^ other, known & other_known
    return both(value, known, other, other_known)


def results(instruction: Instruction) -> tuple[list[Operand], Operand | None, list[Operand]]:
    """The leading predicates, which are results, the register of the result, and the other operands."""
    operands = list(instruction.operands)
    predicates = []
    if operands and operands[0].predicate:
        while operands and operands[0].predicate:
            predicates.append(operands.pop(0))
        return predicates, operands.pop(0) if operands else None, operands
    register = operands.pop(0) if operands else None
    while instruction.name in CARRY and operands and operands[0].predicate:
        predicates.append(operands.pop(0))
    return predicates, register, operands


def width_of(instruction: Instruction) -> int:
    """Registers of the result."""
    name, modifiers = instruction.name, instruction.modifiers
    if name in ("I2F", "DADD", "DMUL", "DFMA", "DMNMX", "DSETP") or name == "F2F":
        return 2 if name[0] == "D" or (modifiers and "F64" in modifiers[: 2 if name == "F2F" else None]) else 1
    if name in ("HGMMA", "IGMMA", "QGMMA", "BGMMA"):
        return int(re.findall(r"\d+", next(m for m in modifiers if "x" in m))[1]) // 2
    if name in ("HMMA", "IMMA") or "128" in modifiers:
        return 4
    if name == "DMMA" or {"64", "U64", "S64", "WIDE"} & set(modifiers):
        return 2
    return int(modifiers[-1]) if name == "LDSM" and modifiers[-1].isdigit() else 1


def unknown_result(machine: Machine, instruction: Instruction) -> None:
    if instruction.name in NO_RESULT:
        return
    predicates, register, _ = results(instruction)
    nothing = np.zeros(machine.lanes, bool)
    for operand in predicates:
        machine.write(operand, nothing, nothing)
    if register is not None and register.kind in ("R", "UR"):
        for i in range(width_of(instruction)):
            machine.write(register.at(i), nothing.astype(np.uint32), nothing)


def carry_in(machine: Machine, operands: list[Operand]) -> tuple[NDArray[np.uint64], Flags]:
    total, known = machine.everywhere(0, np.uint64)
    while operands and operands[-1].predicate:
        value, also = machine.read(operands.pop())
        total, known = total + value.astype(np.uint64), known & also
    return total, known


def carry_out(machine: Machine, predicates: list[Operand], carry: NDArray[np.uint64], known: Flags) -> None:
    for i, operand in enumerate(predicates):
        machine.write(operand, carry > i, known)


def add(machine: Machine, instruction: Instruction) -> None:
    predicates, register, operands = results(instruction)
    assert register is not None
    total, known = carry_in(machine, operands)
    extended = "X" in instruction.modifiers
    for operand in operands:
        if operand.negated and not extended:
            # ~x + 1, whose carry says that nothing was borrowed.
            value, also = machine.raw(operand)
            total = total + (~value).astype(np.uint64) + np.uint64(1)
        else:
            value, also = machine.read(operand)
            total = total + value.astype(np.uint64)
        known = known & also
    machine.write(register, total.astype(np.uint32), known)
    carry_out(machine, predicates, total >> np.uint64(32), known)


def multiply_add(machine: Machine, instruction: Instruction) -> None:
    predicates, register, operands = results(instruction)
    assert register is not None
    carried, known = carry_in(machine, operands)
    modifiers = instruction.modifiers
    wide, high = "WIDE" in modifiers, "HI" in modifiers
    a, b, c = operands
    (x, x_known), (y, y_known) = machine.raw(a), machine.raw(b)
    z, z_known = machine.read_wide(c) if wide or high else machine.read(c)
    zero = (x_known & (x == 0)) | (y_known & (y == 0))
    known = known & z_known & ((x_known & y_known) | zero)
    if "U32" in modifiers or not (wide or high):
        product = x.astype(np.uint64) * y.astype(np.uint64)
    else:
        product = (x.view(np.int32).astype(np.int64) * y.view(np.int32).astype(np.int64)).view(np.uint64)
    if a.negated != b.negated:
        product = np.uint64(0) - product
    total = product + z.astype(np.uint64)
    overflow = total < product
    total = total + carried
    overflow |= total < carried
    if wide:
        machine.write_wide(register, total, known)
    else:
        machine.write(register, (total >> np.uint64(32 if high else 0)).astype(np.uint32), known)
    carry_out(machine, predicates, overflow.astype(np.uint64), known)


def shifted_add(machine: Machine, instruction: Instruction) -> None:
    """LEA: (a << shift) + b, or the high half of that."""
    predicates, register, operands = results(instruction)
    assert register is not None
    carried, known = carry_in(machine, operands)
    modifiers = instruction.modifiers
    values = [machine.read(operand) for operand in operands]
    for _, also in values:
        known = known & also
    a, b, shift = values[0][0].astype(np.uint64), values[1][0].astype(np.uint64), values[-1][0].astype(np.uint64)
    if "HI" in modifiers:
        if "SX32" in modifiers:
            a = values[0][0].view(np.int32).astype(np.int64).view(np.uint64)
        else:
            a = a | values[2][0].astype(np.uint64) << np.uint64(32)
        a = (a << shift) >> np.uint64(32)
    else:
        a = (a << shift) & np.uint64(0xFFFFFFFF)
    total = a + b + carried
    machine.write(register, total.astype(np.uint32), known)
    carry_out(machine, predicates, total >> np.uint64(32), known)


def shift(machine: Machine, instruction: Instruction) -> None:
    """SHF: a half of the 64 bits {high, low}, shifted."""
    register, *operands = instruction.operands
    (low, a), (count, b), (high, c) = (machine.read(operand) for operand in operands)
    kind = instruction.modifiers[1]
    most = 64 if "64" in kind else 32
    amount = count % most if "W" in instruction.modifiers else np.minimum(count, most)
    amount = amount.astype(np.uint64)
    both_words = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    inside = np.minimum(amount, np.uint64(63))
    if instruction.modifiers[0] == "L":
        result = np.where(amount > np.uint64(63), np.uint64(0), both_words << inside)
    elif kind[0] == "S":
        result = (both_words.view(np.int64) >> inside.view(np.int64)).view(np.uint64)
    else:
        result = np.where(amount > np.uint64(63), np.uint64(0), both_words >> inside)
    if "HI" in instruction.modifiers:
        result = result >> np.uint64(32)
    machine.write(register, result.astype(np.uint32), a & b & c)


def logic(machine: Machine, instruction: Instruction) -> None:
    predicates, register, operands = results(instruction)
    assert register is not None
    inputs = [machine.read_bits(operand) for operand in operands[:3]]
    # The bits that may be 0, and those that may be 1.
    may = [np.zeros(machine.lanes, np.uint32), np.zeros(machine.lanes, np.uint32)]
    for i in range(8):
        fits = ALL_BITS
        for j, (word, known) in enumerate(inputs):
            fits = fits & ((word if i >> (2 - j) & 1 else ~word) | ~known)
        may[operands[3].index >> i & 1] |= fits
    machine.write(register, may[1], may[0] ^ may[1])
    for predicate in predicates:
        some, none = may[1] & ~may[0] != 0, may[1] == 0
        machine.write(predicate, *combine(machine, ("OR",), some, some | none, operands[4]))


def predicate_logic(machine: Machine, instruction: Instruction) -> None:
    first, second, *rest = instruction.operands
    inputs = [machine.read(operand) for operand in rest[:3]]
    for result, table in ((first, rest[3].index), (second, rest[4].index)):
        may = [np.zeros(machine.lanes, bool), np.zeros(machine.lanes, bool)]
        for i in range(8):
            fits = np.ones(machine.lanes, bool)
            for j, (value, known) in enumerate(inputs):
                fits &= ~known | (value == bool(i >> (2 - j) & 1))
            may[table >> i & 1] |= fits
        machine.write(result, may[1], may[0] ^ may[1])


def compare(machine: Machine, instruction: Instruction) -> None:
    first, second, a, b, other, *low = instruction.operands
    modifiers = instruction.modifiers
    (x, x_known), (y, y_known) = machine.read(a), machine.read(b)
    if "U32" not in modifiers:
        x, y = x.view(np.int32), y.view(np.int32)
    how = modifiers[0]
    value, known = COMPARISONS[how](x, y), x_known & y_known
    if "EX" in modifiers:
        below, below_known = machine.read(low[0])
        equal = x == y
        if how == "EQ":
            value, known = both(value, known, below, below_known)
        elif how == "NE":
            value, known = either(value, known, below, below_known)
        else:
            known = known & (below_known | ~equal)
            value = np.where(equal, below, value)
    machine.write(first, *combine(machine, modifiers, value, known, other))
    machine.write(second, *combine(machine, modifiers, ~value, known, other))


COMPARISONS: dict[str, Callable[[NDArray, NDArray], Flags]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
    "T": lambda x, y: np.ones(x.shape, bool),
    "F": lambda x, y: np.zeros(x.shape, bool),
}


def compare_floats(machine: Machine, instruction: Instruction) -> None:
    first, second, a, b, other = instruction.operands
    (x, x_known), (y, y_known) = machine.read_float(a), machine.read_float(b)
    how = instruction.modifiers[0]
    unordered = np.isnan(x) | np.isnan(y)
    if how in ("NAN", "NUM"):
        value = unordered == (how == "NAN")
    elif how in COMPARISONS:
        value = COMPARISONS[how](x, y) & ~unordered
    else:
        value = COMPARISONS[how.removesuffix("U")](x, y) | unordered
    known = x_known & y_known
    machine.write(first, *combine(machine, instruction.modifiers, value, known, other))
    machine.write(second, *combine(machine, instruction.modifiers, ~value, known, other))


def select(machine: Machine, instruction: Instruction) -> None:
    register, a, b, which = instruction.operands
    if instruction.name == "FSEL":
        (x, x_known), (y, y_known) = machine.read_float(a), machine.read_float(b)
        x, y, x_known, y_known = x.view(np.uint32), y.view(np.uint32), as_bits(x_known), as_bits(y_known)
    else:
        (x, x_known), (y, y_known) = machine.read_bits(a), machine.read_bits(b)
    chosen, known = machine.read(which)
    same = x_known & y_known & ~(x ^ y)
    machine.write(register, np.where(chosen, x, y), np.where(known, np.where(chosen, x_known, y_known), same))


def move(machine: Machine, instruction: Instruction) -> None:
    machine.write(instruction.operands[0], *machine.read_bits(instruction.operands[1]))


def absolute(machine: Machine, instruction: Instruction) -> None:
    value, known = machine.read(instruction.operands[1])
    machine.write(instruction.operands[0], np.abs(value.view(np.int32)).view(np.uint32), known)


def extend(machine: Machine, instruction: Instruction) -> None:
    """SGXT: the lowest bits, extended by their sign or by zeros."""
    register, operand, width = instruction.operands
    (value, known), (bits, bits_known) = machine.read(operand), machine.read(width)
    unused = (32 - np.clip(bits.view(np.int32), 0, 32)).astype(np.uint64)
    shifted = (value.astype(np.uint64) << unused).astype(np.uint32)
    if "U32" in instruction.modifiers:
        result = (shifted.astype(np.uint64) >> unused).astype(np.uint32)
    else:
        result = (shifted.view(np.int32).astype(np.int64) >> unused.view(np.int64)).astype(np.uint32)
    machine.write(register, result, known & bits_known)


def bit_mask(machine: Machine, instruction: Instruction) -> None:
    """BMSK: `width` ones from a position."""
    register, at, width = instruction.operands
    (start, a), (bits, b) = machine.read(at), machine.read(width)
    ones = (np.uint64(1) << np.minimum(bits, 32).astype(np.uint64)) - np.uint64(1)
    machine.write(register, (ones << np.minimum(start, 32).astype(np.uint64)).astype(np.uint32), a & b)


def add_two(machine: Machine, instruction: Instruction) -> None:
    register, a, b = instruction.operands[:3]
    (x, x_known), (y, y_known) = machine.read(a), machine.read(b)
    machine.write(register, x + y, x_known & y_known)


def extreme(machine: Machine, instruction: Instruction) -> None:
    """VIMNMX, IMNMX: the minimum if the predicate holds, else the maximum; VIADDMNMX: of a + b and c."""
    register, *operands = instruction.operands
    which, which_known = machine.read(operands.pop())
    values = [machine.read(operand) for operand in operands[:3]]
    known = which_known
    for _, also in values:
        known = known & also
    x, y = values[0][0], values[-1][0]
    if instruction.name == "VIADDMNMX":
        x = x + values[1][0]
    if "U32" not in instruction.modifiers:
        x, y = x.view(np.int32), y.view(np.int32)
    result = np.where(which, np.minimum(x, y), np.maximum(x, y))
    if "RELU" in instruction.modifiers:
        result = np.maximum(result, 0)
    machine.write(register, result.view(np.uint32), known)


def permute(machine: Machine, instruction: Instruction) -> None:
    if len(instruction.modifiers):
        return unknown_result(machine, instruction)
    register, a, selector, c = instruction.operands
    (x, x_known), (s, s_known), (z, z_known) = machine.read(a), machine.read(selector), machine.read(c)
    words = x.astype(np.uint64) | z.astype(np.uint64) << np.uint64(32)
    result = np.zeros(machine.lanes, np.uint32)
    for i in range(4):
        nibble = (s >> np.uint32(4 * i)) & np.uint32(15)
        byte = (words >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return machine.write(register, result, x_known & s_known & z_known)


def load_constant(machine: Machine, instruction: Instruction) -> None:
    register, operand = instruction.operands[:2]
    size = next((m for m in instruction.modifiers if m in ("U8", "S8", "U16", "S16", "64", "128")), "32")
    if operand.kind != "constant":
        return unknown_result(machine, instruction)
    bits = int(size.strip("US"))
    for i in range(max(1, bits // 32)):
        value, known = machine.constant(operand.at(i), min(4, bits // 8))
        if size[0] == "S":
            value = (value << np.uint32(32 - bits)).view(np.int32) >> (32 - bits)
        machine.write(register.at(i), value.view(np.uint32), known)
    return None


def special(machine: Machine, instruction: Instruction) -> None:
    register, source = instruction.operands
    if source.text == "SRZ":
        for i in range(1 if "32" in instruction.modifiers else 2):
            machine.write(register.at(i), *machine.everywhere(0))
    elif source.text in machine.special:
        machine.write(register, machine.special[source.text].astype(np.uint32), machine.everywhere(1)[1])
    else:
        unknown_result(machine, instruction)


def half_constant(machine: Machine, instruction: Instruction) -> None:
    """HFMA2 of zeros loads a constant."""
    register, *operands = instruction.operands
    zeros = all(operand.kind == "R" and operand.index == 255 for operand in operands[:2])
    if not zeros or len(operands) != 4 or not all(re.fullmatch(r"[-+]?[\d.e+-]+", o.text) for o in operands[2:]):
        return unknown_result(machine, instruction)
    high, low = (int(np.float16(float(operand.text)).view(np.uint16)) for operand in operands[2:])
    return machine.write(register, *machine.everywhere(high << 16 | low))


def to_float(machine: Machine, instruction: Instruction) -> None:
    register, operand = instruction.operands[-2:]
    modifiers = instruction.modifiers
    if "F64" in modifiers or "F16" in modifiers or "BF16" in modifiers or (set(modifiers) & {"U8", "S8", "U16", "S16"}):
        return unknown_result(machine, instruction)
    if "U64" in modifiers or "S64" in modifiers:
        value, known = machine.read_wide(operand)
    else:
        value, known = machine.read(operand)
        if "U32" not in modifiers:
            value = value.view(np.int32)
    if "S64" in modifiers:
        value = value.view(np.int64)
    result = value.astype(np.float32)
    if "RP" in modifiers:
        below = result.astype(np.float64) < value.astype(np.float64)
        result = np.where(below, np.nextafter(result, np.float32(np.inf)), result)
    return machine.write(register, result.astype(np.float32).view(np.uint32), known)


def to_integer(machine: Machine, instruction: Instruction) -> None:
    register, operand = instruction.operands[-2:]
    modifiers = instruction.modifiers
    if "TRUNC" not in modifiers or set(modifiers) & {"F64", "F16", "S64", "U16", "S16", "U8", "S8"}:
        return unknown_result(machine, instruction)
    value, known = machine.read_float(operand)
    wide = np.nan_to_num(np.trunc(value.astype(np.float64)), nan=0.0, posinf=2.0**64, neginf=-(2.0**63))
    if "U64" in modifiers:
        most = np.nextafter(np.float64(2**64), 0)
        return machine.write_wide(register, np.clip(wide, 0, most).astype(np.uint64), known)
    if "U32" in modifiers:
        return machine.write(register, np.clip(wide, 0, 2**32 - 1).astype(np.uint32), known)
    return machine.write(register, np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32), known)


def function_of_float(machine: Machine, instruction: Instruction) -> None:
    register, operand = instruction.operands[-2:]
    if instruction.modifiers != ("RCP",):
        return unknown_result(machine, instruction)
    value, known = machine.read_float(operand)
    return machine.write(register, (np.float32(1) / value).view(np.uint32), known)


def arithmetic(machine: Machine, instruction: Instruction) -> None:
    register, *operands = instruction.operands
    if set(instruction.modifiers) - {"FTZ"}:
        return unknown_result(machine, instruction)
    values = [machine.read_float(operand) for operand in operands]
    known = np.ones(machine.lanes, bool)
    for _, also in values:
        known = known & also
    if not known.any():
        return unknown_result(machine, instruction)
    x, y = (value.astype(np.float64) for value, _ in values[:2])
    result = x + y if instruction.name == "FADD" else x * y
    if instruction.name == "FFMA":
        result = result + values[2][0]
    return machine.write(register, result.astype(np.float32).view(np.uint32), known)


def to_uniform(machine: Machine, instruction: Instruction) -> None:
    value, known = machine.read(instruction.operands[-1])
    machine.write(instruction.operands[-2], machine.first_active(value), machine.first_active(known))


def vote(machine: Machine, instruction: Instruction) -> None:
    *predicates, source = instruction.operands
    value, known = machine.read(source)
    active = machine.executing

    def per_warp(flags: Flags) -> Flags:
        return np.repeat(flags.reshape(-1, LANES).any(1), LANES)

    yes, no = per_warp(active & known & value), per_warp(active & known & ~value)
    perhaps = per_warp(active & ~known)
    result = yes if instruction.modifiers[0] == "ANY" else ~no
    certain = (yes | ~perhaps) if instruction.modifiers[0] == "ANY" else (no | ~perhaps)
    ballot = (active & known & value).reshape(-1, LANES) @ (np.uint32(1) << np.arange(LANES, dtype=np.uint32))
    for operand in predicates:
        if operand.predicate:
            machine.write(operand, result, certain)
        else:
            machine.write(operand, np.repeat(ballot.astype(np.uint32), LANES), ~perhaps)


def elect(machine: Machine, instruction: Instruction) -> None:
    active = machine.executing.reshape(-1, LANES)
    first = (active & (active.cumsum(1) == 1)).reshape(-1)
    for operand in instruction.operands:
        if operand.predicate:
            machine.write(operand, first, np.ones(machine.lanes, bool))


def answer(value: bool) -> Callable[[Machine, Instruction], None]:
    def semantics(machine: Machine, instruction: Instruction) -> None:
        unknown_result(machine, instruction)
        if instruction.operands and instruction.operands[0].predicate:
            machine.write(instruction.operands[0], *machine.everywhere(value, np.bool_))

    return semantics


def predicates_to_register(machine: Machine, instruction: Instruction) -> None:
    register, _, base, mask = instruction.operands
    value, known = machine.read_bits(base)
    value, known = value & ~np.uint32(mask.index), known | np.uint32(mask.index)
    for i in range(7):
        if mask.index >> i & 1:
            value = value | machine.values["P"][i].astype(np.uint32) << np.uint32(i)
            known = known & ~((~machine.knowns["P"][i]).astype(np.uint32) << np.uint32(i))
    machine.write(register, value, known)


def register_to_predicates(machine: Machine, instruction: Instruction) -> None:
    _, register, mask = instruction.operands
    value, known = machine.read_bits(register)
    for i in range(7):
        if mask.index >> i & 1:
            bit = np.uint32(1 << i)
            machine.write(Operand("P", i), value & bit != 0, known & bit != 0)


SEMANTICS: dict[str, Callable[[Machine, Instruction], None]] = {
    **dict.fromkeys(("IADD3", "UIADD3"), add),
    **dict.fromkeys(("IMAD", "UIMAD"), multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), shifted_add),
    **dict.fromkeys(("SHF", "USHF"), shift),
    **dict.fromkeys(("LOP3", "ULOP3"), logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), predicate_logic),
    **dict.fromkeys(("ISETP", "UISETP"), compare),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), select),
    **dict.fromkeys(("MOV", "UMOV"), move),
    **dict.fromkeys(("VIMNMX", "VIADDMNMX", "IMNMX"), extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), permute),
    **dict.fromkeys(("LDC", "ULDC"), load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), special),
    **dict.fromkeys(("I2F", "I2FP"), to_float),
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), arithmetic),
    **dict.fromkeys(("VOTE", "VOTEU"), vote),
    **dict.fromkeys(("SGXT", "USGXT"), extend),
    **dict.fromkeys(("BMSK", "UBMSK"), bit_mask),
    "VIADD": add_two,
    "IABS": absolute,
    "FSETP": compare_floats,
    "HFMA2": half_constant,
    "F2I": to_integer,
    "MUFU": function_of_float,
    "R2UR": to_uniform,
    "ELECT": elect,
    "P2R": predicates_to_register,
    "R2P": register_to_predicates,
    "FCHK": answer(False),
    "SYNCS": answer(True),
}
