"""Whether a run learns, and if not, what its figures say about the cause."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Movement", "hint", "learns"]

_MARGIN = 0.02
"""The part of ln(classes) within which a loss is that of guessing."""
_DECAY_ONLY = 2.0
"""A layer whose weights' last step is below this many times that of weight decay has practically no gradient."""
_LEAST_STEP = 1e-6
"""The same without weight decay: the last step as a part of the weights."""


class Movement(NamedTuple):
    """The last step of a layer's weights, as parts of them: the whole, and what weight decay alone would make."""

    layer: str
    ratio: float
    decay: float

    @property
    def still(self) -> bool:
        return not self.ratio > max(_DECAY_ONLY * self.decay, _LEAST_STEP)


def learns(loss: float, classes: int) -> bool:
    """Whether an epoch's mean training loss is lower than that of guessing, ln(classes)."""
    return not loss >= (1 - _MARGIN) * math.log(classes)


def hint(loss: float, classes: int, layers: Sequence[Movement], he: bool = False) -> str:
    """What to try where a network does not learn.

    Args:
        loss, classes: those of `learns`.
        layers: every layer with weights, from the input to the output; empty if unknown.
        he: whether the initial weights were He's.
    """
    guessing = math.log(classes)
    above = loss > (1 + _MARGIN) * guessing
    found = f"not learning: the loss is {'above ' if above else ''}that of guessing, ln({classes}) = {guessing:.3f}"
    still = [layer.still for layer in layers]
    reached = still.index(False) if False in still else len(still)
    names = f"{layers[0].layer} to {layers[reached - 1].layer}" if reached > 1 else layers[0].layer if reached else ""
    if layers and reached == len(layers):
        # Without gradients even in the last layer, whose input must then be zero.
        cause = "all units are dead, weight decay alone moves the weights: try a lower --lr"
    elif reached:
        cause = f"no gradients reach {names}: try {'' if he else '--init he, or '}a lower --lr if units have died"
    else:
        cause = "try a lower --lr" if above else f"try another --lr{'' if he else ', or --init he'}"
    return f"{found}; {cause}"
