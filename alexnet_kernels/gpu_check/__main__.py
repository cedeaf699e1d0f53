"""Checks and times this package on the device present, and writes one report.

    python -m alexnet_kernels.gpu_check --out DIR [--minutes 8.5] [--from PART | --only PART ...]

DIR then holds findings.jsonl (one line for each finding, written at once), log.txt (the output of every process, with
whole tracebacks), report.md and report.json. The exit status is 0 if every part that ran passed. Without a GPU, small
versions of all parts run on the CPU to test the command itself: their timings mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels.bench import machine
from alexnet_kernels.gpu_check import findings, report, worker
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import IN_WORKER, PARTS, PATIENCE, Budget
from alexnet_kernels.gpu_check.processes import Busy
from alexnet_kernels.gpu_check.runner import Check

MINUTES = 8.5


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("--out DIR is required")
    if options.worker:
        return _work(options)
    _check_options(parser, options)
    earlier = Findings(options.out / findings.FILE)
    if options.report:
        if not earlier.size():
            parser.error(f"--report: {earlier.path} has no findings")
        report.write(options.out, earlier)
        return 0
    device = _device_name(options.device)
    chosen = _chosen_parts(parser, options, earlier, device)
    try:
        check = Check(
            options.out,
            options.device,
            options.minutes * 60 - _age(),
            name=device,
            tests=options.tests,
            library=options.library,
            patience=options.patience,
        )
    except Busy as error:
        parser.error(str(error))
    return _run(check, chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m alexnet_kernels.gpu_check", description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the findings and the report")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"run these of {', '.join(PARTS)}; items that DIR has results of are skipped",
    )
    which.add_argument(
        "--from",
        dest="first",
        choices=PARTS,
        metavar="PART",
        help="continue at this part; items that DIR has results of are skipped",
    )
    which.add_argument("--report", action="store_true", help="rewrite the report of DIR's findings, and run nothing")
    parser.add_argument("--library", type=Path, metavar="FILE", help="install this library instead of building one")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="folder of the tests (default: beside the package)")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        help="seconds after which an item that does not compile counts as hung (default: %(default)s)",
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--until", nargs="+", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--share", nargs=2, type=int, default=(0, 1), help=argparse.SUPPRESS)
    return parser


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a message if an option is invalid; creates the folder otherwise."""
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


def _chosen_parts(
    parser: argparse.ArgumentParser, options: argparse.Namespace, earlier: Findings, device: str
) -> list[str]:
    """The parts to run; exits with a message if the findings in the folder do not allow it."""
    if earlier.size() and not (options.first or options.only):
        parser.error(f"{earlier.path} has findings already: continue with --from or --only, or take another folder")
    for line in earlier.lines("command"):
        if line["name"] != device:
            parser.error(
                f"{earlier.path} has findings of another device, {line['name']}, not {device}: take another folder"
            )
    chosen = set(PARTS[PARTS.index(options.first) :] if options.first else options.only or PARTS)
    if earlier.size() and chosen & set(IN_WORKER):  # the commit, the library or the driver may have changed
        chosen.add("environment")
    return [name for name in PARTS if name in chosen]


def _device_name(kind: str) -> str:
    """The name that the driver reports: torch would allocate device memory."""
    if kind == "cpu":
        return machine.cpu()
    return machine.output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", pattern=r"(.+)")


def _age() -> float:
    """Seconds since this process started; importing torch is part of them."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _run(check: Check, parts: Sequence[str]) -> int:
    """Runs the parts and prints the report; returns the exit status."""
    try:
        with _interruptible():
            passed = check.run(parts)
    except KeyboardInterrupt:
        check.log.say(f"interrupted: {check.out / report.MARKDOWN} has the findings so far")
        return 1
    with contextlib.suppress(OSError):
        print((check.out / report.MARKDOWN).read_text())
        print(f"{'passed' if passed else 'FAILED'}: {check.out / report.MARKDOWN}, {check.out / report.JSON}")
    return 0 if passed else 1


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP act as SIGINT."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(options: argparse.Namespace) -> int:
    """Runs parts in this process, a worker of the check."""
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
