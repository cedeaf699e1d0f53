"""The devices and backends that tests run on. Import this before the package: TRITON_INTERPRET must be set before
kernels are defined.
"""

from __future__ import annotations

import os
import shutil

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from alexnet_kernels import _library

try:
    import emulation  # of CUDA; needs a compiler and pybind11
except ImportError:
    emulation = None

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BACKENDS: dict[str, list[str]] = {"cpu": ["cpu", "native"], "cuda": ["cuda", "triton", "native"]}
INTERPRETED = _library.INTERPRETED and _library.TRITON_INSTALLED
if INTERPRETED:
    BACKENDS["cpu"].insert(1, "triton")
if emulation is not None and not torch.cuda.is_available() and shutil.which(emulation.COMPILER):
    BACKENDS["cpu"].insert(1, "cuda")  # emulated
