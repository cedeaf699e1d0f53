"""The rows of LPIPS, with random filters: against the packages lpips and torchmetrics, as they are and fused."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_kernels.bench import baselines
from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.row import LPIPS_FUSED, LPIPS_OURS, SHORT, Measurement, RowResult
from alexnet_kernels.bench.timing import Call, guarded, measure
from alexnet_kernels.lpips import LPIPS
from alexnet_kernels.nn.fusion import fuse

KEPT = "one reference"
PAIRS = "all pairs"
_PEERS = {"lpips": ("lpips", "torchvision"), "torchmetrics": ("torchmetrics", "torchvision")}
TOLERANCES = {torch.float32: (1e-4, 2e-2), torch.bfloat16: (3e-2, 0.3)}
"""Of distances, relative to the largest, and of the gradient, relative to its norm: ReLU's kinks flip."""


@dataclass(frozen=True)
class LpipsRow:
    """Distances of pairs of images, forward, and with the gradient of one image of each pair.

    kind: "" for pairs of images; KEPT for images whose references stay the same, so that LPIPS has their features;
    PAIRS for the distances of all pairs of `batch` images and as many others: a package is called once an image.
    """

    batch: int
    size: int
    dtype: torch.dtype = torch.float32
    kind: str = ""
    compile: Collection[str] = ()
    compiles = False

    @property
    def name(self) -> str:
        kind = f", {self.kind}" if self.kind else ""
        return f"LPIPS{kind}, {SHORT[self.dtype]}, {self.size} x {self.size}, batch {self.batch}"

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.kind == PAIRS else ("forward", "forward and backward")

    def _known(self) -> dict[str, str | None]:
        """The row's variants, each with the reason if it is missing on this machine, else None."""
        found: dict[str, str | None] = {LPIPS_OURS: None}
        for peer, packages in _PEERS.items():
            reason = next(filter(None, map(baselines.missing, packages)), None)
            found[peer] = found[LPIPS_FUSED.format(peer)] = reason
        return found

    def variants(self, device: torch.device) -> list[str]:
        return [name for name, reason in self._known().items() if not reason]

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> RowResult:
        result = RowResult("lpips", f"{self.size} x {self.size}{self.kind}", SHORT[self.dtype], self.batch)
        result.missing = {name: reason for name, reason in self._known().items() if reason}
        torch.manual_seed(0)
        metric = LPIPS(pretrained=False, pnet_rand=True).to(device)
        for layer in metric.lins:
            layer.weight.data.abs_()  # type: ignore[union-attr, operator]
        a, b = (torch.rand(self.batch, 3, self.size, self.size, device=device) * 2 - 1 for _ in range(2))
        exact = copy.deepcopy(metric).double()
        expected = [run().detach() for run in self._runs(LPIPS_OURS, exact, a.double(), b.double())]
        with FlopCounterMode(display=False) as flops:
            metric.features(a)
        once = float(flops.get_total_flops())
        forward = once if self.kind == KEPT else 2 * once
        operations = (forward, forward + once)  # the gradient of one image is as much as its features
        a, b = a.to(self.dtype), b.to(self.dtype)
        calls: dict[str, dict[str, list[Call]]] = {direction: {} for direction in self.directions}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            with guarded(name, device, result.errors):
                runs = self._runs(name, _model(name, metric).to(device, self.dtype), a, b)
                for direction, run, wanted in zip(self.directions, runs, expected, strict=True):
                    if problem := self._problem(direction, run().detach().double(), wanted):
                        result.wrong[name] = problem
                        break
                else:
                    for direction, run in zip(self.directions, runs, strict=True):
                        calls[direction][name] = [run]
        nbytes = 2 * a.nbytes + sum(parameter.numel() * a.element_size() for parameter in metric.parameters())
        for direction, count in zip(self.directions, operations, strict=False):
            moved = nbytes + (a.nbytes if "backward" in direction else 0)
            times = measure(calls[direction], device, seconds=seconds, rounds=rounds)
            result.directions[direction] = Measurement(moved, count, moved < cache_bytes(device), times)
        del calls, expected, exact, metric
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def _runs(self, name: str, model: Any, a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
        """For each direction, what returns the distances, or the gradient of a."""
        ours = name == LPIPS_OURS
        if self.kind == PAIRS:
            return [_pairs(model, a, b, ours)]
        other = model.features(b) if self.kind == KEPT and ours else b
        image = a.clone().requires_grad_()

        def forward() -> Tensor:
            with torch.no_grad():
                return model(a, other).flatten()

        def both() -> Tensor:
            return torch.autograd.grad(model(image, other).sum(), image)[0]

        return [forward, both]

    def _problem(self, direction: str, found: Tensor, expected: Tensor) -> str:
        allowed = TOLERANCES[self.dtype]
        if direction == "forward":
            error = ((found - expected).abs().max() / expected.abs().max()).item()
        else:
            error = ((found - expected).norm() / expected.norm()).item()
        limit = allowed[0 if direction == "forward" else 1]
        return "" if error <= limit else f"{direction}: a relative error of {error:.2g}, above {limit:g}"


def _pairs(model: Any, a: Tensor, b: Tensor, ours: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            if ours:
                return model.pairwise(a, b)
            return torch.stack([model(image.expand_as(b), b).flatten() for image in a])

    return run


def _model(name: str, metric: LPIPS) -> nn.Module:
    """The variant's model, with the parameters of `metric`. Of torchmetrics' metric it is the network alone."""
    model: Any
    if name == LPIPS_OURS:
        return copy.deepcopy(metric)
    if "torchmetrics" in name:
        from torchmetrics.functional.image.lpips import _LPIPS

        model = _LPIPS(pretrained=False, net="alex", pnet_rand=True)
    else:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision as before version 0.13
            model = lpips.LPIPS(pretrained=False, net="alex", pnet_rand=True, verbose=False)
    state = metric.state_dict()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    model.eval().requires_grad_(False)
    return fuse(model) if name.startswith(LPIPS_FUSED.format("")) else model


def lpips_rows(smoke: bool = False) -> list[LpipsRow]:
    if smoke:
        return [LpipsRow(1, 32, dtype, kind) for dtype in TOLERANCES for kind in ("", KEPT)] + [
            LpipsRow(2, 32, kind=PAIRS)
        ]
    found = [LpipsRow(8, size, dtype, kind) for dtype in TOLERANCES for kind in ("", KEPT) for size in (64, 256)]
    return [*found, LpipsRow(64, 64, kind=PAIRS)]
