"""The parts of the check in the order in which they run, and each one's share of the time."""

from __future__ import annotations

import time
from collections.abc import Sequence

# Part: its share. What a part leaves goes to those after it.
SHARES = {
    "build": 0.15,
    "environment": 0.01,
    "ceilings": 0.02,
    "smoke": 0.05,
    "networks": 0.17,
    "convolutions": 0.04,
    "ops": 0.08,
    "tests": 0.24,
    "counters": 0.05,
    "compiled": 0.12,
    "sanitizer": 0.07,
}
PARTS = tuple(SHARES)
PATIENCE = 60.0  # seconds for an item that compiles nothing
# Parts that one worker process runs one after the other; "smoke" alone, in several. The others are programs.
IN_WORKER = ("environment", "ceilings", "smoke", "networks", "convolutions", "ops", "compiled")


def stages(parts: Sequence[str]) -> list[list[str]]:
    """The parts, those together that share a worker's start."""
    found: list[list[str]] = []
    for part in parts:
        together = found and all(name in IN_WORKER and name != "smoke" for name in (part, *found[-1]))
        if together:
            found[-1].append(part)
        else:
            found.append([part])
    return found


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()
