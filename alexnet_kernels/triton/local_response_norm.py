"""Local response normalisation across channels.

See: alexnet_kernels/ops/local_response_norm.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton._channels import (
    is_channels_last,
    launch_of,
    load_channels,
    locate,
    store_channels,
    vector_of,
)
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton


@triton.jit
def power(s, beta, BETA_IS_3_4: tl.constexpr):
    """s^-beta."""
    if BETA_IS_3_4:
        r = tl.rsqrt(s)
        return r * tl.sqrt(r)
    else:
        return tl.exp2(-beta * tl.log2(s))


@triton.jit
def powers(s, beta, BETA_IS_3_4: tl.constexpr):
    """s^-beta and s^(-beta - 1)."""
    if BETA_IS_3_4:
        r = tl.rsqrt(s)
        scale = r * tl.sqrt(r)
        return scale, scale * r * r
    else:
        scale = tl.exp2(-beta * tl.log2(s))
        return scale, scale / s


@triton.jit
def bases(xs, alpha_n, k, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """s = k + alpha / n sum a^2 of COUNT consecutive channels, from COUNT + SIZE - 1 activations."""
    out = ()
    for i in tl.static_range(COUNT):
        total = xs[i] * xs[i]
        for j in tl.static_range(1, SIZE):
            total += xs[i + j] * xs[i + j]
        out = out + (k + alpha_n * total,)
    return out


@triton.jit
def normalise(
    xs, alpha_n, beta, k, BETA_IS_3_4: tl.constexpr, VEC: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """VEC normalised activations, from VEC activations with a halo of BEFORE and AFTER."""
    out = ()
    s = bases(xs, alpha_n, k, VEC, BEFORE + AFTER + 1)
    for i in tl.static_range(VEC):
        out = out + (xs[BEFORE + i] * power(s[i], beta, BETA_IS_3_4),)
    return out


@triton.jit
def normalise_backward(
    xs, gs, alpha_n, beta, k, BETA_IS_3_4: tl.constexpr, VEC: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """VEC gradients of the input.

    dx[i] = g[i] s[i]^-beta - 2 beta alpha / n x[i] sum_j g[j] x[j] s[j]^(-beta - 1), over the j whose windows contain
    i: from i - AFTER to i + BEFORE. gs has a halo of those j, xs a halo of their windows.
    """
    HALO: tl.constexpr = BEFORE + AFTER
    s = bases(xs, alpha_n, k, VEC + HALO, HALO + 1)
    scales = ()
    terms = ()
    for j in tl.static_range(VEC + HALO):
        scale, next_scale = powers(s[j], beta, BETA_IS_3_4)
        scales = scales + (scale,)
        terms = terms + (gs[j] * xs[BEFORE + j] * next_scale,)
    out = ()
    for i in tl.static_range(VEC):
        total = terms[i]
        for j in tl.static_range(1, HALO + 1):
            total += terms[i + j]
        direct = gs[AFTER + i] * scales[AFTER + i]
        out = out + (direct - 2 * beta * alpha_n * xs[HALO + i] * total,)
    return out


# A program computes BLOCK vectors of VEC channels; see _channels.py. x, y, g, dx [N, C, H, W] in one memory format.
@triton.jit
def lrn_forward_kernel(
    x_ptr, y_ptr, count, H, W, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, _, c, _, _ = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    low = c // GROUP * GROUP
    stride = 1 if CHANNELS_LAST else H * W
    at = first + tl.arange(0, BLOCK) * VEC
    xs = load_channels(x_ptr + at, mask, c, low, low + GROUP, stride, BEFORE, VEC, AFTER)
    store_channels(y_ptr + at, normalise(xs, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER), mask, VEC)


@triton.jit
def lrn_backward_kernel(
    g_ptr, x_ptr, dx_ptr, count, H, W, alpha_n, beta, k,
    C: tl.constexpr, GROUP: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, _, c, _, _ = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    low = c // GROUP * GROUP
    stride = 1 if CHANNELS_LAST else H * W
    at = first + tl.arange(0, BLOCK) * VEC
    HALO: tl.constexpr = BEFORE + AFTER
    xs = load_channels(x_ptr + at, mask, c, low, low + GROUP, stride, HALO, VEC, HALO)
    gs = load_channels(g_ptr + at, mask, c, low, low + GROUP, stride, AFTER, VEC, BEFORE)
    dx = normalise_backward(xs, gs, alpha_n, beta, k, BETA_IS_3_4, VEC, BEFORE, AFTER)
    store_channels(dx_ptr + at, dx, mask, VEC)


def window_constants(x: Tensor, channels_last: bool, size: int, beta: float, groups: int, most: int = 16) -> dict:
    """The compile-time constants of the normalisation."""
    group = x.shape[1] // groups
    return {
        "C": x.shape[1],
        "GROUP": group,
        "BETA_IS_3_4": beta == 0.75,
        "CHANNELS_LAST": channels_last,
        "BEFORE": min(size // 2, group - 1),
        "AFTER": min((size - 1) // 2, group - 1),
        "VEC": vector_of(x, channels_last, group, most),
    }


@triton_op
def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    x, memory_format = in_own_format(input)
    y = empty_like(x)
    if x.numel() == 0:
        return y
    constants = window_constants(x, is_channels_last(memory_format), size, beta, groups)
    launch, count = launch_of(constants["VEC"]), x.numel() // constants["VEC"]
    wrap_triton(lrn_forward_kernel)[(triton.cdiv(count, launch.block),)](
        x, y, count, x.shape[2], x.shape[3], alpha / size, beta, k,
        **constants, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return y


@triton_op
def local_response_norm_backward(
    grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    x, memory_format = in_own_format(input)
    g = contiguous_as(grad, memory_format)
    dx = empty_like(x)
    if x.numel() == 0:
        return dx
    constants = window_constants(x, is_channels_last(memory_format), size, beta, groups)
    launch, count = launch_of(constants["VEC"]), x.numel() // constants["VEC"]
    wrap_triton(lrn_backward_kernel)[(triton.cdiv(count, launch.block),)](
        g, x, dx, count, x.shape[2], x.shape[3], alpha / size, beta, k,
        **constants, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return dx
