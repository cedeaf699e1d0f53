"""Processes of a check: each runs in a process group of its own, within a time limit, with its output in one log."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from alexnet_kernels._dispatch import choices
from alexnet_kernels.bench.machine import PACKAGE
from alexnet_kernels.gpu_check.plan import Budget

ROOT = PACKAGE.parent  # the root of the source tree, if the package is in one
LARGEST_LOG = 15 * 2**20  # bytes


class Busy(Exception):
    """Another check is running in the same folder."""


class Stopped(Exception):
    """The check is being stopped: no process is started."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None
    """The exit status; None if the check killed the process at its time limit."""
    tail: tuple[str, ...]
    """The last lines of its output."""
    timed_out: bool = False
    """Whether its own watchdog ended it."""

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
    """Runs in the child: the kernel kills it when the check ends for any reason."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _open(command: Sequence[str], env: dict[str, str], cwd: Path | None) -> subprocess.Popen[str]:
    """Starts a process in a process group of its own."""
    return subprocess.Popen(
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


def _kill(group: int) -> None:
    """Kills a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


class Reaper:
    """A process that kills the registered process groups when the check dies, grandchildren included."""

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
    """The log of a check: the output of every process, each line prefixed with the process's name.

    Raises:
        Busy: another check has the log open.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = open(path, "a", errors="replace")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Busy(f"another check is running in {path.parent}") from None
        self._left = LARGEST_LOG - path.stat().st_size

    def write(self, name: str, text: str) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._left <= 0:
                return
            self._left -= len(text) + len(name) + 3
            full = "" if self._left > 0 else f"check| the log is full: {LARGEST_LOG} bytes\n"
            self._file.write(f"{name}| {text.rstrip()}\n{full}")
            self._file.flush()

    def say(self, text: str) -> None:
        """Prints a line, and writes it to the log."""
        with contextlib.suppress(OSError):  # a closed terminal
            print(text, flush=True)
        self.write("check", text)

    def close(self) -> None:
        self._file.close()


class Processes:
    """Runs commands within the check's time. A context manager: while it is open, a reaper watches the check."""

    def __init__(self, log: Log, budget: Budget) -> None:
        self.log, self.budget = log, budget
        self.stopped = False
        self.variables: dict[str, str] = {}
        """Added to the environment of every process."""
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._reaper: Reaper | None = None

    def __enter__(self) -> Processes:
        self._reaper = Reaper()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._reaper is not None
        self._reaper.close()
        self._reaper = None

    def stop(self) -> None:
        """Kills the running processes, and starts no more."""
        with self._lock:
            self.stopped = True
            for group in self._running:
                _kill(group)

    def run(
        self,
        name: str,
        command: Sequence[str],
        limit: float,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        keep: list[str] | None = None,
    ) -> Ended:
        """Runs a command with its output in the log, and kills its process group at the end.

        Args:
            name: prefix of its lines in the log.
            limit: seconds after which the command is killed.
            variables: added to the environment.
            keep: receives every line of output.

        Raises:
            Stopped: the check is being stopped.
        """
        self.log.write(name, f"$ {' '.join(map(str, command))}")
        process = self._start(command, variables or {}, cwd)
        tail: deque[str] = deque(maxlen=400)
        timeouts: list[str] = []

        def read(line: str) -> None:
            self.log.write(name, line)
            tail.append(line.rstrip())
            if re.match(r"Timeout \(\d+:\d+:\d+", line):
                timeouts.append(line)
            if keep is not None:
                keep.append(line.rstrip())

        status = self._wait(process, name, limit, read)
        if self.stopped:
            raise Stopped
        return Ended(status, tuple(tail), status == 1 and bool(timeouts))

    def _start(self, command: Sequence[str], variables: dict[str, str], cwd: Path | None) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # A user's table of choices takes no part in a check.
        env = {**os.environ, choices.VARIABLE: "0", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        env |= self.variables | variables
        with self._lock:
            if self.stopped:
                raise Stopped
            process = _open(command, env, cwd)
            self._running.add(process.pid)
            if self._reaper is not None:
                self._reaper.add(process.pid)
        return process

    def _wait(self, process: subprocess.Popen[str], name: str, limit: float, read: Callable[[str], None]) -> int | None:
        """Passes each line of output to `read`; returns the exit status, or None at the time limit."""
        assert process.stdout is not None
        output = process.stdout

        def read_all() -> None:
            for line in output:
                read(line)

        reader = threading.Thread(target=read_all, daemon=True)
        reader.start()
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(1.0, min(limit, self.budget.left())))
        finally:
            # A process that exited may have left children behind.
            _kill(process.pid)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:  # it hangs in the driver
                self.log.say(f"{name}: process {process.pid} could not be ended")
            with self._lock:
                self._running.discard(process.pid)
                if self._reaper is not None:
                    self._reaper.discard(process.pid)
            reader.join(2)
        return status
