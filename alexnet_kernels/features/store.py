"""Files of activations: written in place, batch by batch, and read as memory-mapped arrays.

A folder holds names.csv (a line for each image), index.json (written last), and either <layer>.npy for each layer or
features-00000.safetensors, ..., each with some images' rows of every layer.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alexnet_kernels._checksum import serialize_safetensors
from alexnet_kernels._errors import InputError, first_line, shortened
from alexnet_kernels._files import atomic_file, read_bounded

__all__ = ["DTYPES", "FORMAT", "FORMATS", "INDEX", "NAMES", "Features", "Rows", "Writer", "load", "writer"]

INDEX, NAMES = "index.json", "names.csv"
FORMAT = 1
FORMATS = ("npy", "safetensors")
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_HEADER = 128
"""Bytes of the header of a .npy file."""
_SHARD = 256 << 20
"""Bytes of a safetensors file, unless one batch has more."""
_LARGEST = 1 << 30


def _header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    text = text.ljust(_HEADER - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class Writer(Protocol):
    """Writes rows of each layer, in order."""

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None: ...

    def commit(self, rows: int, force: bool) -> int | None:
        """Make rows durable. The number that are now, or None if they only will be later."""

    def finish(self, rows: int) -> None: ...

    def close(self) -> None: ...


@dataclass
class _NpyFiles:
    """One file a layer with room for all images."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    count: int
    dtype: np.dtype

    def __post_init__(self) -> None:
        self._files: dict[str, int] = {}
        self._bytes = {name: math.prod(shape) * self.dtype.itemsize for name, shape in self.shapes.items()}
        try:
            for name, shape in self.shapes.items():
                self._files[name] = file = os.open(self.folder / f"{name}.npy", os.O_RDWR | os.O_CREAT, 0o666)
                _allocate(file, _HEADER + self.count * self._bytes[name])
                _write(file, _header((self.count, *shape), self.dtype), 0)
        except BaseException:
            self.close()
            raise

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        for (name, file), array in zip(self._files.items(), arrays, strict=True):
            _write(file, np.ascontiguousarray(array).data.cast("B"), _HEADER + row * self._bytes[name])

    def commit(self, rows: int, force: bool) -> int | None:
        for file in self._files.values():
            os.fsync(file)
        return rows

    def finish(self, rows: int) -> None:
        for name, file in self._files.items():
            _write(file, _header((rows, *self.shapes[name]), self.dtype), 0)
            os.ftruncate(file, _HEADER + rows * self._bytes[name])
            os.fsync(file)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}


def _allocate(file: int, size: int) -> None:
    """Give the file its size. Where the file system can, space is reserved: a full disk is an error here."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, size)


def _write(file: int, data: Any, at: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


@dataclass
class _Shards:
    """Files of about `_SHARD` bytes, each written completely or not at all."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype
    rows: int
    """That are written already."""
    shards: int

    def __post_init__(self) -> None:
        self._held: list[Sequence[np.ndarray]] = []
        self._size = 0

    def write(self, row: int, arrays: Sequence[np.ndarray]) -> None:
        self._held.append([array.copy() for array in arrays])
        self._size += sum(array.nbytes for array in arrays)

    def commit(self, rows: int, force: bool) -> int | None:
        if not force and self._size < _SHARD:
            return None
        if rows > self.rows:
            import torch

            tensors = {
                name: torch.from_numpy(np.concatenate([arrays[i] for arrays in self._held]))
                for i, name in enumerate(self.shapes)
            }
            with atomic_file(self.folder / _shard(self.shards)) as file:
                # safetensors writes several metadata in a random order: the checksum alone gives the same bytes.
                file.write(serialize_safetensors(tensors, {}))
            self.shards += 1
        self._held, self._size, self.rows = [], 0, rows
        return rows

    def finish(self, rows: int) -> None:
        pass

    def close(self) -> None:
        self._held = []


