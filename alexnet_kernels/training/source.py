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

from alexnet_kernels._errors import InputError

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

    Hidden files and folders are left out. A zip of one folder that holds the splits is taken as that folder. Pickled, a
    source opens files, but its lists are empty.

    Args:
        path: the folder or the zip.

    Attributes:
        files, folders: sorted relative paths.

    Raises:
        InputError: the path does not exist, is no folder and no readable zip, or the zip names a file outside itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path}: there is no such folder or zip")
        self._local = threading.local()
        self._is_zip = self.path.is_file()
        self._sizes: dict[str, int] = {}
        files, folders = self._zip_entries() if self._is_zip else self._folder_entries()
        self._prefix = _common_folder(files) if self._is_zip else ""
        cut = len(self._prefix)
        self.files = sorted(name[cut:] for name in files if name.startswith(self._prefix) and _visible(name))
        self.folders = sorted(
            name[cut:] for name in folders if name.startswith(self._prefix) and len(name) > cut and _visible(name)
        )

    def _zip_entries(self) -> tuple[list[str], list[str]]:
        """Files and folders in the zip; records the files' sizes."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{self.path} is neither a folder nor a readable zip: {error}") from error
        files = [member.filename for member in members if not member.is_dir()]
        for name in files:
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if not parts or parts[0] == "/" or ":" in parts[0] or ".." in parts or "\\" in name:
                raise InputError(f"{self.path}: the zip names a file outside itself, {name!r}")
        self._sizes = {member.filename: member.file_size for member in members}
        return files, [member.filename.rstrip("/") for member in members if member.is_dir()]

    def _folder_entries(self) -> tuple[list[str], list[str]]:
        files: list[str] = []
        folders: list[str] = []
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            relative = Path(folder).relative_to(self.path)
            folders += [(relative / name).as_posix() for name in subfolders]
            files += [(relative / name).as_posix() for name in names]
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
        lists = ("files", "folders", "_sizes")
        return {key: value for key, value in self.__dict__.items() if key not in ("_local", *lists)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.files, self.folders, self._sizes = [], [], {}
        self._local = threading.local()

    def open(self, name: str) -> io.BytesIO:
        """The content of a file."""
        if not self._is_zip:
            return io.BytesIO((self.path / name).read_bytes())
        # An archive has one file position, so each thread of each process opens its own.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = zipfile.ZipFile(self.path), os.getpid()
        return io.BytesIO(self._local.archive.read(self._prefix + name))


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
