"""Reads pickles of numpy arrays and plain values, Python 2's among them, that may be packed by gzip or in a zip."""

from __future__ import annotations

import gzip
import math
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy

from alexnet_kernels._errors import InputError, first_line, printable, shortened
from alexnet_kernels.models.formats.pickles import Made, Source, read_pickle

__all__ = ["Array", "read_arrays"]

_MOST_BYTES = 3 << 30
_MOST_UNPACKED = 3 << 29
_MOST_INSTRUCTIONS = 20_000_000
"""A checkpoint has the results of every batch of a training."""
_MEMBER = "data"
"""The member of a zip that cuda-convnet's compressed checkpoints have."""
_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _Type(Made):
    """numpy.dtype of a pickle."""

    def dtype(self) -> numpy.dtype[Any]:
        """The type, with the byte order that the pickle sets. InputError if it is not one of numbers."""
        text = _text(self.arguments[0])
        order = _text(self.state[1]) if isinstance(self.state, tuple) and len(self.state) > 1 else ""
        if text[:1] not in ("<", ">", "|", "=") and order in ("<", ">", "|", "="):
            text = order + text
        if text.lstrip("<>|=") not in _TYPES:
            raise InputError(f"an array is of type {printable(shortened(self.arguments[0]))}; numbers are expected")
        return numpy.dtype(text)


class Array(Made):
    """A numpy array of a pickle, whose bytes are not looked at before `numbers` is called."""

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self._parts()[0]
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            raise InputError("an array has a shape that is not numbers")
        return shape

    def numbers(self) -> numpy.ndarray[Any, Any]:
        """The array. InputError if its bytes are not those of its shape and type."""
        _, kind, fortran, data = self._parts()
        shape = self.shape
        if not isinstance(kind, _Type) or not isinstance(data, str | bytes | bytearray):
            raise InputError("an array holds objects; numbers are expected")
        dtype = kind.dtype()
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise InputError(f"an array of shape {shape} and type {dtype.name} has {len(data):,} bytes")
        if isinstance(data, str):
            # The bytes take the place of Python 2's string, so that there are not two of them.
            data = data.encode("latin-1")
            self.state = (shape, kind, fortran, data)
        return numpy.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")

    def _parts(self) -> tuple[Any, Any, Any, Any]:
        """Shape, type, whether columns come first, and bytes."""
        if not isinstance(self.state, tuple) or len(self.state) not in (4, 5):
            raise InputError("an array has no content")
        return self.state[-4:]


def _text(value: object) -> str:
    """A string of Python 2 or 3, empty for anything else."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""


def read_arrays(path: Path) -> Any:
    """The value of a pickle file, of a gzip file of one, or of a zip with one in its member `data`, as `read_pickle`.

    numpy arrays are `Array`, and numpy's scalars are numbers. Raises ValueError, InputError or OSError for files that
    are not such, or too large.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise InputError("it is not a regular file")
    if about.st_size > _MOST_BYTES:
        raise InputError(f"it has {about.st_size:,} bytes, at most {_MOST_BYTES:,} are read")
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        try:
            if head[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return _read(unpacked, _MOST_UNPACKED)  # type: ignore[arg-type]
            if head == b"PK\x03\x04":
                with zipfile.ZipFile(file) as archive, archive.open(_MEMBER) as member:
                    return _read(member, _MOST_UNPACKED)  # type: ignore[arg-type]
        except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
            raise InputError(f"it is a zip without a readable member {_MEMBER}") from error
        except zlib.error as error:
            raise ValueError(f"its compressed data are damaged ({first_line(error)})") from error
        return _read(file, _MOST_BYTES)


def _read(file: BinaryIO, limit: int) -> Any:
    return read_pickle(Source(file, limit, _MOST_INSTRUCTIONS), _made)


def _made(function: Any, arguments: Any) -> Any:
    """What a call of the pickle stands for, of the functions that numpy writes."""
    call = Made(function, arguments)
    module, _, last = call.name.rpartition(".")
    if not module.startswith("numpy") or not isinstance(arguments, tuple):
        return call
    if last == "_reconstruct":
        return Array(function, ())
    if last == "_frombuffer" and len(arguments) == 4:
        data, kind, shape, order = arguments
        return Array(function, (), (shape, kind, order == "F", data))
    if last == "scalar" and len(arguments) == 2:
        return Array(function, (), ((), arguments[0], False, arguments[1])).numbers().item()
    if last == "dtype" and arguments:
        return _Type(function, arguments)
    return call
