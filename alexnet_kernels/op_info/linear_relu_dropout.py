"""The record of linear_relu_dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import LINEARS, SEED
from alexnet_kernels.op_info._record import (
    OVERHEAD,
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
from alexnet_kernels.op_info.dropout import draw_dropout

KEYED = {"seed": 99, "offset": 2}


def work(rows: int, columns: int, e: int) -> Work:
    """Of a product with a matrix of rows x columns elements, of e bytes each."""
    macs = rows * columns
    return Work(((rows + columns) * e, 3 * (rows + columns) * e), (2 * macs, 6 * macs), (macs * e, 3 * macs * e))


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """`outputs` is their number; bias=False leaves the bias out."""
    outputs, inputs = options.pop("outputs"), shape[-1]
    bias = make(outputs) if options.pop("bias", True) else None
    return {"input": make(*shape), "weight": make(outputs, inputs, scale=inputs**-0.5), "bias": bias, **options}


def _preactivation(input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    return F.linear(input, weight, bias)


def _settled(relu: bool = True, **given: Any) -> Tensor:
    """Where the pre-activation is too far from zero for a rounding to change its sign."""
    before = _preactivation(**given)
    return (before.abs() > 1e-4 * before.abs().amax() if before.numel() else before > 0) | (not relu)


def _comparison(setting: Setting) -> Comparison:
    if setting.gpu and setting.half:
        # cuBLAS rounds a product of few rows before it adds the bias.
        return Comparison("library", "library", settled=_settled)
    # A gradient scaled by 1 / (1 - p) is rounded before the products.
    return Comparison(gradients="operand", settled=_settled)


def _on_images(x: Tensor) -> Inputs:
    rows = x.flatten(1)
    weight = torch.ones(24, rows.shape[1], device=x.device, dtype=x.dtype) / 64
    return {"input": rows, "weight": weight, "seed": 5}


def _layer(name: str) -> Layer:
    rows, columns = LINEARS.get(name, (16, 16))

    def inputs(make: Maker, batch: int) -> Inputs:
        x, weight = make(batch, rows), make(columns, rows, scale=rows**-0.5)
        return {"input": x, "weight": weight, "bias": make(columns), "seed": SEED}

    return Layer(name, inputs, partial(work, rows, columns), ("input", "weight", "bias"))


def _torch(x: Inputs) -> Tensor:
    return F.dropout(F.linear(x["input"], x["weight"], x["bias"]).relu(), 0.5)


def _domain(draw: Draw) -> Sample:
    batch, inputs, outputs = (
        draw((0, 1, 2, 3, 4, 5, 16, 17, 65)),
        draw((1, 7, 8, 17, 64, 100)),
        draw((1, 5, 12, 33, 64)),
    )
    options = {"relu": draw((True, False)), "bias": draw((True, False)), **draw_dropout(draw, (batch, outputs))}
    return sample(batch, inputs, outputs=outputs, **options)


INFO = OpInfo(
    name="linear_relu_dropout",
    op=ops.linear_relu_dropout,
    reference=reference.linear_relu_dropout,
    samples=(
        sample(2, 576, outputs=256, **KEYED),
        sample(5, 17, outputs=33, **KEYED),
        sample(3, 2, 8, outputs=5, **KEYED),
        sample(16, outputs=7, **KEYED),
        sample(1, 8, outputs=1, **KEYED),
        sample(5, 17, outputs=33, p=0.3, **KEYED),
        sample(5, 17, outputs=33, p=0.0, **KEYED),
        sample(5, 17, outputs=33, p=1.0, **KEYED),
        sample(5, 17, outputs=33, relu=False, **KEYED),
        sample(5, 17, outputs=33, relu=False, p=0.3, **KEYED),
        sample(5, 17, outputs=33, scale_at="inference", **KEYED),
        sample(5, 17, outputs=33, training=False, **KEYED),
        sample(5, 17, outputs=33, training=False, scale_at="inference", p=0.3, **KEYED),
        sample(5, 17, outputs=33, training=False, relu=False, **KEYED),
        sample(5, 17, outputs=8, shard=(1, 16, 64), **KEYED),
        sample(5, 17, outputs=8, shard=(0, 3, 10), relu=False, **KEYED),
        sample(3, 2, 17, outputs=8, shard=(-1, 8, 16), **KEYED),
        sample(3, 2, 17, outputs=8, shard=(1, 2, 5), **KEYED),
        sample(0, 17, outputs=8, **KEYED),
        sample(2, 0, 17, outputs=8, **KEYED),
        sample(5, 17, outputs=33, bias=False, **KEYED),
        sample(5, 17, outputs=33, bias=False, relu=False, **KEYED),
    ),
    typical=(sample(6, 17, outputs=33, p=0.3, **KEYED), sample(6, 17, outputs=33, relu=False, **KEYED)),
    large=sample(32, 256, outputs=384, **KEYED),
    domain=_domain,
    ones=(
        sample(1, 1, outputs=1, seed=1, offset=1, bias=False),
        sample(1, 5, outputs=5, seed=1, offset=1, bias=False, relu=False),
        sample(1, 5, outputs=5, seed=1, offset=1),
    ),
    make=_make,
    wrt=("input", "weight", "bias"),
    comparison=_comparison,
    derivatives=(sample(3, 4, outputs=5, p=0.3, **KEYED), sample(3, 4, outputs=5, p=0.3, relu=False, **KEYED)),
    images=False,
    casts=True,
    # torch's matrix products may split their sums by the number of threads.
    repeats_across_threads=lambda backend: False,
    on_images=_on_images,
    layers=tuple(_layer(name) for name in (*LINEARS, OVERHEAD)),
    baselines={"linear, relu, dropout": Baseline(_torch, checked=False)},
    eager=False,
    preactivation=_preactivation,
    core=lambda dtype, channels_last: dtype == torch.bfloat16,
    order=6,
)
