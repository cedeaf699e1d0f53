"""Runs the parts of the check within the time, each in processes of its own, and keeps what they find and print."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
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

from alexnet_kernels.bench import machine, roofline
from alexnet_kernels.bench.machine import PACKAGE
from alexnet_kernels.gpu_check import counters, findings, progress, report
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import IN_WORKER, PATIENCE, SHARES, Budget, stages

ROOT = PACKAGE.parent  # of the source tree, if the package is in one
LOG = "log.txt"
RESTARTS = 12  # of a worker that crashed, without what it crashed in
LARGEST_LOG = 15 * 2**20  # bytes
PYTEST_ENDED = (0, 1, 5)  # by itself: all passed, some failed, none were left
PROCESSES = 12  # of pytest, at most
SMOKE_PROCESSES = 8
RESERVE = 2.0  # seconds, for the report
STARTS = 10.0  # seconds in which a worker starts, counted beside its time


class Busy(Exception):
    """Another check is at work in the same folder."""


class Stopped(Exception):
    """The check is being ended: nothing more is started."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None  # None: the check ended it for its time
    tail: tuple[str, ...]  # the last lines that it printed
    timed_out: bool = False  # whether its own watchdog ended it

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
    """Of the child: it ends when the check does, however that was."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _kill(group: int) -> None:
    """A process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Reaper:
    """A process that kills the process groups it was told of when the check dies: grandchildren, too."""

    CODE = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    sign, group = line[0], int(line[1:])
    groups.add(group) if sign == "+" else groups.discard(group)
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""

    def __init__(self) -> None:
        words = [sys.executable, "-S", "-c", self.CODE]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True, text=True)

    def add(self, group: int) -> None:
        self._tell("+", group)

    def discard(self, group: int) -> None:
        self._tell("-", group)

    def _tell(self, sign: str, group: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{sign}{group}\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()


class Log:
    """The one log: what every process prints, each line with the process's name before it.

    Raises:
        Busy: another check has it open.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = open(path, "a", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Busy(f"another check is at work in {path.parent}") from None
        self._left = LARGEST_LOG - path.stat().st_size

    def write(self, name: str, text: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._left <= 0:
                return
            self._left -= len(text) + len(name) + 3
            full = "" if self._left > 0 else f"check| the log is full: {LARGEST_LOG} bytes\n"
            self._file.write(f"{name}| {text.rstrip()}\n{full}")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Check:
    """One command: some parts, in at most `seconds`.

    Raises:
        Busy: another check is at work in the folder `out`.
    """

    def __init__(
        self,
        out: Path,
        device: str,
        seconds: float,
        *,
        name: str = "",
        tests: Path | None = None,
        library: Path | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.out, self.device, self.name, self.library, self.patience = out, device, name, library, patience
        self.tests = (tests or ROOT / "tests").resolve()
        self.budget = Budget(seconds - RESERVE)
        self.log = Log(out / LOG)
        self.findings = Findings(out / findings.FILE)
        self.since = self.findings.size()
        self.commit = machine.commit()
        self.passed = True
        self._lock = threading.Lock()
        self._stopped = False
        self._running: set[int] = set()
        self._reaper: Reaper | None = None

    def run(self, parts: Sequence[str]) -> bool:
        """Whether all that ran passed."""
        self._reaper = Reaper()
        try:
            self.findings.add("command", device=self.device, name=self.name, parts=list(parts), commit=self.commit)
            self.say(f"{', '.join(parts)}: {self.budget.left():.0f} s")
            order = stages(parts)
            for i, stage in enumerate(order):
                self._stage(stage, [part for later in order[i + 1 :] for part in later])
            self.write()
        finally:
            self._reaper.close()
            self.log.close()
        return self.passed

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(text, flush=True)
        self.log.write("check", text)

    def write(self) -> None:
        """The report; the check goes on without, if that fails."""
        try:
            report.write(self.out, self.findings)
        except Exception as error:
            self.say(f"the report could not be written: {type(error).__name__}: {error}")
            self.log.write("check", traceback.format_exc())

    def _stage(self, parts: Sequence[str], later: Sequence[str]) -> None:
        start = time.monotonic()
        left = self.budget.left()
        total = sum(SHARES[part] for part in [*parts, *later])
        ends, used = {}, 0.0
        for part in parts:
            used += SHARES[part]
            ends[part] = max(0.0, left) * used / total
        errors: dict[str, str] = {}
        states: dict[str, str] = {}
        try:
            if left <= 0:
                pass  # nothing is started: the parts are not reached
            elif parts[0] in IN_WORKER:
                self._work(parts, ends, start)
            else:
                other: dict[str, Callable[[float], tuple[str, str]]] = {
                    "build": self._build,
                    "tests": self._tests,
                    "counters": self._counters,
                    "sanitizer": self._sanitizer,
                }
                states[parts[0]], errors[parts[0]] = other[parts[0]](ends[parts[0]])
        except Stopped:
            pass
        except Exception as error:
            self.log.write("check", traceback.format_exc())
            states[parts[0]], errors[parts[0]] = "failed", f"{type(error).__name__}: {error}"
        except BaseException:
            self.stop()
            raise
        finally:
            self._end(parts, states, errors, time.monotonic() - start)

    def stop(self) -> None:
        """Ends what runs, and starts nothing more."""
        with self._lock:
            self._stopped = True
            for group in self._running:
                _kill(group)

    def _end(self, parts: Sequence[str], states: dict[str, str], errors: dict[str, str], seconds: float) -> None:
        for part in parts:
            lines = self.findings.lines(part)
            now = self.findings.lines(part, self.since)
            worked = [line["worked"] for line in now if "worked" in line]
            state, error = report.state(part, lines, now, interrupted=self._stopped)
            state, error = states.get(part) or state, errors.get(part) or error
            took = round(max(worked) if worked and len(parts) > 1 else seconds, 1)
            self.passed &= state not in ("failed", "interrupted")
            self.findings.add(
                part, state=state, seconds=took, commit=self.commit, **({"error": error} if error else {})
            )
            self.say(f"{part}: {state}, {took:.0f} s{f': {error}' if error else ''}")
        self.write()

    # Parts in workers of this package.

    def _work(self, parts: Sequence[str], ends: dict[str, float], start: float) -> None:
        count = min(SMOKE_PROCESSES, _cores()) if parts[0] == "smoke" else 1
        threads = [
            threading.Thread(target=self._worker, args=(parts, ends, start, index, count)) for index in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _worker(self, parts: Sequence[str], ends: dict[str, float], start: float, index: int, count: int) -> None:
        """Runs the parts in a process; after a crash another one goes on, without what that was in."""
        try:
            left, reason = self._keep_working(list(parts), ends, start, index, count)
        except Stopped:
            return
        except Exception as error:
            self.log.write("check", traceback.format_exc())
            left, reason = list(parts), f"{type(error).__name__}: {error}"
        for part in left:
            self.findings.add(part, ended=reason)

    def _keep_working(
        self, left: list[str], ends: dict[str, float], start: float, index: int, count: int
    ) -> tuple[list[str], str]:
        """The parts that failed to be worked to their end, and why."""
        name = f"{left[0]} {index}" if count > 1 else left[0]
        last = ends[left[-1]]
        ended = Ended(0, ())
        for _ in range(RESTARTS):
            since = self.findings.size()
            passed = time.monotonic() - start
            command = [sys.executable, "-m", "alexnet_kernels.gpu_check", "--worker", *left]
            command += ["--until", *[str(round(ends[part] - passed, 2)) for part in left], "--since", str(self.since)]
            command += ["--device", self.device, "--out", str(self.out), "--patience", str(self.patience)]
            command += ["--share", str(index), str(count)]
            ended = self.process(name, command, last - passed + STARTS)
            new = self.findings.lines(since=since)
            done = [line["part"] for line in new if line.get("worker") == index and "worked" in line]
            left = [part for part in left if part not in done]
            if not left:
                if ended.status != 0:
                    self.log.write("check", f"{name}, all done, {ended.reason}")
                return [], ""
            current = findings.under_way(line for line in new if line.get("worker", index) == index)
            if current is None:
                break  # it didn't start, or ended between two items
            part, item = current
            overtime = any(line.get("started") == item and line.get("overtime") for line in new)
            if ended.status is None or (ended.timed_out and overtime):
                ends[part] = 0.0  # the part's time is over: what is left of it is not reached
            else:
                self.findings.add(part, crashed=item, reason=ended.reason)
            if time.monotonic() - start > last:  # what is left of the time's end is not reached
                return [], ""
        return left, ended.reason

    # Parts in processes of other programs: (state, error).

    def _build(self, limit: float) -> tuple[str, str]:
        """The library for the device present, in place; or one that was built elsewhere."""
        target = PACKAGE / "_C.so"
        if self.library is not None:
            if self.library.resolve() != target.resolve():
                temporary = target.with_name(f"._C.so.{os.getpid()}")
                shutil.copyfile(self.library, temporary)
                os.replace(temporary, target)
            return self._fits()
        if not (ROOT / "setup.py").exists():
            return "skipped", "no source tree: the installed library is checked"
        if self.device == "cuda":
            code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
            asked = self.process("build", [sys.executable, "-c", code], 60)
            if asked.status != 0 or not asked.tail:
                return "failed", f"torch doesn't tell the device's architecture: {asked.reason}"
            variables = {"ALEXNET_KERNELS_CUDA": "1", "ALEXNET_KERNELS_ARCHS": asked.tail[-1]}
        else:
            variables = {"ALEXNET_KERNELS_CUDA": "0"}
        # Without the library there is nothing to check: its build may take longer than its share.
        ended = self.process(
            "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 2 * limit, variables, ROOT
        )
        if ended.status != 0:
            return "failed", f"{ended.reason}. What was built before, if anything, is checked"
        return self._fits()

    def _fits(self) -> tuple[str, str]:
        """Whether the library loads here, is of this tree's sources, and has kernels for this device."""
        words = ["--worker", "library", "--device", self.device, "--out", str(self.out)]
        ended = self.process("build", [sys.executable, "-m", "alexnet_kernels.gpu_check", *words], 60)
        if ended.status == 0:
            return "passed", ""
        return "failed", f"the library: {ended.tail[-1] if ended.tail else ended.reason}"

    def _tests(self, limit: float) -> tuple[str, str]:
        if not (self.tests / "conftest.py").exists():
            return "skipped", f"there are no tests at {self.tests}: give --tests"
        if importlib.util.find_spec("pytest") is None:
            return "skipped", "pytest is not installed"
        if self.device == "cuda":
            chosen = [str(self.tests / "test_gpu.py"), str(self.tests / "ops"), "-m", "gpu"]
        else:
            chosen = [str(self.tests / "ops" / "test_contract.py"), "-k", "test_auto"]
        words = [sys.executable, "-m", "pytest", "-q", "--tb=long", "-p", "no:cacheprovider", "-p", progress.__name__]
        processes = min(PROCESSES, _cores() - 2)
        if processes > 1 and importlib.util.find_spec("xdist") is not None:
            words += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "2"]
            words += ["--max-worker-restart", "50"]
        budget = Budget(limit)
        error = ""
        # In a folder of its own: `python -m` would import a source tree's package from the current one.
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(RESTARTS):
                before = self.findings.size()
                variables = {
                    progress.VARIABLE: str(self.findings.path.resolve()),
                    progress.SINCE: str(self.since),
                    progress.SEEN: str(before),
                    progress.PATIENCE: str(max(5.0, min(100.0, self.patience * 2))),
                    # Of the tests' own compilation: every process of pytest's would start as many again.
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",
                    "TORCHDYNAMO_VERBOSE": "1",  # whole stacks
                }
                command = [*words, "--continue-on-collection-errors", *chosen]
                ended = self.process("tests", command, budget.left(), variables, Path(folder))
                new = self.findings.lines("tests", before)
                in_test = findings.under_way(new)
                error = "" if ended.status in PYTEST_ENDED and in_test is None else f"pytest {ended.reason}"
                if not error or ended.status is None or budget.left() < 5:
                    break
                # Without xdist: the next process takes the tests that follow the one that ended this.
                if in_test is not None:
                    self.findings.add("tests", test=in_test[1], outcome="failed", reason=ended.reason, seconds=0)
                elif not any("test" in line for line in new):
                    break
        lines = self.findings.lines("tests")
        state, problem = report.state("tests", lines, self.findings.lines("tests", self.since), interrupted=False)
        if state in ("not reached", "unfinished") and error and ended.status is not None:
            return "failed", error
        return state, problem

    def _counters(self, limit: float) -> tuple[str, str]:
        ncu = machine.tool("ncu")
        if self.device != "cuda" or ncu is None:
            return "skipped", "ncu (Nsight Compute) is not available"
        every = self.findings.lines()
        rates = roofline.ceilings(
            findings.results(line for line in every if line["part"] == "ceilings").get("rates", {})
        )
        rows = findings.results(line for line in every if line["part"] == "ops")
        if rates is None or not rows:
            return "skipped", "the ops were not timed"
        done = findings.results(self.findings.lines("counters"))
        chosen = [one for one in counters.slowest(rows, rates) if f"{one[0]}, {one[1]}" not in done]
        if not chosen:
            return ("passed", "") if done else ("skipped", "no row of backend 'cuda' was timed")
        self.findings.add("counters", items=[f"{row}, {direction}" for row, direction, _ in chosen])
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            ended = self.process("counters", counters.command(ncu, log, chosen), limit)
            text = log.read_text() if log.exists() else ""
        found = counters.parsed(text)
        if len(found) != len(chosen):  # which row a kernel is of isn't known
            self.log.write("counters", text[:4000])
            return "skipped", f"{len(found)} of {len(chosen)} rows: ncu {ended.reason}"
        for (name, direction, reached), kernels in zip(chosen, found, strict=True):
            result = {"share_of_floor": reached, "kernels": kernels}
            self.findings.add("counters", item=f"{name}, {direction}", result=result)
        return "passed", ""

    def _sanitizer(self, limit: float) -> tuple[str, str]:
        sanitizer = machine.tool("compute-sanitizer")
        if self.device != "cuda" or sanitizer is None:
            return "skipped", "compute-sanitizer is not available"
        budget = Budget(limit)
        done = report.sound("sanitizer", self.findings.lines("sanitizer"))
        tools = [tool for tool in ("memcheck", "racecheck") if tool not in done]
        self.findings.add("sanitizer", items=tools)
        for i, tool in enumerate(tools):
            # Of this package's kernels only: the libraries' are many, and theirs to check.
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=alexnet_kernels"]
            command += [sys.executable, "-m", "alexnet_kernels.gpu_check.exercise"]
            # So that the tool sees every allocation by itself.
            variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            lines: list[str] = []
            ended = self.process("sanitizer", command, budget.left() / (len(tools) - i), variables, keep=lines)
            text = "\n".join(lines)
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            errors = re.findall(r"=+ ((?:Invalid|Error|Misaligned|Program hit|Uninit).*)", text)
            if ended.status is not None or errors:
                failed = ended.status not in (0, None) or bool(errors)
                result = {"summary": summary[-1] if summary else ended.reason, "errors": errors[:10], "failed": failed}
                result["ops"] = [line for line in lines if re.fullmatch(r"\w+", line)]
                self.findings.add("sanitizer", item=tool, result=result)
        return "", ""

    def process(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        keep: list[str] | None = None,
    ) -> Ended:
        """Runs a command, its output in the log; ended after `limit` seconds, with all that it started.

        Raises:
            Stopped: the check is being ended.
        """
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(variables or {})}
        self.log.write(name, f"$ {' '.join(map(str, command))}")
        with self._lock:
            if self._stopped:
                raise Stopped
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
            self._running.add(process.pid)
            if self._reaper is not None:
                self._reaper.add(process.pid)
        tail: deque[str] = deque(maxlen=400)
        timeouts: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.log.write(name, line)
                tail.append(line.rstrip())
                if re.match(r"Timeout \(\d+:\d+:\d+", line):
                    timeouts.append(line)
                if keep is not None:
                    keep.append(line.rstrip())

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(1.0, min(limit, self.budget.left())))
        finally:
            # Its children too, of which a process that ended by itself may have left some.
            _kill(process.pid)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # in the driver
                self.say(f"{name}: process {process.pid} could not be ended")
            with self._lock:
                self._running.discard(process.pid)
                if self._reaper is not None:
                    self._reaper.discard(process.pid)
            reader.join(2)
        if self._stopped:
            raise Stopped
        return Ended(status, tuple(tail), status == 1 and bool(timeouts))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))
