"""benchmarks/sass.py: the instructions that machine code executes, of texts whose counts are known."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from helpers import benchmark

np = pytest.importorskip("numpy")
sass, machine, text = benchmark("sass"), benchmark("sass_machine"), benchmark("sass_text")
cubin = benchmark("cubin")


def listing(*lines: str) -> str:
    """A disassembly of instructions at 0x0, 0x10, ..., and the padding after them."""
    lines = (*lines, f"BRA {16 * len(lines):#x}", "NOP", "NOP")
    return "".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n" for i, line in enumerate(lines))


def instructions(*lines: str, arguments: bytes = b"", grid: int = 3, block: int = 64, **options: object) -> float:
    return sass.count(listing(*lines), arguments, [grid], [block], **options).instructions


def value(*lines: str, of: str = "R0", arguments: bytes = b"") -> list[int]:
    """What lanes hold in a register or predicate at the end."""
    bank, known = sass.constant_bank("sm_90", arguments, [1, 1, 1], [32, 1, 1], None)
    code = text.parse(listing(*lines, "EXIT"))
    run = machine.Machine(code, bank, known, [1, 1, 1], [32, 1, 1], np.arange(1))
    run.run()
    kind, index = (of[:-1], int(of[-1]))
    assert (run.knowns[kind][index] == (0xFFFFFFFF if kind == "R" else 1)).all()
    return run.values[kind][index].tolist()


LANE = "S2R R0, SR_TID.X"
ARGUMENT = "c[0x0][0x210]"


class TestCounts:
    def test_straight_line(self) -> None:
        assert instructions("MOV R0, 0x1", "@P0 LDG.E.128 R4, desc[UR4][R2.64]", "EXIT") == 3

    def test_a_false_predicate_is_issued_but_no_pipe_executes_it(self) -> None:
        count = sass.count(listing("@!PT MUFU.RSQ R0, R1", "MUFU.RSQ R0, R1", "EXIT"), b"", [1], [32])
        assert count.instructions == 3
        assert count.of("MUFU") == 2
        assert count.clocks() == {"issue": 3, "ALU": 0, "FMA": 0, "special": 8, "LSU": 0, "FP64": 0}

    @pytest.mark.parametrize("trips", [1, 2, 17])
    def test_a_loop(self, trips: int) -> None:
        loop = ("MOV R0, RZ", "VIADD R0, R0, 0x1", f"ISETP.GE.AND P0, PT, R0, {ARGUMENT}, PT", "@!P0 BRA 0x10", "EXIT")
        assert instructions(*loop, arguments=struct.pack("i", trips)) == 2 + 3 * trips

    def test_a_loop_of_each_lane_takes_the_longest(self) -> None:
        # Lane i makes i + 1 trips.
        loop = (LANE, "VIADD R0, R0, -0x1", "ISETP.GE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x10", "EXIT")
        # The lanes leave the loop one after the other, and nothing makes them wait for each other.
        assert instructions(*loop, block=32) == 1 + 3 * 32 + 32

    def test_a_loop_of_unknown_trip_count_is_an_error(self) -> None:
        loop = ("LDG.E R0, desc[UR4][R2.64]", "VIADD R0, R0, -0x1", "ISETP.GE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x10")
        with pytest.raises(sass.UnknownError, match="the trip count of the loop that ends at 0x30"):
            instructions(*loop, "EXIT")

    def test_an_argument_that_is_not_given_is_unknown(self) -> None:
        loop = ("MOV R0, RZ", "VIADD R0, R0, 0x1", f"ISETP.GE.AND P0, PT, R0, {ARGUMENT}, PT", "@!P0 BRA 0x10", "EXIT")
        with pytest.raises(sass.UnknownError, match="trip count"):
            instructions(*loop, arguments=bytes(4), known=[False] * 4)
        with pytest.raises(sass.UnknownError, match="trip count"):
            instructions(*loop)

    def test_a_loop_without_an_end_is_an_error(self) -> None:
        with pytest.raises(sass.UnknownError, match="more than 200000 instructions"):
            instructions("MOV R0, RZ", "BRA 0x0", "EXIT")

    def test_an_unknown_exit_is_an_error(self) -> None:
        with pytest.raises(sass.UnknownError, match="the exit at 0x20"):
            instructions("LDS R0, [R1]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 EXIT", "EXIT")

    BRANCH = ("BSSY B0, 0x70", "@P0 BRA 0x50", "MOV R1, 0x1", "BRA 0x60", "MOV R2, 0x2", "BSYNC B0", "EXIT")

    def test_a_uniform_branch_takes_one_side(self) -> None:
        compare = f"ISETP.NE.AND P0, PT, {ARGUMENT}, RZ, PT"
        assert instructions(compare, *self.BRANCH, arguments=struct.pack("i", 0)) == 1 + 6
        assert instructions(compare, *self.BRANCH, arguments=struct.pack("i", 1)) == 1 + 5

    def test_a_divergent_branch_takes_both(self) -> None:
        compare = "ISETP.GE.AND P0, PT, R0, 0x8, PT"
        sides = ("BSSY B0, 0x80", "@P0 BRA 0x60", "MOV R1, 0x1", "BRA 0x70", "MOV R2, 0x2", "BSYNC B0", "EXIT")
        # Both sides reach BSYNC, one after the other.
        assert instructions(LANE, compare, *sides, block=32) == 2 + 2 + 2 + 1 + 2 + 1
        assert instructions(LANE, compare, *sides, block=8) == 2 + 2 + 2 + 1 + 1

    @pytest.mark.parametrize(("bound", "count"), [(32, 4), (8, 9), (0, 8)], ids=["all", "some", "none"])
    def test_a_branch_of_a_whole_warp(self, bound: int, count: int) -> None:
        """BRA.U jumps if all lanes do; otherwise some jump after it, and both sides come to BSYNC."""
        lines = (LANE, f"ISETP.LT.AND P0, PT, R0, {bound:#x}, PT", "@P0 BRA.U 0x70", "BSSY B0, 0x60", "@P0 BRA 0x60")
        assert instructions(*lines, "MOV R1, 0x1", "BSYNC B0", "EXIT", block=32) == count

    def test_a_branch_on_what_is_loaded_takes_both(self) -> None:
        load = ("LDG.E R0, desc[UR4][R2.64]", "ISETP.GE.AND P0, PT, R0, 0x8, PT")
        sides = ("BSSY B0, 0x80", "@P0 BRA 0x60", "MOV R1, 0x1", "BRA 0x70", "MOV R2, 0x2", "BSYNC B0", "EXIT")
        assert instructions(*load, *sides) == 2 + 2 + 2 + 1 + 2 + 1

    def test_known_bits_beside_unknown_ones(self) -> None:
        pack = ("LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "SEL R1, RZ, 0x40, P0")
        unpack = ("LOP3.LUT R1, R1, 0x100, RZ, 0xfc, !PT", "LOP3.LUT P1, RZ, R1, {}, RZ, 0xc0, !PT", "@P1 EXIT", "EXIT")
        assert instructions(*pack, *(line.format("0x100") for line in unpack)) == 6
        assert instructions(*pack, *(line.format("0x80") for line in unpack)) == 7
        with pytest.raises(sass.UnknownError, match="the exit at 0x50"):
            instructions(*pack, *(line.format("0x40") for line in unpack))
        perhaps = ("LOP3.LUT R1, RZ, 0x100, RZ, 0xfc, !PT", "@P0 LOP3.LUT R1, R1, 0x40, RZ, 0xfc, !PT", *unpack[1:])
        assert instructions(*pack[:2], *(line.format("0x100") for line in perhaps)) == 6
        with pytest.raises(sass.UnknownError, match="the exit at 0x50"):
            instructions(*pack[:2], *(line.format("0x40") for line in perhaps))
        saved = ("P2R R1, PR, RZ, 0x3", "R2P PR, R1, 0x2", "@P1 EXIT", "EXIT")
        assert instructions(*pack[:2], "ISETP.EQ.AND P1, PT, RZ, RZ, PT", *saved) == 6

    def test_warps_that_end_early(self) -> None:
        # 64 threads of 100 have work: the second block's warps 0 and 1 of four have none.
        early = (LANE, "S2R R1, SR_CTAID.X", "IMAD R0, R1, 0x80, R0", "ISETP.GE.AND P0, PT, R0, 0xc0, PT", "@P0 EXIT")
        assert instructions(*early, "MOV R1, 0x1", "EXIT", grid=2, block=128) == 5 + 2 * 6 / 8

    def test_a_subroutine(self) -> None:
        call = ("MOV R8, 0x20", "CALL.REL.NOINC 0x40", "MOV R1, RZ", "EXIT", "MOV R2, RZ", "RET.REL.NODEC R8 0x0")
        assert instructions(*call) == 6

    def test_the_slow_path_of_special_operands_is_not_taken(self) -> None:
        check = (
            "FCHK P0, R4, R5",
            "@!P0 BRA 0x40",
            "MOV R8, 0x40",
            "CALL.REL.NOINC 0x50",
            "EXIT",
            "RET.REL.NODEC R8 0x0",
        )
        assert instructions(*check) == 3
        loaded = ("ISETP.GT.U32.AND P0, PT, R4, 0x727fffff, PT", *check[1:])
        assert instructions("LDG.E R4, desc[UR4][R2.64]", "NOP", *loaded[:1], "@!P0 BRA 0x60", "MOV R8, 0x60",
                            "CALL.REL.NOINC 0x70", "EXIT", "RET.REL.NODEC R8 0x0") == 5  # fmt: skip

    def test_lanes_that_wait_for_each_other_forever_are_an_error(self) -> None:
        marks = (LANE, "BSSY B0, 0x70", "BSSY B1, 0x70", "ISETP.GE.AND P0, PT, R0, 0x8, PT", "@P0 BRA 0x60")
        assert instructions(*marks, "BSYNC B0", "BSYNC B0", "EXIT", block=32) == 5 + 3 + 2
        with pytest.raises(sass.UnknownError, match="wait at a barrier that others do not reach"):
            instructions(*marks, "BSYNC B0", "BSYNC B1", "EXIT", block=32)

    def test_a_lane_that_breaks_is_not_waited_for(self) -> None:
        leave = (LANE, "BSSY B0, 0x60", "ISETP.GE.AND P0, PT, R0, 0x8, PT", "@P0 BREAK B0", "@P0 BRA 0x70", "BSYNC B0")
        assert instructions(*leave, "EXIT", "EXIT", block=32) == 5 + 2 + 1

    def test_indirect_jumps_are_refused(self) -> None:
        with pytest.raises(sass.UnknownError, match="BRX at 0x0 is not interpreted"):
            instructions("BRX R2 -0x10", "EXIT")

    def test_the_mix(self) -> None:
        code = listing("LDG.E.128 R4, desc[UR4][R2.64]", "IMAD.WIDE R2, R0, 0x4, R2", "FFMA R0, R1, R2, R3",
                       "SHFL.UP PT, R0, R1, 0x1, RZ", "STS [R0], R1", "F2FP.BF16.F32.PACK_AB R0, R1, R2",
                       "STG.E.128 desc[UR4][R2.64], R4", "ULDC UR4, c[0x0][0x210]", "EXIT")  # fmt: skip
        expected = {"global loads", "integer", "floating point", "shuffles", "shared memory", "conversions"}
        expected |= {"global stores", "constants", "control"}
        assert sass.count(code, b"", [1], [32]).mix() == dict.fromkeys(expected, 1)

    def test_few_warps_stand_for_the_grid(self) -> None:
        drawn = sass.draw_warps(10_000, 256)
        assert len(np.unique(drawn)) == len(drawn) == 256
        assert np.histogram(drawn, 8, (0, 10_000))[0].tolist() == pytest.approx([32] * 8, abs=2)
        assert sass.draw_warps(7, 256).tolist() == list(range(7))


A, B = 0x9E3779B9, 0x7F4A7C15
WIDE = A << 32 | B
LOAD = (f"MOV R2, {B:#x}", f"MOV R3, {A:#x}", "MOV R5, RZ", "MOV R4, 0x5")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["IADD3 R0, R2, R3, 0x1"], A + B + 1),
        (["IADD3 R6, P0, R2, R3, RZ", "IADD3.X R0, RZ, RZ, RZ, P0, !PT"], (A + B) >> 32),
        (["IADD3 R6, P0, R3, -R2, RZ", "IADD3.X R0, R4, ~R5, RZ, P0, !PT"], 5 - (A < B)),
        (["IADD3 R6, P0, R2, -R3, RZ", "IADD3.X R0, R4, ~R5, RZ, P0, !PT"], 5 - (B < A)),
        (["IADD3 R6, P0, R2, -RZ, RZ", "IADD3.X R0, R4, ~R5, RZ, P0, !PT"], 5),
        (["IMAD R0, R2, R3, R4"], A * B + 5),
        (["IMAD.HI.U32 R0, R2, R3, RZ"], A * B >> 32),
        (["IMAD.HI R0, R3, 0x1000, RZ"], (A - 2**32) * 0x1000 >> 32),
        (["IMAD.WIDE.U32 R6, R2, R3, R4", "MOV R0, R7"], A * B + 5 >> 32),
        (["IMAD.WIDE R6, R3, 0x10, R2", "MOV R0, R7"], (A - 2**32) * 16 + WIDE >> 32),
        (["IMAD.WIDE.U32 R6, P0, R3, -0x1, R2", "IMAD.X R0, RZ, RZ, R4, P0"], 5 + (A * (2**32 - 1) + WIDE >> 64)),
        (["IMAD.X R0, R4, 0x3, ~R5, PT"], 15),
        (["LEA R0, R2, R3, 0x4"], (B << 4) + A),
        (["LEA R6, P0, R3, R2, 0x1", "LEA.HI.X R0, R3, R4, RZ, 0x1, P0"], (A >> 31) + 5 + ((A << 1) % 2**32 + B >> 32)),
        (["LEA.HI.X.SX32 R0, R3, R4, 0x1, !PT"], 5 - 1),
        (["SHF.L.U32 R0, R2, 0x3, RZ"], B << 3),
        (["SHF.L.U64.HI R0, R2, 0x3, R3"], WIDE << 3 >> 32),
        (["SHF.R.U32.HI R0, RZ, 0x3, R3"], A >> 3),
        (["SHF.R.S32.HI R0, RZ, 0x1f, R3"], -1),
        (["SHF.R.U64 R0, R2, 0x3, R3"], WIDE >> 3),
        (["SHF.L.U32 R0, R2, 0x20, RZ"], 0),
        (["LOP3.LUT R0, R2, R3, R4, 0xe8, !PT"], (A & B) | (A & 5) | (B & 5)),
        (["LOP3.LUT R0, R2, 0xff, RZ, 0xc0, !PT"], B & 0xFF),
        (["PRMT R0, R2, 0x7210, R3"], (A & 0xFF000000) | (B & 0xFFFFFF)),
        (["PRMT R0, R3, 0xb, RZ"], 0xB9B9B9FF),
        (["SGXT.U32 R0, R3, 0x5"], A & 31),
        (["SGXT R0, R3, 0x5"], (A & 31) - 32),
        (["SGXT R0, R3, 0x20"], A),
        (["BMSK R0, R4, 0x3"], 0b11100000),
        (["IABS R0, R3"], 2**32 - A),
        (["VIADDMNMX R0, R4, -0x7, R5, !PT"], 0),
        (["VIADDMNMX R0, R4, 0x7, R3, PT"], A),
        (["VIMNMX.U32 R0, R3, R2, PT"], B),
        (["ISETP.GT.AND P0, PT, R3, RZ, PT", "SEL R0, R4, R2, P0"], B),
        (["ISETP.GT.U32.AND P0, P1, R3, RZ, PT", "SEL R0, R4, R2, P1"], B),
        (["ISETP.GE.U32.AND P0, PT, R2, R3, PT", "ISETP.GE.AND.EX P0, PT, R4, 0x5, PT, P0", "SEL R0, R4, RZ, P0"], 0),
        (["ISETP.GE.U32.AND P0, PT, R3, R2, PT", "ISETP.GE.AND.EX P0, PT, R4, 0x5, PT, P0", "SEL R0, R4, RZ, P0"], 5),
        (["ISETP.NE.AND P0, PT, R4, 0x5, PT", "ISETP.NE.OR.EX P0, PT, R4, 0x6, P0, P0", "SEL R0, R4, RZ, P0"], 5),
        (["PLOP3.LUT P0, P1, PT, PT, !PT, 0x40, 0x2a", "SEL R0, R4, RZ, P0"], 5),
        (["I2F.RP R0, R2"], 0x4EFE94F9),
        (["I2FP.F32.U32 R0, R3"], 0x4F1E377A),
        (["MOV R6, 0x40400000", "MUFU.RCP R0, R6"], 0x3EAAAAAB),
        (["MOV R6, 0x40f00000", "F2I.FTZ.U32.TRUNC.NTZ R0, R6"], 7),
        (["HFMA2.MMA R0, -RZ, RZ, 1.875, 0"], 0x3F800000),
        (["FADD R0, -RZ, 1.5"], 0x3FC00000),
        (["MOV R6, 0x7", "R2P PR, R6, 0x7", "P2R R0, PR, RZ, 0x5"], 5),
        (["ULDC UR4, c[0x0][0x210]", "UIADD3 UR4, UR4, 0x1, URZ", "IMAD.U32 R0, RZ, RZ, UR4"], 0x01020305),
        (["LDC.U8 R0, c[0x0][R4+0x20c]"], 0x03),
    ],
)
def test_an_instruction(lines: list[str], expected: int) -> None:
    assert value(*LOAD, *lines, arguments=struct.pack("I", 0x01020304)) == [expected % 2**32] * 32


@pytest.mark.parametrize(
    ("lines", "of", "expected"),
    [
        ([LANE, "VOTE.ANY P1, P0"], "P1", [True] * 32),
        ([LANE, "VOTE.ALL P1, P0"], "P1", [False] * 32),
        ([LANE, "R2UR UR4, R0", "IMAD.U32 R1, RZ, RZ, UR4"], "R1", [0] * 32),
        ([LANE, "@P0 IADD3 R0, R0, 0x64, RZ"], "R0", [i + 100 * (i >= 8) for i in range(32)]),
        (["ELECT P1, PT"], "P1", [True] + [False] * 31),
    ],
)
def test_lanes(lines: list[str], of: str, expected: list) -> None:
    compare = "ISETP.GE.AND P0, PT, R0, 0x8, PT"
    assert value(lines[0], compare, *lines[1:], of=of) == expected


KERNEL = """
__global__ void divide(long long a, long long b, int c, float* out) {
  const long long n = a / b, m = a % b;
#pragma unroll 1
  for (long long i = 0; i < n + c / 7; ++i) asm volatile("st.global.f32 [%0], 0f00000000;" ::"l"(out + i));
  if (m == threadIdx.x) asm volatile("st.global.f64 [%0], 0d0000000000000000;" ::"l"(out));
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None or cubin.find_cuobjdump() is None, reason="needs nvcc and cuobjdump")
def test_divisions_of_a_compiled_kernel(tmp_path: Path) -> None:
    (tmp_path / "divide.cu").write_text(KERNEL)
    file = tmp_path / "divide.cubin"
    command = ["nvcc", "-cubin", "-arch=sm_90", str(tmp_path / "divide.cu"), "-o", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    ((_, code),) = text.split(cubin.disassemble(file, cubin.find_cuobjdump(), "sm_90")).items()
    for a, b, c in [(100, 7, 0), (2**40 + 12345, 2**36 + 1, 21), (2**33 - 1, 2**30, -7), (96, 97, 350)]:
        count = sass.count(code, struct.pack("qqiiQ", a, b, c, 0, 1 << 20), [1], [128])
        quotient = (abs(c) // 7) * (1 if c >= 0 else -1)
        assert count.opcodes["STG.E"] == a // b + quotient
        # Of four warps, the one with the thread of the remainder stores.
        assert count.executed["STG.E.64"] == (0.25 if a % b < 128 else 0)
