"""Access to the files of an image set in a folder or in a zip archive."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels._files import read_bounded
from alexnet_kernels.training.decoding import LARGEST

__all__ = ["Source"]

_MACHINE_ERRORS = frozenset(
    (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE,
        errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
    )
)  # fmt: skip

_BLOCK = 1 << 14
_WHOLE = 4 << 30
"""Bytes of all files of a folder up to which their whole content is checked."""


class Source:
    """The files below a folder or inside a zip, by their POSIX paths relative to it. A zip is read in place.

    Hidden files and folders are left out. A zip of one folder that holds the splits is taken as that folder. In a zip
    without slashes, as some programs for Windows write them, backslashes are slashes. Pickled, a source opens files,
    but its lists are empty.

    Args:
        path: the folder or the zip.

    Attributes:
        files, folders: sorted relative paths.
        unread: sorted relative paths of folders that can't be listed, each with the reason.

    Raises:
        InputError: the path does not exist, is no folder and no readable zip, or the zip names a file outside itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: there is no such folder or zip") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise InputError(f"{path} is neither a folder nor a readable zip: it is not a regular file")
        self._local = threading.local()
        self._is_zip = stat.S_ISREG(mode)
        self._separator = "/"
        self._sizes: dict[str, int] = {}
        self.unread: list[str] = []
        files, folders = self._zip_entries() if self._is_zip else self._folder_entries()
        self._prefix = _common_folder(files) if self._is_zip else ""
        cut = len(self._prefix)
        self.files = sorted(name[cut:] for name in files if name.startswith(self._prefix) and _visible(name))
        self.folders = sorted(
            name[cut:] for name in folders if name.startswith(self._prefix) and len(name) > cut and _visible(name)
        )
        self.unread.sort()

    def _zip_entries(self) -> tuple[list[str], list[str]]:
        """Files and folders in the zip; records the files' sizes."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except MemoryError:
            raise
        except Exception as error:
            # Besides BadZipFile, a damaged directory raises what its fields happen to cause.
            raise InputError(f"{self.path} is neither a folder nor a readable zip: {first_line(error)}") from error
        if not any("/" in member.filename for member in members):
            self._separator = "\\"
        names = [member.filename.replace(self._separator, "/") for member in members]
        files = [name for name in names if not name.endswith("/")]
        for name in files:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if not parts or parts[0] == "/" or ":" in parts[0] or ".." in parts or "\\" in name:
                raise InputError(f"{self.path}: the zip names a file outside itself, {name!r}")
        self._sizes = {name: member.file_size for name, member in zip(names, members, strict=True)}
        return files, [name.rstrip("/") for name in names if name.endswith("/")]

    def _folder_entries(self) -> tuple[list[str], list[str]]:
        """Files and folders below the folder, also through links; records the folders that can't be listed."""
        files: list[str] = []
        folders: list[str] = []
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while waiting:
            folder, above = waiting.pop()
            try:
                state = os.stat(self.path / folder)
                inside = above | {(state.st_dev, state.st_ino)}
                if inside == above:
                    self.unread.append(f"{folder}: a link to a folder that holds it")
                    continue
                with os.scandir(self.path / folder) as entries:
                    for entry in entries:
                        if not _visible(entry.name):
                            continue
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        if _is_folder(entry):
                            folders.append(name)
                            waiting.append((name, inside))
                        else:
                            files.append(name)
            except OSError as error:
                if not folder:
                    raise InputError(f"{self.path} can't be read: {error.strerror or error}") from error
                self.unread.append(f"{folder}: {error.strerror or error}")
        return files, folders

    def size_of(self, name: str) -> int:
        """The file's size in bytes; -1 for a broken link."""
        if self._is_zip:
            return self._sizes[self._prefix + name]
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return -1

    def checksums(self, names: Sequence[str]) -> tuple[str, list[int]]:
        """A checksum of each file, and its kind: "crc32" of the content, or "blocks" of it in a folder above 4 GiB.

        Those of a zip are in its directory. A file that can't be read has -1.
        """
        if self._is_zip:
            with zipfile.ZipFile(self.path) as archive:
                found = {member.filename.replace("\\", "/"): member.CRC for member in archive.infolist()}
            return "crc32", [found[self._prefix + name] for name in names]
        whole = sum(map(self.size_of, names)) <= _WHOLE
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(lambda name: _checksum(self.path / name, whole), names))
        return "crc32" if whole else "blocks", sums

    def at_fault(self, error: Exception) -> bool:
        """Whether the machine or the whole source failed, and not the one image that was read."""
        return isinstance(error, MemoryError) or (
            isinstance(error, OSError) and (error.errno in _MACHINE_ERRORS or not self.path.exists())
        )

    def __getstate__(self) -> dict[str, object]:
        # Processes that read images only open files; the lists are long.
        lists = ("files", "folders", "unread", "_sizes")
        return {key: value for key, value in self.__dict__.items() if key not in ("_local", *lists)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.files, self.folders, self.unread, self._sizes = [], [], [], {}
        self._local = threading.local()

    def open(self, name: str) -> io.BytesIO:
        """The content of a file. ValueError if it has more bytes than `LARGEST`, or is no regular file."""
        if not self._is_zip:
            return io.BytesIO(read_bounded(self.path / name, LARGEST))
        # An archive has one file position, so each thread of each process opens its own.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = zipfile.ZipFile(self.path), os.getpid()
        return _member(self._local.archive, (self._prefix + name).replace("/", self._separator))


def _member(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """The content of a member, of which no more is unpacked than the zip declares."""
    info = archive.getinfo(name)
    if info.file_size > LARGEST:
        raise ValueError(f"it has {info.file_size:,} bytes, at most {LARGEST:,} are read")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile unpacks these without a bound: 45 bytes of bzip2 can hold 46 MB.
        packing = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}.get(
            info.compress_type, f"method {info.compress_type}"
        )
        raise ValueError(f"it is packed by {packing}, stored and deflated files are read")
    content = io.BytesIO()
    with archive.open(info) as file:
        while part := file.read(1 << 20):
            content.write(part)
    if content.tell() != info.file_size:
        raise ValueError(f"it has {content.tell():,} bytes, the zip declares {info.file_size:,}")
    content.seek(0)
    return content


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # The reason is told where the file is read.
        return False


def _checksum(path: Path, whole: bool) -> int:
    """The CRC-32 of a file, or of its size and its first, middle and last block; -1 if it can't be read."""
    try:
        # A pipe would wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return -1
    try:
        state = os.fstat(file)
        if not stat.S_ISREG(state.st_mode):
            return -1
        last = max(0, state.st_size - _BLOCK)
        crc = 0 if whole else zlib.crc32(str(state.st_size).encode())
        for place in range(0, state.st_size, _BLOCK) if whole else (0, last // 2, last):
            crc = zlib.crc32(os.pread(file, _BLOCK, place), crc)
        return crc
    except OSError:
        return -1
    finally:
        os.close(file)


def _visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _common_folder(files: Sequence[str]) -> str:
    """The single top folder of a zip that was made of a folder instead of its contents, with a slash, or ""."""
    tops = {name.split("/")[0] for name in files if _visible(name)}
    if len(tops) == 1 and not tops & {"train", "val"}:
        return f"{tops.pop()}/"
    return ""
