"""Writes calls of operators to a file that the sanitizers' executable replays (sanitize.cpp).

The format is little-endian and has no padding:

    file        "ALEXCALL", u32 version (1), u32 calls, the calls
    call        u32 length and text of the operator's name, u32 results, u32 arguments, the arguments
    argument    one letter for the type, then the value:
                T   Tensor          tensor
                O   Tensor?         u8 0, or u8 1 and a tensor
                L   Tensor[]        u32 length, tensors
                i   int             i64
                I   int[]           u32 length, i64 each
                f   float           f64
                b   bool            u8
                d   ScalarType      u8, the number of c10::ScalarType
    tensor      u8 ScalarType, u8 dimensions, i64 sizes, i64 strides, i64 skipped bytes, i64 bytes, the bytes
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import emulation

# The numbers of c10::ScalarType.
DTYPES = {
    torch.uint8: 0,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
VECTOR_BYTES = 16


class _Writer:
    """Writes the parts of the format. `skip`: elements of memory before the first one of every tensor."""

    def __init__(self, file: BinaryIO, skip: int) -> None:
        self.file, self.skip = file, skip
        self.kinds: dict[str, tuple[bytes, Callable[[Any], None]]] = {
            "Tensor": (b"T", self.tensor),
            "Optional[Tensor]": (b"O", self.optional),
            "List[Tensor]": (b"L", lambda value: self.sequence(value, self.tensor)),
            "int": (b"i", lambda value: self.pack("q", value)),
            "SymInt": (b"i", lambda value: self.pack("q", value)),
            "List[int]": (b"I", lambda value: self.sequence(value, lambda number: self.pack("q", number))),
            "List[SymInt]": (b"I", lambda value: self.sequence(value, lambda number: self.pack("q", number))),
            "float": (b"f", lambda value: self.pack("d", value)),
            "bool": (b"b", lambda value: self.pack("B", value)),
            "ScalarType": (b"d", lambda value: self.pack("B", DTYPES[value])),
        }

    def pack(self, letters: str, *values: float) -> None:
        self.file.write(struct.pack(f"<{letters}", *values))

    def sequence(self, values: Sequence[Any], write: Callable[[Any], None]) -> None:
        self.pack("I", len(values))
        for value in values:
            write(value)

    def optional(self, value: Tensor | None) -> None:
        self.pack("B", value is not None)
        if value is not None:
            self.tensor(value)

    def tensor(self, value: Tensor) -> None:
        """The tensor's elements and the gaps between them, and how far its memory is from the alignment of vectors."""
        value = value.detach()
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        flat = value.as_strided((last + 1 if value.numel() else 0,), (1,), value.storage_offset())
        skipped = value.data_ptr() % VECTOR_BYTES + self.skip * value.element_size()
        self.pack("BB", DTYPES[value.dtype], value.dim())
        self.pack(f"{2 * value.dim()}q", *value.shape, *value.stride())
        self.pack("qq", skipped, flat.numel() * value.element_size())
        self.file.write(flat.contiguous().view(torch.uint8).numpy().tobytes())

    def call(self, op: str, arguments: Sequence[Any]) -> None:
        schema = getattr(getattr(torch.ops, emulation.NAMESPACE), op).default._schema
        returns = [str(result.type) for result in schema.returns]
        if set(returns) - {"Tensor"}:
            raise TypeError(f"{op} returns {returns}: only tensors can be replayed")
        missing = [argument.default_value for argument in schema.arguments[len(arguments) :]]
        self.sequence(op.encode(), lambda byte: self.pack("B", byte))
        self.pack("II", len(returns), len(schema.arguments))
        for argument, value in zip(schema.arguments, [*arguments, *missing], strict=True):
            letter, write = self.kinds[str(argument.real_type)]
            self.file.write(letter)
            write(value)


def write(calls: Iterable[tuple[str, tuple]], path: Path, *, skip: int = 0) -> None:
    """Writes (operator, arguments) pairs to `path`; operators are named without their namespace.

    Each tensor is replayed with its sizes, strides and values, in memory of its own that ends with its last element.
    The tensor keeps its offset from the alignment of vectors, to which `skip` elements are added.
    """
    emulation.load()  # registers the schemas
    calls = list(calls)
    with open(path, "wb") as file:
        writer = _Writer(file, skip)
        file.write(b"ALEXCALL")
        writer.pack("II", 1, len(calls))
        for op, arguments in calls:
            writer.call(op, arguments)
