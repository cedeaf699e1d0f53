"""A pytest plugin: a line of JSON for each finished test, in the file that ALEXNET_KERNELS_PROGRESS names.

What a run had found is known even if it never ends: `pytest -p alexnet_kernels.testing.progress`. Tests of Triton,
whose kernels compile first, come last.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "ALEXNET_KERNELS_PROGRESS"


def _write(line: dict[str, Any]) -> None:
    path = os.environ.get(VARIABLE)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return text.strip().partition("\n")[0][:300]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    def triton(item: Any) -> bool:
        return hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton"

    items.sort(key=triton)


def pytest_collection_finish(session: Any) -> None:
    _write({"collected": len(session.items)})


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "error", "reason": _reason(report)})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if report.when == "call" or report.outcome == "skipped" else "error"
        line = {"test": report.nodeid, "outcome": outcome, "seconds": report.duration}
        if outcome != "passed":
            line["reason"] = _reason(report)
        _write(line)
