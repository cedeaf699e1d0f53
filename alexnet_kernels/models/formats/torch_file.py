"""Files of torch.save: zip archives, and the older ones that begin with a pickle.

Both hold a pickle, which names tensors, and the tensors' bytes beside it. The pickle is read as data first
(`formats.pickles`), and every tensor that it declares must lie within the bytes that the file has for it. If it
consists of tensors and plain containers, torch.load(weights_only=True) reads the file. If it names anything else, such
as the settings of a trainer or a whole model, the tensors are read here, and what is no tensor stays inert.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from alexnet_kernels._checksum import check_archive
from alexnet_kernels._errors import first_line, shortened
from alexnet_kernels.models.formats.pickles import MOST_BYTES, Global, Made, Source, read_pickle

__all__ = ["LEGACY", "MOST_READ", "NoTensor", "Planned", "load_tensors", "members_of", "read_legacy", "read_zip"]

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
"""The first bytes of a file of torch before 1.6, or of _use_new_zipfile_serialization=False."""
_DIRECTORY = 16 << 20
"""The longest directory of a zip that is read, in bytes."""
_DIMENSIONS = 64
MOST_READ = 4 << 30
"""Bytes of weights that are copied into memory from one file, which holds 17 networks of the usual size."""
_OVERLAPPING = 1 << 30
"""Bytes that tensors which share their values may have together, or twice those of their file."""
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}  # fmt: skip
_PLAIN = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict"}
"""What torch.load is given besides storages: the pickle holds nothing but tensors, containers and plain values."""
_REBUILT = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_KINDS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values (on the meta device)",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a subclass of Tensor",
}


@dataclass(frozen=True)
class NoTensor:
    """What a file has in place of a dense tensor."""

    kind: str


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(eq=False)
class Planned:
    """A tensor of a file that has not been read."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    read: Callable[[str], Tensor] = field(repr=False)
    """The bytes of a storage, uint8."""

    def dim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def made(self) -> Tensor:
        """The tensor, a copy."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        values = self.read(self.storage.key)
        size = self.dtype.itemsize
        first = self.offset * size
        reach = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) + 1
        if math.prod(self.shape) > len(values):
            raise ValueError(f"it declares a tensor of shape {shortened(list(self.shape))} in {len(values):,} bytes")
        # A copy begins at an address of any dtype's alignment.
        values = values[first : first + reach * size].clone().view(self.dtype)
        return values.as_strided(self.shape, self.stride).contiguous()


class _Plan:
    """Collects what a pickle declares."""

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self.tensors: dict[Any, Planned] = {}
        """By where they lie: what is one tensor, or one view of it, is read once."""
        self.plain = True

    def persistent(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",):
            self.plain = False
            return pid[1]
        kind, storage_type, key, _, numel, *rest = pid
        name = storage_type.name if isinstance(storage_type, Global) else ""
        dtype = _STORAGES.get(name.rsplit(".", 1)[-1])
        if kind != "storage" or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise TypeError
        if rest and rest[0] is not None:
            raise ValueError("its storages are views of each other, which torch has not written since 2017")
        if dtype is None:
            self.plain = False
            return NoTensor(f"values of {shortened(name)}")
        found = _Storage(key, dtype, numel)
        known = self.storages.setdefault(key, found)
        if (known.dtype, known.numel) != (dtype, numel):
            raise ValueError(f"it declares storage {shortened(key)} twice, with different sizes")
        return known

    def made(self, function: Any, arguments: Any) -> Any:
        name = function.name if isinstance(function, Global) else ""
        self.plain = self.plain and name in _PLAIN
        if not isinstance(arguments, tuple):
            raise TypeError
        return self._made(name, function, arguments)

    def _made(self, name: str, function: Any, arguments: tuple[Any, ...]) -> Any:
        short = name.rsplit(".", 1)[-1]
        if short in ("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_device_tensor_from_cpu_tensor"):
            return arguments[0]
        if short == "_rebuild_from_type_v2" and isinstance(arguments[0], Global):
            return self._made(arguments[0].name, arguments[0], arguments[2])
        if name in _REBUILT:
            storage, offset, size, stride = arguments[:4]
            if isinstance(storage, NoTensor):
                return storage
            if max(len(size), len(stride)) > _DIMENSIONS:
                raise TypeError
            dtype = storage.dtype
            if short == "_rebuild_tensor_v3":
                given = getattr(torch, arguments[6].name.rsplit(".", 1)[-1], None)
                if not isinstance(given, torch.dtype):
                    raise TypeError
                dtype = given
            return self._tensor(storage, dtype, offset, tuple(size), tuple(stride))
        if name.startswith("torch._utils._rebuild"):
            return NoTensor(_KINDS.get(short, "another kind of tensor"))
        return Made(function, arguments)

    def _tensor(self, storage: _Storage, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Planned:
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise TypeError
        reach = 0 if 0 in size else offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        room = storage.numel * storage.dtype.itemsize // dtype.itemsize
        if reach > room:
            raise ValueError(f"it declares a tensor of shape {shortened(list(size))} in a storage of {room:,} elements")
        planned = Planned(storage, dtype, offset, size, stride, self.read)
        return self.tensors.setdefault((storage.key, dtype, offset, size, stride), planned)

    def check_overlap(self) -> None:
        """Raise ValueError if the tensors would take far more memory than the file has values."""
        held = sum(storage.numel * storage.dtype.itemsize for storage in self.storages.values())
        taken = sum(tensor.nbytes for tensor in self.tensors.values())
        if taken > max(_OVERLAPPING, 2 * held):
            raise ValueError(f"its tensors overlap: they would take {taken:,} bytes, of {held:,} that it has")

    def read(self, key: str) -> Tensor:
        raise NotImplementedError


def members_of(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name. Raises ValueError if it is none, is damaged or its directory is too long."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Bounded(file)) as archive:  # type: ignore[arg-type]
            members = {info.filename: info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise ValueError("two members have one name")
            return members
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"it is a damaged zip archive ({first_line(error)})") from error


class _Bounded:
    """A file whose single reads are bounded: zipfile reads the directory in one, as long as its end declares."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.close = lambda: None

    def read(self, count: int = -1) -> bytes:
        content = self._file.read(_DIRECTORY + 1 if count < 0 else min(count, _DIRECTORY + 1))
        if len(content) > _DIRECTORY:
            raise ValueError(f"its directory is longer than {_DIRECTORY:,} bytes")
        return content


