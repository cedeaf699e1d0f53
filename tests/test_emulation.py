"""The emulation of CUDA's threads (tests/emulation): its results, its errors, and the kernels under the sanitizers."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alexnet_kernels import op_info
from alexnet_kernels.op_info import OP_INFOS, Maker, OperatorCall
from alexnet_kernels.op_info.sgd_step import state
from alexnet_kernels.ops.conv2d_relu import LIBRARY, MMA, OWN

np = pytest.importorskip("numpy")
emulation = pytest.importorskip("emulation")
trials = pytest.importorskip("emulation.trials")
calls = pytest.importorskip("emulation.calls")

ALL = 0xFFFFFFFF
ORDERS = range(6)

pytestmark = trials.needs_compiler


@pytest.fixture
def launch(cuda: ModuleType) -> Callable[..., np.ndarray]:
    """Runs a trial and returns its output of `size` elements, initialised to -7."""

    def run(
        trial: str,
        values: Sequence[float] | np.ndarray = (),
        size: int | None = None,
        *,
        grid: tuple[int, ...] = (1,),
        block: tuple[int, ...] | None = None,
        shared: int = 0,
        options: Sequence[int] = (),
    ) -> np.ndarray:
        values = np.asarray(values, np.float32)
        out = np.full(len(values) if size is None else size, -7, np.float32)
        whole = [(*extent, 1, 1)[:3] for extent in (grid, block or (len(values),))]
        cuda.run(trial, values, out, *whole, shared, list(options))
        return out

    return run


class TestKernels:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("threads", [1, 31, 32, 77, 256, 1024])
    def test_barriers_and_shared_memory(self, cuda, launch, threads: int, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(threads * 3 - threads // 2)
        out = launch("block_sum", values, grid=(3,), block=(threads,), shared=4 * threads)
        for block in range(0, len(values), threads):
            assert (out[block : block + threads] == values[block : block + threads].sum()).all()
        whole = values[:threads]
        assert (launch("tree_sum", whole, shared=4 * threads) == whole.sum()).all()

    @pytest.mark.parametrize("order", ORDERS)
    def test_syncwarp(self, cuda, launch, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(77)
        sums = [values[i : i + 32].sum() for i in range(0, 77, 32)]
        assert (launch("warp_sum", values, shared=4 * 77) == np.repeat(sums, 32)[:77]).all()

    @pytest.mark.parametrize("kind", ["by index", "double", "up", "down", "xor"])
    @pytest.mark.parametrize("width", [2, 8, 32])
    @pytest.mark.parametrize("order", [0, 1])
    def test_shuffles(self, cuda, launch, kind: str, width: int, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(96)
        lane = np.arange(32)
        group = lane // width * width
        for operand in (0, 1, 3, 5, width - 1):
            source = {
                "up": np.where(lane - operand < group, lane, lane - operand),
                "down": np.where(lane + operand >= group + width, lane, lane + operand),
                "xor": np.where((lane ^ operand) >= group + width, lane, lane ^ operand),
            }.get(kind, group + operand % width)
            trial = "shuffle" if kind == "by index" else f"shuffle {kind}"
            out = launch(trial, values, options=(ALL, operand, width))
            assert (out.reshape(3, 32) == values.reshape(3, 32)[:, source]).all(), operand

    def test_a_shuffle_of_some_lanes(self, launch) -> None:
        values = trials.numbers(64)
        mask = 0x0FF0F00F
        lane = np.arange(64) % 32
        inside = mask >> lane & 1 == 1
        out = launch("shuffle", values, options=(mask, 2, 32))
        assert (out[inside] == values[np.arange(64) // 32 * 32 + 2][inside]).all()
        assert (out[~inside] == -1).all()

    def test_a_lane_that_takes_no_part_has_no_value(self, launch) -> None:
        values = trials.numbers(45)
        assert np.isnan(launch("shuffle", values, options=(0x0000FFFF, 20, 32))[:16]).all()
        last = launch("shuffle down", values, options=(ALL, 4, 32))[32:]
        assert (last[:9] == values[36:]).all()
        assert np.isnan(last[9:]).all()

    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize("mask", [ALL, 0x80F000FF])
    @pytest.mark.parametrize("above", [-100, 30, 32, 100], ids=lambda v: f"above {v}")
    def test_votes(self, cuda, launch, mask: int, above: int, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(77) - above
        yes = values > 0
        out = launch("votes", values, 6 * 77, options=(mask,)).reshape(6, 77)
        for first in range(0, 77, 32):
            lanes = [i for i in range(first, min(first + 32, 77)) if mask >> i % 32 & 1]
            ballot = sum(1 << i % 32 for i in lanes if yes[i])
            expected = [ballot & 0xFFFF, ballot >> 16, yes[lanes].any(), yes[lanes].all()]
            assert (out[:4, lanes] == np.reshape(expected, (4, 1))).all()
        assert (out[4] == yes.sum()).all()
        assert (out[5] == yes.any()).all()

    @pytest.mark.parametrize("order", ORDERS)
    def test_atomics(self, cuda, launch, order: int) -> None:
        cuda.set_order(order)
        values = trials.numbers(4 * 50)
        out = np.zeros(4 + 200, np.float32)
        cuda.run("atomics", values, out, (4, 1, 1), (50, 1, 1), 0, [])
        total, largest, first, count = out[:4]
        assert (total, largest, count) == (values.sum(), values.max(), 200)
        assert first == (4 if order % 2 else 1)
        assert (out[4:] == 1).all()

    def test_indices(self, launch) -> None:
        grid, block = (3, 2, 4), (5, 3, 2)
        out = launch("indices", (), 6 * 24 * 30, grid=grid, block=block).reshape(24, 30, 6)
        for axis in range(3):
            assert (out[:, :, axis] == np.indices(grid[::-1])[2 - axis].reshape(24, 1)).all()
            assert (out[:, :, 3 + axis] == np.indices(block[::-1])[2 - axis].reshape(1, 30)).all()

    @pytest.mark.parametrize(("trial", "bits"), [("divisions", 31), ("long divisions", 63)])
    def test_divisions_by_multiplication(self, launch, trial: str, bits: int) -> None:
        draw = random.Random(bits)
        most = 2**bits - 1
        powers = [2**k + step for k in range(1, bits) for step in (-1, 0, 1)]
        largest = min(most, 2**62)
        divisors = {d for d in [*powers, 3 * 5 * 7, 10**9, largest] if d <= largest}
        for divisor in [*sorted(divisors), *(draw.randrange(1, 2 ** draw.randrange(1, bits)) for _ in range(50))]:
            quotients = [1, 2, most // divisor, *(draw.randrange(most // divisor + 1) for _ in range(20))]
            dividends = {quotient * divisor + step for quotient in quotients for step in (-1, 0, 1)} | {most, *powers}
            options = [divisor, *(n for n in dividends if 0 <= n <= most)]
            threads = len(options) - 1
            assert (launch(trial, (), threads, block=(threads,), options=options) == 1).all(), divisor

    @pytest.mark.parametrize("bytes", [4, 1000, 227 * 1024])
    def test_shared_memory_starts_as_nan_in_every_block(self, cuda, launch, bytes: int) -> None:
        out = launch("fresh_shared", (), bytes // 4, grid=(2,), block=(64,), shared=bytes, options=(bytes // 4,))
        assert np.isnan(out).all()
        assert cuda.last_launch()["shared"] == bytes

    @pytest.mark.parametrize(
        ("grid", "block", "shared"),
        [
            ((0,), (32,), 0),
            ((1, 0), (32,), 0),
            ((1, 65536), (32,), 0),
            ((1, 1, 65536), (32,), 0),
            ((2**31,), (32,), 0),
            ((1,), (0,), 0),
            ((1,), (1025,), 0),
            ((1,), (32, 33), 0),
            ((1,), (1, 1, 65), 0),
            ((1,), (32,), 227 * 1024 + 1),
        ],
    )
    def test_launches_that_hardware_refuses(self, cuda, launch, grid, block, shared: int) -> None:
        launches = cuda.last_launch()["launches"]
        with pytest.raises(RuntimeError, match="invalid argument" if shared else "invalid configuration"):
            launch("indices", (), 1, grid=grid, block=block, shared=shared)
        assert cuda.last_launch()["launches"] == launches


class TestRecording:
    @pytest.fixture
    def recording(self, cuda: ModuleType) -> Iterator[ModuleType]:
        cuda.set_recording(True)
        yield cuda
        cuda.set_recording(False)

    def test_launches_do_not_run(self, recording: ModuleType) -> None:
        x = torch.zeros(2, 8, 9, 7).contiguous(memory_format=torch.channels_last)
        operators = getattr(torch.ops, emulation.NAMESPACE)
        before = recording.last_launch()["launches"]
        y, argmax = operators.max_pool2d(x, None, [3, 3], [2, 2], [0, 0], False, False)
        assert recording.last_launch()["launches"] == before
        ((kernel, grid, block, shared, arguments),) = recording.recorded()
        assert (grid, block, shared) == ([1, 1, 1], [256, 1, 1], 0)
        assert arguments.endswith(struct.pack("2Q", y.data_ptr(), argmax.data_ptr()))
        assert struct.pack("Q", x.data_ptr()) in arguments
        assert len(arguments) % 8 == 0
        operators.max_pool2d(x, None, [3, 3], [1, 1], [0, 0], False, False)
        assert [launch[0] for launch in recording.recorded()] == [kernel, kernel]

    def test_they_run_again_afterwards(self, recording: ModuleType) -> None:
        recording.set_recording(False)
        x = torch.ones(1, 1, 3, 3)
        y, _ = getattr(torch.ops, emulation.NAMESPACE).max_pool2d(x, None, [3, 3], [1, 1], [0, 0], False, False)
        assert y.item() == 1
        assert recording.recorded() == []


class TestFaults:
    @pytest.mark.parametrize("order", [0, 3])
    @pytest.mark.parametrize(
        ("trial", "threads", "message"),
        [
            ("divergent_barrier", 64, "not every thread reaches.*thread 0 on at a barrier, from thread 7 on finished"),
            ("divergent_shuffle", 32, "not every thread reaches.*at a warp collective, from thread 3 on finished"),
            ("barrier_or_shuffle", 64, "not every thread reaches.*a barrier, from thread 40 on at a warp collective"),
            ("mixed_collectives", 32, "different collectives.*at a warp collective"),
            ("mixed_masks", 32, "different collectives.*at a warp collective"),
            ("outside_mask", 64, r"whose mask leaves it out; block \(0, 0, 0\), from thread.* on running"),
        ],
    )
    def test_threads_that_do_not_meet(self, cuda, launch, trial: str, threads: int, message: str, order: int) -> None:
        cuda.set_order(order)
        with pytest.raises(RuntimeError, match=message):
            launch(trial, (), threads, block=(threads,))
        # The next launch is not affected.
        values = trials.numbers(64)
        assert (launch("votes", values, 6 * 64, options=(ALL,))[4 * 64 : 5 * 64] == (values > 0).sum()).all()
        assert (launch("block_sum", values, shared=4 * 64) == values.sum()).all()
        assert (launch("shuffle", values, options=(ALL, 5, 32)) == np.repeat(values[[5, 37]], 32)).all()

    @pytest.mark.parametrize("trial", ["block_sum", "tree_sum", "warp_sum"])
    def test_a_missing_barrier_shows_in_another_order(self, cuda, launch, trial: str) -> None:
        values = trials.numbers(64)
        missing = "syncwarp" if trial == "warp_sum" else "barrier"
        results = set()
        for order in ORDERS:
            cuda.set_order(order)
            correct = launch(trial, values, shared=4 * 64)
            results.add(launch(f"{trial} without {missing}", values, shared=4 * 64).tobytes())
            assert (
                correct == (np.repeat(values.reshape(2, 32).sum(1), 32) if trial == "warp_sum" else values.sum())
            ).all()
        assert len(results) > 1

    def test_some_orders_hide_a_missing_barrier(self, launch) -> None:
        values = trials.numbers(64)
        assert (launch("tree_sum without barrier", values, shared=4 * 64) == values.sum()).all()

    def test_an_unknown_trial(self, launch) -> None:
        with pytest.raises(ValueError, match="no such trial: nothing"):
            launch("nothing", [1])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def record_calls(few: bool) -> Iterator[OperatorCall]:
    """The operator calls of every op's samples; with `few`, of the typical ones."""
    for info, dtype, memory_format in itertools.product(OP_INFOS.values(), DTYPES, FORMATS):
        if info.images or memory_format == torch.contiguous_format:
            make = Maker(dtype, memory_format)
            for sample in info.typical if few else (*info.typical, *info.samples, *info.ones):
                if info.takes(sample, dtype):
                    yield from op_info.operator_calls(info, info.inputs(sample, make), "cuda")


