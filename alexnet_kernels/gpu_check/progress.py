"""A pytest plugin that appends each test's outcome to the check's findings at once, and prints whole tracebacks.

    pytest -p alexnet_kernels.gpu_check.progress [-n PROCESSES --maxschedchunk 2]

A second run with the same findings selects only the tests without an outcome in this command, and those that failed in
an earlier one. The environment variable SINCE is the file size at which this command's findings begin. SEEN is the
size up to which findings are read, so that all processes of a run agree.

A test that leaves the device unusable, or takes longer than PATIENCE seconds, ends its process; xdist starts another.
Up to SAMPLE cases of each test function and backend run first, then the other cases; in both groups Triton's run last,
since their kernels have to be compiled.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_kernels.bench.timing import works
from alexnet_kernels.gpu_check.findings import Findings

VARIABLE = "ALEXNET_KERNELS_FINDINGS"
SINCE = "ALEXNET_KERNELS_FINDINGS_SINCE"
SEEN = "ALEXNET_KERNELS_FINDINGS_SEEN"
PATIENCE = "ALEXNET_KERNELS_TEST_PATIENCE"
LOST = 70
PART = "tests"
SAMPLE = 3
STDERR = os.dup(2)  # before pytest captures it


_failed: set[str] = set()
_in_xdist_worker = False  # a worker's reports reach the main process, which records them


def pytest_configure(config: Any) -> None:
    global _in_xdist_worker
    _in_xdist_worker = hasattr(config, "workerinput")


def _findings() -> Findings | None:
    path = os.environ.get(VARIABLE)
    return Findings(Path(path)) if path and not _in_xdist_worker else None


def _write(**values: Any) -> None:
    if findings := _findings():
        findings.add(PART, **values)


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        text = crash.message
    else:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.strip().partition("\n")[0][:300]


def _group(item: Any) -> tuple[bool, str]:
    """(whether it runs Triton, its test function, op and backend)."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    # A contract test has one parameter, a Case.
    case: Any = params.get("case")
    op, values = (case.info.name, [case.setting.backend]) if hasattr(case, "setting") else ("", [*params.values()])
    backend = next((name for name in ("cuda", "triton", "native") if name in values), "")
    return backend == "triton", f"{item.location[0]}::{getattr(item, 'originalname', item.name)} {op} {backend}"


def ordered(items: list[Any]) -> list[Any]:
    """A sample spread evenly over each group's cases, then the rest."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(_group(item)[1], []).append(item)
    first = set()
    for group in groups.values():
        step = max(1, len(group) // SAMPLE)
        first |= {id(item) for item in group[::step][:SAMPLE]}
    return sorted(items, key=lambda item: (id(item) not in first, _group(item)[0]))


def _done() -> set[str]:
    """The tests that are not run again."""
    if VARIABLE not in os.environ:
        return set()
    found = Findings(Path(os.environ[VARIABLE]))
    since, seen = (int(os.environ.get(name, "0")) for name in (SINCE, SEEN))
    earlier = {line["test"]: line["outcome"] for line in found.lines(PART, until=since) if "test" in line}
    now = {line["test"] for line in found.lines(PART, since, seen) if "test" in line}
    return now | {test for test, outcome in earlier.items() if outcome in ("passed", "skipped")}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if done := _done():
        earlier = [item for item in items if item.nodeid in done]
        if earlier:
            config.hook.pytest_deselected(items=earlier)
        items[:] = [item for item in items if item.nodeid not in done]
    items[:] = ordered(items)


def pytest_collection_finish(session: Any) -> None:
    if session.items:  # the main process of xdist collects none
        _write(collected=len(session.items) + len(_done()))


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> Any:
    """Schedules tests in order: the only scheduler of xdist that can replace a crashed process at any time."""
    from xdist.scheduler import LoadScheduling

    return LoadScheduling(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    _write(collected=len(ids) + len(_done()))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="error", reason=_reason(report))
        print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(started=nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any, nextitem: Any) -> Any:
    faulthandler.dump_traceback_later(float(os.environ.get(PATIENCE, "100")), exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: Any) -> None:
    session.config.option.tbstyle = "no"  # already printed


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    if report.when == "???" and report.nodeid in _failed:  # the end of its process, as xdist reports it
        return
    outcome = report.outcome if report.when in ("call", "???") or report.outcome == "skipped" else "error"
    line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3)}
    if outcome != "passed":
        line["reason"] = _reason(report)
    _write(**line)
    if outcome in ("failed", "error"):
        _failed.add(report.nodeid)
        if _findings():
            sections = "\n".join(text for name, text in report.sections if "log" not in name)
            print(f"\n{report.nodeid}\n{report.longreprtext}\n{sections}", file=sys.stderr, flush=True)
        if torch.cuda.is_initialized() and not works(torch.device("cuda")):
            os._exit(LOST)
