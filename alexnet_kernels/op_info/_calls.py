"""The operator calls that a call of an op makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from alexnet_kernels import backends
from alexnet_kernels._dispatch.contracts import CONTRACTS
from alexnet_kernels.op_info._record import Inputs, OpInfo, copy

OperatorCall = tuple[str, tuple[Any, ...]]
"""An operator's name, and its arguments."""


class _Recorder(TorchDispatchMode):
    """Records the calls of a namespace's operators; without `run`, their results come from fakes, uninitialised."""

    def __init__(self, namespace: str, run: bool) -> None:
        super().__init__()
        self.prefix, self.run = f"{namespace}::", run
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if hasattr(func, "_schema") else ""
        if name.startswith(self.prefix) and (operator := name.removeprefix(self.prefix)) in CONTRACTS:
            keep: Callable[[Tensor], Tensor] = (lambda t: copy(t.detach())) if self.run else torch.Tensor.detach
            self.calls.append((operator, tree_map_only(Tensor, keep, args)))
            if not self.run:
                return CONTRACTS[operator].fake(*args)
        return func(*args, **kwargs or {})


def operator_calls(info: OpInfo, inputs: Inputs, backend: str, run: bool = True) -> list[OperatorCall]:
    """The calls of a backend's operators that the op makes for these arguments, forward and backward, in order.

    They have the arguments' device, dtypes and strides; what an operator overwrites is as it was before the call.
    Without `run` no kernel runs: `inputs` are on the CPU, whatever the backend, and results are uninitialised.
    """
    chosen = backends.registered(backend)
    if not run:
        chosen = dataclasses.replace(chosen, devices=("cpu",), missing=lambda op: None)
    with backends.substituted(chosen), _Recorder(chosen.namespace, run) as recorder:
        forward_backward(
            info, info.call if run else info.op, inputs, backend, torch.ones_like if run else torch.empty_like
        )
    return recorder.calls


def forward_backward(
    info: OpInfo,
    function: Callable[..., Any],
    inputs: Inputs,
    backend: str,
    make_grad: Callable[[Tensor], Tensor] = torch.ones_like,
) -> None:
    """Calls a function with the op's arguments, then its backward.

    The output's gradient is `make_grad(output)`.
    """
    inputs = with_gradients(inputs, info.wrt)
    result = function(**inputs, backend=backend)
    output = result[0] if isinstance(result, tuple) else result
    if wanted := [inputs[name] for name in info.wrt if inputs.get(name) is not None]:
        torch.autograd.grad(output, wanted, make_grad(output))


def with_gradients(inputs: Inputs, wrt: tuple[str, ...]) -> Inputs:
    """The arguments, those of `wrt` as leaves that require a gradient."""
    return {
        name: value.detach().requires_grad_() if name in wrt and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
