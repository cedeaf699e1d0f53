"""Calls of the package's operators, with little overhead in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import _library, _torch_private
from alexnet_kernels._dispatch.checks import PLAIN_TENSORS
from alexnet_kernels._dispatch.contracts import CONTRACTS, autocast_arguments

_PLAIN_ARGUMENTS = frozenset((bool, int, float, list, tuple, type(None), torch.dtype))
_OPERATORS: dict[str, Operators] = {}


def operators(namespace: str) -> Any:
    """The operators of a namespace, as attributes; in eager mode, those of `Operators`."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops, namespace)
    found = _OPERATORS.get(namespace)
    return found if found is not None else _OPERATORS.setdefault(namespace, Operators(namespace))


class Operators:
    """torch.ops.<namespace>, whose operators skip the dispatcher's Python where nothing observes the call.

    An autograd formula registered with torch.library costs about 20 us a call, twice as much as the rest of a small
    op. Here the kernel is called below autograd, or through an autograd.Function with the same formula. A mode, a
    subclass of Tensor, a tracer, a profiler or functorch still sees the operator itself; of a convolution on the CPU, a
    profiler sees the name.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # as torch.ops.<namespace> has it

    def __getattr__(self, op: str) -> Callable:
        call = eager_call(self, op)
        setattr(self, op, call)
        return call


def eager_call(kernels: Operators, op: str) -> Callable:
    """The function that calls operator `op` in eager mode."""
    overload = getattr(getattr(torch.ops, kernels.name), op).default
    contract = CONTRACTS.get(op)
    if contract is None or contract.backward is None or contract.setup_context is None:
        return overload
    formula, setup_context, autocast = contract.backward, contract.setup_context, contract.autocast
    eager = contract.eager if kernels.name == _library.NAMESPACE else None
    label = f"{kernels.name}::{op}"
    redispatch, dispatch_keys = overload.redispatch, _torch_private.dispatch_keys

    def call_kernel(args: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        keys = dispatch_keys(tensors[0])
        for tensor in tensors[1:]:
            keys = keys | dispatch_keys(tensor)
        return redispatch(keys & _torch_private.BELOW_AUTOGRAD, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            output = call_kernel(args, [arg for arg in args if type(arg) in PLAIN_TENSORS])
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return formula(operators(kernels.name), ctx, *grads)

    Function.__name__ = Function.__qualname__ = f"{op}_{kernels.name}"

    def call(*args: Any) -> Any:
        tensors = _plain_tensors(args)
        if not tensors:
            return overload(*args)
        by_torch = eager if tensors[0].device.type == "cpu" else None
        if _torch_private.is_profiled():
            return _profiled(label, by_torch, overload, args)
        if by_torch is not None:
            return by_torch(*args)
        if autocast and torch.is_autocast_enabled(tensors[0].device.type):
            args = tuple(autocast_arguments(args, torch.get_autocast_dtype(tensors[0].device.type)))
            tensors = [arg for arg in args if type(arg) in PLAIN_TENSORS]
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    return Function.apply(*args)
        return call_kernel(args, tensors)

    return call


def _profiled(label: str, eager: Callable | None, overload: Callable, args: Sequence[Any]) -> Any:
    """The call as a profiler sees it: the operator, or a name over torch's operators, whose FLOPs it can count."""
    if eager is None:
        return overload(*args)
    with torch.profiler.record_function(label):
        return eager(*args)


def _plain_tensors(args: Sequence[Any]) -> list[Tensor] | None:
    """The tensors among the arguments; None if the operator itself must be called."""
    if _torch_private.is_observed():
        return None
    tensors = []
    for arg in args:
        kind = type(arg)
        if kind in PLAIN_TENSORS:
            tensors.append(arg)
        elif kind not in _PLAIN_ARGUMENTS:
            return None
    return tensors
