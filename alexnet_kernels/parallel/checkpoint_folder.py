"""The folder of a distributed checkpoint: read without executing what is in it, with a checksum for each file.

torch.distributed.checkpoint stores its index, .metadata, and the values that are no tensors as pickles. Here the index
may name the classes of an index only, and the values are read as torch.load(weights_only=True) reads them.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from alexnet_kernels._checksum import crc_of_file
from alexnet_kernels._files import write_atomically

__all__ = ["DataPlanner", "DataReader", "problem_of", "write_checksums"]

INDEX, CHECKSUMS = ".metadata", "checksums.json"
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What an index consists of, besides dtypes, the folder's path and Python's plain types."""


class _IndexUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """The unpickler in Python: a few bytes make the one in C allocate gigabytes for its memo."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":
            return PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the index of a checkpoint")


class DataReader(FileSystemReader):
    """FileSystemReader that takes nothing but data from the index, and reads only files in the folder itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises pickle.UnpicklingError for any other content."""
        content = io.BytesIO((Path(self.path) / INDEX).read_bytes())
        try:
            index = _IndexUnpickler(content).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            # Damaged pickles raise errors of many types.
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
        if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        for place in index.storage_data.values():
            name = getattr(place, "relative_path", None)
            if not isinstance(name, str) or PurePosixPath(name).name != name:
                raise pickle.UnpicklingError(f"it names a file outside the folder, {name!r}")
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return index


class DataPlanner(DefaultLoadPlanner):
    """DefaultLoadPlanner that refuses code in the values that are no tensors."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of each file of the folder."""
    sums = {path.name: crc_of_file(path) for path in sorted(folder.iterdir())}
    write_atomically(folder / CHECKSUMS, json.dumps(sums))


def problem_of(folder: Path) -> str:
    """Why the folder can't be read, or "". Folders of earlier versions have no checksums to check."""
    if not (folder / INDEX).is_file():
        return f"{folder} is no checkpoint of parallel.save"
    try:
        if (folder / CHECKSUMS).is_file():
            sums = json.loads((folder / CHECKSUMS).read_text())
            files = {path.name for path in folder.iterdir() if path.name != CHECKSUMS}
            if sums.keys() != files:
                return f"{folder} is damaged: {CHECKSUMS} is of other files"
            for name, crc in sums.items():
                if PurePosixPath(name).name != name or crc_of_file(folder / name) != crc:
                    return f"{folder} is damaged: {name} does not have its checksum"
        DataReader(folder).read_metadata()
    except (OSError, ValueError, AttributeError, RecursionError, pickle.UnpicklingError) as error:
        return f"{folder} is damaged, or no checkpoint of parallel.save: {error}"
    return ""
