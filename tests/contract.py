"""Checks that every op must pass on every backend, from its record in `alexnet_kernels.op_info`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DTYPE_IDS, FORMATS, assert_close, assert_format, assert_same, is_channels_last, upcast
from platforms import BACKENDS, DEVICES
from torch import Tensor

from alexnet_kernels import backends
from alexnet_kernels.op_info import OP_INFOS, Maker, OpInfo, Sample, Setting, with_gradients

EVERY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMAT_IDS = {memory_format: name for name, memory_format in FORMATS.items()}


class Case(NamedTuple):
    """An op, its arguments, and the setting that it runs in."""

    info: OpInfo
    sample: Sample | None
    setting: Setting
    layout: str = ""

    @property
    def id(self) -> str:
        info, sample, setting, layout = self
        words = [info.name, sample.id if sample else "", layout, DTYPE_IDS[setting.dtype]]
        words += [FORMAT_IDS[setting.memory_format] if info.images else "", setting.device, setting.backend or "auto"]
        return "-".join(filter(None, words))

    @property
    def maker(self) -> Maker:
        return Maker(self.setting.dtype, self.setting.memory_format, self.setting.device)

    def inputs(self) -> dict[str, Any]:
        assert self.sample is not None
        return self.info.inputs(self.sample, self.maker)

    def function(self, inputs: dict[str, Any]) -> Callable[..., Any]:
        """The op as a function of the tensors that get a gradient."""
        names = wanted(self.info, inputs)

        def call(*tensors: Tensor) -> Any:
            return self.info.call(**{**inputs, **dict(zip(names, tensors, strict=True))}, backend=self.setting.backend)

        return call


def wanted(info: OpInfo, inputs: dict[str, Any]) -> list[str]:
    """The arguments that get a gradient."""
    return [name for name in info.wrt if inputs.get(name) is not None]


def runs(setting: Setting) -> bool:
    """Whether a backend supports the dtype: GPU kernels do not support float64."""
    return setting.dtype != torch.float64 or setting.backend not in ("cuda", "triton")


def settings(
    info: OpInfo,
    dtypes: Iterable[torch.dtype] = EVERY_DTYPE,
    chosen: Callable[[str], Sequence[str | None]] = BACKENDS.__getitem__,
) -> Iterator[Setting]:
    """Every dtype, memory format, device and backend. Backends vary fastest, so that they share inputs."""
    for dtype in dtypes:
        for memory_format in FORMATS.values() if info.images else [torch.contiguous_format]:
            for device in DEVICES:
                for backend in chosen(device):
                    if runs(setting := Setting(backend, device, dtype, memory_format)):
                        yield setting


def parametrize(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test over cases; those of a missing backend are skipped with the reason."""
    params, ids = [], set()
    for case in cases:
        device, backend = case.setting.device, case.setting.backend
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if device == "cuda" and backend and (reason := backends.unavailable(case.info.name, backend)):
            marks.append(pytest.mark.skip(reason=f"{backend}: {reason}"))
        if case.id not in ids:
            params.append(pytest.param(case, id=case.id, marks=marks))
            ids.add(case.id)
    return pytest.mark.parametrize("case", params)


def typical_cases(layouts: Sequence[str] = ("",), **options: Any) -> Iterator[Case]:
    for info in OP_INFOS.values():
        for sample in info.typical:
            for layout in layouts:
                yield from (Case(info, sample, setting, layout) for setting in settings(info, **options))


@dataclass
class Expectation:
    """Arguments, and the definition's outputs for them in float64."""

    inputs: dict[str, Any]
    exact: dict[str, Any]
    outputs: tuple[Tensor, ...]


@functools.lru_cache(maxsize=1)
def expectation(
    name: str, sample_id: str, dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> Expectation:
    """The expectation of a case, cached for its other backends."""
    info = OP_INFOS[name]
    sample = next(sample for sample in info.samples if sample.id == sample_id)
    return expected(info, info.inputs(sample, Maker(dtype, memory_format, device)))


def expected(info: OpInfo, inputs: dict[str, Any]) -> Expectation:
    # The definition, on contiguous copies: torch's own operators are wrong for some strides.
    exact = {name: map_tensors(lambda t: upcast(restride(t, "dense")), value) for name, value in inputs.items()}
    exact = with_gradients(exact, info.wrt)
    return Expectation(inputs, exact, as_tuple(info.reference(**exact)))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, list):
        return [map_tensors(function, part) for part in value]
    return function(value) if isinstance(value, Tensor) else value


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(case: Case, expectation: Expectation, formats: bool = True) -> None:
    """Compares outputs and gradients with the definition; the arguments must be unchanged.

    Without `formats` their memory formats may be any: images of one column, row or channel have more than one.
    """
    info, _, setting, _ = case
    comparison = info.comparison(setting)
    if comparison.skip:
        pytest.skip(comparison.skip)
    inputs = with_gradients(expectation.inputs, info.wrt)
    before = {name: map_tensors(lambda t: t.detach().clone(), value) for name, value in inputs.items()}
    outputs = as_tuple(info.call(**inputs, backend=setting.backend))
    compare(outputs, expectation.outputs, comparison.outputs, "output", comparison)
    for output in outputs[:1]:
        assert output.dtype == setting.dtype
        assert output.device.type == setting.device
    if memory_format := inputs.get("memory_format"):
        assert_format(outputs[0], memory_format, "output")
    if names := wanted(info, inputs):
        grads = check_gradients(case, expectation, inputs, outputs[0], names)
        if formats:
            check_formats(inputs[names[0]], outputs[0], grads[0], setting)
    for name, value in before.items():
        if isinstance(value, Tensor | list):
            assert_same(map_tensors(torch.Tensor.detach, inputs[name]), value, what=f"{name} after the call")


