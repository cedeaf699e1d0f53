"""Calls of a Dynamo graph that are layers: their kinds, and their arguments under the names of torch.nn's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from alexnet_kernels.nn.originals import function_of_torch
from alexnet_kernels.ops.max_pool2d import MOST_PIXELS

__all__ = ["LayerCall", "layer_of"]

_REQUIRED = object()
_ALIASES = {"train": "training"}


@dataclass
class LayerCall:
    """A node that calls a layer.

    kind: its letter, see `nn.layers.register_layer`; "." if no op supports the call, and `reason` says why.
    input: the node that it reads.
    settings: the attributes of the torch.nn module that makes the same call. Tensors are nodes.
    inplace: whether the call overwrites its input.
    """

    kind: str
    input: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    inplace: bool = False
    reason: str | None = None


class _Unsupported(Exception):
    """The reason why no op takes a call."""


def layer_of(node: Node) -> LayerCall | None:
    """The layer that a node calls; None if it calls none."""
    signature = None
    if node.op == "call_function":
        signature = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    elif node.op == "call_method":
        signature = _METHODS.get(str(node.target))
    if signature is None:
        return None
    try:
        return signature.bind(node)
    except _Unsupported as problem:
        return LayerCall(".", reason=str(problem))


@dataclass(frozen=True)
class _Signature:
    """The parameters of a function, in order, with their defaults, and what makes a layer of them."""

    parameters: dict[str, Any]
    make: Callable[[dict[str, Any]], LayerCall]
    fixed: dict[str, Any] = field(default_factory=dict)  # arguments that the function implies

    def bind(self, node: Node) -> LayerCall:
        names = list(self.parameters)
        if len(node.args) > len(names):
            raise _Unsupported(f"it has {len(node.args)} positional arguments")
        given = dict(zip(names, node.args, strict=False))
        for name, value in node.kwargs.items():
            name = _ALIASES.get(name, name)
            if name not in self.parameters or name in given:
                raise _Unsupported(f"it has the argument {name}")
            given[name] = value
        arguments = self.parameters | given | self.fixed
        if _REQUIRED in arguments.values():
            raise _Unsupported("an argument is missing")
        if not isinstance(arguments["input"], Node):
            raise _Unsupported("its input is no tensor of the graph")
        return self.make(arguments)


def _conv(a: dict[str, Any]) -> LayerCall:
    if isinstance(a["padding"], str):
        raise _Unsupported(f"padding={a['padding']!r}")
    if _pair(a["dilation"], "dilation") != (1, 1):
        raise _Unsupported(f"dilation={_plain(a['dilation'])}")
    settings = {
        "weight": _tensor(a["weight"], "weight"),
        "bias": _optional(a["bias"], "bias"),
        "stride": _pair(a["stride"], "stride"),
        "padding": _pair(a["padding"], "padding"),
        "groups": _int(a["groups"], "groups"),
    }
    return LayerCall("C", a["input"], settings)


def _relu(a: dict[str, Any]) -> LayerCall:
    return LayerCall("R", a["input"], {}, inplace=_bool(a["inplace"], "inplace"))


def _norm(a: dict[str, Any]) -> LayerCall:
    settings: dict[str, Any] = {"size": _int(a["size"], "size")}
    settings |= {name: _float(a[name], name) for name in ("alpha", "beta", "k")}
    return LayerCall("N", a["input"], settings)


def _pool(a: dict[str, Any]) -> LayerCall:
    if _bool(a["return_indices"], "return_indices"):
        raise _Unsupported("return_indices=True")
    if _pair(a["dilation"], "dilation") != (1, 1):
        raise _Unsupported(f"dilation={_plain(a['dilation'])}")
    window = _pair(a["kernel_size"], "kernel_size")
    if window[0] * window[1] > MOST_PIXELS:
        raise _Unsupported(f"a window of {window[0]} x {window[1]} pixels, more than {MOST_PIXELS}")
    whole = a["stride"] is None or (isinstance(a["stride"], Sequence) and not a["stride"])
    settings = {
        "kernel_size": window,
        "stride": window if whole else _pair(a["stride"], "stride"),
        "padding": _pair(a["padding"], "padding"),
        "ceil_mode": _bool(a["ceil_mode"], "ceil_mode"),
    }
    return LayerCall("P", a["input"], settings)


def _batch_norm(a: dict[str, Any]) -> LayerCall:
    names = ("running_mean", "running_var", "weight", "bias")
    settings: dict[str, Any] = {name: _optional(a[name], name) for name in names}
    if (a["running_mean"] is None) != (a["running_var"] is None):
        raise _Unsupported("it has one of running_mean and running_var")
    settings |= {
        "training": _bool(a["training"], "training"),
        "momentum": _float(a["momentum"], "momentum"),
        "eps": _float(a["eps"], "eps"),
        "track_running_stats": True,
        "num_batches_tracked": None,  # counted by a node of its own
    }
    return LayerCall("B", a["input"], settings)


def _linear(a: dict[str, Any]) -> LayerCall:
    return LayerCall("L", a["input"], {"weight": _tensor(a["weight"], "weight"), "bias": _optional(a["bias"], "bias")})


def _dropout(a: dict[str, Any]) -> LayerCall:
    if _bool(a["inplace"], "inplace"):
        raise _Unsupported("inplace=True")
    return LayerCall("D", a["input"], {"p": _float(a["p"], "p"), "training": _bool(a["training"], "training")})


def _plain(value: Any) -> Any:
    """A value for a message: graphs hold lists of a type of their own."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _tensor(value: Any, name: str) -> Node:
    if not isinstance(value, Node):
        raise _Unsupported(f"{name} is no tensor of the graph")
    return value


