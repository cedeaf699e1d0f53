"""The row of an op at one layer and batch size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels.bench.cases import Case, Expectation, backward_of
from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.row import COMPILED, SHORT, Measurement, RowResult, our_backends, prefixed
from alexnet_kernels.bench.timing import MOST_SETS, Call, guarded, input_sets, measure, on_capture_stream
from alexnet_kernels.op_info import Baseline, with_gradients
from alexnet_kernels.op_info._record import OUTLIERS, OVERHEAD, PEER_OUTLIERS, Inputs


def compiled(baseline: Baseline, **options: Any) -> Baseline:
    """The baseline compiled as one graph. Resets dynamo, which runs code eagerly past its recompilation limit."""
    torch._dynamo.reset()
    return dataclasses.replace(baseline, call=torch.compile(baseline.call, dynamic=False, fullgraph=True, **options))


@dataclass(frozen=True)
class OpRow:
    """A case at one batch size: forward, and forward and backward together."""

    case: Case
    batch: int
    compile: Collection[str] = ()  # of COMPILED
    apart: bool = False  # times the backward pass alone, in place of both passes
    label: str = ""  # distinguishes rows of the same case
    most_sets: int = MOST_SETS  # sets of inputs that the calls rotate through, at most

    @property
    def name(self) -> str:
        return prefixed(self.label, f"{self.case.name}, batch {self.batch}")

    @property
    def directions(self) -> Sequence[str]:
        if not self.case.wrt:
            return ("forward",)
        return ("forward", "backward" if self.apart else "forward and backward")

    @property
    def compiles(self) -> bool:
        return bool(self.compile)

    def variants(self, device: torch.device) -> list[str]:
        """The variants available on the device, barring errors."""
        ours = [backend for backend, reason in our_backends(self.case.op, device).items() if not reason]
        return [*ours, *self.case.paths(device), *self._baselines(device)]

    def _by(self, backend: str) -> Baseline:
        outliers = PEER_OUTLIERS if backend == "native" else OUTLIERS
        return Baseline(lambda x: self.case.call(x, backend), outliers=outliers)

    def _baselines(self, device: torch.device) -> dict[str, Callable[[], Baseline]]:
        case = self.case
        found: dict[str, Callable[[], Baseline]] = {}
        if case.info.eager:
            found["eager"] = lambda: self._by("native")
        for name, baseline in case.baselines.items():
            if device.type == "cuda" or not baseline.cuda_only:
                found[name] = lambda baseline=baseline: baseline  # type: ignore[misc]
        best = next((baseline for baseline in case.baselines.values() if baseline.differentiable), None)
        base = self._by("native") if case.info.eager else best
        if base is not None:
            for name in self.compile:
                found[name] = lambda name=name: compiled(base, **COMPILED[name])  # type: ignore[misc]
        return found

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> RowResult:
        """`skip`: variants, as "ROW by VARIANT" or "OP by VARIANT", after which the device was lost before."""
        case, batch = self.case, self.batch
        result = RowResult(case.op, case.layer, SHORT[case.dtype], batch)
        wrong, errors = result.wrong, result.errors
        made: dict[str, Callable[[], Baseline]] = {}
        for backend, reason in our_backends(case.op, device).items():
            if reason:
                result.missing[backend] = reason
            else:
                made[backend] = lambda backend=backend: self._by(backend)  # type: ignore[misc]
        for name, path in case.paths(device).items():
            made[name] = lambda path=path: path  # type: ignore[misc]
        made |= self._baselines(device)
        expectation = Expectation(case, 2, device)
        variants: dict[str, Baseline] = {}
        for name, make in made.items():
            if not {f"{self.name} by {name}", f"{case.op} by {name}"}.isdisjoint(skip):
                continue
            with guarded(name, device, errors):
                variant = make()
                problem = None
                if variant.checked:
                    problem = expectation.problem(variant.call, variant.differentiable, variant.outliers)
                if problem:
                    wrong[name] = problem
                else:
                    variants[name] = variant
        del expectation
        graphs = case.layer != OVERHEAD
        for direction in self.directions:
            backward = direction != "forward"
            moved, done = self._work(direction)
            count = min(self.most_sets, input_sets(int(moved), device))
            inputs = [with_gradients(case.make(batch, device), case.wrt) for _ in range(count)]
            calls: dict[str, list[Call]] = {}
            for name, variant in variants.items():
                if variant.differentiable or not backward:
                    with guarded(name, device, errors):
                        calls[name] = [_call(case, variant, x, direction, device) for x in inputs]
            times = measure(calls, device, seconds=seconds, rounds=rounds, graphs=graphs)
            cached = moved * count < cache_bytes(device)
            result.directions[direction] = Measurement(moved, done, cached, times)
        return result

    def call(self, direction: str, backend: str, device: torch.device) -> Call:
        """A call of one direction by a backend, on new inputs. A forward pass before "backward" runs now."""
        case = self.case
        inputs = with_gradients(case.make(self.batch, device), case.wrt)
        if direction == "backward":
            return _backward(case.call(inputs, backend), inputs, case.wrt)
        return _call(case, self._by(backend), inputs, direction, device)

    def _work(self, direction: str) -> tuple[float, float]:
        """(bytes, operations)."""
        work, backward = self.case.work, direction != "forward"
        moved, done = work.moved(self.batch, backward), work.done(self.batch, backward)
        if direction == "backward":
            return moved - work.moved(self.batch, False), done - work.done(self.batch, False)
        return moved, done


def _call(case: Case, variant: Baseline, inputs: Inputs, direction: str, device: torch.device) -> Call:
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                variant.call(inputs)

        return forward
    if direction == "backward":
        # The forward pass has to run on the stream that the backward pass is captured on.
        with on_capture_stream(device):
            return _backward(variant.call(inputs), inputs, case.wrt)
    with torch.no_grad():
        grad = torch.randn_like(variant.call(inputs))

    def both() -> None:
        backward_of(variant.call(inputs), inputs, case.wrt, grad)

    return both


def _backward(out: Tensor, inputs: Inputs, wrt: tuple[str, ...]) -> Call:
    """A call of the backward pass alone, after a completed forward pass."""
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, [inputs[name] for name in wrt], grad, retain_graph=True)

    return backward
