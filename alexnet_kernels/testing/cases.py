"""Every op at AlexNet's layers: inputs, definition, peers, and the least work it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.testing import roofline
from alexnet_kernels.testing.roofline import SHORT, Work

Inputs = dict[str, Any]

# The share of elements that may lie further from the definition than the tolerance: in half precision two nearly equal
# maxima can change places, and do so more often where PyTorch's operators round before the pool.
OUTLIERS = 1e-3
PEER_OUTLIERS = 5e-3
# Of the largest element: sums of half-precision terms that PyTorch rounds between its operators.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OVERHEAD = "overhead"  # the layer of cases so small that what is timed is the way to the kernel


@dataclass(frozen=True)
class Peer:
    """Another way to compute what an op computes."""

    call: Callable[[Inputs], Tensor]
    differentiable: bool = True
    checked: bool = True  # False where it draws random numbers of its own
    cuda_only: bool = False
    outliers: float = PEER_OUTLIERS


@dataclass(frozen=True)
class Case:
    """One op at one layer. `make` gives its inputs for a batch; `wrt` names those that get a gradient."""

    op: str
    layer: str
    dtype: torch.dtype
    channels_last: bool
    make: Callable[[int, torch.device], Inputs]
    call: Callable[[Inputs, str], Tensor]  # with a backend
    definition: Callable[[Inputs], Tensor]  # of inputs in float64
    wrt: tuple[str, ...]
    work: Work
    peers: Mapping[str, Peer] = field(default_factory=dict)
    eager: bool = True  # whether backend "native" is what PyTorch's users run; else a peer is
    tolerance: float | None = None  # of the largest element, if not the dtype's
    core: bool = True  # whether it is one of the layers and formats that AlexNet runs in fast
    # What ReLU is applied to, of inputs in float64: where rounding may change its sign, no gradient is compared.
    preactivation: Callable[[Inputs], Tensor] | None = None

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else ", NCHW"
        return f"{self.op}, {self.layer}, {SHORT[self.dtype]}{layout}"


def backward_of(out: Tensor, inputs: Inputs, wrt: tuple[str, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, [inputs[name] for name in wrt], grad)


def with_gradients(inputs: Inputs, wrt: tuple[str, ...]) -> Inputs:
    return {k: v.detach().requires_grad_() if k in wrt else v for k, v in inputs.items()}


def compare(actual: Tensor, expected: Tensor, tolerance: float, what: str, outliers: float = OUTLIERS) -> str | None:
    """Why `actual` isn't `expected`, a float64 value; None if it is."""
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
    """What a case's definition computes, in float64, for a batch of random inputs: output and gradients."""

    def __init__(self, case: Case, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case = case
        self.inputs = with_gradients(case.make(batch, device), case.wrt)
        self.gradients: tuple[Tensor, ...] = ()
        exact = with_gradients({name: _exact(value) for name, value in self.inputs.items()}, case.wrt)
        output = case.definition(exact)
        self.output = output.detach()
        if case.wrt:
            grad = torch.randint(-4, 5, output.shape).to(case.dtype)
            if case.preactivation is not None:
                with torch.no_grad():
                    size = case.preactivation(exact).abs()
                grad *= size > (case.tolerance or TOLERANCES[case.dtype]) * size.max()
            grad = grad.to(device)
            if grad.dim() == 4 and case.channels_last:
                grad = grad.contiguous(memory_format=torch.channels_last)
            self.grad = grad
            self.gradients = backward_of(output, exact, case.wrt, _exact(grad))

    def problem(
        self, function: Callable[[Inputs], Tensor], backward: bool = True, outliers: float = OUTLIERS
    ) -> str | None:
        """What is wrong with the output of this function, or with its gradients; None if nothing."""
        case = self.case
        tolerance = case.tolerance or TOLERANCES[case.dtype]
        out = function(self.inputs)
        if wrong := compare(out, self.output, tolerance, "output", outliers):
            return wrong
        if not case.wrt or not backward:
            return None
        found = backward_of(out, self.inputs, case.wrt, self.grad)
        for name, actual, expected in zip(case.wrt, found, self.gradients, strict=True):
            if wrong := compare(actual, expected, tolerance, f"gradient of {name}", outliers):
                return wrong
        return None


def _exact(value: Any) -> Any:
    """A tensor on the CPU, in float64 if it has a fraction."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _images(shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool):
    def make(batch: int, device: torch.device) -> Tensor:
        x = torch.randn(batch, *shape, device=device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    return make


LRN: dict[str, Any] = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
MAPS = {"layer 1": (96, 55, 55), "layer 2": (256, 27, 27), "layer 5": (256, 13, 13), OVERHEAD: (16, 3, 3)}
# Filters, channels of a filter, kernel, stride, padding, groups, size of the input.
CONVOLUTIONS = {
    "conv1": (96, 3, 11, 4, 2, 1, 224),
    "conv2": (256, 48, 5, 1, 2, 2, 27),
    "conv3": (384, 256, 3, 1, 1, 1, 13),
    "conv4": (384, 192, 3, 1, 1, 2, 13),
    "conv5": (256, 192, 3, 1, 1, 2, 13),
}
LINEARS = {"fc6": (9216, 4096), "fc7": (4096, 4096)}
PARAMETERS = (
    *((k, c, r, r) for k, c, r, *_ in CONVOLUTIONS.values()),
    (4096, 9216),
    (4096, 4096),
    (1000, 4096),
    *((k,) for k in (96, 256, 384, 384, 256, 4096, 4096, 1000)),
)
SEED = 7


def _on_images(op, layer, dtype, channels_last, call, definition, work, peers=None) -> Case:
    make = _images(MAPS[layer], dtype, channels_last)
    return Case(
        op,
        layer,
        dtype,
        channels_last,
        lambda batch, device: {"input": make(batch, device)},
        call,
        definition,
        ("input",),
        work,
        peers=peers or {},
    )


def _torch_lrn(x: Tensor) -> Tensor:
    return F.local_response_norm(x, **LRN)


def _torch_lrn_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(_torch_lrn(x.relu()), 3, 2)


def _map_cases(
    dtype: torch.dtype, channels_last: bool, layers: Sequence[str] = ("layer 1", "layer 2", "layer 5")
) -> Iterator[Case]:
    """Of layer 5, pooling alone: nothing else runs there."""
    e = dtype.itemsize
    half = dtype != torch.float32  # in which PyTorch's normalisation exists on CUDA only
    torch_lrn = Peer(lambda x: _torch_lrn(x["input"]), cuda_only=half)
    torch_lrn_pool = Peer(lambda x: _torch_lrn_pool(x["input"]), cuda_only=half)
    elements = {layer: c * h * w for layer, (c, h, w) in MAPS.items()}
    pooled = {layer: c * ((h - 3) // 2 + 1) ** 2 for layer, (c, h, w) in MAPS.items()}
    normalised = [layer for layer in layers if layer != "layer 5"]
    for layer in normalised:
        n, m = elements[layer], pooled[layer]
        yield _on_images(
            "lrn_max_pool2d",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.lrn_max_pool2d(x["input"], **LRN, relu=True, backend=backend),
            lambda x: reference.max_pool2d(reference.local_response_norm(x["input"].relu(), **LRN)),
            roofline.normalisation_and_pooling(n, m, e),
            {"F.local_response_norm, pool": torch_lrn_pool},
        )
        yield _on_images(
            "local_response_norm",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.local_response_norm(x["input"], **LRN, backend=backend),
            lambda x: reference.local_response_norm(x["input"], **LRN),
            roofline.normalisation(n, e),
            {"F.local_response_norm": torch_lrn},
        )
    for layer in layers:
        yield _on_images(
            "max_pool2d",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.max_pool2d(x["input"], backend=backend),
            lambda x: reference.max_pool2d(x["input"]),
            roofline.pooling(elements[layer], pooled[layer], e),
        )
    for layer in normalised:
        yield _on_images(
            "batch_norm_relu",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.batch_norm_relu(x["input"], None, None, training=True, backend=backend),
            lambda x: reference.batch_norm_relu(x["input"], None, None, None, None, True)[0],
            roofline.batch_normalisation(elements[layer], e),
        )
    for layer in normalised[-1:]:
        yield _on_images(
            "within_map_response_norm",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.within_map_response_norm(x["input"], backend=backend),
            lambda x: reference.within_map_response_norm(x["input"], 5, 1e-3, 0.75, 1.0),
            roofline.normalisation(elements[layer], e),
        )


def _convolution(layer: str, dtype: torch.dtype, channels_last: bool = True) -> Case:
    filters, channels, kernel, stride, padding, groups, size = CONVOLUTIONS.get(layer, (16, 16, 3, 1, 1, 1, 3))
    out = (size + 2 * padding - kernel) // stride + 1
    options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
    fan_in = channels * kernel**2
    inputs, outputs = channels * groups * size**2, filters * out**2
    first = layer == "conv1"
    work = roofline.convolution(inputs, outputs, filters * fan_in, outputs * fan_in, dtype.itemsize, first)

    def make(batch: int, device: torch.device) -> Inputs:
        x = torch.randn(batch, channels * groups, size, size, device=device).to(dtype)
        w = torch.randn(filters, channels, kernel, kernel, device=device).mul_(fan_in**-0.5).to(dtype)
        b = torch.randn(filters, device=device).to(dtype)
        if channels_last:
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return {"input": x, "weight": w, "bias": b}

    def fused(x: Inputs) -> Tensor:
        pairs = ([stride] * 2, [padding] * 2, [1, 1], groups)
        return torch.ops.aten.cudnn_convolution_relu(x["input"], x["weight"], x["bias"], *pairs)

    return Case(
        "conv2d_relu",
        layer,
        dtype,
        channels_last,
        make,
        lambda x, backend: ops.conv2d_relu(x["input"], x["weight"], x["bias"], **options, backend=backend),
        lambda x: reference.conv2d_relu(x["input"], x["weight"], x["bias"], **options),
        ("weight", "bias") if first else ("input", "weight", "bias"),
        work,
        {"cudnn_convolution_relu": Peer(fused, differentiable=False, cuda_only=True)},
        tolerance=5e-3 if dtype == torch.float32 else None,  # TF32
        preactivation=lambda x: F.conv2d(x["input"], x["weight"], x["bias"], **options),
    )


def _linear(layer: str, dtype: torch.dtype) -> Case:
    rows, columns = LINEARS.get(layer, (16, 16))

    def make(batch: int, device: torch.device) -> Inputs:
        x = torch.randn(batch, rows, device=device).to(dtype)
        w = torch.randn(columns, rows, device=device).mul_(rows**-0.5).to(dtype)
        return {"input": x, "weight": w, "bias": torch.randn(columns, device=device).to(dtype)}

    def definition(x: Inputs) -> Tensor:
        return reference.dropout(F.linear(x["input"], x["weight"], x["bias"]).relu(), 0.5, True, SEED)

    def torch_linear(x: Inputs) -> Tensor:
        return F.dropout(F.linear(x["input"], x["weight"], x["bias"]).relu(), 0.5)

    return Case(
        "linear_relu_dropout",
        layer,
        dtype,
        True,
        make,
        lambda x, backend: ops.linear_relu_dropout(x["input"], x["weight"], x["bias"], seed=SEED, backend=backend),
        definition,
        ("input", "weight", "bias"),
        roofline.linear(rows, columns, dtype.itemsize),
        {"linear, relu, dropout": Peer(torch_linear, checked=False)},
        eager=False,
        preactivation=lambda x: F.linear(x["input"], x["weight"], x["bias"]),
    )


def _dropout(dtype: torch.dtype, layer: str = "96x55x55") -> Case:
    elements = 16 if layer == OVERHEAD else 96 * 55 * 55
    return Case(
        "dropout",
        layer,
        dtype,
        True,
        lambda batch, device: {"input": torch.randn(batch, elements, device=device).to(dtype)},
        lambda x, backend: ops.dropout(x["input"], seed=SEED, backend=backend),
        lambda x: reference.dropout(x["input"], 0.5, True, SEED),
        ("input",),
        roofline.elementwise(elements, dtype.itemsize),
        peers={"torch's dropout": Peer(lambda x: F.dropout(x["input"], 0.5), checked=False)},
        eager=False,
    )


def _augment(dtype: torch.dtype, layer: str = "224 of 256") -> Case:
    size, stored = (3, 4) if layer == OVERHEAD else (224, 256)

    def make(batch: int, device: torch.device) -> Inputs:
        images = torch.randint(0, 256, (batch, stored, stored, 3), dtype=torch.uint8)
        return {
            "images": images.to(device),
            "crops": torch.randint(0, stored - size + 1, (batch, 2)).to(device),
            "flips": (torch.arange(batch) % 2 == 0).to(device),
            "mean": torch.tensor([120.0, 115.0, 100.0], device=device),
            "color_shift": torch.randn(batch, 3).to(device),
        }

    def options(x: Inputs) -> Inputs:
        return {name: x[name] for name in ("flips", "color_shift", "mean")}

    def definition(x: Inputs) -> Tensor:
        return reference.augment(x["images"], x["crops"], [size, size], **options(x), dtype=torch.float64)

    return Case(
        "augment",
        layer,
        dtype,
        True,
        make,
        lambda x, backend: ops.augment(x["images"], x["crops"], size, **options(x), dtype=dtype, backend=backend),
        definition,
        (),
        Work((3 * size * size * (1 + dtype.itemsize),) * 2),
    )


def cases() -> list[Case]:
    """In the order of what matters most to AlexNet in half precision; those of `core` first."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    core = [
        *_map_cases(bf16, True),
        *(_convolution(layer, bf16) for layer in CONVOLUTIONS),
        *(_linear(layer, bf16) for layer in LINEARS),
        _dropout(bf16),
        _augment(bf16),
        *_map_cases(fp32, True),
        *(_convolution(layer, fp32) for layer in CONVOLUTIONS),
        *(case for case in _map_cases(bf16, False) if case.op in ("lrn_max_pool2d", "max_pool2d")),
        *_map_cases(fp16, True),
    ]
    others = [
        *(_linear(layer, fp32) for layer in LINEARS),
        _dropout(fp32),
        _augment(fp32),
        *_map_cases(bf16, False),
        *_map_cases(fp32, False),
        *(_convolution(layer, dtype, False) for dtype in (bf16, fp32) for layer in CONVOLUTIONS),
        *_map_cases(fp32, True, [OVERHEAD]),
        _convolution(OVERHEAD, fp32),
        _linear(OVERHEAD, fp32),
        _dropout(fp32, OVERHEAD),
        _augment(fp32, OVERHEAD),
    ]
    known = {case.name for case in core}
    return core + [dataclasses.replace(case, core=False) for case in others if case.name not in known]
