"""Runs the parts of the check within the time, each in processes of its own, and records findings and output."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alexnet_kernels.bench import machine
from alexnet_kernels.gpu_check import findings, plan, report
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.plan import IN_WORKER, PATIENCE, SHARES, Budget, stages
from alexnet_kernels.gpu_check.processes import ROOT, Ended, Log, Processes, Stopped
from alexnet_kernels.gpu_check.programs import PROGRAMS, Context
from alexnet_kernels.ops.conv2d_relu import VARIABLE

LOG = "log.txt"
RESERVE = 2.0  # seconds, for the report
START = 10.0  # seconds that a worker may take to start, beside its time


@dataclass(frozen=True)
class _Stage:
    """Parts that run one after the other in one worker, or in `count` workers that share the items."""

    start: float
    ends: dict[str, float]
    """Seconds after `start` at which each part's time ends."""
    count: int = 1


class Check:
    """One command: runs some parts in at most `seconds`.

    Raises:
        Busy: another check is running in the folder `out`.
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
        self.out, self.device, self.name, self.patience = out, device, name, patience
        self.budget = Budget(seconds - RESERVE)
        self.log = Log(out / LOG)
        self.findings = Findings(out / findings.FILE)
        self.since = self.findings.size()
        self.commit = machine.commit()
        self.passed = True
        self.processes = Processes(self.log, self.budget)
        tests = (tests or ROOT / "tests").resolve()
        self.context = Context(out, device, tests, library, patience, self.findings, self.since, self.processes)

    def run(self, parts: Sequence[str]) -> bool:
        """Returns whether every part that ran passed."""
        try:
            with self.processes:
                self.findings.add("command", device=self.device, name=self.name, parts=list(parts), commit=self.commit)
                self.log.say(f"{', '.join(parts)}: {self.budget.left():.0f} s")
                order = stages(parts)
                for i, stage in enumerate(order):
                    self._run_stage(stage, [part for later in order[i + 1 :] for part in later])
                self.write()
        finally:
            self.log.close()
        return self.passed

    def write(self) -> None:
        """Writes the report. The check continues if that fails."""
        try:
            report.write(self.out, self.findings)
        except Exception as error:
            self.log.say(f"the report could not be written: {type(error).__name__}: {error}")
            self.log.write("check", traceback.format_exc())

    def _run_stage(self, parts: Sequence[str], later: Sequence[str]) -> None:
        start, left = time.monotonic(), self.budget.left()
        first, state, error = parts[0], "", ""
        self._avoid_broken_paths()
        try:
            if left <= 0:
                pass  # the parts are not reached
            elif first in IN_WORKER:
                self._work(parts, _shares(parts, later, left), start)
            else:
                state, error = PROGRAMS[first](self.context, _shares(parts, later, left)[first])
        except Stopped:
            pass
        except Exception as failure:
            self.log.write("check", traceback.format_exc())
            state, error = "failed", f"{type(failure).__name__}: {failure}"
        except BaseException:
            self.processes.stop()
            raise
        finally:
            outcomes = {part: (state, error) if part == first else ("", "") for part in parts}
            self._end(outcomes, time.monotonic() - start)

    def _avoid_broken_paths(self) -> None:
        """Has backend "cuda" use cuDNN's convolutions from now on, if one of the package's own is wrong or hangs."""
        broken = report.broken_paths(self.findings.lines("paths"))
        if broken and VARIABLE not in self.processes.variables:
            self.processes.variables[VARIABLE] = "library"
            self.log.say(f"conv2d_relu by {' and by '.join(sorted(broken))} failed: the other parts do without it")

    def _end(self, outcomes: dict[str, tuple[str, str]], seconds: float) -> None:
        """Records the states of a stage's parts; an empty state is determined by the findings."""
        for part, (state, error) in outcomes.items():
            lines = self.findings.lines(part)
            now = self.findings.lines(part, self.since)
            worked = [line["worked"] for line in now if "worked" in line]
            found, why = report.state(part, lines, now, interrupted=self.processes.stopped)
            state, error = state or found, error or why
            took = round(max(worked) if worked and len(outcomes) > 1 else seconds, 1)
            self.passed &= state not in ("failed", "interrupted")
            self.findings.add(
                part, state=state, seconds=took, commit=self.commit, **({"error": error} if error else {})
            )
            self.log.say(f"{part}: {state}, {took:.0f} s{f': {error}' if error else ''}")
        self.write()

    def _work(self, parts: Sequence[str], ends: dict[str, float], start: float) -> None:
        """Runs parts in worker processes of this package."""
        count = min(plan.WORKERS.get(parts[0], 1), plan.cores())
        stage = _Stage(start, ends, count)
        threads = [threading.Thread(target=self._run_worker, args=(parts, stage, index)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_worker(self, parts: Sequence[str], stage: _Stage, index: int) -> None:
        """Runs the parts in worker `index`, and records why some could not be completed."""
        try:
            left, reason = self._keep_working(list(parts), stage, index)
        except Stopped:
            return
        except Exception as error:
            self.log.write("check", traceback.format_exc())
            left, reason = list(parts), f"{type(error).__name__}: {error}"
        for part in left:
            self.findings.add(part, ended=reason)

    def _keep_working(self, left: list[str], stage: _Stage, index: int) -> tuple[list[str], str]:
        """Restarts the worker after each crash, without the item that crashed.

        Returns the parts that the worker could not complete, and why.
        """
        name = f"{left[0]} {index}" if stage.count > 1 else left[0]
        last = stage.ends[left[-1]]
        ended = Ended(0, ())
        for _ in range(plan.RESTARTS):
            since = self.findings.size()
            passed = time.monotonic() - stage.start
            ended = self.processes.run(name, self._worker_command(left, stage, index, passed), last - passed + START)
            new = self.findings.lines(since=since)
            done = [line["part"] for line in new if line.get("worker") == index and "worked" in line]
            left = [part for part in left if part not in done]
            if not left:
                if ended.status != 0:
                    self.log.write("check", f"{name}: every part was completed, but it {ended.reason}")
                return [], ""
            current = findings.under_way(line for line in new if line.get("worker", index) == index)
            if current is None:
                break  # the worker did not start, or ended between two items
            part, item = current
            overtime = any(line.get("started") == item and line.get("overtime") for line in new)
            if ended.status is None or (ended.timed_out and overtime):
                stage.ends[part] = 0.0  # the part's time is over: its other items are not reached
            else:
                self.findings.add(part, crashed=item, reason=ended.reason)
            if time.monotonic() - stage.start > last:
                return [], ""
        return left, ended.reason

    def _worker_command(self, parts: Sequence[str], stage: _Stage, index: int, passed: float) -> list[str]:
        command = [sys.executable, "-m", "alexnet_kernels.gpu_check", "--worker", *parts]
        command += ["--until", *[str(round(stage.ends[part] - passed, 2)) for part in parts]]
        command += ["--since", str(self.since), "--device", self.device, "--out", str(self.out)]
        return [*command, "--patience", str(self.patience), "--share", str(index), str(stage.count)]


def _shares(parts: Sequence[str], later: Sequence[str], left: float) -> dict[str, float]:
    """Seconds from now at which each part's share of the time left ends."""
    total = sum(SHARES[part] for part in [*parts, *later])
    ends, used = {}, 0.0
    for part in parts:
        used += SHARES[part]
        ends[part] = left * used / total
    return ends
