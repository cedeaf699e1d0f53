"""The native library, which holds the operators' schemas and kernels; and whether Triton is there."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels import _torch_private

PATH = Path(__file__).with_name("_C.so")
NAMESPACE = "alexnet_kernels"
TRITON_NAMESPACE = "alexnet_kernels_triton"


def _hidden() -> Path | None:
    """The folder of an installed package with a library, which the one being imported hides."""
    folders = (Path(entry, PATH.parent.name) for entry in sys.path)
    return next((folder for folder in folders if (folder / PATH.name).exists()), None)


def _load() -> str | None:
    """Loads the library; the reason if that fails."""
    if not PATH.exists():
        if hidden := _hidden():
            return (
                f"{PATH} does not exist, and this source tree hides the package installed in {hidden}: start in "
                "another folder, or build it here with `python setup.py build_ext --inplace`"
            )
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


ARCHS = tuple(arch for arch in _build_info().get("archs", "").split(";") if arch)
"""The GPU architectures that the CUDA kernels were compiled for, as in "9.0a" and "10.0+PTX"."""

SOURCES = _build_info().get("sources", "")
"""A digest of what the library was built from."""

WGMMA = any(arch.startswith("9.0a") for arch in ARCHS)
"""Whether the CUDA kernels include the convolution of Hopper's wgmma (csrc/cuda/*_sm90a.cu)."""

_TEGRA = ((7, 2), (8, 7))
"""They run no machine code of other architectures."""
UNSERVED: dict[int, str] = {}
"""What `unserved_gpus` returns, once `find_unserved` has been called."""
_searched = False


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for an architecture run on a GPU of a compute capability."""
    number, ptx, _ = arch.partition("+PTX")
    major, minor = map(int, number.rstrip("af").split("."))
    if (major, minor) == capability:
        return True
    if number.endswith("a"):
        return False
    if capability[0] == major and capability[1] > minor and capability not in _TEGRA:
        return True
    return bool(ptx) and not number.endswith("f") and (major, minor) < capability


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile the kernels for, to run on GPUs of a compute capability: "9.0a", or "8.0"."""
    return ".".join(map(str, capability)) + "a" * (capability == (9, 0))


def _find_unserved() -> dict[int, str]:
    if not ARCHS or not torch.cuda.is_available():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not any(runs_on(arch, capability) for arch in ARCHS):
            arch = ".".join(map(str, capability))
            remedy = "they need 8.0 or later"
            if capability >= (8, 0):
                remedy = f"build it with ALEXNET_KERNELS_ARCHS={arch_of(capability)}"
            found[index] = (
                f"the native library has no kernels for architecture {arch} of {torch.cuda.get_device_name(index)}, "
                f"only for {', '.join(ARCHS)}: {remedy}"
            )
    return found


def find_unserved() -> None:
    """Fills UNSERVED at its first call, and warns. torch.compile doesn't trace it."""
    global _searched
    if not _searched:
        UNSERVED.update(_find_unserved())
        _searched = True
        for reason in dict.fromkeys(UNSERVED.values()):
            instead = "Triton" if TRITON_INSTALLED else "PyTorch's operators"
            warnings.warn(f"{reason}. There the ops run on {instead}", RuntimeWarning, stacklevel=2)


_torch_private.constant_when_compiled(find_unserved)


def unserved_gpus() -> dict[int, str]:
    """The GPUs, by index, for whose architecture the library has no CUDA kernels, and why."""
    find_unserved()
    return UNSERVED


def slow_path(device: torch.device) -> str | None:
    """Why the library's kernels don't run on a device, though they could; None if they do, or it was built without."""
    return REASON if device.type != "cuda" or not LOADED else unserved_gpus().get(device.index or 0)


def status() -> dict[str, Any]:
    """The library's path, whether it is loaded or why not, the instruction set in use, whether it has CUDA kernels.

    "archs" are the GPU architectures that those were compiled for, "wgmma" is whether Hopper's convolution is among
    them, "sources" is a digest of what they were built from.
    """
    return {
        "path": str(PATH),
        "loaded": LOADED,
        "reason": REASON,
        "isa": torch.ops.alexnet_kernels.isa() if LOADED else None,
        "cuda_built": any(key == "CUDA" for _, key in KERNELS),
        "archs": list(ARCHS),
        "wgmma": WGMMA,
        "sources": SOURCES,
    }
