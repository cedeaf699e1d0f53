"""The record of lrn_max_pool2d."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import LRN, MAP_DTYPES, MAPS, elements, map_inputs, map_inputs_with_bias, pooled
from alexnet_kernels.op_info._record import (
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
    draw_shape,
    make_distinct,
    make_images,
    sample,
)
from alexnet_kernels.op_info.local_response_norm import STRONG, draw_lrn
from alexnet_kernels.op_info.max_pool2d import clear_winner, distinct_bias, draw_window, make_bias

_LRN_OPTIONS = ("size", "alpha", "beta", "k", "groups")


def work(elements: int, pooled: int, e: int) -> Work:
    """As max_pool2d's; backward reads the input once more, in place of normalised maps."""
    written = pooled * (e + 1)
    return Work((elements * e + written, 3 * elements * e + 2 * written))


def _comparison(setting: Setting) -> Comparison:
    def settled(input: Tensor, bias: Tensor | None = None, relu: bool = False, **options: object) -> Tensor:
        lrn = {k: v for k, v in options.items() if k in _LRN_OPTIONS}
        pool = {k: v for k, v in options.items() if k not in _LRN_OPTIONS}
        x = input if bias is None else input + bias.reshape(-1, 1, 1)
        x = torch.relu(x) if relu else x
        normalised = reference.local_response_norm(x, **lrn)  # type: ignore[arg-type]
        return clear_winner(normalised, 4 * TOLERANCES[setting.dtype].relative, **pool)

    return Comparison(gradients="library" if setting.backend == "native" else "sums", settled=settled)


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    bias = make_bias(make, shape[1], options.pop("bias", None))
    return {**make_images(make, shape, options), **bias}


def _distinct(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    bias = distinct_bias(make, shape[1], options.pop("bias", None), 0.02)
    return {**make_distinct(make, shape, options, step=0.02), **bias}


def _torch(x: Inputs) -> Tensor:
    return F.max_pool2d(F.local_response_norm(x["input"].relu(), **LRN), 3, 2)


def _domain(draw: Draw) -> Sample:
    shape = draw_shape(draw)
    return sample(*shape, **draw_lrn(draw, shape[1]), **draw_window(draw))


INFO = OpInfo(
    name="lrn_max_pool2d",
    op=ops.lrn_max_pool2d,
    reference=reference.lrn_max_pool2d,
    samples=(
        sample(1, 96, 7, 7, alpha=5e-4, k=2.0, relu=True),
        sample(2, 64, 7, 5, groups=2, relu=True, **STRONG),
        sample(2, 16, 7, 9, **STRONG),
        sample(2, 37, 9, 7, relu=True, **STRONG),
        sample(2, 20, 7, 7, groups=4, **STRONG),
        sample(2, 21, 7, 5, size=4, groups=3, **STRONG),
        sample(1, 33, 5, 5, size=9, relu=True, **STRONG),
        sample(2, 3, 5, 5, size=7, **STRONG),
        sample(2, 1, 5, 5, size=1, **STRONG),
        sample(2, 24, 6, 8, kernel_size=2, **STRONG),
        sample(2, 24, 5, 6, stride=1, padding=1, **STRONG),
        sample(2, 24, 8, 8, ceil_mode=True, relu=True, **STRONG),
        sample(2, 24, 2, 2, ceil_mode=True, **STRONG),
        sample(2, 19, 9, 11, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), **STRONG),
        sample(1, 19, 9, 9, kernel_size=1, stride=3, **STRONG),
        sample(2, 24, 5, 5, beta=0.31, **STRONG),
        sample(2, 24, 5, 5, beta=1.0, relu=True, **STRONG),
        sample(2, 24, 5, 5, alpha=0.0, k=2.0),
        sample(2, 64, 7, 5, groups=2, bias="own", relu=True, **STRONG),
        sample(2, 37, 9, 7, bias="float32", relu=True, **STRONG),
        sample(2, 21, 7, 5, size=4, groups=3, beta=0.31, bias="float32", **STRONG),
        sample(2, 19, 9, 11, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0), bias="own", **STRONG),
        sample(0, 16, 7, 7, **STRONG),
        sample(0, 16, 7, 7, bias="own", **STRONG),
    ),
    typical=(
        sample(2, 20, 7, 9, bias="float32", relu=True, **STRONG),
        sample(2, 20, 7, 9, relu=True, **STRONG),
    ),
    large=sample(4, 48, 13, 13, bias="own", relu=True, **STRONG),
    make=_make,
    wrt=("input", "bias"),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, size=1, alpha=1.0, beta=1.0, kernel_size=1, stride=1, bias="own", relu=True),
        sample(3, 5, 2, 3, size=4, alpha=1.0, beta=0.5, kernel_size=1, stride=1),
    ),
    comparison=_comparison,
    derivatives=(
        sample(1, 4, 3, 5, size=5, alpha=0.05, k=1.2),
        sample(1, 4, 3, 5, size=3, alpha=0.05, k=1.2, groups=2, relu=True),
        sample(1, 4, 3, 5, size=5, alpha=0.05, k=1.2, bias="own"),
        sample(1, 4, 3, 5, size=3, alpha=0.05, k=1.2, groups=2, bias="own", relu=True),
    ),
    make_derivative=_distinct,
    on_images=lambda x: {"input": x, "alpha": 0.1, "relu": True},
    layers=(
        *(
            Layer(layer, partial(map_inputs, layer, **LRN, relu=True), partial(work, elements(layer), pooled(layer)))
            for layer in MAPS
            if layer != "layer 5"
        ),
        *(
            Layer(
                f"{layer}, bias and ReLU",
                partial(map_inputs_with_bias, layer, **LRN),
                partial(work, elements(layer), pooled(layer)),
                ("input", "bias"),
                timed=False,
            )
            for layer in ("layer 1", "layer 2")
        ),
    ),
    baselines={"F.local_response_norm, pool": Baseline(_torch)},
    half_baselines_on_cuda_only=True,
    timed=MAP_DTYPES,
    core=lambda dtype, channels_last: channels_last or dtype == torch.bfloat16,
    order=0,
)
