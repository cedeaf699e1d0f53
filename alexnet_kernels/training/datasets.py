"""Opens image sets of any kind: an ImageFolder tree, a zip of one, or a prepared folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from alexnet_kernels.training import shards
from alexnet_kernels.training.image_set import StoredImages, check_unread, decode_into_memory, open_splits
from alexnet_kernels.training.source import Source

__all__ = ["IN_MEMORY", "SHIPPED", "open_data"]

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
) -> Sequence[StoredImages]:
    """The splits of an ImageFolder tree, of a zip of one or of a prepared folder, as squares of `size` pixels.

    Args:
        path: the folder or the zip.
        size: side of the stored squares, in pixels. A prepared folder keeps the size it was prepared with.
        splits: names of the splits to read. Their classes must agree.
        bad_images: "refuse" unreadable images with an error that names them, or "skip" them.
        in_memory: bytes up to which all splits together are decoded at once and held in memory.
        progress: called with the number of images read since its last call.

    Raises:
        InputError: nothing at the path, no classes, a class without images, splits with different classes,
            unreadable images or folders, a prepared folder that is unfinished or damaged.
        ValueError: another value of `bad_images`.
    """
    if bad_images not in ("refuse", "skip"):
        raise ValueError(f"bad_images must be 'refuse' or 'skip', got {bad_images!r}")
    if shards.is_prepared(path):
        return shards.open_shards(path, splits)
    sets = open_splits(Source(path), splits, size)
    check_unread(sets, bad_images)
    if sum(map(len, sets)) * size * size * 3 <= in_memory:
        for images in sets:
            decode_into_memory(images, bad_images, progress)
    return sets
