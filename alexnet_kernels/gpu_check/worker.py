"""The parts that run in a worker process. Each yields (item, what was found), after `begin(item)`.

A worker appends its findings itself. It ends itself, with every thread's stack on standard error, if an item takes
longer than it may: the runner then starts another, which goes on with the next item.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from alexnet_kernels import _library, _sources, backends
from alexnet_kernels.gpu_check import convolutions, kernel_times
from alexnet_kernels.gpu_check.findings import Findings, finished
from alexnet_kernels.gpu_check.plan import Budget, share
from alexnet_kernels.testing import bench, machine, roofline
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing.rows import HARDENED, OURS, PURPOSES, NetRow, OpRow, Row, SgdRow, to_json
from alexnet_kernels.testing.timing import DeviceLost, reason_of, works

BATCH = 128
LARGE = 1024
PATIENCE = 60.0  # seconds for an item that compiles nothing
GRACE = 10.0  # seconds that an item may go on after its part's time
MATRICES = ("conv2d_relu", "linear_relu_dropout")

Found = Iterator[tuple[str, dict[str, Any]]]


class Part:
    """What a part is given: the device, its time, and what need not run again."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        seconds: float,
        findings: Findings,
        index: int = 0,
        count: int = 1,
        patience: float = PATIENCE,
    ) -> None:
        self.name, self.device, self.findings = name, device, findings
        self.index, self.count, self.patience = index, count, patience
        self.budget = Budget(seconds)
        self.done = finished(findings.lines(name))
        self.late: list[str] = []

    @property
    def small(self) -> bool:
        return self.device.type != "cuda"

    def begin(self, item: str, least: float = 1.0, compiles: bool = False) -> bool:
        """Whether to start the item: it is not done, and there are at least so many seconds."""
        if item in self.done:
            return False
        left = self.budget.left()
        if left < least:
            self.late.append(item)
            return False
        # Compiling takes as long as it takes: silence is no sign of a hang.
        limit = left + GRACE if compiles else min(self.patience, left + GRACE)
        self.findings.add(self.name, started=item, worker=self.index, overtime=limit < self.patience or compiles)
        faulthandler.dump_traceback_later(limit, exit=True)
        return True

    def run(self, work: Callable[[Part], Found]) -> None:
        start = time.monotonic()
        for item, result in work(self):
            self.findings.add(self.name, item=item, result=result)
            faulthandler.cancel_dump_traceback_later()
        if self.late:
            self.findings.add(self.name, late=self.late)
        self.findings.add(self.name, worked=round(time.monotonic() - start, 1), index=self.index)


def environment(part: Part) -> Found:
    if part.begin("facts"):
        library = _library.status()
        found = machine.facts(part.device) | {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads",
            "triton": machine.version("triton"),
            "nvcc": machine.output(machine.tool("nvcc") or "nvcc", "--version", pattern=r"V([\d.]+)"),
            "library": {name: value for name, value in library.items() if name != "path"},
            "missing_arch": missing_arch(library, part.device),
            "backends": backends.report(),
        }
        yield "facts", found


def misfit(device: torch.device) -> str | None:
    """Why the installed library isn't the one to check on this device; None if it is."""
    status = _library.status()
    if not status["loaded"]:
        return str(status["reason"])
    if device.type == "cuda" and not status["cuda_built"]:
        return "it has no CUDA kernels"
    csrc = machine.PACKAGE.parent / "csrc"
    if csrc.is_dir() and (wanted := _sources.digest(csrc)) != status["sources"]:
        return f"it was built from other sources: {status['sources'] or 'unknown'}, and those here are {wanted}"
    return missing_arch(status, device)


def missing_arch(library: dict[str, Any], device: torch.device) -> str | None:
    """Why the library has no machine code of its own for the device; None if it has, or has no CUDA kernels at all."""
    if device.type != "cuda" or not library["archs"]:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    exact = {f"{major}.{minor}", f"{major}.{minor}a", f"{major}.{minor}f"}
    built = [arch.removesuffix("+PTX") for arch in library["archs"]]
    return None if exact & set(built) else f"built for {', '.join(library['archs'])}, but the device is {major}.{minor}"


def ceilings(part: Part) -> Found:
    if part.begin("rates"):
        found: dict[str, Any] = {}
        for rate in roofline.measure_ceilings(part.device, small=part.small):
            found |= rate
        yield "rates", found


def smoke(part: Part) -> Found:
    """Every op at AlexNet's layers, output and gradients, against its definition in float64.

    Several workers share the items: Triton compiles its kernels one by one.
    """
    every = [case for case in registry.cases() if case.core]
    if part.small:
        every = list({case.op: case for case in every if case.dtype == torch.bfloat16}.values())
    pairs: list[tuple[registry.Case | SgdRow, str]] = []
    for backend in OURS[part.device.type]:
        pairs += [(case, backend) for case in every]
        pairs.append((SgdRow(small=True), backend))
    for case, backend in pairs[part.index :: part.count]:
        item = f"{case.name} by {backend}"
        op = case.op if isinstance(case, registry.Case) else "sgd_step"
        if not part.begin(item, least=2.0):
            continue
        start = time.perf_counter()
        problem, error = None, backends.unavailable(op, backend)
        if error is None:
            try:
                if isinstance(case, registry.Case):
                    expectation = registry.Expectation(case, 2, part.device)
                    problem = expectation.problem(lambda x, case=case, backend=backend: case.call(x, backend))  # type: ignore[misc]
                else:
                    problem = case.problem(backend, part.device)
            except Exception as failure:
                error = reason_of(failure)
                if not works(part.device):
                    raise DeviceLost(backend, error) from failure
        yield item, {"wrong": problem, "error": error, "seconds": round(time.perf_counter() - start, 2)}


