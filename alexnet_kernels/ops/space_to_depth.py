"""Blocks of pixels as channels: a strided convolution of few channels as one with stride 1 and many.

See: schema in csrc/library.cpp, csrc/cpu/space_to_depth.cpp, csrc/cuda/space_to_depth.cu,
alexnet_kernels/triton/space_to_depth.py, tests/ops/test_conv2d_relu.py. Part of conv2d_relu.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels._dispatch.registration import register_operator


def space_to_depth(
    kernels: Any, input: Tensor, weight: Tensor, dtype: torch.dtype, block: int, padding: list[int]
) -> tuple[Tensor, Tensor]:
    """The input and weight of the same convolution with stride 1 and no padding, on block^2 times the channels."""
    taps = [-(-kernel // block) for kernel in weight.shape[2:]]
    size = [
        (extent + 2 * pad - kernel) // block + tap
        for extent, pad, kernel, tap in zip(input.shape[2:], padding, weight.shape[2:], taps, strict=True)
    ]
    return kernels.space_to_depth(input, block, padding, size, dtype), weight_by_depth(weight, block)


def weight_by_depth(weight: Tensor, block: int) -> Tensor:
    """The weight [K, C, R, S] of a convolution with stride `block` as that of stride 1 on block^2 as many channels."""
    taps = [-(-kernel // block) for kernel in weight.shape[2:]]
    rows, columns = (tap * block - kernel for tap, kernel in zip(taps, weight.shape[2:], strict=True))
    blocks = F.pad(weight, (0, columns, 0, rows)).unflatten(3, (taps[1], block)).unflatten(2, (taps[0], block))
    # [K, C, taps, block, taps, block] -> [K, block, block, C, taps, taps]
    return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3).contiguous(memory_format=torch.channels_last)


def _fake_space_to_depth(input: Tensor, block: int, padding, size, dtype: torch.dtype) -> Tensor:
    shape = [input.shape[0], block * block * input.shape[1], *size]
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=torch.channels_last)


def _fake_depth_to_space(input: Tensor, block: int, padding, size, dtype: torch.dtype) -> Tensor:
    shape = [input.shape[0], input.shape[1] // (block * block), *size]
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=torch.channels_last)


def _setup_rearrangement(ctx, inputs, output) -> None:
    input, ctx.block, ctx.padding, _, _ = inputs
    ctx.size, ctx.dtype = input.shape[2:], input.dtype


def _depth_to_space_backward(kernels, ctx, grad: Tensor):
    args = (ctx.block, ctx.padding, ctx.size, ctx.dtype)
    return kernels.space_to_depth(grad, *args), None, None, None, None


def _space_to_depth_backward(kernels, ctx, grad: Tensor):
    args = (ctx.block, ctx.padding, ctx.size, ctx.dtype)
    return kernels.depth_to_space(grad, *args), None, None, None, None


register_operator("space_to_depth", _fake_space_to_depth, _space_to_depth_backward, _setup_rearrangement)
register_operator("depth_to_space", _fake_depth_to_space, _depth_to_space_backward, _setup_rearrangement)
