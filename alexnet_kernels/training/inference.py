"""Accuracy and predictions of a checkpoint's network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import images
from alexnet_kernels.training.checkpoint import Network

__all__ = ["evaluate", "features", "likeliest", "pick_device", "predict", "probabilities", "read", "seen"]

_BATCH = 100


def pick_device(name: str) -> torch.device:
    """auto (CUDA if there is a device), cpu, cuda or cuda:<n>; InputError for what isn't there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, colon, number = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (number.isdigit() if colon else True)):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:<n>, got {name}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise InputError(f"--device {name}: torch {torch.__version__} finds {count} CUDA devices")
        return torch.device("cuda", int(number or 0))
    return torch.device("cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What a run of this precision computes in; the CPU has bfloat16 for float16."""
    low = {"bf16": torch.bfloat16, "16": torch.float16 if device.type == "cuda" else torch.bfloat16}
    return torch.autocast(device.type, low.get(precision), enabled=precision in low)


@torch.no_grad()
def probabilities(network: Network, pixels: Tensor, crops: int = 1) -> Tensor:
    """Softmax of each image, float32 [N, classes] on the CPU; the mean over ten crops with crops=10.

    pixels: uint8 [N, S, S, 3], squares of the network's stored size.
    """
    device = next(network.model.parameters()).device
    pixels = pixels.to(device)
    inputs = network.crops.ten(pixels) if crops == 10 else [network.crops.centre(pixels)]
    total = torch.zeros(len(pixels), len(network.header.classes), device=device)
    with autocast(network.header.settings.precision, device):
        for x in inputs:
            total += network.model(x).float().softmax(1)
    return (total / len(inputs)).cpu()


@torch.no_grad()
def features(network: Network, pixels: Tensor) -> Tensor:
    """What the last layer sees of each image, float32 [N, F] on the CPU: the 4096 neurons of fc7 at width 1.

    They are after their nonlinearity and, in presets that scale at evaluation, dropout's factor. pixels: uint8
    [N, S, S, 3], squares of the network's stored size; the centre crop is taken.
    """
    device = next(network.model.parameters()).device
    last = [layer for layer in network.model.classifier.children() if isinstance(layer, torch.nn.Linear)][-1]
    result = [torch.empty(0, last.in_features)]
    hook = last.register_forward_pre_hook(lambda layer, inputs: result.append(inputs[0].float().cpu()))
    try:
        with autocast(network.header.settings.precision, device):
            for part in pixels.split(_BATCH):
                network.model(network.crops.centre(part.to(device)))
    finally:
        hook.remove()
    return torch.cat(result)


def seen(pixels: Tensor, size: int) -> Tensor:
    """The centre of stored squares, [N, size, size, 3]."""
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def evaluate(
    network: Network,
    data: str | Path | None = None,
    *,
    crops: int = 1,
    batch_size: int = _BATCH,
    bad_images: str = "refuse",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Top-1 and top-5 on the val/ of a folder or zip, or of the package's images (None).

    Returns {top1, top5, images, seconds, skipped, confusion, per_class}: accuracies from 0 to 1; confusion, of
    each class the list of how often each class was the likeliest of its images; per_class, of each class's name
    {images, top1, top5}, with None for accuracies where no image was read. Raises InputError where images can't
    be read, or are of other classes or another size than the network's.
    """
    from alexnet_kernels.training.metrics import accuracies, confusion

    classes = network.header.classes
    path = data or images.SHIPPED
    (val_set,) = images.open_data(path, network.header.stored_size, ("val",), bad_images=bad_images)
    if val_set.classes != classes:
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
    bad, began, count = list(val_set.bad), time.monotonic(), 0
    for start in range(0, len(val_set), batch_size):
        places = list(range(start, min(start + batch_size, len(val_set))))
        batch = val_set.__getitems__(places)
        if batch["bad"] and bad_images == "refuse":
            raise images.refuse(batch["bad"])
        bad += batch["bad"]
        if len(batch["labels"]):
            result = probabilities(network, batch["images"], crops)
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
        "confusion": rows,
        "per_class": per_class,
    }


def read(network: Network, paths: Sequence[str | Path]) -> Tensor:
    """Image files as squares of the network's stored size, uint8 [N, S, S, 3]; InputError where one can't be
    read."""
    return torch.stack([images.read_image(path, network.header.stored_size) for path in paths])


def likeliest(network: Network, probabilities: Tensor, top: int = 5) -> list[list[tuple[str, float]]]:
    """For each row of `probabilities` its likeliest classes, best first, with their probabilities."""
    classes = network.header.classes
    values, places = probabilities.topk(min(top, len(classes)))
    return [
        [(classes[place], value) for place, value in zip(row_places, row, strict=True)]
        for row_places, row in zip(places.tolist(), values.tolist(), strict=True)
    ]


def predict(
    network: Network, paths: Sequence[str | Path], *, crops: int = 1, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each image file its likeliest classes with their probabilities; InputError where one can't be
    read."""
    return likeliest(network, probabilities(network, read(network, paths), crops), top)
