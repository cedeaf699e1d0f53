"""The description of an AlexNet as plain values, as in config.json, and the check that it describes a model."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels._version import __version__
from alexnet_kernels.models.formats.file_weights import Preprocessing
from alexnet_kernels.models.keys import listed
from alexnet_kernels.models.presets import PRESETS, Initialization, Pool, Preset, ResponseNorm
from alexnet_kernels.nn import Dropout

__all__ = ["ARGUMENTS", "Description", "config_of", "description_of"]

ARGUMENTS = ("num_classes", "preset", "dropout", "width", "in_channels", "conv1_padding")
"""The arguments of `AlexNet` that a config holds."""
_VERSION = "alexnet_kernels"
_KEYS = (_VERSION, *ARGUMENTS, "classes", "preprocessing")

_MOST = 1 << 20
"""The largest count of classes, channels, filters or neurons that a config may have."""
_MOST_LAYERS = 16
"""The most layers that a preset of a config may have between two convolutions."""
_MOST_SIDE = 4096
"""Pixels of the largest mean image's side."""


@dataclass(frozen=True)
class Description:
    """What a config says."""

    arguments: dict[str, Any]
    """Of `AlexNet`: `ARGUMENTS`."""
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None


def config_of(model: Any) -> dict[str, Any]:
    """The description of an `AlexNet` in values that JSON has; `model_of` is the inverse.

    Its keys: preset, a name of `PRESETS` or the `Preset`'s fields; num_classes, dropout, width, in_channels and
    conv1_padding, the arguments of `AlexNet`; classes and preprocessing, the model's attributes; alexnet_kernels, the
    version that wrote it. A last layer with another number of outputs, a first one with another number of inputs and
    another dropout probability are described as they are.

    Raises InputError for a model with other layers than `AlexNet` builds of these arguments, or of another shape.
    """
    built = getattr(model, "_built", None)
    if built is None:
        raise InputError(
            f"{type(model).__name__} is no AlexNet of this version, and can't be described: load its state_dict "
            "into a new AlexNet"
        )
    convolution = next((m for m in model.features.children() if type(m) is nn.Conv2d), None)
    last = ([*model.classifier.children()] or [None])[-1]
    drops = {m.p for m in model.classifier.children() if type(m) in (nn.Dropout, Dropout)}
    spec, classes = model._spec, model.classes
    arguments = {
        "num_classes": last.out_features if type(last) is nn.Linear else built["num_classes"],
        "preset": spec,
        "dropout": drops.pop() if len(drops) == 1 else built["dropout"],
        "width": built["width"],
        "in_channels": convolution.in_channels if convolution is not None else built["in_channels"],
        "conv1_padding": built["conv1_padding"],
    }
    _check_layers(model, arguments)
    if classes is not None and len(classes) != arguments["num_classes"]:
        raise InputError(
            f"model.classes names {len(classes)} classes, the last layer has {arguments['num_classes']} outputs: "
            "set classes to their names, or None"
        )
    config = {
        **arguments,
        "preset": spec.name if PRESETS.get(spec.name) == spec else asdict(spec),
        "classes": None if classes is None else [str(name) for name in classes],
        "preprocessing": _preprocessing_values(model.preprocessing),
        _VERSION: __version__,
    }
    description_of(config)  # what can't be read isn't written
    return config


def _check_layers(model: Any, arguments: Mapping[str, Any]) -> None:
    skeleton = model._blank(**arguments, device="meta")
    theirs, ours = dict(model.named_modules()), dict(skeleton.named_modules())
    for name in {**ours, **theirs}:
        if name and not _alike(theirs.get(name), ours.get(name)):
            own = f"{name} is {_shown(theirs[name])}" if name in theirs else f"{name} is missing"
            usual = f"has {_shown(ours[name])} there" if name in ours else "has no layer there"
            raise InputError(
                f"this model is not what AlexNet builds: {own}, preset {model.preset!r} {usual}. "
                "A config can't describe it: save its state_dict, and the code that changes the layers"
            )
    found, expected = model.state_dict(), skeleton.state_dict()
    for key in {**expected, **found}:
        shapes = [tuple(state[key].shape) if key in state else None for state in (found, expected)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"this model is not what AlexNet builds: {key} has the shape {shapes[0]}, not {shapes[1]}. "
                "A config can't describe it"
            )


