"""The checksums in the index of a prepared set: of itself and of its files. Images in the shards have their own."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_kernels._checksum import crc_of_file
from alexnet_kernels._errors import InputError

__all__ = ["CHECKSUMS", "INDEX", "STATISTICS", "add_checksums", "check_index"]

INDEX, STATISTICS, CHECKSUMS = "index.json", "statistics.npz", "checksums.npy"


def add_checksums(root: Path, index: dict[str, Any]) -> None:
    """Add the checksums of the set's files, and of the index, to the index."""
    index["checksums"] = _of_files(root, list(index["splits"]))
    index["crc32"] = _of_index(index)


def check_index(root: Path, index: dict[str, Any], splits: Sequence[str]) -> None:
    """Raise InputError unless the index and the files of the splits have their checksums."""
    if index["crc32"] != _of_index(index):
        raise InputError(f"{root / INDEX} is damaged, prepare it again: it does not have its checksum")
    for name, crc in _of_files(root, splits).items():
        if index["checksums"][name] != crc:
            raise InputError(f"{root / name} is damaged, prepare it again: it does not have its checksum")


def _of_index(index: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({key: value for key, value in index.items() if key != "crc32"}).encode())


def _of_files(root: Path, splits: Sequence[str]) -> dict[str, int]:
    names = [STATISTICS, *(f"{split}/{name}" for split in splits for name in ("labels.npy", "files.json", CHECKSUMS))]
    return {name: crc_of_file(root / name) for name in names}
