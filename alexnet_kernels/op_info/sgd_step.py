"""The record of sgd_step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import PARAMETERS
from alexnet_kernels.op_info._record import (
    Comparison,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Work,
    copy,
    sample,
)

NBYTES = 20
"""Of a float32 parameter: its value and momentum, read and written, and its gradient."""
SHAPES = ((24, 3, 11, 11), (7,), (64, 50), (1,), (0,), (), (5, 3, 3, 3))
# The dtypes of gradient, momentum buffer and master; None is the parameter's, and no master.
MIXTURES: dict[str, tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None]] = {
    "plain": (None, None, None),
    "wide gradient": (torch.float32, None, None),
    "narrow gradient": (torch.bfloat16, None, None),
    "wide momentum": (None, torch.float32, None),
    "master": (None, torch.float32, torch.float32),
    "master, wide gradient": (torch.float32, torch.float32, torch.float32),
    "master, narrow momentum": (None, None, torch.float32),
}
RULES: tuple[Inputs, ...] = (
    {"rule": "paper"},
    {"rule": "paper", "first_step": True},
    {"rule": "paper", "momentum": 0.0, "weight_decay": 0.0},
    {"rule": "torch"},
    {"rule": "torch", "first_step": True},
    {"rule": "torch", "momentum": 0.0, "weight_decay": 0.0},
    {"rule": "torch", "dampening": 0.4},
    {"rule": "torch", "dampening": 0.4, "first_step": True},
    {"rule": "torch", "nesterov": True, "weight_decay": 0.1},
    {"rule": "torch", "nesterov": True, "first_step": True},
)


def fits(mixture: str, dtype: torch.dtype) -> bool:
    """Whether parameters of this dtype go with the mixture."""
    if dtype == torch.float64:
        return mixture == "plain"
    if dtype == torch.float32:
        return mixture in ("plain", "narrow gradient")
    return mixture != "narrow gradient"


def state(make: Maker, mixture: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Inputs:
    """Parameters, gradients, momentum buffers and masters."""
    grad, momentum, master = MIXTURES[mixture if fits(mixture, make.dtype) else "plain"]
    masters = [make(*shape, dtype=master) for shape in shapes]
    return {
        "params": [value.to(make.dtype, copy=True) for value in masters],
        "grads": [make(*shape, dtype=grad) for shape in shapes],
        "momentum_buffers": [make(*shape, dtype=momentum, scale=0.1) for shape in shapes],
        "masters": masters if master else [],
    }


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """A tensor of the sample's shape, among others of `SHAPES`, in a mixture of dtypes."""
    return {**state(make, options.pop("mixture", "plain"), (shape, *SHAPES[1:])), "lr": 0.03, **options}


_MODIFIED = ("params", "momentum_buffers", "masters")


def _functional(**arguments: Any) -> tuple[Tensor, ...]:
    copies = {name: [copy(tensor) for tensor in arguments[name]] for name in _MODIFIED}
    ops.sgd_step(**{**arguments, **copies})
    return tuple(tensor for name in _MODIFIED for tensor in copies[name])


def _reference(**arguments: Any) -> tuple[Tensor, ...]:
    return tuple(tensor for tensors in reference.sgd_step(**arguments) for tensor in tensors)


def _parameters(rule: str, make: Maker, batch: int) -> Inputs:
    """AlexNet's own, with masters where they are of half precision."""
    mixture = "plain" if make.dtype == torch.float32 else "master"
    return {**state(make, mixture, PARAMETERS), "lr": 0.01, "rule": rule}


def _domain(draw: Draw) -> Sample:
    shape = draw(((1,), (7,), (33, 5), (4, 3, 3, 5), (1, 8, 1, 1), (70000,)))
    return sample(*shape, mixture=draw(tuple(MIXTURES)), **draw(RULES))


INFO = OpInfo(
    name="sgd_step",
    op=ops.sgd_step,
    reference=_reference,
    samples=tuple(sample(24, 3, 11, 11, mixture=mixture, **rule) for mixture in MIXTURES for rule in RULES),
    typical=(
        sample(6, 5, 3, 3, mixture="master"),
        sample(6, 5, 3, 3, mixture="master", rule="torch", nesterov=True),
    ),
    large=sample(300, 200, mixture="master"),
    domain=_domain,
    ones=(
        sample(1, lr=1.0, momentum=1.0, weight_decay=1.0, rule="torch", nesterov=True),
        sample(1, lr=1.0, momentum=1.0, weight_decay=1.0, first_step=True),
    ),
    make=_make,
    takes=lambda sample, dtype: fits(sample.options.get("mixture", "plain"), dtype),
    modifies=_MODIFIED,
    functional=_functional,
    comparison=lambda setting: Comparison(absolute=1e-15 if setting.dtype == torch.float64 else 2**-22),
    images=False,
    wrt=(),
    layers=tuple(
        Layer(f"all, {rule}'s rule", partial(_parameters, rule), lambda e: Work((0, 0)), (), timed=False)
        for rule in ("paper", "torch")
    ),
    order=9,
)
