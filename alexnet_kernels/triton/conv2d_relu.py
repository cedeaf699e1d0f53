"""Convolution, bias and ReLU as implicit matrix products, and the rearrangement that conv1 goes through.

See: alexnet_kernels/ops/conv2d_relu.py.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like, memory_format_of
from alexnet_kernels.triton._channels import Launch
from alexnet_kernels.triton._common import check_size, contiguous_as, in_own_format, layout_of, triton_op, wrap_triton


@dataclass(frozen=True)
class Tile:
    """A program's part of a matrix product: rows, columns, and terms of a step of its sum."""

    rows: int
    columns: int  # at most
    terms: int
    num_warps: int
    num_stages: int


# 128 x 128 with 64 terms is what wgmma and mma.sync run near their peak on; three stages of it, with a mask's operand,
# take 112 kB of shared memory, which data center GPUs have. Unmeasured.
HALF = Tile(rows=128, columns=128, terms=64, num_warps=8, num_stages=3)
HALF_SHARED = 128 << 10
# The weight's gradient keeps a step of the output's gradient in registers too, masked and added up for the bias.
HALF_WEIGHT = Tile(rows=128, columns=128, terms=32, num_warps=8, num_stages=3)
# Fits the 64 kB of every other.
HALF_SMALL = Tile(rows=64, columns=64, terms=32, num_warps=4, num_stages=2)
# Without tensor cores the sum runs on FMAs, whose operands live in registers: larger tiles spill.
FLOAT = Tile(rows=64, columns=64, terms=16, num_warps=4, num_stages=2)
# The weight's gradient sums over all pixels: in as many parts as give a GPU of 132 processors four programs each, of
# 1024 pixels at least, so that writing and adding the parts stays cheap. Fixed, so that results repeat anywhere.
WGRAD_PROGRAMS = 528
WGRAD_PIXELS = 1024
ELEMENTS = Launch(block=1024, num_warps=4)  # of a rearrangement: eight a thread, 16 bytes of half precision
SPLITS = Launch(block=128, num_warps=4)  # few elements, for many programs, and many parts at a time, whose loads wait
SPLITS_AT_ONCE = 16  # together


