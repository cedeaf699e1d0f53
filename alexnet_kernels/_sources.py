"""Which sources a native library was built from: setup.py puts the digest into it, and reads this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """Of all C++ and CUDA sources in `folder`, their paths and their contents: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            found.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]
