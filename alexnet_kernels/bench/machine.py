"""Facts about the machine and the software, for reports."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels import _library
from alexnet_kernels._version import __version__

PACKAGE = Path(__file__).parents[1]
MATRIX_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def cpu_facts() -> dict[str, str]:
    """The entry of the last processor in /proc/cpuinfo; empty on systems without that file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the package's source tree, or "unknown". ALEXNET_KERNELS_COMMIT overrides it."""
    if given := os.environ.get("ALEXNET_KERNELS_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        found = git("rev-parse", "--short", "HEAD")
        return "unknown" if not found else found + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return "unknown"


def output(*command: str, pattern: str) -> str:
    """The pattern's group in a command's output; "none" if the command can't run, "unknown" without a match."""
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    match = re.search(pattern, text)
    return match[1] if match else "unknown"


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit; None if it is not installed."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last-level cache. Unknown: 32 MiB for a CPU, 50 MiB (H100) for a GPU."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20))
    sizes = [32 * 2**20] if not (found := Path("/sys/devices/system/cpu/cpu0/cache")).exists() else [0]
    for path in found.glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 2**10)
    return max(sizes) or 32 * 2**20


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware and software that determine the device's speed."""
    found: dict[str, Any] = {
        "device": cpu(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in MATRIX_INSTRUCTIONS if name in cpu_facts().get("flags", "").split()],
        "kernels": torch.ops.alexnet_kernels.isa() if _library.LOADED else "none",
        "alexnet_kernels": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cache": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", pattern=r"([\d.]+)")
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "driver": driver,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": version("triton"),
        }
    return found
