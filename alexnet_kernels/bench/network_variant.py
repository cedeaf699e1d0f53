"""One variant of a network, and the expected results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import optim
from alexnet_kernels.backends import use_backend
from alexnet_kernels.bench import baselines
from alexnet_kernels.bench.row import COMPILED, ONE_GRAPH, WITHOUT_MASTERS, capturable, is_ours
from alexnet_kernels.capture import CapturedForward, CapturedStep
from alexnet_kernels.models import PRESETS, AlexNet
from alexnet_kernels.nn import Dropout

HARDENED = "hardened"
"""The network of `baselines.hardened`, compiled with max-autotune. "hardened, compiled" is without autotuning."""


@dataclass(frozen=True)
class Network:
    """A preset, and the settings that it runs with."""

    preset: str
    batch: int
    purpose: str
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    compile: Collection[str] = ()  # of COMPILED, HARDENED, and "hardened, compiled"
    width: float = 1.0
    size: int | None = None  # image size; None: the preset's

    # Relative to the norm of the expected value, by dtype: every layer rounds activations and gradients.
    TOLERANCES: ClassVar[dict[torch.dtype, float]] = {torch.float32: 5e-3, torch.bfloat16: 0.05}

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        size = self.size or PRESETS[self.preset].input_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, size, size, generator=generator).to(device)
        labels = torch.randint(0, 1000, (self.batch,), generator=generator).to(device)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images, labels

    def model(self, device: torch.device) -> AlexNet:
        """The network with the same initial values on every call."""
        torch.manual_seed(0)
        model = AlexNet(preset=self.preset, width=self.width, device=device).train(self.purpose != "inference")
        for module in model.modules():
            if isinstance(module, Dropout):
                module.scale_at = "training"
            elif isinstance(module, nn.Conv2d | nn.Linear):  # keeps activations and gradients of order one
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


class NetVariant:
    """A network, run by one of the ways to compare. `replays`: its calls replay a CUDA graph of their own."""

    def __init__(self, row: Network, name: str, device: torch.device) -> None:
        self.row, self.device = row, device
        self.images, self.labels = row.inputs(device)
        ours = row.model(device)
        self.model: nn.Module = ours
        self.ours = is_ours(name)
        self.compiled = name in row.compile
        self.replays = name.endswith(ONE_GRAPH)
        self.primed = False
        self.pure = "pure bf16" in name
        self.backend = "triton" if name == "triton" else "auto" if self.ours else "native"
        self.session: Callable[[], Tensor] | None = None
        self.run: Callable[[Tensor], Tensor] = self.model
        if name in ("onnxruntime", "tensorrt"):
            images = self.images.to(row.dtype) if name == "tensorrt" else self.images
            self.session = getattr(baselines, name)(ours, images)
            return
        if self.pure:
            self.model, self.images = self.model.to(torch.bfloat16), self.images.to(torch.bfloat16)
            self.run = self.model
        if not self.ours:
            make: Callable[[AlexNet], nn.Module] = baselines.hardened if name.startswith(HARDENED) else baselines.stock
            if name == "torchvision":
                make = baselines.torchvision_alexnet
            self.model = make(ours)
            if row.channels_last:
                self.model = self.model.to(memory_format=torch.channels_last)
            self.run = self.model
        if self.compiled:
            named = {HARDENED: "compiled, max-autotune", f"{HARDENED}, compiled": "compiled"}
            options = COMPILED[named.get(name, name)]
            self.run = torch.compile(self.model, dynamic=False, fullgraph=True, **options)
        settings: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
        if self.ours:
            masters = False if name == WITHOUT_MASTERS else None
            settings["lr"] = capturable(settings["lr"], device)
            self.optimizer: torch.optim.Optimizer = optim.SGD(
                self.model.parameters(), rule="torch", master_weights=masters, **settings
            )
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **settings)
        if self.replays:
            if row.purpose == "inference":
                self.run = CapturedForward(self.model, capture=True)
            else:
                self.step = CapturedStep(self.model, self.optimizer, self._entropy, capture=True)

    def _mode(self) -> Any:
        if self.pure or self.row.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.row.dtype, True, False)

    def logits(self) -> Tensor:
        if self.session is not None:
            return self.session()
        with use_backend(self.backend), torch.no_grad(), self._mode():
            return self.run(self.images)

    def loss(self) -> Tensor:
        with self._mode():
            return self._entropy(self.run(self.images), self.labels)

    @staticmethod
    def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels)

    def call(self) -> None:
        if self.replays and not self.primed:
            self.primed = True
            for _ in range(4):  # the last one is captured
                self.call()
        if self.row.purpose == "inference":
            self.logits()
            return
        if self.replays:
            with use_backend(self.backend), self._mode():
                self.step(self.images, self.labels)
            return
        with use_backend(self.backend):
            loss = self.loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    def gradients(self, images: Tensor) -> list[Tensor]:
        """Of `NetExpectation.scalar`, without dropout."""
        training = self.model.training
        self.model.eval()
        with use_backend(self.backend), self._mode():
            out = self.model(images.to(self.images.dtype))
        with use_backend(self.backend):
            found = torch.autograd.grad(NetExpectation.scalar(out), list(self.model.parameters()))
        self.model.train(training)
        return list(found)


class NetExpectation:
    """Logits, or gradients, in float64, of the first images of a row.

    In half precision a rounding decides which of two nearly equal maxima of a pool gets the gradient: this package's
    may be no further from the definition than half as far again as torch.nn's, or the tolerance.
    """

    IMAGES = 2
    SLACK = 1.5
    LOSSES = 5  # with other masks each

    def __init__(self, row: Network, device: torch.device) -> None:
        self.row, self.device = row, device
        cpu = torch.device("cpu")
        exact = baselines.stock(row.model(device)).to(cpu, torch.float64).eval()
        self.images = row.inputs(cpu)[0][: self.IMAGES]
        self.gradients: list[Tensor] = []
        self.tolerances: list[float] = []
        with use_backend("native"):
            out = exact(self.images.double())
            self.logits = out.detach()
        if row.purpose != "inference":
            self.gradients = list(torch.autograd.grad(self.scalar(out), list(exact.parameters())))
            eager = NetVariant(row, "eager", device).gradients(self.images.to(device))
            for actual, expected in zip(eager, self.gradients, strict=True):
                self.tolerances.append(max(row.TOLERANCES[row.dtype], self.SLACK * _distance(actual, expected)))

    @staticmethod
    def scalar(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (wide * torch.linspace(-1, 1, wide.shape[1], dtype=wide.dtype, device=wide.device)).sum()

    @cached_property
    def loss(self) -> tuple[float, float]:
        """torch.nn's: mean and standard deviation over dropout's masks."""
        eager = NetVariant(self.row, "eager", self.device)
        with use_backend("native"):
            losses = torch.tensor([eager.loss().item() for _ in range(self.LOSSES)])
        return losses.mean().item(), losses.std().item()

    def problem(self, variant: NetVariant) -> str | None:
        if self.row.purpose == "inference":
            if variant.replays:
                variant.call()
            return _far(variant.logits()[: self.IMAGES], self.logits, self.row.TOLERANCES[self.row.dtype], "logits")
        if variant.compiled:  # for its own shapes and mode only, which draws dropout's masks
            with use_backend(variant.backend):
                loss = variant.loss().item()
            mean, spread = self.loss
            if abs(loss - mean) <= max(0.05 * mean, 5 * spread):
                return None
            return f"loss {loss:.3g}, expected {mean:.3g} ± {spread:.2g}"
        found = variant.gradients(self.images.to(variant.device))
        for i, (actual, expected, limit) in enumerate(zip(found, self.gradients, self.tolerances, strict=True)):
            if wrong := _far(actual, expected, limit, f"gradient of parameter {i}"):
                return wrong
        return None


def _distance(actual: Tensor, expected: Tensor) -> float:
    """As a part of the expected one's norm."""
    return ((actual.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def _far(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> str | None:
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    distance = _distance(actual, expected)
    return None if distance <= tolerance else f"{what}: off by {distance:.2g} of its norm"
