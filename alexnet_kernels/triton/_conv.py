"""What the convolution kernels share: tiles, the indices of the implicit matrix product, stores."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import Layout
from alexnet_kernels.triton._config import ProductTile


def check_algorithm(op: str, algorithm: int) -> None:
    if algorithm not in (0, 1):
        raise ValueError(f"{op}: the Triton kernels have algorithms 0 and 1 only, the same, not {algorithm}")


def tile_of(tensor: Tensor, half: ProductTile) -> ProductTile:
    """The tile for operands of this dtype and device; `half` for 16-bit dtypes where shared memory suffices."""
    if tensor.dtype == torch.float32:
        return _config.CONV_FLOAT
    return half if _shared_memory(tensor.device) >= _config.CONV_HALF_SHARED_BYTES else _config.CONV_HALF_SMALL


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can use; without a GPU, those of a data center GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return _config.CONV_HALF_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def columns_of(count: int, most: int) -> dict[str, int]:
    """The widths of a program's two tiles of columns, both powers of two; the second may be 0.

    A multiple of 96 columns takes 64 + 32 and one of 48 takes 32 + 16, if one power of two would leave lanes idle.
    """
    for width in (96, 48):
        if width <= most and count % width == 0 and count % (width // 3 * 4) != 0:
            return {"BLOCK_N": width // 3 * 2, "EXTRA": width // 3}
    return {"BLOCK_N": max(16, min(triton.next_power_of_2(count), most)), "EXTRA": 0}


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input precision: TF32 for float32 only where torch's own convolutions may use it."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" if dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else "ieee"


@triton.jit
def split_pixel(m, HEIGHT, WIDTH):
    """(image, row, column) of pixel m of the batch; the image is int64."""
    image = m // (HEIGHT * WIDTH)
    rest = m - image * (HEIGHT * WIDTH)
    row = rest // WIDTH
    return image.to(tl.int64), row, rest - row * WIDTH


@triton.jit
def split_term(t, CHANNELS: tl.constexpr, columns):
    """(row, column, channel) of term t; channels vary fastest."""
    tap = t // CHANNELS
    row = tap // columns
    return row, tap - row * columns, t - tap * CHANNELS


@triton.jit
def add_product(a, b, total, PRECISION: tl.constexpr):
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def store_tile(pointer, rows, n, total, row_mask, K):
    mask = row_mask[:, None] & (n < K)[None, :]
    tl.store(pointer + rows, total.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def extra_columns_of(column, BLOCK_N: tl.constexpr, EXTRA: tl.constexpr):
    return column * (BLOCK_N + EXTRA) + BLOCK_N + tl.arange(0, EXTRA)


def geometry_of(weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int) -> dict[str, int]:
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


def pixel_strides(layout: Layout) -> tuple[int, int, int]:
    """The strides of image, channel and pixel."""
    return layout.n, layout.c, layout.w


def launch_constants(tile: ProductTile, columns: int) -> tuple[int, dict[str, int]]:
    """Tiles along the `columns` of a product, and the kernel's constants of one tile."""
    widths = columns_of(columns, tile.columns)
    constants = {"BLOCK_M": tile.rows, **widths, "BLOCK_T": tile.terms}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return triton.cdiv(columns, sum(widths.values())), {**constants, **options}
