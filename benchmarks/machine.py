"""What a report says about where it was made."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def cpu_facts() -> dict[str, str]:
    """The last processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu() -> str:
    return cpu_facts().get("model name", platform.processor())


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()
