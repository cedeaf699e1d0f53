"""Loads the native library that holds the operators' schemas and kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).with_name("_C.so")
NAMESPACE = "alexnet_kernels"


def _load() -> str | None:
    """Loads the library; the reason if it can't be."""
    if not PATH.exists():
        return f"{PATH} does not exist: build it with `pip install .` in the source tree"
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        return f"{PATH} could not be loaded by torch {torch.__version__}: {error}"
    return None


REASON = _load()
LOADED = REASON is None


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether the library holds a kernel of the op for a dispatch key such as "CPU" or "CUDA"."""
    if not LOADED:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", dispatch_key)


def status() -> dict[str, Any]:
    """The library's path, whether it's loaded or why not, the CPU instruction set in use, and whether it holds CUDA kernels."""
    return {
        "path": str(PATH),
        "loaded": LOADED,
        "reason": REASON,
        "isa": torch.ops.alexnet_kernels.isa() if LOADED else None,
        "cuda_built": has_kernel("local_response_norm", "CUDA"),
    }
