"""Vectors of channels: the tiles of the kernels that work on images pixel by pixel.

Images without gaps are an array of vectors of VEC consecutive channels of one pixel; VEC is 1 where channels are not
consecutive in memory. A thread loads its vector in one access, as a tuple of VEC values. Kernels whose windows reach
other channels load the halo, the few channels before and after the vector, one by one: sums over windows then need no
exchange between threads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels.triton import _config
from alexnet_kernels.triton._config import Launch


def vector_of(tensor: Tensor, channels_last: bool, group: int, most: int = 16) -> int:
    """Channels of a vector: 16 bytes, at most `most`; or 1, if the `group` channels of a tower are no multiple."""
    vector = min(16 // tensor.element_size(), most)
    return vector if channels_last and group % vector == 0 else 1


def launch_of(vector: int) -> Launch:
    return _config.SCALARS if vector == 1 else _config.VECTORS


def is_channels_last(memory_format: torch.memory_format) -> bool:
    return memory_format == torch.channels_last


@triton.jit
def locate(BLOCK: tl.constexpr, count, C: tl.constexpr, HEIGHT, WIDTH, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    """This program's vectors of images [N, C, HEIGHT, WIDTH]: (offset of the first in elements, mask, n, c, y, x).

    The mask tells the vectors from copies of the last one, which end the last program's block.
    n is int64 [BLOCK], the others int32 [BLOCK]; c is a vector's first channel.
    """
    first = (tl.program_id(0) + count * 0) * BLOCK  # 32 bits if `count` has no more
    per_image = tl.cast(HEIGHT * WIDTH * (C // VEC), tl.uint32)
    lanes = tl.arange(0, BLOCK)
    left = tl.minimum(count - first, BLOCK).to(tl.int32)
    mask = lanes < left
    lanes = tl.minimum(lanes, left - 1)
    if first.dtype == tl.int64:
        image = first // per_image.to(tl.int64)
        at = (first - image * per_image.to(tl.int64)).to(tl.uint32) + lanes.to(tl.uint32)
        n = image + (at // per_image).to(tl.int64)
    else:
        at = first.to(tl.uint32) + lanes.to(tl.uint32)
        n = (at // per_image).to(tl.int64)
    at = at % per_image
    if CHANNELS_LAST:
        c = at % (C // VEC) * VEC
        pixel = at // (C // VEC)
    else:
        c = at // tl.cast(HEIGHT * WIDTH, tl.uint32)
        pixel = at % tl.cast(HEIGHT * WIDTH, tl.uint32)
    width = tl.cast(WIDTH, tl.uint32)
    y = (pixel // width).to(tl.int32)
    x = (pixel % width).to(tl.int32)
    return first.to(tl.int64) * VEC, mask, n, c.to(tl.int32), y, x


@triton.jit
def offset_of(n, c, y, x, C: tl.constexpr, HEIGHT, WIDTH, CHANNELS_LAST: tl.constexpr):
    """The offset of an element in memory: int64, like n."""
    if CHANNELS_LAST:
        within = (y * WIDTH + x) * C + c
    else:
        within = (c * HEIGHT + y) * WIDTH + x
    return n * (C * HEIGHT * WIDTH) + within


@triton.jit
def to_float32(x):
    """x in float32, from whose bits LLVM doesn't infer bfloat16: it would compare pairs, and take them apart again."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def unzip(x, VEC: tl.constexpr):
    """[B, VEC] -> VEC tensors [B], whose elements stay in the thread that holds the vector."""
    if VEC == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], VEC // 2, 2]))
        evens = unzip(even, VEC // 2)
        odds = unzip(odd, VEC // 2)
        values = ()
        for i in tl.static_range(VEC // 2):
            values = values + (evens[i], odds[i])
        return values


@triton.jit
def zip_vector(values, VEC: tl.constexpr):
    """The inverse of unzip."""
    if VEC == 1:
        return tl.expand_dims(values[0], 1)
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(VEC // 2):
            evens = evens + (values[2 * i],)
            odds = odds + (values[2 * i + 1],)
        pairs = tl.join(zip_vector(evens, VEC // 2), zip_vector(odds, VEC // 2))
        return tl.reshape(pairs, [pairs.shape[0], VEC])


@triton.jit
def load_vectors(pointer, mask, VEC: tl.constexpr, DTYPE: tl.constexpr, OTHER: tl.constexpr):
    """VEC tensors [B] of the consecutive elements at `pointer` [B]."""
    at = pointer[:, None] + tl.arange(0, VEC)[None, :]
    if mask is None:
        vector = tl.load(at)
    else:
        vector = tl.load(at, mask=mask[:, None], other=OTHER)
    return unzip(vector.to(DTYPE), VEC)


@triton.jit
def load_channels(
    pointer, mask, c, low, high, stride, BEFORE: tl.constexpr, VEC: tl.constexpr, AFTER: tl.constexpr,
    DTYPE: tl.constexpr = tl.float32, OTHER: tl.constexpr = 0,
):  # fmt: skip
    """The vectors at `pointer` [B] with a halo of BEFORE and AFTER channels, as DTYPE; OTHER outside [low, high).

    Without a mask (None), every pointer is that of a vector. A halo is one access if it is no longer than a vector:
    groups are multiples of vectors.
    """
    values = ()
    if VEC > 1 and BEFORE > 0 and BEFORE <= VEC:
        inside = c > low if mask is None else mask & (c > low)
        WIDTH: tl.constexpr = triton.next_power_of_2(BEFORE)
        halo = load_vectors(pointer - WIDTH, inside, WIDTH, DTYPE, OTHER)
        for i in tl.static_range(WIDTH - BEFORE, WIDTH):
            values = values + (halo[i],)
    else:
        for i in tl.static_range(BEFORE):
            inside = c + (i - BEFORE) >= low
            value = tl.load(
                pointer + (i - BEFORE) * stride, mask=inside if mask is None else mask & inside, other=OTHER
            )
            values = values + (value.to(DTYPE),)
    values = values + load_vectors(pointer, mask, VEC, DTYPE, OTHER)
    if VEC > 1 and AFTER > 0 and AFTER <= VEC:
        inside = c + VEC < high if mask is None else mask & (c + VEC < high)
        halo = load_vectors(pointer + VEC, inside, triton.next_power_of_2(AFTER), DTYPE, OTHER)
        for i in tl.static_range(AFTER):
            values = values + (halo[i],)
    else:
        for i in tl.static_range(AFTER):
            inside = c + (VEC + i) < high
            value = tl.load(pointer + (VEC + i) * stride, mask=inside if mask is None else mask & inside, other=OTHER)
            values = values + (value.to(DTYPE),)
    return values


@triton.jit
def store_channels(pointer, values, mask, VEC: tl.constexpr):
    lane = tl.arange(0, VEC)
    vector = zip_vector(values, VEC).to(pointer.dtype.element_ty)
    tl.store(pointer[:, None] + lane[None, :], vector, mask=mask[:, None])
