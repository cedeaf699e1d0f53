"""The protocol of a benchmark row, and its result."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from alexnet_kernels import backends
from alexnet_kernels.bench.timing import Failure, Timing

OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
WITHOUT_MASTERS = "auto, pure bf16, no masters"
ONE_GRAPH = ", one graph"
"""Ends the names of variants that replay the graph of `alexnet_kernels.capture`."""
OUR_NETS = ("auto", f"auto{ONE_GRAPH}", "auto, pure bf16", f"auto, pure bf16{ONE_GRAPH}", WITHOUT_MASTERS, "triton")
FUSED = "compiled by alexnet_kernels"
"""torch.compile with the backend of `alexnet_kernels.interop`."""
LPIPS_OURS = "LPIPS"
LPIPS_FUSED = "fused {}"
"""The package lpips or torchmetrics after `fuse`."""
DIRECTIONS = ("forward", "backward", "forward and backward", "step", "inference", "training step")
PURPOSES = DIRECTIONS[-2:]
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {},
    # The timing captures CUDA graphs itself.
    "compiled, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
"""Options of torch.compile, by variant."""


@dataclass
class Measurement:
    """One direction of a row."""

    nbytes: float
    """The fewest bytes that a call has to move."""
    operations: float
    cached: bool
    """Whether all inputs fit in the device's cache."""
    times: dict[str, Timing | Failure]
    """By variant."""
    layers: list[tuple[float, float]] | None = None
    """(bytes, operations) of each layer of a network."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bytes": self.nbytes,
            "operations": self.operations,
            "cached": self.cached,
            "times": {name: timing.to_json() for name, timing in self.times.items()},
        }
        return found if self.layers is None else found | {"layers": self.layers}


@dataclass
class RowResult:
    """The times of a row's variants. `wrong`, `errors` and `missing` hold reasons by variant."""

    op: str
    layer: str
    dtype: str
    batch: int
    wrong: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    """The smallest of a suite's tolerances at which a variant agrees with eager."""
    directions: dict[str, Measurement] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One dict of the fields and the directions."""
        found = {name: value for name, value in vars(self).items() if name != "directions"}
        return found | {direction: measured.to_json() for direction, measured in self.directions.items()}


class Row(Protocol):
    """An op at a layer, the optimizer's step, or a network, timed by this package and by baselines.

    A row first compares its variants with the definition in float64, then times the correct ones in interleaved
    rounds in one process.
    """

    @property
    def name(self) -> str: ...

    @property
    def directions(self) -> Sequence[str]: ...

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is among the variants."""
        ...

    def variants(self, device: torch.device) -> list[str]:
        """The variants available on the device, barring errors."""
        ...

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> RowResult:
        """Measures the row for about `seconds`, all variants together, and at most `rounds` rounds.

        `skip`: variants, as "ROW by VARIANT", after which the device was lost before.
        """
        ...


def is_ours(variant: str) -> bool:
    """Whether the variant is this package's; the others are baselines."""
    names = "cpu", "cuda", FUSED, LPIPS_OURS, *OUR_NETS
    return variant in names or variant.startswith(("cuda, ", LPIPS_FUSED.format("")))


def our_backends(op: str, device: torch.device) -> dict[str, str | None]:
    """This package's backends for the device, each with the reason if the op lacks it, else None."""
    return {backend: backends.unavailable(op, backend) for backend in OURS[device.type]}


def prefixed(label: str, name: str) -> str:
    return f"{label}: {name}" if label else name


def capturable(lr: float, device: torch.device) -> float | torch.Tensor:
    """The learning rate in a form that CUDA graphs can capture."""
    return torch.tensor(lr, device=device) if device.type == "cuda" else lr
