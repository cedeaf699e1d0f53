"""The command `alexnet-kernels`: train, evaluate, predict, extract, convert, prepare, bench, throughput, tune, info.

Exit status: 0; 1 for a run that failed; 2 for invalid arguments or input; 130 for a run that was interrupted.

Each command is a module with `add_parser`, which adds its arguments, and `run`, which executes it. What needs optional
packages is imported inside `run`, so that `--help` and `info` work without them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import torch

from alexnet_kernels._errors import InputError, MissingPackage, RunError, out_of_memory, printable
from alexnet_kernels._version import __version__
from alexnet_kernels.cli import (
    bench,
    convert,
    evaluate,
    extract,
    info,
    predict,
    prepare,
    process,
    throughput,
    train,
    tune,
)
from alexnet_kernels.cli.arguments import PROGRAM

__all__ = ["main"]

_COMMANDS = (train, evaluate, predict, extract, convert, prepare, bench, throughput, tune, info)
_MEMORY = ("batch_size", "image_size", "width", "size")
"""Options by which a command takes less memory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments, or the process's. Returns its exit status."""
    if argv is None:
        process.settle_streams()
    parser = _parser()
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        # argparse takes the value of --name=-- for no value.
        if value == [] and name != "what":
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    options.arguments = list(sys.argv[1:] if argv is None else argv)
    parallel = bool(getattr(options, "parallel", None))
    if argv is None:
        process.settle(parallel)
    if argv is not None or not parallel or "RANK" not in os.environ:
        return _status_of(options)
    status = 1
    try:
        status = _status_of(options)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # gloo's threads may still free tensors while Python shuts down, which sometimes aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(PROGRAM, description="AlexNet: train it, evaluate it, predict with it.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _status_of(options: argparse.Namespace) -> int:
    try:
        status = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except (InputError, MissingPackage) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{'; ' if str(error) else ''}{error}", 130)
    except BrokenPipeError:
        # The reader of the output has gone. Python would fail again when it flushes stdout at exit.
        sys.stdout = None  # type: ignore[assignment]
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        where = "the device is out of memory" if isinstance(error, torch.OutOfMemoryError) else "out of memory"
        smaller = [f"--{name.replace('_', '-')}" for name in _MEMORY if hasattr(options, name)]
        return _fail(where + (f": try a smaller {' or '.join(smaller)}" if smaller else ""), 1)
    except OSError as error:
        return _fail_by_system(error)


def _fail_by_system(error: OSError) -> int:
    """Report an error of the operating system that no command expects, such as a full disk below the output."""
    reason = error.strerror or str(error) or type(error).__name__
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        reason = f"the output can't be written: {reason}"
        sys.stdout = None  # type: ignore[assignment]
    name = error.filename
    return _fail(reason if name is None else f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {reason}", 1)


def _fail(message: str, status: int) -> int:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    with contextlib.suppress(OSError):
        print(printable(f"{PROGRAM}: error: {rank}{message}"), file=sys.stderr, flush=True)
    return status
