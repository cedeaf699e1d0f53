"""Local response normalisation and max-pooling in one pass, optionally with the ReLU before them.

See: alexnet_kernels/ops/lrn_max_pool2d.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import (
    is_channels_last,
    launch_of,
    load_channels,
    locate,
    offset_of,
    store_channels,
    zip_vector,
)
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton
from alexnet_kernels.triton.local_response_norm import normalise, normalise_backward, window_constants
from alexnet_kernels.triton.max_pool2d import (
    NOWHERE,
    bias_gradient,
    blocks_of,
    in_blocks,
    in_image,
    in_order,
    pool_constants,
    pooled,
    reach_beyond,
    update_maximum,
    vectors_of,
    window_over,
    window_start,
)


@triton.jit
def load_activations(
    pointer, bias, mask, c, low, high, stride,
    RELU: tl.constexpr, BEFORE: tl.constexpr, VEC: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """load_channels, plus the bias (its channels, or None), and max(0, that) with RELU, where NaN is kept."""
    values = load_channels(pointer, mask, c, low, high, stride, BEFORE, VEC, AFTER)
    out = ()
    for i in tl.static_range(BEFORE + VEC + AFTER):
        value = values[i]
        if bias is not None:
            value += bias[i]
        if RELU:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = out + (value,)
    return out


@triton.jit
def update_tile(
    bests, args, values, r: tl.constexpr, column: tl.constexpr, PADDED: tl.constexpr,
    S: tl.constexpr, STRIDE_W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The maxima of TILE neighbouring windows and their positions, with the pixel in row r and a column of the tile."""
    new_bests = ()
    new_args = ()
    for m in tl.static_range(TILE):
        best = bests[m]
        arg = args[m]
        if column >= m * STRIDE_W and column < m * STRIDE_W + S:
            position = r * S + column - m * STRIDE_W
            if PADDED or position > 0:
                best, arg = update_maximum(best, arg, values, position)
            else:
                best = values
        new_bests = new_bests + (best,)
        new_args = new_args + (arg,)
    return new_bests, new_args


