"""Files that are written completely or not at all, and files that others wrote."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from alexnet_kernels._errors import InputError, RunError

__all__ = [
    "atomic_file",
    "link_atomically",
    "local_path",
    "output_path",
    "portable_path",
    "read_bounded",
    "read_head",
    "remove_temporaries",
    "write_atomically",
    "write_csv",
    "write_errors",
]


_IS_UTF8 = sys.getfilesystemencoding().lower() in ("utf-8", "utf8")


def portable_path(path: str) -> str:
    """A path of this process as UTF-8, which it is already unless the locale says otherwise.

    Bytes that are not UTF-8 are surrogates, as of the error handler surrogateescape.
    """
    return path if _IS_UTF8 else os.fsencode(path).decode(errors="surrogateescape")


def local_path(path: str) -> str:
    """Inverse of `portable_path`: a path that a process of another locale may have recorded."""
    return path if _IS_UTF8 else os.fsdecode(path.encode(errors="surrogateescape"))


class _WrittenFile(io.FileIO):
    """A file that remembers why a write failed: libraries that write to it may raise errors without the reason."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write. It replaces `path`, on disk, when the block ends; if the block raises, `path` is unchanged.

    An OSError of a write is raised as such, whatever the block made of it.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=_temporary_prefix(path.name), suffix=".tmp", dir=path.parent)
    raw = _WrittenFile(handle, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates the file for its owner alone; the only way to read the mask is to set it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if raw.error is not None and isinstance(error, Exception) and not isinstance(error, OSError):
            raise raw.error from error
        raise
    _sync_folder(path.parent)


def _temporary_prefix(name: str) -> str:
    # The temporary name must fit where the name fits: 255 bytes in most file systems.
    return f".{os.fsdecode(os.fsencode(name)[:200])}."


def write_atomically(path: str | Path, text: str) -> None:
    """Write the text to `path` by `atomic_file`, in UTF-8. Bytes of names that are not UTF-8 become \\x escapes."""
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the rows, whose keys are the first row's, to `path` by `atomic_file`. Without rows, nothing is written."""
    if not rows:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The content of a file of up to `limit` bytes. ValueError if it is larger, or a pipe, a device or a folder."""
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is not a regular file")
        if state.st_size > limit:
            raise ValueError(f"it has {state.st_size:,} bytes, at most {limit:,} are read")
        with io.BufferedReader(file) as reader:
            content = reader.read(state.st_size + 1)
    if len(content) > state.st_size:
        raise ValueError("it grew while it was read")
    return content


def read_head(path: str | Path, count: int) -> bytes:
    """The first bytes of a file, up to `count`. ValueError for a pipe, a device or a folder."""
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        return file.read(count)


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    return os.open(path, flags | os.O_NONBLOCK)


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
    if not os.path.isdir(path.parent):
        raise InputError(f"{what}: there is no folder {path.parent}")
    return path


@contextlib.contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from error
