"""What a checkpoint says about a run: a header that is fixed for the run, and a history that grows with each epoch."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from alexnet_kernels._errors import InputError
from alexnet_kernels._files import local_path, portable_path
from alexnet_kernels._version import __version__
from alexnet_kernels.models import AlexNet, model_of
from alexnet_kernels.models.config import description_of
from alexnet_kernels.models.formats.file_weights import Preprocessing
from alexnet_kernels.training.augmentation import Crops, Statistics
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.settings import Settings

__all__ = ["FORMAT", "KEY", "Header", "History", "from_dict", "from_json", "to_dict", "to_json"]

KEY = "alexnet_kernels"
"""The key of header and history in a checkpoint and in the metadata of a safetensors file."""
FORMAT = 2


@dataclass(frozen=True)
class Header:
    """The part that is fixed for a run."""

    settings: Settings
    classes: list[str]
    statistics: Statistics
    data: str
    """Path of the training images; empty for the package's images."""
    train_images: int
    fingerprint: str
    """Fingerprints of the training and validation images, with a space between; in earlier versions a hash of the
    training images' names."""
    stored_size: int
    """Side of the stored squares, in pixels."""
    reading: Reading = USUAL
    """How the splits of the image set are read."""
    origin: dict[str, Any] | None = None
    """Of weights that no run of this package trained: "format", that of their file, and "config", the network as of
    `models.config_of`. Then the settings are made up, but for what evaluation takes from them."""

    def model(self, device: torch.device | str | None = None) -> AlexNet:
        """The network with new initial values."""
        if self.origin is not None:
            return model_of(self.origin["config"], device=device)
        settings = self.settings
        model = AlexNet(len(self.classes), settings.network(), settings.dropout, settings.width, device=device)
        model.classes, model.preprocessing = tuple(self.classes), self.preprocessing()
        return model

    def preprocessing(self) -> Preprocessing:
        """What `crops` makes of pixels."""
        statistics = self.statistics
        mean = statistics.mean_image if self.settings.mean == "image" else torch.tensor(statistics.mean)
        return Preprocessing(mean, self._std(), self.stored_size)

    def _std(self) -> torch.Tensor | None:
        """By channel, what images are divided by. The paper's initial values assume pixels of 0..255, torch's and He's
        a variance of 1.
        """
        if self.origin is not None:
            said = description_of(self.origin["config"]).preprocessing
            return None if said is None else said.std
        initialization = self.settings.network().initialization
        if initialization is None or initialization.weight_std is None:
            return torch.tensor(self.statistics.std).clamp(min=1.0)
        return None

    def crops(self, dtype: torch.dtype = torch.float32) -> Crops:
        """The conversion of stored images to the network's input, of `dtype`."""
        settings, statistics, std = self.settings, self.statistics, self._std()
        scale = None if std is None else 1 / std
        mean, shift = settings.mean, settings.color_shift
        return Crops(settings.image_size, statistics, mean, scale, shift, settings.seed, dtype)


@dataclass
class History:
    """The figures of the finished epochs."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """A row per epoch: losses, accuracies, learning rate and speed."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """A row per epoch and parameter: the mean magnitudes of its elements and of its last step."""

    def best(self) -> dict[str, float]:
        """The first epoch with the highest top-1."""
        return max(self.epochs, key=lambda row: row["val_top1"])


def to_dict(header: Header, history: History) -> dict[str, Any]:
    """Both parts as one dict of plain types and one tensor, the mean image."""
    return {
        **asdict(header),
        "data": portable_path(header.data),
        "history": list(history.epochs),
        "layers": list(history.layers),
        "format": FORMAT,
        "version": __version__,
        "num_classes": len(header.classes),
    }


def from_dict(values: dict[str, Any]) -> tuple[Header, History]:
    """Inverse of `to_dict`. Raises InputError, KeyError, TypeError or ValueError for other values."""
    if values["format"] != FORMAT:
        raise InputError(
            f"it is of format {values['format']}, written by version {values['version']}; "
            f"this version reads format {FORMAT}"
        )
    kinds = {"classes": list, "data": str, "train_images": int, "fingerprint": str, "stored_size": int}
    for name, kind in {**kinds, "statistics": dict, "history": list, "layers": list}.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise TypeError(f"{name} is of type {type(values[name]).__name__}, not {kind.__name__}")
    if not values["classes"]:
        raise ValueError("it has no classes")
    settings = Settings.from_dict(values["settings"])
    if settings.precision == "auto":
        raise ValueError("its precision is auto, which every run resolves before it starts")
    header = Header(
        settings,
        [str(name) for name in values["classes"]],
        _statistics(values["statistics"], values["stored_size"]),
        local_path(values["data"]),
        **{name: values[name] for name in ("train_images", "fingerprint", "stored_size")},
        reading=Reading.from_dict(values.get("reading", {})),
        origin=_origin(values.get("origin"), len(values["classes"])),
    )
    return header, History(*(_rows(name, values[name]) for name in ("history", "layers")))


def _origin(values: Any, classes: int) -> dict[str, Any] | None:
    """Raises InputError or TypeError unless it describes a network with that many classes."""
    if values is None:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("format"), str):
        raise TypeError("its origin has no format")
    if (found := description_of(values.get("config")).arguments["num_classes"]) != classes:
        raise ValueError(f"its network has {found} outputs for {classes} classes")
    return {"format": values["format"], "config": values["config"]}


def _statistics(values: dict[str, Any], size: int) -> Statistics:
    """Raises TypeError or ValueError unless they are of three channels and of squares of `size` pixels."""
    statistics = Statistics(**values)
    for name, shape in {"mean": (3,), "std": (3,), "components": (3, 3)}.items():
        if (found := np.asarray(values[name], dtype=np.float64).shape) != shape:
            raise ValueError(f"its {name} of the pixels is of shape {list(found)}, not {list(shape)}")
    image = statistics.mean_image
    if not isinstance(image, torch.Tensor) or image.dtype != torch.float32 or image.shape != (3, size, size):
        raise ValueError(f"its mean image is not float32 [3, {size}, {size}]")
    return statistics


def _rows(name: str, rows: list[Any]) -> list[dict[str, Any]]:
    """Raises TypeError unless the rows map names to plain values."""
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(value, (int, float, str)) for value in row.values()):
            raise TypeError(f"a row of its {name} is not of plain values")
    return list(rows)


def to_json(header: Header, history: History) -> str:
    """`to_dict` as JSON. The mean image is base64 of its float32 values, little-endian."""
    values = to_dict(header, history)
    image = values["statistics"]["mean_image"].numpy().astype("<f4")
    values["statistics"]["mean_image"] = base64.b64encode(image.tobytes()).decode()
    return json.dumps(values)


def from_json(text: str) -> tuple[Header, History]:
    """Inverse of `to_json`. Raises as `from_dict`."""
    values = json.loads(text)
    statistics, size = values["statistics"], values["stored_size"]
    image = np.frombuffer(base64.b64decode(statistics["mean_image"], validate=True), "<f4")
    statistics["mean_image"] = torch.from_numpy(image.reshape(3, size, size).astype(np.float32))
    for name in ("mean", "std"):
        statistics[name] = tuple(statistics[name])
    statistics["components"] = tuple(tuple(row) for row in statistics["components"])
    return from_dict(values)
