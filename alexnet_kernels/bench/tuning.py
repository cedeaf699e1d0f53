"""Measures the implementations that backend "auto" may choose among, at AlexNet's layers, for the user's table.

A candidate is compared with the committed choice, which stays unless another is faster by more than the noise. Each
candidate is first checked: one that is wrong, or raises, is named and never chosen. Gradients of a convolution are
measured one by one and without ReLU's mask; an op whose forward and backward belong together, and a convolution that
may be rearranged, in the passes "forward" and "both" (forward and backward), of which none may become slower.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from alexnet_kernels import backends
from alexnet_kernels._dispatch import choices, tuned
from alexnet_kernels._dispatch.kinds import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOTH,
    CONVOLUTION,
    FORWARD,
    Kind,
    Row,
    names_of,
)
from alexnet_kernels._errors import RunError
from alexnet_kernels.bench.cases import TOLERANCES, Case, Expectation, backward_of, cases
from alexnet_kernels.bench.row import SHORT
from alexnet_kernels.bench.timing import Call, DeviceLost, Failure, Timing, guarded, input_sets, measure
from alexnet_kernels.models import AlexNet
from alexnet_kernels.op_info import Maker, with_gradients
from alexnet_kernels.op_info._record import OUTLIERS, OVERHEAD
from alexnet_kernels.ops import conv2d_by_name
from alexnet_kernels.ops.conv2d_relu import conv2d_relu_by

__all__ = ["BATCHES", "DTYPES", "MARGIN", "NETWORKS", "Outcome", "Task", "decide", "tasks", "tunable_ops", "tune"]

NETWORKS = ("paper", "torchvision")
BATCHES = {"cpu": (16,), "cuda": (128,)}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
MARGIN = 0.03
"""The part of a time by which a candidate must be faster, beyond the quartiles of both."""
_MOST_SETS = 3

Times = dict[str, dict[str, Timing | Failure]]
"""By pass and implementation."""


class Task(Protocol):
    """A kind of calls, and the candidates for it."""

    @property
    def label(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def candidates(self) -> Sequence[str]: ...
    @property
    def passes(self) -> Sequence[str]: ...

    def prepare(self, device: torch.device) -> Prepared:
        """Makes the inputs."""
        ...


class Prepared(Protocol):
    """A task with its inputs."""

    def problem(self, name: str) -> str | None:
        """Why a candidate is wrong; None if it is right."""
        ...

    def calls(self, name: str, passed: str) -> list[Call]:
        """One a set of inputs."""
        ...


@dataclass
class Outcome:
    """What was found for a task.

    committed: the choice without the user's table. name: the choice now. wrong: reasons, by candidate, of those that
    are wrong or raise.
    """

    label: str
    kind: Kind
    committed: str
    name: str
    times: Times = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    @property
    def row(self) -> Row:
        """Of the user's table: the choice, also where it is the committed one, and the medians in microseconds."""
        found: dict[str, dict[str, float]] = {}
        for passed, by_name in self.times.items():
            for name, timing in by_name.items():
                if isinstance(timing, Timing):
                    found.setdefault(name, {})[passed] = round(timing.median * 1e6, 3)
        return Row(self.kind, self.name, "tuned", found, self.label)

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "kind": self.kind._asdict() | {"shape": self.kind.sizes},
            "committed": self.committed,
            "name": self.name,
            "times": {
                passed: {name: timing.to_json() for name, timing in by_name.items()}
                for passed, by_name in self.times.items()
            },
            "wrong": self.wrong,
        }


