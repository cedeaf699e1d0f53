"""The row of a problem of KernelBench: eager, by torch.compile, and by torch.compile with this package's backend."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.row import COMPILED, FUSED, Measurement, RowResult
from alexnet_kernels.bench.suite import Problem
from alexnet_kernels.bench.timing import guarded, measure
from alexnet_kernels.interop import dynamo_backend

TOLERANCES = (1e-4, 1e-2)
"""atol and rtol of the suite's newer versions, and of its first. A variant that exceeds the last is wrong."""


@dataclass(frozen=True)
class SuiteRow:
    """A problem's forward pass without gradients, in float32 and NCHW, as the suite has it."""

    problem: Problem
    batch: int
    compile: Collection[str] = ("compiled",)  # of COMPILED
    directions = ("inference",)

    @property
    def name(self) -> str:
        return f"{self.problem.name}, fp32, batch {self.batch}, inference"

    @property
    def compiles(self) -> bool:
        return bool(self.compile)

    def variants(self, device: torch.device) -> list[str]:
        return [FUSED, "eager", *self.compile]

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> RowResult:
        result = RowResult(self.problem.name, "forward", "fp32", self.batch)
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = self.problem.make().to(device)
        x = torch.rand(self.batch, *self.problem.shape[1:], device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            expected = model(x)
        calls: dict[str, list[Callable[[], Any]]] = {}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            with guarded(name, device, result.errors):
                run = self._variant(name, model)
                with torch.no_grad():
                    held = [t for t in TOLERANCES if torch.allclose(run(x), expected, rtol=t, atol=t)]
                if held:
                    result.tolerances[name] = held[0]
                    calls[name] = [_without_gradients(run, x)]
                else:
                    result.wrong[name] = f"it differs from eager by more than atol = rtol = {TOLERANCES[-1]:g}"
        nbytes = sum(t.numel() * t.element_size() for t in (x, expected, *model.parameters()))
        times = measure(calls, device, seconds=seconds, rounds=rounds)
        operations = float(flops.get_total_flops())
        result.directions["inference"] = Measurement(nbytes, operations, nbytes < cache_bytes(device), times)
        del calls, expected, model, x
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def _variant(self, name: str, model: nn.Module) -> Callable[[Tensor], Tensor]:
        if name == "eager":
            return model
        options: dict[str, Any] = {"backend": dynamo_backend} if name == FUSED else COMPILED[name]
        return torch.compile(model, dynamic=False, fullgraph=True, **options)


def _without_gradients(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            run(x)

    return call


def suite_rows(problems: Sequence[Problem], device: torch.device, smoke: int | None = None) -> list[SuiteRow]:
    """The problems with the suite's batch on a GPU, and a smaller one on a CPU; `smoke`: with this one."""
    on_cpu = device.type == "cpu"
    return [SuiteRow(p, smoke or (p.cpu_batch if on_cpu else p.shape[0])) for p in problems]
