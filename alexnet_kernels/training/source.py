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
from pathlib import Path

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels._files import local_path, portable_path, read_bounded, read_head
from alexnet_kernels.training.formats import LARGEST

__all__ = ["Source"]

_MACHINE_ERRORS = frozenset(
    (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE,
        errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
    )
)  # fmt: skip

_UTF8_NAME = 0x800
"""The flag of a member of a zip whose name is in UTF-8."""
_BLOCK = 1 << 14
_WHOLE = 4 << 30
"""Bytes of all files of a folder up to which their whole content is checked."""


class Source:
    """The files below a folder or inside a zip, by their POSIX paths relative to it. A zip is read in place.

    Names are UTF-8, whatever the locale; bytes that are not are surrogates, as of the error handler surrogateescape.
    Hidden files and folders are left out. In a zip, backslashes are slashes, as some programs for Windows write them;
    names without the flag of UTF-8 are UTF-8 if they can be, else code page 437. Pickled, a source opens files, but its
    lists are empty.

    Args:
        path: the folder or the zip.

    Attributes:
        files, folders: sorted relative paths.
        hidden: sorted relative paths of hidden files and of the uppermost hidden folders.
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
        self._prefix = ""
        self._sizes: dict[str, int] = {}
        self.unread: list[str] = []
        self.hidden: list[str] = []
        files, folders = self._zip_entries() if self._is_zip else self._folder_entries()
        self.files, self.folders = sorted(files), sorted(folders)
        self.hidden.sort()
        self.unread.sort()

    def enter(self, folder: str) -> None:
        """Take the files below a folder for all there are; names are then relative to it."""
        self._prefix += f"{folder}/"
        cut = len(folder) + 1
        for names in (self.files, self.folders, self.hidden, self.unread):
            names[:] = [name[cut:] for name in names if name.startswith(f"{folder}/")]

    def _zip_entries(self) -> tuple[list[str], list[str]]:
        """Files and folders in the zip; records the files' sizes."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = _members(archive)
        except MemoryError:
            raise
        except Exception as error:
            # Besides BadZipFile, a damaged directory raises what its fields happen to cause.
            raise InputError(f"{self.path} is neither a folder nor a readable zip: {first_line(error)}") from error
        files, folders, hidden = [], set(), set()
        for name, member in members.items():
            parts = name.split("/")
            if not name.strip("/") or not parts[0] or ":" in parts[0] or ".." in parts:
                raise InputError(f"{self.path}: the zip names a file outside itself, {member.filename!r}")
            concealed = next((i for i, part in enumerate(parts, 1) if not _visible(part)), 0)
            if concealed:
                hidden.add("/".join(parts[:concealed]))
            elif parts[-1]:
                files.append(name)
                self._sizes[name] = member.file_size
            for depth in range(1, concealed or len(parts)):
                folders.add("/".join(parts[:depth]))
        self.hidden = list(hidden)
        return files, list(folders)

    def _folder_entries(self) -> tuple[list[str], list[str]]:
        """Files and folders below the folder, also through links; records the folders that can't be listed."""
        files: list[str] = []
        folders: list[str] = []
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while waiting:
            folder, above = waiting.pop()
            try:
                state = os.stat(self._place(folder))
                inside = above | {(state.st_dev, state.st_ino)}
                if inside == above:
                    self.unread.append(f"{folder}: a link to a folder that holds it")
                    continue
                with os.scandir(self._place(folder)) as entries:
                    for entry in entries:
                        own = portable_path(entry.name)
                        name = f"{folder}/{own}" if folder else own
                        if not _visible(own):
                            self.hidden.append(name)
                        elif _is_folder(entry):
                            folders.append(name)
                            waiting.append((name, inside))
                        else:
                            files.append(name)
            except OSError as error:
                if not folder:
                    raise InputError(f"{self.path} can't be read: {error.strerror or error}") from error
                self.unread.append(f"{folder}: {error.strerror or error}")
        return files, folders

    def _place(self, name: str) -> Path:
        """Where a file of a folder lies."""
        return self.path / local_path(self._prefix + name)

    def size_of(self, name: str) -> int:
        """The file's size in bytes; -1 for a broken link."""
        if self._is_zip:
            return self._sizes[self._prefix + name]
        try:
            return self._place(name).stat().st_size
        except OSError:
            return -1

    def checksums(self, names: Sequence[str]) -> tuple[str, list[int]]:
        """A checksum of each file, and its kind: "crc32" of the content, or "blocks" of it in a folder above 4 GiB.

        Those of a zip are in its directory. A file that can't be read has -1.
        """
        if self._is_zip:
            with zipfile.ZipFile(self.path) as archive:
                found = _members(archive)
            return "crc32", [found[self._prefix + name].CRC for name in names]
        whole = sum(map(self.size_of, names)) <= _WHOLE
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(lambda name: _checksum(self._place(name), whole), names))
        return "crc32" if whole else "blocks", sums

    def at_fault(self, error: Exception) -> bool:
        """Whether the machine or the whole source failed, and not the one image that was read."""
        return isinstance(error, MemoryError) or (
            isinstance(error, OSError) and (error.errno in _MACHINE_ERRORS or not self.path.exists())
        )

    def __getstate__(self) -> dict[str, object]:
        # Processes that read images only open files; the lists are long.
        lists = ("files", "folders", "hidden", "unread", "_sizes")
        return {key: value for key, value in self.__dict__.items() if key not in ("_local", *lists)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.files, self.folders, self.hidden, self.unread, self._sizes = [], [], [], [], {}
        self._local = threading.local()

    def open(self, name: str) -> io.BytesIO:
        """The content of a file. ValueError if it has more bytes than `LARGEST`, or is no regular file."""
        if not self._is_zip:
            return io.BytesIO(read_bounded(self._place(name), LARGEST))
        return _member(*self._find(name))

    def head(self, name: str, count: int) -> bytes:
        """The first bytes of a file, up to `count`. ValueError if it is no regular file, or packed otherwise."""
        if not self._is_zip:
            return read_head(self._place(name), count)
        archive, member = self._find(name)
        _check_packing(member)
        with archive.open(member) as file:
            return file.read(count)

    def _find(self, name: str) -> tuple[zipfile.ZipFile, zipfile.ZipInfo]:
        # An archive has one file position, so each thread of each process opens its own.
        local = self._local
        if getattr(local, "process", None) != os.getpid():
            local.archive, local.process = zipfile.ZipFile(self.path), os.getpid()
            local.members = _members(local.archive)
        return local.archive, local.members[self._prefix + name]


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """What the zip holds, by names with slashes; of members with one name, the last. Folders end in a slash."""
    return {_zip_name(member).replace("\\", "/").removeprefix("./"): member for member in archive.infolist()}


def _zip_name(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & _UTF8_NAME or member.filename.isascii():
        return member.filename
    # Info-ZIP and macOS write UTF-8 without saying so; zipfile takes it for code page 437.
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _check_packing(info: zipfile.ZipInfo) -> None:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile unpacks these without a bound: 45 bytes of bzip2 can hold 46 MB.
        packing = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}.get(
            info.compress_type, f"method {info.compress_type}"
        )
        raise ValueError(f"it is packed by {packing}, stored and deflated files are read")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO:
    """The content of a member, of which no more is unpacked than the zip declares."""
    if info.file_size > LARGEST:
        raise ValueError(f"it has {info.file_size:,} bytes, at most {LARGEST:,} are read")
    _check_packing(info)
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
    return not name.startswith((".", "__MACOSX"))
