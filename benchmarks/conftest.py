"""`pytest benchmarks/`: every op and network beside its baselines, through pytest-benchmark.

The first test of a row measures all of its variants in interleaved rounds, as `alexnet-kernels bench` does. Each
variant's test replays its rounds to pytest-benchmark, so that tables, --benchmark-json and --benchmark-compare work as
usual. A variant that computes wrong values fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alexnet_kernels.bench import report, rows, tables
from alexnet_kernels.bench.row import Row, RowResult, is_ours
from alexnet_kernels.bench.timing import Failure, Timing


class Replay:
    """A timer that replays measured rounds: for each, 0 and then its seconds."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self) -> float:
        return self.times.pop(0) if self.times else 0.0


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alexnet_kernels")
    group.addoption("--smoke", action="store_true", help="measure every op, network and baseline once, small")
    group.addoption("--batches", help="batch sizes N,N (default: 1,32; on a GPU 1,32,128,256,1024)")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    group.addoption("--seconds", type=float, default=1.0, help="time limit of a row's variants together (default: 1)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks must run one at a time: leave -n out")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each row, direction and variant."""
    kinds = {"test_ops": "ops", "test_nets": "nets", "test_suite": "suite", "test_lpips_rows": "lpips"}
    kind = kinds[metafunc.module.__name__.rpartition(".")[2]]
    config = metafunc.config
    device = torch.device(config.getoption("--device"))
    batches = config.getoption("--batches")
    try:
        numbers = [int(number) for number in batches.split(",")] if batches else None
    except ValueError:
        raise pytest.UsageError(f"--batches {batches}: N,N expected") from None
    cells = []
    for row in rows.rows(device, [kind], numbers, config.getoption("--smoke")):
        for direction in row.directions:
            for variant in row.variants(device):
                name = f"{tables.full_name(row.name, direction)}, {variant}".replace(", ", "-")
                cells.append(pytest.param(row, direction, variant, id=name, marks=pytest.mark.benchmark(timer=REPLAY)))
    metafunc.parametrize(("row", "direction", "variant"), cells)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Row], RowResult]:
    """Measures a row, or returns its result if it was the last one measured."""
    config = request.config
    device, smoke = torch.device(config.getoption("--device")), config.getoption("--smoke")
    report.configure()
    last: dict[str, RowResult] = {}

    def of(row: Row) -> RowResult:
        if row.name not in last:
            last.clear()
            timing = rows.SMOKE_TIMING if smoke else {"seconds": config.getoption("--seconds"), "rounds": 15}
            last[row.name] = row.time(device, **timing)
        return last[row.name]

    return of


@pytest.fixture
def give_report(benchmark: Any, measured: Callable[[Row], RowResult]) -> Callable[[Row, str, str], None]:
    def give(row: Row, direction: str, variant: str) -> None:
        result = measured(row)
        if why := result.wrong.get(variant):
            pytest.fail(f"computes wrong values: {why}", pytrace=False)
        measured_here = result.directions[direction]
        timing = measured_here.times.get(variant)
        why = result.errors.get(variant) or (timing.reason if isinstance(timing, Failure) else None)
        if why and is_ours(variant):
            pytest.fail(why, pytrace=False)
        if not isinstance(timing, Timing):
            pytest.skip(why or "it has no such direction")
        benchmark.group = tables.full_name(row.name, direction)
        found = measured_here.to_json()
        benchmark.extra_info |= {name: found[name] for name in ("bytes", "operations", "cached")}
        benchmark.extra_info |= {"graph": timing.graph, "batch": result.batch}
        REPLAY.times = [time for seconds in timing.samples for time in (0.0, seconds)]
        benchmark.pedantic(lambda: None, rounds=timing.rounds, iterations=1)

    return give