def tile_of(tensor: Tensor, half: Tile = HALF) -> Tile:
    if tensor.dtype == torch.float32:
        return FLOAT
    return half if _shared_memory(tensor.device) >= HALF_SHARED else HALF_SMALL


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have; where there is no GPU to ask, those of a data center GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HALF_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def columns_of(count: int, most: int) -> dict[str, int]:
    """Widths of a program's two blocks of columns: 96 are 64 and 32, 192 are twice that, 48 are 32 and 16."""
    for width in (96, 48):
        if width <= most and count % width == 0 and count % (width // 3 * 4) != 0:
            return {"BLOCK_N": width // 3 * 2, "EXTRA": width // 3}
    return {"BLOCK_N": max(16, min(triton.next_power_of_2(count), most)), "EXTRA": 0}


def precision_of(dtype: torch.dtype) -> str:
    """float32 products are those that torch allows its own convolutions."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" if dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else "ieee"


@triton.jit
def split_pixel(m, HEIGHT, WIDTH):
    """Pixel m of the batch: (image, row, column)."""
    image = m // (HEIGHT * WIDTH)
    rest = m - image * (HEIGHT * WIDTH)
    row = rest // WIDTH
    return image.to(tl.int64), row, rest - row * WIDTH


@triton.jit
def split_term(t, CHANNELS: tl.constexpr, columns):
    """Term t of (row, column, channel), channels fastest."""
    tap = t // CHANNELS
    row = tap // columns
    return row, tap - row * columns, t - tap * CHANNELS


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def finish(total, b_ptr, n, K, group, HAS_BIAS: tl.constexpr, RELU: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(b_ptr + group * K + n, mask=n < K, other=0).to(tl.float32)[None, :]
    if RELU:
        total = tl.where(total < 0, 0.0, total)
    return total


@triton.jit
def store_tile(pointer, rows, n, total, row_mask, K):
    mask = row_mask[:, None] & (n < K)[None, :]
    tl.store(pointer + rows, total.to(pointer.dtype.element_ty), mask=mask)


# y[m, k] = max(0, bias[k] + sum_t x[m, t] w[k, t]), m over the pixels of the batch's outputs, t over the taps and the
# channels of one group, k over its filters. A program: BLOCK_M pixels by BLOCK_N + EXTRA filters.
# x [N, G C, H, W] by strides; w [G K, R, S, C]; y [N, G K, OH, OW], by the strides of image, pixel and channel.
@triton.jit
def conv_forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, count, H, W, OH, OW, XN, XC, XH, XW, YN, YC, YP, column_tiles, GROUPS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    # Programs of the same pixels follow one another: they share x in the cache.
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
        n_extra = n_extra_of(column, BLOCK_N, EXTRA)
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
    total = finish(total, b_ptr, n, K, group, HAS_BIAS, RELU)
    store_tile(to, rows + (n * YC)[None, :], n, total, m < count, K)
    if EXTRA > 0:
        extra = finish(extra, b_ptr, n_extra, K, group, HAS_BIAS, RELU)
        store_tile(to, rows + (n_extra * YC)[None, :], n_extra, extra, m < count, K)


@triton.jit
def n_extra_of(column, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr):
    return column * (BLOCK_N + EXTRA) + BLOCK_N + tl.arange(0, EXTRA)


# dx[m, c] = sum_t g[m, t] w[t, c], m over the input's pixels of one phase (row and column modulo the stride, which
# decide what taps reach them), t over those taps and the filters of one group, c over its channels. A program: BLOCK_M
# pixels by BLOCK_N + EXTRA channels. g, out [N, G K, OH, OW] by strides; w [G K, R, S, C]; dx by image, pixel, channel.
@triton.jit
def conv_backward_input_kernel(
    g_ptr, out_ptr, w_ptr, dx_ptr, N, H, W, OH, OW, GN, GC, GH, GW, XN, XC, XP, column_tiles, GROUPS,
    C: tl.constexpr, K: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
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
    else:  # r0 + i STRIDE_H < R, s0 + j STRIDE_W < S: none in some phases
        taps_w = (S - s0 + STRIDE_W - 1) // STRIDE_W
        terms = (R - r0 + STRIDE_H - 1) // STRIDE_H * taps_w * K
    base = image * GN + group * K * GC + p * GH + q * GW
    w_base = w_ptr + group * (K * R * S * C)
    n = column * (BLOCK_N + EXTRA) + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EXTRA > 0:
        n_extra = n_extra_of(column, BLOCK_N, EXTRA)
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
    rows = (image * XN + (y * W + x) * XP)[:, None]
    store_tile(to, rows + (n * XC)[None, :], n, total, m_mask, C)
    if EXTRA > 0:
        store_tile(to, rows + (n_extra * XC)[None, :], n_extra, extra, m_mask, C)


@triton.jit
def load_gradient(g_ptr, out_ptr, rows, n, mask, K, GC, RELU: tl.constexpr):
    at = rows[:, None] + (n * GC)[None, :]
    inside = mask[:, None] & (n < K)[None, :]
    g = tl.load(g_ptr + at, mask=inside, other=0)
    if RELU:
        out = tl.load(out_ptr + at, mask=inside, other=0).to(tl.float32)
        g = tl.where(out <= 0, 0.0, g.to(tl.float32)).to(g_ptr.dtype.element_ty)
    return g


# partial[split, t, k] = sum_m x[m, t] g[m, k], m over the pixels of one split, t over the taps and channels of one
# group, k over its filters; partial_bias[split, k] = sum_m g[m, k]. A program: BLOCK_M terms by BLOCK_N + EXTRA
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
        n_extra = n_extra_of(column, BLOCK_N, EXTRA)
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


# A program: BLOCK elements of the weight [G K, C, R, S], by strides, or of the bias. Adds the splits, BLOCK_S at
# a time.
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


@triton.jit
def image_part(tiles, BLOCK: tl.constexpr):
    """The program's image, and its elements' places in it: 32 bits divide several times as fast as 64."""
    program = tl.program_id(0)
    image = program // tiles
    return image.to(tl.int64), (program - image * tiles) * BLOCK + tl.arange(0, BLOCK)


# Space [N, C, H, W], by strides; depth [N, B B C, DH, DW], channels last: channel (i B + j) C + c of block (u, v) is
# pixel (u B + i - PAD_H, v B + j - PAD_W), or 0 where the image has no such pixel.
# A program: BLOCK elements of one image's blocks.
@triton.jit
def space_to_depth_kernel(
    space_ptr, depth_ptr, tiles, H, W, DH, DW, SN, SC, SH, SW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, at = image_part(tiles, BLOCK)
    size = DH * DW * (B * B * C)
    block = at // (B * B * C)
    i, j, c = split_term(at - block * (B * B * C), C, B)
    u = block // DW
    y = u * B + i - PAD_H
    x = (block - u * DW) * B + j - PAD_W
    inside = (at < size) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    value = tl.load(space_ptr + image * SN + (c * SC + y * SH + x * SW), mask=inside, other=0).to(tl.float32)
    tl.store(depth_ptr + image * size + at, value.to(depth_ptr.dtype.element_ty), mask=at < size)


# The reverse; pixels that no block holds are 0. A program: BLOCK elements of one image, channels last.
@triton.jit
def depth_to_space_kernel(
    depth_ptr, space_ptr, tiles, H, W, DH, DW,
    C: tl.constexpr, B: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, at = image_part(tiles, BLOCK)
    y, x, c = split_term(at, C, W)
    u = (y + PAD_H) // B
    v = (x + PAD_W) // B
    place = (u * DW + v) * (B * B * C) + ((y + PAD_H - u * B) * B + (x + PAD_W - v * B)) * C + c
    inside = (at < H * W * C) & (u < DH) & (v < DW)
    value = tl.load(depth_ptr + image * (DH * DW * (B * B * C)) + place, mask=inside, other=0).to(tl.float32)
    tl.store(space_ptr + image * (H * W * C) + at, value.to(space_ptr.dtype.element_ty), mask=at < H * W * C)


def _geometry(weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int) -> dict:
    """The compile-time constants of a convolution."""
    filters, channels, rows, columns = weight.shape
    return {
        "C": channels,
        "K": filters // groups,
        "R": rows,
        "S": columns,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
    }


def _by_pixels(layout) -> tuple[int, int, int]:
    """Strides of image, channel and pixel: rows follow one another."""
    return layout.n, layout.c, layout.w


@triton_op
def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    x, memory_format = in_own_format(input)
    w = contiguous_as(weight, torch.channels_last)
    (height, width), (rows, columns) = x.shape[2:], w.shape[2:]
    out_height = (height + 2 * padding[0] - rows) // stride[0] + 1
    out_width = (width + 2 * padding[1] - columns) // stride[1] + 1
    y = contiguous_as(empty_like(x, [x.shape[0], w.shape[0], out_height, out_width]), memory_format)
    if y.numel() == 0:
        return y
    check_size(x, y)
    tile, geometry = tile_of(x), _geometry(w, stride, padding, groups)
    blocks = columns_of(geometry["K"], tile.columns)
    column_tiles = triton.cdiv(geometry["K"], blocks["BLOCK_N"] + blocks["EXTRA"])
    count = x.shape[0] * out_height * out_width
    wrap_triton(conv_forward_kernel)[(triton.cdiv(count, tile.rows) * column_tiles * groups,)](
        x, w, w if bias is None else bias.contiguous(), y, count, height, width, out_height, out_width,
        *layout_of(x), *_by_pixels(layout_of(y)), column_tiles, groups,
        **geometry, HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision_of(x.dtype),
        BLOCK_M=tile.rows, **blocks, BLOCK_T=tile.terms, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


@triton_op
def conv2d_relu_backward_input(
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    memory_format = memory_format_of(input)
    dx = contiguous_as(empty_like(input), memory_format)
    if dx.numel() == 0:
        return dx
    w = contiguous_as(weight, torch.channels_last)
    g = contiguous_as(grad, memory_format)
    out = g if output is None else contiguous_as(output, memory_format)
    check_size(g, dx)
    tile, geometry = tile_of(g), _geometry(w, stride, padding, groups)
    blocks = columns_of(geometry["C"], tile.columns)
    column_tiles = triton.cdiv(geometry["C"], blocks["BLOCK_N"] + blocks["EXTRA"])
    n, _, height, width = dx.shape
    pixels = n * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    grid = (triton.cdiv(pixels, tile.rows) * column_tiles * groups, stride[0] * stride[1])
    wrap_triton(conv_backward_input_kernel)[grid](
        g, out, w, dx, n, height, width, *g.shape[2:], *layout_of(g), *_by_pixels(layout_of(dx)), column_tiles, groups,
        **geometry, RELU=output is not None, PRECISION=precision_of(g.dtype),
        BLOCK_M=tile.rows, **blocks, BLOCK_T=tile.terms, num_warps=tile.num_warps, num_stages=tile.num_stages,
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
) -> tuple[Tensor, Tensor]:
    dw, db = empty_like(weight), weight.new_empty(weight.shape[0])
    if dw.numel() == 0 or grad.numel() == 0:
        return dw.zero_(), db.zero_()
    x, memory_format = in_own_format(input)
    g = contiguous_as(grad, memory_format)
    out = g if output is None else contiguous_as(output, memory_format)
    check_size(x, g)
    tile, geometry = tile_of(g, HALF_WEIGHT), _geometry(weight, stride, padding, groups)
    blocks = columns_of(geometry["K"], tile.columns)
    column_tiles = triton.cdiv(geometry["K"], blocks["BLOCK_N"] + blocks["EXTRA"])
    terms = geometry["C"] * geometry["R"] * geometry["S"]
    programs = triton.cdiv(terms, tile.rows) * column_tiles * groups
    count = g.shape[0] * g.shape[2] * g.shape[3]
    wanted = min(triton.cdiv(WGRAD_PROGRAMS, programs), triton.cdiv(count, WGRAD_PIXELS))
    split_pixels = triton.cdiv(triton.cdiv(count, wanted), tile.terms) * tile.terms
    splits = triton.cdiv(count, split_pixels)
    partial = torch.empty(splits, groups, terms, geometry["K"], dtype=torch.float32, device=g.device)
    partial_bias = torch.empty(splits, weight.shape[0], dtype=torch.float32, device=g.device)
    wrap_triton(conv_backward_weight_kernel)[(programs, splits)](
        x, g, out, partial, partial_bias, count, split_pixels, *x.shape[2:], *g.shape[2:],
        *layout_of(x), *_by_pixels(layout_of(g)), column_tiles, groups,
        **geometry, RELU=output is not None, PRECISION=precision_of(g.dtype),
        BLOCK_M=tile.rows, **blocks, BLOCK_T=tile.terms, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sizes = {name: geometry[name] for name in ("C", "K", "R", "S")}
    for parts, sum_of, strides, constants in (
        (partial, dw, dw.stride(), sizes),
        (partial_bias, db, (1, 0, 0, 0), {"C": 1, "K": weight.shape[0], "R": 1, "S": 1}),
    ):
        wrap_triton(conv_add_splits_kernel)[(triton.cdiv(sum_of.numel(), SPLITS.block),)](
            parts, sum_of, sum_of.numel(), splits, *strides,
            **constants, BLOCK_S=SPLITS_AT_ONCE, BLOCK=SPLITS.block, num_warps=SPLITS.num_warps,
        )  # fmt: skip
    return dw, db


@triton_op
def space_to_depth(
    input: Tensor, block: int, padding: Sequence[int], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    space, _ = in_own_format(input)
    n, channels = space.shape[:2]
    shape = [n, block * block * channels, *size]
    depth = torch.empty(shape, dtype=dtype, device=space.device, memory_format=torch.channels_last)
    if depth.numel() == 0:
        return depth
    check_size(depth)
    tiles = triton.cdiv(shape[1] * shape[2] * shape[3], ELEMENTS.block)
    wrap_triton(space_to_depth_kernel)[(n * tiles,)](
        space, depth, tiles, *space.shape[2:], *size, *layout_of(space),
        C=channels, B=block, PAD_H=padding[0], PAD_W=padding[1],
        BLOCK=ELEMENTS.block, num_warps=ELEMENTS.num_warps,
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
    tiles = triton.cdiv(channels * size[0] * size[1], ELEMENTS.block)
    wrap_triton(depth_to_space_kernel)[(n * tiles,)](
        depth, space, tiles, *size, *depth.shape[2:],
        C=channels, B=block, PAD_H=padding[0], PAD_W=padding[1],
        BLOCK=ELEMENTS.block, num_warps=ELEMENTS.num_warps,
    )  # fmt: skip
    return space
