"""Checkpoint files: written completely or not at all, read without executing their content.

A checkpoint is the Lightning trainer's: tensors and plain types only. Under the key "alexnet_kernels" it holds the
header and the history of the run. A safetensors file holds the model's state_dict and, in its metadata, the same header
and history as JSON.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._checksum import check_archive, check_safetensors, serialize_safetensors
from alexnet_kernels._errors import InputError, RunError, first_line, require
from alexnet_kernels._files import atomic_file, output_path, write_errors
from alexnet_kernels.models import AlexNet
from alexnet_kernels.training.augmentation import Crops
from alexnet_kernels.training.header import KEY, Header, History, from_dict, from_json, to_json

__all__ = ["Checkpoint", "Network", "best_in", "export", "export_path", "find", "load", "load_network", "save"]

_WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
MODEL = "model."
"""Prefix of the model's keys in a checkpoint's state_dict."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read."""

    header: Header
    history: History
    content: dict[str, Any]
    """The whole checkpoint, as Lightning wrote it."""

    def ends_best_epoch(self) -> bool:
        """Whether this is the state after the best epoch so far."""
        epochs = self.history.epochs
        return bool(epochs) and self.history.best() is epochs[-1] and self.content["global_step"] == epochs[-1]["step"]


@dataclass
class Network:
    """A trained network with the header and history of its run."""

    model: AlexNet
    header: Header
    history: History = field(default_factory=History)

    @cached_property
    def crops(self) -> Crops:
        return self.header.crops()


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint, replacing `path`. If that fails, RunError is raised and `path` is unchanged."""
    try:
        with atomic_file(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        kept = "; the previous one is intact" if Path(path).exists() else ""
        raise RunError(f"checkpoint {path} could not be written: {first_line(error)}{kept}") from error


def find(path: str | Path, name: str) -> Path:
    """The checkpoint at `path`, or the one called `name` in a run's folder. Raises InputError if it doesn't exist."""
    path = Path(path)
    if path.is_dir():
        if not (path / name).is_file():
            raise InputError(f"there is no checkpoint {name} in {path}")
        return path / name
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    return path


def best_in(folder: Path) -> Path:
    """The checkpoint of the best epoch of a run: best.ckpt, unless the run was killed before it could renew that.

    Then it is last.ckpt, which is written first. Raises InputError if there is neither.
    """
    best, last = folder / "best.ckpt", folder / "last.ckpt"
    # After the best epoch, both names are one file.
    if last.is_file() and not (best.is_file() and best.samefile(last)):
        newest, renewed = _read(last), _read(best)
        if newest and newest.ends_best_epoch() and not (renewed and renewed.history == newest.history):
            return last
    return find(folder, best.name)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint, or None if there is none that can be read."""
    try:
        return load(path, mmap=True) if path.is_file() else None
    except InputError:
        return None


def load(path: str | Path, mmap: bool = False) -> Checkpoint:
    """Read a checkpoint, with its tensors on the CPU. Raises InputError if it is not one, or damaged.

    mmap: map the tensors' data instead of reading it.
    """
    try:
        check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a readable checkpoint (truncated, damaged or of another kind)") from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        raise InputError(f"{path} is not a checkpoint of `alexnet-kernels train`")
    with _header_errors(path):
        header, history = from_dict(content[KEY])
    return Checkpoint(header, history, content)


def _load_safetensors(path: Path) -> tuple[Header, History, dict[str, Tensor]]:
    require(str(path), "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {first_line(error)}") from error
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is not a readable safetensors file (truncated, damaged or of another kind)"
        ) from error
    if KEY not in metadata:
        raise InputError(f"{path} is not a checkpoint of `alexnet-kernels convert`: its metadata has no {KEY}")
    with _header_errors(path):
        return *from_json(metadata[KEY]), weights


@contextlib.contextmanager
def _header_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"checkpoint {path} can't be used: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"checkpoint {path} lacks a part of its header: {first_line(error)}") from error


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a checkpoint, of a run's best.ckpt, or of a file that `export` wrote, in evaluation mode.

    Raises InputError if it can't be read, MissingPackage for a .safetensors file without that package.
    """
    path = best_in(Path(path)) if Path(path).is_dir() else find(path, "best.ckpt")
    if path.suffix.lower() == ".safetensors":
        header, history, weights = _load_safetensors(path)
    else:
        checkpoint = load(path, mmap=True)
        header, history = checkpoint.header, checkpoint.history
        state = checkpoint.content.get("state_dict")
        if not isinstance(state, dict):
            raise InputError(f"checkpoint {path} holds no weights")
        weights = {
            key.removeprefix(MODEL): value
            for key, value in state.items()
            if isinstance(key, str) and key.startswith(MODEL)
        }
    settings = header.settings
    model = header.model(device="meta")
    own = model.state_dict()
    for key, value in weights.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise InputError(f"checkpoint {path} holds {key} as something else than a dense tensor")
        allowed = _WEIGHTS if key in own and own[key].is_floating_point() else (*_WEIGHTS, torch.int64)
        if value.dtype not in allowed:
            raise InputError(f"checkpoint {path} holds {key} in {value.dtype}, which weights can't have")
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        what = f"preset {settings.preset!r} with {len(header.classes)} classes and width {settings.width:g}"
        detail = " ".join(str(error).split("\n")[1:2]).strip()
        raise InputError(f"checkpoint {path} does not hold the weights of {what}: {detail}") from error
    model.requires_grad_(False).eval()
    return Network(model.to(device).to(memory_format=torch.channels_last), header, history)


def export_path(path: str | Path) -> Path:
    """The path. Raises InputError if `export` refuses it."""
    path = output_path(path, ".safetensors")
    if path.exists():
        raise InputError(f"{path} exists: name another file")
    return path


def export(network: Network, path: str | Path) -> None:
    """Write the model's state_dict, its keys and dtypes unchanged, as a safetensors file.

    The metadata are {"format": "pt", "alexnet_kernels": header and history, see `to_json`}. Raises InputError if the
    path exists, has another suffix than .safetensors or its folder is missing; RunError if it can't be written, and
    then no file is left.
    """
    require("a safetensors file", "safetensors")
    path = export_path(path)
    tensors = {key: value.cpu().contiguous() for key, value in network.model.state_dict().items()}
    with write_errors(path), atomic_file(path) as file:
        file.write(serialize_safetensors(tensors, {"format": "pt", KEY: to_json(network.header, network.history)}))
