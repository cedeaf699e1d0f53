"""The native library, which holds the operators' schemas and kernels; and whether Triton is there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels import _torch_private

PATH = Path(__file__).with_name("_C.so")
NAMESPACE = "alexnet_kernels"
TRITON_NAMESPACE = "alexnet_kernels_triton"


def _load() -> str | None:
    """Loads the library; the reason if that fails."""
    if not PATH.exists():
        return f"{PATH} does not exist: build it with `pip install .` in the source tree"
    try:
        torch.ops.load_library(str(PATH))
    except (OSError, RuntimeError) as error:
        return f"{PATH} could not be loaded by torch {torch.__version__}: {error}"
    return None


REASON = _load()
LOADED = REASON is None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
"""Whether Triton's interpreter runs its kernels, on the CPU. Triton reads the variable when a kernel is defined."""
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


KERNELS = frozenset(
    (operator, key)
    for operator in _torch_private.operators(NAMESPACE)
    for key in ("CPU", "CUDA")
    if LOADED and _torch_private.has_kernel(f"{NAMESPACE}::{operator}", key)
)
"""(operator, dispatch key) of every kernel. A plain set, which torch.compile reads as a constant."""


def _build_info() -> dict[str, str]:
    """What setup.py told the library of its build: "sources", a digest, and "archs", of its CUDA kernels."""
    text = torch.ops.alexnet_kernels.build_info() if LOADED else ""
    return dict(word.split("=", 1) for word in text.split())


def status() -> dict[str, Any]:
    """The library's path, whether it is loaded or why not, the instruction set in use, whether it has CUDA kernels.

    "archs" are the GPU architectures that those were compiled for, "sources" is a digest of what they were built from.
    """
    info = _build_info()
    return {
        "path": str(PATH),
        "loaded": LOADED,
        "reason": REASON,
        "isa": torch.ops.alexnet_kernels.isa() if LOADED else None,
        "cuda_built": any(key == "CUDA" for _, key in KERNELS),
        "archs": [arch for arch in info.get("archs", "").split(";") if arch],
        "sources": info.get("sources", ""),
    }
