"""What weights expect of pixels: torchvision's, Caffe's, and those of the presets' initial values."""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_kernels.models.formats.caffe import MEAN
from alexnet_kernels.models.formats.file_weights import Preprocessing
from alexnet_kernels.models.presets import Preset

__all__ = ["CAFFE", "TORCHVISION", "normalized", "usual"]


def _channels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


TORCHVISION = Preprocessing(_channels(123.675, 116.28, 103.53), _channels(58.395, 57.12, 57.375), 256)
"""torchvision's AlexNet_Weights.IMAGENET1K_V1.transforms(): mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225 of
pixels in 0..1; the shorter side is 256 (bilinear, antialiased), of which the centre 224 x 224 is cut."""
CAFFE = Preprocessing(_channels(*MEAN), None, 256)
"""The mean of the pixels of Caffe's imagenet_mean.binaryproto, in RGB; not divided."""


def usual(preset: Preset) -> Preprocessing:
    """What weights of the preset usually expect: Caffe's for its networks and for initial values of std 0.01."""
    initialization = preset.initialization
    return TORCHVISION if initialization is None or initialization.weight_std is None else CAFFE


def normalized(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The network's input, float32 [N, 3, H, W], of pixels 0..255 of any dtype, [N, 3, H, W] in RGB.

    The images are resized and cut before. A mean image must have their size.
    """
    mean, std = preprocessing.mean.to(images.device), preprocessing.std
    x = images.float() - (mean if mean.dim() == 3 else mean[:, None, None])
    return x if std is None else x / std.to(images.device)[:, None, None]
