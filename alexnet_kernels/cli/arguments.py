"""What several commands share: types of arguments, options, and the settings made of them."""

from __future__ import annotations

import argparse
import errno
import os

from alexnet_kernels import backends
from alexnet_kernels._errors import InputError, printable

__all__ = [
    "CHECKPOINT",
    "PROGRAM",
    "add_bad_images",
    "add_device",
    "count",
    "duration",
    "elapsed",
    "numbers",
    "path",
    "positive",
    "say",
    "use_backend",
    "workers_of",
]

PROGRAM = "alexnet-kernels"
CHECKPOINT = "a .ckpt or .safetensors file, or a run's folder for its best.ckpt"
"""Help of the argument `checkpoint`."""


def count(text: str) -> int:
    """A whole number from 0 on."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: not negative expected")
    return value


def positive(text: str) -> int:
    """A whole number from 1 on."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 expected")
    return value


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, such as 30,60,80."""
    return tuple(count(part) for part in text.split(",") if part)


def path(text: str) -> str:
    """A path that a file system can have."""
    try:
        os.stat(text)
    except FileNotFoundError as error:
        if not text:
            raise argparse.ArgumentTypeError("a path is expected, got ''") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            reason = getattr(error, "strerror", None) or error
            raise argparse.ArgumentTypeError(f"{text[:60]!r}{'...' * (len(text) > 60)}: {reason}") from error
    return text


def say(text: str) -> None:
    """Print a line. What would control the terminal, such as an escape sequence in a file's name, is escaped."""
    print(printable(text))


def duration(text: str) -> float:
    """Seconds of a time such as 90, 90s, 10m or 1h30m."""
    total, number, units = 0.0, "", {"h": 3600, "m": 60, "s": 1}
    try:
        for letter in text:
            if letter in units:
                total += float(number) * units.pop(letter)
                number = ""
            else:
                number += letter
        total += float(number) if number else 0.0
    except ValueError:
        total = 0.0
    if not 0 < total < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 10m or 1h30m")
    return total


def elapsed(seconds: float) -> str:
    """A time for people, such as 2 min 5 s."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device and --backend."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="backend of the ops (default: auto)")


def add_bad_images(parser: argparse.ArgumentParser, default: str = "refuse") -> None:
    """Add --bad-images."""
    parser.add_argument(
        "--bad-images",
        choices=("refuse", "skip"),
        default=default,
        help=f"what to do with unreadable images (default: {default})",
    )


def workers_of(options: argparse.Namespace, limit: int = 8) -> int:
    """The value of --workers; by default one per core, at most `limit`."""
    return min(limit, os.cpu_count() or 1) if options.workers is None else options.workers


def use_backend(options: argparse.Namespace) -> None:
    """Apply --backend. Raises InputError unless every op has the backend."""
    if options.backend is None:
        return
    if options.backend != "auto":
        for row in backends.report():
            state = row["backends"].get(options.backend, "available")
            if state != "available":
                raise InputError(f"--backend {options.backend} is not available for {row['op']}: {state}")
    backends.set_backend(options.backend)
