"""The wire format of protocol buffers, as far as it is looked at before a parser has a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alexnet_kernels._errors import InputError

__all__ = ["Fields", "check_fields", "parsed", "varint"]

Fields = Mapping[tuple[int, int], Any]
"""Fields by number and wire type, each with the fields inside it that are looked at."""

_MOST = 100_000


def check_fields(content: bytes, inside: Fields) -> None:
    """Raise InputError for more fields than a network has, ValueError for fields that are cut off.

    Empty messages take far more memory than their bytes, so that a small file of them could fill it. Only the fields
    `inside` are entered.
    """
    left = _MOST
    view = memoryview(content)
    areas: list[tuple[int, int, Fields]] = [(0, len(content), inside)]
    while areas:
        at, end, entered = areas.pop()
        while at < end:
            left -= 1
            if left < 0:
                raise InputError(f"its network has more than {_MOST:,} fields")
            tag, at = varint(view, at)
            key = (tag >> 3, tag & 7)
            length = {1: 8, 5: 4}.get(key[1], 0)
            if key[1] in (0, 2):
                value, at = varint(view, at)
                length = value if key[1] == 2 else 0
            elif key[1] not in (1, 5):
                raise ValueError("its protocol buffers can't be parsed")
            if at < 0 or at + length > end:
                raise ValueError("its protocol buffers are cut off")
            if key in entered:
                areas.append((at, at + length, entered[key]))
            at += length


def parsed(message: Any, content: bytes) -> Any:
    """The protobuf message, filled. Raises ValueError for other bytes than its kind's."""
    from google.protobuf.message import DecodeError

    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise ValueError("its protocol buffers can't be parsed") from error
    return message


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where it ends; -1 if it doesn't."""
    value = 0
    for shift in range(0, 70, 7):
        if not 0 <= at < len(data):
            return 0, -1
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1