# A program computes BLOCK vectors of VEC channels of TILE neighbouring outputs; see _channels.py. The pixels of their
# windows are normalised in registers, once for all of them. x [N, C, H, W]; bias [C] or None; out, arg [N, C, OH, OW].
# PADDED says whether windows reach beyond the image.
@triton.jit
def lrn_max_pool2d_forward_kernel(
    x_ptr, bias_ptr, out_ptr, arg_ptr, count, H, W, OH, OW, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    TILE: tl.constexpr, PADDED: tl.constexpr, RELU: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, mask, n, c, p, v = locate(BLOCK, count, C, OH, (OW + (TILE - 1)) // TILE, CHANNELS_LAST, VEC)
    q = v * TILE
    low = c // GROUP * GROUP
    high = low + GROUP
    stride = 1 if CHANNELS_LAST else H * W
    step = C if CHANNELS_LAST else 1
    bias = None
    if bias_ptr is not None:
        bias = load_channels(bias_ptr + c, None, c, low, high, 1, BEFORE, VEC, AFTER)
    y, above = window_start(p, STRIDE_H, PAD_H)
    x, before = window_start(q, STRIDE_W, PAD_W)
    base = x_ptr + offset_of(n, c, 0, 0, C, H, W, CHANNELS_LAST)
    bests = ()
    args = ()
    for m in tl.static_range(TILE):
        # If all values are -inf, the first position inside the image wins.
        first = above * S + tl.maximum(before - m * STRIDE_W, 0)
        bests = bests + (tl.full([BLOCK, VEC], -float("inf"), tl.float32),)
        args = args + ((first if PADDED else first * 0)[:, None] + tl.zeros([BLOCK, VEC], tl.int32),)
    for r in tl.static_range(R):
        for column in tl.static_range((TILE - 1) * STRIDE_W + S):
            if PADDED:
                inside = mask & in_image(y + r, x + column, H, W)
                pointer = base + ((y + r) * W + x + column) * step
                xs = load_activations(pointer, bias, inside, c, low, high, stride, RELU, BEFORE, VEC, AFTER)
            else:
                # Only a window that isn't stored, of the last tile, reaches beyond the image.
                pointer = base + ((y + r) * W + tl.minimum(x + column, W - 1)) * step
                xs = load_activations(pointer, bias, None, c, low, high, stride, RELU, BEFORE, VEC, AFTER)
            values = zip_vector(normalise(xs, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER), VEC)
            if PADDED:
                values = tl.where(inside[:, None], values, -float("inf"))
            bests, args = update_tile(bests, args, values, r, column, PADDED, S, STRIDE_W, TILE)
    at = offset_of(n, c, p, q, C, OH, OW, CHANNELS_LAST)[:, None] + tl.arange(0, VEC)[None, :]
    for m in tl.static_range(TILE):
        inside = (mask & (q + m < OW))[:, None]
        tl.store(out_ptr + at + m * step, bests[m].to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(arg_ptr + at + m * step, args[m].to(tl.uint8), mask=inside)


@triton.jit
def gather_pixel(
    g_ptr, arg_ptr, mask, n, c, y, x, low, high, OH, OW,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BEFORE: tl.constexpr, VEC: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """The pooled gradients of pixel (y, x), with a halo of channels."""
    stride = 1 if CHANNELS_LAST else OH * OW
    totals = zeros(mask, BEFORE + VEC + AFTER)
    for i in tl.static_range((R + STRIDE_H - 1) // STRIDE_H):
        for j in tl.static_range((S + STRIDE_W - 1) // STRIDE_W):
            p, r, has_row = window_over(y, i, R, STRIDE_H, PAD_H, OH)
            q, s, has_column = window_over(x, j, S, STRIDE_W, PAD_W, OW)
            inside = mask & has_row & has_column
            at = offset_of(n, c, p, q, C, OH, OW, CHANNELS_LAST)
            grads = load_channels(g_ptr + at, inside, c, low, high, stride, BEFORE, VEC, AFTER)
            args = load_channels(arg_ptr + at, inside, c, low, high, stride, BEFORE, VEC, AFTER, tl.int32)
            sums = ()
            for m in tl.static_range(BEFORE + VEC + AFTER):
                sums = sums + (totals[m] + tl.where(inside & (args[m] == r * S + s), grads[m], 0.0),)
            totals = sums
    return totals


@triton.jit
def gather_block(
    g_ptr, arg_ptr, mask, n, c, u, v, low, high, OH, OW,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, BEFORE: tl.constexpr, VEC: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """gather_pixel of the STRIDE_H x STRIDE_W pixels of block (u, v), one after another; see pool_backward_blocks."""
    COUNT: tl.constexpr = BEFORE + VEC + AFTER
    step = C if CHANNELS_LAST else 1
    stride = 1 if CHANNELS_LAST else OH * OW
    at = offset_of(n, c, u, v, C, OH, OW, CHANNELS_LAST)
    totals = zeros(mask, STRIDE_H * STRIDE_W * COUNT)
    for i in tl.static_range((R + STRIDE_H - 1) // STRIDE_H):
        for j in tl.static_range((S + STRIDE_W - 1) // STRIDE_W):
            inside = mask & (u >= i) & (u < OH + i) & (v >= j) & (v < OW + j)
            back = (i * OW + j) * step
            grads = load_channels(g_ptr + at - back, inside, c, low, high, stride, BEFORE, VEC, AFTER)
            args = load_channels(
                arg_ptr + at - back, inside, c, low, high, stride, BEFORE, VEC, AFTER, tl.int32, NOWHERE
            )
            sums = ()
            for k in tl.static_range(STRIDE_H * STRIDE_W):
                for m in tl.static_range(COUNT):
                    total = totals[k * COUNT + m]
                    if i * STRIDE_H + k // STRIDE_W < R and j * STRIDE_W + k % STRIDE_W < S:
                        won = args[m] == (i * STRIDE_H + k // STRIDE_W) * S + j * STRIDE_W + k % STRIDE_W
                        total += tl.where(won, grads[m], 0.0)
                    sums = sums + (total,)
            totals = sums
    return totals


@triton.jit
def zeros(mask, COUNT: tl.constexpr):
    """A tuple of zeros of the mask's shape."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros(mask.shape, tl.float32),)
    return out


# A program computes the input's gradient of BLOCK vectors of PIXELS_H x PIXELS_W pixels, one pixel or a block of the
# windows' stride. It gathers the pooled gradient of the vectors and their halo from the windows that contain them, then
# applies the gradients of the normalisation and ReLU. dx, x [N, C, H, W]; bias [C] or None; g, arg [N, C, OH, OW].
@triton.jit
def lrn_max_pool2d_backward_kernel(
    g_ptr, x_ptr, bias_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCKED: tl.constexpr, RELU: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    HALO: tl.constexpr = BEFORE + AFTER
    PIXELS_H: tl.constexpr = STRIDE_H if BLOCKED else 1
    PIXELS_W: tl.constexpr = STRIDE_W if BLOCKED else 1
    TOP: tl.constexpr = PAD_H if BLOCKED else 0
    LEFT: tl.constexpr = PAD_W if BLOCKED else 0
    rows, columns = blocks_of(H, PIXELS_H, TOP), blocks_of(W, PIXELS_W, LEFT)
    _, mask, n, c, u, v = locate(BLOCK, count, C, rows, columns, CHANNELS_LAST, VEC)
    low = c // GROUP * GROUP
    high = low + GROUP
    step = C if CHANNELS_LAST else 1
    stride = 1 if CHANNELS_LAST else H * W
    y = u * PIXELS_H - TOP
    x = v * PIXELS_W - LEFT
    if BLOCKED:
        gs = gather_block(
            g_ptr, arg_ptr, mask, n, c, u, v, low, high, OH, OW,
            C, CHANNELS_LAST, R, S, STRIDE_H, STRIDE_W, AFTER, VEC, BEFORE,
        )  # fmt: skip
    else:
        gs = gather_pixel(
            g_ptr, arg_ptr, mask, n, c, y, x, low, high, OH, OW,
            C, CHANNELS_LAST, R, S, STRIDE_H, STRIDE_W, PAD_H, PAD_W, AFTER, VEC, BEFORE,
        )  # fmt: skip
    bias = None
    if bias_ptr is not None:
        bias = load_channels(bias_ptr + c, None, c, low, high, 1, HALO, VEC, HALO)
    at = offset_of(n, c, y, x, C, H, W, CHANNELS_LAST)
    for i in tl.static_range(PIXELS_H * PIXELS_W):
        inside = mask & in_image(y + i // PIXELS_W, x + i % PIXELS_W, H, W)
        ahead = (i // PIXELS_W * W + i % PIXELS_W) * step
        xs = load_activations(x_ptr + at + ahead, bias, inside, c, low, high, stride, RELU, HALO, VEC, HALO)
        pixel = gs[i * (VEC + HALO) : (i + 1) * (VEC + HALO)]
        dx = normalise_backward(xs, pixel, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER)
        if RELU:
            masked = ()
            for m in tl.static_range(VEC):
                masked = masked + (tl.where(xs[HALO + m] <= 0, 0.0, dx[m]),)
            dx = masked
        store_channels(dx_ptr + at + ahead, dx, inside, VEC)


def fused_constants(
    x: Tensor,
    channels_last: bool,
    size: int,
    beta: float,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> dict:
    # All taps are unrolled for all channels of a vector: large windows take one channel at a time.
    most = 16 if kernel_size[0] * kernel_size[1] <= _config.UNROLLED_TAPS else 1
    return {
        **window_constants(x, channels_last, size, beta, groups, most),
        **pool_constants(kernel_size, stride, padding),
    }


@triton_op
def lrn_max_pool2d(
    input: Tensor,
    bias: Tensor | None,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    x, memory_format = in_own_format(input)
    shape = [*x.shape[:2], *pooled(x, kernel_size, stride, padding, ceil_mode)]
    out = empty_like(x, shape)
    arg = empty_like(x, shape, torch.uint8)
    if out.numel() == 0:
        return out, arg
    constants = fused_constants(x, is_channels_last(memory_format), size, beta, groups, kernel_size, stride, padding)
    overlap = kernel_size[1] > stride[1] and kernel_size[0] * kernel_size[1] <= _config.LRN_POOL_TILE_TAPS
    tile = 2 if overlap else 1
    launch = launch_of(constants["VEC"])
    count = x.shape[0] * x.shape[1] * out.shape[2] * -(-out.shape[3] // tile) // constants["VEC"]
    wrap_triton(lrn_max_pool2d_forward_kernel)[(triton.cdiv(count, launch.block),)](
        x, in_order(bias), out, arg, count, *x.shape[2:], *out.shape[2:], alpha / size, beta, k,
        **constants, TILE=tile, PADDED=reach_beyond(x, out, kernel_size, stride, padding),
        RELU=relu, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return out, arg


@triton_op
def lrn_max_pool2d_backward(
    grad: Tensor,
    input: Tensor,
    bias: Tensor | None,
    argmax: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    relu: bool,
) -> tuple[Tensor, Tensor]:
    x, memory_format = in_own_format(input)
    g, arg = contiguous_as(grad, memory_format), contiguous_as(argmax, memory_format)
    # The bias's gradient is the sum of unrounded gradients.
    dx = empty_like(x, dtype=x.dtype if bias is None else torch.float32)
    if x.numel() == 0:
        return dx.to(x.dtype), bias_gradient(dx, bias)
    constants = fused_constants(x, is_channels_last(memory_format), size, beta, groups, kernel_size, stride, padding)
    blocked = in_blocks(kernel_size, stride, _config.LRN_POOL_BLOCK_PIXELS)
    launch = launch_of(constants["VEC"])
    count = vectors_of(dx, constants["VEC"], stride, padding, blocked)
    wrap_triton(lrn_max_pool2d_backward_kernel)[(triton.cdiv(count, launch.block),)](
        g, x, in_order(bias), arg, dx, count, *x.shape[2:], *g.shape[2:], alpha / size, beta, k,
        **constants, BLOCKED=blocked, RELU=relu, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return dx.to(x.dtype), bias_gradient(dx, bias)
