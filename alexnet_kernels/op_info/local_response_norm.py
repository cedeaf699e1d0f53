"""The record of local_response_norm."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import LRN, MAP_DTYPES, MAPS, elements, map_inputs
from alexnet_kernels.op_info._record import Baseline, Draw, Inputs, Layer, OpInfo, Sample, Work, draw_shape, sample

STRONG = {"alpha": 0.5, "k": 1.5}  # so strong that a wrong window shows


def work(elements: int, e: int) -> Work:
    """Of maps of so many elements, of e bytes each."""
    return Work((2 * elements * e, 5 * elements * e))


def draw_lrn(draw: Draw, channels: int) -> Inputs:
    """A normalisation of any window, or of the fast kernels' window of 5 channels."""
    return {
        "size": draw((5, 5, 5, 1, 2, 3, 4, 6, 7, 9, 100)),
        "alpha": draw((0.5, 0.5, 0.0, 2.0)),
        "beta": draw((0.75, 0.75, 0.0, 0.31, 0.5, 1.0, 2.0)),
        "k": draw((1.0, 1.5, 0.1)),
        "groups": draw([groups for groups in (1, 2, 3, 4, 8) if channels % groups == 0]),
    }


def _domain(draw: Draw) -> Sample:
    shape = draw_shape(draw)
    return sample(*shape, **draw_lrn(draw, shape[1]))


INFO = OpInfo(
    name="local_response_norm",
    op=ops.local_response_norm,
    reference=reference.local_response_norm,
    samples=(
        sample(1, 96, 3, 5, alpha=5e-4, k=2.0),
        sample(2, 64, 4, 3, groups=2, **STRONG),
        sample(2, 16, 5, 7, size=5, **STRONG),
        sample(2, 37, 3, 5, size=5, **STRONG),
        sample(2, 20, 4, 3, size=5, groups=4, **STRONG),
        sample(2, 21, 1, 9, size=4, groups=3, **STRONG),
        sample(1, 35, 6, 1, size=2, **STRONG),
        sample(3, 19, 2, 2, size=1, **STRONG),
        sample(1, 33, 3, 3, size=9, **STRONG),
        sample(2, 3, 4, 4, size=7, **STRONG),
        sample(2, 1, 4, 4, size=5, **STRONG),
        sample(2, 24, 3, 3, beta=0.5, **STRONG),
        sample(2, 24, 3, 3, beta=1.0, **STRONG),
        sample(2, 24, 3, 3, beta=0.31, **STRONG),
        sample(2, 24, 3, 3, beta=0.0, **STRONG),
        sample(2, 24, 3, 3, alpha=0.0, k=3.0),
        sample(2, 24, 3, 3, alpha=1.0, k=0.0),
        sample(0, 16, 4, 4, **STRONG),
        sample(2, 16, 0, 4, **STRONG),
    ),
    typical=(sample(2, 20, 5, 4, **STRONG),),
    large=sample(4, 48, 13, 13, **STRONG),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, size=1, alpha=1.0, beta=1.0),
        sample(3, 5, 2, 3, size=4, alpha=1.0, beta=0.5),
    ),
    derivatives=(
        sample(2, 6, 1, 2, size=5, alpha=0.5, beta=0.75, k=1.2),
        sample(2, 6, 1, 2, size=4, alpha=0.5, beta=0.6, k=1.2, groups=2),
        sample(2, 6, 1, 2, size=3, alpha=0.5, beta=1.0, k=1.2, groups=3),
    ),
    on_images=lambda x: {"input": x, "alpha": 0.1, "groups": 2},
    layers=tuple(
        Layer(layer, partial(map_inputs, layer, **LRN), partial(work, elements(layer)))
        for layer in MAPS
        if layer != "layer 5"
    ),
    baselines={"F.local_response_norm": Baseline(lambda x: F.local_response_norm(x["input"], **LRN))},
    half_baselines_on_cuda_only=True,
    timed=MAP_DTYPES,
    order=1,
)
