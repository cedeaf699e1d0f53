"""The row of a whole network: inference or a training step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from alexnet_kernels import backends
from alexnet_kernels.bench import baselines, roofline
from alexnet_kernels.bench.network_variant import NetExpectation, NetVariant, Network
from alexnet_kernels.bench.row import ONE_GRAPH, SHORT, WITHOUT_MASTERS, Measurement, RowResult, prefixed
from alexnet_kernels.bench.timing import Call, guarded, measure
from alexnet_kernels.op_info.sgd_step import NBYTES

SPIN = 0.1  # seconds; threads of ONNX Runtime spin for less than this after a run


@dataclass(frozen=True)
class NetRow(Network):
    """A preset's inference, or its training step: forward, loss, backward and optimizer.

    bfloat16 rows run under autocast with float32 parameters; variants "pure bf16" have bfloat16 parameters. Dropout
    scales at training in every variant, so that all compute the same function.
    """

    more: Collection[str] = ()  # "hardened, eager"
    label: str = ""  # distinguishes rows of the same network

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else ", NCHW"
        network = prefixed(self.label, f"{self.preset}, {SHORT[self.dtype]}{layout}")
        return f"{network}, batch {self.batch}, {self.purpose}"

    @property
    def directions(self) -> Sequence[str]:
        return (self.purpose,)

    @property
    def compiles(self) -> bool:
        return bool(self.compile)

    def _known(self, device: torch.device) -> dict[str, str | None]:
        """The row's variants, each with the reason if it is missing on this machine, else None."""
        bf16, cuda = self.dtype == torch.bfloat16, device.type == "cuda"
        found: dict[str, str | None] = {"auto": None}
        if cuda:
            found[f"auto{ONE_GRAPH}"] = None
            found["triton"] = backends.unavailable("max_pool2d", "triton")
        if bf16:
            found["auto, pure bf16"] = None
            if cuda:
                found[f"auto, pure bf16{ONE_GRAPH}"] = None
        found |= dict.fromkeys(("eager", *self.more, *self.compile))
        if bf16:
            found["eager, pure bf16"] = None
            if self.purpose != "inference":
                found[WITHOUT_MASTERS] = None
        if self.preset == "torchvision" and self.width == 1:
            found["torchvision"] = baselines.missing("torchvision")
        if self.purpose == "inference" and (cuda or not bf16):
            session = "tensorrt" if cuda else "onnxruntime"
            found[session] = baselines.missing(session) or baselines.missing("onnx")
        return found

    def variants(self, device: torch.device) -> list[str]:
        return [name for name, reason in self._known(device).items() if not reason]

    def time(
        self,
        device: torch.device,
        *,
        seconds: float = 4.0,
        rounds: int = 10,
        skip: Collection[str] = (),
    ) -> RowResult:
        result = RowResult("net", self.preset, SHORT[self.dtype], self.batch)
        result.missing = {name: reason for name, reason in self._known(device).items() if reason}
        if "torch._dynamo" in sys.modules:  # releases what earlier rows compiled
            torch._dynamo.reset()
        expected = NetExpectation(self, device)
        calls: dict[str, list[Call]] = {}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            if name == WITHOUT_MASTERS and "eager, pure bf16" not in calls:  # the matching baseline is missing
                continue
            with guarded(name, device, result.errors):
                variant = NetVariant(self, name, device)
                if problem := expected.problem(variant):
                    result.wrong[name] = problem
                else:
                    calls[name] = [variant.call]
        training = self.purpose != "inference"
        works = roofline.network(self.preset, self.dtype, self.width, self.size).values()
        # Per layer, since each has its own bottleneck.
        layers = [(work.moved(self.batch, training), work.done(self.batch, training)) for work in works]
        if training:
            layers.append((NBYTES * roofline.parameters(self.preset, self.width), 0))
        pause = SPIN if "onnxruntime" in calls else 0
        replayed = [name for name in calls if name.endswith(ONE_GRAPH)]
        times = measure(calls, device, seconds=seconds, rounds=rounds, pause=pause, replayed=replayed)
        nbytes, operations = (sum(layer[i] for layer in layers) for i in (0, 1))
        result.directions[self.purpose] = Measurement(nbytes, operations, False, times, layers)
        del calls, expected
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result
