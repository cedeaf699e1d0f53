"""The emulation of cp.async, ldmatrix and mma.sync (tests/emulation/tensor_core.h): results, and planted faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch

np = pytest.importorskip("numpy")
emulation = pytest.importorskip("emulation")
trials = pytest.importorskip("emulation.trials")

ORDERS = range(8)

pytestmark = trials.needs_compiler
every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture
def run(cuda: ModuleType) -> Callable[..., np.ndarray]:
    """Runs a trial in one block and returns its output, initialised to -7."""

    def launch(
        trial: str, values: np.ndarray, size: int, threads: int, shared: int = 0, options: Sequence[int] = ()
    ) -> np.ndarray:
        memory = np.empty(values.size + 4, np.float32)
        aligned = memory[-(memory.ctypes.data // 4) % 4 :][: values.size]
        aligned[:] = np.asarray(values, np.float32).ravel()
        out = np.full(size, -7, np.float32)
        cuda.run(trial, aligned, out, (1, 1, 1), (threads, 1, 1), shared, list(options))
        return out

    return launch


class TestCopies:
    threads = 77

    def copies(self, run, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
        """The output of a trial, and what it is with every copy."""
        values = trials.numbers(self.threads)
        whole = self.threads // 8 * 8
        expected = values[:whole].copy()
        expected[np.arange(whole) // 4 % 3 == 2] = 0
        out = run(f"copies{kind}", values, self.threads, self.threads, 4 * self.threads)
        assert (out[whole:] == -7).all()
        return out[:whole], expected[::-1]

    @every_order
    def test_land_when_they_are_waited_for(self, cuda, run, order: int) -> None:
        cuda.set_order(order)
        out, expected = self.copies(run)
        assert (out == expected).all()

    @every_order
    def test_a_wait_for_the_first_group_only(self, cuda, run, order: int) -> None:
        cuda.set_order(order)
        out, expected = self.copies(run, " first group")
        expected = np.where((len(out) - 1 - np.arange(len(out))) // 4 % 2, -1, expected)
        assert (out == expected).all()

    @pytest.mark.parametrize("kind", [" without wait", " waiting for too few"])
    def test_what_was_not_waited_for_is_nan(self, cuda, run, kind: str) -> None:
        out, expected = self.copies(run, kind)
        late = np.isnan(out)
        assert late.all() if kind == " without wait" else late.sum() == len(out) / 2
        assert (out[~late] == expected[~late]).all()

    @pytest.mark.parametrize("kind", [" without wait", " waiting for too few"])
    def test_it_may_land_early(self, cuda, run, kind: str) -> None:
        lands = []
        for order in ORDERS:
            cuda.set_order(order)
            out, expected = self.copies(run, kind)
            landed = ~np.isnan(out)
            assert (out[landed] == expected[landed]).all()
            lands.append(int(landed.sum()))
        assert max(lands) > min(lands)

    def test_a_missing_barrier_shows_in_some_order(self, cuda, run) -> None:
        wrong = []
        for order in ORDERS:
            cuda.set_order(order)
            out, expected = self.copies(run, " without barrier")
            wrong.append(not (out == expected).all())
        assert any(wrong)

    @every_order
    @pytest.mark.parametrize("rounds", [1, 2, 3, 10])
    def test_a_ring(self, cuda, run, rounds: int, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(rounds * 4 * 45)
        out = run("ring_of_copies", values, values.size, 45, 3 * 16 * 45)
        assert (out.reshape(rounds, 45, 4) == np.roll(values.reshape(rounds, 45, 4), -1, 1)).all()

    def test_a_ring_without_barriers_shows(self, cuda, run) -> None:
        values = trials.numbers(10 * 4 * 45)
        expected = np.roll(values.reshape(10, 45, 4), -1, 1).ravel()
        wrong = []
        for order in ORDERS:
            cuda.set_order(order)
            wrong.append(
                not (run("ring_of_copies without barrier", values, values.size, 45, 48 * 45) == expected).all()
            )
        assert any(wrong)

    @pytest.mark.parametrize("order", [0, 3])
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("never waiting", "a thread ends before its copies do; block .* thread"),
            ("never committing", "a thread ends before its copies do"),
            ("to misaligned", "cp.async to an address that is no multiple of 16"),
            ("from misaligned", "cp.async from an address that is no multiple of 16"),
            ("outside", "cp.async to an address outside dynamic shared memory"),
        ],
    )
    def test_faults(self, cuda, run, kind: str, message: str, order: int) -> None:
        cuda.set_order(order)
        with pytest.raises(RuntimeError, match=message):
            self.copies(run, f" {kind}")
        out, expected = self.copies(run)  # the next launch is not affected
        assert (out == expected).all()


class TestMatrices:
    rows = (5 * np.arange(32) + 3) % 32  # of which each lane gives the address

    def matrices(self, run, kind: str = "", warps: int = 3, threads: int | None = None) -> np.ndarray:
        threads = threads or 32 * warps
        return run(f"matrices{kind}", trials.numbers(4 * threads), 4 * threads, threads, 16 * threads, self.rows)

    def expected(self, warps: int = 3) -> np.ndarray:
        lane = np.arange(32)
        values = trials.numbers(4 * 32 * warps).reshape(warps, 32, 4)
        return np.stack([values[:, self.rows[8 * i + lane // 4], lane % 4] for i in range(4)], -1).ravel()

    @every_order
    def test_each_lane_gets_a_word_of_each_matrix(self, cuda, run, order: int) -> None:
        cuda.set_order(order)
        assert (self.matrices(run) == self.expected()).all()

    @every_order
    def test_transposed(self, cuda, run, order: int) -> None:
        """Lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of column l / 4, of 16 bits."""
        cuda.set_order(order)
        halves = trials.numbers(4 * 32 * 3).view(np.uint16).reshape(3, 4 * 8, 8)
        matrices = halves[:, self.rows].reshape(3, 4, 8, 8)
        lane = np.arange(32)
        pairs = [matrices[:, :, 2 * (lane % 4) + i, lane // 4] for i in range(2)]  # [warp, matrix, lane] each
        expected = np.stack(pairs, -1).transpose(0, 2, 1, 3)
        out = self.matrices(run, " transposed").view(np.uint16).reshape(3, 32, 4, 2)
        assert (out == expected).all()

    def test_rows_in_the_same_banks_are_counted(self, cuda, run) -> None:
        rows = self.rows
        try:
            for self.rows, conflicts in (
                (np.arange(32), 0),
                (np.arange(32) ^ 5, 0),
                (np.arange(32) * 4 % 32, 4 * 6),
                (np.arange(32) // 8 * 8, 4 * 7),
            ):
                self.matrices(run, warps=2)
                assert cuda.last_launch()["conflicts"] == 2 * conflicts
        finally:
            self.rows = rows

    def test_a_missing_barrier_shows_in_some_order(self, cuda, run) -> None:
        wrong = []
        for order in ORDERS:
            cuda.set_order(order)
            wrong.append(not (self.matrices(run, " without barrier") == self.expected()).all())
        assert any(wrong)

    @pytest.mark.parametrize("order", [0, 3])
    @pytest.mark.parametrize(
        ("kind", "threads", "message"),
        [
            (" misaligned", 64, "ldmatrix from an address that is no multiple of 16"),
            (" outside", 64, "ldmatrix from an address outside dynamic shared memory"),
            (" without a lane", 64, "not every thread reaches|different collectives"),
            ("", 40, "ldmatrix by a warp of fewer than 32 lanes"),
        ],
    )
    def test_faults(self, cuda, run, kind: str, threads: int, message: str, order: int) -> None:
        cuda.set_order(order)
        with pytest.raises(RuntimeError, match=message):
            self.matrices(run, kind, threads=threads)
        assert (self.matrices(run) == self.expected()).all()


KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "tf32 without rounding": torch.float32}


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """The operands that mma takes, in double precision."""
    if kind in ("bf16", "fp16"):
        return torch.from_numpy(values).to(KINDS[kind]).double().numpy()
    bits = values.view(np.uint32).copy()
    if kind == "tf32":
        bits += 0x1000
    return (bits & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64)


class TestProducts:
    def operands(self, kind: str, warps: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        terms = 32 // torch.empty(0, dtype=KINDS[kind]).element_size()
        draw = np.random.default_rng(terms)
        values = draw.standard_normal((warps, 24 * terms + 128)).astype(np.float32)
        return values, *self.split(values, terms)

    def split(self, values: np.ndarray, terms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of A, B and D."""
        a, b, d = np.split(values, [16 * terms, 24 * terms], axis=1)
        return a.reshape(-1, 16, terms), b.reshape(-1, 8, terms), d.reshape(-1, 16, 8)

    @every_order
    @pytest.mark.parametrize("kind", KINDS)
    def test_values(self, cuda, run, kind: str, order: int) -> None:
        cuda.set_order(order)
        values, a, b, d = self.operands(kind)
        out = run(f"product {kind}", values, d.size, 96).reshape(d.shape)
        expected = np.einsum("wmk,wnk->wmn", rounded(a, kind), rounded(b, kind)) + d
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_nan_and_infinity(self, run, kind: str, value: float) -> None:
        values, a, b, d = self.operands(kind, 1)
        a[0, 11, 2], b[0, 5, 7], d[0, 3, 3] = value, value, value
        out = run(f"product {kind}", values, d.size, 32).reshape(d.shape)
        with np.errstate(invalid="ignore"):
            expected = (
                np.where(np.isnan(a[0]), np.nan, rounded(a[0], kind))
                @ np.where(np.isnan(b[0]), np.nan, rounded(b[0], kind)).T
            )
            expected = expected + d
        assert (np.isnan(out) == np.isnan(expected)).all()
        assert (np.isinf(out) == np.isinf(expected)).all()
        assert not np.isfinite(out[0, 11]).any()
        assert not np.isfinite(out[0, :, 5]).any()
        assert np.isfinite(out).any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_warp_that_is_not_whole(self, run, kind: str) -> None:
        values, _, _, d = self.operands(kind, 2)
        with pytest.raises(RuntimeError, match="mma by a warp of fewer than 32 lanes"):
            run(f"product {kind}", values, d.size, 50)

    def test_rounding_to_tf32(self, run) -> None:
        tie = 2.0**-11
        step = 2 * tie
        given = [1, 1 + tie, 1 - tie / 2, -1 - tie, 1 + tie * 0.99, 1 + 3 * tie, -(1 + 2.9 * tie), 3.402e38, 1e-40]
        wanted = [1, 1 + step, 1, -1 - step, 1, 1 + 2 * step, -(1 + step), np.inf, 9 * 2.0**-136]
        given += [np.inf, -np.inf, 0.0, np.nan]
        wanted += [np.inf, -np.inf, 0.0, np.nan]
        signalling = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)
        out = run("roundings", np.concatenate([np.float32(given), signalling]), len(given) + 2, len(given) + 2)
        np.testing.assert_allclose(out[:-2], np.float32(wanted), rtol=0, atol=0)
        assert (out[:-3].view(np.uint32) & 0x1FFF == 0).all()
        assert np.isnan(out[-3:]).all()
