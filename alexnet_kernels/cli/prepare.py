"""`alexnet-kernels prepare`"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from alexnet_kernels._errors import require
from alexnet_kernels.cli.arguments import (
    PROGRAM,
    add_bad_images,
    add_reading,
    elapsed,
    path,
    positive,
    reading_of,
    say,
    workers_of,
)

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="write images as squares of one size, for training",
        description="Writes images of any size as squares that training reads without decoding them again. "
        "If it is interrupted, run the same command to continue.",
    )
    add = parser.add_argument
    add("source", type=path, help="a folder or zip with <split>/<class>/ images")
    add("destination", type=path, help="a new folder, or one that the same command began")
    add("--size", type=positive, default=256, metavar="PIXELS",
        help="side of the squares: shorter side resized, centre kept (default: 256)")  # fmt: skip
    add("--splits", nargs="+", default=["train", "val"], metavar="NAME",
        help="the folders of the splits (default: train val, also by the other names that train takes)")  # fmt: skip
    add("--shard-images", type=positive, default=4096, metavar="N", help="images per file (default: 4096)")
    add("--workers", type=positive, metavar="N", help="processes (default: one per core, up to 16)")
    add_bad_images(parser, "skip")
    add_reading(parser, "val_labels", "synsets", "empty_classes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    require(f"{PROGRAM} prepare", "PIL", "rich")
    from alexnet_kernels.training.prepare import prepare
    from alexnet_kernels.training.reading import Reading

    with _progress_bar() as progress:
        try:
            report = prepare(
                options.source,
                options.destination,
                size=options.size,
                splits=options.splits,
                shard_images=options.shard_images,
                workers=workers_of(options, 16),
                bad_images=options.bad_images,
                reading=Reading(**reading_of(options)),
                progress=progress,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("run the same command to continue") from None
    counts = ", ".join(f"{count:,} {split}" for split, count in report.counts.items())
    say(
        f"{options.destination}: {counts} images of {report.classes} classes, {options.size} x {options.size}, "
        f"in {elapsed(report.seconds)}"
    )
    for note in report.notes:
        say(note)
    if report.left_out or report.converted or report.ignored:
        ignored = f", {report.ignored} other files ignored" if report.ignored else ""
        say(
            f"{report.left_out} images left out, {report.converted} converted to RGB{ignored}: "
            f"{os.path.join(options.destination, 'report.csv')}"
        )
    return 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, and the function (images done, total) that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    began: list[tuple[float, int]] = []
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, rate="")

        def update(done: int, total: int) -> None:
            # The rate excludes the images of earlier calls.
            if not began:
                began.append((time.monotonic(), done))
            passed = time.monotonic() - began[0][0]
            rate = f"{(done - began[0][1]) / passed:,.0f} images/s" if passed > 1 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield update
