"""The record of conv2d_relu."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import _library, ops, reference
from alexnet_kernels.op_info._layers import CONVOLUTIONS
from alexnet_kernels.op_info._record import (
    OUTLIERS,
    OVERHEAD,
    TOLERANCES,
    Baseline,
    Comparison,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Setting,
    Work,
    sample,
)
from alexnet_kernels.ops.conv2d_relu import LIBRARY, MMA, WGMMA, conv2d_relu_by


def work(inputs: int, outputs: int, weights: int, macs: int, first: bool, e: int) -> Work:
    """Of so many elements, of e bytes each, and multiply-adds. The first layer's input gets no gradient."""
    products = 2 if first else 3
    return Work(
        ((inputs + outputs) * e, (products * inputs + 3 * outputs) * e),
        (2 * macs, 2 * macs * products),
        (weights * e, products * weights * e),
    )


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """`weight` is its shape; bias=False leaves the bias out."""
    weight = options.pop("weight")
    scale = math.prod(weight[1:]) ** -0.5
    bias = make(weight[0], scale=0.5) if options.pop("bias", True) else None
    return {"input": make(*shape), "weight": make(*weight, scale=scale), "bias": bias, **options}


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, **options: Any
) -> Tensor:
    return (reference.conv2d_relu if relu else F.conv2d)(input, weight, bias, **options)


def _preactivation(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = True, **options: Any
) -> Tensor:
    return F.conv2d(input, weight, bias, **options)


def _torch(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = True, **options: Any) -> Tensor:
    output = F.conv2d(input, weight, bias, **options)
    return output.relu() if relu else output


def settled(margin: float, **given: Any) -> Tensor:
    """Where the pre-activation is too far from zero for a rounding to change its sign."""
    before = _preactivation(**given)
    if not given.get("relu", True):
        return torch.ones_like(before, dtype=torch.bool)
    return before.abs() > margin * before.abs().amax() if before.numel() else before > 0


def comparison(setting: Setting) -> Comparison:
    if setting.half and (setting.backend == "cuda" or (setting.gpu and setting.backend == "native")):
        # cuDNN's convolution, and the emulation's, is rounded before the bias is added.
        margin = TOLERANCES[setting.dtype].library
        # Where the sum of two terms of order 1 is small, its error is not.
        return Comparison("library", "library", settled=partial(settled, margin), absolute=margin)
    if setting.gpu and setting.backend != "triton":
        # cuDNN's gradient of conv2's filters in NCHW, float32 without TF32, is wrong by 2e-3 of the largest.
        return Comparison("transformed", "transformed", settled=partial(settled, 1e-4), peer=_torch)
    # torch's convolutions in float16 on a CPU add in float16 in backward.
    gradients = "library" if setting.dtype == torch.float16 else "sums"
    return Comparison(gradients=gradients, settled=partial(settled, 1e-4))


def _on_images(x: Tensor) -> Inputs:
    weight = torch.ones(8, x.shape[1], 3, 3, device=x.device, dtype=x.dtype) / 64
    return {"input": x, "weight": weight, "padding": 1}


def _layer(name: str) -> Layer:
    filters, channels, kernel, stride, padding, groups, size = CONVOLUTIONS.get(name, (16, 16, 3, 1, 1, 1, 3))
    out = (size + 2 * padding - kernel) // stride + 1
    fan_in = channels * kernel**2
    first = name == "conv1"

    def inputs(make: Maker, batch: int) -> Inputs:
        return {
            "input": make(batch, channels * groups, size, size),
            "weight": make(filters, channels, kernel, kernel, scale=fan_in**-0.5),
            "bias": make(filters),
            "stride": stride,
            "padding": padding,
            "groups": groups,
        }

    outputs = filters * out**2
    layer_work = partial(work, channels * groups * size**2, outputs, filters * fan_in, outputs * fan_in, first)
    return Layer(name, inputs, layer_work, ("weight", "bias") if first else ("input", "weight", "bias"))


def _cudnn_fused(x: Inputs) -> Tensor:
    stride, padding = [x["stride"]] * 2, [x["padding"]] * 2
    return torch.ops.aten.cudnn_convolution_relu(
        x["input"], x["weight"], x["bias"], stride, padding, [1, 1], x["groups"]
    )


def _split(x: Inputs) -> Tensor:
    """One convolution a group, as cuDNN is faster for some."""
    images, weights, biases = (x[name].chunk(x["groups"], d) for name, d in (("input", 1), ("weight", 0), ("bias", 0)))
    parts = [F.conv2d(*part, x["stride"], x["padding"]) for part in zip(images, weights, biases, strict=True)]
    return torch.cat(parts, 1).relu()


