"""The parts that run in a worker process, each a list of items.

A worker appends its findings itself. If an item exceeds its time limit, the worker prints every thread's stack on
standard error and exits; the runner then starts another worker, which continues with the next item.
"""

from __future__ import annotations

import faulthandler
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import _library, _sources, backends
from alexnet_kernels.bench import machine, roofline
from alexnet_kernels.bench.cases import Case, Expectation, backward_of, cases, compare
from alexnet_kernels.bench.network_row import NetRow
from alexnet_kernels.bench.network_variant import HARDENED
from alexnet_kernels.bench.op_row import OpRow
from alexnet_kernels.bench.optimizer_row import SgdRow
from alexnet_kernels.bench.report import configure
from alexnet_kernels.bench.row import OURS, PURPOSES, Row
from alexnet_kernels.bench.timing import DeviceLost, reason_of, works
from alexnet_kernels.gpu_check import convolutions, findings, kernel_times, report
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import Budget
from alexnet_kernels.op_info import conv2d_relu, with_gradients
from alexnet_kernels.op_info._layers import CONVOLUTIONS
from alexnet_kernels.op_info._record import Inputs

BATCH = 128
LARGE = 1024
HANGS = 15.0  # seconds after which a convolution kernel is taken to hang
GRACE = 5.0  # seconds that an item may run after the end of its part's time


@dataclass(frozen=True)
class Item:
    name: str
    run: Callable[[Collection[str]], dict[str, Any]]
    """Takes the variants to skip, because the device was lost after them."""
    least: float = 1.0
    """The item is not started with fewer seconds left."""
    compiles: bool = False
    most: float = math.inf
    """Seconds that it may take, if fewer than the worker's patience."""


def _small(device: torch.device) -> bool:
    return device.type != "cuda"


def _small_cases() -> list[Case]:
    """The bfloat16 case of each op with the least work: enough to test the command on a CPU."""
    core = [case for case in cases() if case.core and case.dtype == torch.bfloat16]
    core.sort(key=lambda case: case.work.moved(1, True), reverse=True)
    return list({case.op: case for case in core}.values())


def environment(device: torch.device) -> list[Item]:
    def facts(_: Collection[str]) -> dict[str, Any]:
        library = _library.status()
        return machine.facts(device) | {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads",
            "triton": machine.version("triton"),
            "nvcc": machine.output(machine.tool("nvcc") or "nvcc", "--version", pattern=r"V([\d.]+)"),
            "library": {name: value for name, value in library.items() if name != "path"},
            "missing_arch": missing_arch(library, device),
            "backends": backends.report(),
        }

    return [Item("facts", facts, least=0.0)]


def misfit(device: torch.device) -> str | None:
    """Why the installed library can't be checked on this device; None if it can."""
    status = _library.status()
    if not status["loaded"]:
        return str(status["reason"])
    if device.type == "cuda" and not status["cuda_built"]:
        return "it has no CUDA kernels"
    csrc = machine.PACKAGE.parent / "csrc"
    if csrc.is_dir() and (wanted := _sources.digest(csrc)) != status["sources"]:
        return f"it was built from sources {status['sources'] or 'unknown'}, but the sources here are {wanted}"
    return missing_arch(status, device)


def missing_arch(library: dict[str, Any], device: torch.device) -> str | None:
    """Why the library has no machine code for exactly this device; None if it has, or has no CUDA kernels."""
    if device.type != "cuda" or not library["archs"]:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    exact = {f"{major}.{minor}", f"{major}.{minor}a", f"{major}.{minor}f"}
    built = [arch.removesuffix("+PTX") for arch in library["archs"]]
    return None if exact & set(built) else f"built for {', '.join(library['archs'])}, but the device is {major}.{minor}"


