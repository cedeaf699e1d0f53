"""Errors that the user can correct. The command prints their message in one line, without a traceback."""

from __future__ import annotations

import importlib
import re
import reprlib

__all__ = [
    "InputError",
    "MissingPackage",
    "RunError",
    "TensorTypeError",
    "TensorValueError",
    "first_line",
    "out_of_memory",
    "printable",
    "require",
    "shortened",
]


class TensorValueError(ValueError, RuntimeError):
    """A tensor of a shape or another property that an op or a model can't take; torch raises RuntimeError."""


class TensorTypeError(TypeError, RuntimeError):
    """A tensor of a dtype that an op can't take; torch raises RuntimeError."""


class InputError(ValueError):
    """An invalid setting, file or set of images. The message is one line with the reason."""


class RunError(RuntimeError):
    """A run that cannot continue. The message is one line with the reason."""


class MissingPackage(ImportError):
    """A package of an extra that is not installed."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shortened(value: object) -> str:
    """The value as it stands in an error, cut where it is long or deeply nested."""
    if isinstance(value, str):
        return value if len(value) <= _MOST else f"{value[:_MOST]}..."
    return _SHORT.repr(value)


_MOST = 200
_SHORT = reprlib.Repr()
_SHORT.maxlong = _SHORT.maxother = _SHORT.maxstring = 80


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is Python's, numpy's or torch's for memory that is not there."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


# Control characters, line separators, marks that reorder text, and the bytes of names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line, for a terminal: what would control the terminal or can't be encoded is escaped."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape").decode()


_DISTRIBUTIONS = {"PIL": "Pillow", "google.protobuf": "protobuf", "yaml": "PyYAML"}


def require(what: str, *modules: str, extra: str = "train") -> None:
    """Import the modules, or raise `MissingPackage`: `what` needs the package of that extra, and how to install it."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            # An installed package that fails to import something else is a different error.
            if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
                raise
            name = _DISTRIBUTIONS.get(module, module)
            raise MissingPackage(
                f"{what} needs {name}; install it with: pip install 'alexnet_kernels[{extra}]'"
            ) from error