def step_calls(few: bool) -> Iterator[OperatorCall]:
    """Steps over more tensors than one launch takes, of which only some are aligned to vectors."""
    shapes = ((1,), (7,), (4099,), (6, 5, 3, 3), (0,), *[(9,)] * 70)
    for mixture, unaligned in itertools.product(("plain", "master"), ("",) if few else ("", "params", "grads")):
        given = state(Maker(torch.bfloat16), mixture, shapes)
        if unaligned:
            given[unaligned] = [t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in given[unaligned]]
        lr = torch.tensor(0.01)
        yield from op_info.operator_calls(OP_INFOS["sgd_step"], {**given, "lr": lr}, "cuda")


def convolution_calls(few: bool) -> Iterator[OperatorCall]:
    """Convolutions by each algorithm: OWN is wgmma for aligned tensors of 16 bits and multiples of 8 channels."""
    shapes = (
        [(8, 8, 3), (16, 24, 1), (24, 8, 3)] if few else [(8, 8, 3), (16, 24, 1), (24, 8, 3), (64, 72, 3), (7, 5, 2)]
    )
    for algorithm, dtype, (channels, filters, kernel) in itertools.product((LIBRARY, MMA, OWN), DTYPES, shapes):
        if algorithm != OWN or (dtype != torch.float32 and channels % 8 == 0):
            make = Maker(dtype, torch.channels_last)
            for groups, bias, relu in ((1, make(filters), True), (2, None, False)):
                x, weight = make(2, groups * channels, 5, 6), make(groups * filters, channels, kernel, kernel)
                geometry = [1, 1], [1, 0], groups
                yield "conv2d_relu", (x, weight, bias, *geometry, relu, algorithm)
                operands = make(2, groups * filters, 8 - kernel, 7 - kernel), None, x, weight
                if kernel > 1 or algorithm != MMA:
                    yield "conv2d_relu_backward_input", (*operands, *geometry, relu, algorithm)
                if algorithm == MMA and dtype != torch.float32:
                    yield "conv2d_relu_backward_weight", (*operands, *geometry, algorithm)


