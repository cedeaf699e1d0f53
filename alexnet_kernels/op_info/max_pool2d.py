"""The record of max_pool2d."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import MAP_DTYPES, MAPS, elements, map_inputs, map_inputs_with_bias, pooled
from alexnet_kernels.op_info._record import (
    Comparison,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Work,
    draw_shape,
    make_distinct,
    make_images,
    sample,
)


def work(elements: int, pooled: int, e: int) -> Work:
    """Of maps and pooled maps of so many elements, of e bytes each; the argmax has one byte."""
    written = pooled * (e + 1)
    return Work((elements * e + written, 2 * elements * e + 2 * written))


def windows(x: Tensor, kernel_size: Any = 3, stride: Any = 2, padding: Any = 0, ceil_mode: bool = False) -> Tensor:
    """The elements of every pooling window, [N, C, P, Q, R * S], -inf outside of the image."""
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = (
        (v, v) if isinstance(v, int) else v for v in (kernel_size, stride, padding)
    )
    height, width = x.shape[-2:]
    out_h = reference.pool_output_size(height, kernel_h, stride_h, pad_h, ceil_mode)
    out_w = reference.pool_output_size(width, kernel_w, stride_w, pad_w, ceil_mode)
    beyond_h = max(0, (out_h - 1) * stride_h + kernel_h - height - pad_h)
    beyond_w = max(0, (out_w - 1) * stride_w + kernel_w - width - pad_w)
    padded = F.pad(x, (pad_w, beyond_w, pad_h, beyond_h), value=-torch.inf)
    unfolded = padded.unfold(2, kernel_h, stride_h).unfold(3, kernel_w, stride_w)
    return unfolded[:, :, :out_h, :out_w].flatten(-2)


def clear_winner(x: Tensor, margin: float, **pool: Any) -> Tensor:
    """The windows whose largest element is larger than every other by more than this part of itself."""
    elements = windows(x, **pool)
    if elements.shape[-1] == 1:
        return torch.ones_like(elements[..., 0], dtype=torch.bool)
    largest, second = elements.topk(2, dim=-1).values.unbind(-1)
    return largest - second > margin * largest.abs()


def draw_window(draw: Draw) -> Inputs:
    """A window of up to 5 x 5 pixels."""
    kernel = draw(range(1, 6)), draw(range(1, 6))
    return {
        "kernel_size": kernel,
        "stride": (draw(range(1, 6)), draw(range(1, 6))),
        "padding": tuple(draw(range(side // 2 + 1)) for side in kernel),
        "ceil_mode": draw((False, True)),
        "bias": draw((None, "own", "float32")),
        "relu": draw((False, True)),
    }


def make_bias(make: Maker, channels: int, dtype: str | None) -> Inputs:
    """A bias in the images' own dtype or, for those of 16 bits, in float32; none for None."""
    return {} if dtype is None else {"bias": make(channels, dtype=None if dtype == "own" else make.wide)}


def distinct_bias(make: Maker, channels: int, dtype: str | None, step: float = 0.01) -> Inputs:
    """A bias that keeps images of `make_distinct` away from zero: multiples of step."""
    return {} if dtype is None else {"bias": (torch.arange(channels) - 1).to(make.device, make.dtype) * step}


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """With a bias, multiples of 1/16 of few bits: their sums are exact in every dtype."""
    bias = make_bias(make, shape[1], options.pop("bias", None))
    inputs = {**make_images(make, shape, options), **bias}
    if bias:
        for name in ("input", "bias"):
            inputs[name] = (inputs[name] * 16).round().clamp(-64, 64) / 16
    return inputs


def _make_derivative(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    bias = distinct_bias(make, shape[1], options.pop("bias", None))
    return {**make_distinct(make, shape, options), **bias}


def _domain(draw: Draw) -> Sample:
    return sample(*draw_shape(draw), **draw_window(draw))


INFO = OpInfo(
    name="max_pool2d",
    op=ops.max_pool2d,
    reference=reference.max_pool2d,
    samples=(
        sample(1, 48, 13, 11),
        sample(1, 64, 7, 9, relu=True),
        sample(2, 17, 13, 9),
        sample(2, 16, 6, 8, kernel_size=2),
        sample(2, 5, 7, 7, kernel_size=2, relu=True),
        sample(1, 20, 6, 5, stride=1),
        sample(1, 20, 5, 6, stride=1, padding=1),
        sample(2, 9, 8, 8, ceil_mode=True),
        sample(2, 9, 8, 7, ceil_mode=True, padding=1),
        sample(2, 9, 6, 7, kernel_size=2, stride=3, padding=1, ceil_mode=True),
        sample(2, 17, 2, 5, ceil_mode=True),
        sample(2, 33, 9, 11, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
        sample(2, 3, 9, 12, kernel_size=(1, 4), stride=(2, 3), padding=(0, 2), relu=True),
        sample(1, 3, 20, 19, kernel_size=16, stride=3, padding=8),
        sample(1, 18, 9, 9, kernel_size=1, stride=2),
        sample(1, 18, 3, 3),
        sample(1, 2, 10, 10, kernel_size=2, stride=5),
        sample(2, 1, 7, 7, relu=True),
        sample(1, 64, 7, 9, bias="own", relu=True),
        sample(2, 17, 13, 9, bias="float32", relu=True),
        sample(2, 40, 8, 7, ceil_mode=True, padding=1, bias="own"),
        sample(2, 9, 6, 5, kernel_size=2, stride=3, padding=1, bias="float32"),
        sample(0, 16, 7, 7),
        sample(0, 16, 7, 7, bias="own", relu=True),
    ),
    typical=(sample(2, 20, 7, 9, bias="float32", relu=True), sample(2, 20, 7, 9), sample(2, 20, 7, 9, relu=True)),
    large=sample(4, 48, 13, 13, bias="own"),
    make=_make,
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, kernel_size=1, stride=1, bias="own", relu=True),
        sample(3, 5, 2, 3, kernel_size=(1, 3), stride=1, padding=(0, 1)),
    ),
    comparison=lambda setting: Comparison(exact=True),
    wrt=("input", "bias"),
    derivatives=(
        sample(1, 2, 5, 5),
        sample(1, 2, 5, 5, relu=True),
        sample(1, 2, 5, 5, bias="own"),
        sample(1, 3, 5, 3, bias="own", relu=True),
    ),
    make_derivative=_make_derivative,
    on_images=lambda x: {"input": x, "relu": True},
    layers=(
        *(Layer(layer, partial(map_inputs, layer), partial(work, elements(layer), pooled(layer))) for layer in MAPS),
        Layer(
            "layer 1, bias and ReLU",
            partial(map_inputs_with_bias, "layer 1"),
            partial(work, elements("layer 1"), pooled("layer 1")),
            ("input", "bias"),
            timed=False,
        ),
    ),
    timed=MAP_DTYPES,
    core=lambda dtype, channels_last: channels_last or dtype == torch.bfloat16,
    order=2,
)
