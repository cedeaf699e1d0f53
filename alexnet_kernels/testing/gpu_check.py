"""Checks and times this package on the device present, and writes one report.

    python -m alexnet_kernels.testing.gpu_check --out DIR [--minutes 8] [--device cuda] [--only PART ...]

Parts: environment, ceilings (copy bandwidth and GEMM rates measured here), tests (those marked gpu), sanitizer
(compute-sanitizer, where there is one), ops (every op against the definition, then timed beside its peers), nets. Each
runs in a process of its own: one that fails, crashes or takes too long is reported, and the others go on. DIR then
holds gpu_check.json and gpu_check.md, brought up to date after every part. The exit status is 0 if all that ran passed.

Without a GPU everything runs on the CPU, small, so that the command itself can be tested: its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels import _library, backends
from alexnet_kernels.testing import bench, machine, progress, roofline, tables
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing.machine import PACKAGE
from alexnet_kernels.testing.rows import OURS, PURPOSES, NetRow, OpRow, Row, SgdRow, to_json
from alexnet_kernels.testing.timing import DeviceLost

BATCH = 128
# The share of the time that each part may take.
SHARES = {"environment": 0.04, "ceilings": 0.05, "tests": 0.30, "sanitizer": 0.11, "ops": 0.32, "nets": 0.18}
PYTEST_ENDED = (0, 1, 5)  # by itself: all passed, some failed, none were left
RESTARTS = 12  # of a part that crashed, without what it crashed in
STALL = 100.0  # seconds without a finding after which a part is taken to hang: compiling takes tens of seconds


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


# The parts, as they run in their own process. Each yields what is to be merged into its section of the report.


def environment(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    yield machine.facts(device) | {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads",
        "triton": machine.version("triton"),
        "nvcc": machine.output(machine.tool("nvcc") or "nvcc", "--version", pattern=r"V([\d.]+)"),
        "library": _library.status(),
        "backends": backends.report(),
    }


def ceilings(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    yield from roofline.measure_ceilings(device, small=device.type != "cuda")


def time_ops(
    device: torch.device, budget: Budget, skip: set[str], only: Sequence[Row] | None = None
) -> Iterator[dict[str, Any]]:
    bench.configure()
    if only is not None:
        chosen = list(only)
    elif device.type == "cuda":
        chosen = [row for row in bench.rows(device, ["ops"], [BATCH]) if not isinstance(row, OpRow) or row.case.core]
    else:  # A processor takes long: one case of each op shows that the command works.
        every = {case.op: case for case in registry.cases() if case.core and case.dtype == torch.bfloat16}
        chosen = [*(OpRow(case, 2) for case in every.values()), SgdRow(small=True)]
    yield from _timed(chosen, device, budget, skip)


def _timed(chosen: Sequence[Row], device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    """Every row: each variant is compared with the definition first, and timed only if it is right."""
    for i, row in enumerate(chosen):
        if row.name in skip:
            continue
        net = isinstance(row, NetRow)
        least = 2 if not net or device.type != "cuda" else 40 if isinstance(row, NetRow) and row.compile else 6
        if budget.left() < least:
            yield {"unfinished": {row.name: True}}
            continue
        yield {"current": row.name}
        # Compiling takes seconds, which a row has only if there is time.
        share = min(20.0, max(1.0, budget.left() / (len(chosen) - i)))
        if isinstance(row, OpRow) and row.compile and share < 3:
            row = dataclasses.replace(row, compile=())
        seconds = min(4.0, budget.left() / 8) if net else share / 4
        try:
            result = row.time(device, seconds=seconds, rounds=10 if net else 15, skip=skip)
        except DeviceLost as lost:
            yield {"current": f"{row.name} by {lost.variant}"}
            raise
        yield {"cases": {row.name: to_json(result)}, "finished": {row.name: True}}


def time_nets(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    """What is left of the time goes to torch.compile: then the net's other variants are timed anew beside it."""
    bench.configure()
    if device.type != "cuda":
        yield from _timed([NetRow("paper", 2, purpose, width=0.1) for purpose in PURPOSES], device, budget, skip)
        return
    presets = ("paper", "torchvision", "batchnorm")
    plain = [NetRow(preset, n, purpose) for n in (BATCH, 1024) for preset in presets for purpose in PURPOSES]
    compiled = [
        dataclasses.replace(row, compile=("compiled", "hardened"))
        for row in plain
        if row.batch == BATCH and row.preset in presets[:2]
    ]
    yield from _timed(plain, device, budget, skip)
    # Under the same names, which are finished.
    yield from _timed(compiled, device, budget, {name for name in skip if " by " in name})


