"""The report of a check's findings, as Markdown and as JSON with every number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_kernels._files import write_atomically
from alexnet_kernels.bench import roofline, tables
from alexnet_kernels.bench.row import OURS, is_ours
from alexnet_kernels.gpu_check import convolutions, findings
from alexnet_kernels.gpu_check.findings import Findings, Line
from alexnet_kernels.gpu_check.plan import PARTS

MARKDOWN, JSON = "report.md", "report.json"
KERNELS = 14  # of a network's step, in the Markdown
FACTS = ("device", "driver", "torch", "cuda", "cudnn", "triton", "nvcc", "python", "host", "commit", "date")


def write(out: Path, found: Findings) -> None:
    report = gathered(found.lines())
    write_atomically(out / JSON, json.dumps(report) + "\n")
    write_atomically(out / MARKDOWN, markdown(report))


def gathered(lines: Sequence[Line]) -> dict[str, Any]:
    """{"device", "parts": {PART: {"state", "seconds", "error"?, "results"?, "crashed"?, "late"?, ...}}}."""
    kinds = [line["device"] for line in lines if line["part"] == "command"]
    report: dict[str, Any] = {"device": kinds[-1] if kinds else "cpu", "parts": {}}
    for part in PARTS:
        mine = [line for line in lines if line["part"] == part]
        if not mine:
            continue
        section: dict[str, Any] = {"state": "interrupted"}
        for line in mine:
            if "state" in line:
                section = {key: value for key, value in line.items() if key != "part"}
        if part == "tests":
            section |= _tests(mine)
        else:
            current = findings.under_way(mine)
            if section["state"] == "interrupted" and current:
                section["in"] = current[1]
            section["results"] = findings.results(mine)
            for key, value in (("crashed", findings.crashed(mine)), ("late", findings.unreached(mine))):
                if value:
                    section[key] = value
        report["parts"][part] = section
    return report


def state(part: str, lines: Sequence[Line], now: Sequence[Line], interrupted: bool) -> tuple[str, str]:
    """(state, reason) of a part, from all of its lines and from `now`, those of this command.

    The states: "passed", "failed", "interrupted", "unfinished" (every item reached has passed), "not reached".
    """
    if part == "tests":
        found = _tests(lines)
        bad, ended = list(found["failures"]), sum(found[name] for name in OUTCOMES)
        complete, some = ended >= found["collected"] > 0, ended > 0
        late = f"{found['collected'] - ended} of {found['collected']} were not reached"
    else:
        results, unreached = findings.results(lines), findings.unreached(lines)
        bad = problems(part, results) + [f"{item}: {why}" for item, why in findings.crashed(lines).items()]
        bad = [line["ended"] for line in now if "ended" in line] + bad
        complete, some = bool(results) and not unreached, bool(results)
        late = f"{len(unreached)} of {len(unreached) + len(results)} were not reached"
    if bad:
        return "failed", bad[0] + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
    if complete:
        return "passed", ""
    if interrupted:
        return "interrupted", ""
    return ("unfinished", late) if some else ("not reached", "")


OUTCOMES = {"passed": "passed", "failed": "failed", "errors": "error", "skipped": "skipped"}


def _tests(lines: Sequence[Line]) -> dict[str, Any]:
    ended = {line["test"]: line for line in lines if "test" in line}
    outcomes = [line["outcome"] for line in ended.values()]
    failures = {name: line["reason"] for name, line in ended.items() if line["outcome"] in ("failed", "error")}
    reasons = [line["reason"] for line in ended.values() if line["outcome"] == "skipped"]
    slowest = sorted(ended.values(), key=lambda line: -line.get("seconds", 0))[:10]
    return {
        **{name: outcomes.count(outcome) for name, outcome in OUTCOMES.items()},
        "collected": max((line["collected"] for line in lines if "collected" in line), default=0),
        "failures": failures,
        "skips": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "slowest": {line["test"]: line.get("seconds", 0) for line in slowest},
    }


def problems(part: str, results: dict[str, Any]) -> list[str]:
    """Wrong values and errors of this package in a part's results."""
    if part in ("paths", "smoke"):
        return [f"{item}: {r['wrong'] or r['error']}" for item, r in results.items() if r["wrong"] or r["error"]]
    if part == "environment":
        return [f"the library: {r['missing_arch']}" for r in results.values() if r["missing_arch"]]
    if part == "convolutions":
        return [
            f"{item}, {direction}, {name}: {timing['error']}"
            for item, found in results.items()
            for direction in convolutions.OP
            for name, timing in found.get(direction, {}).items()
            if is_ours(name) and "error" in timing
        ]
    if part == "sanitizer":
        return [f"{tool}: {r['summary']}" for tool, r in results.items() if r["failed"]]
    return tables.problems(_rows(results))


