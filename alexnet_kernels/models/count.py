"""Counts of a model's parameters and multiply-adds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LayerCount", "count_layers", "count_macs", "count_parameters"]


@dataclass(frozen=True)
class LayerCount:
    """A convolution or fully-connected layer, with its counts for one image."""

    name: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    """Without the batch dimension."""
    parameters: int
    macs: int
    """Multiply-adds of the weight. The bias is not counted."""


def count_layers(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> list[LayerCount]:
    """The Conv2d and Linear layers in the order in which an image passes them.

    Only shapes are computed, on the meta device, and `model` is unchanged. input_size: side of the image, or (height,
    width); defaults to `model.input_size`. The number of channels is that of the first convolution.

    Raises ValueError for a model without a Conv2d, or without an input_size if none is given.
    """
    if input_size is None:
        input_size = getattr(model, "input_size", None)
        if input_size is None:
            raise ValueError(f"{type(model).__name__} has no input_size: pass one")
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    tensors = [*model.parameters(), *model.buffers()]
    memo = {id(t): nn.Parameter(t.to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta") for t in tensors}
    skeleton = copy.deepcopy(model, memo).eval()
    first = next((m for m in skeleton.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d to take an image")
    counts: list[LayerCount] = []

    def record(name: str) -> Any:
        def hook(layer: Any, _: Any, output: Tensor) -> None:
            weight = layer.weight
            outputs = output[0].numel()
            counts.append(
                LayerCount(
                    name,
                    tuple(weight.shape),
                    tuple(output.shape[1:]),
                    sum(p.numel() for p in layer.parameters()),
                    outputs * weight[0].numel(),
                )
            )

        return hook

    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(record(name))
    with torch.no_grad():
        skeleton(torch.empty(1, first.in_channels, height, width, dtype=first.weight.dtype, device="meta"))
    return counts


def count_parameters(model: nn.Module) -> int:
    """Number of elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-adds of the convolutions and fully-connected layers for one image. Arguments as of `count_layers`."""
    return sum(layer.macs for layer in count_layers(model, input_size))
