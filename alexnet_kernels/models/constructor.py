"""torchvision's constructor of AlexNet, and the weights that it takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels.models.alexnet import AlexNet
from alexnet_kernels.models.fit import load_state, network_of, not_finite
from alexnet_kernels.models.weights import read_weights

__all__ = ["alexnet"]


def alexnet(
    weights: Any = None,
    progress: bool = True,
    *,
    strict: bool = True,
    pretrained: bool | None = None,
    **kwargs: Any,
) -> AlexNet:
    """torchvision's alexnet: `AlexNet(preset="torchvision", **kwargs)`, optionally with weights.

    Args:
        weights: None for initial values, or one of:

            - a member of torchvision.models.AlexNet_Weights or its name ("IMAGENET1K_V1", "DEFAULT",
              "AlexNet_Weights.DEFAULT"): the file in torch hub's cache, or downloaded into it;
            - a state dict, a checkpoint that holds one ({"state_dict": ...}, "model", "net", ...), with the prefixes of
              DataParallel, torch.compile, Lightning, EMA and others;
            - the path of a file of torch.save, safetensors, .npz or another format of docs/weights.md, of any suffix,
              or of a folder with config.json and model.safetensors. Nothing that a file holds is executed.

            Keys, shapes and dtypes are checked before the model is created. num_classes defaults to that of the
            weights. A file of this package, and one that defines its network, also gives preset, width and dropout.
        progress: whether a download shows a progress bar.
        strict: False also accepts weights of `features` alone, with a warning that the classifier keeps its initial
            values.
        pretrained: torchvision's former argument, with a warning: True for weights="IMAGENET1K_V1", False for None. So
            too a bool as weights.
        **kwargs: arguments of `AlexNet`; preset defaults to that of the file, or "torchvision".

    Returns:
        The model, in training mode. Its `classes` and `preprocessing` are what the weights' source says, or None.

    Raises:
        ValueError: weights that do not fit the model, or can't be read; both weights and pretrained.
        FileNotFoundError, ImportError, TypeError: weights that are not there, need a package or are of another type.

    Warns of values that are not finite, of values that the model's dtype rounds, and of what a reader converted.
    """
    if pretrained is not None or isinstance(weights, bool):
        weights = _former(weights, pretrained)
    if weights is None:
        return AlexNet(**{"preset": "torchvision", **kwargs})
    found, name = read_weights(weights, progress)
    arguments = network_of(found, **kwargs)
    state = load_state(found, name, arguments, strict)
    model = _network(state, arguments)
    for note in filter(None, (*found.notes, not_finite(state))):
        warnings.warn(f"{name}: {note}", stacklevel=2)
    own = next(model.parameters()).dtype
    rounded = sorted({str(value.dtype) for value in state.values() if _is_rounded(value.dtype, own)})
    if rounded:
        warnings.warn(f"{name} holds weights in {', '.join(rounded)}, which become {own}", stacklevel=2)
    if model.load_state_dict(state, strict=False).missing_keys:
        warnings.warn(
            f"{name} holds only the features: the classifier keeps its untrained initial values", stacklevel=2
        )
    if found.classes is not None and len(found.classes) == model.classifier[-1].out_features:
        model.classes = found.classes
    model.preprocessing = found.preprocessing
    return model


def _network(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> AlexNet:
    """AlexNet(**arguments), whose initial values are not drawn if the state has all values."""
    blank = AlexNet(**{**arguments, "device": "meta"})
    if not blank.state_dict().keys() <= state.keys():
        return AlexNet(**arguments)
    device = arguments.get("device")
    return blank.to_empty(device=torch.get_default_device() if device is None else device)


def _is_rounded(dtype: torch.dtype, own: torch.dtype) -> bool:
    return dtype.is_floating_point and torch.promote_types(dtype, own) != own


def _former(weights: Any, pretrained: bool | None) -> str | None:
    """The weights that torchvision's former arguments mean: alexnet(pretrained=True) and alexnet(True)."""
    if pretrained is not None and weights is not None:
        raise ValueError("alexnet takes weights= or the former pretrained=, not both")
    name, given = ("weights", weights) if pretrained is None else ("pretrained", pretrained)
    meant = "IMAGENET1K_V1" if given else None
    warnings.warn(f"alexnet({name}={given}) is deprecated, as in torchvision: write weights={meant!r}", stacklevel=3)
    return meant
