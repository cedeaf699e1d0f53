"""The gradients of convolution, bias and ReLU, as implicit matrix products.

See: alexnet_kernels/ops/conv2d_relu.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like, memory_format_of
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import check_size, contiguous_as, in_own_format, layout_of, triton_op, wrap_triton
from alexnet_kernels.triton._conv import (
    add_product,
    check_algorithm,
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
def clear_unless_positive(total, gate, at, n, m_mask, C):
    """ReLU's backward: `total`, 0 where the elements of `gate` are at most 0."""
    values = tl.load(gate + at, mask=m_mask[:, None] & (n < C)[None, :], other=0).to(tl.float32)
    return tl.where(values <= 0, 0.0, total)


# dx[m, c] = sum_t g[m, t] w[t, c]: m runs over the input pixels of one phase (row and column modulo the stride, which
# determine the taps that reach a pixel), t over those taps and the filters of one group, c over its channels. A program
# computes BLOCK_M pixels by BLOCK_N + EXTRA channels. MASK: dx is 0 where x, which is laid out like it, is at most 0.
# g, out [N, G K, OH, OW] by strides; w [G K, R, S, C]; dx by image, pixel, channel.
@triton.jit
def conv_backward_input_kernel(
    g_ptr, out_ptr, w_ptr, x_ptr, dx_ptr, N, H, W, OH, OW, GN, GC, GH, GW, XN, XC, XP, column_tiles, GROUPS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % GROUPS
    column = program // GROUPS % column_tiles
    phase_y = tl.program_id(1) // STRIDE_W
    phase_x = tl.program_id(1) % STRIDE_W
    height = (H - phase_y + STRIDE_H - 1) // STRIDE_H
    width = tl.maximum((W - phase_x + STRIDE_W - 1) // STRIDE_W, 1)
    m = program // (GROUPS * column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, i, j = split_pixel(m, tl.maximum(height, 1), width)
    y = i * STRIDE_H + phase_y
    x = j * STRIDE_W + phase_x
    m_mask = (image < N) & (y < H) & (x < W)
    r0 = (phase_y + PAD_H) % STRIDE_H
    s0 = (phase_x + PAD_W) % STRIDE_W
    p = (y + PAD_H - r0) // STRIDE_H
    q = (x + PAD_W - s0) // STRIDE_W
    if STRIDE_H * STRIDE_W == 1:
        taps_w: tl.constexpr = S
        terms: tl.constexpr = R * S * K
    else:  # the taps r0 + i STRIDE_H < R, s0 + j STRIDE_W < S; some phases have none
        taps_w = (S - s0 + STRIDE_W - 1) // STRIDE_W
        terms = (R - r0 + STRIDE_H - 1) // STRIDE_H * taps_w * K
    base = image * GN + group * K * GC + p * GH + q * GW
    w_base = w_ptr + group * (K * R * S * C)
    n = column * (BLOCK_N + EXTRA) + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXTRA > 0:
        n_extra = extra_columns_of(column, BLOCK_N, EXTRA)
        extra = tl.zeros([BLOCK_M, EXTRA], tl.float32)
    for start in range(0, terms, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        t_mask = t < terms
        if K % BLOCK_T == 0:  # one tap
            down, right, k0 = split_term(start, K, taps_w)
            k = k0 + tl.arange(0, BLOCK_T)
            inside = (m_mask & (p >= down) & (p - down < OH) & (q >= right) & (q - right < OW))[:, None]
            at = base[:, None] + (k * GC - down * GH - right * GW)[None, :]
        else:
            down, right, k = split_term(t, K, taps_w)
            row = p[:, None] - down[None, :]
            col = q[:, None] - right[None, :]
            inside = m_mask[:, None] & t_mask[None, :] & (row >= 0) & (row < OH) & (col >= 0) & (col < OW)
            at = base[:, None] + (k * GC - down * GH - right * GW)[None, :]
        r = r0 + down * STRIDE_H
        s = s0 + right * STRIDE_W
        a = tl.load(g_ptr + at, mask=inside, other=0)
        if RELU:
            a = tl.where(tl.load(out_ptr + at, mask=inside, other=0).to(tl.float32) <= 0, 0.0, a.to(tl.float32))
            a = a.to(g_ptr.dtype.element_ty)
        w_at = (k * (R * S * C) + (r * S + s) * C)[:, None]
        b = tl.load(w_base + w_at + n[None, :], mask=t_mask[:, None] & (n < C)[None, :], other=0)
        total = add_product(a, b, total, PRECISION)
        if EXTRA > 0:
            b = tl.load(w_base + w_at + n_extra[None, :], mask=t_mask[:, None] & (n_extra < C)[None, :], other=0)
            extra = add_product(a, b, extra, PRECISION)
    to = dx_ptr + group * C * XC
    gate = x_ptr + group * C * XC
    rows = (image * XN + (y * W + x) * XP)[:, None]
    if MASK:
        total = clear_unless_positive(total, gate, rows + (n * XC)[None, :], n, m_mask, C)
    store_tile(to, rows + (n * XC)[None, :], n, total, m_mask, C)
    if EXTRA > 0:
        if MASK:
            extra = clear_unless_positive(extra, gate, rows + (n_extra * XC)[None, :], n_extra, m_mask, C)
        store_tile(to, rows + (n_extra * XC)[None, :], n_extra, extra, m_mask, C)


@triton.jit
def load_gradient(g_ptr, out_ptr, rows, n, mask, K, GC, RELU: tl.constexpr):
    """The output's gradient at offsets `rows` and filters n, masked by ReLU."""
    at = rows[:, None] + (n * GC)[None, :]
    inside = mask[:, None] & (n < K)[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0)
    if RELU:
        out = tl.load(out_ptr + at, mask=inside, other=0).to(tl.float32)
        g = tl.where(out <= 0, 0.0, g.to(tl.float32)).to(g_ptr.dtype.element_ty)
    return g


# partial[split, t, k] = sum_m x[m, t] g[m, k]: m runs over the pixels of one split, t over the taps and channels of one
# group, k over its filters; partial_bias[split, k] = sum_m g[m, k]. A program computes BLOCK_M terms by BLOCK_N + EXTRA
# filters.
# x [N, G C, H, W] and g, out [N, G K, OH, OW] by strides; partial [splits, G, R S C, K], partial_bias [splits, G K].
@triton.jit
def conv_backward_weight_kernel(
    x_ptr, g_ptr, out_ptr, partial_ptr, partial_bias_ptr, count, split_pixels, H, W, OH, OW,
    XN, XC, XH, XW, GN, GC, GP, column_tiles, GROUPS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % GROUPS
    column = program // GROUPS % column_tiles
    tile = program // (GROUPS * column_tiles)
    split = tl.program_id(1)
    TERMS: tl.constexpr = R * S * C
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    r, s, c = split_term(t, C, S)
    x_term = r * XH + s * XW + (group * C + c) * XC
    n = column * (BLOCK_N + EXTRA) + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    if EXTRA > 0:
        n_extra = extra_columns_of(column, BLOCK_N, EXTRA)
        extra = tl.zeros([BLOCK_M, EXTRA], tl.float32)
        bias_extra = tl.zeros([BLOCK_T, EXTRA], tl.float32)
    first = split * split_pixels
    last = tl.minimum(first + split_pixels, count)
    for start in range(first, last, BLOCK_T):
        m = start + tl.arange(0, BLOCK_T)
        image, p, q = split_pixel(m, OH, OW)
        y = p * STRIDE_H - PAD_H
        x = q * STRIDE_W - PAD_W
        row = y[:, None] + r[None, :]
        col = x[:, None] + s[None, :]
        inside = (m < last)[:, None] & (t < TERMS)[None, :] & (row >= 0) & (row < H) & (col >= 0) & (col < W)
        a = tl.load(x_ptr + (image * XN + y * XH + x * XW)[:, None] + x_term[None, :], mask=inside, other=0)
        rows = image * GN + (p * OW + q) * GP + group * K * GC
        g = load_gradient(g_ptr, out_ptr, rows, n, m < last, K, GC, RELU)
        total = add_product(tl.trans(a), g, total, PRECISION)
        bias += g.to(tl.float32)
        if EXTRA > 0:
            g = load_gradient(g_ptr, out_ptr, rows, n_extra, m < last, K, GC, RELU)
            extra = add_product(tl.trans(a), g, extra, PRECISION)
            bias_extra += g.to(tl.float32)
    to = partial_ptr + (split * GROUPS + group).to(tl.int64) * (TERMS * K)
    rows = (t * K)[:, None]
    store_tile(to, rows + n[None, :], n, total, t < TERMS, K)
    bias_to = partial_bias_ptr + (split * GROUPS + group) * K
    tl.store(bias_to + n, tl.sum(bias, 0), mask=(n < K) & (tile == 0))
    if EXTRA > 0:
        store_tile(to, rows + n_extra[None, :], n_extra, extra, t < TERMS, K)
        tl.store(bias_to + n_extra, tl.sum(bias_extra, 0), mask=(n_extra < K) & (tile == 0))


# Adds the splits, BLOCK_S at a time. A program computes BLOCK elements of the weight [G K, C, R, S], by strides, or of
# the bias.
@triton.jit
def conv_add_splits_kernel(
    partial_ptr, out_ptr, count, splits, OK, OC, OR, OS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & (at < count)[None, :]
        sums += tl.load(partial_ptr + split.to(tl.int64)[:, None] * count + at[None, :], mask=mask, other=0)
    total = tl.sum(sums, 0)
    term = at // K
    r, s, c = split_term(term % (R * S * C), C, S)
    k = term // (R * S * C) * K + at % K
    to = k * OK + c * OC + r * OR + s * OS
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=at < count)


@triton_op
def conv2d_relu_backward_input(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    mask_input: bool,
    algorithm: int = 0,
) -> Tensor:
    check_algorithm("conv2d_relu_backward_input", algorithm)
    memory_format = memory_format_of(input)
    dx = contiguous_as(empty_like(input), memory_format)
    if dx.numel() == 0:
        return dx
    w = contiguous_as(weight, torch.channels_last)
    g = contiguous_as(grad, memory_format)
    out = g if output is None else contiguous_as(output, memory_format)
    gate = contiguous_as(input, memory_format) if mask_input else dx
    check_size(g, dx)
    tile, geometry = tile_of(g, _config.CONV_HALF), geometry_of(w, stride, padding, groups)
    column_tiles, constants = launch_constants(tile, geometry["C"])
    n, _, height, width = dx.shape
    pixels = n * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    grid = (triton.cdiv(pixels, tile.rows) * column_tiles * groups, stride[0] * stride[1])
    wrap_triton(conv_backward_input_kernel)[grid](
        g, out, w, gate, dx, n, height, width, *g.shape[2:], *layout_of(g), *pixel_strides(layout_of(dx)),
        column_tiles, groups,
        **geometry, RELU=output is not None, MASK=mask_input, PRECISION=precision_of(g.dtype),
        **constants,
    )  # fmt: skip
    return dx


@triton_op
def conv2d_relu_backward_weight(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    algorithm: int = 0,
) -> tuple[Tensor, Tensor]:
    check_algorithm("conv2d_relu_backward_weight", algorithm)
    dw, db = empty_like(weight), weight.new_empty(weight.shape[0])
    if dw.numel() == 0 or grad.numel() == 0:
        return dw.zero_(), db.zero_()
    x, memory_format = in_own_format(input)
    g = contiguous_as(grad, memory_format)
    out = g if output is None else contiguous_as(output, memory_format)
    check_size(x, g)
    tile, geometry = tile_of(g, _config.CONV_HALF_WEIGHT), geometry_of(weight, stride, padding, groups)
    column_tiles, constants = launch_constants(tile, geometry["K"])
    terms = geometry["C"] * geometry["R"] * geometry["S"]
    programs = triton.cdiv(terms, tile.rows) * column_tiles * groups
    count = g.shape[0] * g.shape[2] * g.shape[3]
    wanted = min(triton.cdiv(_config.CONV_SPLIT_PROGRAMS, programs), triton.cdiv(count, _config.CONV_SPLIT_PIXELS))
    split_pixels = triton.cdiv(triton.cdiv(count, wanted), tile.terms) * tile.terms
    splits = triton.cdiv(count, split_pixels)
    partial = torch.empty(splits, groups, terms, geometry["K"], dtype=torch.float32, device=g.device)
    partial_bias = torch.empty(splits, weight.shape[0], dtype=torch.float32, device=g.device)
    wrap_triton(conv_backward_weight_kernel)[(programs, splits)](
        x, g, out, partial, partial_bias, count, split_pixels, *x.shape[2:], *g.shape[2:],
        *layout_of(x), *pixel_strides(layout_of(g)), column_tiles, groups,
        **geometry, RELU=output is not None, PRECISION=precision_of(g.dtype),
        **constants,
    )  # fmt: skip
    weight_sizes = {name: geometry[name] for name in ("C", "K", "R", "S")}
    for parts, sum_of, strides, sizes in (
        (partial, dw, dw.stride(), weight_sizes),
        (partial_bias, db, (1, 0, 0, 0), {"C": 1, "K": weight.shape[0], "R": 1, "S": 1}),
    ):
        wrap_triton(conv_add_splits_kernel)[(triton.cdiv(sum_of.numel(), _config.CONV_ADD.block),)](
            parts, sum_of, sum_of.numel(), splits, *strides,
            **sizes, BLOCK_S=_config.CONV_ADD_SPLITS,
            BLOCK=_config.CONV_ADD.block, num_warps=_config.CONV_ADD.num_warps,
        )  # fmt: skip
    return dw, db
