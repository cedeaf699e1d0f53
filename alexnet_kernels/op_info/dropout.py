"""The record of dropout."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import SEED
from alexnet_kernels.op_info._record import OVERHEAD, Baseline, Inputs, Layer, Maker, OpInfo, Work, sample

KEYED = {"seed": 1234, "offset": 5}


def work(elements: int, e: int) -> Work:
    """Of so many elements, of e bytes each."""
    return Work((2 * elements * e, 4 * elements * e))


def _inputs(elements: int, make: Maker, batch: int) -> Inputs:
    return {"input": make(batch, elements), "seed": SEED}


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
    ),
    typical=(sample(2, 20, 5, 4, p=0.3, **KEYED),),
    large=sample(4, 48, 13, 13, **KEYED),
    derivatives=(sample(2, 3, 2, 2, p=0.3, **KEYED),),
    on_images=lambda x: {"input": x, "seed": 5},
    layers=tuple(
        Layer(name, partial(_inputs, elements), partial(work, elements))
        for name, elements in (("96x55x55", 96 * 55 * 55), (OVERHEAD, 16))
    ),
    baselines={"torch's dropout": Baseline(lambda x: F.dropout(x["input"], 0.5), checked=False)},
    eager=False,
    order=7,
)