def own_algorithms(dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The package's own that take AlexNet's layers there in channels_last, if the library has them."""
    half = dtype in (torch.bfloat16, torch.float16)
    wgmma = {"wgmma": WGMMA} if half and torch.cuda.get_device_capability(device) == (9, 0) else {}
    return {"mma.sync": MMA, **wgmma}


def by(algorithm: int) -> Callable[[Inputs], Tensor]:
    return lambda x: conv2d_relu_by(algorithm, **x, backend="cuda")


def _paths(dtype: torch.dtype, channels_last: bool, device: torch.device) -> dict[str, Baseline]:
    """The algorithms that take AlexNet's layers there."""
    algorithms = {"cuDNN": LIBRARY, **(own_algorithms(dtype, device) if channels_last else {})}
    if not _library.status()["wgmma"]:
        algorithms.pop("wgmma", None)
    return {name: Baseline(by(algorithm), outliers=OUTLIERS) for name, algorithm in algorithms.items()}


def _domain(draw: Draw) -> Sample:
    groups = draw((1, 1, 2, 3))
    channels, outputs = groups * draw((1, 2, 3, 8, 17)), groups * draw((1, 3, 8, 20))
    options = {
        "weight": (outputs, channels // groups, draw(range(1, 6)), draw(range(1, 6))),
        "stride": draw((1, 2, 4)) if draw((True, False)) else (draw(range(1, 4)), draw(range(1, 4))),
        "padding": (draw(range(3)), draw(range(3))),
        "bias": draw((True, False)),
        "relu": draw((True, False)),
    }
    return sample(draw((0, 1, 2, 6)), channels, draw(range(1, 12)), draw(range(1, 12)), groups=groups, **options)


INFO = OpInfo(
    name="conv2d_relu",
    op=ops.conv2d_relu,
    reference=_reference,
    samples=(
        sample(1, 3, 83, 75, weight=(96, 3, 11, 11), stride=4, padding=2),
        sample(1, 96, 13, 13, weight=(64, 48, 5, 5), padding=2, groups=2),
        sample(1, 64, 13, 13, weight=(48, 64, 3, 3), padding=1),
        sample(2, 7, 9, 11, weight=(5, 7, 3, 3)),
        sample(2, 12, 8, 5, weight=(9, 4, 3, 2), stride=(2, 1), padding=(1, 0), groups=3),
        sample(2, 16, 6, 6, weight=(16, 16, 1, 1)),
        sample(2, 6, 6, 6, weight=(6, 1, 3, 3), padding=1, groups=6),
        sample(1, 4, 3, 3, weight=(2, 4, 3, 3)),
        sample(1, 17, 9, 9, weight=(33, 17, 2, 2), stride=2),
        sample(2, 8, 7, 7, weight=(16, 8, 3, 3), padding=1, bias=False),
        sample(2, 8, 7, 7, weight=(16, 8, 3, 3), padding=1, relu=False),
        sample(0, 8, 7, 7, weight=(16, 8, 3, 3)),
        sample(8, 7, 7, weight=(16, 8, 3, 3)),
    ),
    typical=(
        sample(2, 8, 7, 6, weight=(16, 4, 3, 3), padding=1, groups=2),
        sample(2, 3, 11, 10, weight=(8, 3, 5, 5), stride=2, relu=False),
    ),
    large=sample(4, 16, 13, 13, weight=(32, 8, 3, 3), padding=1, groups=2),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, weight=(1, 1, 1, 1), bias=False),
        sample(3, 5, 2, 3, weight=(5, 1, 1, 1), groups=5, bias=False),
        sample(1, 3, 5, 5, weight=(1, 3, 3, 3), stride=2),
    ),
    make=_make,
    wrt=("input", "weight", "bias"),
    comparison=comparison,
    derivatives=(
        sample(1, 4, 3, 2, weight=(2, 4, 2, 2), padding=1),
        sample(1, 4, 3, 2, weight=(2, 2, 2, 2), padding=1, groups=2),
    ),
    casts=True,
    # torch's convolution splits its sums by the number of threads.
    repeats_across_threads=lambda backend: False,
    on_images=_on_images,
    layers=tuple(_layer(name) for name in (*CONVOLUTIONS, OVERHEAD)),
    baselines={
        "cudnn_convolution_relu": Baseline(_cudnn_fused, differentiable=False, cuda_only=True),
        "a convolution a group": Baseline(_split, cuda_only=True, layers=("conv2", "conv4", "conv5")),
    },
    paths=_paths,
    tolerance=lambda dtype: 5e-3 if dtype == torch.float32 else None,  # TF32
    preactivation=_preactivation,
    order=5,
)
