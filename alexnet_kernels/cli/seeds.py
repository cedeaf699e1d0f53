"""`alexnet-kernels train --seeds`: the runs of several seeds, one after the other or one a GPU."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from alexnet_kernels._errors import RunError
from alexnet_kernels.cli.arguments import PROGRAM, elapsed, reading_of, say, workers_of
from alexnet_kernels.training.devices import pick_device
from alexnet_kernels.training.run import train
from alexnet_kernels.training.seeds import Figures, SeedRuns, summary_rows

__all__ = ["FAILED", "devices_of", "resume_hint", "run_in_turn", "run_side_by_side", "summarize"]

_FIGURES = ("val_top1", "val_top5", "val_loss", "train_loss", "images_per_s")
"""Those of the printed table; summary.csv has all."""
_PERCENT = ("val_top1", "val_top5")
FAILED, _INTERRUPTED = 1, 130


def devices_of(name: str) -> list[str]:
    """The devices that seeds are spread over: every GPU for auto and cuda, otherwise the one."""
    device = pick_device(name)
    if device.type == "cuda" and name in ("auto", "cuda"):
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [str(device)]


def run_in_turn(runs: SeedRuns, options: Mapping[str, Any], given: Mapping[str, Any], console: Console) -> int:
    """Train the unfinished seeds in this process. Returns the exit status, of which 1 means that a seed failed.

    The other seeds go on. options: `data` and fields of `RunSpec`. given: settings given again.
    """
    began, status, left = time.monotonic(), 0, runs.unfinished()
    limit = options.get("max_seconds")
    for i, seed in enumerate(left):
        rest = None if limit is None else max(0.0, limit - (time.monotonic() - began))
        say(f"seed {seed}, {i + 1} of {len(left)}")
        try:
            result = train(runs.spec(seed, given, **{**options, "max_seconds": rest}), console)
        except RunError as error:
            status = FAILED
            say(f"seed {seed} failed: {error}")
            continue
        if result.stopped is not None:
            say(f"{result.stopped}; {resume_hint(runs)}")
            return _INTERRUPTED if result.stopped == "interrupted" else status
        best = result.best
        say(
            f"seed {seed}: top-1 {best['val_top1']:.1%}  top-5 {best['val_top5']:.1%}, epoch {best['epoch']}; "
            f"{elapsed(result.seconds)}",
        )
    return status


def run_side_by_side(runs: SeedRuns, devices: Sequence[str], options: argparse.Namespace) -> int:
    """Train the unfinished seeds in processes of their own, one at a time on each device. Returns as `run_in_turn`.

    Each line that a process prints is shown with its seed before it. SIGINT and SIGTERM are forwarded; then no more
    seeds are begun.
    """
    waiting, began = runs.unfinished(), time.monotonic()
    free = list(devices)
    running: dict[int, tuple[subprocess.Popen[str], threading.Thread, str]] = {}
    lines = threading.Lock()
    statuses: list[int] = []
    interrupted = False

    def forward(number: int, frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        for child, _, _ in list(running.values()):
            if child.poll() is None:
                child.send_signal(number)

    def show(seed: int, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with lines:
                say(f"seed {seed}: {line.rstrip()}")

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not interrupted):
            while waiting and free and not interrupted:
                left = None if options.max_time is None else options.max_time - (time.monotonic() - began)
                if left is not None and left <= 0:
                    waiting.clear()
                    break
                seed, device = waiting.pop(0), free.pop(0)
                child = subprocess.Popen(
                    [sys.executable, "-m", "alexnet_kernels", *_arguments(runs, seed, device, left, options, devices)],
                    env={"OMP_NUM_THREADS": str(_share(os.cpu_count(), devices)), **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="backslashreplace",
                    # A terminal's Ctrl-C reaches this process alone.
                    start_new_session=True,
                )
                reader = threading.Thread(target=show, args=(seed, child), daemon=True)
                reader.start()
                running[seed] = (child, reader, device)
            for seed, (child, reader, device) in list(running.items()):
                if child.poll() is not None:
                    reader.join()
                    del running[seed]
                    free.append(device)
                    statuses.append(child.returncode)
            time.sleep(0.05)
    finally:
        for child, _, _ in running.values():
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted:
        say(f"interrupted; {resume_hint(runs)}")
        return _INTERRUPTED
    if any(statuses):
        return FAILED
    if runs.unfinished():
        say(f"out of time; {resume_hint(runs)}")
    return 0


def _share(cores: int | None, devices: Sequence[str]) -> int:
    return max(1, (cores or 1) // len(devices))


def _arguments(
    runs: SeedRuns, seed: int, device: str, left: float | None, options: argparse.Namespace, devices: Sequence[str]
) -> list[str]:
    """The command of one seed's run, whose folder has been put in order."""
    spec = runs.spec(seed, {}, reading=reading_of(options))
    own = ["train", "--device", device, "--workers", str(min(workers_of(options), _share(os.cpu_count(), devices)))]
    if spec.resume is not None:
        own += ["--resume", str(runs.folder_of(seed))]
    else:
        own += ["--recipe", str(runs.folder / "recipe.yaml"), "--seed", str(seed), "--out", str(runs.folder_of(seed))]
    data = options.data if options.data is not None else runs.data
    own += [] if data is None else ["--data", str(data)]
    own += [] if left is None else ["--max-time", f"{left:.3f}s"]
    own += ["--save-every", str(options.save_every), "--log-every", f"{options.log_every:g}"]
    own += ["--bad-images", options.bad_images]
    reading = reading_of(options) if spec.resume is not None else asdict(spec.reading)
    own += [f"--{name.replace('_', '-')}={value}" for name, value in reading.items() if value]
    own += ["--no-graph"] if options.no_graph else []
    own += [] if options.backend is None else ["--backend", options.backend]
    return own + ([] if options.accumulate is None else ["--accumulate", str(options.accumulate)])


def resume_hint(runs: SeedRuns) -> str:
    """The command that finishes the seeds."""
    return f"resume with: {PROGRAM} train --resume {runs.folder}"


def summarize(runs: SeedRuns, figures: Figures, console: Console) -> None:
    """Print mean and spread of the seeds' best epochs, and the names of the files."""
    from rich.table import Table

    table = Table("best epochs", "mean", "std", "min", "max", title=f"{len(figures)} of {len(runs.seeds)} seeds")
    for row in summary_rows(figures):
        if row["epoch"] == "best" and row["figure"] in _FIGURES:
            percent = row["figure"] in _PERCENT
            words = [f"{row[name]:.2%}" if percent else f"{row[name]:.4g}" for name in ("mean", "std", "min", "max")]
            table.add_row(row["figure"], *words)
    console.print(table)
    for name, what in (
        ("summary.csv", "these and all other figures, of the best and the last epochs"),
        ("seeds.csv", "each seed's best epoch"),
        ("epochs.csv", "mean and standard deviation after each epoch"),
        ("curves.png", "loss and error, one standard deviation on either side"),
    ):
        say(f"  {runs.folder / name}  {what}")
