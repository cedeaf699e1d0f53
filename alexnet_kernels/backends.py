"""Which implementation an op runs.

    "auto"    the package's kernel for the tensors' device where there is one, else "native"
    "cpu"     the C++ kernels for the CPU
    "cuda"    the CUDA C++ kernels
    "triton"  the Triton kernels
    "native"  PyTorch's own operators (oneDNN, cuDNN)

In order of precedence: an op's `backend=`, `use_backend` or `set_backend`, the environment variable
ALEXNET_KERNELS_BACKEND, "auto". Asking for a backend that can't run is an error. Inside torch.func's transforms (vmap,
grad, jvp) and forward-mode differentiation every op is "native".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from alexnet_kernels import _library

BACKENDS = ("auto", "cpu", "cuda", "triton", "native")


def _check(name: str, source: str = "backend") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}: one of {', '.join(map(repr, BACKENDS))} expected")
    return name


_current = _check(os.environ.get("ALEXNET_KERNELS_BACKEND", "auto"), "ALEXNET_KERNELS_BACKEND")


def get_backend() -> str:
    """The backend ops run without a `backend=` of their own."""
    return _current


def set_backend(name: str) -> None:
    """Makes `name` the backend of every op from now on, in all threads."""
    global _current
    _current = _check(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes `name` the backend of every op inside the `with` block, in all threads."""
    before = get_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def unavailable(op: str, backend: str) -> str | None:
    """Why the op has no such backend in this installation; None if it has."""
    if backend in ("auto", "native"):
        return None
    if backend == "triton":
        return "there are no Triton kernels in this version"
    if not _library.LOADED:
        return str(_library.REASON)
    if (op, backend.upper()) not in _library.KERNELS:
        return "the native library holds no CUDA kernels" if backend == "cuda" else "there is no such kernel"
    return None


def select(op: str, tensor: Tensor, backend: str | None) -> str:
    """The backend that `op` runs on `tensor`: "cpu", "cuda", "triton" or "native"."""
    name = _current if backend is None else _check(backend)
    if name == "native" or is_transformed():
        return "native"
    device = tensor.device.type
    if name == "auto":
        return device if (op, device.upper()) in _library.KERNELS else "native"
    if reason := unavailable(op, name):
        raise RuntimeError(f"{op}: backend {name!r} is not available: {reason}")
    if name != device and name in ("cpu", "cuda"):
        raise ValueError(f"{op}: backend {name!r} needs tensors on {name}, but the input is on {tensor.device}")
    return name


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which only PyTorch's own operators know."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def report() -> list[dict[str, Any]]:
    """For every op, its backends, each "available" or the reason why not."""
    names = [name for name in BACKENDS if name != "auto"]
    return [
        {"op": op, "backends": {name: unavailable(op, name) or "available" for name in names}} for op in _library.OPS
    ]
