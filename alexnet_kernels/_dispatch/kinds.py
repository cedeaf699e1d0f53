"""Kinds of calls, and the rows of a table that names an implementation for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CONVOLUTION = "conv2d_relu"
FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, BOTH = "forward", "backward_input", "backward_weight", "both"
GRADIENTS = ("library", "own", "mma", "wgmma", "split", "triton")
"""What computes a gradient of a convolution. The first four have the numbers of the operators' algorithms."""
_CONVOLUTIONS = ("library", "split", "space_to_depth", "own", "mma", "wgmma", "triton")
"""What computes a convolution, in the order in which candidates are measured."""
_OF_GRADIENTS = tuple(name for name in _CONVOLUTIONS if name in GRADIENTS)
_OF_DIRECTIONS = {FORWARD: _CONVOLUTIONS, BACKWARD_INPUT: _OF_GRADIENTS, BACKWARD_WEIGHT: _OF_GRADIENTS}
_ON_CPU = ("library", "space_to_depth")
_OTHERS = {BOTH: ("cuda", "triton")}

FORMATS = ("channels_last", "contiguous")
DTYPES = ("bfloat16", "float16", "float32", "uint8")
CONVOLUTION_SHAPE = (
    "filters",
    "channels",
    "kernel_height",
    "kernel_width",
    "stride_height",
    "stride_width",
    "groups",
    "rows",
    "epilogue",
)
"""filters, channels: of a group. rows: of the implicit product, images times output pixels, a power of two. epilogue:
1 if bias or ReLU are part of the call."""
OTHER_SHAPE = ("elements",)
"""elements: of the input, a power of two."""
MOST = 1 << 40
"""The largest number in a shape."""
FAR = 2.0
"""Rows at a larger distance from a call say nothing of it."""


class Kind(NamedTuple):
    """A class of calls.

    op: a public op; `direction` is "forward", "backward_input" or "backward_weight" of a convolution, and "both",
        forward and backward together, of every other op, whose implementations keep different tensors for backward.
    device: "cpu", or a GPU's compute capability, such as "9.0".
    dtype: in which the call computes.
    format: the input's memory format.
    shape: numbers, in the order of `shape_names`.
    """

    op: str
    direction: str
    device: str
    dtype: str
    format: str
    shape: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(shape_names(self.op), self.shape, strict=True))


def shape_names(op: str) -> tuple[str, ...]:
    return CONVOLUTION_SHAPE if op == CONVOLUTION else OTHER_SHAPE


def names_of(op: str, direction: str, device: str) -> tuple[str, ...]:
    """The implementations that a table may name; none for a direction that the op does not have."""
    if op != CONVOLUTION:
        return () if device == "cpu" else _OTHERS.get(direction, ())
    if device == "cpu":
        return _ON_CPU if direction == FORWARD else ()
    return _OF_DIRECTIONS.get(direction, ())


def power_of_two(number: int) -> int:
    """The nearest, in octaves."""
    return 1 << round(math.log2(max(1, number)))


def distance(a: Kind, b: Kind) -> float | None:
    """How far two kinds are apart, in octaves; None where they have nothing in common.

    They must agree in everything but the shape, strides, whether there are groups, and epilogue. Filters, channels and
    taps count in full, the rows of a product, or an op's elements, by half: a factor of 4 in the batch is 1.
    """
    if a[:-1] != b[:-1]:
        return None
    if a.op != CONVOLUTION:
        return _octaves(a.shape[0], b.shape[0]) / 2
    x, y = a.sizes, b.sizes
    if any(x[name] != y[name] for name in ("stride_height", "stride_width", "epilogue")):
        return None
    if (x["groups"] > 1) != (y["groups"] > 1):
        return None
    taps = (sizes["kernel_height"] * sizes["kernel_width"] for sizes in (x, y))
    whole = _octaves(x["filters"], y["filters"]) + _octaves(x["channels"], y["channels"]) + _octaves(*taps)
    return whole + _octaves(x["rows"], y["rows"]) / 2


def _octaves(a: int, b: int) -> float:
    return abs(math.log2(max(1, a)) - math.log2(max(1, b)))


@dataclass(frozen=True)
class Row:
    """What a measurement found for a kind of calls.

    name: the implementation.
    source: "measured" for the package's rows, "tuned" for the user's.
    times: microseconds, by implementation and pass.
    note: where the times are from, and what they hold.
    """

    kind: Kind
    name: str
    source: str
    times: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        kind = self.kind._asdict() | {"shape": self.kind.sizes}
        return {**kind, "name": self.name, "times": {k: dict(v) for k, v in self.times.items()}, "note": self.note}


def nearest(kind: Kind, rows: Iterable[Row]) -> Row | None:
    """The row of the nearest kind, of equally near ones the first; None if none is near."""
    best, least = None, math.inf
    for row in rows:
        apart = distance(kind, row.kind)
        if apart is not None and apart <= FAR and apart < least:
            best, least = row, apart
    return best
