"""Argument checks of the ops. An error names the op and the argument, and says what was given and what is allowed."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import _torch_private
from alexnet_kernels._errors import TensorTypeError, TensorValueError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)
INTEGERS = (int, torch.SymInt)
"""SymInt: torch.compile gives fakes the integers that it keeps variable as such."""
PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_STRIDED = frozenset((*PLAIN_TENSORS, *_torch_private.TRACED_TENSORS))
_PLAIN_VALUES = frozenset((int, bool, str, type(None)))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a torch.Tensor or Parameter with strides, or stands for one in a graph that is traced.

    Other types bring their own arithmetic. Strides are those of one tensor, not of a nested one.
    """
    return type(tensor) in _STRIDED and tensor.layout is torch.strided and not tensor.is_nested


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, not {type(value).__name__}")
    try:
        nested, layout = value.is_nested, value.layout
    except RuntimeError:  # a subclass that refuses every question, as ExpandedWeight does
        raise TypeError(f"{op}: {name} must be a plain tensor, not a {type(value).__name__}") from None
    if nested or layout is not torch.strided:
        given = "a nested tensor" if nested else f"of layout {layout}"
        raise TypeError(f"{op}: {name} must be a tensor with strides (torch.strided), not {given}")


def is_image(value: Any) -> bool:
    """Whether it is a tensor [C, H, W], rather than a batch or something that the checks refuse."""
    return isinstance(value, Tensor) and value.dim() == 3 and not value.is_nested


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TensorTypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}")


def check_images(op: str, input: Tensor) -> None:
    """A floating-point [N, C, H, W]."""
    check_tensor(op, "input", input)
    check_floating(op, "input", input)
    if input.dim() != 4:
        raise TensorValueError(f"{op}: input must be [N, C, H, W], not of shape {list(input.shape)}")


def check_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """A tensor on the input's device."""
    check_tensor(op, name, tensor)
    if tensor.device != input.device:
        raise RuntimeError(f"{op}: {name} is on {tensor.device}, but the input is on {input.device}")


def check_same_dtype(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """A tensor of the input's dtype, unless autocast is about to cast both."""
    if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TensorTypeError(f"{op}: {name} is {tensor.dtype}, but the input is {input.dtype}: they must agree")


def check_groups(op: str, groups: int, channels: int, name: str = "channels") -> None:
    if not isinstance(groups, INTEGERS) or groups < 1:
        raise ValueError(f"{op}: groups must be a positive int, not {groups!r}")
    if channels % groups:
        raise TensorValueError(f"{op}: groups={groups} does not divide the {channels} {name}")


def check_probability(op: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: p must be in [0, 1], not {p}")


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Two integers of at least `least`, from one or two."""
    if type(value) is int and value >= least:
        return [value, value]
    values = list(value) if isinstance(value, Sequence) else [value]
    values = [v if isinstance(v, INTEGERS) else _as_int(v) for v in values]
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, INTEGERS) for v in values):
        raise TypeError(f"{op}: {name} must be an int or two ints, not {value!r}")
    if min(values) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, not {value!r}")
    return values


def _as_int(value: Any) -> Any:
    """An integer of another type, such as numpy's, as an int; anything else as it is."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def cache_validation(check: Callable) -> Callable:
    """Caches a check that passed, by the shapes, dtypes and devices of its tensors and its other arguments.

    The check must depend on nothing else but autocast. Callers must not mutate the cached result. A check that is
    repeated takes as long as the rest of a small op.
    """
    passed: dict[tuple, Any] = {}

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        key = _cache_key(args)
        if key is None:
            return check(*args)
        try:
            return passed[key]
        except KeyError:
            pass
        result = check(*args)
        if len(passed) >= 1024:
            passed.clear()
        passed[key] = result
        return result

    return call


def _cache_key(args: Sequence[Any]) -> tuple | None:
    """What a check may depend on; None where an argument is no plain tensor, string, integer or list from `pair`."""
    if torch.compiler.is_compiling():
        return None
    key: list[Any] = []
    device = None
    for arg in args:
        kind = type(arg)
        if kind in PLAIN_TENSORS:
            if arg.layout is not torch.strided or arg.is_nested:
                return None
            key += (arg.shape, arg.dtype, device := arg.device)
        elif kind is list:
            key.append(tuple(arg))
        elif kind in _PLAIN_VALUES:
            key.append(arg)
        else:
            return None
    if _torch_private.any_autocast():
        if device is None or device.type not in ("cpu", "cuda"):
            return None
        key.append(torch.is_autocast_enabled(device.type))
    return tuple(key)
