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

    n is int64 [BLOCK], the others int32 [BLOCK]; c is a vector's first channel.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    per_image = HEIGHT * WIDTH * (C // VEC)
    image = first // per_image
    at = (first - image * per_image).to(tl.int32) + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < tl.minimum(count - first, BLOCK).to(tl.int32)
    n = image + at // per_image
    at = at % per_image
    if CHANNELS_LAST:
        c = at % (C // VEC) * VEC
        pixel = at // (C // VEC)
    else:
        c = at // (HEIGHT * WIDTH)
        pixel = at % (HEIGHT * WIDTH)
    return first * VEC, mask, n, c, pixel // WIDTH, pixel % WIDTH


@triton.jit
def offset_of(n, c, y, x, C: tl.constexpr, HEIGHT, WIDTH, CHANNELS_LAST: tl.constexpr):
    """The offset of an element in memory: int64, like n."""
    if CHANNELS_LAST:
        within = (y * WIDTH + x) * C + c
    else:
        within = (c * HEIGHT + y) * WIDTH + x
    return n * (C * HEIGHT * WIDTH) + within


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
def load_channels(pointer, mask, c, low, high, stride, BEFORE: tl.constexpr, VEC: tl.constexpr, AFTER: tl.constexpr):
    """The vectors at `pointer` [B] with a halo of BEFORE and AFTER channels, in float32; 0 outside [low, high)."""
    lane = tl.arange(0, VEC)
    vector = tl.load(pointer[:, None] + lane[None, :], mask=mask[:, None], other=0)
    values = ()
    for i in tl.static_range(BEFORE):
        inside = mask & (c + (i - BEFORE) >= low)
        value = tl.load(pointer + (i - BEFORE) * stride, mask=inside, other=0)
        values = values + (value.to(tl.float32),)
    values = values + unzip(vector.to(tl.float32), VEC)
    for i in tl.static_range(AFTER):
        inside = mask & (c + (VEC + i) < high)
        value = tl.load(pointer + (VEC + i) * stride, mask=inside, other=0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def store_channels(pointer, values, mask, VEC: tl.constexpr):
    lane = tl.arange(0, VEC)
    vector = zip_vector(values, VEC).to(pointer.dtype.element_ty)
    tl.store(pointer[:, None] + lane[None, :], vector, mask=mask[:, None])