def _timed(part: Part, rows: Sequence[Row], seconds: float, rounds: int, least: float = 2.0) -> Found:
    for row in rows:
        compiles = not isinstance(row, SgdRow) and bool(row.compile)
        if not part.begin(row.name, least=least, compiles=compiles):
            continue
        skip = {item for item in part.done if item.startswith(f"{row.name} by ")}
        try:
            result = row.time(part.device, seconds=seconds, rounds=rounds, skip=skip)
        except DeviceLost as lost:
            # The row itself goes on, in another process, without this variant.
            part.findings.add(part.name, started=f"{row.name} by {lost.variant}", worker=part.index)
            raise
        yield row.name, to_json(result)


def networks(part: Part) -> Found:
    """Training steps and inference of preset paper, then where the time of a step goes, by kernel."""
    if part.small:
        rows = [NetRow("paper", 2, purpose, width=0.1) for purpose in PURPOSES]
    else:
        rows = [NetRow("paper", n, purpose, more=("hardened, eager",)) for n in (BATCH, LARGE) for purpose in PURPOSES]
        rows.sort(key=lambda row: row.purpose == "inference")
    training = [row for row in rows if row.purpose != "inference"]
    first, *others = rows
    yield from _timed(part, [first], seconds=2.0, rounds=10)
    yield from _kernels(part, [training[0]])
    yield from _timed(part, others, seconds=2.0, rounds=10)
    yield from _kernels(part, rows)


def _kernels(part: Part, rows: Sequence[NetRow]) -> Found:
    for row in rows:
        for variant in ("auto", "auto, pure bf16", "eager"):
            item = f"kernels of {row.name} by {variant}"
            if part.begin(item, least=3.0):
                yield item, kernel_times.table(row, variant, part.device)


def convolutions_alone(part: Part) -> Found:
    batch = 2 if part.small else BATCH
    for layer in ["conv5"] if part.small else registry.CONVOLUTIONS:
        item = f"{layer}, bf16, batch {batch}"
        if part.begin(item, least=2.0):
            yield item, convolutions.time_layer(layer, torch.bfloat16, batch, part.device, small=part.small)


def ops(part: Part) -> Found:
    """The elementwise ops and the optimizer, forward and backward apart."""
    if part.small:  # one case of each op shows that the command works
        every = {case.op: case for case in registry.cases() if case.core and case.dtype == torch.bfloat16}
        rows: list[Row] = [*(OpRow(case, 2, apart=True) for case in every.values()), SgdRow(small=True)]
    else:
        every_case = [case for case in registry.cases() if case.core]
        plain = [OpRow(case, BATCH, apart=True) for case in every_case if case.op != "conv2d_relu"]
        rows = [*plain[:14], SgdRow(), *plain[14:]]
    yield from _timed(part, rows, seconds=0.4, rounds=15)


def compiled(part: Part) -> Found:
    """Networks beside torch.compile's of the same, then torchvision's, then single ops."""
    if part.small:
        return

    def beside(preset: str, compiled: str) -> list[Row]:
        """A row for each compilation: one that outlasts the time costs no other."""
        return [NetRow(preset, BATCH, purpose, compile=(compiled,), label=compiled) for purpose in PURPOSES[::-1]]

    rows = beside("paper", f"{HARDENED}, compiled") + beside("paper", "compiled")
    rows += [NetRow("torchvision", n, purpose) for n in (BATCH, LARGE) for purpose in PURPOSES[::-1]]
    rows += beside("torchvision", "compiled")
    rows += [NetRow("batchnorm", BATCH, purpose) for purpose in PURPOSES[::-1]]
    core = [case for case in registry.cases() if case.core and case.dtype == torch.bfloat16 and case.channels_last]
    rows += [OpRow(case, BATCH, ("compiled",), label="compiled") for case in core if case.op != "augment"]
    rows += beside("paper", "compiled, max-autotune")
    yield from _timed(part, rows, seconds=1.5, rounds=10, least=10.0)


WORK: dict[str, Callable[[Part], Found]] = {
    "environment": environment,
    "ceilings": ceilings,
    "smoke": smoke,
    "networks": networks,
    "convolutions": convolutions_alone,
    "ops": ops,
    "compiled": compiled,
}


def run(
    parts: Sequence[str],
    later: Collection[str],
    seconds: float,
    device: torch.device,
    findings: Findings,
    index: int = 0,
    count: int = 1,
    patience: float = PATIENCE,
) -> None:
    """The parts one after the other; `later` have their share of the seconds, too."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, seconds + GRACE), exit=True)
    torch.manual_seed(0)
    bench.configure()
    if count > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    budget = Budget(seconds)
    for i, name in enumerate(parts):
        limit = budget.left() * share(name, [*parts[i + 1 :], *later])
        Part(name, device, limit, findings, index, count, patience).run(WORK[name])
    faulthandler.cancel_dump_traceback_later()
