"""Which implementation an op runs.

    "auto"    the package's kernel for the tensors' device where there is one, else "triton" for the ops that PyTorch
              computes in several passes over memory (all but conv2d_relu), else "native"; so too on a GPU of an
              architecture for which the native library was not built, which a warning tells once. Where both "cuda"
              and "triton" have a kernel, and for a convolution's implementations, the tables of choices decide by kind
              of call: the user's, which `alexnet-kernels tune` writes, then the package's (docs/tuning.md)
    "cpu"     the C++ kernels for the CPU
    "cuda"    the CUDA C++ kernels, float32, bfloat16 and float16
    "triton"  the Triton kernels, float32, bfloat16 and float16, on a GPU (or, with TRITON_INTERPRET=1 in the
              environment before the package is imported, slowly on the CPU)
    "native"  PyTorch's own operators (oneDNN, cuDNN)

In order of precedence: an op's `backend=`; the innermost `use_backend` block of the thread or async task;
`set_backend`; the environment variable ALEXNET_KERNELS_BACKEND; "auto". A backend that can't run is an error. Inside
torch.func's transforms (vmap, grad, jvp) and forward-mode differentiation every op is "native". While torch.export,
torch.onnx.export or torch.jit.trace records a model, "auto" runs the package's modules as PyTorch's own operators; so
it does its ops under the latter two (docs/export.md).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import _library
from alexnet_kernels._dispatch import choices
from alexnet_kernels._dispatch.choices import is_tuned, set_tuned
from alexnet_kernels._dispatch.contracts import CONTRACTS, public_ops
from alexnet_kernels._dispatch.eager import operators
from alexnet_kernels._torch_private import (
    constant_when_compiled,
    holds_torch_only,
    in_autograd_thread,
    is_leaving,
    is_transformed,
)

__all__ = [
    "BACKENDS",
    "GPUS",
    "Backend",
    "get_backend",
    "is_tuned",
    "kernels_of",
    "leaves_as_torch",
    "load_with",
    "register",
    "registered",
    "report",
    "requested",
    "select",
    "serves",
    "set_backend",
    "set_tuned",
    "substituted",
    "unavailable",
    "use_backend",
]

BACKENDS = ("auto", "cpu", "cuda", "triton", "native")
GPUS = ("cuda", "xpu")
_INTERPRETER = "TRITON_INTERPRET=1 in the environment runs its kernels on the CPU, slowly"


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops.

    namespace: of its operators.
    devices: the device types whose tensors it takes.
    float64: whether it takes float64.
    missing: why this installation has no kernel of an op for it, whatever the device; None if it has one.
    automatic: whether "auto" may choose it for an op; None for every op.
    refuses: why it can't run on a device of one of its types; None if it can, or for one that runs on all.
    load: registers its operators, at their first use; torch.compile doesn't trace it.
    """

    name: str
    namespace: str
    devices: tuple[str, ...]
    float64: bool
    missing: Callable[[str], str | None]
    automatic: Callable[[str], bool] | None = None
    refuses: Callable[[torch.device], str | None] | None = None
    load: Callable[[], Any] | None = None


def _library_missing(key: str) -> Callable[[str], str | None]:
    def missing(op: str) -> str | None:
        if (op, key) in _library.KERNELS:
            return None
        if not _library.LOADED:
            return str(_library.REASON)
        return "the native library holds no CUDA kernels" if key == "CUDA" else "there is no such kernel"

    return missing


def _triton_missing(op: str) -> str | None:
    if not _library.LOADED:
        return str(_library.REASON)
    return None if _library.TRITON_INSTALLED else "triton is not installed"


def _triton_automatic(op: str) -> bool:
    return CONTRACTS[op].auto_triton and not _library.INTERPRETED


def _unserved(device: torch.device) -> str | None:
    _library.find_unserved()
    return _library.UNSERVED.get(device.index)


_REGISTERED: dict[str, Backend] = {
    "cpu": Backend("cpu", _library.NAMESPACE, ("cpu",), True, _library_missing("CPU")),
    "cuda": Backend("cuda", _library.NAMESPACE, ("cuda",), False, _library_missing("CUDA"), refuses=_unserved),
    "triton": Backend(
        "triton",
        _library.TRITON_NAMESPACE,
        (*GPUS, "cpu") if _library.INTERPRETED else GPUS,
        False,
        _triton_missing,
        _triton_automatic,
    ),
}
"""In the order in which "auto" tries them."""


