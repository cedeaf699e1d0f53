"""Checkpoint files: written whole or not at all, read without executing what is in them.

A checkpoint is the Lightning trainer's, of tensors and plain types only, and under the key "alexnet_kernels"
what evaluation and prediction need besides the weights: a `Header`. A safetensors file holds the model's
state_dict and, in its metadata, the same header as JSON.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, RunError, first_line, require
from alexnet_kernels._files import atomic_file, output_path, write_errors
from alexnet_kernels.models import AlexNet
from alexnet_kernels.training.augmentation import Crops, Statistics
from alexnet_kernels.training.settings import Settings

__all__ = ["Header", "Network", "export", "load", "load_network", "save"]

KEY = "alexnet_kernels"
MODEL = "model."
"""What the model's keys begin with in a checkpoint's state_dict."""
FORMAT = 2


@dataclass
class Header:
    """What a checkpoint says about its network."""

    settings: Settings
    classes: list[str]
    statistics: Statistics
    data: str
    """The path of the images it was trained on; empty for the shipped ones."""
    train_images: int
    fingerprint: str
    """Of the training images' names, in order."""
    stored_size: int
    """Side of the squares that the crops were taken from, in pixels."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row of losses, accuracies and rates for each epoch."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """A row for each epoch and parameter: the mean magnitude of its elements and of its last step's."""

    def to_dict(self) -> dict[str, Any]:
        from alexnet_kernels import __version__

        return {**asdict(self), "format": FORMAT, "version": __version__, "num_classes": len(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Header:
        if values["format"] != FORMAT:
            raise InputError(
                f"it is of format {values['format']}, written by version {values['version']}; "
                f"this version reads format {FORMAT}"
            )
        return cls(
            Settings.from_dict(values["settings"]),
            [str(name) for name in values["classes"]],
            Statistics(**values["statistics"]),
            values["data"],
            values["train_images"],
            values["fingerprint"],
            values["stored_size"],
            list(values["history"]),
            list(values["layers"]),
        )

    def to_json(self) -> str:
        """`to_dict`, the mean image's float32 values, little-endian, in base64."""
        values = self.to_dict()
        image = values["statistics"]["mean_image"].numpy().astype("<f4")
        values["statistics"]["mean_image"] = base64.b64encode(image.tobytes()).decode()
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Raises InputError, KeyError, TypeError or ValueError where `to_json` hasn't made the text."""
        values = json.loads(text)
        statistics, size = values["statistics"], values["stored_size"]
        image = np.frombuffer(base64.b64decode(statistics["mean_image"], validate=True), "<f4")
        statistics["mean_image"] = torch.from_numpy(image.reshape(3, size, size).astype(np.float32))
        for name in ("mean", "std"):
            statistics[name] = tuple(statistics[name])
        statistics["components"] = tuple(tuple(row) for row in statistics["components"])
        return cls.from_dict(values)

    def model(self, device: torch.device | str | None = None) -> AlexNet:
        """The network with new initial values."""
        settings = self.settings
        return AlexNet(len(self.classes), settings.network(), settings.dropout, settings.width, device=device)

    def crops(self) -> Crops:
        """What makes the network's input.

        The paper's initial values are made for pixels of 0..255, torch's and He's for variance 1.
        """
        settings, statistics = self.settings, self.statistics
        initialization = settings.network().initialization
        scale = None
        if initialization is None or initialization.weight_std is None:
            scale = 1 / torch.tensor(statistics.std).clamp(min=1.0)
        return Crops(settings.image_size, statistics, settings.mean, scale, settings.color_shift, settings.seed)

    def best(self) -> dict[str, float]:
        """The first epoch of the highest top-1."""
        return max(self.history, key=lambda row: row["val_top1"])


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint in path's place; RunError if that fails, and path is then as it was."""
    try:
        with atomic_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        kept = "; the previous one is intact" if Path(path).exists() else ""
        raise RunError(f"checkpoint {path} could not be written: {first_line(error)}{kept}") from error


def find(path: str | Path, name: str) -> Path:
    """The checkpoint itself, or the one of that name in a run's folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / name).is_file():
            raise InputError(f"there is no checkpoint {name} in {path}")
        return path / name
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    return path


def load(path: str | Path, mmap: bool = False) -> tuple[Header, dict[str, Any]]:
    """The header and the whole content of a checkpoint, tensors on the CPU; InputError if it isn't one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a readable checkpoint (cut off, damaged or of another kind)") from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        raise InputError(f"{path} is not a checkpoint of `alexnet-kernels train`")
    with _header_errors(path):
        return Header.from_dict(content[KEY]), content


def _load_safetensors(path: Path) -> tuple[Header, dict[str, Tensor]]:
    require(str(path), "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not a readable safetensors file (cut off, damaged or of another kind)") from error
    if KEY not in metadata:
        raise InputError(f"{path} is not a checkpoint of `alexnet-kernels convert`: its metadata has no {KEY}")
    with _header_errors(path):
        return Header.from_json(metadata[KEY]), weights


@contextlib.contextmanager
def _header_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"checkpoint {path} can't be used: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"checkpoint {path} lacks a part of its description: {first_line(error)}") from error


@dataclass
class Network:
    """A trained network and how its input is made."""

    model: AlexNet
    header: Header

    @cached_property
    def crops(self) -> Crops:
        return self.header.crops()


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a checkpoint, of a run's best or of what `export` wrote, in evaluation mode.

    Raises InputError if it can't be read, MissingPackage for a .safetensors file without that package.
    """
    path = find(path, "best.ckpt")
    if path.suffix.lower() == ".safetensors":
        header, weights = _load_safetensors(path)
    else:
        header, content = load(path, mmap=True)
        state = content.get("state_dict")
        if not isinstance(state, dict):
            raise InputError(f"checkpoint {path} holds no weights")
        weights = {key.removeprefix(MODEL): value for key, value in state.items() if key.startswith(MODEL)}
    settings = header.settings
    model = header.model(device="meta")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        what = f"preset {settings.preset!r} with {len(header.classes)} classes and width {settings.width:g}"
        detail = " ".join(str(error).split("\n")[1:2]).strip()
        raise InputError(f"checkpoint {path} does not hold the weights of {what}: {detail}") from error
    model.requires_grad_(False).eval()
    return Network(model.to(device).to(memory_format=torch.channels_last), header)


def export_path(path: str | Path) -> Path:
    """The path; InputError where `export` refuses it."""
    path = output_path(path, ".safetensors")
    if path.exists():
        raise InputError(f"{path} exists: name another file")
    return path


def export(network: Network, path: str | Path) -> None:
    """Write the model's state_dict, its keys and dtypes unchanged, as a safetensors file.

    The metadata are {"format": "pt", "alexnet_kernels": the header, see `Header.to_json`}. Raises InputError
    for a path that exists, has another suffix than .safetensors or whose folder is missing, RunError if it
    can't be written; nothing is left of it then.
    """
    require("a safetensors file", "safetensors")
    from safetensors.torch import save

    path = export_path(path)
    tensors = {key: value.cpu().contiguous() for key, value in network.model.state_dict().items()}
    with write_errors(path), atomic_file(path) as file:
        file.write(save(tensors, {"format": "pt", KEY: network.header.to_json()}))
