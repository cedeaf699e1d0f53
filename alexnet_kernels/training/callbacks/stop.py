"""Stopping a run early by a signal or a deadline."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alexnet_kernels.training.distributed.team import Team

__all__ = ["StopRequest", "Stopped"]

_ONE_SIGNAL = 3.0
"""Seconds within which two signals to one of several processes count as one."""
_REASONS = (None, "out of time", "interrupted")


class Stopped(Exception):
    """The run ended before its last epoch, as requested. Its state is saved."""


class StopRequest:
    """Whether the run should stop: after SIGINT or SIGTERM inside `signals`, or after max_seconds.

    A second signal raises KeyboardInterrupt at once. All processes of a team stop together.
    """

    def __init__(self, max_seconds: float | None = None, team: Team | None = None) -> None:
        self.team = team or Team()
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._requested: str | None = None
        self._requested_at = 0.0
        self._handling = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside the block. In other threads than the main thread it does nothing."""
        # Around the trainer, which restores the handlers it found after its last callback.
        before = {}
        self._handling = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            self._handling = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def replace_lightning_handler(self) -> None:
        """Undo Lightning's handler of SIGTERM, which would end the run without saving it. Called as training starts."""
        if threading.current_thread() is threading.main_thread() and self._handling:
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._requested is not None:
            # torchrun forwards the signal that the terminal has already sent to every process.
            if self.team.size > 1 and now - self._requested_at < _ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self._requested, self._requested_at = "interrupted", now

    def reason(self) -> str | None:
        """Why the run should stop, or None. A collective of all processes."""
        if self._requested is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._requested = "out of time"
        return _REASONS[self.team.max(_REASONS.index(self._requested))]