def operator_calls(few: bool) -> Iterator[OperatorCall]:
    """Calls that together run every operator of the native library."""
    torch.manual_seed(0)
    with emulation.emulated():
        yield from record_calls(few)
        yield from step_calls(few)
        yield from convolution_calls(few)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the executable of a sanitizer with the given arguments."""

    @functools.cache
    def executable(name: str) -> Path:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            pytest.skip("the sanitizers are tested on x86-64 Linux only")
        source = tmp_path_factory.mktemp("sanitizer") / "empty.cpp"
        source.write_text("int main() {}")
        flags = " ".join(emulation.SANITIZERS[name]).split()
        empty = subprocess.run([emulation.COMPILER, *flags, source, "-o", source.with_suffix("")], capture_output=True)
        if empty.returncode:
            pytest.skip(f"{emulation.COMPILER} lacks {' '.join(flags)}")
        return emulation.build(name)

    # A randomised address space may collide with the sanitizers' shadow memory.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {
            **{key: value for key, value in os.environ.items() if key != "LD_PRELOAD"},
            "OMP_NUM_THREADS": "1",
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1",
        }
        command = [*fixed, str(executable(name)), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer needs an address space that isn't randomised")
        return done

    return run


@pytest.mark.slow
class TestSanitizers:
    @pytest.mark.parametrize(
        ("name", "few", "skip"),
        [("address", False, 0), ("address", False, 1), ("thread", True, 0)],
        ids=["address", "address-unaligned", "thread"],
    )
    def test_every_operator_is_clean(self, sanitized, tmp_path: Path, name: str, few: bool, skip: int) -> None:
        calls.write(operator_calls(few), tmp_path / "calls", skip=skip)
        done = sanitized(name, str(tmp_path / "calls"))
        assert done.returncode == 0, done.stderr[:4000]
        assert "Sanitizer" not in done.stderr
        ran = dict(line.split(": ") for line in done.stdout.splitlines())
        schemas = (emulation.ROOT / "csrc" / "library.cpp").read_text()
        assert set(ran) == set(re.findall(r'"(\w+)\(Tensor', schemas))
        assert [op for op, counts in ran.items() if counts.endswith(", 0 launches")] == []

    def test_one_element_beyond_a_tensor_is_reported_with_its_call(self, sanitized, tmp_path: Path) -> None:
        good, grad, output = torch.randn(64), torch.randn(64), torch.randn(64)
        path = tmp_path / "calls"
        calls.write([("relu_dropout_backward", (g, output, 2.0)) for g in (good, grad)], path)
        values = grad.numpy().tobytes()
        whole, short = struct.pack("<qq", 0, 256) + values, struct.pack("<qq", 0, 252) + values[:-4]
        assert path.read_bytes().count(whole) == 1
        path.write_bytes(path.read_bytes().replace(whole, short))
        done = sanitized("address", str(path))
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert "0 bytes after 252-byte region" in done.stderr or "to the right of 252-byte region" in done.stderr
        assert "replaying call 1 of the file, relu_dropout_backward" in done.stderr

    @pytest.mark.parametrize(
        ("name", "trial", "report"),
        [
            ("address", "read past the end", "heap-buffer-overflow"),
            ("address", "read before the start", "heap-buffer-overflow"),
            ("address", "write past the end", "heap-buffer-overflow"),
            ("address", "dynamic_shared past the end", "use-after-poison"),
            ("address", "static_shared past the end", "index 77 out of bounds"),
            ("address", "vectors misaligned", "misaligned address"),
            ("thread", "block_sum without barrier", "data race"),
            ("thread", "tree_sum without barrier", "data race"),
            ("thread", "warp_sum without syncwarp", "data race"),
            ("thread", "overlapping_vectors twice", "data race"),
            ("thread", "copies without barrier", "data race"),
        ],
    )
    def test_a_planted_fault_is_reported(self, sanitized, name: str, trial: str, report: str) -> None:
        done = sanitized(name, "--trial", trial)
        assert done.returncode != 0
        assert report in done.stderr
        assert f"trials::{trial.split()[0]}<" in done.stderr

    @pytest.mark.parametrize("name", ["address", "thread"])
    def test_correct_kernels_pass_silently(self, sanitized, name: str) -> None:
        trials = ["read", "write", "dynamic_shared", "static_shared", "vectors", "overlapping_vectors"]
        done = sanitized(name, "--trial", *trials, "block_sum", "tree_sum", "warp_sum", "copies")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize(
        ("name", "fault", "report"),
        [
            ("address", "tensor map larger than the tensor", "heap-buffer-overflow"),
            ("thread", "no wait for full stages", "data race"),
            ("thread", "wrong parity of full stages", "data race"),
        ],
    )
    def test_a_fault_of_a_pipeline_is_reported(self, sanitized, name: str, fault: str, report: str) -> None:
        done = sanitized(name, "--pipeline", fault)
        assert done.returncode != 0
        assert report in done.stderr
        assert ("trials::pipeline<" if name == "thread" else "emulation::copy_box") in done.stderr

    @pytest.mark.parametrize("name", ["address", "thread"])
    def test_a_correct_pipeline_passes_silently(self, sanitized, name: str) -> None:
        done = sanitized(name, "--pipeline", "none")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
