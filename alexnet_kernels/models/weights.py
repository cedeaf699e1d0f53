"""Reads AlexNet weights from state dicts, files and torchvision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels.models.formats import FileWeights
from alexnet_kernels.models.formats.detect import TORCHVISION_FILE, from_state, read
from alexnet_kernels.models.formats.preprocessing import TORCHVISION
from alexnet_kernels.models.presets import PRESETS

__all__ = ["imagenet_classes", "is_weight_name", "read_weights"]

_WEIGHT_NAMES = ("IMAGENET1K_V1", "DEFAULT")
_PREFIX = "AlexNet_Weights."
_URL = f"https://download.pytorch.org/models/{TORCHVISION_FILE}"


def is_weight_name(text: str) -> bool:
    """Whether it is the name of a member of torchvision's AlexNet_Weights, in any case, with or without the enum's."""
    name = text[len(_PREFIX) :] if text.lower().startswith(_PREFIX.lower()) else text
    return name.upper() in _WEIGHT_NAMES


def read_weights(weights: Any, progress: bool = True, part: str | None = None) -> tuple[FileWeights, str]:
    """What `weights` holds, and its name for messages. Arguments and errors as of `alexnet`.

    part: path of the model meant, in a file or dict with several, such as state_dict_ema.
    """
    if isinstance(weights, (Mapping, nn.Module)):
        return from_state(weights, "the state dict", "state dict", part), "the state dict"
    if isinstance(weights, str) and is_weight_name(weights) and not os.path.exists(weights):
        return _torchvision(_URL, weights, progress), weights
    if isinstance(weights, str | os.PathLike):
        if isinstance(weights, str) and not os.path.exists(weights) and not set(weights) & {"/", os.sep, "."}:
            raise FileNotFoundError(
                f"no weights file at {weights!r}, which is none of torchvision's names either "
                f"({', '.join(_WEIGHT_NAMES)})"
            )
        return read(weights, part), os.fspath(weights)
    if type(weights).__name__ == "AlexNet_Weights":
        return _torchvision(weights.url, str(weights), progress), str(weights)
    raise TypeError(
        "weights must be None, a state dict, the path of a file of weights, a torchvision AlexNet_Weights member "
        f"or its name ({', '.join(_WEIGHT_NAMES)}), got {type(weights).__name__}"
    )


def imagenet_classes() -> tuple[str, ...]:
    """ImageNet's 1000 class names in torchvision's order, "0" to "999" without torchvision."""
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError:
        return tuple(map(str, range(1000)))
    return tuple(AlexNet_Weights.IMAGENET1K_V1.meta["categories"])


def _torchvision(url: str, name: str, progress: bool) -> FileWeights:
    """torchvision's weights from torch hub's cache, or downloaded into it. torchvision itself is not needed."""
    file_name = url.rsplit("/", 1)[-1]
    digest = file_name.rsplit("-", 1)[-1].split(".")[0]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file_name
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=progress)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"weights {name!r}: there is no {path}, and {url} can't be downloaded ({first_line(error)}): "
                f"download it elsewhere and copy it there, or pass its path (TORCH_HOME moves the folder)"
            ) from error
    elif not _has_digest(path, digest):
        raise InputError(f"weights {name!r}: {path} is damaged, its SHA-256 does not begin with {digest}: delete it")
    found = read(path)
    return replace(
        found,
        format="torchvision",
        preset=PRESETS["torchvision"],
        preprocessing=TORCHVISION,
        classes=imagenet_classes(),
    )


def _has_digest(path: Path, digest: str) -> bool:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest().startswith(digest)
