"""Dropout whose mask is a function of a seed and each element's index.

See: schema in csrc/library.cpp, csrc/cpu/dropout.cpp, csrc/cuda/dropout.cu, alexnet_kernels/triton/dropout.py,
reference.dropout, op_info/dropout.py, tests/ops/test_dropout.py.
Autocast: the input's dtype is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.layout import empty_like, in_format_of
from alexnet_kernels._dispatch.registration import register_op
from alexnet_kernels.backends import kernels_of, select

OP = "dropout"
Shard = tuple[int, int, int] | Sequence[tuple[int, int, int]]


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    seed: int | Tensor | None = None,
    offset: int = 0,
    *,
    scale_at: str = "training",
    shard: Shard | None = None,
    backend: str | None = None,
) -> Tensor:
    """Zeroes each element with probability p. No mask is stored: backward recomputes it.

    An element is dropped when its word of Philox4x32-10, keyed by the seed and counted by the offset and the element's
    index in row-major order, is below p * 2^32. The same seed and offset drop the same elements on every device, in
    every memory format and dtype, however the tensor is sharded or the work is split over threads.

    Args:
        input: any shape; float32, float64, bfloat16 or float16; any memory format.
        p: the probability of dropping.
        training: False passes the input through (scaled, with scale_at="inference").
        seed: 64 bits, an int or an int64 tensor of one element; None draws one from torch's generator. With None and
            backend "native", torch's own dropout draws the mask. A tensor on the input's device is read there, so that
            a CUDA graph follows its changes; the graph keeps the value that an int, or a tensor on the CPU, has now.
        offset: the number, 64 bits, of an independent stream of the seed (a layer's or a step's, say).
        scale_at: "training" multiplies what is kept by 1 / (1 - p) (inverted dropout); "inference" leaves training
            unscaled and multiplies by 1 - p otherwise, as the paper does.
        shard: (dim, start, size): input is [start, start + input.shape[dim]) along dim of a tensor of that size. Or two
            of them, one for dimension 0: of a batch that is split over rows and over columns.
        backend: see `alexnet_kernels.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: input isn't a floating-point tensor, or seed isn't an integer.
        ValueError: p outside [0, 1], an unknown scale_at, a shard outside its whole, a whole of 2^63 elements or more.

    Source: Krizhevsky et al. 2012, section 4.2; Salmon et al. 2011 (Philox).
    """
    checks.check_tensor(OP, "input", input)
    checks.check_floating(OP, "input", input)
    drop, scale = factor_of(OP, p, training, scale_at)
    shards = shards_of(OP, input.shape, shard)
    if drop == 0 and scale == 1:
        return input
    chosen = select(OP, input, backend)
    if chosen == "native":
        if drop == 0:
            return input * scale
        if seed is None and shard is None and scale_at == "training":
            return F.dropout(input, p, training)
        key = seed_tensor(OP, seed, input.device)
        places = [number for one in shards for number in one]
        keep = _keep(list(input.shape), drop, key, offset, places)
        output = torch.where(keep, input * scale, torch.zeros_like(input))
        return in_format_of(output, input)
    key = seed_tensor(OP, seed if drop > 0 else 0, input.device)
    return kernels_of(chosen).dropout(input, drop, scale, key, offset, *layout_of(input.shape, shards))


# An op of its own: compilers would inline the generator's arithmetic, which takes minutes.
@torch.library.custom_op("alexnet_kernels::dropout_keep", mutates_args=())
def _keep(shape: Sequence[int], p: float, seed: Tensor, offset: int, shard: Sequence[int]) -> Tensor:
    where = [(shard[i], shard[i + 1], shard[i + 2]) for i in range(0, len(shard), 3)]
    return reference.dropout_keep(shape, p, seed, offset, where, seed.device)


@_keep.register_fake
def _(shape: Sequence[int], p: float, seed: Tensor, offset: int, shard: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


def factor_of(op: str, p: float, training: bool, scale_at: str) -> tuple[float, float]:
    """The probability of dropping in this mode, and the factor of the elements that are kept."""
    checks.check_probability(op, p)
    if scale_at not in ("training", "inference"):
        raise ValueError(f"{op}: scale_at must be 'training' or 'inference', not {scale_at!r}")
    if scale_at == "inference":
        return (p, 1.0) if training else (0.0, 1.0 - p)
    return (p, 1.0 / (1.0 - p) if p < 1 else 1.0) if training else (0.0, 1.0)


def shards_of(op: str, shape: torch.Size, shard: Shard | None) -> list[tuple[int, int, int]]:
    """The shards, in ascending order of their dimensions, which are counted from 0."""
    if not shard:
        return []
    if not len(shape):
        raise ValueError(f"{op}: a tensor without dimensions has no shards")
    given: list[Any] = [shard] if isinstance(shard[0], int) else list(shard)
    shards: list[tuple[int, int, int]] = []
    for dim, start, size in given:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"{op}: shard {(dim, start, size)}: the tensor has dimensions 0 to {len(shape) - 1}")
        dim %= len(shape)
        if start < 0 or start + shape[dim] > size:
            raise ValueError(
                f"{op}: shard {(dim, start, size)}: [{start}, {start + shape[dim]}) is not inside [0, {size})"
            )
        shards.append((dim, start, size))
    shards.sort()
    dims = [dim for dim, _, _ in shards]
    if len(dims) > 2 or len(set(dims)) < len(dims) or (len(dims) == 2 and dims[0] != 0):
        raise ValueError(f"{op}: shard must be of one dimension, or of dimension 0 and another, not of {dims}")
    whole = list(shape)
    for dim, _, size in shards:
        whole[dim] = size
    if not torch.compiler.is_compiling() and math.prod(whole) >= 2**63:
        raise ValueError(f"{op}: shard {shard}: the whole tensor has 2^63 elements or more, which have no index")
    return shards


def layout_of(shape: torch.Size, shards: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """(row, row_stride, base): element i of row r of a tensor of this shape is number base + r * row_stride + i."""
    if not shards:
        count = math.prod(shape)
        return count, count, 0
    dim, start, size = shards[-1]
    inner = math.prod(shape[dim + 1 :])
    base = start * inner
    if len(shards) == 2:
        base += shards[0][1] * math.prod(shape[1:dim]) * size * inner
    return shape[dim] * inner, size * inner, base


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as an int64 tensor of one element on the device."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{op}: seed must be int64 with one element, not {seed.dtype} {list(seed.shape)}")
        if seed.device == device or seed.device.type != "cpu" or torch.compiler.is_compiling():
            return seed.to(device)
        seed = int(seed)  # becomes an argument of a launch: copying from the CPU's memory would wait for the device
    if not isinstance(seed, int) or isinstance(seed, bool):  # torch's fourth argument is inplace
        raise TypeError(f"{op}: seed must be an int, an int64 tensor or None, not {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"{op}: seed must fit 64 bits, not {seed}")
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _fake(input: Tensor, p: float, scale: float, seed: Tensor, *layout) -> Tensor:
    return empty_like(input)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.p, ctx.scale, seed, *ctx.layout = inputs
    ctx.save_for_backward(seed)


def _backward(kernels, ctx, grad: Tensor):
    (seed,) = ctx.saved_tensors
    return kernels.dropout(grad, ctx.p, ctx.scale, seed, *ctx.layout), *[None] * 7


register_op(OP, _fake, _backward, _setup_context)
