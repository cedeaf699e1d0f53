"""The methods and functions that torch's layers call, and whether a program has replaced them.

An op computes what a layer of torch computes. Where a method or a function that the layer calls is no longer torch's,
the layer itself has to run.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from alexnet_kernels._torch_private import constant_when_compiled, dispatch_modes, function_modes

__all__ = ["METHODS", "foreign_mode", "function_of_torch", "is_torchs", "remember", "replaced"]

METHODS = ("forward", "_conv_forward", "_check_input_dim", "__call__", "_wrapped_call_impl", "_call_impl")
"""That a call of a layer runs, where it has them."""


class _Originals(NamedTuple):
    """What `current` returned when this package was imported, and a name for each."""

    current: Callable[[], tuple]
    values: tuple
    names: tuple[str, ...]


def _functions(names: str, current: Callable[[], tuple]) -> _Originals:
    paths = tuple(names.split())
    return _Originals(current, tuple(map(function_of_torch, paths)), paths)


def function_of_torch(path: str) -> Callable[..., Any] | None:
    """The function of a path such as "torch.relu"; None if a program has put another there."""
    found = attrgetter(path.removeprefix("torch."))(torch)
    return found if is_torchs(found) and path.rpartition(".")[2] == found.__name__ else None


def is_torchs(function: Any) -> bool:
    """Whether a function, or the type of a mode, is defined in torch or in this package."""
    if isinstance(function, type):
        module = function.__module__
    else:
        # Functions that replace others often copy their __module__. Builtin functions have no globals.
        module = getattr(function, "__globals__", {}).get("__name__", "torch" if _is_builtin(function) else "")
    return module.partition(".")[0] in ("torch", "alexnet_kernels")


def _is_builtin(function: Any) -> bool:
    return type(function) is type(len)


_FUNCTIONS = {
    "C": _functions("torch.nn.functional.conv2d", lambda: (F.conv2d,)),
    "R": _functions("torch.nn.functional.relu torch.relu torch.relu_", lambda: (F.relu, torch.relu, torch.relu_)),
    "N": _functions("torch.nn.functional.local_response_norm", lambda: (F.local_response_norm,)),
    "P": _functions("torch.nn.functional.max_pool2d torch.max_pool2d", lambda: (F.max_pool2d, torch.max_pool2d)),
    "B": _functions("torch.nn.functional.batch_norm torch.batch_norm", lambda: (F.batch_norm, torch.batch_norm)),
    "L": _functions("torch.nn.functional.linear", lambda: (F.linear,)),
    "D": _functions("torch.nn.functional.dropout", lambda: (F.dropout,)),
    "A": _functions("torch.nn.functional.adaptive_avg_pool2d", lambda: (F.adaptive_avg_pool2d,)),
}
"""By kind of layers, see `nn/layers.py`; A is AdaptiveAvgPool2d, which is part of no run."""
_CLASSES: dict[type, _Originals] = {}


def remember(layer: type[nn.Module]) -> None:
    """Takes the present methods of a class of layers for its own."""
    names = tuple(name for name in METHODS if hasattr(layer, name))
    current = attrgetter(*names)  # returns a tuple: every layer has several
    values = tuple(value if is_torchs(value) else None for value in current(layer))
    _CLASSES[layer] = _Originals(lambda: current(layer), values, names)


def replaced(layer: type[nn.Module], kind: str, compiling: bool) -> str:
    """What a program has replaced of a class of layers and of the functions that a kind of them calls; "" if nothing.

    What torch.fx puts in their place while it traces calls them. A graph of torch.compile keeps what held when it was
    traced.
    """
    if compiling:
        return _replaced_when_traced(layer, kind)
    methods, functions = _CLASSES[layer], _FUNCTIONS.get(kind)
    if methods.current() == methods.values and (functions is None or functions.current() == functions.values):
        return ""
    return _replaced(layer, kind)


def _replaced(layer: type[nn.Module], kind: str) -> str:
    methods, functions = _CLASSES[layer], _FUNCTIONS.get(kind)
    if name := _first_replaced(methods):
        owner = next(base for base in layer.__mro__ if name in vars(base))
        return f"{owner.__name__}.{name} was replaced"
    if functions is not None and (name := _first_replaced(functions)):
        return f"{name} was replaced"
    return ""


@constant_when_compiled
def _replaced_when_traced(layer: type[nn.Module], kind: str) -> str:
    return _replaced(layer, kind)


def _first_replaced(originals: _Originals) -> str:
    now = zip(originals.current(), originals.values, originals.names, strict=True)
    return next((name for value, original, name in now if value is not original and not _is_tracers(value)), "")


def _is_tracers(function: Any) -> bool:
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("torch.fx.")


def foreign_mode() -> str:
    """An active mode that torch does not define and that has not asked for the ops; "" if there is none."""
    for mode in (*function_modes(), *dispatch_modes()):
        if not is_torchs(type(mode)) and not getattr(mode, "sees_fused_ops", False):
            return type(mode).__name__
    return ""


remember(nn.Sequential)
remember(nn.AdaptiveAvgPool2d)
