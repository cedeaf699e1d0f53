"""The shapes of AlexNet's layers, as the ops' records share them."""

from __future__ import annotations

from typing import Any

import torch

from alexnet_kernels.op_info._record import OVERHEAD, Inputs, Maker

LRN: dict[str, Any] = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
MAPS = {"layer 1": (96, 55, 55), "layer 2": (256, 27, 27), "layer 5": (256, 13, 13), OVERHEAD: (16, 3, 3)}
# Filters, channels of a filter, kernel, stride, padding, groups, size of the input.
CONVOLUTIONS = {
    "conv1": (96, 3, 11, 4, 2, 1, 224),
    "conv2": (256, 48, 5, 1, 2, 2, 27),
    "conv3": (384, 256, 3, 1, 1, 1, 13),
    "conv4": (384, 192, 3, 1, 1, 2, 13),
    "conv5": (256, 192, 3, 1, 1, 2, 13),
}
LINEARS = {"fc6": (9216, 4096), "fc7": (4096, 4096)}
PARAMETERS = (
    *((k, c, r, r) for k, c, r, *_ in CONVOLUTIONS.values()),
    (4096, 9216),
    (4096, 4096),
    (1000, 4096),
    *((k,) for k in (96, 256, 384, 384, 256, 4096, 4096, 1000)),
)
SEED = 7


def elements(layer: str) -> int:
    """Of an image's maps."""
    channels, height, width = MAPS[layer]
    return channels * height * width


def pooled(layer: str) -> int:
    """Of an image's maps after 3x3 pooling with stride 2."""
    channels, height, width = MAPS[layer]
    return channels * ((height - 3) // 2 + 1) * ((width - 3) // 2 + 1)


MAP_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
"""In which ops on maps are timed."""


def map_inputs(layer: str, make: Maker, batch: int, **options: object) -> Inputs:
    """The arguments of an op on maps at one of AlexNet's layers."""
    return {"input": make(batch, *MAPS[layer]), **options}


def map_inputs_with_bias(layer: str, make: Maker, batch: int, **options: object) -> Inputs:
    """Those of a pool that adds the bias of the convolution before it."""
    return {**map_inputs(layer, make, batch, **options), "bias": make(MAPS[layer][0]), "relu": True}
