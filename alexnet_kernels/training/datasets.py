"""Opens image sets of any kind: an ImageFolder tree, a zip of one, or a prepared folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import shards
from alexnet_kernels.training.image_set import StoredImages, check_unread, decode_into_memory, open_splits
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.source import Source

__all__ = ["IN_MEMORY", "SHIPPED", "open_data", "reading_again"]

SHIPPED = Path(__file__).parent.parent / "data" / "cifar10_small.zip"
"""The image set that comes with the package."""

IN_MEMORY = 2 << 30
"""Bytes up to which a set is decoded once and held in memory; a larger one is decoded again in every epoch."""


def open_data(
    path: str | Path,
    size: int,
    splits: Sequence[str] = ("train", "val"),
    *,
    bad_images: str = "refuse",
    in_memory: int = IN_MEMORY,
    progress: Callable[[int], None] = lambda count: None,
    reading: Reading = USUAL,
) -> Sequence[StoredImages]:
    """The splits of an ImageFolder tree, of a zip of one or of a prepared folder, as squares of `size` pixels.

    Args:
        path: the folder or the zip.
        size: side of the stored squares, in pixels. A prepared folder keeps the size it was prepared with.
        splits: names of the splits to read, "train" and "val" for those of `reading`. Their classes must agree.
        bad_images: "refuse" unreadable images with an error that names them, or "skip" them.
        in_memory: bytes up to which all splits together are decoded at once and held in memory.
        progress: called with the number of images read since its last call.
        reading: names of the splits, what becomes of empty classes, and the labels of a flat split.

    Raises:
        InputError: nothing at the path, no classes, a class without images, splits with different classes,
            unreadable images or folders, a prepared folder that is unfinished or damaged.
        ValueError: another value of `bad_images`.
    """
    if bad_images not in ("refuse", "skip"):
        raise ValueError(f"bad_images must be 'refuse' or 'skip', got {bad_images!r}")
    splits = [reading.name_of(split) for split in splits]
    if shards.is_prepared(path):
        if reading.val_labels:
            raise InputError(f"--val-labels: {path} was prepared, with its labels")
        return shards.open_shards(path, splits)
    sets = open_splits(Source(path), splits, size, reading)
    check_unread(sets, bad_images)
    if sum(map(len, sets)) * size * size * 3 <= in_memory:
        for images in sets:
            decode_into_memory(images, bad_images, progress)
    return sets


def reading_again(before: Reading, given: Mapping[str, str], data: str | Path | None) -> Reading:
    """How the images that were read as `before` are read again, with the fields that are given in place of its own.

    data: their new path, if they have one. A prepared set needs no labels.
    """
    own = {"val_labels": "", "synsets": ""} if data is not None and shards.is_prepared(data) else {}
    return replace(before, **{**own, **given})
