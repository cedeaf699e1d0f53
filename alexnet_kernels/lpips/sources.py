"""Where the weights of LPIPS come from: AlexNet's convolutions, and the linear weights of lpips and torchmetrics."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels._errors import first_line
from alexnet_kernels.models.constructor import alexnet

__all__ = ["CHANNELS", "CONVOLUTIONS", "backbone", "linear_weights"]

CONVOLUTIONS = (0, 3, 6, 8, 10)
"""The indices of the convolutions in the `features` of torchvision's AlexNet."""
CHANNELS = (64, 192, 384, 256, 256)
_SHAPES = ((64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3))
_FILES = {
    "lpips": "weights/v{version}/alex.pth",
    "torchmetrics": "functional/image/lpips_models/alex.pth",  # of version 0.1
}


def backbone(weights: Any) -> dict[str, Tensor]:
    """The weights and biases of AlexNet's convolutions by torchvision's keys, "features.0.weight" and so on.

    weights: what `alexnet` takes, a state dict of the convolutions alone, or a model with torchvision's `features`.
    """
    if isinstance(weights, nn.Module):
        given, name = weights.state_dict(), f"the model {type(weights).__name__}"
    elif isinstance(weights, Mapping):
        given, name = dict(weights), "the state dict"
    else:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*holds only the features")
                given, name = alexnet(weights=weights, strict=False).state_dict(), repr(weights)
        except (ImportError, OSError) as error:
            kinds = ImportError, FileNotFoundError, OSError  # urllib's errors take other arguments
            raise next(kind for kind in kinds if isinstance(error, kind))(
                f"LPIPS needs AlexNet's weights, and {str(weights)!r} can't be had: {first_line(error)}; "
                "pass weights=FILE, or a model or state dict with torchvision's keys; pnet_rand=True has random filters"
            ) from error
    given = {key.removeprefix("module."): value for key, value in given.items()}
    found = {}
    for index, shape in zip(CONVOLUTIONS, _SHAPES, strict=True):
        for kind, expected in (("weight", shape), ("bias", shape[:1])):
            key = f"features.{index}.{kind}"
            if key not in given:
                raise ValueError(
                    f"{name} has no {key}: LPIPS takes the convolutions of torchvision's AlexNet (preset 'torchvision')"
                )
            if tuple(given[key].shape) != expected:
                raise ValueError(f"{name}: {key} is {tuple(given[key].shape)}, LPIPS takes {expected}")
            found[key] = given[key]
    return found


def linear_weights(path: str | os.PathLike[str] | None, version: str) -> tuple[list[Tensor], str]:
    """The linear weights of the five layers, each [C], and the file that they come from.

    path: a file with the keys of lpips, "lin0.model.1.weight" and so on; None for that of an installed package.
    """
    file = _installed(version) if path is None else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file of linear weights at {str(file)!r}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{str(file)!r} can't be read as a state dict: {first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{str(file)!r} holds a {type(state).__name__}, not a state dict")
    found = []
    for i, channels in enumerate(CHANNELS):
        names = (f"lin{i}.model.1.weight", f"lin{i}.model.0.weight")
        value = next((state[name] for name in names if name in state), None)
        if not isinstance(value, Tensor):
            raise ValueError(f"{str(file)!r} has no {names[0]}, the linear weights of layer {i + 1}")
        if value.numel() != channels or value.shape[1:2] != (channels,):
            raise ValueError(
                f"{str(file)!r}: {names[0]} is {tuple(value.shape)}, not (1, {channels}, 1, 1): of another network?"
            )
        found.append(value.reshape(-1))
    return found, str(file)


def _installed(version: str) -> Path:
    """The file in the package lpips or torchmetrics, neither of which is imported."""
    for package, name in _FILES.items():
        spec = importlib.util.find_spec(package)
        if package == "torchmetrics" and version != "0.1":
            continue
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            file = Path(folder) / name.format(version=version)
            if file.is_file():
                return file
    owners = "the packages lpips and torchmetrics" if version == "0.1" else "the package lpips"
    raise FileNotFoundError(
        f"LPIPS's linear weights, version {version}, come with {owners}, not installed here: "
        "pip install lpips, or pass model_path=FILE; lpips=False needs none"
    )
