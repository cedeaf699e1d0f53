"""What several commands share: types of arguments, options, and the settings made of them."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from alexnet_kernels import backends
from alexnet_kernels._errors import InputError, printable

__all__ = [
    "CHECKPOINT",
    "PROGRAM",
    "add_bad_images",
    "add_device",
    "add_reading",
    "cell",
    "count",
    "duration",
    "elapsed",
    "numbers",
    "path",
    "positive",
    "reading_of",
    "say",
    "say_notes",
    "use_backend",
    "workers_of",
]

PROGRAM = "alexnet-kernels"
CHECKPOINT = (
    "a run's folder for its best.ckpt, a checkpoint, weights of another program (PyTorch, safetensors, .npz, ONNX, "
    "Caffe, cuda-convnet: docs/weights.md), a folder with config.json, or DEFAULT for torchvision's weights"
)
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


def say_notes(notes: Sequence[str], quiet: bool = False) -> None:
    """Print what the user should know about weights; to stderr if quiet, since the output is for a program."""
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr if quiet else sys.stdout)


def cell(text: str) -> str:
    """The text for a table, whose columns are measured before they are printed: escaped as by `say` and stdout."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


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


_READING = {
    "train_split": ("NAME", "folder of the training images (default: train, or training, in any case)"),
    "val_split": (
        "NAME",
        "folder of the validation images (default: val, or valid, validation or test, in any case)",
    ),
    "val_labels": (
        "FILE",
        "the classes of validation images that are in no class folders, such as ImageNet's: LOC_val_solution.csv, "
        "val.txt, ILSVRC2012_validation_ground_truth.txt and others, see docs/data.md",
    ),
    "synsets": ("FILE", "the classes' names, where --val-labels has numbers: synsets.txt or the devkit's meta.mat"),
    "empty_classes": (
        "",
        "what to do with class folders that have no images: refuse them, or leave the classes out that have none in "
        "the first split (default: refuse)",
    ),
}


def add_reading(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add the options that say how an image set is read: those of the given names, or all."""
    for name in names or _READING:
        metavar, help = _READING[name]
        option = "--" + name.replace("_", "-")
        if name == "empty_classes":
            parser.add_argument(option, choices=("refuse", "skip"), help=help)
        else:
            kind = str if name.endswith("split") else path
            parser.add_argument(option, type=kind, metavar=metavar, help=help)


def reading_of(options: argparse.Namespace) -> dict[str, str]:
    """The fields of `Reading` that were given by options."""
    return {name: value for name in _READING if (value := getattr(options, name, None)) is not None}


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
