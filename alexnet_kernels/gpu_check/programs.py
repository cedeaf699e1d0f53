"""The parts of the check that run other programs: the build, pytest, Nsight Compute and compute-sanitizer.

Each function runs one part within `limit` seconds, and returns (state, error). An empty state means that the findings
determine it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet_kernels import _library
from alexnet_kernels.bench import machine, roofline
from alexnet_kernels.bench.machine import PACKAGE
from alexnet_kernels.gpu_check import counters, findings, plan, progress, report
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import Budget
from alexnet_kernels.gpu_check.processes import ROOT, Ended, Processes

COMPLETED = (0, 1, 5)  # exit statuses of a complete run of pytest: all passed, some failed, no test was selected
PYTEST_PROCESSES = 12  # at most
LEAST = 5.0  # seconds for which another run of pytest is worth starting


@dataclass(frozen=True)
class Context:
    """What a part needs to know of its check."""

    out: Path
    device: str
    tests: Path
    library: Path | None
    patience: float
    findings: Findings
    since: int
    """Where this command's findings begin, in bytes."""
    processes: Processes


Outcome = tuple[str, str]


def build(context: Context, limit: float) -> Outcome:
    """Builds the library in place for the device present, or installs one that was built elsewhere."""
    target = PACKAGE / "_C.so"
    if context.library is not None:
        if context.library.resolve() != target.resolve():
            temporary = target.with_name(f"._C.so.{os.getpid()}")
            shutil.copyfile(context.library, temporary)
            os.replace(temporary, target)
        return _fits(context)
    if not (ROOT / "setup.py").exists():
        return "skipped", "no source tree: the installed library is checked"
    if context.device == "cuda":
        code = "import torch; print(*torch.cuda.get_device_capability())"
        capability = context.processes.run("build", [sys.executable, "-c", code], 60)
        found = re.fullmatch(r"(\d+) (\d+)", capability.tail[-1]) if capability.tail else None
        if capability.status != 0 or found is None:
            return "failed", f"torch does not report the device's architecture: {capability.reason}"
        arch = _library.arch_of((int(found[1]), int(found[2])))
        variables = {"ALEXNET_KERNELS_CUDA": "1", "ALEXNET_KERNELS_ARCHS": arch}
    else:
        variables = {"ALEXNET_KERNELS_CUDA": "0"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # Every other part needs the library: the build may exceed its share of the time.
    ended = context.processes.run("build", command, 2 * limit, variables, ROOT)
    if ended.status != 0:
        return "failed", f"{ended.reason}. An earlier build, if any, is checked"
    return _fits(context)


def _fits(context: Context) -> Outcome:
    """Whether the library loads, was built from this tree's sources, and has kernels for the device."""
    words = ["--worker", "library", "--device", context.device, "--out", str(context.out)]
    ended = context.processes.run("build", [sys.executable, "-m", "alexnet_kernels.gpu_check", *words], 60)
    if ended.status == 0:
        return "passed", ""
    return "failed", f"the library: {ended.tail[-1] if ended.tail else ended.reason}"


def run_tests(context: Context, limit: float) -> Outcome:
    if not (context.tests / "conftest.py").exists():
        return "skipped", f"there are no tests at {context.tests}: give --tests"
    if importlib.util.find_spec("pytest") is None:
        return "skipped", "pytest is not installed"
    command, budget = _pytest_command(context), Budget(limit)
    # In an empty folder: `python -m` would import the source tree's package from the current one.
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(plan.RESTARTS):
            before = context.findings.size()
            variables = _pytest_variables(context, before)
            ended = context.processes.run("tests", command, budget.left(), variables, Path(folder))
            new = context.findings.lines("tests", before)
            in_test = findings.under_way(new)
            complete = ended.status in COMPLETED and in_test is None
            if complete or ended.status is None or budget.left() < LEAST:
                break
            # Without xdist, the next process continues after the test that ended this one.
            if in_test is not None:
                context.findings.add("tests", test=in_test[1], outcome="failed", reason=ended.reason, seconds=0)
            elif not any("test" in line for line in new):
                break
    return _tests_outcome(context, ended, complete)


def _pytest_command(context: Context) -> list[str]:
    if context.device == "cuda":
        chosen = [str(context.tests / "test_gpu.py"), str(context.tests / "ops"), "-m", "gpu"]
    else:
        chosen = [str(context.tests / "ops" / "test_contract.py"), "-k", "test_auto_"]
    words = [sys.executable, "-m", "pytest", "-q", "--tb=long", "-p", "no:cacheprovider", "-p", progress.__name__]
    processes = min(PYTEST_PROCESSES, plan.cores() - 2)
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        words += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "2"]
        words += ["--max-worker-restart", "50"]
    return [*words, "--continue-on-collection-errors", *chosen]


