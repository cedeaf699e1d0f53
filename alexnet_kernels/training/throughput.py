"""Throughput, in images/s, of each part of a training step by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from alexnet_kernels._errors import InputError
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.models import count_parameters
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import datasets, image_set
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.devices import autocast
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.settings import Settings

__all__ = ["throughput"]


def throughput(
    settings: Settings,
    data: str | Path | None,
    device: torch.device,
    *,
    workers: int = 0,
    seconds: float = 5.0,
    bad_images: str = "refuse",
    in_memory: int = datasets.IN_MEMORY,
) -> dict[str, Any]:
    """Measure reading, augmentation, both in sequence, and the network's training step.

    Args:
        settings, data, workers, bad_images, in_memory: as for `RunSpec`.
        device: the network's device.
        seconds: duration of each measurement.

    Returns:
        read, augment, input, step: images per second. "input" is reading followed by augmentation; in training, reading
        in other processes overlaps the step. data, images, workers, device, batch_size, image_size, parameters: what
        was measured.

    Raises:
        InputError: images that can't be used.
    """
    keep_freed_memory()
    path = data or datasets.SHIPPED
    (train_set,) = datasets.open_data(
        path, stored_size(settings.image_size), ("train",), bad_images=bad_images, in_memory=in_memory
    )
    image_set.check_stored_size(train_set, settings.image_size, path)
    statistics = train_set.statistics or Statistics.of(train_set.sample(1000))
    header = Header(settings, train_set.classes, statistics, str(path), len(train_set), "", train_set.size)
    crops = header.crops()
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def read() -> Iterator[image_set.Batch]:
        epoch = 0
        loader = ImageLoader(train_set, min(settings.batch_size, len(train_set)), workers, settings.seed)
        while True:
            loader.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            yield from loader
            epoch += 1

    def augment(batch: image_set.Batch) -> torch.Tensor:
        return crops.random(batch["images"].to(device, non_blocking=True), batch["indices"], 0)

    batch = next(read())
    if not len(batch["labels"]):
        raise InputError(f"--data {path}: none of the images of the first batch can be read")
    model = header.model(device).to(memory_format=torch.channels_last)
    optimizer = SGD(model.parameters(), settings.lr * 1e-3)
    x, labels = augment(batch), batch["labels"].to(device)

    def step() -> int:
        optimizer.zero_grad()
        with autocast(settings.precision, device):
            logits = model(x)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        return len(labels)

    reader, feeder = read(), read()

    def feed() -> int:
        return len(augment(next(feeder)))

    return {
        "read": _rate(lambda: len(next(reader)["labels"]), seconds, sync),
        "augment": _rate(lambda: len(augment(batch)), seconds, sync),
        "input": _rate(feed, seconds, sync),
        "step": _rate(step, seconds, sync),
        "data": str(path),
        "images": len(train_set),
        "workers": 0 if train_set.pixels is not None else workers,
        "device": str(device),
        "batch_size": settings.batch_size,
        "image_size": settings.image_size,
        "parameters": count_parameters(model),
    }


def _rate(work: Callable[[], int], seconds: float, sync: Callable[[], None]) -> float:
    """Images per second, after two calls that start processes and fill caches."""
    for _ in range(2):
        work()
    sync()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += work()
    sync()
    return count / (time.perf_counter() - began)
