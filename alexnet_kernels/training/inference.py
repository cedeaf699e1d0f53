"""Accuracy and predictions of a checkpoint's network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alexnet_kernels.training import images
from alexnet_kernels.training.checkpoint import Network
from alexnet_kernels.training.errors import InputError

__all__ = ["evaluate", "pick_device", "predict", "probabilities", "seen"]


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


def seen(pixels: Tensor, size: int) -> Tensor:
    """The centre of stored squares, [N, size, size, 3]."""
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def evaluate(
    network: Network,
    data: str | Path | None = None,
    *,
    crops: int = 1,
    batch_size: int = 100,
    bad_images: str = "refuse",
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, float | int | list[str]]:
    """Top-1 and top-5 on the val/ of a folder or zip, or of the package's images (None).

    Returns {top1, top5, images, seconds, skipped}, accuracies from 0 to 1. Raises InputError where images
    can't be read or are of other classes than the network's.
    """
    from alexnet_kernels.training.metrics import accuracies

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
    top = accuracies(len(classes))
    bad, began, count = list(val_set.bad), time.monotonic(), 0
    for start in range(0, len(val_set), batch_size):
        places = list(range(start, min(start + batch_size, len(val_set))))
        batch = val_set.__getitems__(places)
        if batch["bad"] and bad_images == "refuse":
            raise images.refuse(batch["bad"])
        bad += batch["bad"]
        if len(batch["labels"]):
            result = probabilities(network, batch["images"], crops)
            for metric in top:
                metric.update(result, batch["labels"])
            count += len(batch["labels"])
        progress(len(places))
    if not count:
        raise InputError(f"--data {path}: none of the images can be read")
    top1, top5 = (float(metric.compute()) for metric in top)
    seconds = time.monotonic() - began
    return {"top1": top1, "top5": top5, "images": count, "seconds": seconds, "skipped": bad}


def predict(
    network: Network, paths: Sequence[str | Path], *, crops: int = 1, top: int = 5
) -> list[list[tuple[str, float]]]:
    """For each image file its likeliest classes with their probabilities; InputError where one can't be
    read."""
    size = network.header.stored_size
    pixels = torch.stack([images.read_image(path, size) for path in paths])
    classes = network.header.classes
    values, places = probabilities(network, pixels, crops).topk(min(top, len(classes)))
    return [
        [(classes[place], value) for place, value in zip(row_places, row, strict=True)]
        for row_places, row in zip(places.tolist(), values.tolist(), strict=True)
    ]
