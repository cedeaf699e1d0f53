"""Files that are written completely or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from alexnet_kernels._errors import InputError, RunError

__all__ = ["atomic_file", "link_atomically", "output_path", "remove_temporaries", "write_atomically", "write_errors"]


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write. It replaces `path`, on disk, when the block ends; if the block raises, `path` is unchanged."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates the file for its owner alone; the only way to read the mask is to set it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_atomically(path: str | Path, text: str) -> None:
    """Write the text, in UTF-8, to `path` by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(text.encode())


def link_atomically(source: Path, path: Path) -> None:
    """Make `path`, which may exist, a hard link to `source`; a copy if the file system has no hard links."""
    temporary = path.with_name(f".{path.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_file(path) as file, source.open("rb") as original:
            while block := original.read(1 << 20):
                file.write(block)
        return
    os.replace(temporary, path)
    _sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that a killed process left in the folder."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    # Makes the new name durable. Some file systems refuse to sync a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def output_path(path: str | Path, *suffixes: str, option: str = "") -> Path:
    """The path, given by `option` if by one. InputError unless it has one of the suffixes and its folder exists."""
    what, path = f"{option} {path}".strip(), Path(path)
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{what}: a {' or '.join(suffixes)} file is expected")
    if not path.parent.is_dir():
        raise InputError(f"{what}: there is no folder {path.parent}")
    return path


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
