"""Detects a process of a run that died or hangs, and ends the others with the reason."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alexnet_kernels._errors import InputError, RunError, first_line
from alexnet_kernels.training.distributed.environment import FAILURE, StoreAddress, watchdog_prefix

__all__ = ["GRACE", "Watchdog"]

HEARTBEAT = 1.0
"""Seconds between two heartbeats of a process."""
SILENCE = 20.0
"""Seconds without a heartbeat after which a process counts as dead; at most half of the run's timeout, so that a dead
process is reported before a hang."""
GRACE = 2.0
"""Seconds that a process has to end by itself once the run has failed."""


class Watchdog(threading.Thread):
    """A thread that ends this process, with the reason, if the run cannot continue.

    Each process writes a heartbeat to the run's store every second and reads that of the next rank. The first process
    that finds a failure, its own or another's, writes the reason to the store, where all find it within a second.

    Args:
        rank, size: this process's rank and the number of processes.
        timeout: seconds without progress after which the run counts as hung.
        hint: returns the end of an error message.
    """

    def __init__(self, rank: int, size: int, timeout: float, hint: Callable[[], str]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.size, self.timeout, self.hint = rank, size, timeout, hint
        self.silence = min(SILENCE, timeout / 2)
        self.progress = 0
        """Count of the main thread's steps."""
        self.started = threading.Event()
        """Set after the first heartbeat."""
        self.ending = threading.Event()
        """Set when the main thread ends the process itself."""
        self._main_thread = threading.main_thread().ident
        # The main thread may change the environment later.
        self._prefix, self._address = watchdog_prefix(), StoreAddress.of_environment()
        self._store: Any = None
        self._stopped = threading.Event()
        self.start()

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(5 * HEARTBEAT)

    def fail(self, error: BaseException) -> dict[str, Any] | None:
        """Report that this process fails. Returns None if it is the first to fail, otherwise the earlier failure.

        Raises SystemExit if another process has failed with the same message.
        """
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if not isinstance(error, InputError | RunError | KeyboardInterrupt | SystemExit):
                # A collective fails here when another process ends. Wait until it is known which one.
                until = time.monotonic() + (self.silence + 3 * HEARTBEAT if _is_communication_error(error) else 0)
                while (found := self._failure()) is None and time.monotonic() < until:
                    time.sleep(HEARTBEAT / 4)
                if found is not None:
                    return found
            text = first_line(error)
            if not isinstance(error, InputError | RunError):
                text = f"{type(error).__name__}: {text}"
            if isinstance(error, KeyboardInterrupt):
                text = "interrupted"
            status = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            self.ending.set()
            first = self._post({"status": status, "rank": self.rank, "reason": f"rank {self.rank}: {text}"})
            if first["rank"] != self.rank and first["reason"].split(": ", 1)[-1] == text:
                # The process that reported it first prints the message.
                raise SystemExit(status)
        return None

    def run(self) -> None:
        try:
            store = self._address.connect(timedelta(seconds=self.timeout))
            self._store = dist.PrefixStore(self._prefix, store)
            self._watch()
        except RuntimeError:
            if not self._stopped.is_set():
                self._end({"status": 1, "reason": "the process that started the run, or its machine, is gone"})

    def _watch(self) -> None:
        store, following = self._store, (self.rank + 1) % self.size
        beats, heard, heard_at = 0, None, time.monotonic()
        progress, progress_at = self.progress, time.monotonic()
        store.set(f"beat/{self.rank}", str(beats))
        self.started.set()
        while not self._stopped.wait(HEARTBEAT):
            if self._address.starter_is_gone():
                raise RuntimeError("the command has ended")
            beats += 1
            store.set(f"beat/{self.rank}", str(beats))
            if (failure := self._failure()) is not None:
                self._end(failure)
                return
            now = time.monotonic()
            if self.size > 1 and store.check([f"beat/{following}"]):
                last = store.get(f"beat/{following}")
                if last != heard:
                    heard, heard_at = last, now
                elif now - heard_at > self.silence:
                    reason = f"rank {following} sent no heartbeat for {self.silence:g} s"
                    self._post({"status": 1, "rank": following, "reason": reason})
            if self.progress != progress:
                progress, progress_at = self.progress, now
            elif now - progress_at > self.timeout:
                self._report_hang(progress)
                progress_at = now

    def _report_hang(self, progress: int) -> None:
        """Find the process that the others wait for, and post it as the failure."""
        location, communicating = _location(self._main_thread)
        self._store.set(f"place/{self.rank}", json.dumps([location, communicating]))
        # The other processes' timeouts pass within a heartbeat or two of this one's.
        time.sleep(4 * HEARTBEAT)
        if self.progress != progress:
            return
        locations = {}
        for rank in range(self.size):
            if self._store.check([f"place/{rank}"]):
                locations[rank] = json.loads(self._store.get(f"place/{rank}"))
        stuck = {rank: where for rank, (where, communicating) in locations.items() if not communicating} or {
            rank: where for rank, (where, _) in locations.items()
        }
        listed = ", ".join(f"rank {rank} in {where}" for rank, where in stuck.items())
        reason = f"no step ended for {self.timeout:g} s: {listed}"
        self._post({"status": 1, "rank": min(stuck), "reason": reason})

    def _failure(self) -> dict[str, Any] | None:
        """The run's failure, if there is one."""
        return json.loads(self._store.get(FAILURE)) if self._store.check([FAILURE]) else None

    def _post(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Make this the run's failure unless it already has one. Returns the run's failure."""
        return json.loads(self._store.compare_set(FAILURE, "", json.dumps(failure)))

    def _end(self, failure: dict[str, Any]) -> None:
        """End the process unless its main thread does."""
        if self.ending.wait(GRACE) or self._stopped.is_set():
            return
        # A single write keeps the lines of several processes whole.
        text = f"alexnet-kernels: error: rank {self.rank} ends: {failure['reason']}{self.hint()}\n"
        os.write(2, text.encode())
        os._exit(failure["status"])


def _is_communication_error(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = f"{error}".lower()
    words = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "broken pipe")
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in words)


def _location(thread: int | None) -> tuple[str, bool]:
    """Where a thread is, as "function (file:line)", and whether it is inside a collective."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no Python code", False
    stack = traceback.extract_stack(frame)
    files = [Path(entry.filename).as_posix() for entry in stack[-6:]]
    communicating = any("torch/distributed/" in name or name.endswith("parallel/collectives.py") for name in files)
    last = stack[-1]
    # In a backward pass, the autograd engine calls the collective from another thread.
    communicating = communicating or files[-1].endswith("autograd/graph.py")
    return f"{last.name} ({Path(last.filename).name}:{last.lineno})", communicating