def read_zip(path: Path, members: dict[str, zipfile.ZipInfo]) -> Any:
    """The content of a zip archive of torch.save: dicts and lists of tensors, `Planned` tensors and plain values."""
    (pickled,) = (name for name in members if name.endswith("data.pkl") and name.count("/") <= 1)
    root = pickled[: -len("data.pkl")]
    size = path.stat().st_size
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > size for info in members.values()):
        raise ValueError("its members are compressed, which torch.save does not do")
    check_archive(path)
    with path.open("rb") as file:
        plan = _ZipPlan(path, file, root, members)
        file.seek(plan.start_of(pickled))
        content = read_pickle(Source(file, min(MOST_BYTES, members[pickled].file_size)), plan.made, plan.persistent)
        plan.check()
    if plan.plain:
        return _load(path, mmap=True)
    if f"{root}byteorder" in members and plan.text_of(f"{root}byteorder") != b"little":
        raise ValueError("its values are in the byte order of another machine")
    plan.check_overlap()
    return content


class _ZipPlan(_Plan):
    def __init__(self, path: Path, file: BinaryIO, root: str, members: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__()
        self._path, self._file, self._root, self._members = path, file, root, members
        self._starts: dict[str, int] = {}

    def start_of(self, name: str) -> int:
        """Where the member's bytes begin in the file."""
        info = self._members[name]
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if header[:4] != b"PK\3\4":
            raise ValueError(f"its member {shortened(name)} is damaged")
        start = info.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        if start + info.file_size > self._path.stat().st_size:
            raise ValueError(f"its member {shortened(name)} is cut off")
        return start

    def text_of(self, name: str) -> bytes:
        with zipfile.ZipFile(self._path) as archive, archive.open(name) as member:
            return member.read(16).strip()

    def check(self) -> None:
        """Raise ValueError unless the file has all bytes of every storage."""
        for key, storage in self.storages.items():
            name = f"{self._root}data/{key}"
            held = self._members[name].file_size if name in self._members else -1
            if held < storage.numel * storage.dtype.itemsize:
                raise ValueError(
                    f"it declares {storage.numel * storage.dtype.itemsize:,} bytes of values in {shortened(name)} "
                    + (f"and has {held:,}" if held >= 0 else "and has none")
                )
            self._starts[key] = self.start_of(name)

    def read(self, key: str) -> Tensor:
        start, storage = self._starts[key], self.storages[key]
        return _mapped(self._path)[start : start + storage.numel * storage.dtype.itemsize]


def read_legacy(path: Path) -> Any:
    """The content of a file of torch.save's older format, as `read_zip` gives it."""
    size = path.stat().st_size
    plan = _LegacyPlan(path)
    with path.open("rb") as file:
        source = Source(file)
        _, protocol, machine = (read_pickle(source) for _ in range(3))
        if protocol != 1001 or not isinstance(machine, dict):
            raise ValueError("it is of an unknown version of torch.save")
        content = read_pickle(source, plan.made, plan.persistent)
        keys = read_pickle(source)
        if not isinstance(keys, list) or {*keys} != {*plan.storages}:
            raise ValueError("its list of storages is not that of its tensors")
        place = file.tell()
        for key in keys:
            storage = plan.storages[key]
            # Each storage has its number of elements before its values.
            file.seek(place)
            held = int.from_bytes(file.read(8), "little")
            end = place + 8 + storage.numel * storage.dtype.itemsize
            if held != storage.numel or end > size:
                raise ValueError(f"it declares {storage.numel:,} elements in storage {shortened(key)} and has fewer")
            plan.starts[key] = place + 8
            place = end
    if not machine.get("little_endian", True):
        raise ValueError("its values are in the byte order of another machine")
    # torch.load would take the memory of all values, of which a network's may be few.
    if plan.plain and size <= MOST_READ:
        return _load(path, mmap=False)
    plan.check_overlap()
    return content


class _LegacyPlan(_Plan):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self.starts = path, dict[str, int]()

    def read(self, key: str) -> Tensor:
        start, storage = self.starts[key], self.storages[key]
        return _mapped(self._path)[start : start + storage.numel * storage.dtype.itemsize]


def _mapped(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)


def load_tensors(path: str | Path, mmap: bool) -> Any:
    """torch.load of tensors and plain values, on the CPU. Errors as of torch.load."""
    if Path(path).suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # torch takes a name with this suffix, but not an open file, for a safetensors file.
    with Path(path).open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _load(path: Path, mmap: bool) -> Any:
    try:
        return load_tensors(path, mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"torch.load refuses it: {first_line(error)}") from error