def _shard(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def writer(
    format: str, folder: Path, shapes: Mapping[str, tuple[int, ...]], count: int, dtype: str, rows: int, shards: int
) -> Any:
    """A `Writer` that continues after `rows` rows, of up to `count`, in that many shards."""
    if format == "npy":
        return _NpyFiles(folder, shapes, count, DTYPES[dtype])
    return _Shards(folder, shapes, DTYPES[dtype], rows, shards)


class Rows:
    """The rows of a layer in several files, each memory-mapped, with numpy's indexing by rows.

    `numpy.asarray` of it reads all of them.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in self._parts:
            yield from part

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        places = np.arange(len(self))[rows]
        if places.ndim == 0:
            return self._row(int(places))[rest]
        found = np.empty((*places.shape, *self.shape[1:]), self.dtype)
        for at in np.ndindex(places.shape):
            found[at] = self._row(int(places[at]))
        return found[(slice(None), *rest)] if rest else found

    def _row(self, place: int) -> np.ndarray:
        part = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part) for part in self._parts]).astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Features:
    """Activations of images: `features["conv5"]` is an array [N, ...], memory-mapped and read-only."""

    folder: Path
    index: Mapping[str, Any]
    """The content of index.json."""

    @property
    def layers(self) -> list[str]:
        return [layer["name"] for layer in self.index["layers"]]

    def __getitem__(self, layer: str) -> Any:
        if layer not in self.layers:
            raise KeyError(f"{self.folder} has no layer {layer!r}, but {', '.join(self.layers)}")
        return self._array(next(row for row in self.index["layers"] if row["name"] == layer))

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __len__(self) -> int:
        return self.index["images"]

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        text = read_bounded(self.folder / NAMES, _LARGEST).decode(errors="surrogateescape")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if len(rows) != len(self) or not all(row.get("name") and row.get("label") is not None for row in rows):
            raise InputError(f"{self.folder / NAMES} does not have the {len(self):,} names of {INDEX}")
        return rows

    @property
    def names(self) -> list[str]:
        """Of the images, in the order of the rows."""
        return [row["name"] for row in self._rows]

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], numbers of classes; -1 for images without one."""
        return np.array([int(row["label"] or -1) for row in self._rows], dtype=np.int64)

    @property
    def classes(self) -> list[str]:
        return list(self.index["data"]["classes"])

    def _array(self, layer: Mapping[str, Any]) -> Any:
        shape, dtype = tuple(layer["shape"]), DTYPES[layer["dtype"]]
        if self.index["format"] == "npy":
            path = self.folder / f"{layer['name']}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path} can't be read: {first_line(error)}") from error
            if array.shape != shape or array.dtype != dtype:
                raise InputError(f"{self.folder}/{layer['name']}.npy is {array.dtype} {array.shape}, not as in {INDEX}")
            return array
        parts = [_map(self.folder / _shard(i), layer["name"], dtype) for i in range(self.index["shards"])]
        rows = Rows(parts) if parts else np.empty(shape, dtype)
        if rows.shape != shape:
            raise InputError(f"{self.folder}: {layer['name']} has the shape {rows.shape}, not {shape} as in {INDEX}")
        return rows


def _check(index: dict[str, Any]) -> None:
    """ValueError unless the index describes files of this package."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40

    if index["format"] not in FORMATS or not whole(index["images"]) or not whole(index["shards"]):
        raise ValueError("its format or a number is not known")
    if not isinstance(index["layers"], list) or not all(isinstance(name, str) for name in index["data"]["classes"]):
        raise ValueError("its layers or classes are not lists")
    for layer in index["layers"]:
        name, shape = layer["name"], layer["shape"]
        if not isinstance(name, str) or "/" in name or name.startswith(".") or layer["dtype"] not in DTYPES:
            raise ValueError(f"its layer {shortened(name)}")
        if not isinstance(shape, list) or not all(map(whole, shape)) or shape[:1] != [index["images"]]:
            raise ValueError(f"the shape of its layer {name}")


def _map(path: Path, name: str, dtype: np.dtype) -> np.ndarray:
    """A tensor of a safetensors file, memory-mapped."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > min(_LARGEST, path.stat().st_size):
                raise ValueError("its header is cut off")
            entry = json.loads(file.read(size))[name]
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"its {name} is of another dtype")
        return np.memmap(path, dtype, "r", 8 + size + begin, shape)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {first_line(error)}") from error


def load(folder: str | Path) -> Features:
    """The activations that `extract` wrote, memory-mapped. InputError if the folder is not complete or damaged.

    `features["conv5"]` is an array [N, ...]; `features.names`, `labels` and `classes` belong to its rows.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} has no {INDEX}: it is no folder of `extract`, or was not finished")
    try:
        index = json.loads(read_bounded(folder / INDEX, _LARGEST))
        if index["version"] != FORMAT:
            raise InputError(f"{folder} is of format {index['version']}, this version reads {FORMAT}")
        _check(index)
        return Features(folder, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / INDEX} is damaged: {first_line(error)}") from error