def _pytest_variables(context: Context, seen: int) -> dict[str, str]:
    return {
        progress.VARIABLE: str(context.findings.path.resolve()),
        progress.SINCE: str(context.since),
        progress.SEEN: str(seen),
        progress.PATIENCE: str(max(5.0, min(100.0, context.patience * 2))),
        # Otherwise every process of pytest would start its own pool of compiling processes.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHDYNAMO_VERBOSE": "1",  # whole tracebacks
    }


def _tests_outcome(context: Context, ended: Ended, complete: bool) -> Outcome:
    lines, now = context.findings.lines("tests"), context.findings.lines("tests", context.since)
    state, problem = report.state("tests", lines, now, interrupted=False)
    if state in ("not reached", "unfinished") and not complete and ended.status is not None:
        return "failed", f"pytest {ended.reason}"
    return state, problem


def count(context: Context, limit: float) -> Outcome:
    """Reads Nsight Compute's counters for the rows furthest from the memory floor."""
    ncu = machine.tool("ncu")
    if context.device != "cuda" or ncu is None:
        return "skipped", "ncu (Nsight Compute) is not available"
    rates = roofline.ceilings(findings.results(context.findings.lines("ceilings")).get("rates", {}))
    rows = findings.results(context.findings.lines("ops"))
    if rates is None or not rows:
        return "skipped", "the ops were not timed"
    done = findings.results(context.findings.lines("counters"))
    chosen = [one for one in counters.slowest(rows, rates) if f"{one[0]}, {one[1]}" not in done]
    if not chosen:
        return ("passed", "") if done else ("skipped", "no row of backend 'cuda' was timed")
    context.findings.add("counters", items=[f"{row}, {direction}" for row, direction, _ in chosen])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        ended = context.processes.run("counters", counters.command(ncu, log, chosen), limit)
        text = log.read_text() if log.exists() else ""
    found = counters.parsed(text)
    if len(found) != len(chosen):  # kernels can't be assigned to rows
        context.processes.log.write("counters", text[:4000])
        return "skipped", f"{len(found)} of {len(chosen)} rows: ncu {ended.reason}"
    for (name, direction, reached), kernels in zip(chosen, found, strict=True):
        result = {"share_of_floor": reached, "kernels": kernels}
        context.findings.add("counters", item=f"{name}, {direction}", result=result)
    return "passed", ""


def sanitize(context: Context, limit: float) -> Outcome:
    sanitizer = machine.tool("compute-sanitizer")
    if context.device != "cuda" or sanitizer is None:
        return "skipped", "compute-sanitizer is not available"
    budget = Budget(limit)
    done = report.sound("sanitizer", context.findings.lines("sanitizer"))
    tools = [tool for tool in ("memcheck", "racecheck") if tool not in done]
    context.findings.add("sanitizer", items=tools)
    for i, tool in enumerate(tools):
        # This package's kernels only: libraries launch many more, which are not under test.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=alexnet_kernels"]
        command += [sys.executable, "-m", "alexnet_kernels.gpu_check.exercise"]
        # One driver allocation a tensor, so that the tool sees each tensor's bounds.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        lines: list[str] = []
        ended = context.processes.run("sanitizer", command, budget.left() / (len(tools) - i), variables, keep=lines)
        if result := _sanitizer_result(ended, lines):
            context.findings.add("sanitizer", item=tool, result=result)
    return "", ""


def _sanitizer_result(ended: Ended, lines: Sequence[str]) -> dict[str, object] | None:
    """None if the tool reached its time limit without an error."""
    text = "\n".join(lines)
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
    errors = re.findall(r"=+ ((?:Invalid|Error|Misaligned|Program hit|Uninit).*)", text)
    if ended.status is None and not errors:
        return None
    return {
        "summary": summary[-1] if summary else ended.reason,
        "errors": errors[:10],
        "failed": ended.status not in (0, None) or bool(errors),
        "ops": [line for line in lines if re.fullmatch(r"\w+", line)],
    }


PROGRAMS: dict[str, Callable[[Context, float], Outcome]] = {
    "build": build,
    "tests": run_tests,
    "counters": count,
    "sanitizer": sanitize,
}
