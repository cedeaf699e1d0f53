"""The paper's data augmentation, and the statistics of a training set that it uses.

Krizhevsky et al. 2012, section 4.1: random crops and mirroring, and a shift of each image's colours along the
principal components of the training set's. What is drawn for an image is a function of (seed, epoch, the
image's index) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alexnet_kernels import ops, reference

__all__ = ["Crops", "PixelSums", "Statistics", "draws", "stored_size"]

COLOR_STD = 0.1


def stored_size(image_size: int) -> int:
    """Side of the stored squares that crops of `image_size` are taken from: 256 for the paper's 224 and Caffe's 227."""
    return 256 if image_size == 227 else round(image_size * 256 / 224)


@dataclass
class PixelSums:
    """Exact sums over images, which add up in any order to the same `Statistics`."""

    count: int
    """Images."""
    places: Tensor
    """float64 [S, S, 3], of the values at each place: whole numbers below 2^53."""
    products: Tensor
    """float64 [3, 3], of the products of channels over all pixels: whole numbers below 2^53."""

    @classmethod
    def of(cls, images: Tensor) -> PixelSums:
        """images: uint8 [N, S, S, 3]."""
        total = cls(0, torch.zeros(images.shape[1:], dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
        for part in images.split(64):
            values = part.double()
            pixels = values.reshape(-1, 3)
            total += cls(len(part), values.sum(0), pixels.T @ pixels)
        return total

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(self.count + other.count, self.places + other.places, self.products + other.products)

    def statistics(self) -> Statistics:
        """Of the images that were added; at least one."""
        pixels = self.count * self.places[..., 0].numel()
        mean = self.places.sum((0, 1)) / pixels
        covariance = self.products / pixels - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance / 255**2)
        # An eigenvector's sign is free; the draws are symmetric.
        components = (vectors * values.clamp(min=0) * 255).T.flip(0)
        std = covariance.diagonal().clamp(min=0).sqrt()
        image = (self.places / self.count).float().permute(2, 0, 1).contiguous()
        return Statistics(
            tuple(mean.tolist()), tuple(std.tolist()), tuple(tuple(row) for row in components.tolist()), image
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of a training set's pixels, in the images' units of 0..255."""

    mean: tuple[float, ...]
    """Of each channel."""
    std: tuple[float, ...]
    """Of each channel."""
    components: tuple[tuple[float, ...], ...]
    """Row i: the i-th principal component of the colours, times its eigenvalue. The eigenvalues are of the
    covariance of channels in 0..1, and brought back to 0..255: with the covariance of 0..255 the paper's
    shift of 0.1 eigenvalues would be some hundred times an image's range."""
    mean_image: Tensor
    """float32 [3, S, S], of each place of the stored squares."""

    @classmethod
    def of(cls, images: Tensor) -> Statistics:
        """images: uint8 [N, S, S, 3]."""
        return PixelSums.of(images).statistics()


def draws(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Eight numbers in [0, 1) for each image, float64 [N, 8], from int64 indices [N]."""
    places = indices.cpu()[:, None] * 8 + torch.arange(8)
    return reference.philox(seed, epoch, places).double() / 2**32


class Crops:
    """Makes a network's input of stored images.

    Images are uint8 [N, S, S, 3] on any device; results are float32 [N, 3, size, size], channels_last, on the
    images' device: crops, mirrored and coloured, less the mean, times scale.

    Args:
        size: side of the crops.
        statistics: of the training set.
        mean: "image", the training set's mean at each place of the stored square (the 2012 code's), or "channel".
        scale: [3], or None for 1.
        color_std: standard deviation of the random multiples of the colours' components; 0 shifts nothing.
        seed: of the random crops.
    """

    def __init__(
        self,
        size: int,
        statistics: Statistics,
        mean: str = "channel",
        scale: Tensor | None = None,
        color_std: float = COLOR_STD,
        seed: int = 0,
    ) -> None:
        self.size, self.seed, self.color_std = size, seed, color_std
        self.components = torch.tensor(statistics.components, dtype=torch.float64)
        self._mean = statistics.mean_image if mean == "image" else torch.tensor(statistics.mean)
        self._scale = scale

    def random(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Crops at random places, mirrored with probability 1/2, colours shifted.

        indices: int64 [N] on the CPU, the images' places in the training set.
        """
        u = draws(self.seed, epoch, indices)
        room = torch.tensor([images.shape[1] - self.size + 1, images.shape[2] - self.size + 1])
        crops = (u[:, :2] * room).long()
        flips = u[:, 2] < 0.5
        shift = None
        if self.color_std:
            # Box and Muller: two normal deviates of each two numbers, three of the four wanted.
            radius = (-2 * torch.log1p(-u[:, 4:6])).sqrt()
            angle = 2 * math.pi * u[:, 6:8]
            normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :3] * self.color_std
            shift = (normal @ self.components).float()
        return self._crop(images, crops, flips, shift)

    def centre(self, images: Tensor) -> Tensor:
        """The crops that networks are evaluated on."""
        return self._crop_at(images, ((images.shape[1] - self.size) // 2, (images.shape[2] - self.size) // 2), False)

    def ten(self, images: Tensor) -> list[Tensor]:
        """The paper's ten: four corners and centre, and their mirror images."""
        down, right = images.shape[1] - self.size, images.shape[2] - self.size
        places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        return [self._crop_at(images, place, flip) for place in places for flip in (False, True)]

    def _crop_at(self, images: Tensor, place: tuple[int, int], flip: bool) -> Tensor:
        count = len(images)
        return self._crop(images, torch.tensor(place).expand(count, 2), torch.full((count,), flip), None)

    def _crop(self, images: Tensor, crops: Tensor, flips: Tensor, shift: Tensor | None) -> Tensor:
        device = images.device
        self._mean = self._mean.to(device)
        self._scale = None if self._scale is None else self._scale.to(device)
        return ops.augment(
            images,
            crops.contiguous().to(device),
            (self.size, self.size),
            flips.to(device),
            None if shift is None else shift.to(device),
            self._mean,
            self._scale,
        )
