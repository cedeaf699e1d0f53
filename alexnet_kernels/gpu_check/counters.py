"""Nsight Compute's counters of this package's kernels.

    ncu ... python -m alexnet_kernels.gpu_check.counters CASE DIRECTION [CASE DIRECTION ...]

runs one direction of each op row once under ncu. Each row runs on a stream of its own, which identifies its kernels.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels.bench import tables
from alexnet_kernels.bench.cases import cases
from alexnet_kernels.bench.op_row import OpRow
from alexnet_kernels.bench.optimizer_row import SgdRow
from alexnet_kernels.bench.roofline import Ceilings
from alexnet_kernels.bench.timing import Call

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
)
Chosen = tuple[str, str, float]  # row, direction, share of the memory floor


def command(ncu: str, log: Path, chosen: Sequence[Chosen]) -> list[str]:
    """The command line of ncu. It does not lock the clocks, which a container has no permission for."""
    words = [ncu, "--clock-control", "none", "--csv", "--page", "details", "--profile-from-start", "off"]
    words += ["--log-file", str(log), "--kernel-name-base", "demangled", "--kernel-name", "regex:alexnet_kernels"]
    for section in SECTIONS:
        words += ["--section", section]
    words += [sys.executable, "-m", "alexnet_kernels.gpu_check.counters"]
    return words + [word for row, direction, _ in chosen for word in (row, direction)]


def slowest(results: dict[str, Any], rates: Ceilings, count: int = 4) -> list[Chosen]:
    """The (row, direction) pairs of backend "cuda" furthest from the memory floor, furthest first.

    Only bfloat16 rows in channels_last whose inputs exceed the cache.
    """
    found = []
    for name, direction, result, measured in tables.measurements(results):
        timing = measured["times"].get("cuda", {})
        if "median" in timing and not measured["cached"] and result["dtype"] == "bf16" and "NCHW" not in name:
            reached = tables.floor(result, measured, rates) / timing["median"]
            found.append((name, direction, round(reached, 3)))
    return sorted(found, key=lambda entry: entry[2])[:count]


def parsed(text: str) -> list[list[dict[str, Any]]]:
    """One list for each row, in order: a dict for each kernel with "kernel" and its metrics by name and unit."""
    start = text.find('"ID"')
    if start < 0:
        return []
    kernels: dict[str, dict[str, Any]] = {}
    streams: dict[str, list[dict[str, Any]]] = {}
    for line in csv.DictReader(text[start:].splitlines()):
        if line["ID"] not in kernels:
            kernels[line["ID"]] = {"kernel": line["Kernel Name"]}
            streams.setdefault(line["Stream"], []).append(kernels[line["ID"]])
        kernel = kernels[line["ID"]]
        if name := line.get("Metric Name"):
            unit = line.get("Metric Unit") or ""
            kernel[f"{name} [{unit}]" if unit else name] = _number(line.get("Metric Value") or "")
        elif rule := line.get("Rule Description"):
            kernel.setdefault("rules", []).append(rule)
    return list(streams.values())


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def call_of(name: str, direction: str, backend: str, device: torch.device) -> Call:
    """A call that runs one direction of an op row. For a backward pass, the forward pass runs here."""
    if name == SgdRow.name:
        return SgdRow().call(backend, device)
    case = next(case for case in cases() if name.startswith(f"{case.name}, batch "))
    row = OpRow(case, int(name.rpartition(" ")[2]), apart=True)
    if direction not in row.directions:
        raise SystemExit(f"{name} has no direction {direction!r}")
    return row.call(direction, backend, device)


def main(arguments: Sequence[str]) -> int:
    device = torch.device("cuda")
    for name, direction in zip(arguments[::2], arguments[1::2], strict=True):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call = call_of(name, direction, "cuda", device)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
