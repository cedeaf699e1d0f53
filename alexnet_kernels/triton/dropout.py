"""Dropout whose mask is a function of a seed and each element's index in row-major order.

See: alexnet_kernels/ops/dropout.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import is_channels_last
from alexnet_kernels.triton._common import in_own_format, triton_op, wrap_triton


def split_int64(value: int) -> tuple[int, int]:
    """The high and low half of an int64, for join_int64: torch 2.11 compiles no launch with 64-bit arguments."""
    return value // 2**32, value % 2**32 - 2**31


@triton.jit
def join_int64(high, low):
    return (tl.cast(high, tl.int64) << 32) + (tl.cast(low, tl.int64) + 2147483648)


@triton.jit
def philox_words(seed, offset, quad):
    """The four Philox words of each quad (int64), as in csrc/common/philox.h."""
    stream = tl.zeros_like(quad) + offset
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = ((quad >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream_low = (stream & 0xFFFFFFFF).to(tl.uint32)
    stream_high = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, stream_low, stream_high)


@triton.jit
def philox_pairs(seed, offset, quads):
    """The Philox words [P, 8], as int64, of pairs of quads [P, 2]."""
    a, b, c, d = philox_words(seed, offset, quads)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(words, [words.shape[0], 8]).to(tl.int64)


@triton.jit
def drop(x, word, threshold, scale):
    return tl.where(word < threshold, 0.0, x * scale)


# A program computes BLOCK pairs of quads of one row, of `row` elements with indices from base + r * row_stride on. A
# quad is four elements that share a Philox call, with indices from a multiple of 4 on: the first and last quad of a row
# may extend beyond it. x, out: rows without gaps.
@triton.jit
def dropout_rows_kernel(
    x_ptr, out_ptr, seed_ptr, offset_high, offset_low, threshold_high, threshold_low, scale, row, row_stride, base,
    blocks,
    DROP: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    r = program // blocks
    start = base + r * row_stride
    pair = (program - r * blocks) * BLOCK + tl.arange(0, BLOCK)
    quads = (start >> 2) + (2 * pair)[:, None] + tl.arange(0, 2)[None, :]
    column = ((start >> 2 << 2) - start) + (8 * pair)[:, None] + tl.arange(0, 8)[None, :]
    mask = (column >= 0) & (column < row)
    at = r * row + column
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)
    if DROP:
        words = philox_pairs(tl.load(seed_ptr), join_int64(offset_high, offset_low), quads)
        out = drop(x, words, join_int64(threshold_high, threshold_low), scale)
    else:
        out = x * scale
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


# A program computes BLOCK elements with a Philox call for each: short rows, and images in channels_last, [N, PIXELS, C]
# in memory, whose indices are those of row-major order.
@triton.jit
def dropout_elements_kernel(
    x_ptr, out_ptr, seed_ptr, offset_high, offset_low, threshold_high, threshold_low, scale, row, row_stride, base,
    count, C, PIXELS,
    CHANNELS_LAST: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    logical = at
    if CHANNELS_LAST:
        pixel = at // C
        n = pixel // PIXELS
        logical = (n * C + (at - pixel * C)) * PIXELS + (pixel - n * PIXELS)
    r = logical // row
    index = base + r * row_stride + (logical - r * row)
    a, b, c, d = philox_words(tl.load(seed_ptr), join_int64(offset_high, offset_low), index >> 2)
    word_index = index & 3
    word = tl.where(word_index < 2, tl.where(word_index == 0, a, b), tl.where(word_index == 2, c, d)).to(tl.int64)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)
    out = drop(x, word, join_int64(threshold_high, threshold_low), scale)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def threshold_of(p: float) -> int:
    """The threshold below which a word drops its element."""
    return min(round(p * 2**32), 2**32)


def launch_dropout(
    x: Tensor,
    out: Tensor,
    p: float,
    scale: float,
    seed: Tensor,
    offset: int,
    row: int,
    row_stride: int,
    base: int,
    channels_last: bool = False,
    relu: bool = False,
) -> None:
    """Launches out = dropout(x), or dropout(relu(x)); both have the same layout without gaps."""
    numbers = (*split_int64(offset), *split_int64(threshold_of(p)))
    pairs, elements = _config.DROPOUT_PAIRS, _config.DROPOUT_ELEMENTS
    if channels_last or (row < _config.DROPOUT_SHORT_ROW and row_stride != row):
        channels, pixels = (x.shape[1], x.shape[2] * x.shape[3]) if channels_last else (1, 1)
        wrap_triton(dropout_elements_kernel)[(triton.cdiv(x.numel(), elements.block),)](
            x, out, seed, *numbers, scale, row, row_stride, base, x.numel(), channels, pixels,
            CHANNELS_LAST=channels_last, RELU=relu, BLOCK=elements.block, num_warps=elements.num_warps,
        )  # fmt: skip
        return
    rows = x.numel() // row
    if row == row_stride:  # rows with consecutive indices are one row
        row = row_stride = x.numel()
        rows = 1
    # A row that begins inside a quad extends over up to three more elements of quads.
    blocks = triton.cdiv(triton.cdiv(row + 3, 8), pairs.block)
    wrap_triton(dropout_rows_kernel)[(rows * blocks,)](
        x, out, seed, *numbers, scale, row, row_stride, base, blocks,
        DROP=p > 0, RELU=relu, BLOCK=pairs.block, num_warps=pairs.num_warps,
    )  # fmt: skip


@triton_op
def dropout(
    input: Tensor, p: float, scale: float, seed: Tensor, offset: int, row: int, row_stride: int, base: int
) -> Tensor:
    x, memory_format = in_own_format(input)
    out = empty_like(x)
    if x.numel() == 0:
        return out
    launch_dropout(x, out, p, scale, seed, offset, row, row_stride, base, channels_last=is_channels_last(memory_format))
    return out
