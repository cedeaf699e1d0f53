"""The file that a check's processes append their findings to: a line of JSON for each, complete as soon as it is made.

Every line has "part". The first line of a command is {"part": "command", ...}, what it runs on. Of a part's items:

    {"part", "items": [ITEM, ...]}         what is to be done
    {"part", "started": ITEM, "worker"}    an item is under way in a worker
    {"part", "item": ITEM, "result": {}}   what was found
    {"part", "crashed": ITEM, "reason"}    its process ended, or was ended, in it
    {"part", "worked", "worker"}           a worker has done what it could, in so many seconds

of a part without items {"part", "ended": why its process failed}, of the tests {"part", "collected"} and
{"part", "test", "outcome", "seconds", "reason"?}, and at the end of a part
{"part", "state", "seconds", "commit", "error"?}.
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
        """Appends a line, whole: processes that append at the same time don't mix theirs."""
        text = json.dumps({"part": part, **values}) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if self._unended():  # a process was killed in the middle of its line
                text = "\n" + text
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def _unended(self) -> bool:
        with open(self.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return False
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def lines(self, part: str | None = None, since: int = 0, until: int | None = None) -> list[Line]:
        """Those of a part, or all, from the byte `since` on; a line that was cut off is left out."""
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
    """The reason of each item whose process ended in it, unless it has a result since."""
    found: dict[str, str] = {}
    for line in lines:
        if "crashed" in line:
            found[line["crashed"]] = line["reason"]
        elif "result" in line:
            found.pop(line["item"], None)
    return found


def unreached(lines: Iterable[Line]) -> list[str]:
    """The items that were to be done and have neither a result nor crashed."""
    lines = list(lines)
    items = dict.fromkeys(item for line in lines for item in line.get("items", ()))
    done = {*results(lines), *crashed(lines)}
    return [item for item in items if item not in done]


def under_way(lines: Iterable[Line]) -> tuple[str, str] | None:
    """(part, item) of the item or test that was started last, if it has no result."""
    current: tuple[str, str] | None = None
    for line in lines:
        if "started" in line:
            current = (line["part"], line["started"])
        elif current == (line["part"], line.get("item", line.get("test"))):
            current = None
    return current
