"""The paper's data augmentation, and the statistics of a training set that it uses.

Krizhevsky et al. 2012, section 4.1: random crops and mirroring, and a shift of each image's colours along the
principal components of the training set's colours. The random numbers of an image are a function of the seed, the
epoch and the image's index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.training.devices import send

__all__ = ["Crops", "PixelSums", "Statistics", "draws", "stored_size"]

COLOR_STD = 0.1
"""The paper's standard deviation of the colour components' random multiples."""


def stored_size(image_size: int) -> int:
    """Side of the stored squares for crops of `image_size`, in pixels: 256 for the paper's 224 and Caffe's 227."""
    return 256 if image_size == 227 else round(image_size * 256 / 224)


@dataclass
class PixelSums:
    """Exact sums over images. Added in any order, they give the same `Statistics`."""

    count: int
    """Number of images."""
    places: Tensor
    """float64 [S, S, 3], sums over images of each pixel: whole numbers below 2^53."""
    products: Tensor
    """float64 [3, 3], sums over all pixels of the products of two channels: whole numbers below 2^53."""

    @classmethod
    def of(cls, images: Tensor) -> PixelSums:
        """The sums of images, uint8 [N, S, S, 3]."""
        total = cls(0, torch.zeros(images.shape[1:], dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64))
        for part in images.split(64):
            values = part.double()
            pixels = values.reshape(-1, 3)
            total += cls(len(part), values.sum(0), pixels.T @ pixels)
        return total

    def __add__(self, other: PixelSums) -> PixelSums:
        return PixelSums(self.count + other.count, self.places + other.places, self.products + other.products)

    def statistics(self) -> Statistics:
        """Statistics of the images that were added, at least one."""
        pixels = self.count * self.places[..., 0].numel()
        mean = self.places.sum((0, 1)) / pixels
        covariance = self.products / pixels - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance / 255**2)
        # An eigenvector's sign is arbitrary, and the distribution of the shift is symmetric.
        components = (vectors * values.clamp(min=0) * 255).T.flip(0)
        std = covariance.diagonal().clamp(min=0).sqrt()
        image = (self.places / self.count).float().permute(2, 0, 1).contiguous()
        return Statistics(
            tuple(mean.tolist()), tuple(std.tolist()), tuple(tuple(row) for row in components.tolist()), image
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Pixel statistics of a training set, in units of 0..255."""

    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    components: tuple[tuple[float, ...], ...]
    """Row i: the i-th principal component of the colours, times its eigenvalue. The eigenvalues are those of channels
    in 0..1, scaled to 0..255. With the eigenvalues of channels in 0..255, the paper's shift of 0.1 eigenvalues would
    be about a hundred times the range of an image."""
    mean_image: Tensor
    """float32 [3, S, S], the mean of each pixel of the stored squares."""

    @classmethod
    def of(cls, images: Tensor) -> Statistics:
        """The statistics of images, uint8 [N, S, S, 3]."""
        return PixelSums.of(images).statistics()


def draws(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Eight random numbers in [0, 1) for each image, float64 [N, 8]; indices: int64 [N]."""
    places = indices.cpu()[:, None] * 8 + torch.arange(8)
    return reference.philox(seed, epoch, places).double() / 2**32


class Crops:
    """Converts stored images to a network's input.

    Images are uint8 [N, S, S, 3] on any device. Results are [N, 3, size, size], channels_last, on the images' device:
    crops, mirrored, with shifted colours, minus the mean, times the scale.

    Args:
        size: side of the crops, in pixels.
        statistics: of the training set.
        mean: "image" subtracts the mean of each pixel of the stored square, as the 2012 code; "channel" subtracts the
            mean of each channel.
        scale: float32 [3], or None for 1.
        color_std: standard deviation of the colour components' random multiples; 0 disables the shift.
        seed: seed of `random`.
        dtype: of the results, float32, bfloat16 or float16.
    """

    def __init__(
        self,
        size: int,
        statistics: Statistics,
        mean: str = "channel",
        scale: Tensor | None = None,
        color_std: float = COLOR_STD,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size, self.seed, self.color_std, self.dtype = size, seed, color_std, dtype
        self.components = torch.tensor(statistics.components, dtype=torch.float64)
        self._mean = statistics.mean_image if mean == "image" else torch.tensor(statistics.mean)
        self._scale = scale

    def random(self, images: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Crops at random positions, mirrored with probability 1/2, with shifted colours.

        indices: int64 [N] on the CPU, the images' indices in the training set.
        """
        return self.apply(images, *self.draw(images, indices, epoch))

    def draw(self, images: Tensor, indices: Tensor, epoch: int) -> list[Tensor]:
        """What `random` draws, on the CPU: crops int64 [N, 2], flips bool [N] and, if colours are shifted, shift
        float32 [N, 3].
        """
        u = draws(self.seed, epoch, indices)
        room = torch.tensor([images.shape[1] - self.size + 1, images.shape[2] - self.size + 1])
        crops = (u[:, :2] * room).long()
        flips = u[:, 2] < 0.5
        if not self.color_std:
            return [crops, flips]
        # Box-Muller: four normal deviates of four numbers, of which three are used.
        radius = (-2 * torch.log1p(-u[:, 4:6])).sqrt()
        angle = 2 * math.pi * u[:, 6:8]
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :3] * self.color_std
        return [crops, flips, (normal @ self.components).float()]

    def centre(self, images: Tensor) -> Tensor:
        """The centre crops, used for evaluation."""
        return self._crop_at(images, ((images.shape[1] - self.size) // 2, (images.shape[2] - self.size) // 2), False)

    def ten(self, images: Tensor) -> list[Tensor]:
        """The paper's ten crops: the four corners and the centre, and their mirror images."""
        down, right = images.shape[1] - self.size, images.shape[2] - self.size
        places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        return [self._crop_at(images, place, flip) for place in places for flip in (False, True)]

    def _crop_at(self, images: Tensor, place: tuple[int, int], flip: bool) -> Tensor:
        count = len(images)
        return self.apply(images, torch.tensor(place).expand(count, 2), torch.full((count,), flip))

    def apply(self, images: Tensor, crops: Tensor, flips: Tensor, shift: Tensor | None = None) -> Tensor:
        """Crops at the places, mirrored and shifted as `draw` says; these tensors are on any device."""
        device = images.device
        self._mean = self._mean.to(device)
        self._scale = None if self._scale is None else self._scale.to(device)
        return ops.augment(
            images,
            send(crops.contiguous(), device),
            (self.size, self.size),
            send(flips, device),
            None if shift is None else send(shift, device),
            self._mean,
            self._scale,
            dtype=self.dtype,
        )
