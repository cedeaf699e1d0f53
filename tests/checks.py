"""Shared by the tests of `alexnet_kernels.gpu_check`: commands, and processes that start without importing torch."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import alexnet_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = Path(alexnet_kernels.__file__).parent
FILES = ["findings.jsonl", "log.txt", "report.json", "report.md"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


def command_lines() -> list[list[str]]:
    """The command line of every process on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace").split("\0")[:-1])
    return found


def parts_of(out: Path) -> dict[str, Any]:
    """The parts of the report in a folder."""
    return json.loads((out / "report.json").read_text())["parts"]


def command(out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "alexnet_kernels.gpu_check", "--device", "cpu", "--out", str(out)]
    return [*words, "--library", str(PACKAGE / "_C.so"), "--tests", str(ROOT / "tests"), *options]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "alexnet_kernels.gpu_check.worker", __name__])
    return context


_CONTEXT = _fork_server()


def start_fork_server() -> None:
    """Makes the server import the package now, rather than in the first process's time."""
    process = _CONTEXT.Process(target=int)
    process.start()
    process.join()


class ForkedPython:
    """Stands in for subprocess.Popen([sys.executable, "-m", MODULE, ...]) or [sys.executable, SCRIPT, ...].

    The process is forked from one that has imported the package, which saves most of its start-up time. It has a
    session of its own, and its output goes to `stdout`.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], cwd: Path | None) -> None:
        assert command[0] == sys.executable
        reader, writer = multiprocessing.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run_python, args=([*command[1:]], env, cwd or Path.cwd(), writer))
        self._process.start()
        writer.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(reader.fileno()), errors="replace")
        reader.close()

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout)
        return self._process.exitcode


def _run_python(arguments: list[str], env: dict[str, str], cwd: Path, output: Connection) -> None:
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
