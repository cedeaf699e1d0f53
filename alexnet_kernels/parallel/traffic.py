"""The bytes that a training step sends, computed from the sizes of the layers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import LocalResponseNorm
from alexnet_kernels.parallel.collectives import shard_slice
from alexnet_kernels.parallel.plan import PLANS

__all__ = ["step_traffic"]


def step_traffic(
    model: AlexNet,
    plan: str,
    batch_size: int,
    data: int = 1,
    towers: int = 2,
    *,
    image_size: int | None = None,
    activation_bytes: int = 4,
    gather_logits: bool = True,
) -> dict[str, int]:
    """Bytes that one rank sends in a training step (forward and backward), by layer or purpose.

    Args:
        model: a model that is not split; its device may be "meta".
        plan: in `PLANS`.
        batch_size: images per step, over all ranks; a multiple of data * towers.
        data, towers: sizes of the mesh.
        image_size: height and width of the images; None for the preset's input size.
        activation_bytes: bytes per activation that is sent: 4, 8 (float64), or 2 (bfloat16 activations or traffic).
        gather_logits: as for `parallelize`.

    Activations are sent once in the forward pass, and their gradients once in the backward pass. An all-reduce
    counts as a ring's. Gradients of parameters have the parameters' dtype.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, not {plan!r}")
    rows = batch_size // data
    size = model.input_size if image_size is None else image_size
    sent: dict[str, int] = {}
    linears = [layer for layer in model.classifier.children() if isinstance(layer, nn.Linear)]
    if plan == "towers" and towers > 1:
        for name, elements in _between_towers(model, size, towers).items():
            sent[name] = 2 * rows * elements * activation_bytes
    if plan != "data" and towers > 1:
        for number, layer in enumerate(linears, 6):
            # In the hybrid plan fc6 receives all inputs of some images, otherwise some inputs of all images.
            sent[f"fc{number}"] = 2 * (towers - 1) * rows * layer.in_features // towers * activation_bytes
        each = shard_slice(linears[-1].out_features, 0, towers).stop
        if gather_logits and plan == "towers":
            sent["logits"] = (towers - 1) * rows * each * activation_bytes
        elif gather_logits:
            sent["logits"] = 2 * (towers - 1) * rows // towers * each * activation_bytes
        else:
            ring = 2 * (towers - 1) * rows * max(4, activation_bytes)
            sent["loss"] = ring // towers + 2 * ring // towers
            sent["labels"] = (towers - 1) * rows // towers * 8 if plan == "hybrid" else 0
    sent["gradients"] = sum(_gradients(model, plan, data, towers))
    return {name: count for name, count in sent.items() if count}


def _between_towers(model: AlexNet, size: int, towers: int) -> dict[str, int]:
    """Elements that a tower sends in the forward pass of one image."""
    elements: dict[str, int] = {}
    features = copy.deepcopy(model.features).to("meta").eval()
    weight = next(features.parameters())
    x = torch.empty(1, weight.shape[1], size, size, dtype=weight.dtype, device="meta")
    number = 0
    for child in features.children():
        if isinstance(child, nn.Conv2d):
            number += 1
            if number > 1 and child.groups == 1:
                elements[f"conv{number}"] = (towers - 1) * x[0].numel() // towers
        if isinstance(child, LocalResponseNorm) and child.groups == 1:
            elements[f"norm{number}"] = (towers - 1) * (child.size // 2) * x[0, 0].numel()
        x = child(x)
    return elements


def _gradients(model: AlexNet, plan: str, data: int, towers: int) -> list[int]:
    """Bytes that rank 0 sends in each parameter's all-reduce."""
    result = []
    for part, container in (("features", model.features), ("classifier", model.classifier)):
        for layer in container.modules():
            for param in layer.parameters(recurse=False):
                elements, ranks = param.numel(), data * towers
                if plan == "towers" or (plan == "hybrid" and part == "classifier"):
                    # Rank 0's shard is the largest.
                    elements, ranks = shard_slice(len(param), 0, towers).stop * param[0].numel(), data
                result.append(2 * (ranks - 1) * elements * param.element_size() // ranks)
    return result
