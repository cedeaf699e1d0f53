"""Errors that the user can correct. The command prints their message in one line, without a traceback."""

from __future__ import annotations

import importlib

__all__ = ["InputError", "MissingPackage", "RunError", "first_line", "require"]


class InputError(ValueError):
    """An invalid setting, file or set of images. The message is one line with the reason."""


class RunError(RuntimeError):
    """A run that cannot continue. The message is one line with the reason."""


class MissingPackage(ImportError):
    """A package of the `train` extra that is not installed."""


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML"}


def require(what: str, *modules: str) -> None:
    """Import the modules, or raise `MissingPackage`: `what` needs the package, and how to install it."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            # An installed package that fails to import something else is a different error.
            if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
                raise
            name = _DISTRIBUTIONS.get(module, module)
            raise MissingPackage(
                f"{what} needs {name}; install it with: pip install 'alexnet_kernels[train]'"
            ) from error
