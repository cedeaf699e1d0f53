"""Random small networks with hand-written forwards: modules and functional calls, branches, in-place operators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels.nn import Dropout, LocalResponseNorm

CHANNELS = 8
RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu, in place": lambda x: F.relu(x, inplace=True),
    "F.relu, positional": lambda x: F.relu(x, True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "F.relu_": F.relu_,
    "relu": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
}
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "F": lambda x: F.max_pool2d(x, 3, 2, 1),
    "F, named": lambda x: F.max_pool2d(input=x, kernel_size=(3, 2), stride=(1, 2), ceil_mode=True),
    "F, stride of the window": lambda x: F.max_pool2d(x, 2),
    "torch": lambda x: torch.max_pool2d(x, [2, 2], [1]),
    "with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
}

RUNS = (
    ("conv", "relu"),
    ("conv", "relu", "pool"),
    ("conv", "relu", "norm", "pool"),
    ("conv", "pool", "relu"),
    ("conv", "batch norm", "relu"),
    ("relu", "pool"),
    ("norm", "pool"),
    ("pool", "relu"),
    ("conv", "save", "relu", "pool", "add"),
    ("conv", "save", "relu", "add"),
)
STEPS = {
    "conv": 3.0,
    "relu": 4.0,
    "norm": 1.0,
    "pool": 2.0,
    "batch norm": 2.0,
    "write": 1.0,
    "save": 1.5,
    "add": 1.5,
    "branch": 1.0,
    "read": 1.0,
    "break": 0.4,
    "no grad": 0.4,
}
"""Weights by kind."""


def _on_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], -1)[:, ::2].relu_()
    return x


def _on_part(x: Tensor) -> Tensor:
    x[:, 0] = 0.25
    return x


def _in_dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, False).relu_()


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "add_": lambda x: x.add_(0.125),
    "mul_": lambda x: x.mul_(-0.5),
    "view": _on_view,
    "part": _on_part,
    "dropout": _in_dropout,
    "clamp_": lambda x: torch.clamp_(x, max=0.75),
    "out": lambda x: torch.mul(x.detach(), 0.5, out=torch.empty_like(x)) + x,
}


class RandomNet(nn.Module):
    """The network of a seed: steps that `forward` reads one by one. float64, or float32 where it uses autocast."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.layers = nn.ModuleList()
        self.autocast = draw.random() < 0.15
        self.exact = False  # leaves autocast off
        self.copies = draw.random() < 0.8  # of the input, which may be a leaf
        self.steps = [step for _ in range(draw.randint(2, 6)) for step in self._steps(draw)]
        self.tail = [self._tail(draw, i) for i in range(draw.randint(0, 2))]
        if draw.random() < 0.3:
            self.to(memory_format=torch.channels_last)
        self.train(draw.random() < 0.6)
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm2d) and draw.random() < 0.2:
                layer.eval()
        for parameter in self.parameters():
            if draw.random() < 0.1:
                parameter.requires_grad_(False)
        if not self.autocast:
            self.double()

    def _add(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def _steps(self, draw: random.Random) -> list[tuple[Any, ...]]:
        """A step, or the layers of a run, one of which may be missing or have another step before it."""
        if draw.random() < 0.4:
            return [self._step(draw, draw.choices(list(STEPS), list(STEPS.values()))[0])]
        kinds = list(draw.choice(RUNS))
        if draw.random() < 0.3:
            kinds.insert(draw.randrange(len(kinds)), draw.choice(list(STEPS)))
        return [self._step(draw, kind) for kind in kinds]

    def _step(self, draw: random.Random, kind: str) -> tuple[Any, ...]:
        if kind == "conv":
            options: dict[str, Any] = {"bias": draw.random() < 0.7, "groups": draw.choice((1, 1, 2))}
            options |= draw.choice(({"padding": 1}, {"padding": 1}, {"padding": "same"}, {"padding": 2, "dilation": 2}))
            conv = nn.Conv2d(CHANNELS, CHANNELS, 3, **options)
            return draw.choice(("module", "functional", "named")), self._add(conv)
        if kind == "relu":
            name = draw.choice((*RELUS, "module", "module, in place"))
            return (name,) if name in RELUS else ("module", self._add(nn.ReLU(name != "module")))
        if kind == "norm":
            norm = draw.choice((nn.LocalResponseNorm, LocalResponseNorm))(draw.choice((3, 5)), 0.5, 0.75, 2.0)
            return draw.choice(("module", "norm")), self._add(norm)
        if kind == "pool":
            return draw.choice((("module", self._add(nn.MaxPool2d(3, 2, 1))), ("pool", draw.choice(list(POOLS)))))
        if kind == "batch norm":
            norm = nn.BatchNorm2d(CHANNELS, affine=draw.random() < 0.8, track_running_stats=draw.random() < 0.8)
            return draw.choice(("module", "batch norm")), self._add(norm)
        if kind == "write":
            return kind, draw.choice(list(WRITES))
        if kind == "branch":
            return kind, *(self._add(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)) for _ in range(2))
        if kind == "no grad":
            return kind, draw.choice(list(RELUS))
        return kind, draw.random() < 0.5

    def _tail(self, draw: random.Random, i: int) -> tuple[Any, ...]:
        drop = self._add(draw.choice((nn.Dropout, Dropout))(0.0))
        linear = self._add(nn.Linear(6 if i else CHANNELS, 6, bias=draw.random() < 0.8))
        return linear, draw.choice((*RELUS, None)), drop, draw.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        half = torch.autocast("cpu", torch.bfloat16, enabled=not self.exact)
        context = half if self.autocast else contextlib.nullcontext()
        saved: list[Tensor] = []
        read = []
        x = x + 0 if self.copies else x
        for i, step in enumerate(self.steps):
            if step[0] == "break":
                torch._dynamo.graph_break()
            elif self.autocast and i % 3:
                with context:
                    x = self._run(step, x, saved, read)
            else:
                x = self._run(step, x.to(torch.float32, copy=True) if self.autocast else x, saved, read)
        x = x.float().mean((2, 3)) if self.autocast else x.mean((2, 3))
        for linear, relu, drop, functional in self.tail:
            layer = self.layers[linear]
            x = F.linear(x, layer.weight, layer.bias) if functional else layer(x)
            x = x if relu is None else RELUS[relu](x)
            x = F.dropout(x, 0.5, False) if functional else self.layers[drop](x)
        return x + sum(read)

    def _run(self, step: tuple[Any, ...], x: Tensor, saved: list[Tensor], read: list[Tensor]) -> Tensor:
        kind, *arguments = step
        if kind in RELUS:
            return RELUS[kind](x)
        if kind == "pool":
            return POOLS[arguments[0]](x) if x.shape[2] > 5 else x
        if kind == "write":
            return WRITES[arguments[0]](x)
        if kind == "save":
            saved.append(x)
            return x
        if kind == "add":
            if not saved or saved[-1].shape != x.shape or saved[-1].dtype != x.dtype:
                return x
            if arguments[0]:
                x += saved[-1]
                return x
            return saved[-1] + x
        if kind == "branch":
            a, b = (self.layers[i](x) for i in arguments)
            return a.relu_() + F.relu(b)
        if kind == "read":
            read.append(x.float().mean() if self.autocast else x.mean())
            return x
        if kind == "no grad":
            with torch.no_grad():
                y = RELUS[arguments[0]](x.clone())
            return x + y
        layer = self.layers[arguments[0]]
        if isinstance(layer, nn.MaxPool2d) and x.shape[2] < 3:
            return x
        if kind == "module":
            return layer(x)
        if kind == "norm":
            return F.local_response_norm(x, layer.size, alpha=layer.alpha, beta=layer.beta, k=layer.k)
        if kind == "batch norm":
            statistics = layer.running_mean, layer.running_var
            training = layer.training or statistics[0] is None
            return F.batch_norm(x, *statistics, layer.weight, layer.bias, training, 0.25, eps=layer.eps)
        if kind == "named":
            settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            return F.conv2d(input=x, bias=layer.bias, weight=layer.weight, **settings)
        return torch.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def inputs_of(seed: int, net: RandomNet) -> Tensor:
    draw = random.Random(seed + 1)
    dtype = torch.float32 if net.autocast else torch.float64
    x = torch.randn(draw.choice((1, 2, 3)), CHANNELS, draw.choice((6, 9, 12)), draw.choice((7, 12)), dtype=dtype)
    if draw.random() < 0.4:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_(draw.random() < 0.7)
