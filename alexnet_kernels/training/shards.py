"""Prepared image sets: uint8 squares in .npy files, written by `prepare`.

index.json                          size, classes, the number of images in each shard of each split, and the CRC-32 of
                                    every file but the shards and of itself; written last
statistics.npz                      exact sums over the first split, for the mean image and the colour components
report.csv                          images that were left out or converted, and why
<split>/images-00000.npy ...        uint8 [n, size, size, 3]
<split>/labels.npy, files.json      labels int64 [N]; names of the images below their split
<split>/checksums.npy               CRC-32 of each image, uint32 [N], checked when it is read
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_kernels._errors import InputError, RunError, first_line
from alexnet_kernels.training.augmentation import PixelSums, Statistics
from alexnet_kernels.training.image_set import Batch, StoredImages
from alexnet_kernels.training.reading import find_split, note_of
from alexnet_kernels.training.shard_checksums import CHECKSUMS, INDEX, STATISTICS, check_index

__all__ = ["FORMAT", "ShardSet", "is_prepared", "open_shards"]

FORMAT = 2
_WITHOUT_CHECKSUMS = 1
"""The format of earlier versions, which is read too."""
LARGEST_SIZE = 8192
"""Pixels of the side of the largest squares."""
_OPEN = 256
"""Files of a split that a process holds open."""
PLAN, REPORT = "plan.json", "report.csv"


def is_prepared(path: str | Path) -> bool:
    """Whether `prepare` has written this folder or begun to."""
    return os.path.isfile(Path(path) / INDEX) or os.path.isfile(Path(path) / PLAN)


def shard_name(number: int) -> str:
    """File name of a shard inside its split's folder."""
    return f"images-{number:05d}.npy"


class _Shard:
    """A file of squares. It is read by position: where a mapped file is truncated, reading it would end the process."""

    def __init__(self, path: Path, count: int, size: int) -> None:
        self.path, self.image_bytes = path, size * size * 3
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError(f"version {version} of the format, (1, 0) is expected")
                shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
                self.start, length = file.tell(), os.fstat(file.fileno()).st_size
            if dtype != np.uint8 or shape != (count, size, size, 3) or in_columns:
                raise InputError(f"{path} holds {dtype} {list(shape)} where uint8 {[count, size, size, 3]} is expected")
            if length != self.start + count * self.image_bytes:
                raise ValueError(f"it has {length:,} bytes, {self.start + count * self.image_bytes:,} are expected")
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path} is missing or truncated, remove {path.parents[1]} and prepare it again: {first_line(error)}"
            ) from error

    def read(self, handle: int, place: int, row: np.ndarray) -> None:
        try:
            got = os.preadv(handle, [row.data], self.start + place * self.image_bytes)
        except OSError as error:
            raise RunError(f"{self.path} could not be read: {error.strerror or error}") from error
        if got < self.image_bytes:
            raise RunError(
                f"{self.path} was truncated while it was read: remove {self.path.parents[1]} and prepare it again"
            )


