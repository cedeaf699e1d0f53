"""Contracts: what the implementations of an operator have in common, whatever their backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contract:
    """Of an operator of the package.

    fake: the result's shapes, dtypes and strides, from fake tensors.
    backward: `backward(kernels, ctx, *grads)`, the gradients; `kernels` holds the operators of the forward operator's
        backend. None for an operator that is not differentiable.
    setup_context: saves for `backward`.
    autocast: cast floating-point tensors to the autocast dtype, as torch does for conv2d.
    eager: computes on the CPU what the operator does, by torch's own operators, which know autograd and autocast.
        Calling it directly saves the overhead of the operator.
    public: whether it is an op of `alexnet_kernels.ops`, rather than a part of one.
    auto_triton: whether backend "auto" takes Triton on a GPU for which the native library has no kernel.
    """

    fake: Callable
    backward: Callable | None = None
    setup_context: Callable | None = None
    autocast: bool = False
    eager: Callable | None = None
    public: bool = False
    auto_triton: bool = True


CONTRACTS: dict[str, Contract] = {}
"""By operator."""


def public_ops() -> list[str]:
    """The ops of `alexnet_kernels.ops`."""
    return [name for name, contract in CONTRACTS.items() if contract.public]


def autocast_arguments(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments, floating-point tensors other than float64 cast to autocast's dtype."""
    return [
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 else arg
        for arg in args
    ]
