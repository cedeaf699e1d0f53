"""The least work of AlexNet's layers, and the measured rates of a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels.bench.row import SHORT
from alexnet_kernels.bench.timing import copy_rate, gemm_rate
from alexnet_kernels.models import PRESETS, AlexNet
from alexnet_kernels.nn import WithinMapResponseNorm
from alexnet_kernels.op_info import (
    Work,
    batch_norm_relu,
    conv2d_relu,
    linear_relu_dropout,
    local_response_norm,
    lrn_max_pool2d,
    max_pool2d,
)


def network(preset: str, dtype: torch.dtype, width: float = 1.0, size: int | None = None) -> dict[str, Work]:
    """The work of each layer, as one pass where this package has an op for it; excludes the optimizer's step."""
    model = AlexNet(preset=preset, width=width, device="meta").eval()
    return dict(_layers(model, dtype.itemsize, size or PRESETS[preset].input_size))


def parameters(preset: str, width: float = 1.0) -> int:
    return sum(p.numel() for p in AlexNet(preset=preset, width=width, device="meta").parameters())


def _layers(model: AlexNet, e: int, size: int) -> Iterator[tuple[str, Work]]:
    x = torch.empty(1, 3, size, size, device="meta")
    layer = 0
    # A ReLU is free: it is part of the pass before or after it.
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
            yield f"conv{layer}", conv2d_relu.work(n, m, weights, m * child.weight[0].numel(), layer == 1, e)
        elif isinstance(child, nn.LocalResponseNorm) and pool is not None:
            y = pool(y)
            yield f"norm{layer}, pool{layer}", lrn_max_pool2d.work(n, y.numel(), e)
            i += 1
        elif isinstance(child, nn.LocalResponseNorm):
            yield f"norm{layer}", local_response_norm.work(n, e)
        elif isinstance(child, WithinMapResponseNorm):
            yield f"map_norm{layer}", local_response_norm.work(n, e)
        elif isinstance(child, nn.BatchNorm2d):
            yield f"batch_norm{layer}", batch_norm_relu.work(n, e)
        elif isinstance(child, nn.MaxPool2d):
            yield f"pool{layer}", max_pool2d.work(n, m, e)
        x = y
        i += 1
    layers = [child for child in model.classifier if isinstance(child, nn.Linear)]
    for fc, child in enumerate(layers, 6):
        yield f"fc{fc}", linear_relu_dropout.work(child.in_features, child.out_features, e)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: upper limits for its kernels."""

    copy: float  # bytes per second, read and written, of copying a large tensor
    gemm: dict[str, float]  # operations per second of a large matrix product, by fp32, bf16, fp16 and, on CUDA, tf32

    def product(self, dtype: str) -> float:
        """Operations per second; float32 convolutions on CUDA use TF32."""
        names = ("tf32", "fp32") if dtype == "fp32" else (dtype, "bf16", "fp32")
        return next(self.gemm[name] for name in names if name in self.gemm)

    def seconds(self, nbytes: float, operations: float, dtype: str) -> float:
        return max(nbytes / self.copy, operations / self.product(dtype))

    def by_products(self, nbytes: float, operations: float, dtype: str) -> bool:
        """Whether operations take longer than bytes."""
        return operations / self.product(dtype) > nbytes / self.copy


def measure_ceilings(device: torch.device, small: bool = False) -> Iterator[dict[str, Any]]:
    """Yields {"copy": ...}, then {"gemm": {dtype: ...}} after each dtype."""
    gpu = device.type == "cuda"
    yield {"copy": copy_rate(device, 2**31 if gpu else 2**24 if small else 2**28)}
    size = 8192 if gpu else 256 if small else 2048
    gemm: dict[str, float] = {}
    for dtype, name in SHORT.items():
        # Without float16 instructions, a CPU is slower by orders of magnitude than in bfloat16.
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
    """From what `measure_ceilings` yielded, merged; None if it is incomplete."""
    return Ceilings(found["copy"], found["gemm"]) if found.get("copy") and found.get("gemm") else None
