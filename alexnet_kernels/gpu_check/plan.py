"""The parts of the check in order, and each part's share of the time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

# Share of the time by part. What a part does not use goes to those after it.
SHARES = {
    "build": 0.15,
    "environment": 0.01,
    "ceilings": 0.02,
    "paths": 0.06,
    "smoke": 0.05,
    "networks": 0.17,
    "convolutions": 0.04,
    "ops": 0.08,
    "tests": 0.20,
    "counters": 0.05,
    "compiled": 0.10,
    "sanitizer": 0.07,
}
PARTS = tuple(SHARES)
PATIENCE = 60.0  # seconds that an item without compilation may take
RESTARTS = 12  # of a process that crashed, each without the item that it crashed in
# Parts that have several worker processes of their own, at most so many, which share their items.
WORKERS = {"paths": 2, "smoke": 8}
# Parts that one worker process runs one after the other, but for those of WORKERS. The others run programs.
IN_WORKER = ("environment", "ceilings", "paths", "smoke", "networks", "convolutions", "ops", "compiled")


def stages(parts: Sequence[str]) -> list[list[str]]:
    """Groups the parts that share one worker process."""
    found: list[list[str]] = []
    for part in parts:
        together = found and all(name in IN_WORKER and name not in WORKERS for name in (part, *found[-1]))
        if together:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Budget:
    """A deadline some seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self._end - time.monotonic()
