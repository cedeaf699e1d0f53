"""The rearrangement of blocks of pixels as channels, and its inverse.

See: alexnet_kernels/ops/conv2d_relu.py, which convolves few channels with a stride as many channels without one.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import is_channels_last
from alexnet_kernels.triton._common import check_size, contiguous_as, in_own_format, layout_of, triton_op, wrap_triton
from alexnet_kernels.triton._conv import split_term


@triton.jit
def image_tile(tiles, BLOCK: tl.constexpr):
    """The program's image, and its elements' indices in that image: 64-bit division would be several times slower."""
    program = tl.program_id(0).to(tl.uint32)
    image = program // tl.cast(tiles, tl.uint32)
    program, image = program.to(tl.int32), image.to(tl.int32)
    return image.to(tl.int64), (program - image * tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def elements_to_depth(
    space_ptr, depth_ptr, tiles, H, W, DH, DW, SN, SC, SH, SW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each element of depth by itself."""
    image, at = image_tile(tiles, BLOCK)
    size = DH * DW * (B * B * C)
    block = at // (B * B * C)
    i, j, c = split_term(at - block * (B * B * C), C, B)
    u = block // DW
    y = u * B + i - PAD_H
    x = (block - u * DW) * B + j - PAD_W
    inside = (at < size) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    value = tl.load(space_ptr + image * SN + (c * SC + y * SH + x * SW), mask=inside, other=0).to(tl.float32)
    tl.store(depth_ptr + image * size + at, value.to(depth_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def runs_to_depth(
    space_ptr, depth_ptr, tiles, H, W, DH, DW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Runs of RUN elements of depth, which are consecutive in space in channels_last: a row of a block is B C / RUN."""
    image, at = image_tile(tiles, BLOCK // RUN)
    RUNS: tl.constexpr = B * C // RUN
    row = at // RUNS
    block = row // B
    u = (block.to(tl.uint32) // tl.cast(DW, tl.uint32)).to(tl.int32)
    y = u * B + (row - block * B) - PAD_H
    x = (block - u * DW) * (B * C) + (at - row * RUNS) * RUN - PAD_W * C
    element = tl.arange(0, RUN)[None, :]
    within = at < DH * DW * (B * RUNS)
    inside = (within & (y >= 0) & (y < H))[:, None] & (x[:, None] + element >= 0) & (x[:, None] + element < W * C)
    pointer = space_ptr + image * H * W * C + (y * (W * C) + x)[:, None] + element
    value = tl.load(pointer, mask=inside, other=0).to(tl.float32).to(depth_ptr.dtype.element_ty)
    size = DH * DW * (B * B * C)
    tl.store(depth_ptr + image * size + (at * RUN)[:, None] + element, value, mask=within[:, None])


# space [N, C, H, W] by strides; depth [N, B B C, DH, DW] in channels_last: channel (i B + j) C + c of block (u, v) is
# pixel (u B + i - PAD_H, v B + j - PAD_W), or 0 outside the image. A program computes BLOCK elements of one image of
# depth, in runs of RUN if that is more than 1.
@triton.jit
def space_to_depth_kernel(
    space_ptr, depth_ptr, tiles, H, W, DH, DW, SN, SC, SH, SW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if RUN > 1:
        runs_to_depth(space_ptr, depth_ptr, tiles, H, W, DH, DW, C, B, PAD_H, PAD_W, RUN, BLOCK)
    else:
        elements_to_depth(
            space_ptr, depth_ptr, tiles, H, W, DH, DW, SN, SC, SH, SW, C, B, PAD_H, PAD_W, BLOCK
        )  # fmt: skip


# The inverse; pixels beyond the last block are 0. A program computes BLOCK elements of one image of space, in
# channels_last.
@triton.jit
def depth_to_space_kernel(
    depth_ptr, space_ptr, tiles, H, W, DH, DW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, at = image_tile(tiles, BLOCK)
    y, x, c = split_term(at, C, W)
    u = (y + PAD_H) // B
    v = (x + PAD_W) // B
    index = (u * DW + v) * (B * B * C) + ((y + PAD_H - u * B) * B + (x + PAD_W - v * B)) * C + c
    inside = (at < H * W * C) & (u < DH) & (v < DW)
    value = tl.load(depth_ptr + image * (DH * DW * (B * B * C)) + index, mask=inside, other=0).to(tl.float32)
    tl.store(space_ptr + image * (H * W * C) + at, value.to(space_ptr.dtype.element_ty), mask=at < H * W * C)


@triton_op
def space_to_depth(
    input: Tensor, block: int, padding: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    space, memory_format = in_own_format(input)
    n, channels = space.shape[:2]
    shape = [n, block * block * channels, *size]
    depth = torch.empty(shape, dtype=dtype, device=space.device, memory_format=torch.channels_last)
    if depth.numel() == 0:
        return depth
    check_size(depth)
    tiles = triton.cdiv(shape[1] * shape[2] * shape[3], _config.ELEMENTS.block)
    wrap_triton(space_to_depth_kernel)[(n * tiles,)](
        space, depth, tiles, *space.shape[2:], *size, *layout_of(space),
        C=channels, B=block, PAD_H=padding[0], PAD_W=padding[1],
        RUN=math.gcd(block * channels, 16 // depth.element_size()) if is_channels_last(memory_format) else 1,
        BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps,
    )  # fmt: skip
    return depth


@triton_op
def depth_to_space(
    input: Tensor, block: int, padding: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    depth = contiguous_as(input, torch.channels_last)
    n, channels = depth.shape[0], depth.shape[1] // (block * block)
    shape = [n, channels, *size]
    space = torch.empty(shape, dtype=dtype, device=depth.device, memory_format=torch.channels_last)
    if space.numel() == 0:
        return space
    check_size(depth, space)
    tiles = triton.cdiv(channels * size[0] * size[1], _config.ELEMENTS.block)
    wrap_triton(depth_to_space_kernel)[(n * tiles,)](
        depth, space, tiles, *size, *depth.shape[2:],
        C=channels, B=block, PAD_H=padding[0], PAD_W=padding[1],
        BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps,
    )  # fmt: skip
    return space
