"""Response normalisation inside each map.

See: alexnet_kernels/ops/within_map_response_norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton._channels import is_channels_last, launch_of, locate, offset_of, vector_of
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton
from alexnet_kernels.triton.local_response_norm import power


@triton.jit
def window_sum(
    pointer, base, y, x, lane, mask, H, W,
    C: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SQUARES: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The sum, or sum of squares, over windows from BEFORE pixels up and left to AFTER down and right."""
    step = C if CHANNELS_LAST else 1
    total = tl.zeros([BLOCK, VEC], tl.float32)
    for dy in range(-BEFORE, AFTER + 1):
        for dx in range(-BEFORE, AFTER + 1):
            inside = mask & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            at = base + ((y + dy) * W + x + dx) * step
            value = tl.load(pointer + at[:, None] + lane[None, :], mask=inside[:, None], other=0).to(tl.float32)
            total += value * value if SQUARES else value
    return total


# A program computes BLOCK vectors of VEC channels; see _channels.py. All tensors [N, C, H, W] in one memory format.
# Stores out = x s^-beta, or with BACKWARD out = g s^-beta and term = g x s^(-beta - 1), in float32.
@triton.jit
def wmrn_forward_kernel(
    x_ptr, g_ptr, out_ptr, term_ptr, count, H, W, alpha_n, beta, k,
    C: tl.constexpr, BETA_IS_3_4: tl.constexpr, CHANNELS_LAST: tl.constexpr, BACKWARD: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, y, x = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)
    base = offset_of(n, c, 0, 0, C, H, W, CHANNELS_LAST)
    total = window_sum(
        x_ptr, base, y, x, lane, mask, H, W, C, BEFORE, AFTER, True, CHANNELS_LAST, BLOCK, VEC
    )  # fmt: skip
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    a = tl.load(x_ptr + at, mask=mask[:, None], other=0).to(tl.float32)
    s = k + alpha_n * total
    scale = power(s, beta, BETA_IS_3_4)
    if BACKWARD:
        g = tl.load(g_ptr + at, mask=mask[:, None], other=0).to(tl.float32)
        tl.store(out_ptr + at, g * scale, mask=mask[:, None])
        tl.store(term_ptr + at, g * a * scale / s, mask=mask[:, None])
    else:
        tl.store(out_ptr + at, (a * scale).to(out_ptr.dtype.element_ty), mask=mask[:, None])


# The same tiles. dx = direct - 2 beta alpha / n^2 x sum term, summed over the pixels whose windows contain this one.
@triton.jit
def wmrn_backward_kernel(
    x_ptr, direct_ptr, term_ptr, dx_ptr, count, H, W, alpha_n, beta,
    C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, mask, n, c, y, x = locate(BLOCK, count, C, H, W, CHANNELS_LAST, VEC)
    lane = tl.arange(0, VEC)
    base = offset_of(n, c, 0, 0, C, H, W, CHANNELS_LAST)
    total = window_sum(
        term_ptr, base, y, x, lane, mask, H, W, C, AFTER, BEFORE, False, CHANNELS_LAST, BLOCK, VEC
    )  # fmt: skip
    at = (first + tl.arange(0, BLOCK) * VEC)[:, None] + lane[None, :]
    a = tl.load(x_ptr + at, mask=mask[:, None], other=0).to(tl.float32)
    direct = tl.load(direct_ptr + at, mask=mask[:, None], other=0)
    dx = direct - 2 * beta * alpha_n * a * total
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask[:, None])


def _constants(x: Tensor, channels_last: bool, size: int) -> dict:
    return {
        "C": x.shape[1],
        "CHANNELS_LAST": channels_last,
        "BEFORE": size // 2,
        "AFTER": (size - 1) // 2,
        "VEC": vector_of(x, channels_last, x.shape[1]),
    }


@triton_op
def within_map_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x, memory_format = in_own_format(input)
    out = empty_like(x)
    if x.numel() == 0:
        return out
    constants = _constants(x, is_channels_last(memory_format), size)
    launch, count = launch_of(constants["VEC"]), x.numel() // constants["VEC"]
    wrap_triton(wmrn_forward_kernel)[(triton.cdiv(count, launch.block),)](
        x, x, out, out, count, *x.shape[2:], alpha / size**2, beta, k,
        **constants, BETA_IS_3_4=beta == 0.75, BACKWARD=False, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return out


@triton_op
def within_map_response_norm_backward(
    grad: Tensor, input: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    x, memory_format = in_own_format(input)
    g = contiguous_as(grad, memory_format)
    dx = empty_like(x)
    if x.numel() == 0:
        return dx
    direct, term = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x, dtype=torch.float32)
    constants = _constants(x, is_channels_last(memory_format), size)
    launch, count = launch_of(constants["VEC"]), x.numel() // constants["VEC"]
    grid = (triton.cdiv(count, launch.block),)
    wrap_triton(wmrn_forward_kernel)[grid](
        x, g, direct, term, count, *x.shape[2:], alpha / size**2, beta, k,
        **constants, BETA_IS_3_4=beta == 0.75, BACKWARD=True, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    wrap_triton(wmrn_backward_kernel)[grid](
        x, direct, term, dx, count, *x.shape[2:], alpha / size**2, beta,
        **constants, BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return dx
