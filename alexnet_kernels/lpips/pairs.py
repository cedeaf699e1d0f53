"""The distances of all pairs of images, by products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from alexnet_kernels.lpips.features import ImageFeatures
from alexnet_kernels.lpips.head import pixels

__all__ = ["Pairs"]

MOST_IMAGES = 64
"""That go through AlexNet together, where memory allows."""
ACTIVATIONS = 4
"""The memory that an image needs in AlexNet, times that of its features, at most."""
CANCELLED = 1e-2
"""Pairs whose distance is below this part of |a|^2 + |b|^2 are computed as differences."""
TERMS = 2**13
"""Of a sum in float32; the sums are added in float64."""
DIFFERENCES = 2**22
"""Elements of the differences of one layer that are in memory together."""

Operand = Tensor | ImageFeatures


class Pairs:
    """Distances by these features and linear weights.

    Args:
        features: of a batch of images.
        linear: five tensors [C].
        memory: bytes, about.
        exact: computes all pairs as differences.
    """

    def __init__(
        self, features: Callable[[Tensor], ImageFeatures], linear: list[Tensor], memory: float, exact: bool
    ) -> None:
        self.features, self.linear, self.memory, self.exact = features, linear, memory, exact
        self._image_bytes = 1

    def distances(self, x: Operand, y: Operand | None) -> Tensor:
        """[M, N] of x and y, or [M, M] of x."""
        others = x if y is None else y
        one = self._image_bytes = self._bytes(x)
        # Half of the memory is for x's features, a quarter each for y's and for what is computed.
        rows = max(1, int(self.memory / 2 / one))
        columns = rows if y is None and rows >= len(x) else max(1, int(self.memory / 4 / one))
        found = torch.zeros(len(x), len(others), dtype=self.linear[0].dtype, device=self.linear[0].device)
        for first in range(0, len(x), rows):
            a = self._take(x, first, first + rows)
            # Of images among themselves: the part itself, then what comes after it.
            if y is None:
                found[first : first + rows, first : first + rows] = self._block(a, a, itself=True)
            start = min(len(x), first + rows) if y is None else 0
            for begin in range(start, len(others), columns):
                end = begin + columns
                block = self._block(a, self._take(others, begin, end), itself=False)
                found[first : first + rows, begin:end] = block
                if y is None:
                    found[begin:end, first : first + rows] = block.T
        return found

    def _bytes(self, x: Operand) -> int:
        """Of the features of one image."""
        one = x[:1] if isinstance(x, ImageFeatures) else self.features(x[:1])
        return max(1, one.nbytes)

    def _take(self, x: Operand, first: int, end: int) -> ImageFeatures:
        """The features of some of the images."""
        if isinstance(x, ImageFeatures):
            return x[first:end]
        end = min(end, len(x))
        each = min(MOST_IMAGES, max(1, int(self.memory / 4 / ACTIVATIONS / self._image_bytes)))
        parts = [self.features(x[begin : min(end, begin + each)]) for begin in range(first, end, each)]
        if len(parts) == 1:
            return parts[0]
        layers = [[*part.layers] for part in parts]
        size = parts[0].size
        del parts
        # Releases each layer when its copy is made.
        whole = [torch.cat([each.pop(0) for each in layers]) for _ in self.linear]
        return ImageFeatures(tuple(whole), size)

    def _block(self, a: ImageFeatures, b: ImageFeatures, itself: bool) -> Tensor:
        if self.exact:
            pairs = torch.ones(len(a), len(b), dtype=torch.bool, device=a.layers[0].device)
            found = torch.zeros(pairs.shape, dtype=self.linear[0].dtype, device=pairs.device)
        else:
            found, scale = self._products(a, b)
            pairs = found < CANCELLED * scale
        if itself:
            pairs = pairs.triu(1)
        first, second = pairs.nonzero(as_tuple=True)
        found[first, second] = self._differences(a, b, first, second)
        if itself:
            found = found.triu(1)
            found = found + found.T
        return found

    def _products(self, a: ImageFeatures, b: ImageFeatures) -> tuple[Tensor, Tensor]:
        """The distances as |a|^2 + |b|^2 - 2 a b, and the sums of squares, both [M, N]."""
        found = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.layers[0].device)
        scale = torch.zeros_like(found)
        for x, y, weights in zip(a.layers, b.layers, self.linear, strict=True):
            x, y = pixels(x), pixels(y)
            weights = weights / x.shape[1]
            for part in _parts(x.shape[1], TERMS // x.shape[2]):
                # The distances do not change, and numbers become as small as the differences among the images.
                mean = y[:, part].mean(0, keepdim=True)
                if not mean.isfinite().all():  # NaN in one image is not in the others' distances
                    mean = y[:, part].nan_to_num().mean(0, keepdim=True)
                left, right = x[:, part] - mean, y[:, part] - mean
                squares = [self._squares(each, weights) for each in (left, right)]
                sums, sizes = (p[:, None] + q[None] for p, q in zip(*squares, strict=True))
                products = left.mul_(weights).flatten(1) @ right.flatten(1).T
                found.add_(sums).sub_(products, alpha=2)
                scale.add_(sizes)
        dtype = self.linear[0].dtype
        return found.to(dtype), scale.to(dtype)

    @staticmethod
    def _squares(maps: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums of squares of each image, and with the weights' absolute values: they may be negative."""
        sums = maps.square().sum(1) @ torch.stack([weights, weights.abs()], 1)
        return sums[:, 0], sums[:, 1]

    def _differences(self, a: ImageFeatures, b: ImageFeatures, first: Tensor, second: Tensor) -> Tensor:
        """The distances of pairs, by indices [K] of images of a and of b: [K]."""
        found = torch.zeros(len(first), dtype=self.linear[0].dtype, device=first.device)
        for x, y, weights in zip(a.layers, b.layers, self.linear, strict=True):
            x, y = pixels(x), pixels(y)
            for part in _parts(len(first), DIFFERENCES // max(1, x[0].numel())):
                squares = x[first[part]].sub_(y[second[part]]).square_()
                found[part] += (squares @ weights).mean(1)
        return found


def _parts(count: int, each: int) -> Iterator[slice]:
    each = max(1, each)
    for begin in range(0, count, each):
        yield slice(begin, min(count, begin + each))
