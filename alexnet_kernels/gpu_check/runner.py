"""Runs the parts of the check within the time, each in processes of its own, and keeps what they find and print."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet_kernels.gpu_check import counters, findings, progress, report
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import IN_WORKER, SHARES, Budget
from alexnet_kernels.testing import machine, roofline
from alexnet_kernels.testing.machine import PACKAGE

ROOT = PACKAGE.parent  # of the source tree, if the package is in one
LOG = "log.txt"
RESTARTS = 12  # of a worker that crashed, without what it crashed in
LARGEST_LOG = 15 * 2**20  # bytes
PYTEST_ENDED = (0, 1, 5)  # by itself: all passed, some failed, none were left
PROCESSES = 12  # of pytest, at most
SMOKE_PROCESSES = 8


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None  # None: it was ended for its time
    tail: tuple[str, ...]  # the last lines that it printed

    @property
    def timed_out(self) -> bool:
        """Whether it ended itself."""
        return self.status == 1 and any(re.match(r"Timeout \(\d+:\d+:\d+", line) for line in self.tail)

    @property
    def reason(self) -> str:
        if self.status is None:
            return "it took too long"
        if self.timed_out:
            return "it took too long: the log has its stack"
        lines = [line for line in self.tail if line.strip()]
        lines += [line for line in lines if line.startswith("Fatal Python error")]
        return f"ended with status {self.status}: {lines[-1].strip()[:300] if lines else 'it printed nothing'}"


def _die_with_parent() -> None:
    """Of the child: what the check started ends when the check does, however that was."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _kill(process: subprocess.Popen[str]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Log:
    """The one log: what every process prints, each line with the process's name before it."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._left = LARGEST_LOG - (path.stat().st_size if path.exists() else 0)
        self._file = open(path, "a", errors="replace")  # noqa: SIM115

    def write(self, name: str, text: str) -> None:
        with self._lock:
            self._left -= len(text) + len(name) + 3
            if self._left > 0:
                self._file.write(f"{name}| {text.rstrip()}\n")
                self._file.flush()

    def close(self) -> None:
        self._file.close()


class Check:
    """One command: the parts from `parts[0]` on, in at most `seconds`."""

    def __init__(
        self,
        out: Path,
        device: str,
        seconds: float,
        *,
        tests: Path | None = None,
        library: Path | None = None,
        patience: float = 60.0,
    ) -> None:
        self.out, self.device, self.library, self.patience = out, device, library, patience
        self.tests = (tests or ROOT / "tests").resolve()
        self.budget = Budget(seconds)
        self.commit = machine.commit()
        self.findings = Findings(out / findings.FILE)
        self.log = Log(out / LOG)
        self.failed = False
        self._stopped = False
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, parts: Sequence[str]) -> bool:
        """Whether all that ran passed. Parts that follow each other in one worker share its start."""
        self.say(f"{', '.join(parts)}: {self.budget.left():.0f} s")
        i = 0
        while i < len(parts):
            j = i + 1
            if parts[i] in IN_WORKER and parts[i] != "smoke":
                while j < len(parts) and parts[j] in IN_WORKER and parts[j] != "smoke":
                    j += 1
            self._stage(parts[i:j], parts[j:])
            i = j
        self.write()
        self.log.close()
        return not self.failed

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write("check", text)

    def write(self) -> None:
        report.write(self.out, self.findings, self.device)

    def _stage(self, parts: Sequence[str], later: Sequence[str]) -> None:
        start = time.monotonic()
        limit = (
            self.budget.left() * sum(SHARES[part] for part in parts) / sum(SHARES[part] for part in [*parts, *later])
        )
        states: dict[str, dict[str, Any]] = {}
        try:
            if parts[0] in IN_WORKER:
                states = self._work(parts, later, limit)
            else:
                other: dict[str, Callable[[float], dict[str, Any]]] = {
                    "build": self._build,
                    "tests": self._tests,
                    "counters": self._counters,
                    "sanitizer": self._sanitizer,
                }
                states = {parts[0]: other[parts[0]](limit)}
        except Exception as error:
            states = {parts[-1]: {"state": "failed", "error": f"{type(error).__name__}: {error}"}}
        except BaseException:
            states = {parts[-1]: {"state": "interrupted"}}
            self._stopped = True
            for process in list(self._running):
                _kill(process)
            raise
        finally:
            seconds = round(time.monotonic() - start, 1)
            for part, state in states.items():
                line = {"seconds": seconds, **state, "commit": self.commit}
                self.findings.add(part, **line)
                self.failed |= line["state"] not in ("passed", "skipped")
                why = f": {line['error']}" if line.get("error") else ""
                self.say(f"{part}: {line['state']}, {line['seconds']:.0f} s{why}")
            self.write()

    # Parts in workers of this package.

    def _work(self, parts: Sequence[str], later: Sequence[str], limit: float) -> dict[str, dict[str, Any]]:
        count = min(SMOKE_PROCESSES, os.cpu_count() or 1) if parts[0] == "smoke" else 1
        since = self.findings.size()
        seconds = self.budget.left()
        threads = [
            threading.Thread(target=self._worker, args=(parts, later, seconds, limit, index, count))
            for index in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {part: self._state(part, since) for part in parts}

    def _state(self, part: str, since: int) -> dict[str, Any]:
        lines = self.findings.lines(part, since)
        ended = [line for line in lines if "ended" in line]
        seconds = sum(line["worked"] for line in lines if "worked" in line and line["index"] == 0)
        state: dict[str, Any] = {"seconds": seconds}
        problems = report.problems(part, lines)
        problems += [f"{line['crashed']}: {line['reason']}" for line in lines if "crashed" in line]
        if ended:
            state |= {"state": "failed", "error": ended[-1]["ended"]}
        elif problems:
            state |= {
                "state": "failed",
                "error": f"{problems[0]}" + (f" and {len(problems) - 1} more" * (len(problems) > 1)),
            }
        else:
            state |= {"state": "passed"}
        return state

    def _worker(
        self, parts: Sequence[str], later: Sequence[str], seconds: float, limit: float, index: int, count: int
    ) -> None:
        """Runs the parts in a process; after a crash another one goes on, without what that was in."""
        try:
            self._keep_working(parts, later, seconds, limit, index, count)
        except Exception as error:
            traceback.print_exc()
            self.findings.add(parts[-1], ended=f"{type(error).__name__}: {error}")

    def _keep_working(
        self, parts: Sequence[str], later: Sequence[str], seconds: float, limit: float, index: int, count: int
    ) -> None:
        budget, hard = Budget(seconds), Budget(limit + 25)
        name = f"{parts[0]} {index}" if count > 1 else parts[0]
        left = list(parts)
        for _ in range(RESTARTS):
            since = self.findings.size()
            command = [sys.executable, "-m", "alexnet_kernels.gpu_check", "--worker", *left, "--later", *later]
            command += ["--device", self.device, "--seconds", str(budget.left()), "--out", str(self.out)]
            command += ["--share", str(index), str(count), "--patience", str(self.patience)]
            ended = self.process(name, command, hard.left())
            if self._stopped:
                return
            new = self.findings.lines(since=since)
            done = [line["part"] for line in new if "worked" in line and line["index"] == index]
            left = [part for part in left if part not in done]
            if ended.status == 0:
                return
            current = findings.under_way(line for line in new if line.get("worker", index) == index)
            if current is None or (ended.status is None and hard.left() < 1):
                part, item = current or (left[0] if left else parts[-1], "")
                self.findings.add(part, **({"late": [item]} if item else {"ended": ended.reason}))
                return
            part, item = current
            if ended.timed_out and any(line.get("started") == item and line.get("overtime") for line in new):
                self.findings.add(part, late=[item])
                left.remove(part)
                if not left:
                    return
            else:
                self.findings.add(part, crashed=item, reason=ended.reason)

    # Parts in processes of other programs.

    def _build(self, limit: float) -> dict[str, Any]:
        """The library for the device present, in place; or one that was built elsewhere."""
        target = PACKAGE / "_C.so"
        if self.library is not None:
            if self.library.resolve() != target.resolve():
                temporary = target.with_name(f"._C.so.{os.getpid()}")
                shutil.copyfile(self.library, temporary)
                os.replace(temporary, target)
            return self._fits()
        if not (ROOT / "setup.py").exists():
            return {"state": "skipped", "error": "no source tree: the installed library is checked"}
        variables = {}
        if self.device == "cuda":
            capability = machine.output(
                "nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", pattern=r"(\d+\.\d+)"
            )
            variables = {"ALEXNET_KERNELS_CUDA": "1", "ALEXNET_KERNELS_ARCHS": capability}
        else:
            variables = {"ALEXNET_KERNELS_CUDA": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        ended = self.process("build", command, limit + 60, variables, ROOT)
        if ended.status != 0:
            return {"state": "failed", "error": f"{ended.reason}. What was built before, if anything, is checked"}
        return self._fits()

    def _fits(self) -> dict[str, Any]:
        """Whether the library loads here, is of this tree's sources, and has kernels for this device."""
        words = ["--worker", "library", "--device", self.device, "--out", str(self.out)]
        ended = self.process("build", [sys.executable, "-m", "alexnet_kernels.gpu_check", *words], 60)
        if ended.status == 0:
            return {"state": "passed"}
        return {"state": "failed", "error": f"the library: {ended.tail[-1] if ended.tail else ended.reason}"}

    def _tests(self, limit: float) -> dict[str, Any]:
        if not (self.tests / "conftest.py").exists():
            return {"state": "skipped", "error": f"there are no tests at {self.tests}: give --tests"}
        if importlib.util.find_spec("pytest") is None:
            return {"state": "skipped", "error": "pytest is not installed"}
        if self.device == "cuda":
            chosen = [str(self.tests / "test_gpu.py"), str(self.tests / "ops"), "-m", "gpu"]
        else:
            chosen = [str(self.tests / "ops" / "test_within_map_response_norm.py"), "-k", "definition and cpu"]
        words = [sys.executable, "-m", "pytest", "-q", "--tb=long", "-p", "no:cacheprovider", "-p", progress.__name__]
        processes = min(PROCESSES, (os.cpu_count() or 1) - 2)
        if processes > 1 and importlib.util.find_spec("xdist") is not None:
            words += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "2"]
            words += ["--max-worker-restart", "50"]
        since = self.findings.size()
        budget = Budget(limit)
        ended, in_test = Ended(0, ()), None
        # In a folder of its own: `python -m` would import a source tree's package from the current one.
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(RESTARTS):
                variables = {
                    progress.VARIABLE: str(self.findings.path.resolve()),
                    progress.SEEN: str(self.findings.size()),
                    progress.PATIENCE: str(max(5.0, min(100.0, self.patience * 2))),
                    # Of the tests' own compilation: every process of pytest's would start as many again.
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    "TORCHDYNAMO_VERBOSE": "1",  # whole stacks
                }
                before = self.findings.size()
                command = [*words, "--continue-on-collection-errors", *chosen]
                ended = self.process("tests", command, budget.left(), variables, Path(folder))
                in_test = progress.under_way(self.findings.lines("tests", before))
                if (ended.status in PYTEST_ENDED and in_test is None) or budget.left() < 5:
                    break
                # Without xdist: the next process takes the tests that follow the one that ended this.
                if in_test is not None:
                    self.findings.add("tests", test=in_test, outcome="failed", reason=ended.reason, seconds=0)
                elif ended.status != progress.LOST:
                    break
        counts = report.count_tests(self.findings.lines("tests", since))
        bad = counts["failed"] + counts["errors"]
        state: dict[str, Any] = {"finished": ended.status in PYTEST_ENDED and in_test is None}
        state["state"] = "passed" if counts["passed"] and not bad else "failed"
        if ended.status not in (0, None) and not bad:
            state |= {"state": "failed", "error": f"pytest {ended.reason}"}
        return state

    def _counters(self, limit: float) -> dict[str, Any]:
        ncu = machine.tool("ncu")
        if self.device != "cuda" or ncu is None:
            return {"state": "skipped", "error": "ncu (Nsight Compute) is not available"}
        every = self.findings.lines()
        rates = roofline.ceilings(
            findings.results(line for line in every if line["part"] == "ceilings").get("rates", {})
        )
        rows = findings.results(line for line in every if line["part"] == "ops")
        if rates is None or not rows:
            return {"state": "skipped", "error": "the ops were not timed"}
        done = findings.finished(line for line in every if line["part"] == "counters")
        chosen = [one for one in counters.slowest(rows, rates) if f"{one[0]}, {one[1]}" not in done]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            ended = self.process("counters", counters.command(ncu, log, chosen), limit)
            text = log.read_text() if log.exists() else ""
        found = counters.parsed(text)
        for (name, direction, reached), kernels in zip(chosen, found, strict=False):
            result = {"share_of_floor": reached, "kernels": kernels}
            self.findings.add("counters", item=f"{name}, {direction}", result=result)
        if len(found) < len(chosen):
            self.log.write("counters", text[:4000])
            return {"state": "skipped", "error": f"{len(found)} of {len(chosen)} rows: ncu {ended.reason}"}
        return {"state": "passed"}

    def _sanitizer(self, limit: float) -> dict[str, Any]:
        sanitizer = machine.tool("compute-sanitizer")
        if self.device != "cuda" or sanitizer is None:
            return {"state": "skipped", "error": "compute-sanitizer is not available"}
        budget = Budget(limit)
        tools = ("memcheck", "racecheck")
        ended: list[Ended] = []
        for i, tool in enumerate(tools):
            # Of this package's kernels only: the libraries' are many, and theirs to check.
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=alexnet_kernels"]
            command += [sys.executable, "-m", "alexnet_kernels.gpu_check.exercise"]
            # So that the tool sees every allocation by itself.
            variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            lines: list[str] = []
            one = self.process("sanitizer", command, budget.left() / (len(tools) - i), variables, keep=lines)
            text = "\n".join(lines)
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            errors = re.findall(r"=+ ((?:Invalid|Error|Misaligned|Program hit|Uninit).*)", text)
            result = {"summary": summary[-1] if summary else one.reason, "errors": errors[:10]}
            result["ops"] = [line for line in lines if re.fullmatch(r"\w+", line)]
            self.findings.add("sanitizer", item=tool, result=result)
            ended.append(one)
        if all(one.status is None for one in ended):
            return {"state": "skipped", "error": "neither tool ended in the time"}
        return {"state": "failed" if any(one.status not in (0, None) for one in ended) else "passed"}

    def process(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        keep: list[str] | None = None,
    ) -> Ended:
        """Runs a command, its output in the log; ended after `limit` seconds, with all that it started."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(variables or {})}
        self.log.write(name, f"$ {' '.join(map(str, command))}")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            cwd=cwd,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._running.add(process)
        tail: deque[str] = deque(maxlen=400)

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.write(name, line)
                tail.append(line.rstrip())
                if keep is not None:
                    keep.append(line.rstrip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(1.0, limit))
        finally:
            # Its children too, of which a process that ended by itself may have left some.
            _kill(process)
            process.wait()
            self._running.discard(process)
            reader.join(2)
        return Ended(status, tuple(tail))