def sound(part: str, lines: Sequence[Line]) -> dict[str, Any]:
    """The results without problems."""
    return {item: r for item, r in findings.results(lines).items() if not problems(part, {item: r})}


def broken_paths(lines: Sequence[Line]) -> set[str]:
    """The kernels that part "paths" found to be wrong, to fail or to hang, as variants: "cuda, wgmma"."""
    results = findings.results(lines)
    bad = [item for item in results if problems("paths", {item: results[item]})]
    return {item.rpartition(" by ")[2] for item in (*bad, *findings.crashed(lines))}


def _rows(results: dict[str, Any]) -> dict[str, Any]:
    """The results of benchmark rows."""
    return {name: result for name, result in results.items() if "missing" in result}


def markdown(report: dict[str, Any]) -> str:
    parts = report["parts"]
    cuda = report["device"] == "cuda"
    results = {name: section.get("results", {}) for name, section in parts.items()}
    lines = ["# GPU check" if cuda else "# GPU check on a CPU: its timings mean nothing", ""]
    facts = results.get("environment", {}).get("facts", {})
    lines += [", ".join(f"{key} {facts[key]}" for key in FACTS if key in facts), ""]
    if "capability" in facts:
        memory = facts["memory"] / 2**30
        lines += [f"Compute capability {facts['capability']}, {facts['multiprocessors']} SMs, {memory:.0f} GiB.", ""]
    lines += _absent(facts, report["device"])
    rates = roofline.ceilings(results.get("ceilings", {}).get("rates", {}))
    lines += [tables.ceilings_text(rates), ""] if rates else []
    lines += ["| part | state | seconds | commit | |", "|---|---|---|---|---|"]
    for name, section in parts.items():
        note = section.get("error") or (f"in {section['in']}" if "in" in section else "")
        cells = [name, section["state"], section.get("seconds", ""), section.get("commit", ""), _cell(note)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for name, section in parts.items():
        lines += [f"- CRASHED in {name}: {item}: {why}" for item, why in section.get("crashed", {}).items()]
        if late := section.get("late"):
            lines.append(f"- Not reached in the time, of {name}: {'; '.join(late)}")
    lines.append("")
    lines += _path_lines(results.get("paths", {}))
    lines += _smoke_lines(results.get("smoke", {}))
    legend = f"{tables.LEGEND}\n* without a CUDA graph: the time includes launch overhead." if cuda else tables.LEGEND
    lines += [legend, ""] if any(name in parts for name in ("networks", "ops", "compiled")) else []
    for title, name in (
        ("Networks", "networks"),
        ("Networks and ops beside compiled baselines and torchvision", "compiled"),
        ("Ops", "ops"),
    ):
        if found := tables.table(_rows(results.get(name, {})), rates, cuda):
            lines += [f"## {title}", "", *found]
    lines += _convolution_lines(results.get("convolutions", {}), rates)
    lines += _kernel_lines(results.get("networks", {}))
    lines += _tests_lines(parts.get("tests"))
    lines += _counter_lines(results.get("counters", {}))
    lines += _sanitizer_lines(results.get("sanitizer", {}))
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _absent(facts: dict[str, Any], device: str) -> list[str]:
    absent: dict[str, list[str]] = {}
    for entry in facts.get("backends", []):
        for backend in OURS[device]:
            if entry["backends"][backend] != "available":
                absent.setdefault(f"{backend}: {entry['backends'][backend]}", []).append(entry["op"])
    lines = [f"- No backend {reason} ({', '.join(ops)})" for reason, ops in absent.items()]
    if facts.get("missing_arch"):
        lines.append(f"- The library lacks this device's architecture: {facts['missing_arch']}")
    return [*lines, ""] if lines else []


def _path_lines(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = ["## The package's own convolution kernels at AlexNet's layers, against float64", ""]
    for item, r in results.items():
        outcome = (
            f"WRONG: {_cell(r['wrong'])}" if r["wrong"] else f"ERROR: {_cell(r['error'])}" if r["error"] else "right"
        )
        lines.append(f"- {item}: {outcome}")
    return [*lines, ""]


def _smoke_lines(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    wrong = {item: r for item, r in results.items() if r["wrong"] or r["error"]}
    lines = ["## Every op at AlexNet's layers, against float64", ""]
    lines += [f"{len(results) - len(wrong)} of {len(results)} are correct, outputs and gradients.", ""]
    for item, result in wrong.items():
        lines.append(f"- {'WRONG' if result['wrong'] else 'ERROR'} {item}: {_cell(result['wrong'] or result['error'])}")
    return [*lines, ""]


def _convolution_lines(results: dict[str, Any], rates: roofline.Ceilings | None) -> list[str]:
    if not results:
        return []
    lines = ["## Convolutions one by one", ""]
    lines += [
        "Microseconds (TFLOP/s): cuDNN's convolution alone in several forms, then the op with bias and ReLU.",
        "",
    ]
    directions = [*convolutions.ALONE, *convolutions.OP]
    for item, found in results.items():
        floor = f", floor of a pass {convolutions.floor(found, rates) * 1e6:.0f} us" if rates else ""
        lines += [f"**{item}**{floor}", "", "| | |", "|---|---|"]
        for direction in directions:
            cells = []
            for name, timing in found.get(direction, {}).items():
                if "median" in timing:
                    us, rate = timing["median"] * 1e6, convolutions.rate(found, direction, timing["median"])
                    cells.append(f"{name} {us:.1f} ({rate / 1e12:.0f}){'' if timing['graph'] else '*'}")
                else:
                    cells.append(f"{name}: {_cell(timing['error'])}")
            lines.append(f"| {direction} | {'; '.join(cells)} |")
        lines += ["", *[f"- no {name}: {_cell(why)}" for name, why in found["missing"].items()], ""]
    return lines


def _kernel_lines(results: dict[str, Any]) -> list[str]:
    found = {item: result for item, result in results.items() if "kernels" in result}
    if not found:
        return []
    lines = ["## Where a step's time goes", ""]
    lines += [
        "One step launched eagerly, by torch.profiler: the total time of its kernels, and the longest kernels.",
        "",
    ]
    for item, result in found.items():
        lines += [f"**{item.removeprefix('kernels of ')}**: {result['step_us']:.0f} us in kernels", ""]
        lines += ["| kernel | calls | us | share | MB | GB/s |", "|---|---|---|---|---|---|"]
        for kernel in result["kernels"][:KERNELS]:
            moved = kernel["bytes"] * kernel["calls"] if kernel.get("bytes") else None
            rate = (
                ["-", "-"] if moved is None else [f"{moved / 1e6:.1f}", f"{moved / max(kernel['us'], 0.01) / 1e3:.0f}"]
            )
            name = _cell(kernel["name"])
            name = name if len(name) <= 110 else f"{name[:107]}..."
            cells = [f"`{name}`", f"{kernel['calls']:g}", f"{kernel['us']:.1f}", f"{kernel['share']:.1%}", *rate]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _tests_lines(tests: dict[str, Any] | None) -> list[str]:
    if not tests:
        return []
    ended = sum(tests[outcome] for outcome in OUTCOMES)
    end = f" {tests['collected'] - ended} were not reached in the time." if ended < tests["collected"] else ""
    lines = ["## Tests", ""]
    counts = f"{tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors, {tests['skipped']} skipped"
    lines += [f"{counts} of {tests['collected']}.{end}", ""]
    lines += [f"- FAILED `{name}`: {_cell(reason)}" for name, reason in tests["failures"].items()]
    lines += [f"- {count} skipped: {reason}" for reason, count in tests["skips"].items()]
    return [*lines, ""]


# The metrics of Nsight Compute that show what limits a kernel.
METRICS = (
    "Duration",
    "DRAM Throughput",
    "Memory Throughput",
    "Compute (SM) Throughput",
    "Executed Ipc Active",
    "Issue Slots Busy",
    "Achieved Occupancy",
    "Registers Per Thread",
    "Executed Instructions",
    "L2 Hit Rate",
)


def _counter_lines(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = ["## Nsight Compute, the rows furthest from the memory floor", ""]
    for item, result in results.items():
        lines += [f"**{item}**: {result['share_of_floor']:.0%} of the floor", ""]
        for kernel in result["kernels"]:
            values = [
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in kernel.items()
                if name.partition(" [")[0] in METRICS
            ]
            lines.append(f"- `{_cell(kernel['kernel'])[:110]}`: {', '.join(values)}")
        lines.append("")
    return lines


def _sanitizer_lines(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    lines = ["## compute-sanitizer", ""]
    for tool, result in results.items():
        lines.append(f"- {tool}: {_cell(result['summary'])} ({len(result['ops'])} ops were run)")
        lines += [f"  - {_cell(error)}" for error in result["errors"]]
    return [*lines, ""]