def registered(name: str) -> Backend:
    """The backend "cpu", "cuda" or "triton"."""
    return _REGISTERED[name]


def register(backend: Backend) -> None:
    """Makes this the backend of its name."""
    _REGISTERED[backend.name] = backend
    for cache in choices.CACHES:
        cache.clear()


_AUTOMATIC: dict[tuple[str, torch.device, torch.dtype], str] = {}
"""What "auto" chose, by op, device and dtype, "" where it depends on the shape: choosing costs a few percent of a small
call."""
choices.CACHES.append(_AUTOMATIC)


@contextmanager
def substituted(backend: Backend) -> Iterator[None]:
    """Makes this the backend of its name inside the `with` block, in all threads."""
    before = registered(backend.name)
    register(backend)
    try:
        yield
    finally:
        register(before)


def load_with(name: str, load: Callable[[], Any]) -> None:
    """Has a backend's operators registered by `load` when they are first used."""
    register(replace(_REGISTERED[name], load=constant_when_compiled(load)))


def _check(name: str, source: str = "backend") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}: one of {', '.join(map(repr, BACKENDS))} expected")
    return name


_default = _check(os.environ.get("ALEXNET_KERNELS_BACKEND", "auto"), "ALEXNET_KERNELS_BACKEND")
_chosen: ContextVar[str | None] = ContextVar("alexnet_kernels_backend", default=None)
"""By the innermost `use_backend` block."""

# torch.compile guards on the value of a ContextVar from torch 2.14 on; before, it can't trace one. There, functions
# that it compiled follow the block that was entered last, in whatever thread.
_TRACES_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_traced: str | None = None
"""What functions compiled by torch.compile read: the backend of a block inside them, or, where they can't read
`_chosen`, of the last block that is open."""
_entered: list[tuple[int, str]] = []
"""(thread, backend) of every open block, in the order in which they were entered."""
_lock = threading.Lock()


def get_backend() -> str:
    """The backend of ops called here without `backend=`."""
    if torch.compiler.is_compiling():
        return _backend_in_graphs()
    return _chosen.get() or (_backend_outside_blocks() if _entered else _default)


def _backend_in_graphs() -> str:
    return _traced or (_chosen.get() if _TRACES_CONTEXT else None) or _default


def _backend_outside_blocks() -> str:
    """Of a thread that is in no block, while others are.

    On a GPU, backward passes recompute checkpointed activations in autograd's own threads, which follow the block that
    was entered last.
    """
    entered = _entered[-1:]
    return entered[0][1] if entered and in_autograd_thread() else _default


