"""Which implementation an op runs.

    "auto"    the package's kernel for the tensors' device where there is one, else "triton" for the ops
              of `AUTO_TRITON`, else "native"
    "cpu"     the C++ kernels for the CPU
    "cuda"    the CUDA C++ kernels, float32, bfloat16 and float16
    "triton"  the Triton kernels, float32, bfloat16 and float16, on a GPU (or, with TRITON_INTERPRET=1 in the
              environment before the package is imported, slowly on the CPU)
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

# The ops for which "auto" takes Triton on a GPU that has no kernel of the native library: those that PyTorch runs in
# several passes over memory. Convolutions stay with cuDNN.
AUTO_TRITON = frozenset(_library.OPS) - {"conv2d_relu"}


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
    """Why the op has no such backend here; None if it has."""
    if reason := _missing(op, backend):
        return reason
    devices = DEVICES.get(backend, ())
    if backend == "triton" and "cpu" not in devices and not (torch.cuda.is_available() or torch.xpu.is_available()):
        return f"it needs a GPU ({INTERPRETER})"
    if backend == "cuda" and "cpu" not in devices and not torch.cuda.is_available():
        return "it needs a CUDA device"
    return None


def _missing(op: str, backend: str) -> str | None:
    """Why the installation has no such kernels, whatever the device."""
    if backend in ("auto", "native"):
        return None
    if not _library.LOADED:
        return str(_library.REASON)
    if backend == "triton":
        return None if _library.TRITON_INSTALLED else "triton is not installed"
    if (op, backend.upper()) not in _library.KERNELS:
        return "the native library holds no CUDA kernels" if backend == "cuda" else "there is no such kernel"
    return None


INTERPRETER = "TRITON_INTERPRET=1 in the environment runs its kernels on the CPU, slowly"


def select(op: str, tensor: Tensor, backend: str | None) -> str:
    """The backend that `op` runs on `tensor`: "cpu", "cuda", "triton" or "native"."""
    name = _current if backend is None else _check(backend)
    if name == "native" or is_transformed():
        return "native"
    device = tensor.device.type
    if name == "auto":
        if (op, device.upper()) in _library.KERNELS and not (device == "cuda" and tensor.dtype == torch.float64):
            return device
        name = "triton" if op in AUTO_TRITON and _triton_takes(op, tensor) else "native"
    elif reason := _missing(op, name):
        raise RuntimeError(f"{op}: backend {name!r} is not available: {reason}")
    elif device not in DEVICES[name]:
        where, hint = ("a GPU", f" ({INTERPRETER})") if name == "triton" else (name, "")
        raise ValueError(f"{op}: backend {name!r} needs tensors on {where}, but the input is on {tensor.device}{hint}")
    elif name != "cpu" and tensor.dtype == torch.float64:
        raise TypeError(f"{op}: backend {name!r} takes float32, bfloat16 and float16, not {tensor.dtype}")
    if name == "triton":
        _load_triton()
    return name


GPUS = ("cuda", "xpu")
# The devices whose tensors a backend takes.
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": (*GPUS, "cpu") if _library.INTERPRETED else GPUS}


def _triton_takes(op: str, tensor: Tensor) -> bool:
    return (
        _missing(op, "triton") is None
        and tensor.device.type in GPUS
        and tensor.dtype != torch.float64
        and not _library.INTERPRETED
    )


def _load_triton() -> bool:
    """Registers the Triton kernels, when they are first wanted; torch.compile does not trace it."""
    import alexnet_kernels.triton  # noqa: F401

    return True


# What torch.compiler.assume_constant_result does, without importing torch._dynamo: a second of importing the package.
_load_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
