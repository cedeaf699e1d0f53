"""Convolution, bias and ReLU as an implicit matrix product.

See: alexnet_kernels/ops/conv2d_relu.py. Backward: conv2d_relu_backward.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import check_size, contiguous_as, in_own_format, layout_of, triton_op, wrap_triton
from alexnet_kernels.triton._conv import (
    add_product,
    extra_columns_of,
    geometry_of,
    launch_constants,
    pixel_strides,
    precision_of,
    split_pixel,
    split_term,
    store_tile,
    tile_of,
)


@triton.jit
def epilogue(total, b_ptr, n, K, group, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(b_ptr + group * K + n, mask=n < K, other=0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    return total


# y[m, k] = max(0, bias[k] + sum_t x[m, t] w[k, t]): m runs over the output pixels of the batch, t over the taps and
# channels of one group, k over its filters. A program computes BLOCK_M pixels by BLOCK_N + EXTRA filters.
# x [N, G C, H, W] by strides; w [G K, R, S, C]; y [N, G K, OH, OW], by the strides of image, pixel and channel.
@triton.jit
def conv_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, count, H, W, OH, OW, XN, XC, XH, XW, YN, YC, YP, column_tiles, GROUPS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # Consecutive programs take the same pixels and share x in the L2 cache.
    program = tl.program_id(0)
    group = program % GROUPS
    column = program // GROUPS % column_tiles
    m = program // (GROUPS * column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column * (BLOCK_N + EXTRA) + tl.arange(0, BLOCK_N)
    image, p, q = split_pixel(m, OH, OW)
    y = p * STRIDE_H - PAD_H
    x = q * STRIDE_W - PAD_W
    x_base = x_ptr + image * XN + group * C * XC + y * XH + x * XW
    w_base = w_ptr + group * (K * R * S * C)
    TERMS: tl.constexpr = R * S * C
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXTRA > 0:
        n_extra = extra_columns_of(column, BLOCK_N, EXTRA)
        extra = tl.zeros([BLOCK_M, EXTRA], tl.float32)
    for start in range(0, TERMS, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        if C % BLOCK_T == 0:  # one tap
            r, s, c0 = split_term(start, C, S)
            c = c0 + tl.arange(0, BLOCK_T)
            inside = ((m < count) & (y + r >= 0) & (y + r < H) & (x + s >= 0) & (x + s < W))[:, None]
            a = tl.load(x_base[:, None] + (r * XH + s * XW + c * XC)[None, :], mask=inside, other=0)
        else:
            r, s, c = split_term(t, C, S)
            row = y[:, None] + r[None, :]
            col = x[:, None] + s[None, :]
            inside = (m < count)[:, None] & (t < TERMS)[None, :] & (row >= 0) & (row < H) & (col >= 0) & (col < W)
            a = tl.load(x_base[:, None] + (r * XH + s * XW + c * XC)[None, :], mask=inside, other=0)
        w_mask = (t < TERMS)[:, None]
        b = tl.load(w_base + n[None, :] * TERMS + t[:, None], mask=w_mask & (n < K)[None, :], other=0)
        total = add_product(a, b, total, PRECISION)
        if EXTRA > 0:
            b = tl.load(w_base + n_extra[None, :] * TERMS + t[:, None], mask=w_mask & (n_extra < K)[None, :], other=0)
            extra = add_product(a, b, extra, PRECISION)
    to = y_ptr + group * K * YC
    rows = (image * YN + (p * OW + q) * YP)[:, None]
    total = epilogue(total, b_ptr, n, K, group, HAS_BIAS, RELU)
    store_tile(to, rows + (n * YC)[None, :], n, total, m < count, K)
    if EXTRA > 0:
        extra = epilogue(extra, b_ptr, n_extra, K, group, HAS_BIAS, RELU)
        store_tile(to, rows + (n_extra * YC)[None, :], n_extra, extra, m < count, K)


@triton_op
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    relu: bool,
    algorithm: int = 0,
    backward_input: int = 0,
    backward_weight: int = 0,
    masked_grad: bool = False,
    mask_input: bool = False,
) -> Tensor:
    if algorithm not in (0, -1):
        raise ValueError(f"conv2d_relu: the Triton kernels have algorithms 0 and -1 only, not {algorithm}")
    x, memory_format = in_own_format(input)
    w = contiguous_as(weight, torch.channels_last)
    (height, width), (rows, columns) = x.shape[2:], w.shape[2:]
    out_height = (height + 2 * padding[0] - rows) // stride[0] + 1
    out_width = (width + 2 * padding[1] - columns) // stride[1] + 1
    y = contiguous_as(empty_like(x, [x.shape[0], w.shape[0], out_height, out_width]), memory_format)
    if y.numel() == 0:
        return y
    check_size(x, y)
    tile, geometry = tile_of(x, _config.CONV_HALF), geometry_of(w, stride, padding, groups)
    column_tiles, constants = launch_constants(tile, geometry["K"])
    count = x.shape[0] * out_height * out_width
    wrap_triton(conv_forward_kernel)[(triton.cdiv(count, tile.rows) * column_tiles * groups,)](
        x, w, w if bias is None else bias.contiguous(), y, count, height, width, out_height, out_width,
        *layout_of(x), *pixel_strides(layout_of(y)), column_tiles, groups,
        **geometry, HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision_of(x.dtype),
        **constants,
    )  # fmt: skip
    return y