def set_backend(name: str) -> None:
    """Makes `name` the backend of every op from now on, in all threads, outside of `use_backend` blocks."""
    global _default
    _default = _check(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes `name` the backend of every op that this thread, or async task, calls inside the `with` block.

    Other threads are not affected, nor are threads that the block starts, such as those of nn.DataParallel. A backward
    pass runs on the backend of its forward pass. Autograd's own threads, which recompute checkpointed activations on a
    GPU, follow the block that was entered last; before torch 2.14, so do functions compiled by torch.compile, and a
    warning says so where threads differ.
    """
    global _traced
    _check(name)
    if torch.compiler.is_compiling():
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return
    token, entry = _chosen.set(name), (threading.get_ident(), name)
    _open_block(entry)
    try:
        yield
    finally:
        _close_block(entry)
        # A generator may be closed in another context than it ran in.
        with suppress(ValueError):
            _chosen.reset(token)


def _open_block(entry: tuple[int, str]) -> None:
    with _lock:
        if not _TRACES_CONTEXT and any(thread != entry[0] and name != entry[1] for thread, name in _entered):
            warnings.warn(
                f"threads are in use_backend blocks of different backends: with torch {torch.__version__}, functions "
                "compiled by torch.compile follow the block that was entered last; torch 2.14 keeps threads apart",
                stacklevel=4,
            )
        _entered.append(entry)
        _mirror()


def _close_block(entry: tuple[int, str]) -> None:
    with _lock:
        # The last one that is equal.
        del _entered[len(_entered) - 1 - _entered[::-1].index(entry)]
        _mirror()


def _mirror() -> None:
    """Lets compiled functions that can't read `_chosen` follow the last block."""
    global _traced
    if not _TRACES_CONTEXT:
        _traced = _entered[-1][1] if _entered else None


def unavailable(op: str, backend: str) -> str | None:
    """Why the op has no such backend here; None if it has."""
    if backend in ("auto", "native"):
        return None
    found = _REGISTERED[backend]
    if reason := found.missing(op):
        return reason
    if backend == "cuda" and torch.cuda.is_available():
        unserved = _library.unserved_gpus()
        return next(iter(unserved.values())) if len(unserved) == torch.cuda.device_count() else None
    if "cpu" in found.devices or torch.cuda.is_available() or ("xpu" in found.devices and torch.xpu.is_available()):
        return None
    return f"it needs a GPU ({_INTERPRETER})" if backend == "triton" else "it needs a CUDA device"


def requested(backend: str | None) -> str:
    """What an op is asked to run, by its `backend=` or else the settings: "auto" or a backend's name."""
    return get_backend() if backend is None else _check(backend)


def leaves_as_torch() -> bool:
    """Whether modules run as PyTorch's own operators: their program is recorded to leave this process, and nobody asked
    for a backend."""
    return is_leaving() and get_backend() == "auto"


def select(op: str, tensor: Tensor, backend: str | None) -> str:
    """The backend that `op` runs on `tensor`: "cpu", "cuda", "triton" or "native"."""
    compiling = torch.compiler.is_compiling()
    name = requested(backend)
    if name == "native" or is_transformed():
        return "native"
    if name == "auto":
        if holds_torch_only():
            return "native"
        key = (op, tensor.device, tensor.dtype)
        known = None if compiling else _AUTOMATIC.get(key)
        if known is not None:
            return known or _by_shape(op, tensor)
        chosen = _automatic(*key)
    else:
        chosen = _checked(op, tensor, _REGISTERED[name])
    if chosen is not None and chosen.load is not None:
        chosen.load()
    found = "native" if chosen is None else chosen.name
    if name != "auto":
        return found
    varies = found == "cuda" and op != choices.CONVOLUTION and choices.has_rows(op, tensor.device)
    if not compiling:
        _AUTOMATIC[key] = "" if varies else found
    return _by_shape(op, tensor) if varies else found


def _by_shape(op: str, tensor: Tensor) -> str:
    """What "auto" runs where "cuda" has a kernel and a table has rows of the op."""
    found = choices.choose(op, tensor, tensor.dtype)
    return found if found == "cuda" or serves(found, op, tensor) else "cuda"


def serves(name: str, op: str, tensor: Tensor) -> bool:
    """Whether "auto" may take this backend for a call, in place of the one that it takes first. Loads it if so."""
    backend = _REGISTERED[name]
    if (
        tensor.device.type not in backend.devices
        or (tensor.dtype == torch.float64 and not backend.float64)
        or backend.missing(op) is not None
        or (name == "triton" and _library.INTERPRETED)
    ):
        return False
    if backend.load is not None:
        backend.load()
    return True


def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> Backend | None:
    wide = dtype == torch.float64
    for backend in _REGISTERED.values():
        if device.type in backend.devices and (backend.float64 or not wide):
            automatic, refuses = backend.automatic, backend.refuses
            if (
                (automatic is None or automatic(op))
                and backend.missing(op) is None
                and (refuses is None or refuses(device) is None)
            ):
                return backend
    return None


def _checked(op: str, tensor: Tensor, backend: Backend) -> Backend:
    """The backend; an error if it can't run the op on the tensor."""
    if reason := backend.missing(op):
        raise RuntimeError(f"{op}: backend {backend.name!r} is not available: {reason}")
    if tensor.device.type not in backend.devices:
        where, hint = ("a GPU", f" ({_INTERPRETER})") if backend.name == "triton" else (backend.name, "")
        raise ValueError(
            f"{op}: backend {backend.name!r} needs tensors on {where}, but the input is on {tensor.device}{hint}"
        )
    if not backend.float64 and tensor.dtype == torch.float64:
        raise TypeError(f"{op}: backend {backend.name!r} takes float32, bfloat16 and float16, not {tensor.dtype}")
    if backend.refuses is not None and (reason := backend.refuses(tensor.device)):
        raise RuntimeError(f"{op}: backend {backend.name!r} can't run on {tensor.device}: {reason}")
    return backend


def kernels_of(name: str) -> Any:
    """The operators of a backend that `select` chose, as attributes."""
    return operators(_REGISTERED[name].namespace)


def report() -> list[dict[str, Any]]:
    """For every op, its backends, each "available" or the reason why not."""
    names = [name for name in BACKENDS if name != "auto"]
    return [
        {"op": op, "backends": {name: unavailable(op, name) or "available" for name in names}} for op in public_ops()
    ]