class _Handle:
    """An open file, closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"{path} could not be read: {error.strerror or error}") from error

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardSet(StoredImages):
    """One split of a prepared set, read by position, by threads if `use_threads` was called.

    `statistics` are those of the set's first split.
    """

    def __init__(self, root: Path, split: str, index: dict[str, Any], statistics: Statistics) -> None:
        self.root, self.size, self.classes, self.statistics = root / split, index["size"], index["classes"], statistics
        counts = index["splits"][split]["shards"]
        self.starts = list(accumulate(counts, initial=0))[:-1]
        try:
            self.labels = torch.from_numpy(np.load(self.root / "labels.npy"))
            self.files = [f"{split}/{name}" for name in json.loads((self.root / "files.json").read_text())]
            summed = index["format"] != _WITHOUT_CHECKSUMS
            self._checksums = np.load(self.root / CHECKSUMS).tolist() if summed else []
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.root} is damaged, prepare it again: {error}") from error
        self._shards = [_Shard(self.root / shard_name(i), count, self.size) for i, count in enumerate(counts)]
        self.threads = 1
        self._prepare_to_read()
        if not sum(counts) == len(self.labels) == len(self.files):
            held = f"{sum(counts)} images, {len(self.labels)} labels, {len(self.files)} names"
            raise InputError(f"{self.root} is damaged, prepare it again: it holds {held}")
        if self.labels.dtype != torch.int64 or not ((self.labels >= 0) & (self.labels < len(self.classes))).all():
            raise InputError(f"{self.root} is damaged, prepare it again: its labels are not those of its classes")

    def __getstate__(self) -> dict[str, Any]:
        # A process that unpickles this opens the files itself.
        return {key: value for key, value in self.__dict__.items() if key not in ("_handles", "_lock", "_threads")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare_to_read()

    def _prepare_to_read(self) -> None:
        self._handles: OrderedDict[int, _Handle] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: tuple[int, int, ThreadPoolExecutor] | None = None

    def __getitems__(self, places: Sequence[int]) -> Batch:
        indices = torch.as_tensor(places, dtype=torch.int64)
        images = torch.empty(len(places), self.size, self.size, 3, dtype=torch.uint8)
        rows, numbers = images.numpy(), indices.tolist()

        def read(part: range) -> list[int]:
            return [row for row in part if not self._read(numbers[row], rows[row])]

        threads = min(self.threads, len(numbers))
        parts = [range(start, len(numbers), threads) for start in range(threads)]
        found = map(read, parts) if threads <= 1 else self._pool().map(read, parts)
        damaged = sorted(row for part in found for row in part)
        if damaged:
            bad = [f"{self.files[places[row]]}: it is damaged in {self.root.parent}" for row in damaged]
            good = sorted(set(range(len(places))) - set(damaged))
            return {"images": images[good], "labels": self.labels[indices[good]], "indices": indices[good], "bad": bad}
        return {"images": images, "labels": self.labels[indices], "indices": indices, "bad": []}

    def _read(self, place: int, row: np.ndarray) -> bool:
        """Read an image. Returns whether it has its checksum. Reading and checksums release the interpreter's lock."""
        if not 0 <= place < len(self):
            raise IndexError(f"image {place} of {len(self)}")
        number = bisect.bisect_right(self.starts, place) - 1
        with self._lock:
            handle = self._handle(number)
        self._shards[number].read(handle.number, place - self.starts[number], row)
        return not self._checksums or zlib.crc32(row.data) == self._checksums[place]

    def use_threads(self, count: int) -> bool:
        self.threads = max(1, count)
        return True

    def _pool(self) -> ThreadPoolExecutor:
        """This process's threads, as many as were asked for."""
        if self._threads is None or self._threads[:2] != (os.getpid(), self.threads):
            self._threads = os.getpid(), self.threads, ThreadPoolExecutor(self.threads)
        return self._threads[2]

    def checksums(self) -> tuple[str, Sequence[int]]:
        return "squares" if self._checksums else "", self._checksums

    def _handle(self, number: int) -> _Handle:
        """The shard's open file. The files that were used last stay open."""
        handle = self._handles.pop(number, None) or _Handle(self._shards[number].path)
        self._handles[number] = handle
        if len(self._handles) > _OPEN:
            self._handles.popitem(last=False)
        return handle


def open_shards(path: str | Path, splits: Sequence[str] = ("train", "val")) -> list[ShardSet]:
    """The splits of a prepared folder, "train" and "val" also by other names, see `Reading`.

    Raises InputError if it is unfinished or damaged, or lacks a split.
    """
    root = Path(path)
    if not (root / INDEX).is_file():
        raise InputError(f"{root} is not finished: run `alexnet-kernels prepare` again to continue")
    try:
        index = json.loads((root / INDEX).read_text())
        if index["format"] not in (_WITHOUT_CHECKSUMS, FORMAT):
            raise InputError(f"{root} is of format {index['format']}, this version reads {FORMAT}")
        held = list(index["splits"])
        wanted, splits = splits, [find_split(split, held) or split for split in splits]
        if index["format"] == FORMAT:
            check_index(root, index, [split for split in splits if split in held])
        _check_index(index)
        with zipfile.ZipFile(root / STATISTICS) as archive:
            if sum(member.file_size for member in archive.infolist()) > 64 * index["size"] ** 2 + (1 << 16):
                raise ValueError(f"{STATISTICS} is larger than sums over squares of {index['size']} pixels")
        with np.load(root / STATISTICS) as sums:
            places, products = torch.from_numpy(sums["places"]), torch.from_numpy(sums["products"])
            statistics = PixelSums(int(sums["count"]), places, products).statistics()
        if statistics.mean_image.shape != (3, index["size"], index["size"]):
            raise ValueError(f"its mean image is of shape {list(statistics.mean_image.shape)}")
        missing = [split for split in splits if split not in index["splits"]]
        if missing:
            raise InputError(f"{root}: {', '.join(missing)} was not prepared, only {', '.join(held)}")
        if len(set(splits)) < len(splits):
            raise InputError(f"{root}: the splits {', '.join(wanted)} are the same, {splits[0]}")
        sets = [ShardSet(root, split, index, statistics) for split in splits]
        for name, images in zip(wanted, sets, strict=True):
            images.note = note_of(name, images.root.name)
        return sets
    except (InputError, RunError):
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{root} is damaged, prepare it again: {error!r}") from error


def _check_index(index: dict[str, Any]) -> None:
    """ValueError unless the index describes a set."""

    def whole(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    classes, splits = index["classes"], index["splits"]
    if not whole(index["size"], 1) or index["size"] > LARGEST_SIZE:
        raise ValueError(f"its size is {index['size']!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are not names")
    for name, split in splits.items():
        if not all(whole(count, 0) for count in split["shards"]):
            raise ValueError(f"its shards of {name} are not numbers of images")
