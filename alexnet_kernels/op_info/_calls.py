"""The operator calls that a call of an op makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def _taking_cpu_tensors(backend: str) -> Iterator[None]:
    before = backends.registered(backend)
    backends.register(dataclasses.replace(before, devices=("cpu",), missing=lambda op: None))
    try:
        yield
    finally:
        backends.register(before)


def operator_calls(info: OpInfo, inputs: Inputs, backend: str, run: bool = True) -> list[OperatorCall]:
    """The calls of a backend's operators that the op makes for these arguments, forward and backward, in order.

    They have the arguments' device, dtypes and strides; what an operator overwrites is as it was before the call.
    Without `run` no kernel runs: `inputs` are on the CPU, whatever the backend, and results are uninitialised.
    """
    if not run:
        with _taking_cpu_tensors(backend):
            return _recorded(info, inputs, backend, run)
    return _recorded(info, inputs, backend, run)


def _recorded(info: OpInfo, inputs: Inputs, backend: str, run: bool) -> list[OperatorCall]:
    inputs = with_gradients(inputs, info.wrt)
    with _Recorder(backends.registered(backend).namespace, run) as recorder:
        result = (info.call if run else info.op)(**inputs, backend=backend)
        if info.wrt:
            output = result[0] if isinstance(result, tuple) else result
            wanted = [inputs[name] for name in info.wrt if inputs.get(name) is not None]
            grad = torch.ones_like(output) if run else torch.empty_like(output)
            torch.autograd.grad(output, wanted, grad)
    return recorder.calls


def with_gradients(inputs: Inputs, wrt: tuple[str, ...]) -> Inputs:
    """The arguments, those of `wrt` as leaves that require a gradient."""
    return {
        name: value.detach().requires_grad_() if name in wrt and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
