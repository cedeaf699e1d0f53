"""The record of augment."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._record import (
    OVERHEAD,
    Comparison,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Work,
    sample,
)


def work(size: int, e: int) -> Work:
    """Of a crop of size x size pixels, whose result has elements of e bytes."""
    return Work((3 * size * size * (1 + e),) * 2)


def crops_at_every_edge(count: int, height: int, width: int, size: tuple[int, int]) -> Tensor:
    """Crops of images [height, width]: the first two touch all four edges."""
    top = torch.randint(0, height - size[0] + 1, (count,))
    left = torch.randint(0, width - size[1] + 1, (count,))
    if count > 1:
        top[0], left[0], top[1], left[1] = 0, width - size[1], height - size[0], 0
    return torch.stack([top, left], 1)


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """`mean` and `scale` say of what: mean "colour", "crop" or "image", scale "colour" or a number."""
    (count, height, width, _), size = shape, options.pop("size")
    means = {"colour": (3,), "crop": (3, *size), "image": (3, height, width)}
    mean, scale = options.pop("mean", None), options.pop("scale", None)
    flips = torch.arange(count) % 3 != 1 if options.pop("flipped", False) else None
    shift = torch.randn(count, 3) * 20 if options.pop("shifted", False) else None
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    given: Inputs = {
        "images": images,
        "crops": crops_at_every_edge(count, height, width, size),
        "size": size,
        "flips": flips,
        "color_shift": shift,
        "mean": torch.rand(means[mean]) * 255 if mean else None,
        "scale": torch.tensor([0.5, 0.02, 3.0]) if scale == "colour" else scale,
        "dtype": make.dtype,
        "memory_format": make.memory_format,
    }
    return {name: value.to(make.device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _reference(**arguments: Any) -> Tensor:
    return reference.augment(**{**arguments, "dtype": torch.float64})


def _inputs(size: int, stored: int, make: Maker, batch: int) -> Inputs:
    given = {
        "images": torch.randint(0, 256, (batch, stored, stored, 3), dtype=torch.uint8),
        "crops": torch.randint(0, stored - size + 1, (batch, 2)),
        "flips": torch.arange(batch) % 2 == 0,
        "mean": torch.tensor([120.0, 115.0, 100.0]),
        "color_shift": torch.randn(batch, 3),
    }
    return {**{name: value.to(make.device) for name, value in given.items()}, "size": size, "dtype": make.dtype}


def _domain(draw: Draw) -> Sample:
    height, width = draw(range(1, 20)), draw(range(1, 20))
    options = {
        "size": (draw(range(1, height + 1)), draw(range(1, width + 1))),
        "flipped": draw((False, True)),
        "shifted": draw((False, True)),
        "mean": draw((None, "colour", "crop", "image")),
        "scale": draw((None, 1 / 57.0, "colour")),
    }
    return sample(draw(range(4)), height, width, 3, **options)


INFO = OpInfo(
    name="augment",
    op=ops.augment,
    reference=_reference,
    samples=(
        *(
            sample(5, 21, 19, 3, size=(13, 17), flipped=flipped, shifted=shifted, mean=mean, scale=scale)
            for flipped in (False, True)
            for shifted in (False, True)
            for mean in (None, "colour", "crop", "image")
            for scale in (None, 1 / 57.0, "colour")
        ),
        sample(4, 12, 20, 3, size=(8, 16), flipped=True, shifted=True, scale=0.02),
        sample(3, 7, 23, 3, size=(5, 20), flipped=True, shifted=True, mean="crop", scale="colour"),
        sample(3, 7, 23, 3, size=(5, 20), mean="crop"),
        sample(0, 9, 11, 3, size=(5, 4), flipped=True),
        sample(1, 9, 11, 3, size=(5, 4), flipped=True),
    ),
    typical=(sample(4, 12, 20, 3, size=(8, 16), flipped=True, shifted=True, mean="image", scale="colour"),),
    large=sample(16, 64, 64, 3, size=(56, 56), flipped=True, mean="colour"),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 3, size=(1, 1), flipped=True, shifted=True, mean="colour"),
        sample(1, 2, 3, 3, size=(1, 1)),
    ),
    make=_make,
    takes=lambda sample, dtype: dtype == torch.float32 or sample.shape[0] != 5,
    wrt=(),
    native_compiles=False,  # its definition is a loop over the values of crops
    # Computed in float32, whatever the dtype of the result.
    comparison=lambda setting: Comparison(dtype=torch.float32 if setting.dtype == torch.float64 else None),
    layers=tuple(
        Layer(name, partial(_inputs, size, stored), partial(work, size), (), formats=False)
        for name, size, stored in (("224 of 256", 224, 256), (OVERHEAD, 3, 4))
    ),
    core=lambda dtype, channels_last: dtype == torch.bfloat16,
    order=8,
)
