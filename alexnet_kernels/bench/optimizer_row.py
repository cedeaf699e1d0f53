"""The row of the optimizer's step over all of AlexNet's parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from alexnet_kernels import optim
from alexnet_kernels.backends import use_backend
from alexnet_kernels.bench.cases import compare
from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.row import Measurement, RowResult, capturable, our_backends
from alexnet_kernels.bench.timing import Call, guarded, measure
from alexnet_kernels.op_info._layers import PARAMETERS
from alexnet_kernels.op_info.sgd_step import NBYTES


@dataclass(frozen=True)
class SgdRow:
    """The optimizer's step over all of AlexNet's parameters, or a few small ones. The baseline is torch.optim.SGD."""

    small: bool = False
    name = "sgd_step, AlexNet's parameters, fp32"
    directions = ("step",)
    compiles = False
    _SETTINGS: ClassVar[dict[str, Any]] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    _SMALL = ((64, 3, 3, 3), (100, 64), (7,))

    def variants(self, device: torch.device) -> list[str]:
        ours = [backend for backend, reason in our_backends("sgd_step", device).items() if not reason]
        return [*ours, "torch fused", "torch foreach"]

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> RowResult:
        shapes = self._SMALL if self.small else PARAMETERS
        result = RowResult("sgd_step", "AlexNet's parameters", "fp32", 1)
        result.missing = {backend: reason for backend, reason in our_backends("sgd_step", device).items() if reason}
        calls: dict[str, list[Call]] = {}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            with guarded(name, device, result.errors):
                if fault := self.problem(name, device):
                    result.wrong[name] = fault
                else:
                    calls[name] = [self.call(name, device)]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        moved = NBYTES * count
        times = measure(calls, device, seconds=seconds, rounds=rounds)
        result.directions["step"] = Measurement(moved, 0, moved < cache_bytes(device), times)
        return result

    def call(self, name: str, device: torch.device) -> Call:
        """A call that takes one step."""
        return self._step(self._parameters(self._SMALL if self.small else PARAMETERS, device), name)

    def _step(self, parameters: list[nn.Parameter], name: str) -> Call:
        """A call that takes one step with the gradients that the parameters have."""
        if name.startswith("torch"):
            stepper: torch.optim.Optimizer = torch.optim.SGD(
                parameters, **self._SETTINGS, fused=name == "torch fused", foreach=name == "torch foreach"
            )
        else:
            settings = {**self._SETTINGS, "lr": capturable(self._SETTINGS["lr"], parameters[0].device)}
            stepper = optim.SGD(parameters, **settings, rule="torch")
        backend = "auto" if name.startswith("torch") else name

        def step() -> None:
            with use_backend(backend):
                stepper.step()

        return step

    @staticmethod
    def _parameters(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
        torch.manual_seed(0)
        values = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for value in values:
            value.grad = torch.randn_like(value)
        return values

    def problem(self, name: str, device: torch.device) -> str | None:
        """The first error of three steps against torch.optim.SGD in float64; None if there is none."""
        few = self._parameters(self._SMALL, device)
        exact = [nn.Parameter(p.detach().cpu().double()) for p in few]
        for wide, value in zip(exact, few, strict=True):
            assert value.grad is not None
            wide.grad = value.grad.cpu().double()
        definition, step = torch.optim.SGD(exact, **self._SETTINGS), self._step(few, name)
        for _ in range(3):
            step()
            definition.step()
        found = (compare(a, b, 1e-5, "parameter", 0) for a, b in zip(few, exact, strict=True))
        return next(filter(None, found), None)
