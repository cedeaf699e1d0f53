"""The least a device has to do for AlexNet's layers, and what it can do, measured on it.

Bytes are those that must come from memory or go there if every tensor is read and written once; operations count a
multiply-add as two. Each is given for one image, forward and for forward and backward together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels.models import PRESETS, AlexNet
from alexnet_kernels.nn import WithinMapResponseNorm
from alexnet_kernels.testing.timing import copy_rate, gemm_rate

SGD_BYTES = 20  # of a float32 parameter: its value and momentum, read and written, and its gradient
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Work:
    """[forward, forward and backward]."""

    nbytes: tuple[float, float]
    operations: tuple[float, float] = (0, 0)
    constant_bytes: tuple[float, float] = (0, 0)  # of weights, whatever the batch

    def moved(self, batch: int, backward: bool) -> float:
        return self.nbytes[int(backward)] * batch + self.constant_bytes[int(backward)]

    def done(self, batch: int, backward: bool) -> float:
        return self.operations[int(backward)] * batch

    def seconds(self, batch: int, backward: bool, copy_rate: float, gemm_rate: float) -> float:
        """That it takes at least on a device of these rates."""
        return max(self.moved(batch, backward) / copy_rate, self.done(batch, backward) / gemm_rate)


def pooling(elements: int, pooled: int, e: int) -> Work:
    """With an argmax of one byte; e is an element's bytes."""
    written = pooled * (e + 1)
    return Work((elements * e + written, 2 * elements * e + 2 * written))


def normalisation_and_pooling(elements: int, pooled: int, e: int) -> Work:
    """Backward reads the input once more, in place of normalised maps."""
    written = pooled * (e + 1)
    return Work((elements * e + written, 3 * elements * e + 2 * written))


def normalisation(elements: int, e: int) -> Work:
    return Work((2 * elements * e, 5 * elements * e))


def batch_normalisation(elements: int, e: int) -> Work:
    """The sums come before the first result, forward and backward: their inputs are read twice."""
    return Work((3 * elements * e, 8 * elements * e))


def elementwise(elements: int, e: int) -> Work:
    return Work((2 * elements * e, 4 * elements * e))


def convolution(inputs: int, outputs: int, weights: int, macs: int, e: int, first: bool) -> Work:
    """The first layer's input gets no gradient."""
    products = 2 if first else 3
    return Work(
        ((inputs + outputs) * e, (products * inputs + 3 * outputs) * e),
        (2 * macs, 2 * macs * products),
        (weights * e, products * weights * e),
    )


def linear(rows: int, columns: int, e: int) -> Work:
    macs = rows * columns
    return Work(((rows + columns) * e, 3 * (rows + columns) * e), (2 * macs, 6 * macs), (macs * e, 3 * macs * e))


def network(preset: str, dtype: torch.dtype, width: float = 1.0, size: int | None = None) -> dict[str, Work]:
    """Layer by layer, each as one pass where this package has an op for it; without the optimizer's step."""
    model = AlexNet(preset=preset, width=width, device="meta").eval()
    return dict(_layers(model, dtype.itemsize, size or PRESETS[preset].input_size))


def parameters(preset: str, width: float = 1.0) -> int:
    return sum(p.numel() for p in AlexNet(preset=preset, width=width, device="meta").parameters())


def _layers(model: AlexNet, e: int, size: int) -> Iterator[tuple[str, Work]]:
    x = torch.empty(1, 3, size, size, device="meta")
    layer = 0
    # A ReLU costs nothing in the pass before it or after it.
    children = [child for child in model.features if not isinstance(child, nn.ReLU)]
    i = 0
    while i < len(children):
        child = children[i]
        pool = children[i + 1] if i + 1 < len(children) and isinstance(children[i + 1], nn.MaxPool2d) else None
        y: Tensor = child(x)
        n, m = x.numel(), y.numel()
        if isinstance(child, nn.Conv2d):
            layer += 1
            weights = child.weight.numel()
            yield f"conv{layer}", convolution(n, m, weights, m * child.weight[0].numel(), e, first=layer == 1)
        elif isinstance(child, nn.LocalResponseNorm) and pool is not None:
            y = pool(y)
            yield f"norm{layer}, pool{layer}", normalisation_and_pooling(n, y.numel(), e)
            i += 1
        elif isinstance(child, nn.LocalResponseNorm):
            yield f"norm{layer}", normalisation(n, e)
        elif isinstance(child, WithinMapResponseNorm):
            yield f"map_norm{layer}", normalisation(n, e)
        elif isinstance(child, nn.BatchNorm2d):
            yield f"batch_norm{layer}", batch_normalisation(n, e)
        elif isinstance(child, nn.MaxPool2d):
            yield f"pool{layer}", pooling(n, m, e)
        x = y
        i += 1
    layers = [child for child in model.classifier if isinstance(child, nn.Linear)]
    for fc, child in enumerate(layers, 6):
        yield f"fc{fc}", linear(child.in_features, child.out_features, e)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at the simplest of tasks."""

    copy: float  # bytes a second, read and written, of copying a large tensor
    gemm: dict[str, float]  # operations a second of a large matrix product: fp32, bf16, fp16, tf32 (CUDA)

    def product(self, dtype: str) -> float:
        """Operations a second; float32 convolutions on CUDA take TF32."""
        names = ("tf32", "fp32") if dtype == "fp32" else (dtype, "bf16", "fp32")
        return next(self.gemm[name] for name in names if name in self.gemm)

    def seconds(self, nbytes: float, operations: float, dtype: str) -> float:
        return max(nbytes / self.copy, operations / self.product(dtype))

    def by_products(self, nbytes: float, operations: float, dtype: str) -> bool:
        """Whether operations take longer than bytes."""
        return operations / self.product(dtype) > nbytes / self.copy


def measure_ceilings(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """{"copy": ...} and {"gemm": {dtype: ...}}, one after the other."""
    gpu = device.type == "cuda"
    yield {"copy": copy_rate(device, 2**31 if gpu else 2**24 if small else 2**28)}
    size = 8192 if gpu else 256 if small else 2048
    gemm: dict[str, float] = {}
    for dtype, name in SHORT.items():
        # Processors without instructions for float16 take a minute for what takes them a millisecond in bfloat16.
        slow = dtype == torch.float16 and not gpu
        gemm[name] = gemm_rate(device, min(size, 256) if slow else size if dtype.itemsize == 2 else size // 2, dtype)
        yield {"gemm": dict(gemm)}
    if gpu:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        gemm["tf32"] = gemm_rate(device, size // 2, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = before
        yield {"gemm": dict(gemm)}


def ceilings(found: dict[str, Any]) -> Ceilings | None:
    """Of what `measure_ceilings` yielded, merged; None if that isn't all there."""
    return Ceilings(found["copy"], found["gemm"]) if found.get("copy") and found.get("gemm") else None
