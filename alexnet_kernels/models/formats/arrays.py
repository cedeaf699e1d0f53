"""Files of arrays by name: safetensors and .npz."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._checksum import check_safetensors
from alexnet_kernels._errors import first_line, require

__all__ = ["description_in", "read_npz", "read_safetensors"]

_ARRAYS = 1 << 30
"""Bytes that compressed arrays may have, or ten times those of their file."""
_METADATA = 16 << 20


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and this package's description in the metadata ({} if there is none).

    Raises MissingPackage without the package safetensors, ValueError for a file that is not whole.
    """
    require(f"reading {path}", "safetensors", extra="weights")
    from safetensors import SafetensorError, safe_open

    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"it is truncated, damaged or of another kind ({first_line(error)})") from error
    return tensors, description_in(metadata.get("alexnet_kernels", "{}"))


def description_in(text: str) -> dict[str, Any]:
    """This package's description, JSON in a file's metadata; {} for other values. Raises ValueError for no JSON."""
    if len(text) > _METADATA:
        raise ValueError(f"its metadata are longer than {_METADATA:,} bytes")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata are not JSON ({first_line(error)})") from error
    return found if isinstance(found, dict) else {}


def read_npz(path: Path, members: dict[str, zipfile.ZipInfo]) -> dict[str, Tensor]:
    """The arrays. Raises ValueError for objects, for a damaged file, and for more than memory should hold."""
    import numpy

    declared, size = sum(info.file_size for info in members.values()), path.stat().st_size
    if declared > max(_ARRAYS, 10 * size):
        raise ValueError(f"its arrays would have {declared:,} bytes, from a file of {size:,}")
    try:
        with numpy.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except Exception as error:
        # numpy and zipfile raise many kinds of errors for damaged files.
        raise ValueError(f"its arrays can't be read ({first_line(error)})") from error