WORKERS: dict[str, Callable[[torch.device, Budget, set[str]], Iterator[dict[str, Any]]]] = {
    "environment": environment,
    "ceilings": ceilings,
    "ops": time_ops,
    "nets": time_nets,
}


# The command: it starts the parts, keeps their results, and writes the report.


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds `new`; dicts of both are merged likewise."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


class Check:
    """A run of the command."""

    def __init__(self, out: Path, device: str, minutes: float, tests: Path | None) -> None:
        self.out, self.device, self.tests = out, device, tests
        self.seconds = minutes * 60
        self.report: dict[str, Any] = {"device": device, "minutes": minutes, "parts": {}}

    def run(self, names: Sequence[str]) -> None:
        """Each part has its share of what the parts before it left of the time."""
        end = time.monotonic() + self.seconds
        for i, name in enumerate(names):
            share = SHARES[name] / sum(SHARES[later] for later in names[i:])
            self.part(name, max(5.0, (end - time.monotonic()) * share))

    def part(self, name: str, limit: float) -> None:
        section: dict[str, Any] = {"state": "running"}
        self.report["parts"][name] = section
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            {"tests": self._tests, "sanitizer": self._sanitizer}.get(name, self._worker)(name, section, limit)
        except Exception as error:
            section["state"] = "failed"
            section["error"] = f"{type(error).__name__}: {error}"
        except BaseException:
            section["state"] = "interrupted"
            raise
        finally:
            section.pop("current", None)
            section["seconds"] = round(time.monotonic() - start, 1)
            self.write()
        print(f"{name}: {section['state']}, {section['seconds']:.0f} s. {self._line(name, section)}", flush=True)

    def write(self) -> None:
        machine.write_atomically(self.out / "gpu_check.json", json.dumps(self.report, indent=1) + "\n")
        machine.write_atomically(self.out / "gpu_check.md", markdown(self.report))

    def _worker(self, name: str, section: dict[str, Any], limit: float) -> None:
        """Runs a part in a process; after a crash or a stall another one goes on, without what that was in."""
        budget = Budget(limit)
        crashed: dict[str, str] = {}
        for _ in range(RESTARTS):
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "result.jsonl"
                command = [sys.executable, "-m", "alexnet_kernels.testing.gpu_check", "--worker", name]
                command += ["--device", self.device, "--seconds", str(budget.left()), "--result", str(result)]
                command += [f"--skip={case}" for case in (*section.get("finished", {}), *crashed)]
                section.pop("current", None)
                try:
                    status, errors = self._run(command, budget.left() + 20, watched=result)
                finally:
                    for line in _json_lines(result):
                        merge(section, line)
            if status == 0:
                break
            case = section.get("current", "its start")
            if status is None and budget.left() < 0:
                section.setdefault("unfinished", {})[case] = True
                break
            again = case in crashed
            crashed[case] = "took too long" if status is None else f"ended with status {status}: {_last_line(errors)}"
            if again or "current" not in section or budget.left() < 10:
                break
        section.pop("finished", None)
        if crashed:
            section["crashed"] = crashed
        section["state"] = "failed" if crashed or self._wrong(section) else "passed"

    @staticmethod
    def _wrong(section: dict[str, Any]) -> bool:
        """Whether a variant of ours computes wrong values, or can't run."""
        return bool(tables.problems(section.get("cases", {})))

    def _tests(self, name: str, section: dict[str, Any], limit: float) -> None:
        tests = (self.tests or PACKAGE.parent / "tests").resolve()
        if not (tests / "conftest.py").exists():
            section |= {"state": "skipped", "error": f"there are no tests at {tests}: give --tests"}
            return
        if importlib.util.find_spec("pytest") is None:
            section |= {"state": "skipped", "error": "pytest is not installed"}
            return
        if self.device == "cuda":
            chosen = [str(tests / "ops"), str(tests / "test_gpu.py"), "-m", "gpu"]
        else:
            chosen = [str(tests / "ops" / "test_within_map_response_norm.py"), "-k", "definition and cpu"]
        budget = Budget(limit)
        status: int | None = 0
        errors = ""
        # In a folder of its own: `python -m` would import a source tree's package from the current one.
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "progress.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", progress.__name__]
            command += ["--continue-on-collection-errors", *chosen]
            try:
                for _ in range(RESTARTS):
                    variables = {progress.VARIABLE: str(lines)}
                    status, errors = self._run(command, budget.left(), variables, Path(folder), watched=lines)
                    if status in PYTEST_ENDED or budget.left() < 5:
                        break
                    # It crashed or stalled: the next process takes the tests that follow.
                    under_way = progress.unfinished(_json_lines(lines))
                    if under_way is None and status != progress.LOST:
                        break
                    if under_way is not None:
                        reason = "took too long" if status is None else f"the process ended with status {status}"
                        progress.write(lines, {"test": under_way, "outcome": "failed", "reason": reason})
            finally:
                self._count(section, _json_lines(lines))
        section["finished"] = status in PYTEST_ENDED
        bad = section["failed"] + section["errors"]
        section["state"] = "passed" if section["passed"] and not bad else "failed"
        if not section["failures"] and status not in (0, None):
            section["state"] = "failed"
            section["error"] = f"pytest ended with status {status}: {_last_line(errors)}"

    @staticmethod
    def _count(section: dict[str, Any], found: list[dict[str, Any]]) -> None:
        outcomes = [line for line in found if "outcome" in line]
        for key, outcome in {"passed": "passed", "failed": "failed", "errors": "error", "skipped": "skipped"}.items():
            section[key] = sum(line["outcome"] == outcome for line in outcomes)
        section["collected"] = next((line["collected"] for line in found if "collected" in line), 0)
        section["failures"] = {
            line["test"]: line["reason"] for line in outcomes if line["outcome"] in ("failed", "error")
        }
        reasons = [line["reason"] for line in outcomes if line["outcome"] == "skipped"]
        section["skips"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        section["finished"] = False

    def _sanitizer(self, name: str, section: dict[str, Any], limit: float) -> None:
        sanitizer = machine.tool("compute-sanitizer")
        if self.device != "cuda" or sanitizer is None:
            section |= {"state": "skipped", "error": "compute-sanitizer is not available"}
            return
        if reason := backends.unavailable("max_pool2d", "cuda"):
            section |= {"state": "skipped", "error": f"backend 'cuda': {reason}"}
            return
        budget = Budget(limit)
        tools = ("memcheck", "racecheck")
        statuses: list[int | None] = []
        for i, tool in enumerate(tools):
            # Of this package's kernels only: the libraries' are many, and theirs to check.
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=alexnet_kernels"]
            command += [sys.executable, "-m", "alexnet_kernels.testing.exercise"]
            # So that the tool sees every allocation by itself.
            variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status, text = self._run(command, budget.left() / (len(tools) - i), variables)
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            section[tool] = summary[-1] if summary else ("took too long" if status is None else _last_line(text))
            errors = re.findall(r"=+ ((?:Invalid|Error|Misaligned|Program hit|Uninit).*)", text)
            if errors:
                section[f"{tool} found"] = errors[:10]
            statuses.append(status)
        section["state"] = "failed" if any(s not in (0, None) for s in statuses) else "passed"
        if all(s is None for s in statuses):
            section |= {"state": "skipped", "error": "neither tool ended in the time"}

    def _run(
        self,
        command: list[str],
        limit: float,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        watched: Path | None = None,
    ) -> tuple[int | None, str]:
        """(exit status, what was printed).

        The status is None if the process was stopped: after `limit` seconds, or STALL during which the file `watched`
        did not grow.
        """
        path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, **(variables or {})}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
            )
            status: int | None = None
            end = time.monotonic() + max(1.0, limit)
            size, grown = -1, time.monotonic()
            try:
                while status is None and time.monotonic() < min(end, grown + STALL if watched else end):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(0.2)
                    now = watched.stat().st_size if watched and watched.exists() else 0
                    if now != size:
                        size, grown = now, time.monotonic()
            finally:
                # Its children too, of which a process that ended by itself may have left some.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return status, output.read()

    def _line(self, name: str, section: dict[str, Any]) -> str:
        if section.get("error"):
            return str(section["error"])
        if name == "tests":
            rest = "" if section["finished"] else f" of {section['collected']}, the rest not reached"
            return f"{section['passed']} passed, {section['failed'] + section['errors']} failed{rest}"
        if name in ("ops", "nets"):
            return f"{len(section.get('cases', {}))} cases"
        if name == "ceilings" and "copy" in section:
            return f"copy {section['copy'] / 1e9:.0f} GB/s"
        return ""

    def passed(self) -> bool:
        return all(part["state"] in ("passed", "skipped") for part in self.report["parts"].values())


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """What a process wrote; it may have ended in the middle of a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


# The report.


def markdown(report: dict[str, Any]) -> str:
    parts = report["parts"]
    facts = parts.get("environment", {})
    lines = ["# GPU check" if report["device"] == "cuda" else "# GPU check, run on a CPU: its figures say nothing", ""]
    keys = ("device", "driver", "torch", "cuda", "cudnn", "triton", "nvcc", "python", "host", "commit", "date")
    lines += [", ".join(f"{key} {facts[key]}" for key in keys if key in facts), ""]
    if "capability" in facts:
        memory = facts["memory"] / 2**30
        lines += [f"Compute capability {facts['capability']}, {facts['multiprocessors']} SMs, {memory:.0f} GiB.", ""]
    absent: dict[str, list[str]] = {}
    for entry in facts.get("backends", []):
        for backend in OURS[report["device"]]:
            if entry["backends"][backend] != "available":
                absent.setdefault(f"{backend}: {entry['backends'][backend]}", []).append(entry["op"])
    lines += [f"- No backend {reason} ({', '.join(ops)})" for reason, ops in absent.items()] + [""] * bool(absent)
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    for name, part in parts.items():
        note = part.get("error") or "; ".join(f"{k} {v}" for k, v in part.get("crashed", {}).items())
        lines.append(f"| {name} | {part['state']} | {part.get('seconds', '')} | {note} |")
    lines.append("")
    rates = roofline.ceilings(parts.get("ceilings", {}))
    lines += [tables.ceilings_text(rates), ""] if rates else []
    lines += _tests_lines(parts.get("tests", {})) + _sanitizer_lines(parts.get("sanitizer", {}))
    for title, name in (("Ops", "ops"), ("Networks", "nets")):
        lines += _rows_lines(title, parts.get(name, {}), rates, report["device"] == "cuda")
    return "\n".join(lines)


def _tests_lines(tests: dict[str, Any]) -> list[str]:
    if "collected" not in tests:
        return []
    lines = ["## Tests", ""]
    end = "" if tests["finished"] else " Not all were reached in the time."
    lines += [
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors, {tests['skipped']} skipped of "
        f"{tests['collected']}.{end}",
        "",
    ]
    lines += [f"- FAILED `{name}`: {reason}" for name, reason in tests["failures"].items()]
    lines += [f"- {count} skipped: {reason}" for reason, count in tests["skips"].items()]
    return [*lines, ""]


def _sanitizer_lines(sanitizer: dict[str, Any]) -> list[str]:
    tools = []
    for tool in ("memcheck", "racecheck"):
        if tool in sanitizer:
            tools.append(f"- {tool}: {sanitizer[tool]}")
            tools += [f"  - {found}" for found in sanitizer.get(f"{tool} found", [])]
    return ["## compute-sanitizer", "", *tools, ""] if tools else []


def _rows_lines(title: str, section: dict[str, Any], rates: roofline.Ceilings | None, cuda: bool) -> list[str]:
    found = tables.table(section.get("cases", {}), rates, cuda)
    late = section.get("unfinished", [])
    if not found and not late:
        return []
    legend = f"{tables.LEGEND}\n* without a CUDA graph, the time to launch included." if cuda else tables.LEGEND
    unreached = [f"Not reached in the time: {'; '.join(late)}.", ""] if late else []
    return [f"## {title}", "", legend, "", *found, *unreached]


def _work(options: argparse.Namespace) -> int:
    """A part in its own process: a line of JSON for each finding."""
    torch.manual_seed(0)
    with open(options.result, "w") as file:
        for found in WORKERS[options.worker](torch.device(options.device), Budget(options.seconds), set(options.skip)):
            file.write(json.dumps(found) + "\n")
            file.flush()
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m alexnet_kernels.testing.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--minutes", type=float, default=8, help="that everything may take (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), metavar="PART", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="the tests' folder (default: beside the package)")
    for name in ("--worker", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(options)
    if options.out is None:
        parser.error("--out DIR is required")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, not {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    check = Check(options.out, options.device, options.minutes, options.tests)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        check.run([name for name in SHARES if not options.only or name in options.only])
    except KeyboardInterrupt:
        print(f"interrupted: {options.out}/gpu_check.md has what was found")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print((options.out / "gpu_check.md").read_text())
    print(f"{'passed' if check.passed() else 'FAILED'}: {options.out}/gpu_check.md, {options.out}/gpu_check.json")
    return 0 if check.passed() else 1


if __name__ == "__main__":
    raise SystemExit(main())
