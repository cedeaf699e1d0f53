"""Activations of images that are in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels._errors import InputError
from alexnet_kernels.features.layers import Stages, find_layers
from alexnet_kernels.training.checkpoint import Network
from alexnet_kernels.training.precision import InPrecision

__all__ = ["evaluating", "extract", "stages_of"]


@torch.no_grad()
def extract(
    network: Network | nn.Module,
    images: Tensor,
    layers: Sequence[str],
    *,
    pool: str = "none",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Activations of layers, by name, on the CPU.

    Args:
        network: a `Network` of `load_network`, which computes in its run's precision; or an AlexNet,
            this package's or torchvision's, which is put into evaluation mode for the call.
        images: what the model takes, floating-point [N, C, H, W]. A `Network` also takes its stored squares, uint8
            [N, S, S, 3] of values 0..255, and uses their centre crops. Batches are copied to the model's device.
        layers: names such as conv1, relu1, pool5, fc6 (see `layers_of`), or modules' names, such as features.0.
        pool: "none" keeps maps, [N, C, H, W]; "mean" and "max" give [N, C].
        dtype: of the results, float32, float16, bfloat16 or float64. Values that float16 can't hold become infinite.
        batch_size: images that are computed at a time.

    Raises:
        InputError: unknown layers, or images of another dtype or shape. The model's own errors.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise InputError(f"images must be a tensor of four dimensions, got {getattr(images, 'shape', type(images))}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise InputError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    model = network.model if isinstance(network, Network) else network
    if images.dtype == torch.uint8 and not isinstance(network, Network):
        raise InputError("images of uint8 need a Network of load_network, which knows the pixels' mean and scale")
    found = find_layers(model, layers)
    device = next(model.parameters()).device
    results: dict[str, list[Tensor]] = {layer.name: [] for layer in found}
    with evaluating(model):
        stages = stages_of(network, found, pool)
        for part in images.split(batch_size):
            x = part.to(device)
            if isinstance(network, Network) and x.dtype == torch.uint8:
                x = network.crops.centre(x)
            for layer, output in zip(found, stages(x), strict=True):
                results[layer.name].append(output.to("cpu", dtype, memory_format=torch.contiguous_format))
    return {name: torch.cat(parts) if len(parts) != 1 else parts[0] for name, parts in results.items()}


def stages_of(network: Network | nn.Module, layers: Sequence[Any], pool: str) -> nn.Module:
    """`Stages` of the network, in its run's precision."""
    if isinstance(network, Network):
        return InPrecision(Stages(network.model, layers, pool), network.header.settings.precision)
    return Stages(network, layers, pool)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
