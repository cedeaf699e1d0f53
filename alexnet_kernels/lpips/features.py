"""The features of images, kept to compare other images with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ImageFeatures"]


@dataclass(frozen=True)
class ImageFeatures:
    """What `LPIPS` compares: of N images, the maps of AlexNet's five ReLUs, each pixel of unit length across channels.

    `LPIPS.features` makes them. `LPIPS.forward` and `LPIPS.pairwise` take them in place of images. They hold for the
    metric that made them, or another with the same AlexNet.

    Attributes:
        layers: five tensors [N, C, h, w], channels_last; float32, or float64 from a metric in float64.
        size: (height, width) of the images, in pixels.
    """

    layers: tuple[Tensor, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.layers[0])

    def __getitem__(self, index: Any) -> ImageFeatures:
        """The features of some of the images: an int, a slice, a sequence of ints, or a tensor of ints or bools."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"image {index} of {len(self)}")
            index = slice(index, index + 1 or None)
        elif isinstance(index, Sequence):
            index = torch.as_tensor(index, device=self.layers[0].device)
        return ImageFeatures(tuple(layer[index] for layer in self.layers), self.size)

    @property
    def requires_grad(self) -> bool:
        return any(layer.requires_grad for layer in self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def detach(self) -> ImageFeatures:
        """The same features as constants."""
        return ImageFeatures(tuple(layer.detach() for layer in self.layers), self.size)

    def to(self, device: torch.device | str) -> ImageFeatures:
        return ImageFeatures(tuple(layer.to(device) for layer in self.layers), self.size)
