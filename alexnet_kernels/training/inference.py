"""Accuracy, predictions and features of a trained network."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.capture import CapturedForward
from alexnet_kernels.training import datasets, decoding, image_set
from alexnet_kernels.training.checkpoint import Network
from alexnet_kernels.training.precision import InPrecision
from alexnet_kernels.training.reading import USUAL, Reading

__all__ = [
    "centre",
    "evaluate",
    "features",
    "likeliest",
    "predict",
    "probabilities",
    "read",
]

_BATCH = 100
_LOG = logging.getLogger(__name__)


@torch.no_grad()
def probabilities(
    network: Network, pixels: Tensor, crops: int = 1, forward: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Softmax of each image, float32 [N, classes] on the CPU; with crops=10, the mean over the paper's ten crops.

    pixels: uint8 [N, S, S, 3], squares of the network's stored size. forward: what runs the network in its run's
    precision, such as a `CapturedForward` of it; None for the network itself.
    """
    device = next(network.model.parameters()).device
    forward = _in_precision(network) if forward is None else forward
    pixels = pixels.to(device)
    inputs = network.crops.ten(pixels) if crops == 10 else [network.crops.centre(pixels)]
    total = torch.zeros(len(pixels), len(network.header.classes), device=device)
    for x in inputs:
        total += forward(x).float().softmax(1)
    return (total / len(inputs)).cpu()


@torch.no_grad()
def features(network: Network, pixels: Tensor) -> Tensor:
    """Inputs of the last layer for each image, float32 [N, F] on the CPU: the 4096 neurons of fc7 at width 1.

    The nonlinearity is applied and, in presets that scale at evaluation, dropout's factor. pixels: uint8
    [N, S, S, 3], squares of the network's stored size. The centre crop is used.
    """
    device = next(network.model.parameters()).device
    last = [layer for layer in network.model.classifier.children() if isinstance(layer, torch.nn.Linear)][-1]
    result, forward = [torch.empty(0, last.in_features)], _in_precision(network)
    hook = last.register_forward_pre_hook(lambda layer, inputs: result.append(inputs[0].float().cpu()))
    try:
        for part in pixels.split(_BATCH):
            forward(network.crops.centre(part.to(device)))
    finally:
        hook.remove()
    return torch.cat(result)


def _in_precision(network: Network) -> InPrecision:
    return InPrecision(network.model, network.header.settings.precision)


