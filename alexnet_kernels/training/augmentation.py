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

__all__ = ["Statistics", "centre_crop", "draws", "random_crop", "store_size", "ten_crops"]

COLOR_STD = 0.1


def store_size(image_size: int) -> int:
    """Side of the stored squares that crops of `image_size` are taken from: 256 for the paper's 224."""
    return round(image_size * 256 / 224)


@dataclass(frozen=True)
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

    @classmethod
    def of(cls, images: Tensor) -> Statistics:
        """images: uint8 [N, H, W, 3]."""
        count, total = 0, torch.zeros(3, dtype=torch.float64)
        products = torch.zeros(3, 3, dtype=torch.float64)
        for part in images.split(256):
            pixels = part.reshape(-1, 3).double()
            count += len(pixels)
            total += pixels.sum(0)
            products += pixels.T @ pixels
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance / 255**2)
        # An eigenvector's sign is free; the draws are symmetric.
        components = (vectors * values.clamp(min=0) * 255).T.flip(0)
        std = covariance.diagonal().clamp(min=0).sqrt()
        return cls(tuple(mean.tolist()), tuple(std.tolist()), tuple(tuple(row) for row in components.tolist()))


def draws(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Eight numbers in [0, 1) for each image, float64 [N, 8], from int64 indices [N]."""
    places = indices.cpu()[:, None] * 8 + torch.arange(8)
    return reference.philox(seed, epoch, places).double() / 2**32


def random_crop(
    images: Tensor,
    indices: Tensor,
    size: int,
    *,
    seed: int,
    epoch: int,
    statistics: Statistics,
    scale: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crops at random places, mirrored with probability 1/2, colours shifted, mean subtracted, times scale.

    images uint8 [N, H, W, 3] on any device; indices int64 [N], the images' places in the training set; scale
    [3] or None. Returns [N, 3, size, size], channels_last, on the images' device.
    """
    u = draws(seed, epoch, indices)
    room = torch.tensor([images.shape[1] - size + 1, images.shape[2] - size + 1])
    crops = (u[:, :2] * room).long()
    flips = u[:, 2] < 0.5
    # Box and Muller: two normal deviates of each two numbers, three of the four wanted.
    radius = (-2 * torch.log1p(-u[:, 4:6])).sqrt()
    angle = 2 * math.pi * u[:, 6:8]
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :3] * COLOR_STD
    shift = normal @ torch.tensor(statistics.components, dtype=torch.float64)
    device = images.device
    return ops.augment(
        images,
        crops.to(device),
        (size, size),
        flips.to(device),
        shift.float().to(device),
        torch.tensor(statistics.mean, device=device),
        scale,
        dtype=dtype,
    )


def centre_crop(
    images: Tensor,
    size: int,
    statistics: Statistics,
    scale: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The crops that networks are evaluated on; arguments and result as of `random_crop`."""
    place = torch.tensor([(images.shape[1] - size) // 2, (images.shape[2] - size) // 2], device=images.device)
    return _crop(images, place, False, size, statistics, scale, dtype)


def ten_crops(
    images: Tensor,
    size: int,
    statistics: Statistics,
    scale: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The paper's ten: four corners and centre, and their mirror images; arguments as of `random_crop`."""
    down, right = images.shape[1] - size, images.shape[2] - size
    places = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    return [
        _crop(images, torch.tensor(place, device=images.device), flip, size, statistics, scale, dtype)
        for place in places
        for flip in (False, True)
    ]


def _crop(
    images: Tensor,
    place: Tensor,
    flip: bool,
    size: int,
    statistics: Statistics,
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    count, device = len(images), images.device
    flips = torch.full((count,), flip, device=device)
    mean = torch.tensor(statistics.mean, device=device)
    crops = place.expand(count, 2).contiguous()
    return ops.augment(images, crops, (size, size), flips, None, mean, scale, dtype=dtype)
