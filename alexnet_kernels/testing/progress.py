"""A pytest plugin: a line of JSON for each test that starts or ends, in the file that ALEXNET_KERNELS_PROGRESS names.

    pytest -p alexnet_kernels.testing.progress

What a run had found is known even if it never ends, and a second run with the same file takes only the tests that the
first did not. A run ends with the status `LOST` after a test that leaves the device unusable. Tests of Triton, whose
kernels compile first, come last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels.testing.timing import works

VARIABLE = "ALEXNET_KERNELS_PROGRESS"
LOST = 70


def write(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def unfinished(lines: Iterable[dict[str, Any]]) -> str | None:
    """The test that was under way at the end."""
    under_way = None
    for line in lines:
        if "started" in line:
            under_way = line["started"]
        elif line.get("test") == under_way:
            under_way = None
    return under_way


def _write(line: dict[str, Any]) -> None:
    if path := os.environ.get(VARIABLE):
        write(Path(path), line)


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = crash.message
    else:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.strip().partition("\n")[0][:300]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    def triton(item: Any) -> bool:
        return hasattr(item, "callspec") and "triton" in item.callspec.params.values()

    path = Path(os.environ.get(VARIABLE, os.devnull))
    lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    done = {line["test"] for line in lines if "test" in line}
    earlier = [item for item in items if item.nodeid in done]
    if earlier:
        config.hook.pytest_deselected(items=earlier)
    items[:] = sorted((item for item in items if item.nodeid not in done), key=triton)


def pytest_collection_finish(session: Any) -> None:
    _write({"collected": len(session.items)})


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "error", "reason": _reason(report)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"started": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if report.when == "call" or report.outcome == "skipped" else "error"
        line = {"test": report.nodeid, "outcome": outcome, "seconds": report.duration}
        if outcome != "passed":
            line["reason"] = _reason(report)
        _write(line)
        if outcome in ("failed", "error") and torch.cuda.is_initialized() and not works(torch.device("cuda")):
            os._exit(LOST)
