"""The record of dropout."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import SEED
from alexnet_kernels.op_info._record import (
    OVERHEAD,
    Baseline,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Work,
    draw_shape,
    sample,
)

KEYED = {"seed": 1234, "offset": 5}


def work(elements: int, e: int) -> Work:
    """Of so many elements, of e bytes each."""
    return Work((2 * elements * e, 4 * elements * e))


def _inputs(elements: int, make: Maker, batch: int) -> Inputs:
    return {"input": make(batch, elements), "seed": SEED}


def _maps(make: Maker, batch: int) -> Inputs:
    return {"input": make(batch, 256, 6, 6), "seed": SEED}


def draw_dropout(draw: Draw, shape: tuple[int, ...]) -> Inputs:
    """A dropout of a tensor of this shape, or of a shard of a larger one."""
    options: Inputs = {
        "p": draw((0.5, 0.5, 0.0, 0.1, 0.9, 1.0)),
        "training": draw((True, True, False)),
        "scale_at": draw(("training", "inference")),
        "seed": draw((0, 1234, 2**63 - 1)),
        "offset": draw((0, 5, 2**63 - 1)),
    }
    if draw((False, True)):
        dim, start = draw(range(len(shape))), draw((0, 1, 3, 2**33))
        options["shard"] = (dim, start, start + shape[dim] + draw((0, 1, 7)))
    return options


def _domain(draw: Draw) -> Sample:
    shape = draw_shape(draw) if draw((True, False)) else (draw(range(5)), draw((1, 7, 100, 4096)))
    return sample(*shape, **draw_dropout(draw, shape))


INFO = OpInfo(
    name="dropout",
    op=ops.dropout,
    reference=reference.dropout,
    samples=(
        *(
            sample(2, 19, 5, 7, p=p, training=training, scale_at=scale_at, **KEYED)
            for p in (0.0, 0.1, 0.5, 0.75, 1.0)
            for scale_at in ("training", "inference")
            for training in (True, False)
        ),
        *(
            sample(*shape, **KEYED)
            for shape in (
                (),
                (1,),
                (7,),
                (3, 5),
                (2, 4096),
                (2, 3, 5),
                (3, 1, 2, 1, 5),
                (0, 4),
                (2, 0, 3, 3),
                (0, 3, 2, 2),
            )
        ),
        sample(2, 19, 5, 7, shard=(1, 3, 40), **KEYED),
        sample(3, 37, shard=(0, 2**33 + 1, 2**34), **KEYED),
        sample(2, 19, 5, 7, seed=2**63 - 1, offset=2**63 - 1),
    ),
    typical=(sample(2, 20, 5, 4, p=0.3, **KEYED),),
    large=sample(4, 48, 13, 13, **KEYED),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, seed=1, offset=1),
        sample(3, 5, 2, 3, p=1.0, seed=1, offset=2**40),
        sample(1, 1, shard=(0, 1, 2), seed=1, offset=1),
        sample(3, 5, 2, 3, shard=(1, 1, 6), seed=1),
    ),
    derivatives=(sample(2, 3, 2, 2, p=0.3, **KEYED),),
    on_images=lambda x: {"input": x, "seed": 5},
    layers=(
        Layer("96x55x55", partial(_inputs, 96 * 55 * 55), partial(work, 96 * 55 * 55), formats=False),
        Layer(OVERHEAD, partial(_inputs, 16), partial(work, 16), formats=False),
        Layer("maps 256x6x6", _maps, partial(work, 256 * 6 * 6), timed=False),
    ),
    baselines={"torch's dropout": Baseline(lambda x: F.dropout(x["input"], 0.5), checked=False)},
    eager=False,
    core=lambda dtype, channels_last: dtype == torch.bfloat16,
    order=7,
)