def _optional(value: Any, name: str) -> Node | None:
    return None if value is None else _tensor(value, name)


def _constant(value: Any, name: str, kinds: tuple[type, ...]) -> Any:
    if type(value) not in kinds:
        raise _Unsupported(f"{name} is no constant of the graph" if isinstance(value, Node) else f"{name}={value!r}")
    return value


def _bool(value: Any, name: str) -> bool:
    return bool(_constant(value, name, (bool, int)))


def _int(value: Any, name: str) -> int:
    return _constant(value, name, (int,))


def _float(value: Any, name: str) -> float:
    return float(_constant(value, name, (int, float)))


def _pair(value: Any, name: str) -> tuple[int, int]:
    values = [value] if not isinstance(value, Sequence) else list(value)
    if len(values) not in (1, 2):
        raise _Unsupported(f"{name}={_plain(value)!r}")
    first, *rest = (_int(v, name) for v in values)
    return first, rest[0] if rest else first


_CONV = {"input": _REQUIRED, "weight": _REQUIRED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM = {"input": _REQUIRED, "size": _REQUIRED, "alpha": 1e-4, "beta": 0.75, "k": 1.0}
_POOL = {
    "input": _REQUIRED,
    "kernel_size": _REQUIRED,
    "stride": None,
    "padding": 0,
    "dilation": 1,
    "ceil_mode": False,
}
_BATCH_NORM = {
    "input": _REQUIRED,
    "running_mean": _REQUIRED,
    "running_var": _REQUIRED,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
_TORCH_BATCH_NORM = dict.fromkeys(
    (
        "input",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "training",
        "momentum",
        "eps",
        "cudnn_enabled",
    ),
    _REQUIRED,
)
_IN_PLACE, _OUT_OF_PLACE = {"inplace": True}, {"inplace": False}
_BY_PATH = {
    "torch.conv2d": _Signature(_CONV, _conv),
    "torch.nn.functional.relu": _Signature({"input": _REQUIRED, "inplace": False}, _relu),
    "torch.relu": _Signature({"input": _REQUIRED}, _relu, _OUT_OF_PLACE),
    "torch.relu_": _Signature({"input": _REQUIRED}, _relu, _IN_PLACE),
    "torch.nn.functional.local_response_norm": _Signature(_NORM, _norm),
    "torch.nn.functional.max_pool2d": _Signature(_POOL | {"return_indices": False}, _pool),
    "torch.max_pool2d": _Signature(_POOL, _pool, {"return_indices": False}),
    "torch.nn.functional.batch_norm": _Signature(_BATCH_NORM, _batch_norm),
    "torch.batch_norm": _Signature(_TORCH_BATCH_NORM, _batch_norm),
    "torch.nn.functional.linear": _Signature({"input": _REQUIRED, "weight": _REQUIRED, "bias": None}, _linear),
    "torch.nn.functional.dropout": _Signature(
        {"input": _REQUIRED, "p": 0.5, "training": True, "inplace": False}, _dropout
    ),
    "torch.dropout": _Signature({"input": _REQUIRED, "p": _REQUIRED, "training": _REQUIRED}, _dropout, _OUT_OF_PLACE),
    "torch.dropout_": _Signature({"input": _REQUIRED, "p": _REQUIRED, "training": _REQUIRED}, _dropout, _IN_PLACE),
}
_FUNCTIONS = {
    function: signature for path, signature in _BY_PATH.items() if (function := function_of_torch(path)) is not None
}
_METHODS = {
    "relu": _Signature({"input": _REQUIRED}, _relu, _OUT_OF_PLACE),
    "relu_": _Signature({"input": _REQUIRED}, _relu, _IN_PLACE),
}
