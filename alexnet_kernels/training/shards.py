"""Prepared image sets: uint8 squares in memory-mapped files, written by `prepare`.

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
import zipfile
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels.training.augmentation import PixelSums, Statistics
from alexnet_kernels.training.image_set import Batch, StoredImages
from alexnet_kernels.training.shard_checksums import CHECKSUMS, INDEX, STATISTICS, check_index

__all__ = ["FORMAT", "ShardSet", "is_prepared", "open_shards"]

FORMAT = 2
_WITHOUT_CHECKSUMS = 1
"""The format of earlier versions, which is read too."""
PLAN, REPORT = "plan.json", "report.csv"


def is_prepared(path: str | Path) -> bool:
    """Whether `prepare` has written this folder or begun to."""
    return (Path(path) / INDEX).is_file() or (Path(path) / PLAN).is_file()


def shard_name(number: int) -> str:
    """File name of a shard inside its split's folder."""
    return f"images-{number:05d}.npy"


class ShardSet(StoredImages):
    """One split of a prepared set, memory-mapped. `statistics` are those of the set's first split."""

    def __init__(self, root: Path, split: str, index: dict[str, Any], statistics: Statistics) -> None:
        self.root, self.size, self.classes, self.statistics = root / split, index["size"], index["classes"], statistics
        counts = index["splits"][split]["shards"]
        self.starts = list(accumulate(counts, initial=0))[:-1]
        try:
            self.labels = torch.from_numpy(np.load(self.root / "labels.npy"))
            self.files = [f"{split}/{name}" for name in json.loads((self.root / "files.json").read_text())]
            summed = index["format"] != _WITHOUT_CHECKSUMS
            self._checksums = np.load(self.root / CHECKSUMS).tolist() if summed else []
        except (OSError, ValueError) as error:
            raise InputError(f"{self.root} is damaged, prepare it again: {error}") from error
        self._maps = [_open(self.root / shard_name(i), count, self.size) for i, count in enumerate(counts)]
        if not sum(counts) == len(self.labels) == len(self.files):
            held = f"{sum(counts)} images, {len(self.labels)} labels, {len(self.files)} names"
            raise InputError(f"{self.root} is damaged, prepare it again: it holds {held}")

    def __getstate__(self) -> dict[str, Any]:
        # A process that unpickles this maps the files itself.
        return {**self.__dict__, "_maps": [len(shard) for shard in self._maps]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = [_open(self.root / shard_name(i), count, self.size) for i, count in enumerate(state["_maps"])]

    def __getitems__(self, places: Sequence[int]) -> Batch:
        indices = torch.as_tensor(places, dtype=torch.int64)
        images = torch.empty(len(places), self.size, self.size, 3, dtype=torch.uint8)
        rows = images.numpy()
        for row, place in enumerate(indices.tolist()):
            if not 0 <= place < len(self):
                raise IndexError(f"image {place} of {len(self)}")
            shard = bisect.bisect_right(self.starts, place) - 1
            rows[row] = self._maps[shard][place - self.starts[shard]]
        damaged = [row for row, place in enumerate(places) if not self._has_checksum(place, rows[row])]
        if damaged:
            bad = [f"{self.files[places[row]]}: it is damaged in {self.root.parent}" for row in damaged]
            good = sorted(set(range(len(places))) - set(damaged))
            return {"images": images[good], "labels": self.labels[indices[good]], "indices": indices[good], "bad": bad}
        return {"images": images, "labels": self.labels[indices], "indices": indices, "bad": []}

    def _has_checksum(self, place: int, image: np.ndarray) -> bool:
        return not self._checksums or zlib.crc32(image.data) == self._checksums[place]

    def checksums(self) -> tuple[str, Sequence[int]]:
        return "squares" if self._checksums else "", self._checksums


def _open(path: Path, count: int, size: int) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is missing or truncated, remove {path.parents[1]} and prepare it again: {first_line(error)}"
        ) from error
    if shard.dtype != np.uint8 or shard.shape != (count, size, size, 3):
        raise InputError(
            f"{path} holds {shard.dtype} {list(shard.shape)} where uint8 {[count, size, size, 3]} is expected"
        )
    return shard


def open_shards(path: str | Path, splits: Sequence[str] = ("train", "val")) -> list[ShardSet]:
    """The splits of a prepared folder. Raises InputError if it is unfinished or damaged, or lacks a split."""
    root = Path(path)
    if not (root / INDEX).is_file():
        raise InputError(f"{root} is not finished: run `alexnet-kernels prepare` again to continue")
    try:
        index = json.loads((root / INDEX).read_text())
        if index["format"] not in (_WITHOUT_CHECKSUMS, FORMAT):
            raise InputError(f"{root} is of format {index['format']}, this version reads {FORMAT}")
        if index["format"] == FORMAT:
            check_index(root, index, [split for split in splits if split in index["splits"]])
        with np.load(root / STATISTICS) as sums:
            places, products = torch.from_numpy(sums["places"]), torch.from_numpy(sums["products"])
            statistics = PixelSums(int(sums["count"]), places, products).statistics()
        missing = [split for split in splits if split not in index["splits"]]
        if missing:
            held = ", ".join(index["splits"])
            raise InputError(f"{root}: {', '.join(missing)} was not prepared, only {held}")
        return [ShardSet(root, split, index, statistics) for split in splits]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{root} is damaged, prepare it again: {error!r}") from error
