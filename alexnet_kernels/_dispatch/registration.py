"""Registers the contracts of operators with torch: fakes, autograd formulas, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from alexnet_kernels import _library, _torch_private
from alexnet_kernels._dispatch.contracts import CONTRACTS, Contract, autocast_arguments
from alexnet_kernels._dispatch.eager import operators

_autocast_libraries: list[torch.library.Library] = []
"""torch drops the registrations of a library that is collected."""


def register_op(
    name: str,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    *,
    autocast: bool = False,
    eager: Callable | None = None,
    auto_triton: bool = True,
) -> None:
    """Registers the contract of a public op's operator, of the same name. The arguments are `Contract`'s."""
    _register(name, Contract(fake, backward, setup_context, autocast, eager, True, auto_triton))


def register_operator(
    name: str,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Registers the contract of an operator that is a part of an op, such as its backward."""
    _register(name, Contract(fake, backward, setup_context))


def _register(name: str, contract: Contract) -> None:
    CONTRACTS[name] = contract
    if _library.LOADED:
        implement(_library.NAMESPACE, name)


def implement(namespace: str, op: str) -> None:
    """Gives operator `namespace::op` the contract of `op`."""
    contract, name = CONTRACTS[op], f"{namespace}::{op}"
    torch.library.register_fake(name, functools.partial(_fake, contract.fake, name))
    if contract.backward is not None:
        backward = functools.partial(_backward, contract.backward, namespace)
        torch.library.register_autograd(name, backward, setup_context=contract.setup_context)
    if contract.autocast:
        _register_autocast(namespace, op)


def _fake(fake: Callable, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a fake, for tensors without memory only: torch also comes here where just one of them is on meta."""
    devices = {arg.device.type for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)}
    if "meta" in devices and len(devices) > 1:
        raise RuntimeError(f"{name}: the tensors are on different devices: {', '.join(sorted(devices))}")
    return fake(*args, **kwargs)


def _backward(backward: Callable, namespace: str, ctx: Any, *grads: Any) -> Any:
    return backward(operators(namespace), ctx, *grads)


def _register_autocast(namespace: str, op: str) -> None:
    overload = getattr(getattr(torch.ops, namespace), op).default
    library = torch.library.Library(namespace, "IMPL")
    _autocast_libraries.append(library)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def run(*args: Any, device: str = device, key: str = key) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with _torch_private.without_autocast(key):
                return overload(*autocast_arguments(args, dtype))

        library.impl(op, run, key)