def _alike(one: nn.Module | None, other: nn.Module | None) -> bool:
    if one is None or other is None:
        return False
    if isinstance(other, nn.Sequential):
        return isinstance(one, nn.Sequential)
    # A ReLU computes the same in place.
    return type(one) is type(other) and (type(one) is nn.ReLU or one.extra_repr() == other.extra_repr())


def _shown(module: nn.Module) -> str:
    return shortened(" ".join(repr(module).split()))


def description_of(config: Any) -> Description:
    """The description that a config holds. Nothing is allocated but what it holds itself. InputError if it is none."""
    if not isinstance(config, Mapping):
        raise InputError(f"the config is {_kind(config)}, not an object")
    version = config.get(_VERSION)
    if unknown := [key for key in config if key not in _KEYS]:
        by = f"it was written by version {shortened(version)}, this is {__version__}" if version else "it is another's"
        raise InputError(f"the config has the unknown keys {listed(unknown)}: {by}")
    if "preset" not in config:
        raise InputError("the config names no preset: it was not written by AlexNet.save_pretrained")
    preset = _preset(config["preset"])
    num_classes = _count("num_classes", config.get("num_classes", 1000))
    width = _number("width", config.get("width", 1.0))
    if not 0 < width * max(*preset.filters, preset.neurons) <= _MOST:
        raise InputError(f"the config's width {width:g} is not a factor that gives 1 to {_MOST:,} filters and neurons")
    dropout = _number("dropout", config.get("dropout", 0.5))
    if not 0 <= dropout <= 1:
        raise InputError(f"the config's dropout {dropout:g} is not in [0, 1]")
    padding = config.get("conv1_padding")
    arguments = {
        "num_classes": num_classes,
        "preset": preset,
        "dropout": dropout,
        "width": width,
        "in_channels": _count("in_channels", config.get("in_channels", 3)),
        "conv1_padding": None if padding is None else _padding(padding),
    }
    return Description(arguments, _classes(config.get("classes"), num_classes), _preprocessing(config))


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _count(name: str, value: Any, least: int = 1, most: int = _MOST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"the config's {name} {shortened(value)} is not a whole number from {least} to {most:,}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise InputError(f"the config's {name} {shortened(value)} is not a finite number")
    return value


def _text(name: str, value: Any, *allowed: str) -> str:
    if not isinstance(value, str) or (allowed and value not in allowed):
        raise InputError(f"the config's {name} {shortened(value)} is not {' or '.join(allowed) or 'a text'}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"the config's {name} {shortened(value)} is not true or false")
    return value


def _list(name: str, value: Any, length: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) != length:
        raise InputError(f"the config's {name} is not a list of {length}")
    return value


def _padding(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, list | tuple):
        return tuple(_count("conv1_padding", side, 0) for side in _list("conv1_padding", value, 4))
    return _count("conv1_padding", value, 0)


def _known(name: str, kind: type, values: Any) -> Mapping[str, Any]:
    """The object, with a value for each field of the dataclass."""
    if not isinstance(values, Mapping):
        raise InputError(f"the config's {name} is {_kind(values)}, not an object")
    names = [field.name for field in fields(kind)]
    if unknown := [key for key in values if key not in names]:
        raise InputError(f"the config's {name} has the unknown keys {listed(unknown)}")
    defaults = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    if missing := [key for key in names if key not in values and key not in defaults]:
        raise InputError(f"the config's {name} has no {listed(missing)}")
    return {**defaults, **values}


def _preset(value: Any) -> Preset:
    if isinstance(value, Preset):
        value = asdict(value)
    if isinstance(value, str):
        if value not in PRESETS:
            raise InputError(f"the config's preset {shortened(value)} is none of {', '.join(PRESETS)}")
        return PRESETS[value]
    given = _known("preset", Preset, value)
    layers = tuple(_text("layers", text) for text in _list("layers", given["layers"], 5))
    if longest := next((text for text in layers if len(text.split()) > _MOST_LAYERS), None):
        raise InputError(f"the config's layers {shortened(longest)} are more than {_MOST_LAYERS}")
    filters = tuple(_count("filters", count) for count in _list("filters", given["filters"], 5))
    groups = _count("groups", given["groups"])
    if 8 * groups > _MOST:
        raise InputError(f"the config's groups {groups} are more than {_MOST // 8:,}")
    return Preset(
        name=shortened(_text("preset's name", given["name"])),
        source=_text("source", given["source"]),
        input_size=_count("input_size", given["input_size"]),
        conv1_padding=cast(Any, _padding(given["conv1_padding"])),
        filters=cast(Any, filters),
        groups=groups,
        layers=cast(Any, layers),
        pools=tuple(None if pool is None else _pool(pool) for pool in _list("pools", given["pools"], 5)),
        norm=_norm("norm", given["norm"]),
        map_norm=_norm("map_norm", given["map_norm"]),
        dropout_on=_text("dropout_on", given["dropout_on"], "outputs", "inputs"),
        dropout_scale_at=_text("dropout_scale_at", given["dropout_scale_at"], "inference", "training"),
        initialization=_initialization(given["initialization"]),
        inplace_relu=_flag("inplace_relu", given["inplace_relu"]),
        activation=_text("activation", given["activation"], "relu", "tanh"),
        neurons=_count("neurons", given["neurons"]),
    )


def _pool(value: Any) -> Pool:
    given = _known("pool", Pool, value)
    kernel_size, stride = (_count(name, given[name], most=_MOST_SIDE) for name in ("kernel_size", "stride"))
    return Pool(kernel_size, stride, _flag("ceil_mode", given["ceil_mode"]))


def _norm(name: str, value: Any) -> ResponseNorm | None:
    if value is None:
        return None
    given = _known(name, ResponseNorm, value)
    size, towers = (_count(f"{name}'s {key}", given[key], most=_MOST_SIDE) for key in ("size", "towers"))
    alpha, beta, k = (_number(f"{name}'s {key}", given[key]) for key in ("alpha", "beta", "k"))
    return ResponseNorm(size, alpha, beta, k, towers)


def _initialization(value: Any) -> Initialization | None:
    if value is None:
        return None
    given = _known("initialization", Initialization, value)
    weight_std, bias = (
        None if given[key] is None else tuple(_number(key, number) for number in _list(key, given[key], 8))
        for key in ("weight_std", "bias")
    )
    if bias is None:
        raise InputError("the config's bias is null, not a list of 8")
    return Initialization(weight_std, bias)


def _classes(value: Any, num_classes: int) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InputError("the config's classes are not a list of names")
    if len(value) != num_classes:
        raise InputError(f"the config names {len(value)} classes, the network has {num_classes}")
    return tuple(value)


def _preprocessing_values(value: Preprocessing | None) -> dict[str, Any] | None:
    if value is None:
        return None
    mean, std = value.mean.float().cpu(), value.std
    image = {"shape": list(mean.shape), "float32": base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode()}
    return {
        "mean": mean.tolist() if mean.dim() == 1 else image,
        "std": None if std is None else std.float().cpu().tolist(),
        "resize": value.resize,
    }


def _preprocessing(config: Mapping[str, Any]) -> Preprocessing | None:
    if config.get("preprocessing") is None:
        return None
    channels = _count("in_channels", config.get("in_channels", 3))
    given = _known("preprocessing", Preprocessing, config["preprocessing"])
    mean, std, resize = given["mean"], given["std"], given["resize"]
    return Preprocessing(
        _mean_image(mean, channels) if isinstance(mean, Mapping) else _numbers("mean", mean, channels),
        None if std is None else _numbers("std", std, channels),
        None if resize is None else _count("resize", resize),
    )


def _numbers(name: str, value: Any, length: int) -> Tensor:
    return torch.tensor([_number(name, number) for number in _list(name, value, length)], dtype=torch.float32)


def _mean_image(value: Mapping[str, Any], channels: int) -> Tensor:
    shape = [_count("mean image's side", side, most=_MOST_SIDE) for side in _list("shape", value.get("shape"), 3)]
    try:
        found = np.frombuffer(base64.b64decode(value.get("float32", ""), validate=True), "<f4")
    except (ValueError, TypeError) as error:
        raise InputError(f"the config's mean image can't be decoded: {error}") from error
    if shape[0] != channels or found.size != math.prod(shape) or not np.isfinite(found).all():
        raise InputError(f"the config's mean image is not of {channels} channels and finite values of its shape")
    return torch.from_numpy(found.reshape(shape).astype(np.float32))
