"""Overlapping max-pooling with a one-byte argmax.

See: alexnet_kernels/ops/max_pool2d.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import is_channels_last, launch_of, locate, offset_of, vector_of
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton


@triton.jit
def window_start(at, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """The first position of window `at` along one axis, and how many of its positions lie before the image."""
    start = at * STRIDE - PAD
    return start, tl.maximum(0, -start)


@triton.jit
def window_over(at, i, SIZE: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, windows):
    """The i-th window along one axis that may contain `at`: (window, position in it, whether it contains `at`)."""
    window = (at + PAD) // STRIDE - i
    position = at + PAD - window * STRIDE
    return window, position, (window >= 0) & (window < windows) & (position < SIZE)


@triton.jit
def update_maximum(best, arg, value, position, inside):
    """The maximum and its position, as in torch: a larger value wins, and any NaN."""
    wins = inside & ((value > best) | (value != value))
    return tl.where(wins, value, best), tl.where(wins, position, arg)


@triton.jit
def pool_forward_tap(
    x_ptr, base, y, x, r, s, best, arg, lane, mask, H, W,
    C: tl.constexpr, S: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    inside = mask & (y + r >= 0) & (y + r < H) & (x + s >= 0) & (x + s < W)
    step = C if CHANNELS_LAST else 1
    at = base + ((y + r) * W + x + s) * step
    value = tl.load(x_ptr + at[:, None] + lane[None, :], mask=inside[:, None], other=0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)
    return update_maximum(best, arg, value, r * S + s, inside[:, None])


# A program computes BLOCK vectors of VEC channels of the output; see _channels.py. x [N, C, H, W], out and arg [N, C,
# OH, OW].
@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, out_ptr, arg_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, p, q = locate(BLOCK, count, C, OH, OW, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)
    y, above = window_start(p, STRIDE_H, PAD_H)
    x, before = window_start(q, STRIDE_W, PAD_W)
    base = offset_of(n, c, 0, 0, C, H, W, CHANNELS_LAST)
    best = tl.full([BLOCK, VEC], -float("inf"), tl.float32)
    # If all values are -inf, the first position inside the image wins.
    arg = (above * S + before)[:, None] + tl.zeros([BLOCK, VEC], tl.int32)
    if UNROLL:
        for r in tl.static_range(R):
            for s in tl.static_range(S):
                best, arg = pool_forward_tap(
                    x_ptr, base, y, x, r, s, best, arg, lane, mask, H, W, C, S, RELU, CHANNELS_LAST
                )
    else:
        for i in range(R * S):
            best, arg = pool_forward_tap(
                x_ptr, base, y, x, i // S, i % S, best, arg, lane, mask, H, W, C, S, RELU, CHANNELS_LAST
            )
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(arg_ptr + at, arg.to(tl.uint8), mask=mask[:, None])


@triton.jit
def pool_backward_tap(
    g_ptr, out_ptr, arg_ptr, base, y, x, i, j, total, lane, mask, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    p, r, has_row = window_over(y, i, R, STRIDE_H, PAD_H, OH)
    q, s, has_column = window_over(x, j, S, STRIDE_W, PAD_W, OW)
    inside = (mask & has_row & has_column)[:, None]
    step = C if CHANNELS_LAST else 1
    at = (base + (p * OW + q) * step)[:, None] + lane[None, :]
    won = tl.load(arg_ptr + at, mask=inside, other=0).to(tl.int32) == (r * S + s)[:, None]
    if RELU:
        won = won & ~(tl.load(out_ptr + at, mask=inside, other=0).to(tl.float32) <= 0)
    return total + tl.where(inside & won, tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32), 0.0)


# A program computes BLOCK vectors of the input's gradient, gathered from the windows that contain its pixel. dx [N, C,
# H, W], g, out and arg [N, C, OH, OW]; at most ROWS x COLUMNS windows contain a pixel.
@triton.jit
def max_pool2d_backward_kernel(
    g_ptr, out_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNROLL: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, y, x = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)
    base = offset_of(n, c, 0, 0, C, OH, OW, CHANNELS_LAST)
    ROWS: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    COLUMNS: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    total = tl.zeros([BLOCK, VEC], tl.float32)
    if UNROLL:
        for i in tl.static_range(ROWS):
            for j in tl.static_range(COLUMNS):
                total = pool_backward_tap(
                    g_ptr, out_ptr, arg_ptr, base, y, x, i, j, total, lane, mask, OH, OW,
                    C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, RELU, CHANNELS_LAST,
                )  # fmt: skip
    else:
        for i in range(ROWS * COLUMNS):
            total = pool_backward_tap(
                g_ptr, out_ptr, arg_ptr, base, y, x, i // COLUMNS, i % COLUMNS, total, lane, mask, OH, OW,
                C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, RELU, CHANNELS_LAST,
            )  # fmt: skip
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask[:, None])


def pool_constants(kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> dict:
    """The compile-time constants of the windows."""
    return {
        "R": kernel_size[0],
        "S": kernel_size[1],
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
    }


def bias_gradient(dx: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of the images' gradients; without a bias no elements."""
    return dx.new_empty(0) if bias is None else dx.float().sum((0, 2, 3)).to(bias.dtype)


def pooled(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool):
    """The rows and columns of windows."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    return [reference.pool_output_size(*axis, ceil_mode) for axis in axes]


@triton_op
def max_pool2d(
    input: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    x, memory_format = in_own_format(input)
    shape = [*x.shape[:2], *pooled(x, kernel_size, stride, padding, ceil_mode)]
    out, arg = empty_like(x, shape), empty_like(x, shape, torch.uint8)
    if out.numel() == 0:
        return out, arg
    channels_last = is_channels_last(memory_format)
    vector = vector_of(x, channels_last, x.shape[1])
    launch, count = launch_of(vector), out.numel() // vector
    wrap_triton(max_pool2d_forward_kernel)[(triton.cdiv(count, launch.block),)](
        x, out, arg, count, *x.shape[2:], *out.shape[2:],
        C=x.shape[1], **pool_constants(kernel_size, stride, padding), RELU=relu and bias is None,
        CHANNELS_LAST=channels_last,
        UNROLL=kernel_size[0] * kernel_size[1] <= _config.UNROLLED_TAPS,
        VEC=vector, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    if bias is not None:
        y = out.float() + bias.float().reshape(-1, 1, 1)
        out.copy_(y.relu() if relu else y)
    return out, arg


@triton_op
def max_pool2d_backward(
    grad: Tensor,
    output: Tensor | None,
    argmax: Tensor,
    bias: Tensor | None,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
) -> tuple[Tensor, Tensor]:
    arg, memory_format = in_own_format(argmax)
    g = contiguous_as(grad, memory_format)
    out = g if output is None else contiguous_as(output, memory_format)
    dx = empty_like(arg, input_size, g.dtype)
    if dx.numel() == 0:
        return dx, bias_gradient(dx, bias)
    channels_last = is_channels_last(memory_format)
    vector = vector_of(g, channels_last, g.shape[1])
    launch, count = launch_of(vector), dx.numel() // vector
    windows = -(-kernel_size[0] // stride[0]) * -(-kernel_size[1] // stride[1])
    wrap_triton(max_pool2d_backward_kernel)[(triton.cdiv(count, launch.block),)](
        g, out, arg, dx, count, *dx.shape[2:], *g.shape[2:],
        C=g.shape[1], **pool_constants(kernel_size, stride, padding), RELU=relu, CHANNELS_LAST=channels_last,
        UNROLL=windows <= _config.UNROLLED_TAPS, VEC=vector, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return dx, bias_gradient(dx, bias)
