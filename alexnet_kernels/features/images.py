"""The images of a split, of a folder or zip without splits, or of a list of files, one batch at a time."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from alexnet_kernels._errors import InputError, RunError, first_line
from alexnet_kernels._files import read_bounded
from alexnet_kernels.training import datasets, shards
from alexnet_kernels.training.formats import LARGEST
from alexnet_kernels.training.image_set import Batch, ImageSet, StoredImages, check_unread, images_among
from alexnet_kernels.training.reading import find_split
from alexnet_kernels.training.source import Source

__all__ = ["batches_of", "open_images"]

_LIST = (".txt", ".lst")
_LARGEST_LIST = 1 << 28


def open_images(
    data: str | Path | None, split: str | None, size: int, bad_images: str = "refuse"
) -> tuple[StoredImages, str]:
    """The images and the split's name, "" for images without one. Nothing is decoded.

    Args:
        data: a tree, zip or prepared folder with splits; a folder or zip of images, in the order of their names; or a
            .txt file with a path a line, relative to its folder, in its order. None for the package's images.
        split: None for "val", if there is one, and otherwise all images below the folder. If each of them is in a
            folder of its own kind, that is its class.
        size: side of the squares, in pixels.
        bad_images: "refuse" or "skip" folders that can't be read.
    """
    if data is None:
        return _split(datasets.SHIPPED, split or "val", size, bad_images), split or "val"
    path = Path(data)
    if path.suffix.lower() in _LIST and not path.is_dir():
        if split is not None:
            raise InputError(f"--split {split}: {data} is a list of files, which has no splits")
        return _listed(path, size), ""
    if split is not None or shards.is_prepared(path):
        return _split(path, split or "val", size, bad_images), split or "val"
    source = Source(path)
    if (found := find_split("val", {name for name in source.folders if "/" not in name})) is not None and any(
        name.startswith(f"{found}/") for name in source.folders
    ):
        return _split(path, "val", size, bad_images), found
    return _all(source, size, bad_images), ""


def _split(path: str | Path, split: str, size: int, bad_images: str) -> StoredImages:
    (images,) = datasets.open_data(path, size, (split,), bad_images=bad_images, in_memory=0)
    return images


class _Images(ImageSet):
    """Images that are in no split, and may be in no class."""

    def fingerprint(self) -> str:
        kind, sums = self.checksums()
        digest = hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape"))
        return f"{digest.hexdigest()}:{kind}-{hashlib.sha256(','.join(map(str, sums)).encode()).hexdigest()}"


def _all(source: Source, size: int, bad_images: str) -> StoredImages:
    ignored = dict.fromkeys(source.hidden, "hidden")
    files = images_among(source, source.files, ignored)
    if not files:
        raise InputError(f"{source.path}: there are no images in it")
    folders = [name.split("/")[0] if "/" in name else "" for name in files]
    classes = sorted(set(folders)) if all(folders) else []
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number.get(name, -1) for name in folders], dtype=torch.int64)
    images = _Images(source, files, labels, classes, size, bad=list(source.unread), ignored=ignored)
    check_unread([images], bad_images)
    return images


class _ListedFiles:
    """The files of a list, by the names in it: what an `ImageSet` asks of a `Source`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str) -> io.BytesIO:
        return io.BytesIO(read_bounded(self.path.parent / name, LARGEST))

    def checksums(self, names: Sequence[str]) -> tuple[str, list[int]]:
        return "crc32", [self._checksum(name) for name in names]

    def _checksum(self, name: str) -> int:
        try:
            return zlib.crc32(read_bounded(self.path.parent / name, LARGEST))
        except (OSError, ValueError):
            return -1


def _listed(path: Path, size: int) -> StoredImages:
    try:
        content = read_bounded(path, _LARGEST_LIST)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {getattr(error, 'strerror', None) or first_line(error)}") from error
    lines = [os.fsdecode(line.rstrip(b"\r")) for line in content.split(b"\n")]
    files = [line for line in lines if line.strip()]
    if not files or "\0" in "".join(files):
        raise InputError(f"{path}: a list of image files is expected, a path a line")
    labels = torch.full((len(files),), -1, dtype=torch.int64)
    source: Any = _ListedFiles(path)
    return _Images(source, files, labels, [], size)


def batches_of(images: StoredImages, start: int, batch_size: int, workers: int) -> Iterator[Batch]:
    """The images from place `start` on, in order, read ahead by that many processes."""
    places = [list(range(at, min(at + batch_size, len(images)))) for at in range(start, len(images), batch_size)]
    loader = DataLoader(
        images,
        batch_sampler=places,
        num_workers=min(workers, len(places)),
        collate_fn=_unchanged,
        worker_init_fn=_ignore_interrupts,
        # torch draws a seed for the processes, by default from the caller's generator.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except (InputError, RunError) as error:
        # From another process, the message holds a traceback, whose last line is the error's.
        line = str(error).strip().splitlines()[-1]
        raise type(error)(line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from None


def _unchanged(batch: Any) -> Any:
    # `StoredImages.__getitems__` returns whole batches.
    return batch


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
