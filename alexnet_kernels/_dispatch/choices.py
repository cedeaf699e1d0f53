"""Which algorithm of an operator backend "auto" takes, by kind of call."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A row of the table: the calls that it is about, and their algorithm. None means any.

    direction: "forward" or "backward".
    capabilities: compute capabilities, (9, 0) for an H100.
    shapes: whether the operator's other arguments, which it gets by name, are of the row's class.
    measured: whether a measurement on such a device found the algorithm to be the fastest.
    """

    op: str
    direction: str
    algorithm: int
    measured: bool
    dtypes: Collection[torch.dtype] | None = None
    capabilities: Collection[tuple[int, int]] | None = None
    shapes: Callable[..., bool] | None = None

    def matches(self, op: str, direction: str, input: Tensor, dtype: torch.dtype, arguments: dict[str, Any]) -> bool:
        return (
            (self.op, self.direction) == (op, direction)
            and (self.dtypes is None or dtype in self.dtypes)
            and (self.capabilities is None or torch.cuda.get_device_capability(input.device) in self.capabilities)
            and (self.shapes is None or self.shapes(**arguments))
        )


CHOICES: tuple[Choice, ...] = (
    # torch's convolution, until a GPU has measured the package's own.
    Choice("conv2d_relu", "forward", algorithm=0, measured=False),
)
"""The first row that matches counts."""


def choose(op: str, direction: str, input: Tensor, dtype: torch.dtype, **arguments: Any) -> int:
    """The algorithm for a call on `input` that computes in `dtype`; 0 where no row matches."""
    for choice in CHOICES:
        if choice.matches(op, direction, input, dtype, arguments):
            return choice.algorithm
    return 0
