"""Shared by the tests of FusedSequential and fuse: children, the comparison of two modules, and the ops they call."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alexnet_kernels import ops
from alexnet_kernels.nn import modules, runs


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that receives the names of the ops that modules call, in order."""
    names: list[str] = []

    def spy(name: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            relu = kwargs.get("relu")
            label = (
                {"conv2d_relu": "conv2d", "linear_relu_dropout": "linear"}.get(name, name) if relu is False else name
            )
            names.append(label + ("+relu" if relu and "pool" in name else ""))
            return op(*args, **kwargs)

        return call

    for name in ops.__all__:
        for module in (runs, modules):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    return names


def conv(channels: int = 3, filters: int = 8, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, padding=kwargs.pop("padding", 1), **kwargs)


def lrn(**kwargs: object) -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0)


def pool(**kwargs: object) -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, **kwargs)


def stats() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        for values in (norm.running_mean, norm.weight, norm.bias):
            values.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def image(channels: int = 3, size: int = 13) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def outcome(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """The output, the gradients of the input and of every parameter, and every buffer afterwards."""
    module = copy.deepcopy(module).double()
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    gradients = torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])
    return (out.detach(), *gradients, *(buffer.clone() for buffer in module.buffers()))


def plain(module: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(OrderedDict(module.named_children()))


def assert_same_function(module: nn.Module, other: nn.Module, x: Tensor) -> None:
    for i, (a, b) in enumerate(zip(outcome(module, x), outcome(other, x), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, i=i: f"value {i}: {text}")


def doubled_output(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output
