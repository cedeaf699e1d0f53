"""Times functions on a device in interleaved rounds.

A variant is a list of calls on different inputs, so that no input is in the cache. On CUDA the calls are captured in a
graph where possible, which excludes launch overhead. In each round every variant runs once.
"""

from __future__ import annotations

import functools
import logging
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from alexnet_kernels.bench.machine import cache_bytes

Call = Callable[[], object]

MOST_SETS = 6  # sets of inputs, at most
LEAST_ROUNDS = 5  # the median then excludes a round slowed down by page faults
ROUND = 2e-3  # seconds that a variant runs in one round, at least


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, and the lower and upper quartile."""

    median: float
    low: float
    high: float
    rounds: int
    graph: bool  # whether the calls ran as a CUDA graph
    samples: tuple[float, ...] = ()  # one a round

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "samples"}


@dataclass(frozen=True)
class Failure:
    """Why a variant has no time."""

    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"error": self.reason}


class DeviceLost(Exception):
    """The device is unusable in this process after an error of a variant."""

    def __init__(self, variant: str, reason: str) -> None:
        super().__init__(f"{variant}: {reason}")
        self.variant = variant


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def works(device: torch.device) -> bool:
    """Whether the device still runs kernels and draws random numbers, not having a sticky error or broken capture."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.rand(1, device=device)
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


@contextmanager
def guarded(variant: str, device: torch.device, failures: dict[str, str]) -> Iterator[None]:
    """Stores the reason of an error in `failures[variant]`; raises DeviceLost if the device is unusable after it."""
    try:
        yield
    except Exception as error:
        failures[variant] = reason_of(error)
        logging.getLogger(__name__).info("%s: %s", variant, failures[variant], exc_info=True)
    if variant in failures and not works(device):
        raise DeviceLost(variant, failures[variant])


def input_sets(nbytes: int, device: torch.device) -> int:
    """The number of sets of this many bytes that exceed the last-level cache twice, at most MOST_SETS."""
    return max(1, min(MOST_SETS, -(-2 * cache_bytes(device) // max(1, nbytes))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Synchronizes(Exception):
    """The call waits for the device, which a CUDA graph can't capture."""


@functools.cache
def _capture_stream() -> Any:
    return torch.cuda.Stream()


@contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """On CUDA, runs the block on the stream that calls are captured on.

    Autograd runs a backward pass on the stream of its forward pass, which has to be the captured one.
    """
    if device.type != "cuda":
        yield
        return
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(calls: Sequence[Call], pool: Any = None) -> Call:
    """Captures the calls as one CUDA graph; returns its replay, which runs on the memory of the captured calls.

    Graphs of one pool share memory: the replay of one overwrites the results of another. Calls that wait for the
    device are refused before the capture, since a failed capture leaves the device unusable.

    Raises:
        Synchronizes: a call waits for the device.
    """
    stream = _capture_stream()
    with on_capture_stream(torch.device("cuda")):
        for call in calls:
            call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        except RuntimeError as error:
            if "synchronizing" in str(error):
                raise Synchronizes(str(error)) from error
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        for call in calls:
            call()
    return graph.replay


def run_seconds(run: Call, device: torch.device) -> float:
    """Seconds of one run, by CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


class _Variant:
    def __init__(self, calls: Sequence[Call], device: torch.device, pool: Any) -> None:
        for _ in range(2):
            for call in calls:
                call()
        synchronize(device)
        self.graph = False
        self.calls = len(calls)
        self.run: Call = lambda: [call() for call in calls]
        if pool is not None:
            try:
                self.run = captured(calls, pool)
                self.graph = True
            except Synchronizes:  # timed without a graph
                torch.cuda.synchronize(device)
        self.run()
        self.repeats = max(1, min(100, int(ROUND / max(1e-7, run_seconds(self.run, device)))))

    def seconds(self, device: torch.device) -> float:
        def repeated() -> None:
            for _ in range(self.repeats):
                self.run()

        return run_seconds(repeated, device) / self.repeats / self.calls


def measure(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: int = 15,
    graphs: bool = True,
    pause: float = 0.0,
    replayed: Collection[str] = (),
) -> dict[str, Timing | Failure]:
    """Times variants, each a list of calls, in interleaved rounds after warming up. One with an error gets a Failure.

    Args:
        seconds: no round starts after this time, but LEAST_ROUNDS are measured.
        rounds: the largest number of rounds.
        graphs: whether calls on CUDA are captured.
        pause: seconds to wait before each variant, in which spinning threads of the one before go to sleep.
        replayed: variants whose calls replay a CUDA graph of their own, which no other graph can hold.

    Raises:
        DeviceLost: the device is unusable after an error of a variant.
    """
    failures: dict[str, str] = {}
    ready: dict[str, _Variant] = {}
    pool = torch.cuda.graph_pool_handle() if graphs and device.type == "cuda" else None
    for name, calls in variants.items():
        with guarded(name, device, failures):
            ready[name] = _Variant(calls, device, None if name in replayed else pool)
            ready[name].graph = ready[name].graph or name in replayed
    results: dict[str, Timing | Failure] = {name: Failure(reason) for name, reason in failures.items()}
    samples: dict[str, list[float]] = {name: [] for name in ready}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, variant in list(ready.items()):
            time.sleep(pause)
            with guarded(name, device, failures):
                samples[name].append(variant.seconds(device))
            if name in failures:
                results[name] = Failure(failures[name])
                del ready[name], samples[name]
    for name, values in samples.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        results[name] = Timing(statistics.median(values), low, high, len(values), ready[name].graph, tuple(values))
    return {name: results[name] for name in variants}


def copy_rate(device: torch.device, nbytes: int) -> float:
    """Bytes per second, read and written, of copying a large tensor of random numbers.

    The faster of a copy and a negation: on an H100 the copy is a sixth slower.
    """
    source = torch.randn(nbytes // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "negation": [lambda: torch.neg(source, out=target)],
    }
    times = [timing.median for timing in measure(calls, device).values() if isinstance(timing, Timing)]
    assert times
    return 2 * nbytes / min(times)


def gemm_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = measure({"gemm": [lambda: a @ b]}, device)["gemm"]
    assert isinstance(timing, Timing)
    return 2 * size**3 / timing.median
