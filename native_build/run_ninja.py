"""Runs ninja, and says at the end of its output why a build failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from native_build import requirements

ERROR = re.compile(r"\b(error|fatal|killed|no space left|memory|not found|denied)\b|\bld: ", re.I)
MOST = 8
# What to do about an error, the first that matches; for a CUDA source or a C++ one.
ADVICE = (
    (r"\bkilled\b|out of memory|memory exhausted|cannot allocate", "memory ran out: MAX_JOBS=1 compiles file by file"),
    (r"no space left", "the disk is full: make room, or set TMPDIR to a folder on another disk"),
    (r"c\+\+20|unrecognized command.line option", "the C++ compiler is too old: install g++ 11 or later, or set CXX"),
    (r"unsupported GNU version", "nvcc does not know this g++: install one that it names"),
)
CUDA = "ALEXNET_KERNELS_CUDA=0 builds the kernels for the CPU only"
OTHERWISE = "the failed command and all of its output stand above"


@dataclass(frozen=True)
class Failure:
    """The first command that failed: what it was to write, and its output."""

    output: str
    lines: list[str]

    def errors(self) -> list[str]:
        """The first lines that tell an error; if there are none, the last ones."""
        lines = [line.strip() for line in self.lines if line.strip()]
        return [line for line in lines if ERROR.search(line)][:MOST] or lines[-MOST:] or ["it printed nothing"]

    def explain(self) -> str:
        """What failed, why and what to do."""
        errors = self.errors()
        advice = [text for pattern, text in ADVICE if re.search(pattern, "\n".join(self.lines), re.I)][:1]
        if self.output.endswith(".cu.o"):
            advice.append(CUDA)
        what = f"{self.output} failed" if self.output else "ninja failed"
        text = "".join(f"\n    {line}" for line in errors)
        return f"alexnet_kernels was not built: {what}{text}\nWhat to do: {'; '.join(advice or [OTHERWISE])}"


def run_ninja(build: Path, target: str | None = None, *, verbose: bool = False) -> Failure | None:
    """Builds a target, or the default one; None if that succeeds. Of a named target only a failure is shown."""
    command = [requirements.ninja(), "-C", str(build), *requirements.jobs(), *(["-v"] if verbose else [])]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    lines: list[str] = []
    with subprocess.Popen(
        [*command, *([target] if target else [])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if target is None:
                print(line, end="", file=sys.stderr, flush=True)
    if process.returncode == 0:
        return None
    failure = first_failure(lines)
    if target is not None:
        print(*failure.lines, sep="\n", file=sys.stderr, flush=True)
    return failure


def first_failure(lines: list[str]) -> Failure:
    """From ninja's output: after "FAILED: [code=1] OUTPUT" come the command and what it printed."""
    for at, line in enumerate(lines):
        if line.startswith("FAILED: "):
            output = re.sub(r"^FAILED: (\[code=\d+\] )?", "", line).strip()
            printed: list[str] = []
            for text in lines[at + 2 :]:
                if re.match(r"\[\d+/\d+\] |FAILED: |ninja: ", text):
                    break
                printed.append(text)
            return Failure(output, printed)
    return Failure("", [line for line in lines if line.startswith("ninja: error")] or lines)
