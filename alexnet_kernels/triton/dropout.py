"""Dropout whose mask is a function of a seed and each element's place.

See: alexnet_kernels/ops/dropout.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton._channels import Launch, is_channels_last
from alexnet_kernels.triton._common import in_own_format, triton_op, wrap_triton

PAIRS = Launch(block=128, num_warps=4)  # of quads: eight elements a thread, 16 bytes of half precision
ELEMENTS = Launch(block=512, num_warps=4)
SHORT_ROW = 256  # elements: a quarter of a program; shorter rows would leave most threads idle


def halves(value: int) -> tuple[int, int]:
    """A number of 64 bits as two of 32, which `whole` joins: torch 2.11 compiles no launch with a larger one."""
    return value // 2**32, value % 2**32 - 2**31


@triton.jit
def whole(high, low):
    return (tl.cast(high, tl.int64) << 32) + (tl.cast(low, tl.int64) + 2147483648)


@triton.jit
def words_of(seed, offset, quad):
    """The four random words of each quad (int64), as in csrc/common/philox.h."""
    stream = tl.zeros_like(quad) + offset
    low = (quad & 0xFFFFFFFF).to(tl.uint32)
    high = ((quad >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream_low = (stream & 0xFFFFFFFF).to(tl.uint32)
    stream_high = ((stream >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, stream_low, stream_high)


@triton.jit
def draw_pairs(seed, offset, quads):
    """The random words [P, 8], as int64, of pairs of quads [P, 2]."""
    a, b, c, d = words_of(seed, offset, quads)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(words, [words.shape[0], 8]).to(tl.int64)


@triton.jit
def drop(x, word, threshold, scale):
    return tl.where(word < threshold, 0.0, x * scale)


# A program: BLOCK pairs of quads of one row of `row` elements, whose first has index base + r * row_stride. A quad,
# four elements that share a draw, is one of the index: where a row does not begin with one, the first is partly
# another's. x, out: rows without gaps.
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
    place = ((start >> 2 << 2) - start) + (8 * pair)[:, None] + tl.arange(0, 8)[None, :]
    mask = (place >= 0) & (place < row)
    at = r * row + place
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)
    if DROP:
        words = draw_pairs(tl.load(seed_ptr), whole(offset_high, offset_low), quads)
        out = drop(x, words, whole(threshold_high, threshold_low), scale)
    else:
        out = x * scale
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


# A program: BLOCK elements, each with a draw of its own: short rows, and images in channels_last, [N, PIXELS, C] in
# memory, whose index counts row-major order.
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
    a, b, c, d = words_of(tl.load(seed_ptr), whole(offset_high, offset_low), index >> 2)
    which = index & 3
    word = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d)).to(tl.int64)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0, 0.0, x)
    out = drop(x, word, whole(threshold_high, threshold_low), scale)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def threshold_of(p: float) -> int:
    """Words below it drop their element."""
    return min(round(p * 2**32), 2**32)


def run(
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
    """out = dropout(x), or of max(0, x); both without gaps, of one layout."""
    numbers = (*halves(offset), *halves(threshold_of(p)))
    if channels_last or (row < SHORT_ROW and row_stride != row):
        channels, pixels = (x.shape[1], x.shape[2] * x.shape[3]) if channels_last else (1, 1)
        wrap_triton(dropout_elements_kernel)[(triton.cdiv(x.numel(), ELEMENTS.block),)](
            x, out, seed, *numbers, scale, row, row_stride, base, x.numel(), channels, pixels,
            CHANNELS_LAST=channels_last, RELU=relu, BLOCK=ELEMENTS.block, num_warps=ELEMENTS.num_warps,
        )  # fmt: skip
        return
    rows = x.numel() // row
    if row == row_stride:  # rows that follow one another are one
        row = row_stride = x.numel()
        rows = 1
    # A row that begins inside a quad may take a part of one quad more.
    blocks = triton.cdiv(triton.cdiv(row + 3, 8), PAIRS.block)
    wrap_triton(dropout_rows_kernel)[(rows * blocks,)](
        x, out, seed, *numbers, scale, row, row_stride, base, blocks,
        DROP=p > 0, RELU=relu, BLOCK=PAIRS.block, num_warps=PAIRS.num_warps,
    )  # fmt: skip


@triton_op
def dropout(
    input: Tensor, p: float, scale: float, seed: Tensor, offset: int, row: int, row_stride: int, base: int
) -> Tensor:
    x, memory_format = in_own_format(input)
    out = empty_like(x)
    if x.numel() == 0:
        return out
    run(x, out, p, scale, seed, offset, row, row_stride, base, channels_last=is_channels_last(memory_format))
    return out