class Geometry(NamedTuple):
    """A convolution of a network: sizes of an image, then as nn.Conv2d has them."""

    channels: int
    height: int
    width: int
    filters: int
    of_group: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    def output(self, dimension: int) -> int:
        size = (self.height, self.width)[dimension] + 2 * self.padding[dimension] - self.kernel[dimension]
        return size // self.stride[dimension] + 1

    @property
    def rearranges(self) -> bool:
        return choices.takes_space_to_depth(True, self.channels, self.kernel, self.stride, self.groups)

    @property
    def rearranged(self) -> Geometry:
        block = self.stride[0]
        taps = -(-self.kernel[0] // block), -(-self.kernel[1] // block)
        channels = self.channels * block**2
        size = [self.output(d) + taps[d] - 1 for d in (0, 1)]
        return Geometry(channels, size[0], size[1], self.filters, channels, taps, (1, 1), (0, 0), 1)


def convolutions(preset: str) -> dict[str, Geometry]:
    """The convolutions of a network at its input size, by name."""
    model = AlexNet(preset=preset, device="meta")
    found: dict[str, Geometry] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        kernel, stride, padding = (tuple(map(int, v)) for v in (module.kernel_size, module.stride, module.padding))
        channels, height, width = inputs[0].shape[1:]
        sizes = channels, height, width, module.out_channels, module.weight.shape[1]
        found[f"conv{len(found) + 1}"] = Geometry(*sizes, kernel, stride, padding, module.groups)  # type: ignore[arg-type]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record)
    model.eval()(torch.empty(1, 3, model.input_size, model.input_size, device="meta"))
    return found


@dataclass(frozen=True)
class ConvolutionTask:
    """One direction of a convolution, channels last."""

    layer: str
    geometry: Geometry
    dtype: torch.dtype
    batch: int
    direction: str
    epilogue: bool
    device: str
    """As kinds have it."""
    candidates: tuple[str, ...]

    @property
    def label(self) -> str:
        bare = ", without bias and ReLU" if self.direction == FORWARD and not self.epilogue else ""
        return f"{CONVOLUTION} {self.direction}, {self.layer}{bare}, {SHORT[self.dtype]}, batch {self.batch}"

    @property
    def kind(self) -> Kind:
        g = self.geometry
        rows = self.batch * g.output(0) * g.output(1)
        shape = (g.filters, g.of_group, *g.kernel, *g.stride, g.groups, rows, int(self.epilogue))
        return choices.kind_of(CONVOLUTION, self.direction, self.device, self.dtype, True, shape)

    @property
    def passes(self) -> Sequence[str]:
        return (FORWARD, BOTH) if self.direction == FORWARD and self.geometry.rearranges else (self.direction,)

    def prepare(self, device: torch.device) -> PreparedConvolution:
        return PreparedConvolution(self, device)


class PreparedConvolution:
    def __init__(self, task: ConvolutionTask, device: torch.device) -> None:
        self.task = task
        g = task.geometry
        make = Maker(task.dtype, torch.channels_last, device, on_device=True)
        outputs = task.batch * g.filters * g.output(0) * g.output(1)
        moved = (task.batch * g.channels * g.height * g.width + outputs) * task.dtype.itemsize
        scale = (g.of_group * g.kernel[0] * g.kernel[1]) ** -0.5
        torch.manual_seed(0)
        self.sets = [
            (
                make(task.batch, g.channels, g.height, g.width),
                make(g.filters, g.of_group, *g.kernel, scale=scale).requires_grad_(),
                make(g.filters).requires_grad_() if task.epilogue else None,
                make(task.batch, g.filters, g.output(0), g.output(1)),
            )
            for _ in range(min(_MOST_SETS, input_sets(moved, device)))
        ]

    def _output(self, name: str, x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
        g = self.task.geometry
        return conv2d_relu_by(name, x, w, b, g.stride, g.padding, g.groups, relu=relu, backend="auto")

    def _results(self, name: str, passed: str, x: Tensor, w: Tensor, b: Tensor | None, grad: Tensor) -> list[Tensor]:
        g = self.task.geometry
        if passed == BOTH:  # the first convolution's input needs no gradient
            leaves = [w] if b is None else [w, b]
            return list(torch.autograd.grad(self._output(name, x, w, b, relu=False), leaves, grad))
        with torch.no_grad():
            if passed == FORWARD:
                return [self._output(name, x, w, b, relu=b is not None)]
            operands = grad, None, x, w, g.stride, g.padding, g.groups
            if passed == BACKWARD_INPUT:
                return [conv2d_by_name.gradient_of_input(name, *operands)]
            of_weight, of_bias = conv2d_by_name.gradient_of_weight(name, *operands)
            assert of_bias is not None
            return [of_weight, of_bias]

    def problem(self, name: str) -> str | None:
        for passed in self.task.passes:
            expected, actual = (self._results(each, passed, *self.sets[0]) for each in ("library", name))
            for one, other in zip(actual, expected, strict=True):
                if found := _difference(one.detach(), other.detach(), TOLERANCES[self.task.dtype]):
                    return f"{passed}: {found}"
        return None

    def calls(self, name: str, passed: str) -> list[Call]:
        return [lambda values=values: self._results(name, passed, *values) for values in self.sets]  # type: ignore[misc]


def _difference(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    """How two results differ by more than a part of the largest element; on the device."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)}, the library's is {list(expected.shape)}"
    if actual.numel() == 0:
        return None
    error = (actual.float() - expected.float()).abs().max().item()
    largest = expected.float().abs().max().item()
    if error <= tolerance * largest:
        return None
    return f"differs from the library's result by up to {error:.3g}, of {largest:.3g}"


@dataclass(frozen=True)
class OpTask:
    """An op with a kernel in CUDA C++ and one in Triton, forward and backward."""

    case: Case
    batch: int
    device: str
    candidates: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.case.name}, batch {self.batch}"

    @property
    def kind(self) -> Kind:
        x = _first(self.case.make(self.batch, torch.device("meta")))
        return choices.kind_of(self.case.op, BOTH, self.device, x.dtype, self.case.channels_last, (x.numel(),))

    @property
    def passes(self) -> Sequence[str]:
        return (FORWARD, BOTH) if self.case.wrt else (FORWARD,)

    def prepare(self, device: torch.device) -> PreparedOp:
        return PreparedOp(self, device)


class PreparedOp:
    def __init__(self, task: OpTask, device: torch.device) -> None:
        self.case = task.case
        self.expectation = Expectation(task.case, 2, device)
        count = min(_MOST_SETS, input_sets(int(task.case.work.moved(task.batch, False)), device))
        self.sets = [with_gradients(task.case.make(task.batch, device), task.case.wrt) for _ in range(count)]
        with torch.no_grad():
            self.grad = torch.randn_like(self.case.call(self.sets[0], task.candidates[0])) if task.case.wrt else None

    def problem(self, name: str) -> str | None:
        return self.expectation.problem(lambda x: self.case.call(x, name), bool(self.case.wrt), OUTLIERS)

    def calls(self, name: str, passed: str) -> list[Call]:
        def call(inputs: dict[str, Any]) -> None:
            if self.grad is not None and passed == BOTH:
                backward_of(self.case.call(inputs, name), inputs, self.case.wrt, self.grad)
                return
            with torch.no_grad():
                self.case.call(inputs, name)

        return [lambda inputs=inputs: call(inputs) for inputs in self.sets]  # type: ignore[misc]


def _first(inputs: dict[str, Any]) -> Tensor:
    return next(value for value in inputs.values() if isinstance(value, Tensor))


def tunable_ops(device: torch.device) -> list[str]:
    """The ops of which a device has several implementations."""
    if device.type != "cuda":
        return [CONVOLUTION]
    both = {case.op for case in cases()}
    return [op for op in backends.public_ops() if op == CONVOLUTION or (op in both and _has_both(op))]


def _has_both(op: str) -> bool:
    return backends.unavailable(op, "cuda") is None and backends.unavailable(op, "triton") is None


def tasks(
    device: torch.device,
    ops: Collection[str] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[Task]:
    """What there is to decide on a device, each kind once. None: all ops, the usual batches and dtypes."""
    batches, dtypes = batches or BATCHES[device.type], dtypes or DTYPES[device.type]
    ops = tunable_ops(device) if ops is None else ops
    found: dict[Kind, Task] = {}
    for task in _all(device, ops, batches, dtypes):
        if len(task.candidates) > 1:
            found.setdefault(task.kind, task)
    return list(found.values())


def _all(
    device: torch.device, ops: Collection[str], batches: Sequence[int], dtypes: Sequence[torch.dtype]
) -> Iterator[Task]:
    name = choices.device_name(device)
    if CONVOLUTION in ops:
        layers = [(f"{preset} {layer}", g) for preset in NETWORKS for layer, g in convolutions(preset).items()]
        layers += [(f"{layer} rearranged", g.rearranged) for layer, g in layers if g.rearranges and name != "cpu"]
        for dtype in dtypes:
            for batch in batches:
                for layer, geometry in layers:
                    yield from _convolution_tasks(layer, geometry, dtype, batch, name)
    for case in cases():
        if case.op in ops and case.op != CONVOLUTION and case.channels_last and case.layer != OVERHEAD:
            for batch in batches if case.dtype in dtypes else ():
                yield OpTask(case, batch, name, names_of(case.op, BOTH, name))


def _convolution_tasks(
    layer: str, geometry: Geometry, dtype: torch.dtype, batch: int, device: str
) -> Iterator[ConvolutionTask]:
    for direction in (FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT):
        names = tuple(name for name in names_of(CONVOLUTION, direction, device) if _applies(name, geometry, dtype))
        for epilogue in (True, False) if direction == FORWARD and device != "cpu" else (True,):
            yield ConvolutionTask(layer, geometry, dtype, batch, direction, epilogue, device, names)


def _applies(name: str, geometry: Geometry, dtype: torch.dtype) -> bool:
    if name == "split":
        return geometry.groups > 1
    if name == "space_to_depth":
        return geometry.rearranges
    if name == "triton":
        return _has_both(CONVOLUTION)
    if name == "library":
        return True
    # "own" is wgmma where that takes the call: alone it raises elsewhere, so that "auto" runs "own" in its place.
    return name != "wgmma" and dtype != torch.float32


def decide(times: Times, committed: str) -> str:
    """The choice: the committed one, unless others are faster beyond the noise in a pass and slower in none."""
    names = dict.fromkeys(name for by_name in times.values() for name in by_name)
    right = [name for name in names if all(isinstance(by_name.get(name), Timing) for by_name in times.values())]
    if not right:
        return committed

    def total(name: str) -> float:
        return sum(timing.median for by_name in times.values() if isinstance(timing := by_name[name], Timing))

    if committed not in right:
        return min(right, key=total)
    winners = [name for name in right if name != committed and _wins(times, name, committed)]
    return min(winners, key=total) if winners else committed


def _wins(times: Times, name: str, other: str) -> bool:
    pairs = [(by_name[name], by_name[other]) for by_name in times.values()]
    ahead = [_is_faster(a, b) for a, b in pairs]
    return any(ahead) and not any(_is_faster(b, a) for a, b in pairs)


def _is_faster(a: Timing | Failure, b: Timing | Failure) -> bool:
    assert isinstance(a, Timing)
    assert isinstance(b, Timing)
    return a.median < b.median * (1 - MARGIN) and a.high < b.low


def _committed(task: Task) -> str:
    """The choice without the user's table; the first candidate where that is none of them."""
    name = choices.committed_choice(task.kind, task.batch)
    return name if name in task.candidates else task.candidates[0]


def tune(task: Task, device: torch.device, seconds: float) -> Outcome:
    """Measures a task's candidates, in turns, for about `seconds` a pass; cuDNN's with cudnn.benchmark.

    Raises:
        RunError: an error of a candidate has made the device unusable.
    """
    committed = _committed(task)
    outcome = Outcome(task.label, task.kind, committed, committed)
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        prepared = task.prepare(device)
        for name in task.candidates:
            with guarded(name, device, outcome.wrong):
                if problem := prepared.problem(name):
                    outcome.wrong[name] = problem
        for passed in task.passes:
            variants = {name: prepared.calls(name, passed) for name in task.candidates if name not in outcome.wrong}
            outcome.times[passed] = measure(variants, device, seconds=seconds) if variants else {}
    except DeviceLost as error:
        raise RunError(f"{task.label}: the device is unusable after {error}") from error
    finally:
        torch.backends.cudnn.benchmark = searches
    for by_name in outcome.times.values():
        outcome.wrong |= {name: time.reason for name, time in by_name.items() if isinstance(time, Failure)}
    outcome.name = decide(outcome.times, committed)
    return outcome


def write(device: torch.device, outcomes: Sequence[Outcome]) -> Path:
    """Merges what was found into the user's table. Returns its path."""
    path = tuned.merge(device, [outcome.row for outcome in outcomes if outcome.row.times])
    choices.forget()
    return path
