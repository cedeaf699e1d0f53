"""The user's tables of choices: one file a device, driver and set of versions, in the user's cache folder.

`alexnet-kernels tune` writes them. A file is data, checked value by value: one that is damaged or foreign is ignored,
with one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels import _library
from alexnet_kernels._dispatch.contracts import public_ops
from alexnet_kernels._dispatch.kinds import DTYPES, FORMATS, MOST, Kind, Row, names_of, shape_names
from alexnet_kernels._errors import InputError, RunError, first_line, shortened
from alexnet_kernels._files import read_bounded, write_atomically
from alexnet_kernels._lock import locked
from alexnet_kernels._version import __version__

VARIABLE = "ALEXNET_KERNELS_CACHE"
"""The environment variable that names the folder of the tables."""
FORMAT = 1
_MOST_BYTES = 4 << 20
_MOST_ROWS = 10_000
_PATIENCE = 60.0
"""Seconds to wait for another process that writes."""
_loaded: dict[torch.device, tuple[Row, ...]] = {}
_warned: set[str] = set()


def forget() -> None:
    """Reads the tables anew when they are next needed."""
    _loaded.clear()


def folder() -> Path:
    """Where the tables are. RuntimeError if there is no home folder."""
    if given := os.environ.get(VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "alexnet_kernels"


def identity(device: torch.device) -> dict[str, str]:
    """All on which the times of a device depend: a table for anything else is not used."""
    found = {"alexnet_kernels": __version__, "library": _library.SOURCES or "none"}
    # As text: torch's own type takes 2.14 and 2.14.0 for equal.
    found["torch"] = str(torch.__version__)
    if device.type != "cuda":
        isa = torch.ops.alexnet_kernels.isa() if _library.LOADED else "none"
        return {"device": _cpu(), "kernels": isa, **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
        **found,
    }


def path_of(device: torch.device) -> Path:
    """The file of a device. RuntimeError if there is no home folder."""
    known = identity(device)
    slug = re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")[:60] or "device"
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    return folder() / f"choices-{slug}-{digest}.json"


def rows_of(device: torch.device) -> Sequence[Row]:
    """The user's table for a device; empty if there is none, or none that can be read."""
    if device not in _loaded:
        try:
            path = path_of(device)
        except RuntimeError:  # no home folder
            _loaded[device] = ()
        else:
            _loaded[device] = _read_or_warn(path, identity(device))
    return _loaded[device]


def merge(device: torch.device, rows: Sequence[Row]) -> Path:
    """Puts rows into the device's file, in place of rows of the same kinds. Returns its path.

    Processes that write at the same time lose nothing. RunError if it can't be written.
    """
    path, known = _path(device), identity(device)
    with _writing(path):
        before = {row.kind: row for row in _read_or_warn(path, known)}
        merged = before | {row.kind: row for row in rows}
        content = {"format": FORMAT, "for": known, "rows": [row.to_json() for row in merged.values()]}
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    forget()
    return path


def remove(device: torch.device) -> Path | None:
    """Removes the device's file. Returns its path; None if there was none. RunError if it can't be removed."""
    path = _path(device)
    if not path.parent.is_dir() or not os.path.lexists(path):
        return None
    with _writing(path):
        path.unlink(missing_ok=True)
    forget()
    return path


def check_writable(device: torch.device) -> None:
    """RunError unless the device's file can be written."""
    with _writing(_path(device)):
        pass


def _path(device: torch.device) -> Path:
    try:
        return path_of(device)
    except RuntimeError as error:
        raise RunError(f"there is no folder for the table: {first_line(error)}; {VARIABLE} names one") from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Holds the lock of the file's folder, which it makes, for at most _PATIENCE seconds' wait."""
    end = time.monotonic() + _PATIENCE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(path.parent, f"{path.parent}: another process writes its tables"))
                    break
                except InputError as error:
                    if time.monotonic() > end:
                        raise RunError(str(error)) from error
                    time.sleep(0.02)
            yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written: {error.strerror or error}; {VARIABLE} names another folder"
        ) from error


def _read_or_warn(path: Path, known: dict[str, str]) -> tuple[Row, ...]:
    try:
        return _parse(json.loads(read_bounded(path, _MOST_BYTES)), known)
    except FileNotFoundError:
        return ()
    except OSError as error:
        # A folder or file that can't be reached holds no table of this user's.
        if isinstance(error, PermissionError | NotADirectoryError):
            return ()
        reason = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
    if str(path) not in _warned:
        _warned.add(str(path))
        warnings.warn(f"{path} is ignored: {shortened(reason)}", RuntimeWarning, stacklevel=2)
    return ()


def _parse(content: Any, known: dict[str, str]) -> tuple[Row, ...]:
    """The rows of a file. ValueError with the reason if it is not a table for `known`."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not a table of choices of format {FORMAT}")
    if content.get("for") != known:
        raise ValueError("it was written for another device or other versions")
    rows = content.get("rows")
    if not isinstance(rows, list) or len(rows) > _MOST_ROWS:
        raise ValueError(f"its rows are not a list of at most {_MOST_ROWS:,}")
    return tuple(_row(row, known.get("capability", "cpu")) for row in rows)


def _row(content: Any, device: str) -> Row:
    if not isinstance(content, dict):
        raise ValueError("a row is not an object")
    op, direction, name = (content.get(key) for key in ("op", "direction", "name"))
    if not isinstance(op, str) or op not in public_ops():
        raise ValueError(f"a row is of an unknown op: {shortened(op)!r}")
    if content.get("device") != device or content.get("dtype") not in DTYPES or content.get("format") not in FORMATS:
        raise ValueError("a row is of another device, dtype or memory format")
    if not isinstance(direction, str) or not isinstance(name, str) or name not in names_of(op, direction, device):
        raise ValueError(f"{op} has no implementation {shortened(name)!r} for {shortened(direction)!r}")
    shape, wanted = content.get("shape"), shape_names(op)
    if not isinstance(shape, dict) or set(shape) != set(wanted):
        raise ValueError(f"the shape of a row is not of {', '.join(wanted)}")
    if not all(type(value) is int and 0 <= value <= MOST for value in shape.values()):
        raise ValueError("a number of a row's shape is out of range")
    kind = Kind(op, direction, device, content["dtype"], content["format"], tuple(shape[key] for key in wanted))
    note = content.get("note", "")
    if not isinstance(note, str):
        raise ValueError("the note of a row is not a string")
    return Row(kind, name, "tuned", _times(content.get("times", {})), note)


def _times(content: Any) -> dict[str, dict[str, float]]:
    if not isinstance(content, dict) or not all(isinstance(passes, dict) for passes in content.values()):
        raise ValueError("the times of a row are not objects")
    found = {}
    for name, passes in content.items():
        for time_ in passes.values():
            if type(time_) not in (int, float) or not 0 <= time_ < 1e12:
                raise ValueError(f"a time of a row is out of range: {shortened(time_)}")
        found[name] = {key: float(time_) for key, time_ in passes.items()}
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _driver() -> str:
    with contextlib.suppress(OSError):
        if match := re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", Path("/proc/driver/nvidia/version").read_text()):
            return match[1]
    return "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
