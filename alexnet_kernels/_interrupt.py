"""Ctrl-C while the command `alexnet-kernels` imports torch: one line, as at any later time.

The package imports this module before all others.
"""

from __future__ import annotations

import itertools
import os
import sys
from types import TracebackType

__all__: list[str] = []


def _is_command() -> bool:
    words = sys.orig_argv
    module = sys.argv[:1] == ["-m"] and ("-m", "alexnet_kernels") in itertools.pairwise(words)
    return module or os.path.basename(sys.argv[0] if sys.argv else "") == "alexnet-kernels"


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("alexnet-kernels: error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if _is_command():
    sys.excepthook = _report
