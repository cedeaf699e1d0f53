"""How the keys, shapes and dtypes of weights differ from those of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, shortened

__all__ = ["Difference", "check_dtypes", "difference", "listed"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SHOWN = 4


def listed(keys: Sequence[str]) -> str:
    """The first keys and how many more there are, for messages."""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(shortened, keys[:_SHOWN])) + more


@dataclass(frozen=True)
class Difference:
    """The keys of a state_dict that do not fit. As a string: a line of them; false if there are none."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]
    """Keys of another shape."""
    shapes: list[str]
    """The keys of `wrong` with their shapes and those of the network, for messages."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.shapes))
        return "; ".join(f"{kind} {listed(keys)}" for kind, keys in kinds if keys)


def difference(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> Difference:
    """How the state_dict differs from the keys and shapes of a network's."""
    wrong = [key for key, shape in expected.items() if key in state and state[key].shape != shape]
    return Difference(
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected],
        wrong=wrong,
        shapes=[f"{key} {tuple(state[key].shape)} for {tuple(expected[key])}" for key in wrong],
    )


def check_dtypes(state: Mapping[str, Tensor], name: str) -> None:
    """Raise InputError for a dtype that weights can't have."""
    for key, value in state.items():
        counts = key.endswith("num_batches_tracked") and value.dtype == torch.int64
        if value.dtype not in _FLOATS and not counts:
            raise InputError(f"{name} holds {shortened(key)} in {value.dtype}, which weights can't have")
