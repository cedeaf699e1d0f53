"""The parts of the check in the order in which they run, and each one's share of the time."""

from __future__ import annotations

import time
from collections.abc import Sequence

# Part: its share. What a part leaves goes to those after it, in proportion.
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
# Parts that one worker process runs one after the other. The rest runs in processes of other programs.
IN_WORKER = ("environment", "ceilings", "smoke", "networks", "convolutions", "ops", "compiled")


def share(part: str, remaining: Sequence[str]) -> float:
    """The part's share of the time that is left to it and `remaining`, which come after it."""
    return SHARES[part] / sum(SHARES[name] for name in (part, *remaining))


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()
