"""Every op at AlexNet's layers: inputs, definition, peers, and the fewest bytes and operations it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import ops, reference

Inputs = dict[str, Any]

# The share of elements that may lie further from the definition than the tolerance: in half precision two nearly equal
# maxima can change places, and do so more often where PyTorch's operators round before the pool.
OUTLIERS = 1e-3
PEER_OUTLIERS = 5e-3
# Of the largest element: sums of half-precision terms that PyTorch rounds between its operators.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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
    # For one image: the fewest bytes moved and operations done, forward, and forward and backward together.
    nbytes: tuple[float, float]
    operations: tuple[float, float] = (0, 0)
    constant_bytes: tuple[float, float] = (0, 0)  # of weights, whatever the batch
    peers: Mapping[str, Peer] = field(default_factory=dict)
    eager: bool = True  # whether backend "native" is what PyTorch's users run; else a peer is
    tolerance: float | None = None  # of the largest element, if not the dtype's

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else ", NCHW"
        return f"{self.op}, {self.layer}, {SHORT[self.dtype]}{layout}"

    def floor(self, batch: int, backward: bool, copy_rate: float, gemm_rate: float) -> float:
        """Seconds that the op takes at least on a device of these rates."""
        return max(self.moved(batch, backward) / copy_rate, self.operations[int(backward)] * batch / gemm_rate)

    def moved(self, batch: int, backward: bool) -> float:
        return self.nbytes[int(backward)] * batch + self.constant_bytes[int(backward)]


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
            grad = torch.randint(-4, 5, output.shape).to(device, case.dtype)
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
MAPS = {"layer 1": (96, 55, 55), "layer 2": (256, 27, 27), "layer 5": (256, 13, 13)}
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


def _on_images(op, layer, dtype, channels_last, call, definition, nbytes, peers=None) -> Case:
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
        nbytes,
        peers=peers or {},
    )


def _torch_lrn(x: Tensor) -> Tensor:
    return F.local_response_norm(x, **LRN)


# PyTorch's normalisation exists in half precision on CUDA only.
TORCH_LRN = {"F.local_response_norm": Peer(lambda x: _torch_lrn(x["input"]), cuda_only=True)}
TORCH_LRN_POOL = {
    "F.local_response_norm, pool": Peer(lambda x: F.max_pool2d(_torch_lrn(x["input"].relu()), 3, 2), cuda_only=True)
}


def _map_cases(dtype: torch.dtype, channels_last: bool) -> Iterator[Case]:
    e = dtype.itemsize
    elements = {layer: c * h * w for layer, (c, h, w) in MAPS.items()}
    pooled = {layer: c * ((h - 3) // 2 + 1) ** 2 for layer, (c, h, w) in MAPS.items()}
    for layer in ("layer 1", "layer 2"):
        n, m = elements[layer], pooled[layer]
        yield _on_images(
            "lrn_max_pool2d",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.lrn_max_pool2d(x["input"], **LRN, relu=True, backend=backend),
            lambda x: reference.max_pool2d(reference.local_response_norm(x["input"].relu(), **LRN)),
            (n * e + m * (e + 1), 3 * n * e + 2 * m * (e + 1)),
            TORCH_LRN_POOL,
        )
        yield _on_images(
            "local_response_norm",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.local_response_norm(x["input"], **LRN, backend=backend),
            lambda x: reference.local_response_norm(x["input"], **LRN),
            (2 * n * e, 5 * n * e),
            TORCH_LRN,
        )
    for layer in MAPS:
        n, m = elements[layer], pooled[layer]
        yield _on_images(
            "max_pool2d",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.max_pool2d(x["input"], backend=backend),
            lambda x: reference.max_pool2d(x["input"]),
            (n * e + m * (e + 1), 2 * n * e + 2 * m * (e + 1)),
        )
    for layer in ("layer 1", "layer 2"):
        n = elements[layer]
        yield _on_images(
            "batch_norm_relu",
            layer,
            dtype,
            channels_last,
            lambda x, backend: ops.batch_norm_relu(x["input"], None, None, training=True, backend=backend),
            lambda x: reference.batch_norm_relu(x["input"], None, None, None, None, True)[0],
            # The sums come before the first result, forward and backward: their inputs are read twice.
            (3 * n * e, 8 * n * e),
        )
    n = elements["layer 2"]
    yield _on_images(
        "within_map_response_norm",
        "layer 2",
        dtype,
        channels_last,
        lambda x, backend: ops.within_map_response_norm(x["input"], backend=backend),
        lambda x: reference.within_map_response_norm(x["input"], 5, 1e-3, 0.75, 1.0),
        (2 * n * e, 5 * n * e),
    )


def _convolution(layer: str, dtype: torch.dtype) -> Case:
    filters, channels, kernel, stride, padding, groups, size = CONVOLUTIONS[layer]
    out = (size + 2 * padding - kernel) // stride + 1
    options: dict[str, Any] = {"stride": stride, "padding": padding, "groups": groups}
    fan_in = channels * kernel**2
    e = dtype.itemsize
    weights = filters * fan_in * e
    inputs, outputs = channels * groups * size**2 * e, filters * out**2 * e
    macs = filters * out**2 * fan_in
    first = layer == "conv1"  # whose input gets no gradient

    def make(batch: int, device: torch.device) -> Inputs:
        x = torch.randn(batch, channels * groups, size, size, device=device).to(dtype)
        w = torch.randn(filters, channels, kernel, kernel, device=device).mul_(fan_in**-0.5).to(dtype)
        b = torch.randn(filters, device=device).to(dtype)
        last = {"memory_format": torch.channels_last}
        return {"input": x.contiguous(**last), "weight": w.contiguous(**last), "bias": b}

    def fused(x: Inputs) -> Tensor:
        pairs = ([stride] * 2, [padding] * 2, [1, 1], groups)
        return torch.ops.aten.cudnn_convolution_relu(x["input"], x["weight"], x["bias"], *pairs)

    return Case(
        "conv2d_relu",
        layer,
        dtype,
        True,
        make,
        lambda x, backend: ops.conv2d_relu(x["input"], x["weight"], x["bias"], **options, backend=backend),
        lambda x: reference.conv2d_relu(x["input"], x["weight"], x["bias"], **options),
        ("weight", "bias") if first else ("input", "weight", "bias"),
        (inputs + outputs, (2 if first else 3) * inputs + 3 * outputs),
        (2 * macs, 2 * macs * (2 if first else 3)),
        (weights, (2 if first else 3) * weights),
        {"cudnn_convolution_relu": Peer(fused, differentiable=False, cuda_only=True)},
        tolerance=5e-3 if dtype == torch.float32 else None,  # TF32
    )


def _linear(layer: str, dtype: torch.dtype) -> Case:
    rows, columns = LINEARS[layer]
    e = dtype.itemsize

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
        ((rows + columns) * e, (3 * rows + 3 * columns) * e),
        (2 * rows * columns, 6 * rows * columns),
        (rows * columns * e, 3 * rows * columns * e),
        {"linear, relu, dropout": Peer(torch_linear, checked=False)},
        eager=False,
    )


def _dropout(dtype: torch.dtype) -> Case:
    return Case(
        "dropout",
        "96x55x55",
        dtype,
        False,
        lambda batch, device: {"input": torch.randn(batch, 96 * 55 * 55, device=device).to(dtype)},
        lambda x, backend: ops.dropout(x["input"], seed=SEED, backend=backend),
        lambda x: reference.dropout(x["input"], 0.5, True, SEED),
        ("input",),
        (2 * 96 * 55 * 55 * dtype.itemsize, 4 * 96 * 55 * 55 * dtype.itemsize),
        peers={"torch's dropout": Peer(lambda x: F.dropout(x["input"], 0.5), checked=False)},
        eager=False,
    )


def _augment(dtype: torch.dtype) -> Case:
    def make(batch: int, device: torch.device) -> Inputs:
        images = torch.randint(0, 256, (batch, 256, 256, 3), dtype=torch.uint8)
        return {
            "images": images.to(device),
            "crops": torch.randint(0, 33, (batch, 2)).to(device),
            "flips": (torch.arange(batch) % 2 == 0).to(device),
            "mean": torch.tensor([120.0, 115.0, 100.0], device=device),
            "color_shift": torch.randn(batch, 3).to(device),
        }

    def options(x: Inputs) -> Inputs:
        return {name: x[name] for name in ("flips", "color_shift", "mean")}

    def definition(x: Inputs) -> Tensor:
        return reference.augment(x["images"], x["crops"], [224, 224], **options(x), dtype=torch.float64)

    return Case(
        "augment",
        "224 of 256",
        dtype,
        True,
        make,
        lambda x, backend: ops.augment(x["images"], x["crops"], 224, **options(x), dtype=dtype, backend=backend),
        definition,
        (),
        (3 * 224 * 224 * (1 + dtype.itemsize),) * 2,
    )


def cases() -> list[Case]:
    """In the order of what matters most to AlexNet in half precision."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        *_map_cases(bf16, True),
        *(_convolution(layer, bf16) for layer in CONVOLUTIONS),
        *(_linear(layer, bf16) for layer in LINEARS),
        _dropout(bf16),
        _augment(bf16),
        *_map_cases(fp32, True),
        *(_convolution(layer, fp32) for layer in CONVOLUTIONS),
        *(case for case in _map_cases(bf16, False) if case.op in ("lrn_max_pool2d", "max_pool2d")),
        *_map_cases(torch.float16, True),
    ]