def ceilings(device: torch.device) -> list[Item]:
    def rates(_: Collection[str]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for rate in roofline.measure_ceilings(device, small=_small(device)):
            found |= rate
        return found

    return [Item("rates", rates)]


def paths(device: torch.device) -> list[Item]:
    """Compares each of the package's own convolution kernels at AlexNet's layers, output and gradients, with float64.

    Their tiles depend on the batch. For the one that is timed, they are compared with cuDNN's in float32. Two
    workers share the items, so that one kernel's hang does not keep the other from running.
    """
    found = []
    for case in _small_cases() if _small(device) else [case for case in cases() if case.core]:
        if case.op == "conv2d_relu":
            for name, call in _own_convolutions(case, device).items():
                found.append(_own_convolution(case, name, call, device))
    return found


def _own_convolutions(case: Case, device: torch.device) -> dict[str, Callable[[Inputs], Tensor]]:
    if _small(device):
        return {"cpu": lambda x: case.call(x, "cpu")}
    algorithms = conv2d_relu.own_algorithms(case.dtype, device)
    return {f"cuda, {name}": conv2d_relu.by(algorithm) for name, algorithm in algorithms.items()}


def _problem_of_batch(case: Case, call: Callable[[Inputs], Tensor], device: torch.device) -> str | None:
    given = with_gradients(case.make(2 if _small(device) else BATCH, device), case.wrt)
    wide = {name: value.float() if isinstance(value, Tensor) else value for name, value in given.items()}
    wide = with_gradients(wide, case.wrt)
    output = call(given)
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = case.info.reference(**wide)
        # Zero where a rounding may change ReLU's mask.
        grad = torch.randn_like(output) * (expected > case.tolerance * expected.amax())
        gradients = backward_of(expected, wide, case.wrt, grad.float())
    names = ["output", *(f"gradient of {name}" for name in case.wrt)]
    pairs = zip((output, *backward_of(output, given, case.wrt, grad)), (expected, *gradients), strict=True)
    problems = (
        compare(actual, wanted, case.tolerance, f"{name} of batch {len(output)}")
        for name, (actual, wanted) in zip(names, pairs, strict=True)
    )
    return next(filter(None, problems), None)


def _own_convolution(case: Case, name: str, call: Callable[[Inputs], Tensor], device: torch.device) -> Item:
    def problem() -> str | None:
        return Expectation(case, 2, device).problem(call) or _problem_of_batch(case, call, device)

    return Item(f"{case.name} by {name}", lambda _: _checked(problem, device), least=2.0, most=HANGS)


def smoke(device: torch.device) -> list[Item]:
    """Compares every op at AlexNet's layers, output and gradients, with its definition in float64.

    Several workers share the items, because Triton compiles one kernel at a time in a process.
    """
    every = _small_cases() if _small(device) else [case for case in cases() if case.core]

    def item(case: Case | SgdRow, backend: str) -> Item:
        return Item(f"{case.name} by {backend}", lambda _: _compared(case, backend, device), least=2.0)

    compared: list[Case | SgdRow] = [*every, SgdRow(small=True)]
    return [item(case, backend) for backend in OURS[device.type] for case in compared]


def _compared(case: Case | SgdRow, backend: str, device: torch.device) -> dict[str, Any]:
    def problem() -> str | None:
        if isinstance(case, Case):
            return Expectation(case, 2, device).problem(lambda x: case.call(x, backend))
        return case.problem(backend, device)

    error = backends.unavailable(case.op if isinstance(case, Case) else "sgd_step", backend)
    return {"wrong": None, "error": error, "seconds": 0.0} if error else _checked(problem, device)


def _checked(problem: Callable[[], str | None], device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    wrong = error = None
    try:
        wrong = problem()
    except Exception as failure:
        if not works(device):
            raise
        error = reason_of(failure)
    return {"wrong": wrong, "error": error, "seconds": round(time.perf_counter() - start, 2)}


def _timed(device: torch.device, rows: Sequence[Row], seconds: float, rounds: int, least: float = 2.0) -> list[Item]:
    if _small(device):
        seconds, rounds = 0.05, 1

    def item(row: Row) -> Item:
        def run(skip: Collection[str]) -> dict[str, Any]:
            return row.time(device, seconds=seconds, rounds=rounds, skip=skip).to_json()

        return Item(row.name, run, least, row.compiles)

    return [item(row) for row in rows]


def networks(device: torch.device) -> list[Item]:
    """Times training steps and inference of preset "paper", and the kernels of each."""
    if _small(device):
        rows = [NetRow("paper", 2, purpose, width=0.1, size=99) for purpose in PURPOSES[::-1]]
    else:
        sizes = [(purpose, n) for purpose in PURPOSES[::-1] for n in (BATCH, LARGE)]
        rows = [NetRow("paper", n, purpose, more=(f"{HARDENED}, eager",)) for purpose, n in sizes]

    def kernels(row: NetRow, variant: str) -> Item:
        return Item(
            f"kernels of {row.name} by {variant}", lambda _: kernel_times.table(row, variant, device), least=3.0
        )

    tables = [kernels(row, variant) for row in rows for variant in ("auto", "auto, pure bf16", "eager")]
    first, *others = _timed(device, rows, seconds=2.0, rounds=10)
    return [first, *tables[:3], *others, *tables[3:]]


def convolutions_alone(device: torch.device) -> list[Item]:
    """Times cuDNN's convolutions of each layer, beside this package's op by each of its kernels."""
    small = _small(device)
    batch = 2 if small else BATCH

    def item(layer: str) -> Item:
        def run(skip: Collection[str]) -> dict[str, Any]:
            return convolutions.time_layer(layer, torch.bfloat16, batch, device, small=small, skip=skip)

        return Item(f"{layer}, bf16, batch {batch}", run, least=2.0)

    return [item(layer) for layer in (["conv5"] if small else CONVOLUTIONS)]


def ops(device: torch.device) -> list[Item]:
    """Times the ops except conv2d_relu, and the optimizer; forward and backward apart, bfloat16 channels_last first."""
    if _small(device):
        rows: list[Row] = [OpRow(case, 2, apart=True, most_sets=1) for case in _small_cases()]
        rows.append(SgdRow(small=True))
    else:
        chosen = [case for case in cases() if case.core and case.op != "conv2d_relu"]
        main = [case for case in chosen if case.dtype == torch.bfloat16 and case.channels_last]
        others = [case for case in chosen if case not in main]
        rows = [*(OpRow(case, BATCH, apart=True) for case in main), SgdRow()]
        rows += [OpRow(case, BATCH, apart=True) for case in others]
    return _timed(device, rows, seconds=0.4, rounds=15)


def compiled(device: torch.device) -> list[Item]:
    """Times networks beside torch.compile, torchvision's network, then single ops beside torch.compile."""

    def beside(preset: str, compilation: str) -> list[Row]:
        """One row for each compilation, so that one that exceeds the time affects no other."""
        return [NetRow(preset, BATCH, purpose, compile=(compilation,), label=compilation) for purpose in PURPOSES[::-1]]

    if _small(device):  # compilations would take too long
        return _timed(device, [NetRow("torchvision", 2, PURPOSES[0], width=0.05, size=99)], seconds=1.5, rounds=10)
    rows = beside("paper", f"{HARDENED}, compiled") + beside("paper", "compiled")
    rows += [NetRow("torchvision", n, purpose) for n in (BATCH, LARGE) for purpose in PURPOSES[::-1]]
    rows += beside("torchvision", "compiled")
    rows += [NetRow("batchnorm", BATCH, purpose) for purpose in PURPOSES[::-1]]
    core = [case for case in cases() if case.core and case.dtype == torch.bfloat16 and case.channels_last]
    rows += [OpRow(case, BATCH, ("compiled",), label="compiled") for case in core if case.op != "augment"]
    rows += beside("paper", "compiled, max-autotune")
    return _timed(device, rows, seconds=1.5, rounds=10, least=10.0)


WORK: dict[str, Callable[[torch.device], list[Item]]] = {
    "environment": environment,
    "ceilings": ceilings,
    "paths": paths,
    "smoke": smoke,
    "networks": networks,
    "convolutions": convolutions_alone,
    "ops": ops,
    "compiled": compiled,
}


class Worker:
    """Runs the items of parts whose number is `index` modulo `count`.

    Args:
        since: byte at which this command's findings begin. Items that were wrong or crashed in earlier commands run
            again.
        patience: seconds that an item without compilation may take.
    """

    def __init__(
        self, device: torch.device, found: Findings, since: int, index: int, count: int, patience: float
    ) -> None:
        self.device, self.findings, self.since = device, found, since
        self.index, self.count, self.patience = index, count, patience

    def run(self, part: str, seconds: float) -> None:
        start, budget = time.monotonic(), Budget(seconds)
        items = WORK[part](self.device)[self.index :: self.count]
        self.findings.add(part, items=[item.name for item in items])
        done, skip = self._done(part)
        skip |= {f"conv2d_relu by {path}" for path in report.broken_paths(self.findings.lines("paths"))}
        for item in items:
            left = budget.left()
            if item.name not in done and left >= item.least:
                self._run(part, item, left, skip)
        self.findings.add(part, worked=round(time.monotonic() - start, 1), worker=self.index)

    def _done(self, part: str) -> tuple[set[str], set[str]]:
        """The items that are not run again, and the variants after which the device was lost."""
        now = self.findings.lines(part, self.since)
        crashed = set(findings.crashed(now))
        done = {*findings.results(now), *crashed}
        if part != "environment":
            done |= set(report.sound(part, self.findings.lines(part, until=self.since)))
        return done, crashed

    def _run(self, part: str, item: Item, left: float, skip: Collection[str]) -> None:
        # A compilation may be slow without hanging.
        patience = min(self.patience, item.most)
        limit = left + GRACE if item.compiles else min(patience, left + GRACE)
        overtime = item.compiles or limit < patience
        self.findings.add(part, started=item.name, worker=self.index, overtime=overtime)
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            result = item.run(skip)
        except DeviceLost as lost:
            # The next process runs the item again without this variant.
            self.findings.add(part, started=f"{item.name} by {lost.variant}", worker=self.index)
            raise
        self.findings.add(part, item=item.name, result=result)
        faulthandler.cancel_dump_traceback_later()


def prepare(count: int) -> None:
    """Configures this process, one of `count` that run at the same time."""
    faulthandler.enable()
    torch.manual_seed(0)
    configure()
    if count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
