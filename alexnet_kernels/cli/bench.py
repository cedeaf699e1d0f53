"""`alexnet-kernels bench`"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alexnet_kernels._errors import InputError
from alexnet_kernels.cli.arguments import PROGRAM, duration, numbers, positive
from alexnet_kernels.training.devices import pick_device

if TYPE_CHECKING:
    from alexnet_kernels.bench.row import Row

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time every op and network against its baselines",
        description="Times every op at AlexNet's layers, and whole networks, against PyTorch's operators, "
        "torch.compile, torchvision, ONNX Runtime and other installed packages, problems of KernelBench by "
        "torch.compile with this package's backend, and LPIPS against the packages lpips and torchmetrics, after "
        "checking that all results "
        "agree. The exit status is 1 if one of this package's ops or networks is wrong or fails.",
    )
    add = parser.add_argument
    add("what", nargs="*", metavar="ops|nets|suite|lpips", help="(default: all)")
    add("--only", metavar="REGEX", help="rows whose name matches; --list prints the names")
    add("--list", action="store_true", help="print the rows and their variants, and measure nothing")
    add("--batches", type=numbers, metavar="N,N", help="batch sizes (default: 1,32; on a GPU 1,32,128,256,1024)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    add("--seconds", type=duration, default=1.0, metavar="TIME",
        help="time for all variants of a row together, in each direction (default: 1s); at least five "
        "rounds")  # fmt: skip
    add("--rounds", type=positive, default=15, metavar="N", help="at most (default: 15)")
    add("--smoke", action="store_true", help="run every op, network and baseline once, small, to see that it works")
    add("--out", type=Path, metavar="PREFIX", help="write PREFIX.json, PREFIX.md and charts, PREFIX_*.png")
    add("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
        help="print what changed between two .json files; the exit status is 1 if something got slower")  # fmt: skip
    add("--threshold", type=float, default=0.1, metavar="PART",
        help="with --compare: the smallest relative change to print (default: 0.1)")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from alexnet_kernels.bench import report as reports
    from alexnet_kernels.bench.rows import BATCHES, KINDS, SMOKE_TIMING

    if options.compare:
        return _compare(options)
    for kind in options.what:
        if kind not in KINDS:
            raise InputError(f"{kind!r} is not one of {', '.join(KINDS)}")
    if options.batches is not None and not (options.batches and min(options.batches)):
        raise InputError("--batches: numbers of at least 1 expected")
    device = pick_device(options.device)
    if device.type not in BATCHES:
        raise InputError(f"--device {options.device}: cpu or cuda expected")
    rows = _rows(options, device)
    if options.list:
        for row in rows:
            print(f"{row.name}: {', '.join(row.variants(device))}")
        return 0
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {options.out}: {error.strerror}") from None
    report = reports.run(
        device,
        rows,
        **(SMOKE_TIMING if options.smoke else {"seconds": options.seconds, "rounds": options.rounds}),
        small=options.smoke,
        out=options.out,
        say=lambda line: print(line, flush=True),
    )
    if options.out is not None:
        written = [f"{options.out}.json", f"{options.out}.md", *map(str, reports.pictures(report, options.out))]
        print(f"wrote {', '.join(written)}")
    faults = reports.failed(report)
    for fault in faults:
        print(f"{PROGRAM}: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _rows(options: argparse.Namespace, device: torch.device) -> list[Row]:
    from alexnet_kernels.bench import rows

    found = rows.rows(device, options.what or rows.KINDS, options.batches, options.smoke)
    try:
        chosen = rows.select(found, options.only)
    except re.error as error:
        raise InputError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not chosen:
        raise InputError(f"--only {options.only!r} finds no row; --list prints their names")
    return chosen


def _compare(options: argparse.Namespace) -> int:
    from alexnet_kernels.bench import report, tables

    try:
        reports = [report.load(path) for path in options.compare]
    except report.FormatError as error:
        raise InputError(f"--compare {error}") from None
    lines, slower = tables.compare(reports[0], reports[1], options.threshold)
    print("\n".join(lines))
    return 1 if slower else 0
