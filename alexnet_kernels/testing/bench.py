"""The benchmarks that `alexnet-kernels bench` and `pytest benchmarks/` run: which rows, and their report."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels._files import write_atomically
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.models import PRESETS
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing import machine, peers, plots, roofline, tables
from alexnet_kernels.testing.rows import COMPILED, PURPOSES, NetRow, OpRow, Row, SgdRow, to_json
from alexnet_kernels.testing.timing import DeviceLost

FORMAT = 1
KINDS = ("ops", "nets")
BATCHES = {"cpu": (1, 32), "cuda": (1, 32, 128, 256, 1024)}
REFERENCE = {"cpu": 32, "cuda": 128}  # the batch at which compiled peers are measured, too
SMOKE = 2  # the batch
SMOKE_TIMING = {"seconds": 0.01, "rounds": 1}


class FormatError(Exception):
    """A file that isn't a report."""


def rows(
    device: torch.device, kinds: Collection[str] = KINDS, batches: Sequence[int] | None = None, smoke: bool = False
) -> list[Row]:
    """All, in the order of what matters; `smoke`: every op, network and peer, small."""
    kind = device.type
    reference = SMOKE if smoke else REFERENCE[kind]
    chosen = (SMOKE,) if smoke else tuple(batches or BATCHES[kind])
    found: list[Row] = []
    if "ops" in kinds:
        found += _ops(chosen, reference, smoke)
    if "nets" in kinds:
        found += _nets(chosen, reference, smoke)
    return found


def _ops(batches: Sequence[int], reference: int, smoke: bool) -> list[Row]:
    every = registry.cases()
    if smoke:  # Each op in each dtype and format, at the layer with the least work.
        cheapest: dict[Any, registry.Case] = {}
        for case in every:
            key = case.op, case.dtype, case.channels_last, case.layer == registry.OVERHEAD
            if key not in cheapest or case.work.moved(1, True) < cheapest[key].work.moved(1, True):
                cheapest[key] = case
        every = list(cheapest.values())
    compiles = [case for case in every if case.core and case.channels_last and case.dtype != torch.float16]
    if smoke:
        compiles = [case for case in compiles if case.op == "max_pool2d" and case.dtype == torch.float32]
    compiled = {case.name for case in compiles}
    matrices = ("conv2d_relu", "linear_relu_dropout")  # of which autotuning has something to choose

    def row(case: registry.Case, batch: int) -> Row:
        names: tuple[str, ...] = ()
        if batch == reference and case.name in compiled and case.op != "augment":
            names = tuple(COMPILED) if case.op in matrices or smoke else ("compiled",)
        return OpRow(case, batch, names)

    found: list[Row] = [row(case, batch) for case in every if case.layer != registry.OVERHEAD for batch in batches]
    found.append(SgdRow(small=smoke))
    return found + [OpRow(case, 1) for case in every if case.layer == registry.OVERHEAD]


def _nets(batches: Sequence[int], reference: int, smoke: bool) -> list[Row]:
    found: list[Row] = []
    main = ("paper", "torchvision")
    for channels_last in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            for preset in PRESETS if channels_last and not smoke else main:
                for batch in batches:
                    for purpose in PURPOSES:
                        row = NetRow(preset, batch, purpose, dtype, channels_last)
                        if smoke:
                            row = dataclasses.replace(row, width=0.05)
                        compiles = batch == reference and channels_last and preset in main
                        if smoke:
                            compiles = compiles and (preset, dtype) == ("paper", torch.float32)
                        if compiles:
                            row = dataclasses.replace(row, compile=(*COMPILED, "hardened"))
                        found.append(row)
    if smoke:  # at the width of torchvision's model
        found.append(NetRow("torchvision", 1, "inference", torch.float32))
        found += [NetRow(preset, SMOKE, "training step", width=0.05) for preset in PRESETS if preset not in main]
    return found


def section(row: Row) -> str:
    return "nets" if isinstance(row, NetRow) else "ops"


def new_report(device: torch.device) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "kind": device.type,
        "machine": machine.facts(device),
        "peers": {name: machine.version(name) for name in ("torchvision", "onnxruntime", "tensorrt")},
        "ceilings": {},
        "ops": {},
        "nets": {},
        "lost": {},
    }


def load(path: Path) -> dict[str, Any]:
    """A report.

    Raises:
        FormatError: the file can't be read, or is something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
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
    """Measures the rows, and keeps OUT.json and OUT.md up to date after each.

    Stops at a variant after which the device runs nothing any more, which the report names.
    """
    configure()
    report = new_report(device)
    for found in roofline.measure_ceilings(device, small):
        report["ceilings"].update(found)
    rates = roofline.ceilings(report["ceilings"])
    say(tables.ceilings_text(rates) if rates else "")
    for row in chosen:
        try:
            result = to_json(row.time(device, seconds=seconds, rounds=rounds))
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
    """The peers as their experts would have them, and memory that none has to fault in again."""
    keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True


def summary(name: str, result: dict[str, Any], rates: roofline.Ceilings | None) -> list[str]:
    """A line for each direction, and for each of our variants that was not timed."""
    lines = [f"NOT TIMED: {problem}" for problem in tables.problems({name: result})]
    for _, direction, _, measured in tables.measurements({name: result}):
        mine, peer = (tables.best(measured["times"], ours) for ours in (True, False))
        if mine is None:
            continue
        text = f"{tables.full_name(name, direction)}: {tables.seconds_text(mine[1])}"
        if peer:
            text += f", {peer[0]} {tables.seconds_text(peer[1])}, ratio {peer[1] / mine[1]:.2f}"
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
    about.append("- allocator: freed memory is kept, for all alike")
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
    """None where matplotlib is not installed."""
    return [] if peers.missing("matplotlib") else plots.draw(report, out)


def failed(report: dict[str, Any]) -> list[str]:
    """Why the report is not to be trusted: ours that are wrong or don't run."""
    return [*tables.problems({**report["ops"], **report["nets"]}), *report["lost"].values()]


def select(found: Sequence[Row], only: str | None) -> list[Row]:
    """Those whose name the regular expression finds."""
    return [row for row in found if only is None or re.search(only, row.name)]
