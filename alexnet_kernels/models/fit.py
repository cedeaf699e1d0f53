"""Which AlexNet weights belong to, by the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.models.alexnet import AlexNet
from alexnet_kernels.models.formats import FileWeights
from alexnet_kernels.models.formats.state import LAYERS
from alexnet_kernels.models.keys import check_dtypes, difference, listed
from alexnet_kernels.models.presets import PRESETS, Preset

__all__ = ["Fit", "fits_of", "load_state", "network_of", "not_finite", "state_of"]


@dataclass(frozen=True)
class Fit:
    """A network that weights fit."""

    preset: Preset
    width: float
    num_classes: int
    in_channels: int

    def __str__(self) -> str:
        other = f", width={self.width:g}" if self.width != 1 else ""
        other += f", in_channels={self.in_channels}" if self.in_channels != 3 else ""
        return f"preset={self.preset.name!r}{other}"


def network_of(found: FileWeights, **given: Any) -> dict[str, Any]:
    """The arguments of `AlexNet`: those given, or else those that the file states; preset torchvision by default."""
    return {"preset": found.preset or "torchvision", **found.arguments, **given}


def fits_of(tensors: Mapping[str, Tensor], **arguments: Any) -> list[Fit]:
    """The presets that tensors fit, at the width that their shapes tell. arguments: others of `AlexNet`."""
    found = []
    for preset in PRESETS.values():
        fit = _fit(tensors, preset, arguments)
        if fit is not None:
            found.append(fit)
    return found


def _fit(tensors: Mapping[str, Tensor], preset: Preset, arguments: Mapping[str, Any]) -> Fit | None:
    layers = _layer_shapes(tensors)
    if len(layers) != 8 or len(layers[0]) != 4 or len(layers[7]) != 2:
        return None
    width = _width(preset, [shape[0] for shape in layers[:7]])
    if width is None:
        return None
    fit = Fit(preset, width, layers[7][0], layers[0][1])
    kwargs = {**arguments, "preset": preset, "width": width, "num_classes": fit.num_classes}
    expected = shapes(**{**kwargs, "in_channels": fit.in_channels})
    given = {key: value.shape for key, value in state_of(tensors, expected).items()}
    return fit if given == expected else None


def _layer_shapes(tensors: Mapping[str, Tensor]) -> list[torch.Size]:
    """Shapes of the weights of conv1-conv5, fc6-fc8, or fewer."""
    if "conv1.weight" in tensors:
        return [tensors[key].shape for key in (f"{layer}.weight" for layer in LAYERS) if key in tensors]
    keys = sorted((key for key in tensors if key.endswith(".weight") and tensors[key].dim() > 1), key=_place)
    return [tensors[key].shape for key in keys]


def _place(key: str) -> tuple[bool, int]:
    part, place = [*key.split("."), "", ""][:2]
    return part == "classifier", int(place) if place.isdecimal() else -1


def _width(preset: Preset, counts: list[int]) -> float | None:
    """The width that gives these numbers of filters and neurons, with as few digits as possible; None if none does."""
    multiple = 8 * preset.groups
    low, high = 0.0, float("inf")
    for count, usual in zip(counts, (*preset.filters, preset.neurons, preset.neurons), strict=True):
        if count % multiple:
            return None
        steps = count // multiple
        low = max(low, (steps - 0.5) * multiple / usual if steps > 1 else 0.0)
        high = min(high, (steps + 0.5) * multiple / usual)
    if low > high:
        return None
    if low <= 1 <= high:
        return 1.0
    middle = (low + high) / 2
    for digits in range(1, 12):
        width = round(middle, digits)
        if low < width < high:
            return width
    return middle


def shapes(**kwargs: Any) -> dict[str, torch.Size]:
    """Shapes of the state_dict of AlexNet(**kwargs)."""
    return {key: value.shape for key, value in AlexNet(**{**kwargs, "device": "meta"}).state_dict().items()}


def state_of(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors by the keys of a state_dict, where they are named by layers."""
    if "conv1.weight" not in tensors:
        return dict(tensors)
    names: dict[str, str] = {}
    layers = iter(LAYERS)
    layer = ""
    for key, shape in expected.items():
        part = key.rpartition(".")[2]
        if part == "weight":
            layer = next(layers, "") if len(shape) > 1 else layer.replace("conv", "bn")
        names[f"{layer}.{part}"] = key
    state = {names.get(key, key): value for key, value in tensors.items()}
    for key, shape in expected.items():
        # Other frameworks do not count batches.
        if key.endswith("num_batches_tracked") and key not in state:
            state[key] = torch.zeros(shape, dtype=torch.int64)
    return state


def load_state(found: FileWeights, name: str, kwargs: dict[str, Any], strict: bool) -> dict[str, Tensor]:
    """The state_dict for AlexNet(**kwargs). Sets num_classes in `kwargs`, to that of the weights, if it is missing.

    Raises InputError for weights that do not fit, or of dtypes that weights can't have.
    """
    expected = shapes(**kwargs)
    state = state_of(found.tensors, expected)
    last = list(expected)[-2]
    if "num_classes" not in kwargs and last in state and state[last].dim() == 2:
        kwargs["num_classes"] = state[last].shape[0]
        expected = shapes(**kwargs)
    check_dtypes(state, name)
    differs = difference(state, expected)
    if not differs:
        return state
    hint = ""
    only_features = differs.missing == [key for key in expected if key.startswith("classifier.")]
    if only_features and not differs.unexpected and not differs.wrong:
        if not strict:
            return state
        hint = "; strict=False takes the features and leaves the classifier untrained"
    chosen = ("preset", "width", "num_classes", "in_channels", "device", "dtype")
    fits = fits_of(found.tensors, **{key: value for key, value in kwargs.items() if key not in chosen})
    if fits:
        hint = f"; they fit {' or '.join(map(str, fits))}"
        if not differs.missing and not differs.unexpected and differs.wrong == list(expected)[-2:]:
            hint = f"; they have {fits[0].num_classes} classes"
    preset = kwargs["preset"]
    label = preset.name if isinstance(preset, Preset) else preset
    raise InputError(f"{name} does not fit preset {label!r}: {differs}{hint}")


def not_finite(state: Mapping[str, Tensor]) -> str:
    """A line for the user if values are NaN or infinite, else empty."""
    keys = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    return f"NaN or infinity in {listed(keys)}" if keys else ""
