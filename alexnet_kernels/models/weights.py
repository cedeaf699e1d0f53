"""Reads AlexNet weights from state dicts, files and torchvision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._checksum import check_safetensors

__all__ = ["load_weights"]

_WEIGHT_NAMES = ("IMAGENET1K_V1", "DEFAULT")


def load_weights(weights: Any, progress: bool) -> tuple[dict[str, Tensor], str]:
    """The tensors of `weights`, and its name for messages. Arguments and errors as of `alexnet`."""
    if isinstance(weights, Mapping):
        state, name = dict(weights), "the state dict"
    elif isinstance(weights, str) and weights.removeprefix("AlexNet_Weights.") in _WEIGHT_NAMES:
        member = _torchvision_weights(weights.removeprefix("AlexNet_Weights."))
        state, name = member.get_state_dict(progress=progress, check_hash=True), weights
    elif isinstance(weights, str | os.PathLike):
        state, name = _read(Path(weights)), str(weights)
    elif type(weights).__name__ == "AlexNet_Weights":
        state, name = weights.get_state_dict(progress=progress, check_hash=True), str(weights)
    else:
        raise TypeError(
            "weights must be None, a state dict, the path of one, a torchvision AlexNet_Weights member "
            f"or its name ({', '.join(_WEIGHT_NAMES)}), got {type(weights).__name__}"
        )
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is not a state dict of tensors: its entry {key!r} is of type {type(value).__name__}"
            )
    return state, name


def _torchvision_weights(name: str) -> Any:
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        raise ImportError(
            f"weights {name!r} are downloaded by torchvision, which is not installed: install it, or pass "
            "the path of a .pt, .pth, .safetensors or .npz file with torchvision's keys"
        ) from error
    return AlexNet_Weights[name]


def _read(path: Path) -> Any:
    suffixes = (".pt", ".pth", ".safetensors", ".npz")
    if path.suffix not in suffixes:
        raise ValueError(
            f"weights {str(path)!r}: expected a {', '.join(suffixes[:-1])} or {suffixes[-1]} file, "
            f"or one of the names {', '.join(_WEIGHT_NAMES)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}")
    if path.suffix == ".npz":
        import numpy

        with numpy.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"reading {str(path)!r} needs the package safetensors: install it") from error
        try:
            check_safetensors(path)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} can't be read: {error}") from error
        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(state).__name__}, not a state dict")
    return dict(state)
