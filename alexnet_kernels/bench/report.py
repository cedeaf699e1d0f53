"""The report of `alexnet-kernels bench`: measures rows, and writes JSON and Markdown."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels._files import write_atomically
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.bench import baselines, machine, plots, roofline, tables
from alexnet_kernels.bench.network_row import NetRow
from alexnet_kernels.bench.row import Row
from alexnet_kernels.bench.timing import DeviceLost

FORMAT = 1


class FormatError(Exception):
    """The file is not a report."""


def section(row: Row) -> str:
    return "nets" if isinstance(row, NetRow) else "ops"


def new_report(device: torch.device) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "kind": device.type,
        "machine": machine.facts(device),
        "peers": {
            name: machine.version(name) for name in ("torchvision", "onnxruntime", "tensorrt", "lpips", "torchmetrics")
        },
        "ceilings": {},
        "ops": {},
        "nets": {},
        "lost": {},
    }


def load(path: Path) -> dict[str, Any]:
    """Reads a report.

    Raises:
        FormatError: the file can't be read, or is not a report.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not JSON'}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "machine" not in found:
        raise FormatError(f"{path}: not a report of `bench`")
    return found


def run(
    device: torch.device,
    chosen: Sequence[Row],
    *,
    seconds: float = 1.0,
    rounds: int = 15,
    small: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the rows, and rewrites OUT.json and OUT.md after each.

    Stops at a variant after which the device is unusable; the report names it.

    Args:
        seconds: time limit of a row's variants together.
        rounds: upper limit of the rounds.
        small: measures the device's rates on small tensors.
        say: receives each line of progress.
    """
    configure()
    report = new_report(device)
    for found in roofline.measure_ceilings(device, small):
        report["ceilings"].update(found)
    rates = roofline.ceilings(report["ceilings"])
    say(tables.ceilings_text(rates) if rates else "")
    for row in chosen:
        try:
            result = row.time(device, seconds=seconds, rounds=rounds).to_json()
        except DeviceLost as lost:
            report["lost"][f"{row.name} by {lost.variant}"] = str(lost)
        else:
            report[section(row)][row.name] = result
            for line in summary(row.name, result, rates):
                say(line)
        gc.collect()
        if out is not None:
            save(report, out)
        if report["lost"]:
            break
    return report


def configure() -> None:
    """Lets cuDNN autotune and use TF32, and keeps freed memory, so that page faults are not timed."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True


def summary(name: str, result: dict[str, Any], rates: roofline.Ceilings | None) -> list[str]:
    """One line for each direction, and for each of our variants that was not timed."""
    lines = [f"NOT TIMED: {problem}" for problem in tables.problems({name: result})]
    for _, direction, _, measured in tables.measurements({name: result}):
        mine, other = (tables.best(measured["times"], ours) for ours in (True, False))
        if mine is None:
            continue
        text = f"{tables.full_name(name, direction)}: {tables.seconds_text(mine[1])}"
        if other:
            text += f", {other[0]} {tables.seconds_text(other[1])}, ratio {other[1] / mine[1]:.2f}"
        if rates and not measured["cached"]:
            text += f", {tables.floor(result, measured, rates) / mine[1]:.0%} of the floor"
        lines.append(text)
    return lines


def markdown(report: dict[str, Any]) -> str:
    facts, cuda = report["machine"], report["kind"] == "cuda"
    names = ("device", "instructions", "threads", "kernels", "driver", "cuda", "cudnn", "triton", "torch", "python")
    about = [f"- {name}: {_plain(facts[name])}" for name in names if facts.get(name)]
    about += [f"- commit: {facts['commit']}", f"- date: {report['date']}"]
    about += [f"- {name}: {version}" for name, version in report["peers"].items() if version != "none"]
    about.append("- allocator: freed memory is kept, for every variant")
    rates = roofline.ceilings(report["ceilings"])
    lines = ["# Benchmarks", "", *about, ""]
    lines += [tables.ceilings_text(rates), ""] if rates else []
    lines += [tables.LEGEND, ""]
    lines += [f"- LOST the device: {name}: {why}" for name, why in report["lost"].items()] + [""] * bool(report["lost"])
    for title, kind in (("Ops", "ops"), ("Networks", "nets")):
        if report[kind]:
            lines += [f"## {title}", "", *tables.table(report[kind], rates, cuda)]
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def save(report: dict[str, Any], out: Path) -> None:
    for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".md", markdown(report))):
        write_atomically(out.with_name(out.name + suffix), text)


def pictures(report: dict[str, Any], out: Path) -> list[Path]:
    """Writes the plots; returns their paths, none if matplotlib is not installed."""
    return [] if baselines.missing("matplotlib") else plots.draw(report, out)


def failed(report: dict[str, Any]) -> list[str]:
    """Why the report is not valid: our variants that are wrong or don't run."""
    return [*tables.problems({**report["ops"], **report["nets"]}), *report["lost"].values()]
