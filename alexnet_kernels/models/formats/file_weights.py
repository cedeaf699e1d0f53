"""What a file of weights holds, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alexnet_kernels.models.presets import Preset

__all__ = ["FileWeights", "Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """What the network's images were made of pixels 0..255, channels RGB: (pixel - mean) / std."""

    mean: Tensor
    """float32 [3], or [3, H, W] for a mean image."""
    std: Tensor | None = None
    """float32 [3]; None: not divided."""
    resize: int | None = None
    """Length of the images' shorter side before the centre is cut; None: unknown."""


@dataclass(frozen=True)
class FileWeights:
    """Tensors of a file and what the file says about their network."""

    format: str
    """Name of the format, for messages."""
    tensors: Mapping[str, Tensor]
    """By state_dict keys (features.0.weight), or by layers: conv1.weight, conv1.bias, ..., fc8.bias, and bn1.weight,
    bn1.bias, bn1.running_mean, bn1.running_var for batch normalisation after conv1."""
    preset: Preset | None = None
    """The network as the file defines it, with its own normalisation, pools and sizes; None if it has tensors alone."""
    channels: str = "RGB"
    """Order of conv1's inputs in the file: RGB or BGR. In `tensors` it is RGB, unless the reader was told otherwise."""
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    """Lines for the user: what was converted, left out or assumed."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of `AlexNet` that the file states: width, dropout, in_channels, conv1_padding."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What the file's writer added as text: an ONNX file's metadata_props."""
