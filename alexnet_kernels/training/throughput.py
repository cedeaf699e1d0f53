"""Throughput, in images/s, of each part of training by itself and of all together, and which part binds."""

from __future__ import annotations

import itertools
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.models import count_parameters
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import datasets, image_set, precision
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.devices import autocast
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.prefetch import CudaCopies, Prefetcher
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.settings import PURE, Settings
from alexnet_kernels.training.shards import ShardSet

__all__ = ["binding", "throughput"]


def throughput(
    settings: Settings,
    data: str | Path | None,
    device: torch.device,
    *,
    workers: int = 0,
    seconds: float = 5.0,
    bad_images: str = "refuse",
    in_memory: int = datasets.IN_MEMORY,
    reading: Reading = USUAL,
) -> dict[str, Any]:
    """Measure the parts of training, each by itself, and all together as in `train`.

    Args:
        settings, data, workers, bad_images, in_memory, reading: as for `RunSpec`.
        device: the network's device.
        seconds: duration of each measurement.

    Returns:
        read, copy, augment, step: images per second of reading, copying to the device (None on the CPU), augmentation
        and the network's training step. fetch: of this process's reading of the files without decoding them, None for a
        set that is prepared or held in memory. input: of reading followed by augmentation. together: of all, with
        reading and copying ahead as in training. binds, limit: see `binding`. data, images, prepared (whether by
        `prepare`), stored_size, in_memory, workers, device, precision, batch_size, image_size, parameters: what was
        measured.

    Raises:
        InputError: images that can't be used.
    """
    keep_freed_memory()
    settings = precision.resolve(settings, device)
    path = data or datasets.SHIPPED
    (train_set,) = datasets.open_data(
        path,
        stored_size(settings.image_size),
        ("train",),
        bad_images=bad_images,
        in_memory=in_memory,
        reading=reading,
    )
    image_set.check_stored_size(train_set, settings.image_size, path)
    statistics = train_set.statistics or Statistics.of(train_set.sample(1000))
    header = Header(settings, train_set.classes, statistics, str(path), len(train_set), "", train_set.size)
    crops = header.crops(precision.input_dtype(settings.precision))
    cuda = device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None

    def read(target: torch.device | None = None) -> Generator[image_set.Batch]:
        epoch = 0
        batch_size = min(settings.batch_size, len(train_set))
        loader = ImageLoader(train_set, batch_size, workers, settings.seed, device=target)
        while True:
            loader.batch_sampler.sampler.set_epoch(epoch)  # type: ignore[union-attr]
            yield from loader
            epoch += 1

    def augment(batch: image_set.Batch) -> Tensor:
        return crops.random(batch["images"].to(device, non_blocking=True), batch["indices"], 0)

    batch = next(read())
    if not len(batch["labels"]):
        raise InputError(f"--data {path}: none of the images of the first batch can be read")
    model = header.model(device).to(memory_format=torch.channels_last)
    if settings.precision == PURE:
        precision.round_weights(model)
    optimizer = SGD(model.parameters(), settings.lr * 1e-3)
    on_device: image_set.Batch = {**batch, "images": batch["images"].to(device)}
    x, labels = augment(on_device), batch["labels"].to(device)

    def step(x: Tensor, labels: Tensor) -> int:
        optimizer.zero_grad()
        with autocast(settings.precision, device):
            logits = model(x)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        return len(labels)

    def train(batches: Iterator[image_set.Batch]) -> int:
        batch = next(batches)
        return step(augment(batch), batch["labels"].to(device)) if len(batch["labels"]) else 0

    with closing(read()) as batches:
        rates: dict[str, float | None] = {"read": _rate(lambda: len(next(batches)["labels"]), seconds, sync)}
    rates["fetch"] = None
    if isinstance(train_set, image_set.ImageSet) and train_set.pixels is None:
        names = itertools.cycle(train_set.files)
        rates["fetch"] = _rate(lambda: _fetch(train_set, next(names)), seconds, sync)
    rates["copy"] = None
    if cuda:
        with closing(Prefetcher(CudaCopies(device)).iterate(itertools.repeat(batch))) as batches:
            rates["copy"] = _rate(lambda: len(next(batches)["labels"]), seconds, sync)
    rates["augment"] = _rate(lambda: len(augment(on_device)), seconds, sync)
    with closing(read()) as batches:
        rates["input"] = _rate(lambda: len(augment(next(batches))), seconds, sync)
    rates["step"] = _rate(lambda: step(x, labels), seconds, sync)
    with closing(read(device)) as batches:
        rates["together"] = _rate(lambda: train(batches), seconds, sync)
    binds, limit = binding(rates)
    return {
        **rates,
        "binds": binds,
        "limit": limit,
        "data": str(path),
        "images": len(train_set),
        "prepared": isinstance(train_set, ShardSet),
        "in_memory": train_set.pixels is not None,
        "workers": 0 if train_set.pixels is not None else workers,
        "device": str(device),
        "precision": settings.precision,
        "batch_size": settings.batch_size,
        "stored_size": train_set.size,
        "image_size": settings.image_size,
        "parameters": count_parameters(model),
    }


def binding(rates: Mapping[str, Any]) -> tuple[str, float]:
    """What limits training to how many images per second, by the rates of its parts.

    On a GPU reading, copying and computing overlap, and "read", "copy" or "step" is the slowest; a step includes its
    augmentation, which the GPU computes as well. On a CPU (copy is None) all share the cores, and their times add up:
    "sum".
    """
    stepping = 1 / (1 / rates["augment"] + 1 / rates["step"])
    if rates["copy"] is None:
        return "sum", 1 / (1 / rates["read"] + 1 / stepping)
    stages = {"read": rates["read"], "copy": rates["copy"], "step": stepping}
    binds = min(stages, key=lambda name: stages[name])
    return binds, stages[binds]


def _fetch(images: image_set.ImageSet, name: str) -> int:
    # A file that can't be read counts as what it is when it is decoded.
    with suppress(OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        images.source.open(name)
    return 1


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
