"""The file that a check's processes append their findings to: a line of JSON for each, complete as soon as it is made.

Every line has "part". Of a part's items:

    {"part", "started": ITEM, "overtime"}  an item is under way; whether it is the part's time that ends it
    {"part", "item": ITEM, "result": {}}   what was found
    {"part", "crashed": ITEM, "reason"}    its process ended, or was ended, in it
    {"part", "late": [ITEM, ...]}          not reached in the time

and of the part itself {"part", "state", "seconds", "commit", "error"?}.
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


def finished(lines: Iterable[Line]) -> set[str]:
    """The items that need not run again: those with a result, and those that crashed."""
    return {
        line[key] for line in lines for key, marker in (("item", "result"), ("crashed", "crashed")) if marker in line
    }


def under_way(lines: Iterable[Line]) -> tuple[str, str] | None:
    """(part, item) of the item that was started last, if it has no result."""
    current: tuple[str, str] | None = None
    for line in lines:
        if "started" in line:
            current = (line["part"], line["started"])
        elif "result" in line and current == (line["part"], line["item"]):
            current = None
    return current
