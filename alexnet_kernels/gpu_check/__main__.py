"""Checks and times this package on the device present, and writes one report.

    python -m alexnet_kernels.gpu_check --out DIR [--minutes 8.5] [--from PART | --only PART ...]

DIR then holds findings.jsonl (every finding, written as it is made), log.txt (all that was printed, with whole
tracebacks), report.md and report.json. The exit status is 0 if all that ran passed. Without a GPU everything runs on
the CPU, small, so that the command itself can be tested: its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels.bench import machine
from alexnet_kernels.gpu_check import findings, report, runner
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import IN_WORKER, PARTS, PATIENCE, Budget

MINUTES = 8.5


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _age() -> float:
    """Seconds since this process began, which importing torch takes, too."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _device_name(kind: str) -> str:
    """Asked of the driver: torch would take memory of the device for it."""
    if kind == "cpu":
        return machine.cpu()
    return machine.output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", pattern=r"(.+)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m alexnet_kernels.gpu_check", description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    order = ", ".join(PARTS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the findings and the report go")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that it may take (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {order}; without what DIR has of them already"
    )
    which.add_argument(
        "--from", dest="first", choices=PARTS, metavar="PART", help="go on at this part, without what DIR has already"
    )
    which.add_argument(
        "--report", action="store_true", help="write the report of DIR's findings again, and run nothing"
    )
    parser.add_argument("--library", type=Path, metavar="FILE", help="a library built elsewhere, in place of building")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="the tests' folder (default: beside the package)")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        help="seconds without a finding that mean a hang, unless it compiles",
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", nargs="+", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("--out DIR is required")
    if options.worker:
        return _work(options)
    for name in ("minutes", "patience"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, not {getattr(options, name)}")
    if options.device == "cuda" and not options.report and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library {options.library}: there is no such file")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    earlier = Findings(options.out / findings.FILE)
    if options.report:
        if not earlier.size():
            parser.error(f"--report: {earlier.path} has no findings")
        report.write(options.out, earlier)
        return 0
    if earlier.size() and not (options.first or options.only):
        parser.error(f"{earlier.path} has findings already: go on with --from or --only, or take another folder")
    if options.first:
        chosen = list(PARTS[PARTS.index(options.first) :])
    else:
        chosen = [name for name in PARTS if not options.only or name in options.only]
    device = _device_name(options.device)
    for line in earlier.lines("command"):
        if line["name"] != device:
            parser.error(
                f"{earlier.path} has findings of another device, {line['name']}, not {device}: take another folder"
            )
    if earlier.size() and set(chosen) & set(IN_WORKER):  # told anew: the commit, the library, the driver
        chosen = [name for name in PARTS if name in chosen or name == "environment"]
    try:
        check = runner.Check(
            options.out,
            options.device,
            options.minutes * 60 - _age(),
            name=device,
            tests=options.tests,
            library=options.library,
            patience=options.patience,
        )
    except runner.Busy as error:
        parser.error(str(error))
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        passed = check.run(chosen)
    except KeyboardInterrupt:
        check.say(f"interrupted: {options.out / report.MARKDOWN} has what was found")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with contextlib.suppress(OSError):
        print((options.out / report.MARKDOWN).read_text())
        print(f"{'passed' if passed else 'FAILED'}: {options.out / report.MARKDOWN}, {options.out / report.JSON}")
    return 0 if passed else 1


def _work(options: argparse.Namespace) -> int:
    """Parts in a process of their own."""
    from alexnet_kernels.gpu_check import worker

    if options.worker == ["library"]:
        reason = worker.misfit(torch.device(options.device))
        print(reason or "the library fits")
        return 1 if reason else 0
    budgets = [Budget(seconds) for seconds in options.until]
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    index, count = options.share
    worker.prepare(count)
    found = Findings(options.out / findings.FILE)
    work = worker.Worker(torch.device(options.device), found, options.since, index, count, options.patience)
    for part, budget in zip(options.worker, budgets, strict=True):
        work.run(part, budget.left())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
