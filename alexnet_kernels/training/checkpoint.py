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
from alexnet_kernels.models.formats.detect import has_header, is_folder_of_weights, is_zip
from alexnet_kernels.models.formats.torch_file import load_tensors
from alexnet_kernels.models.weights import is_weight_name
from alexnet_kernels.training.augmentation import Crops
from alexnet_kernels.training.foreign import describe, read_foreign
from alexnet_kernels.training.header import KEY, Header, History, from_dict, from_json, to_json

__all__ = ["Checkpoint", "Network", "best_in", "export", "find", "load", "load_network", "save"]

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
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    """Dtypes of the state_dict that was read, where the model has others, which hold its values exactly."""
    notes: tuple[str, ...] = ()
    """Lines for the user about weights that no run of this package trained."""

    def state(self) -> dict[str, Tensor]:
        """The state_dict on the CPU, in the dtypes in which it was read."""
        state = self.model.state_dict().items()
        return {key: value.cpu().to(self.dtypes.get(key, value.dtype)).contiguous() for key, value in state}

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
            inside = sorted(found.parent.name for found in path.glob(f"*/{name}"))[:3]
            hint = f"; {', '.join(inside)} in it have one: name one of these" if inside else ""
            raise InputError(f"there is no checkpoint {name} in {path}{hint}")
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
        content = load_tensors(path, mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a readable checkpoint (truncated, damaged or of another kind)") from error
    if not isinstance(content, dict) or not isinstance(content.get(KEY), dict):
        raise InputError(f"{path} is not a checkpoint of `alexnet-kernels train`")
    with _header_errors(path):
        header, history = from_dict(content[KEY])
    return Checkpoint(header, history, content)


def _load_safetensors(path: Path) -> tuple[Header, History, dict[str, Tensor]]:
    require(str(path), "safetensors", extra="weights")
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


def load_network(
    path: str | Path, device: torch.device | str = "cpu", preset: str | None = None, part: str | None = None
) -> Network:
    """The network of a run or of any file of weights, in evaluation mode.

    Args:
        path: a checkpoint, a run's folder for its best.ckpt, a file that `export` wrote, or what `alexnet` takes: a
            file of another program, a folder with config.json, the name of torchvision's weights. For those a header is
            made up: the preset that fits, ImageNet's class names for 1000 classes, the source's pixel statistics.
            `notes` says what was assumed. Weights of 16 bits become float32.
        preset: name of the preset, for weights that several fit.
        part: path of the model meant, in a file with several, such as state_dict_ema.

    Raises InputError if it can't be read, MissingPackage without a package that its format needs.
    """
    path = Path(path)
    if not path.exists() and is_weight_name(str(path)):
        return _foreign(path, device, preset, part)
    if path.is_dir() and is_folder_of_weights(path) and not any((path / name).is_file() for name in _OF_RUNS):
        return _foreign(path, device, preset, part)
    path = best_in(path) if path.is_dir() else find(path, "best.ckpt")
    if not _is_own(path):
        return _foreign(path, device, preset, part)
    if preset is not None or part is not None:
        raise InputError(f"{path} says its network: --preset and --part are for weights that do not")
    read = _load_checkpoint if is_zip(path) or path.suffix.lower() == ".ckpt" else _load_safetensors
    header, history, weights = read(path)
    settings = header.settings
    model = header.model(device="meta")
    own = model.state_dict()
    for key, value in weights.items():
        if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
            raise InputError(f"checkpoint {path} holds {key} as something else than a dense tensor")
        allowed = _WEIGHTS if key in own and own[key].is_floating_point() else (*_WEIGHTS, torch.int64)
        if value.dtype not in allowed:
            raise InputError(f"checkpoint {path} holds {key} in {value.dtype}, which weights can't have")
    dtypes: dict[str, torch.dtype] = {}
    if header.origin is not None:
        weights, dtypes = _widened(weights)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        what = f"preset {settings.preset!r} with {len(header.classes)} classes and width {settings.width:g}"
        detail = " ".join(str(error).split("\n")[1:2]).strip()
        raise InputError(f"checkpoint {path} does not hold the weights of {what}: {detail}") from error
    return _ready(Network(model, header, history, dtypes), device)


_OF_RUNS = ("best.ckpt", "last.ckpt")


def _is_own(path: Path) -> bool:
    """Whether the file has a header of this package. One that can't be read is ours by its suffix."""
    try:
        found = has_header(path)
    except (OSError, ValueError, RuntimeError):
        found = None
    return path.suffix.lower() in (".ckpt", ".safetensors") if found is None else found


def _load_checkpoint(path: Path) -> tuple[Header, History, dict[str, Tensor]]:
    checkpoint = load(path, mmap=True)
    state = checkpoint.content.get("state_dict")
    if not isinstance(state, dict):
        raise InputError(f"checkpoint {path} holds no weights")
    weights = {
        key.removeprefix(MODEL): value for key, value in state.items() if isinstance(key, str) and key.startswith(MODEL)
    }
    return checkpoint.header, checkpoint.history, weights


def _foreign(path: Path, device: torch.device | str, preset: str | None, part: str | None) -> Network:
    model, header, state, notes = read_foreign(path, preset, part)
    weights, dtypes = _widened(state)
    if any(value.dtype == torch.float64 for value in state.values()):
        notes.append("weights in float64 are rounded to float32")
    model.load_state_dict(weights, assign=True)
    notes.append(describe(model))
    return _ready(Network(model, header, dtypes=dtypes, notes=tuple(note for note in notes if note)), device)


def _widened(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    """The state in float32, in memory of its own, and the dtypes that hold its values exactly too."""
    dtypes = {key: value.dtype for key, value in state.items() if value.dtype in (torch.float16, torch.bfloat16)}
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return {key: value.clone(memory_format=torch.contiguous_format) for key, value in floats.items()}, dtypes


def _ready(network: Network, device: torch.device | str) -> Network:
    network.model.requires_grad_(False).eval()
    network.model = network.model.to(device).to(memory_format=torch.channels_last)
    return network


def export(network: Network, path: str | Path, any_suffix: bool = False) -> None:
    """Write the model's state_dict, its keys and the dtypes in which it was read, as a safetensors file.

    The metadata are {"format": "pt", "alexnet_kernels": header and history, see `to_json`}. Raises InputError if the
    path exists, has another suffix than .safetensors (unless any_suffix) or its folder is missing; RunError if it can't
    be written, and then no file is left.
    """
    require("a safetensors file", "safetensors", extra="weights")
    path = Path(path)
    path = output_path(path, path.suffix.lower() if any_suffix else ".safetensors")
    if path.exists():
        raise InputError(f"{path} exists: name another file")
    metadata = {"format": "pt", KEY: to_json(network.header, network.history)}
    with write_errors(path), atomic_file(path) as file:
        file.write(serialize_safetensors(network.state(), metadata))
