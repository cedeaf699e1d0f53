"""Which layers can be part of a run that one op computes: a letter for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alexnet_kernels._dispatch.checks import is_plain
from alexnet_kernels.nn.modules import Dropout, LocalResponseNorm
from alexnet_kernels.nn.originals import METHODS, remember, replaced
from alexnet_kernels.ops.max_pool2d import MOST_PIXELS

__all__ = ["RUN_LAYERS", "RunLayer", "examine", "kind_of", "kinds_of", "register_layer"]


class RunLayer(Protocol):
    """A layer that computes the runs that contain it itself, such as one whose parameters are split over processes."""

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        """The result of the run's children for x. `run` has a letter for each child, see `register_layer`."""
        ...


# A child's kind, a letter. c is a Conv2d that conv2d_relu does not support, i a ReLU that overwrites a tensor that may
# be used elsewhere, and . any other child that must be called by itself.
_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "C",
    nn.ReLU: "R",
    nn.LocalResponseNorm: "N",
    LocalResponseNorm: "N",
    nn.MaxPool2d: "P",
    nn.BatchNorm2d: "B",
    nn.Linear: "L",
    nn.Dropout: "D",
    Dropout: "D",
}
RUN_LAYERS: set[type] = set()
_TENSORS = {"C": ("weight", "bias"), "L": ("weight", "bias"), "B": ("weight", "bias", "running_mean", "running_var")}
_OVERRIDABLE: dict[type[nn.Module], frozenset[str]] = {}
"""By type of layers, names that a layer's own attributes have only where a program has put them there."""


def register_layer(kind: str, layer: type[RunLayer]) -> None:
    """Registers a type of layers as one of a kind.

    The kinds are C Conv2d, R ReLU, N LocalResponseNorm, P MaxPool2d, B BatchNorm2d, L Linear, D Dropout.
    """
    _KINDS[layer] = kind  # type: ignore[index]
    RUN_LAYERS.add(layer)
    _remember(layer, kind)  # type: ignore[arg-type]


def _remember(layer: type[nn.Module], kind: str) -> None:
    remember(layer)
    methods = (name for name in dir(layer) if callable(getattr(layer, name)))
    _OVERRIDABLE[layer] = frozenset((*methods, *_TENSORS.get(kind, ())))


for _layer, _kind in _KINDS.items():
    _remember(_layer, _kind)


def kinds_of(children: Sequence[nn.Module]) -> str:
    kinds = ""
    for child in children:
        kind = kind_of(child)
        # A new tensor that only this ReLU reads need not be overwritten: the result is the same.
        if kind == "R" and child.inplace and not kinds.endswith(("C", "c", "B", "L", "N", "P")):
            kind = "i"
        kinds += kind
    return kinds


def kind_of(child: Any) -> str:
    return examine(child)[0]


def examine(child: Any) -> tuple[str, str]:
    """The child's kind, and why it must be called by itself; "" for a child that an op can compute."""
    layer = type(child)
    kind = _KINDS.get(layer)
    if kind is None:
        known = next((base for base in layer.__mro__[1:] if base in _KINDS), None)
        return ".", f"{layer.__name__} " + ("has no op" if known is None else f"is a subclass of {known.__name__}")
    compiling = torch.compiler.is_compiling()
    # The attributes that torch.compile must guard on, or in eager mode any that may matter.
    overridden = compiling or not _OVERRIDABLE[layer].isdisjoint(child.__dict__)
    if reason := (
        _attached(child)
        or (overridden and _own_method(child, layer, compiling))
        or replaced(layer, kind, compiling)
        or (kind in _TENSORS and layer not in RUN_LAYERS and _odd_tensor(child, kind, overridden))
    ):
        return ".", reason
    if kind == "C":
        if isinstance(child.padding, str):
            return "c", f"padding {child.padding!r}"
        if child.padding_mode != "zeros":
            return "c", f"padding_mode {child.padding_mode!r}"
        if tuple(child.dilation) != (1, 1):
            return "c", f"dilation {child.dilation}"
    elif kind == "P":
        if child.return_indices:
            return ".", "return_indices"
        if _pair(child.dilation) != (1, 1):
            return ".", f"dilation {child.dilation}"
        if _area(child.kernel_size) > MOST_PIXELS:
            return ".", f"a window of {_area(child.kernel_size)} pixels, more than {MOST_PIXELS}"
    elif kind == "D" and child.inplace:
        return ".", "it works in place"
    return kind, ""


def _attached(child: Any) -> str:
    """What a program has attached to the child."""
    if child._forward_hooks:
        return "a forward hook"
    if child._forward_pre_hooks:
        return "a forward-pre hook"
    if child._backward_hooks:
        return "a backward hook"
    if child._backward_pre_hooks:
        return "a backward-pre hook"
    if child._compiled_call_impl is not None:
        return "a compiled call"
    return ""


def _own_method(child: Any, layer: type[nn.Module], compiling: bool) -> str:
    """A method that the child has in place of its class's."""
    if compiling:
        return next((f"{name} of its own" for name in METHODS if name in child.__dict__), "")
    names = sorted(_OVERRIDABLE[layer].intersection(child.__dict__))
    return next((f"{name} of its own" for name in names if callable(getattr(layer, name, None))), "")


def _odd_tensor(child: Any, kind: str, overridden: bool) -> str:
    """Which parameter or buffer is no plain tensor, and so may bring its own arithmetic."""
    if not overridden:
        for name, tensor in child._parameters.items():
            if tensor is not None and not is_plain(tensor):
                return _odd(name, tensor)
        if kind == "B":
            for name, tensor in child._buffers.items():
                if tensor is not None and name in _TENSORS[kind] and not is_plain(tensor):
                    return _odd(name, tensor)
        return ""
    for name in _TENSORS[kind]:
        tensor = getattr(child, name)
        if tensor is not None and not is_plain(tensor):
            return _odd(name, tensor)
    return ""


def _odd(name: str, tensor: Any) -> str:
    layer = type(tensor)
    plain = layer is Tensor or layer is nn.Parameter
    return f"{name} has the layout {tensor.layout}" if plain else f"{name} is a {layer.__name__}"


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _area(kernel_size: int | tuple[int, ...]) -> int:
    height, width = _pair(kernel_size)
    return height * width
