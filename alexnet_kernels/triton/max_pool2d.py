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
from alexnet_kernels.triton._channels import is_channels_last, launch_of, locate, offset_of, to_float32, vector_of
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton

NOWHERE = tl.constexpr(255)  # an argmax that is no position of windows of fewer than 256 pixels


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
def in_image(y, x, H, W):
    return (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def blocks_of(size, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """How many blocks of STRIDE positions, each beginning where a window does, cover an axis."""
    return (size + (PAD + STRIDE - 1)) // STRIDE


@triton.jit
def update_maximum(best, arg, value, position):
    """The maximum and its position, as in torch: a larger value wins, and any NaN."""
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, position, arg)


@triton.jit
def pool_forward_tap(
    x_ptr, base, y, x, r, s, best, arg, lane, mask, H, W,
    C: tl.constexpr, S: tl.constexpr, PADDED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    step = C if CHANNELS_LAST else 1
    at = base + ((y + r) * W + x + s) * step
    pointer = x_ptr + at[:, None] + lane[None, :]
    if PADDED:
        inside = mask & in_image(y + r, x + s, H, W)
        value = tl.load(pointer, mask=inside[:, None], other=-float("inf"))
    else:
        value = tl.load(pointer)
    return update_maximum(best, arg, to_float32(value), r * S + s)


# A program computes BLOCK vectors of VEC channels of the output; see _channels.py. x [N, C, H, W], bias [C] or None,
# out and arg [N, C, OH, OW]. PADDED says whether windows reach beyond the image.
@triton.jit
def max_pool2d_forward_kernel(
    x_ptr, bias_ptr, out_ptr, arg_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, PADDED: tl.constexpr, RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
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
                    x_ptr, base, y, x, r, s, best, arg, lane, mask, H, W, C, S, PADDED, CHANNELS_LAST
                )
    else:
        for i in range(R * S):
            best, arg = pool_forward_tap(
                x_ptr, base, y, x, i // S, i % S, best, arg, lane, mask, H, W, C, S, PADDED, CHANNELS_LAST
            )
    if bias_ptr is not None:
        best += tl.load(bias_ptr + c[:, None] + lane[None, :]).to(tl.float32)
    if RELU:
        arg = tl.where(best <= 0, NOWHERE, arg)
        best = tl.where(best < 0, 0.0, best)
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=mask[:, None])
    tl.store(arg_ptr + at, arg.to(tl.uint8), mask=mask[:, None])


@triton.jit
def pool_backward_tap(
    g_ptr, arg_ptr, base, y, x, i, j, total, lane, mask, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    p, r, has_row = window_over(y, i, R, STRIDE_H, PAD_H, OH)
    q, s, has_column = window_over(x, j, S, STRIDE_W, PAD_W, OW)
    inside = (mask & has_row & has_column)[:, None]
    step = C if CHANNELS_LAST else 1
    at = (base + (p * OW + q) * step)[:, None] + lane[None, :]
    won = tl.load(arg_ptr + at, mask=inside, other=0).to(tl.int32) == (r * S + s)[:, None]
    return total + tl.where(inside & won, tl.load(g_ptr + at, mask=inside, other=0).to(tl.float32), 0.0)


@triton.jit
def pool_backward_pixels(
    g_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pixel a vector: its windows are found by division, in a loop."""
    first, mask, n, c, y, x = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)
    base = offset_of(n, c, 0, 0, C, OH, OW, CHANNELS_LAST)
    COLUMNS: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    total = tl.zeros([BLOCK, VEC], tl.float32)
    for i in range((R + STRIDE_H - 1) // STRIDE_H * COLUMNS):
        total = pool_backward_tap(
            g_ptr, arg_ptr, base, y, x, i // COLUMNS, i % COLUMNS, total, lane, mask, OH, OW,
            C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, CHANNELS_LAST,
        )  # fmt: skip
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def add_to_pixels(
    totals, g, arg, TOP: tl.constexpr, LEFT: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
):  # fmt: skip
    """Adds a window's gradient to the pixel of a block that its argmax names; the block is at (TOP, LEFT) in it."""
    sums = ()
    for k in tl.static_range(STRIDE_H * STRIDE_W):
        if TOP + k // STRIDE_W < R and LEFT + k % STRIDE_W < S:
            won = arg == (TOP + k // STRIDE_W) * S + LEFT + k % STRIDE_W
            sums = sums + (totals[k] + tl.where(won, g, 0.0),)
        else:
            sums = sums + (totals[k],)
    return sums


@triton.jit
def pool_backward_blocks(
    g_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pixels a vector. Each window over it is loaded once, and its positions in the block are constants."""
    rows, columns = blocks_of(H, STRIDE_H, PAD_H), blocks_of(W, STRIDE_W, PAD_W)
    _, mask, n, c, u, v = locate(BLOCK, count, C, rows, columns, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)[None, :]
    step = C if CHANNELS_LAST else 1
    # Window (u, v) begins where the block does; window (u - i, v - j) has the block at (i STRIDE_H, j STRIDE_W).
    at = offset_of(n, c, u, v, C, OH, OW, CHANNELS_LAST)[:, None] + lane
    totals = ()
    for _ in tl.static_range(STRIDE_H * STRIDE_W):
        totals = totals + (tl.zeros([BLOCK, VEC], tl.float32),)
    for i in tl.static_range((R + STRIDE_H - 1) // STRIDE_H):
        for j in tl.static_range((S + STRIDE_W - 1) // STRIDE_W):
            inside = (mask & (u >= i) & (u < OH + i) & (v >= j) & (v < OW + j))[:, None]
            back = (i * OW + j) * step
            arg = tl.load(arg_ptr + at - back, mask=inside, other=NOWHERE)
            g = tl.load(g_ptr + at - back, mask=inside, other=0).to(tl.float32)
            totals = add_to_pixels(totals, g, arg, i * STRIDE_H, j * STRIDE_W, R, S, STRIDE_H, STRIDE_W)
    y = u * STRIDE_H - PAD_H
    x = v * STRIDE_W - PAD_W
    at = offset_of(n, c, y, x, C, H, W, CHANNELS_LAST)[:, None] + lane
    for k in tl.static_range(STRIDE_H * STRIDE_W):
        inside = mask & in_image(y + k // STRIDE_W, x + k % STRIDE_W, H, W)
        ahead = (k // STRIDE_W * W + k % STRIDE_W) * step
        tl.store(dx_ptr + at + ahead, totals[k].to(dx_ptr.dtype.element_ty), mask=inside[:, None])


# A program computes the input's gradient of BLOCK vectors of one pixel or, if BLOCKED, of STRIDE_H x STRIDE_W pixels,
# gathered from the windows that contain them. dx [N, C, H, W], g and arg [N, C, OH, OW].
@triton.jit
def max_pool2d_backward_kernel(
    g_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCKED: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if BLOCKED:
        pool_backward_blocks(
            g_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
            C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, CHANNELS_LAST, VEC, BLOCK,
        )  # fmt: skip
    else:
        pool_backward_pixels(
            g_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW,
            C, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, CHANNELS_LAST, VEC, BLOCK,
        )  # fmt: skip


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


def in_order(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of gradients [N, C, H, W] over each channel, in float32; without a bias no elements."""
    return grad.new_empty(0) if bias is None else grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)


def pooled(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool):
    """The rows and columns of windows."""
    axes = zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    return [reference.pool_output_size(*axis, ceil_mode) for axis in axes]


def reach_beyond(x: Tensor, out: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]):
    """Whether windows reach beyond the images."""
    axes = zip(x.shape[2:], out.shape[2:], kernel_size, stride, padding, strict=True)
    return any(pad > 0 or (windows - 1) * step + side > size for size, windows, side, step, pad in axes)


def in_blocks(kernel_size: Sequence[int], stride: Sequence[int], most: int) -> bool:
    """Whether backward takes blocks of stride x stride pixels, at most so many."""
    return kernel_size[0] * kernel_size[1] <= _config.UNROLLED_TAPS and stride[0] * stride[1] <= most


def vectors_of(dx: Tensor, vector: int, stride: Sequence[int], padding: Sequence[int], blocked: bool) -> int:
    """The vectors of channels of an image's pixels, or of its blocks of stride x stride pixels."""
    n, c, *sizes = dx.shape
    if blocked:
        sizes = [-(-(size + pad) // step) for size, step, pad in zip(sizes, stride, padding, strict=True)]
    return n * c * sizes[0] * sizes[1] // vector


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
        x, in_order(bias), out, arg, count, *x.shape[2:], *out.shape[2:],
        C=x.shape[1], **pool_constants(kernel_size, stride, padding),
        PADDED=reach_beyond(x, out, kernel_size, stride, padding), RELU=relu, CHANNELS_LAST=channels_last,
        UNROLL=kernel_size[0] * kernel_size[1] <= _config.UNROLLED_TAPS,
        VEC=vector, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return out, arg


@triton_op
def max_pool2d_backward(
    grad: Tensor,
    argmax: Tensor,
    bias: Tensor | None,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor]:
    arg, memory_format = in_own_format(argmax)
    g = contiguous_as(grad, memory_format)
    dx = empty_like(arg, input_size, g.dtype)
    if dx.numel() == 0:
        return dx, bias_gradient(g, bias)
    channels_last = is_channels_last(memory_format)
    vector = vector_of(g, channels_last, g.shape[1])
    blocked = in_blocks(kernel_size, stride, _config.POOL_BLOCK_PIXELS)
    launch, count = launch_of(vector), vectors_of(dx, vector, stride, padding, blocked)
    wrap_triton(max_pool2d_backward_kernel)[(triton.cdiv(count, launch.block),)](
        g, arg, dx, count, *dx.shape[2:], *g.shape[2:],
        C=g.shape[1], **pool_constants(kernel_size, stride, padding), CHANNELS_LAST=channels_last,
        BLOCKED=blocked, VEC=vector, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    if bias is not None:
        g = g.masked_fill(arg > kernel_size[0] * kernel_size[1] - 1, 0)  # 256 is no byte
    return dx, bias_gradient(g, bias)
