"""The findings file: every process of a check appends one line of JSON for each finding.

Every line has "part". A command's first line is {"part": "command", ...} with the device. Lines of a part with items:

    {"part", "items": [ITEM, ...]}         the items to run
    {"part", "started": ITEM, "worker"}    a worker has started an item
    {"part", "item": ITEM, "result": {}}   an item's result
    {"part", "crashed": ITEM, "reason"}    the process ended, or was killed, during the item
    {"part", "worked", "worker"}           a worker has finished the part; "worked" is in seconds

Other lines:

    {"part", "ended": REASON}                                       a part's process failed outside its items
    {"part": "tests", "collected"}                                  the number of tests
    {"part": "tests", "test", "outcome", "seconds", "reason"?}      a test's outcome
    {"part", "state", "seconds", "commit", "error"?}                the end of a part
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
FILE = "findings.jsonl"


class Findings:
    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, part: str, **values: Any) -> None:
        """Appends one line in a single write, so that lines of concurrent processes do not mix."""
        text = json.dumps({"part": part, **values}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if self._truncated():  # a process was killed while writing
                text = "\n" + text
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def _truncated(self) -> bool:
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return False
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def lines(self, part: str | None = None, since: int = 0, until: int | None = None) -> list[Line]:
        """The lines of a part, or of all, from byte `since` to byte `until`; truncated lines are skipped."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(since)
            text = file.read() if until is None else file.read(max(0, until - since))
        return [line for line in _parsed(text.splitlines()) if part in (None, line["part"])]

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def _parsed(lines: Iterable[bytes]) -> Iterator[Line]:
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "part" in line:
            yield line


def results(lines: Iterable[Line]) -> dict[str, Any]:
    """The newest result of each item."""
    return {line["item"]: line["result"] for line in lines if "result" in line}


def crashed(lines: Iterable[Line]) -> dict[str, str]:
    """The reason of each crashed item that has no later result."""
    found: dict[str, str] = {}
    for line in lines:
        if "crashed" in line:
            found[line["crashed"]] = line["reason"]
        elif "result" in line:
            found.pop(line["item"], None)
    return found


def unreached(lines: Iterable[Line]) -> list[str]:
    """The items that have neither a result nor crashed."""
    lines = list(lines)
    items = dict.fromkeys(item for line in lines for item in line.get("items", ()))
    done = {*results(lines), *crashed(lines)}
    return [item for item in items if item not in done]


def under_way(lines: Iterable[Line]) -> tuple[str, str] | None:
    """(part, item) of the item or test started last; None if it has a result."""
    current: tuple[str, str] | None = None
    for line in lines:
        if "started" in line:
            current = (line["part"], line["started"])
        elif current == (line["part"], line.get("item", line.get("test"))):
            current = None
    return current