def check_op(name: str, inputs: dict[str, Any], backend: str | None) -> None:
    """Compares an op on these arguments with the definition."""
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    memory_format = FORMATS["nhwc" if is_channels_last(first) else "nchw"]
    setting = Setting(backend, first.device.type, first.dtype, memory_format)
    check(Case(OP_INFOS[name], None, setting), expected(OP_INFOS[name], inputs))


def check_gradients(
    case: Case, expectation: Expectation, inputs: dict[str, Any], output: Tensor, names: Sequence[str]
) -> list[Tensor]:
    """Compares the gradients for integers of both signs as the output's gradient; returns them."""
    comparison = case.info.comparison(case.setting)
    grad = torch.randint(-4, 5, output.shape).to(output.device, output.dtype)
    if output.dim() == 4 and inputs[names[0]].dim() == 4:
        grad = grad.contiguous(memory_format=FORMATS["nhwc" if is_channels_last(inputs[names[0]]) else "nchw"])
    if comparison.settled is not None:
        with torch.no_grad():
            grad = grad * comparison.settled(**expectation.exact).to(grad.dtype)
    leaves, exact = ([given[name] for name in names] for given in (inputs, expectation.exact))
    actual = torch.autograd.grad(output, leaves, grad)
    wanted = torch.autograd.grad(expectation.outputs[0], exact, grad.double(), retain_graph=True)
    allowed = [0.0] * len(names)
    if comparison.peer is not None:
        found = torch.autograd.grad(comparison.peer(**inputs), leaves, grad)
        allowed = [
            2 * (a.double() - b).abs().max().item() if b.numel() else 0 for a, b in zip(found, wanted, strict=True)
        ]
    for name, leaf, a, b, error in zip(names, leaves, actual, wanted, allowed, strict=True):
        assert a.dtype == leaf.dtype, name
        compare([a], [b], comparison.gradients, f"gradient of {name}", comparison, error)
    return list(actual)


def compare(
    actual: Sequence[Tensor], expected: Sequence[Tensor], slack: str, what: str, comparison: Any, allowed: float = 0.0
) -> None:
    for a, e in zip(actual, expected, strict=True):
        if comparison.exact:
            assert_same(a.double(), e.double(), what=what)
        else:
            a = a if comparison.dtype is None else a.to(comparison.dtype)
            assert_close(a, e.double(), slack=slack, what=what, allowed=max(allowed, comparison.absolute))


def check_formats(input: Tensor, output: Tensor, grad_input: Tensor, setting: Setting) -> None:
    """The output, and the gradient of the first argument, have its memory format."""
    if input.dim() != 4 or not input.numel() or output.dim() != 4:
        return
    for memory_format in FORMATS.values():
        if input.is_contiguous(memory_format=memory_format):
            assert_format(output, memory_format, "output")
            # PyTorch's own operators choose the format of their gradients. Images of 1x1 pixels have both formats.
            pixel = output.shape[2:].numel() == 1 and is_channels_last(input)
            if setting.backend != "native" and grad_input.shape == input.shape and not pixel:
                assert_format(grad_input, memory_format, "gradient of the first argument")


LAYOUTS = ("sliced", "transposed", "expanded", "offset")


def restride(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; "expanded" repeats the first element along the first dimension, "constant"
    along all, "dense" is contiguous."""
    if layout == "dense":
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    if not tensor.dim() or not tensor.numel():
        return tensor
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "constant":
        return tensor.flatten()[:1].view([1] * tensor.dim()).expand(tensor.shape)
    if layout == "sliced":
        whole = tensor.new_zeros([2 * size for size in tensor.shape])
        view = whole[tuple(slice(None, None, 2) for _ in tensor.shape)]
    elif layout == "transposed":
        order = (2, 0, 3, 1) if tensor.dim() == 4 else tuple(reversed(range(tensor.dim())))
        view = tensor.new_empty([tensor.shape[d] for d in order]).permute([order.index(d) for d in range(tensor.dim())])
    elif tensor.dim() == 4:  # a slice of more channels, channels last
        n, c, h, w = tensor.shape
        view = tensor.new_empty(n, h, w, c + 1).permute(0, 3, 1, 2)[:, 1:]
    else:  # not aligned to vectors
        view = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
    return view.copy_(tensor)
