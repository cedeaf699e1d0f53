"""Errors that are the caller's to mend."""

from __future__ import annotations

import importlib

__all__ = ["InputError", "MissingPackage", "RunError", "first_line", "require"]


class InputError(ValueError):
    """A setting, a file or a set of images that can't be used, in one line that says why."""


class RunError(RuntimeError):
    """A run that can't go on, in one line that says why."""


class MissingPackage(ImportError):
    """A package of the `train` extra that isn't installed."""


def first_line(error: BaseException) -> str:
    """Of its message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML"}


def require(what: str, *modules: str) -> None:
    """Import the modules, or raise `MissingPackage` saying that `what` needs one and how to get it."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            # A package that is there and fails by itself is another story.
            if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
                raise
            name = _DISTRIBUTIONS.get(module, module)
            raise MissingPackage(
                f"{what} needs {name}; install it with: pip install 'alexnet_kernels[train]'"
            ) from error
