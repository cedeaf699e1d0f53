"""What LPIPS does with features: unit length across channels, difference, weighted sum; and their gradients.

Maps are [N, P, C] here: N images of P pixels, C channels. What is computed of them is float32, or float64. A few images
at a time go through all passes, so that what lies between the passes stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["EPS", "distances", "gradient", "inverse_norms", "pixels", "unit", "unit_differentiable"]

EPS = 1e-10
"""lpips adds it to the norm of a pixel's features."""
CHUNK = 2**20
"""Bytes of one map that go through the passes together, at least one image."""


def pixels(maps: Tensor) -> Tensor:
    """[N, C, h, w] as [N, P, C], without a copy in channels_last."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def wide(maps: Tensor) -> Tensor:
    """The maps in the dtype of the head."""
    return maps if maps.dtype == torch.float64 else maps.float()


def chunks(maps: Tensor) -> Iterator[slice]:
    count = len(maps)
    each = max(1, CHUNK * count // max(1, 4 * maps.numel()))
    for first in range(0, count, each):
        yield slice(first, min(count, first + each))


def inverse_norms(maps: Tensor) -> Tensor:
    """1 / (norm + EPS) of each pixel, [N, P, 1]."""
    return torch.linalg.vector_norm(maps, dim=2, keepdim=True).add_(EPS).reciprocal_()


def unit(maps: Tensor) -> Tensor:
    """[N, C, h, w] of unit length across channels, without gradients."""
    found = torch.empty(maps.shape, dtype=wide(maps[:0]).dtype, device=maps.device, memory_format=torch.channels_last)
    for part in chunks(maps):
        each = wide(pixels(maps[part]))
        torch.mul(each, inverse_norms(each), out=pixels(found[part]))
    return found


def unit_differentiable(maps: Tensor) -> Tensor:
    """`unit` with derivatives of any order. Where all channels are zero they are finite, not 0 / 0."""
    maps = wide(maps)
    squares = maps.square().sum(1, keepdim=True)
    nonzero = squares > 0
    norms = torch.where(nonzero, torch.where(nonzero, squares, 1).sqrt(), 0)
    return maps / torch.where(nonzero, norms + EPS, 1)


def distances(a: Tensor, b: Tensor, weights: Tensor, unit_b: bool, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weighted sum of squared differences of each pixel, [N, P], and what `gradient` needs.

    Args:
        a, b: [N, P, C]; b may be of one image, for all of a.
        weights: [C].
        unit_b: b has unit length already.
        keep: returns the differences, [N, P, C], and the inverse norms of a and, if it had no unit length, of b.
    """
    count, size, _ = a.shape
    found = torch.empty(count, size, dtype=weights.dtype, device=a.device)
    kept: list[Tensor] = []
    if keep:
        differences = torch.empty(a.shape, dtype=weights.dtype, device=a.device)
        kept = [differences, *(differences.new_empty(count, size, 1) for _ in range(1 if unit_b else 2))]
    for part in chunks(a):
        first = wide(a[part])
        other = wide(b if len(b) == 1 else b[part])
        scale = inverse_norms(first)
        difference = torch.mul(first, scale, out=kept[0][part] if keep else None)
        if unit_b:
            difference.sub_(other)
        else:
            other_scale = inverse_norms(other)
            difference.addcmul_(other, other_scale, value=-1)
            if keep:
                kept[2][part] = other_scale
        if keep:
            kept[1][part] = scale
            difference = difference.square()
        else:
            difference.square_()
        torch.matmul(difference, weights, out=found[part])
    return found, tuple(kept)


def gradient(
    grad: Tensor, maps: Tensor, differences: Tensor, scales: Tensor, weights: Tensor, sign: int, out: Tensor, add: bool
) -> None:
    """Writes the gradient with respect to maps before their ReLU; with `add`, of `out` and this together.

    Args:
        grad: of the distances, [N, P] or [N, 1].
        maps: [N, P, C], what ReLU returned.
        differences, scales: kept by `distances`: the inverse norms are those of `maps`.
        sign: 1 for the first maps of the difference, -1 for the second.
        out: [N, P, C], in the dtype of `maps`.
    """
    for part in chunks(maps):
        values, scale = wide(maps[part]), scales[part]
        weighted = differences[part] * weights
        along = torch.mul(weighted, values).sum(2, keepdim=True)
        # The derivative of a / (|a| + EPS): what goes along a shrinks with its norm. No direction where a is 0.
        norms = scale.reciprocal().sub_(EPS)
        factor = scale * (2 * sign) * grad[part].unsqueeze(2)
        shrinkage = torch.where(norms > 0, along * scale / norms, 0)
        weighted.addcmul_(values, shrinkage, value=-1).mul_(factor)
        if add:
            weighted.add_(out[part])
        torch.ops.aten.threshold_backward.grad_input(weighted, values, 0, grad_input=weighted)
        out[part] = weighted
