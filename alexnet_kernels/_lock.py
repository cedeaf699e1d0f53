"""A lock for a folder that one process at a time may change."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from alexnet_kernels._errors import InputError

__all__ = ["locked"]

_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))
"""Errors of file systems that have no locks."""
_held: set[str] = set()
"""The folders that this process has locked: POSIX locks don't exclude the process itself."""


@contextlib.contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the folder's lock, the file .lock, inside the block. InputError with the text `busy` if another holds it.

    The lock ends with the process that holds it, also if that is killed; its children do not have it.
    """
    path, key = folder / ".lock", os.path.realpath(folder)
    if key in _held:
        raise InputError(busy)
    while True:
        file = path.open("ab")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise InputError(busy) from None
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        # Whoever held the lock has removed the file since it was opened here.
        file.close()
    _held.add(key)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()
        _held.discard(key)
