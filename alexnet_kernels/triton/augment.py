"""Crops, mirrors, shifts colours, subtracts the mean, scales, casts and lays out a batch of images in one pass.

See: alexnet_kernels/ops/augment.py.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import store_channels
from alexnet_kernels.triton._common import triton_op, wrap_triton


@triton.jit
def augment_elements(
    images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
    FLIPS: tl.constexpr, SHIFT: tl.constexpr, MEAN_DIMS: tl.constexpr, WHOLE_MEAN: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each element of the output by itself."""
    program = tl.program_id(0)
    n = program // blocks
    at = (program - n * blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < 3 * h * w
    if CHANNELS_LAST:
        c = at % 3
        pixel = at // 3
    else:
        c = at // (h * w)
        pixel = at % (h * w)
    y = pixel // w
    x = pixel % w
    row = tl.load(crops_ptr + 2 * n).to(tl.int32) + y
    column = tl.load(crops_ptr + 2 * n + 1).to(tl.int32) + x
    if FLIPS:
        column += tl.where(tl.load(flips_ptr + n) != 0, w - 1 - 2 * x, 0)
    inside = mask & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    image = n.to(tl.int64) * H * W * 3
    value = tl.load(images_ptr + image + (row * W + column) * 3 + c, mask=inside, other=0).to(tl.float32)
    offset = tl.zeros([BLOCK], tl.float32)
    if MEAN_DIMS == 1:
        offset += tl.load(mean_ptr + c, mask=mask, other=0)
    if MEAN_DIMS == 3:
        index = (c * H + row) * W + column if WHOLE_MEAN else (c * h + y) * w + x
        offset += tl.load(mean_ptr + index, mask=inside, other=0)
    if SHIFT:
        offset -= tl.load(shift_ptr + n * 3 + c, mask=mask, other=0)
    value -= offset
    if SCALE:
        value *= tl.load(scale_ptr + c, mask=mask, other=0)
    tl.store(out_ptr + n.to(tl.int64) * (3 * h * w) + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def float_of(byte):
    """The value of a byte, as the low bits of a float between 2^23 and 2^24: conversion instructions are slow."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def of_channels(pointer, c, CHANNELS_LAST: tl.constexpr):
    """The values of the three channels from c on, or thrice that of c."""
    if CHANNELS_LAST:
        a, b, d = tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2)
        return (
            tl.where(c == 0, a, tl.where(c == 1, b, d)),
            tl.where(c == 0, b, tl.where(c == 1, d, a)),
            tl.where(c == 0, d, tl.where(c == 1, a, b)),
        )
    else:
        value = tl.load(pointer + c)
        return value, value, value


@triton.jit
def augment_runs(
    images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
    FLIPS: tl.constexpr, SHIFT: tl.constexpr, MEAN_DIMS: tl.constexpr, WHOLE_MEAN: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs of RUN elements of one row of the output, of all channels in CHANNELS_LAST or one in NCHW."""
    program = tl.program_id(0).to(tl.uint32)
    n = (program // tl.cast(blocks, tl.uint32)).to(tl.int32)
    at = ((program.to(tl.int32) - n * blocks) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)).to(tl.uint32)
    LENGTH: tl.constexpr = 3 if CHANNELS_LAST else 1
    runs = tl.cast(LENGTH * w // RUN, tl.uint32)
    line = at // runs
    first = ((at - line * runs) * RUN).to(tl.int32)  # in the row
    mask = at < tl.cast(3 * h * w // RUN, tl.uint32)
    if CHANNELS_LAST:
        y = line.to(tl.int32)
        x = first // 3
        c = first - x * 3
    else:
        c = (line // tl.cast(h, tl.uint32)).to(tl.int32)
        y = line.to(tl.int32) - c * h
        x = first
        c = tl.minimum(c, 2)
    row = tl.load(crops_ptr + 2 * n).to(tl.int32) + y
    left = tl.load(crops_ptr + 2 * n + 1).to(tl.int32)
    left = tl.minimum(tl.maximum(left, -w), W)  # beyond them no pixel is inside; 3 left is an int32
    sign = 1
    if FLIPS:
        flipped = tl.load(flips_ptr + n) != 0
        sign = tl.where(flipped, -1, 1)
        left = tl.where(flipped, left + w - 1, left)
    # The run's elements i, i + 3, ... are in the image's row at starts[i] and then `step` apart; in CHANNELS_LAST a
    # channel's elements are, which begin `carried` pixels on.
    start = (left + sign * x) * 3 + c
    step = 3 * sign
    if CHANNELS_LAST:
        starts = (start, start + 1 + (step - 3) * (c > 1), start + 2 + (step - 3) * (c > 0))
    else:
        starts = (start, start + step, start + 2 * step)
        step = 3 * step
    has_row = mask & (row >= 0) & (row < H)
    pointer = images_ptr + (n.to(tl.int64) * H + row) * W * 3
    if MEAN_DIMS == 1:
        means = of_channels(mean_ptr, c, CHANNELS_LAST)
    if SHIFT:
        shifts = of_channels(shift_ptr + n * 3, c, CHANNELS_LAST)
    if SCALE:
        scales = of_channels(scale_ptr, c, CHANNELS_LAST)
    values = ()
    for i in tl.static_range(RUN):
        place = starts[i % 3] + step * (i // 3)
        inside = has_row & (place.to(tl.uint32) < tl.cast(3 * W, tl.uint32))
        value = float_of(tl.load(pointer + place, mask=inside, other=0))
        offset = tl.zeros([BLOCK // RUN], tl.float32)
        if MEAN_DIMS == 1:
            offset += means[i % 3]
        if MEAN_DIMS == 3:
            column = place // 3
            channel = place - column * 3
            index = (channel * H + row) * W + column if WHOLE_MEAN else (channel * h + y) * w + (column - left) * sign
            offset += tl.load(mean_ptr + index, mask=inside, other=0)
        if SHIFT:
            offset -= shifts[i % 3]
        value -= offset
        if SCALE:
            value *= scales[i % 3]
        values = values + (value,)
    store_channels(out_ptr + n.to(tl.int64) * (3 * h * w) + at.to(tl.int32) * RUN, values, mask, RUN)


# A program computes BLOCK elements of one image's crop, in the memory order of the output, in runs of RUN if that is
# more than 1. images uint8 [N, H, W, 3]; crops int64 [N, 2]; flips uint8 [N]; shift [N, 3]; mean [3], [3, h, w] or
# [3, H, W] (MEAN_DIMS 1; 3, of MEAN_H x MEAN_W); scale [3]; out [N, 3, h, w]. Pixels outside the image, of an invalid
# crop, are not read.
@triton.jit
def augment_kernel(
    images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
    FLIPS: tl.constexpr, SHIFT: tl.constexpr, MEAN_DIMS: tl.constexpr, WHOLE_MEAN: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if RUN > 1:
        augment_runs(
            images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
            FLIPS, SHIFT, MEAN_DIMS, WHOLE_MEAN, SCALE, CHANNELS_LAST, RUN, BLOCK,
        )  # fmt: skip
    else:
        augment_elements(
            images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
            FLIPS, SHIFT, MEAN_DIMS, WHOLE_MEAN, SCALE, CHANNELS_LAST, BLOCK,
        )  # fmt: skip


@triton_op
def augment(
    images: Tensor,
    crops: Tensor,
    size: Sequence[int],
    flips: Tensor | None,
    color_shift: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    count, height, width, _ = images.shape
    out = torch.empty(count, 3, *size, dtype=dtype, device=images.device, memory_format=memory_format)
    if out.numel() == 0:
        return out

    def values(tensor: Tensor | None) -> Tensor:
        return images if tensor is None else tensor.to(torch.float32).contiguous()

    blocks = triton.cdiv(3 * size[0] * size[1], _config.ELEMENTS.block)
    wrap_triton(augment_kernel)[(count * blocks,)](
        images.contiguous(),
        crops.contiguous(),
        images if flips is None else flips.contiguous().view(torch.uint8),
        values(color_shift),
        values(mean),
        values(scale),
        out, height, width, *size, blocks,
        FLIPS=flips is not None,
        SHIFT=color_shift is not None,
        MEAN_DIMS=0 if mean is None else mean.dim(),
        WHOLE_MEAN=mean is not None and list(mean.shape[1:]) == [height, width],
        SCALE=scale is not None,
        CHANNELS_LAST=channels_last,
        RUN=math.gcd(size[1], 16 // out.element_size()),
        BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps,
    )  # fmt: skip
    return out
