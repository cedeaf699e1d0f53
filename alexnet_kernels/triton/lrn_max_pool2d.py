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
)
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton
from alexnet_kernels.triton.local_response_norm import normalise, normalise_backward, window_constants
from alexnet_kernels.triton.max_pool2d import (
    bias_gradient,
    pool_constants,
    pooled,
    update_maximum,
    window_over,
    window_start,
)


@triton.jit
def rectify(xs, COUNT: tl.constexpr):
    """ReLU; NaN is kept."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.where(xs[i] < 0, 0.0, xs[i]),)
    return out


# A program computes BLOCK vectors of VEC channels of the output; see _channels.py. The pixels of a window are
# normalised in registers, once for each window that contains them. x [N, C, H, W]; out, arg [N, C, OH, OW].
@triton.jit
def lrn_max_pool2d_forward_kernel(
    x_ptr, out_ptr, arg_ptr, count, H, W, OH, OW, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, p, q = locate(BLOCK, count, C, OH, OW, CHANNELS_LAST, VEC)
    low = c // GROUP * GROUP
    stride = 1 if CHANNELS_LAST else H * W
    step = C if CHANNELS_LAST else 1
    y, above = window_start(p, STRIDE_H, PAD_H)
    x, before = window_start(q, STRIDE_W, PAD_W)
    base = x_ptr + offset_of(n, c, 0, 0, C, H, W, CHANNELS_LAST)
    bests = ()
    args = ()
    for _ in tl.static_range(VEC):
        bests = bests + (tl.full([BLOCK], -float("inf"), tl.float32),)
        args = args + (above * S + before,)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            inside = mask & (y + r >= 0) & (y + r < H) & (x + s >= 0) & (x + s < W)
            pointer = base + ((y + r) * W + x + s) * step
            xs = load_channels(pointer, inside, c, low, low + GROUP, stride, BEFORE, VEC, AFTER)
            if RELU:
                xs = rectify(xs, BEFORE + VEC + AFTER)
            values = normalise(xs, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER)
            new_bests = ()
            new_args = ()
            for i in tl.static_range(VEC):
                best, arg = update_maximum(bests[i], args[i], values[i], r * S + s, inside)
                new_bests = new_bests + (best,)
                new_args = new_args + (arg,)
            bests = new_bests
            args = new_args
    at = first + tl.arange(0, BLOCK) * VEC
    store_channels(out_ptr + at, bests, mask, VEC)
    store_channels(arg_ptr + at, args, mask, VEC)


# A program computes BLOCK vectors of the input's gradient: it gathers the pooled gradient of the vector and its halo
# from the windows that contain the pixel, then applies the gradients of the normalisation and ReLU. dx, x [N, C, H, W];
# g, arg [N, C, OH, OW].
@triton.jit
def lrn_max_pool2d_backward_kernel(
    g_ptr, x_ptr, arg_ptr, dx_ptr, count, H, W, OH, OW, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, y, x = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    low = c // GROUP * GROUP
    high = low + GROUP
    HALO: tl.constexpr = BEFORE + AFTER
    step = C if CHANNELS_LAST else 1
    stride = 1 if CHANNELS_LAST else OH * OW
    base = offset_of(n, c, 0, 0, C, OH, OW, CHANNELS_LAST)
    gs = ()
    for _ in tl.static_range(VEC + HALO):
        gs = gs + (tl.zeros([BLOCK], tl.float32),)
    for i in tl.static_range((R + STRIDE_H - 1) // STRIDE_H):
        for j in tl.static_range((S + STRIDE_W - 1) // STRIDE_W):
            p, r, has_row = window_over(y, i, R, STRIDE_H, PAD_H, OH)
            q, s, has_column = window_over(x, j, S, STRIDE_W, PAD_W, OW)
            inside = mask & has_row & has_column
            at = base + (p * OW + q) * step
            grads = load_channels(g_ptr + at, inside, c, low, high, stride, AFTER, VEC, BEFORE)
            winners = load_channels(arg_ptr + at, inside, c, low, high, stride, AFTER, VEC, BEFORE)
            position = (r * S + s).to(tl.float32)
            sums = ()
            for m in tl.static_range(VEC + HALO):
                sums = sums + (gs[m] + tl.where(inside & (winners[m] == position), grads[m], 0.0),)
            gs = sums
    at = first + tl.arange(0, BLOCK) * VEC
    stride = 1 if CHANNELS_LAST else H * W
    inputs = load_channels(x_ptr + at, mask, c, low, high, stride, HALO, VEC, HALO)
    xs = inputs
    if RELU:
        xs = rectify(inputs, VEC + 2 * HALO)
    dx = normalise_backward(xs, gs, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER)
    if RELU:
        masked = ()
        for i in tl.static_range(VEC):
            masked = masked + (tl.where(inputs[HALO + i] <= 0, 0.0, dx[i]),)
        dx = masked
    store_channels(dx_ptr + at, dx, mask, VEC)


def biased(input: Tensor, bias: Tensor | None) -> Tensor:
    """input + bias in float32."""
    return input if bias is None else input.float() + bias.float().reshape(-1, 1, 1)


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
    x, memory_format = in_own_format(biased(input, bias))
    shape = [*x.shape[:2], *pooled(x, kernel_size, stride, padding, ceil_mode)]
    out = empty_like(x, shape)
    arg = empty_like(x, shape, torch.uint8)
    if out.numel() == 0:
        return out.to(input.dtype), arg
    constants = fused_constants(x, is_channels_last(memory_format), size, beta, groups, kernel_size, stride, padding)
    launch, count = launch_of(constants["VEC"]), out.numel() // constants["VEC"]
    wrap_triton(lrn_max_pool2d_forward_kernel)[(triton.cdiv(count, launch.block),)](
        x, out, arg, count, *x.shape[2:], *out.shape[2:], alpha / size, beta, k,
        **constants, RELU=relu, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return out.to(input.dtype), arg


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
    x, memory_format = in_own_format(biased(input, bias))
    g, arg = contiguous_as(grad, memory_format), contiguous_as(argmax, memory_format)
    dx = empty_like(x)
    if x.numel() == 0:
        return dx.to(input.dtype), bias_gradient(dx, bias)
    constants = fused_constants(x, is_channels_last(memory_format), size, beta, groups, kernel_size, stride, padding)
    launch, count = launch_of(constants["VEC"]), x.numel() // constants["VEC"]
    wrap_triton(lrn_max_pool2d_backward_kernel)[(triton.cdiv(count, launch.block),)](
        g, x, arg, dx, count, *x.shape[2:], *g.shape[2:], alpha / size, beta, k,
        **constants, RELU=relu, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return dx.to(input.dtype), bias_gradient(dx, bias)
