"""The record of within_map_response_norm."""

from __future__ import annotations

from functools import partial

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import MAP_DTYPES, MAPS, elements, map_inputs
from alexnet_kernels.op_info._record import OVERHEAD, Draw, Layer, OpInfo, Sample, draw_shape, sample
from alexnet_kernels.op_info.local_response_norm import draw_lrn, work

STRONG = {"alpha": 2.0, "k": 1.5}  # so strong that a wrong window shows


def _domain(draw: Draw) -> Sample:
    # Windows of any size; the interpreter visits each pixel of one by itself.
    options = {**draw_lrn(draw, 1), "size": draw((5, 5, 1, 2, 3, 4, 6, 7, 15))}
    del options["groups"]
    return sample(*draw_shape(draw), **options)


INFO = OpInfo(
    name="within_map_response_norm",
    op=ops.within_map_response_norm,
    reference=reference.within_map_response_norm,
    samples=(
        sample(1, 48, 13, 13),
        sample(2, 16, 7, 9, **STRONG),
        sample(2, 37, 5, 6, **STRONG),
        sample(2, 20, 6, 5, size=3, **STRONG),
        sample(2, 20, 6, 5, size=4, **STRONG),
        sample(2, 20, 5, 7, size=2, **STRONG),
        sample(2, 20, 3, 3, size=1, **STRONG),
        sample(2, 5, 3, 4, size=9, **STRONG),
        sample(2, 1, 1, 8, **STRONG),
        sample(2, 20, 5, 5, beta=0.31, **STRONG),
        sample(2, 20, 5, 5, beta=1.0, **STRONG),
        sample(2, 20, 5, 5, alpha=0.0, k=2.0),
        sample(0, 16, 5, 5, **STRONG),
    ),
    typical=(sample(2, 20, 7, 6, **STRONG),),
    large=sample(4, 48, 13, 13, **STRONG),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, size=1, alpha=1.0, beta=1.0),
        sample(3, 5, 2, 3, size=4, alpha=1.0, beta=0.5),
    ),
    derivatives=(sample(1, 2, 4, 3, size=2, **STRONG), sample(1, 2, 4, 3, size=3, **STRONG)),
    on_images=lambda x: {"input": x, "alpha": 0.1},
    layers=tuple(
        Layer(layer, partial(map_inputs, layer), partial(work, elements(layer)))
        for layer in MAPS
        if layer in ("layer 2", OVERHEAD)
    ),
    timed=MAP_DTYPES,
    order=4,
)
