"""Tells initial values from trained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alexnet_kernels.models.formats.state import LAYERS

__all__ = ["untrained_layers", "untrained_note"]

_SAMPLE = 1_000_000
"""Elements of a layer that moments are taken of, about."""
_SIGMAS = 6.0
"""Sampling errors that a moment of initial values may differ from its expectation by."""


@torch.no_grad()
def untrained_layers(model: nn.Module) -> list[str]:
    """Names (conv1-conv5, fc6-fc8; state_dict names for another model) of the layers that hold initial values.

    A layer is named if its weights and biases are what an initialization draws: by mean, standard deviation and fourth
    moment within 6 sampling errors, and by range.

    - torch's default: weights and biases uniform in +- 1 / sqrt(fan-in), with none outside.
    - the model's preset, He's and Xavier's: normal weights (Xavier's also uniform), biases that are all one number.
    - constant weights.

    Training moves biases off one number and weights out of the bound, so that a trained layer is not named, unless it
    was trained so little that its values are still the initial ones in every respect above.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    known = len(layers) == len(LAYERS)
    stds = _preset_stds(model) if known else None
    found = []
    for i, (name, layer) in enumerate(layers):
        if _is_initial(layer, None if stds is None else stds[i]):
            found.append(LAYERS[i] if known else name)
    return found


def untrained_note(layers: Sequence[str]) -> str:
    """A line for the user; empty if no layer is untrained."""
    if not layers:
        return ""
    if list(layers) == ["fc8"]:
        return "fc8 holds initial values: the last layer is untrained, as after replacing it for fine-tuning"
    if list(layers) == list(LAYERS):
        return "all layers hold initial values: the weights are untrained"
    return f"{', '.join(layers)} hold{'s' * (len(layers) == 1)} initial values: untrained"


def _preset_stds(model: nn.Module) -> tuple[float, ...] | None:
    initialization = getattr(getattr(model, "_spec", None), "initialization", None)
    return None if initialization is None else initialization.weight_std


def _is_initial(layer: nn.Conv2d | nn.Linear, preset_std: float | None) -> bool:
    weight, bias = layer.weight, layer.bias
    if weight.is_meta or weight.numel() < 2:
        return False
    low, high = (float(x) for x in weight.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return False
    values = weight.detach().flatten()
    values = values[:: max(1, values.numel() // _SAMPLE)].float()
    one = bias is None or bool((bias == bias.flatten()[0]).all())
    if low == high:
        return one
    found = _Moments(values, low, high, torch.finfo(weight.dtype).eps)
    fan_in = weight[0].numel()
    fan_out = weight.shape[0] * weight[0, 0].numel()
    default = 1 / math.sqrt(fan_in)
    if found.uniform(default):
        return bias is None or one or bool((bias.abs() <= default * (1 + found.rounding)).all())
    if not one:
        return False
    xavier = math.sqrt(2 / (fan_in + fan_out))
    stds = [math.sqrt(2 / fan_in), xavier, *([] if preset_std is None else [preset_std])]
    return any(map(found.normal, stds)) or found.uniform(math.sqrt(3) * xavier)


class _Moments:
    """Moments and range of values that were rounded to a relative precision of `rounding`."""

    def __init__(self, values: Tensor, low: float, high: float, rounding: float) -> None:
        spread, mean = torch.std_mean(values, correction=0)
        self.count, self.mean, self.spread = values.numel(), float(mean), float(spread)
        self.fourth = float((values - mean).pow_(4).mean())
        self.largest, self.rounding = max(-low, high), rounding

    def uniform(self, bound: float) -> bool:
        """Whether they are those of a uniform distribution in +- bound."""
        # The kurtosis is 9 / 5, and the variance of x^4 is bound^8 (1 / 9 - 1 / 25).
        std, root = bound / math.sqrt(3), math.sqrt(self.count)
        return (
            self.largest <= bound * (1 + self.rounding)
            and self._near(self.mean, 0, std / root, std)
            and self._near(self.spread, std, std * math.sqrt(0.2) / root, std)
            and self._near(self.fourth, bound**4 / 5, bound**4 * math.sqrt(1 / 9 - 1 / 25) / root, bound**4 / 5)
        )

    def normal(self, std: float) -> bool:
        """Whether they are those of a normal distribution."""
        # The variance of x^4 is 96 std^8.
        root = math.sqrt(self.count)
        return (
            self._near(self.mean, 0, std / root, std)
            and self._near(self.spread, std, std / math.sqrt(2) / root, std)
            and self._near(self.fourth, 3 * std**4, std**4 * math.sqrt(96) / root, 3 * std**4)
        )

    def _near(self, value: float, expected: float, error: float, scale: float) -> bool:
        # Values that are drawn in a narrow dtype are all rounded in one direction.
        return abs(value - expected) <= _SIGMAS * error + 4 * self.rounding * scale
