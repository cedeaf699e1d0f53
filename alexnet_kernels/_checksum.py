"""CRC-32 checksums of the files that the package writes, which are checked when they are read.

A checkpoint is a zip, whose members have checksums of their own. A safetensors file has one in its metadata, over the
whole file.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alexnet_kernels._errors import first_line

__all__ = ["check_archive", "check_safetensors", "crc_of_file", "serialize_safetensors"]

_BLOCK = 1 << 20
_KEY = "alexnet_kernels_crc32"
_UNSET = "00000000"
_HEADER = 100_000_000
"""The longest header that the package safetensors reads, in bytes."""
_ENTRY = re.compile(rf'"{_KEY}":"([0-9a-f]{{8}})"'.encode())
"""The checksum in the header of a safetensors file. It is that of the file with zeros in its place."""


def crc_of_file(path: str | Path, before: int = 0, start: int = 0) -> int:
    """The CRC-32 of the file's bytes from `start` on; `before` is the CRC-32 of what precedes them."""
    with Path(path).open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            before = zlib.crc32(block, before)
    return before


def check_archive(path: str | Path) -> None:
    """Raise ValueError unless the file is a zip whose members all have their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        # zipfile raises many kinds of errors for damaged files.
        raise ValueError(first_line(error)) from error
    if damaged is not None:
        raise ValueError(f"{damaged} does not have its checksum")


def serialize_safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file with a checksum. Needs the package safetensors."""
    from safetensors.torch import save

    content = save(dict(tensors), {**metadata, _KEY: _UNSET})
    place = content.index(f'"{_KEY}":"{_UNSET}"'.encode()) + len(f'"{_KEY}":"')
    return b"".join((content[:place], f"{zlib.crc32(content):08x}".encode(), content[place + len(_UNSET) :]))


def check_safetensors(path: str | Path) -> None:
    """Raise ValueError if the file has a checksum of `serialize_safetensors` that is not its own."""
    path = Path(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _HEADER or size > path.stat().st_size:
            raise ValueError("its header is cut off, or longer than any")
        file.seek(0)
        header = file.read(8 + size)
    found = _ENTRY.search(header)
    if found is None:
        return
    unset = header[: found.start(1)] + _UNSET.encode() + header[found.end(1) :]
    if crc_of_file(path, zlib.crc32(unset), len(header)) != int(found[1], 16):
        raise ValueError("it does not have its checksum: it is damaged, or was changed by another program")
