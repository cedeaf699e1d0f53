"""The command `alexnet-kernels`: train, evaluate, predict, convert, prepare, bench, throughput, info.

Exit status: 0; 1 for a run that failed; 2 for invalid arguments or input; 130 for a run that was interrupted.

Each command is a module with `add_parser`, which adds its arguments, and `run`, which executes it. What needs optional
packages is imported inside `run`, so that `--help` and `info` work without them.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import torch

from alexnet_kernels._errors import InputError, MissingPackage, RunError
from alexnet_kernels._version import __version__
from alexnet_kernels.cli import bench, convert, evaluate, info, predict, prepare, throughput, train
from alexnet_kernels.cli.arguments import PROGRAM

__all__ = ["main"]

_COMMANDS = (train, evaluate, predict, convert, prepare, bench, throughput, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments, or the process's. Returns its exit status."""
    options = _parser().parse_args(argv)
    options.arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is not None or not getattr(options, "parallel", None) or "RANK" not in os.environ:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="AlexNet: train it, evaluate it, predict with it.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def _status_of(options: argparse.Namespace) -> int:
    try:
        return options.run(options)
    except (InputError, MissingPackage) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except torch.OutOfMemoryError:
        return _fail("the device is out of memory: try a smaller --batch-size or --image-size", 1)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted{'; ' if str(error) else ''}{error}", 130)
    except BrokenPipeError:
        # The reader of the output has gone. Python would fail again when it flushes stdout at exit.
        sys.stdout = None  # type: ignore[assignment]
        return 1


def _fail(message: str, status: int) -> int:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"{PROGRAM}: error: {rank}{message}", file=sys.stderr, flush=True)
    return status
