"""Every op at AlexNet's layers, from the op records, and the comparison with the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import backends
from alexnet_kernels.bench.row import SHORT
from alexnet_kernels.op_info import OP_INFOS, Baseline, Layer, Maker, OpInfo, Work, with_gradients
from alexnet_kernels.op_info._record import OUTLIERS, OVERHEAD, Inputs

# Relative to the largest element. PyTorch rounds to half precision between its operators.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One op at one layer, in one dtype and memory format."""

    info: OpInfo
    at: Layer
    dtype: torch.dtype
    channels_last: bool
    core: bool
    """Whether AlexNet runs the op in this dtype and memory format."""
    call: Callable[[Inputs, str], Tensor]
    """Runs the op by a backend."""

    @property
    def op(self) -> str:
        return self.info.name

    @property
    def layer(self) -> str:
        return self.at.name

    @property
    def wrt(self) -> tuple[str, ...]:
        return self.at.wrt

    @property
    def work(self) -> Work:
        return self.at.work(self.dtype.itemsize)

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else ", NCHW"
        return f"{self.op}, {self.layer}, {SHORT[self.dtype]}{layout}"

    @property
    def baselines(self) -> Mapping[str, Baseline]:
        half_on_cuda = self.info.half_baselines_on_cuda_only and self.dtype != torch.float32
        return {
            name: dataclasses.replace(baseline, cuda_only=baseline.cuda_only or half_on_cuda)
            for name, baseline in self.info.baselines.items()
            if baseline.layers is None or self.layer in baseline.layers
        }

    def paths(self, device: torch.device) -> dict[str, Baseline]:
        """The ways in which backend "cuda" can compute the op there, by variant."""
        if device.type != "cuda" or backends.unavailable(self.op, "cuda"):
            return {}
        return {f"cuda, {name}": path for name, path in self.info.paths(self.dtype, self.channels_last, device).items()}

    @property
    def tolerance(self) -> float:
        """The largest error, relative to the largest element."""
        return self.info.tolerance(self.dtype) or TOLERANCES[self.dtype]

    def make(self, batch: int, device: torch.device) -> Inputs:
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.at.inputs(Maker(self.dtype, memory_format, device, on_device=True), batch)


def _case(info: OpInfo, layer: Layer, dtype: torch.dtype, channels_last: bool) -> Case:
    def call(inputs: Inputs, backend: str) -> Tensor:
        return info.op(**inputs, backend=backend)

    core = layer.name != OVERHEAD and info.core(dtype, channels_last)
    return Case(info, layer, dtype, channels_last, core, call)


def _all() -> Iterator[Case]:
    for info in OP_INFOS.values():
        for layer in info.layers:
            if layer.timed:
                for dtype in info.timed if layer.name != OVERHEAD else (torch.float32,):
                    half = dtype == torch.float16
                    formats = info.images and layer.formats and layer.name != OVERHEAD
                    for channels_last in (True, False) if formats else (True,):
                        if channels_last or not half:
                            yield _case(info, layer, dtype, channels_last)


def cases() -> list[Case]:
    """All cases, the core ones first, by importance: bfloat16, float32, NCHW, float16."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)

    def rank(case: Case) -> tuple[bool, int]:
        position = dtypes.index(case.dtype) if case.channels_last else 1.5
        return not case.core, int(2 * position)

    return sorted(_all(), key=rank)


def backward_of(out: Tensor, inputs: Inputs, wrt: tuple[str, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [inputs[name] for name in wrt], grad)


def compare(actual: Tensor, expected: Tensor, tolerance: float, what: str, outliers: float = OUTLIERS) -> str | None:
    """Why `actual` differs from the float64 tensor `expected`; None if at most `outliers` of the elements do."""
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    a, b = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.numel() == 0:
        return None
    error = (a - b).abs()
    far = ~(error <= tolerance * b.abs().max())
    share = far.double().mean().item()
    if share <= outliers:
        return None
    return f"{what}: {share:.2%} of elements are off, the worst by {error.nan_to_num(torch.inf).max().item():.3g}"


class Expectation:
    """Output and gradients of a case's definition in float64, for a batch of random inputs."""

    def __init__(self, case: Case, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case = case
        self.inputs = with_gradients(case.make(batch, device), case.wrt)
        self.gradients: tuple[Tensor, ...] = ()
        exact = with_gradients({name: _exact(value) for name, value in self.inputs.items()}, case.wrt)
        result = case.info.reference(**exact)
        output = result[0] if isinstance(result, tuple) else result
        self.output = output.detach()
        if case.wrt:
            grad = torch.randint(-4, 5, output.shape).to(case.dtype)
            if case.info.preactivation is not None:
                with torch.no_grad():
                    size = case.info.preactivation(**exact).abs()
                grad *= size > case.tolerance * size.max()
            grad = grad.to(device)
            if grad.dim() == 4 and case.channels_last:
                grad = grad.contiguous(memory_format=torch.channels_last)
            self.grad = grad
            self.gradients = backward_of(output, exact, case.wrt, _exact(grad))

    def problem(
        self, function: Callable[[Inputs], Tensor], backward: bool = True, outliers: float = OUTLIERS
    ) -> str | None:
        """The first error in the function's output or gradients; None if there is none."""
        case = self.case
        out = function(self.inputs)
        if wrong := compare(out, self.output, case.tolerance, "output", outliers):
            return wrong
        if not case.wrt or not backward:
            return None
        found = backward_of(out, self.inputs, case.wrt, self.grad)
        for name, actual, expected in zip(case.wrt, found, self.gradients, strict=True):
            if wrong := compare(actual, expected, case.tolerance, f"gradient of {name}", outliers):
                return wrong
        return None


def _exact(value: Any) -> Any:
    """A tensor on the CPU, in float64 if it is floating-point."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value