def centre(pixels: Tensor, size: int) -> Tensor:
    """The centres of stored squares, [N, size, size, 3]: the pixels of the crops that are evaluated."""
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def evaluate(
    network: Network,
    data: str | Path | None = None,
    *,
    crops: int = 1,
    batch_size: int = _BATCH,
    bad_images: str = "refuse",
    reading: Reading = USUAL,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on the val split of an image set.

    Args:
        network: the network.
        data: a folder or zip, as of `open_data`; None for the package's images.
        crops: 1 (the centre) or 10.
        batch_size: images per batch.
        bad_images: "refuse" unreadable images with an error, or "skip" them.
        reading: the name of the split, the labels of a flat one; with empty_classes "skip" it may lack classes.
        progress: called with the number of images done since its last call.

    Returns:
        top1, top5: accuracies from 0 to 1. images: images evaluated. seconds. skipped: unreadable files. ignored: how
        many files are not taken for images. notes: how the split was found, if a user should know. confusion: list
        [true class][predicted class] of numbers of images. per_class: {images, top1, top5} for each class's name, with
        None for the accuracies of a class without images. by_order: True if the set's class names are others, and the
        network, which was trained elsewhere, is taken to number the classes in their order.

    Raises:
        InputError: unreadable images, or images of other classes or another size than the network's.
    """
    # torchmetrics is needed only here.
    from alexnet_kernels.training.metrics import accuracies, confusion

    classes = network.header.classes
    if data is None and network.header.origin is not None:
        raise InputError("the weights were trained elsewhere and name no images: give --data")
    path = data or datasets.SHIPPED
    (val_set,) = datasets.open_data(path, network.header.stored_size, ("val",), bad_images=bad_images, reading=reading)
    if reading.empty_classes == "skip" and isinstance(val_set, image_set.ImageSet):
        val_set.relabel(classes if set(val_set.classes) <= set(classes) else val_set.classes)
    # Other programs number the folders' names in their order, whatever the classes are called.
    by_order = val_set.classes != classes and network.header.origin is not None and len(val_set.classes) == len(classes)
    if val_set.classes != classes and not by_order:
        theirs, ours = set(val_set.classes), set(classes)
        differing = sorted(theirs ^ ours)
        raise InputError(
            f"the checkpoint's {len(classes)} classes are not the {len(val_set.classes)} of --data {path}: "
            f"{', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''} in one only"
        )
    size = network.header.stored_size
    if val_set.size != size:
        raise InputError(
            f"--data {path} was prepared at {val_set.size} x {val_set.size}, the checkpoint needs {size} x {size}: "
            f"prepare it with --size {size}"
        )
    top, top_of_each = accuracies(len(classes)), accuracies(len(classes), "none")
    table = confusion(len(classes))
    forward = CapturedForward(_in_precision(network), notify=_LOG.info)
    bad, began, count = list(val_set.bad), time.monotonic(), 0
    for start in range(0, len(val_set), batch_size):
        places = list(range(start, min(start + batch_size, len(val_set))))
        batch = val_set.__getitems__(places)
        if batch["bad"] and bad_images == "refuse":
            raise image_set.unreadable(batch["bad"])
        bad += batch["bad"]
        if len(batch["labels"]):
            result = probabilities(network, batch["images"], crops, forward)
            for metric in (*top, *top_of_each, table):
                metric.update(result, batch["labels"])
            count += len(batch["labels"])
        progress(len(places))
    if not count:
        raise InputError(f"--data {path}: none of the images can be read")
    top1, top5 = (float(metric.compute()) for metric in top)
    seconds = time.monotonic() - began
    rows = table.compute().tolist()
    per_class = {
        name: {"images": sum(row), "top1": first if any(row) else None, "top5": five if any(row) else None}
        for name, row, first, five in zip(
            classes, rows, *(metric.compute().tolist() for metric in top_of_each), strict=True
        )
    }
    return {
        "top1": top1,
        "top5": top5,
        "images": count,
        "seconds": seconds,
        "skipped": bad,
        "ignored": len(val_set.ignored),
        "notes": [val_set.note] if val_set.note else [],
        "confusion": rows,
        "per_class": per_class,
        **({"by_order": True} if by_order else {}),
    }


def read(network: Network, paths: Sequence[str | Path]) -> Tensor:
    """Image files as squares of the network's stored size, uint8 [N, S, S, 3]. InputError if one can't be read."""
    return torch.stack([decoding.read_image(path, network.header.stored_size) for path in paths])


def likeliest(network: Network, probabilities: Tensor, top: int = 5) -> list[list[tuple[str, float]]]:
    """The `top` likeliest classes of each row of `probabilities`, best first, with their probabilities."""
    classes = network.header.classes
    values, places = probabilities.topk(min(top, len(classes)))
    return [
        [(classes[place], value) for place, value in zip(row_places, row, strict=True)]
        for row_places, row in zip(places.tolist(), values.tolist(), strict=True)
    ]


def predict(
    network: Network, paths: Sequence[str | Path], *, crops: int = 1, top: int = 5
) -> list[list[tuple[str, float]]]:
    """The `top` likeliest classes of each image file with their probabilities. InputError if one can't be read.

    A hundred images are held at a time.
    """
    rows: list[list[tuple[str, float]]] = []
    forward = CapturedForward(_in_precision(network), notify=_LOG.info)
    for start in range(0, len(paths), _BATCH):
        pixels = read(network, paths[start : start + _BATCH])
        rows += likeliest(network, probabilities(network, pixels, crops, forward), top)
    return rows
