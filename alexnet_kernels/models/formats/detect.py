"""Reads a file of weights of any format, which its content tells."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels.models.config import description_of
from alexnet_kernels.models.formats import caffe, convnet, onnx
from alexnet_kernels.models.formats.arrays import description_in, read_npz, read_safetensors
from alexnet_kernels.models.formats.file_weights import FileWeights
from alexnet_kernels.models.formats.preprocessing import TORCHVISION
from alexnet_kernels.models.formats.state import find_state
from alexnet_kernels.models.formats.torch_file import LEGACY, members_of, read_legacy, read_zip
from alexnet_kernels.models.hub import CONFIG, WEIGHTS, read_config
from alexnet_kernels.models.keys import listed
from alexnet_kernels.models.presets import variant

__all__ = [
    "METADATA",
    "READERS",
    "TORCHVISION_FILE",
    "Reader",
    "from_state",
    "has_header",
    "is_folder_of_weights",
    "is_zip",
    "read",
]

METADATA = "alexnet_kernels"
"""The entry of an ONNX file's metadata with the network as of `models.config_of`, as JSON."""
TORCHVISION_FILE = "alexnet-owt-7be5be79.pth"
_HEAD = 4096
_LARGEST_HEADER = 100_000_000


class Reader(Protocol):
    """A module that reads a format."""

    def recognises(self, head: bytes, path: Path) -> bool:
        """Whether the file, which begins with `head`, is of the format."""

    def read(self, path: Path) -> FileWeights:
        """What it holds. Raises ValueError if it can't be read."""


READERS: tuple[Reader, ...] = (convnet, onnx, caffe)
"""Readers of the formats of other frameworks, which are asked in this order."""


def read(path: str | os.PathLike[str], part: str | None = None) -> FileWeights:
    """What the file holds, or the folder with config.json and model.safetensors. part: as of `find_state`.

    Raises FileNotFoundError, InputError (a one-line reason that names the file) or MissingPackage.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _read_folder(path)
        if not path.exists():
            raise FileNotFoundError(2, "no weights file")
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")
        with path.open("rb") as file:
            head = file.read(_HEAD)
        return _read_file(path, head, part)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no weights file at {str(path)!r}") from error
    except OSError as error:
        raise InputError(f"{str(path)!r} can't be read: {error.strerror or error}") from error
    except ImportError:
        raise
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        raise InputError(reason if str(path) in reason else f"{str(path)!r} can't be read: {reason}") from error


def _read_file(path: Path, head: bytes, part: str | None) -> FileWeights:
    name = repr(str(path))
    if head.startswith(b"PK\3\4"):
        members = members_of(path)
        if any(key.endswith("constants.pkl") for key in members):
            raise ValueError("it is a program (TorchScript or torch.export): save the model's state_dict instead")
        if sum(key.endswith("data.pkl") and key.count("/") <= 1 for key in members) == 1:
            return _named(from_state(read_zip(path, members), name, "torch.save", part), path)
        if members and all(key.endswith(".npy") for key in members):
            return from_state(read_npz(path, members), name, "npz", part)
        if not convnet.recognises(head, path):
            raise ValueError("it is a zip archive, but of neither torch.save, numpy.savez nor cuda-convnet")
    if head.startswith(LEGACY):
        return _named(from_state(read_legacy(path), name, "torch.save of before 1.6", part), path)
    if _is_safetensors(head):
        tensors, header = read_safetensors(path)
        return from_state({"alexnet_kernels": header, **tensors} if header else tensors, name, "safetensors", part)
    for reader in READERS:
        if reader.recognises(head, path):
            return _with_metadata(reader.read(path))
    raise ValueError(
        "it is no file of weights: known are files of torch.save, safetensors, .npz, ONNX, Caffe and cuda-convnet"
    )


def _with_metadata(found: FileWeights) -> FileWeights:
    """With the classes and preprocessing that `convert` writes into an ONNX file."""
    text = found.metadata.get(METADATA)
    if not text:
        return found
    said = description_of(description_in(text))
    return replace(found, classes=said.classes, preprocessing=said.preprocessing or found.preprocessing)


def is_folder_of_weights(folder: Path) -> bool:
    """Whether a folder holds model.safetensors, or the checkpoints of cuda-convnet."""
    return (folder / WEIGHTS).is_file() or bool(convnet.checkpoints_in(folder))


def has_header(path: Path) -> bool | None:
    """Whether the file has a description by this package; None if it is no safetensors file or zip of torch.save.

    Raises OSError, or ValueError for a file that is not whole.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
        if _is_safetensors(head):
            size = int.from_bytes(head[:8], "little")
            file.seek(8)
            return b'"alexnet_kernels":' in file.read(min(size, _LARGEST_HEADER))
    if not head.startswith(b"PK\3\4"):
        return None
    members = members_of(path)
    pickled = [key for key in members if key.endswith("data.pkl")]
    if len(pickled) != 1 or members[pickled[0]].file_size > _LARGEST_HEADER:
        return None
    with zipfile.ZipFile(path) as archive, archive.open(pickled[0]) as member:
        # A key of a pickle, which the memo's instruction follows.
        return re.search(rb"alexnet_kernels[qr\x94]", member.read(_LARGEST_HEADER)) is not None


def is_zip(path: Path) -> bool:
    """Whether the file begins as a zip archive."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def _is_safetensors(head: bytes) -> bool:
    """Whether a JSON object follows its length."""
    return len(head) > 8 and head[8:9] == b"{" and head[9:].lstrip()[:1] in (b'"', b"}")


def from_state(content: Any, name: str, format: str, part: str | None = None) -> FileWeights:
    """The weights in a state dict, a checkpoint or a module; format: for messages.

    A checkpoint or safetensors file of this package also states its network. Raises InputError as `find_state`.
    """
    header = content.get("alexnet_kernels") if isinstance(content, Mapping) else None
    if isinstance(header, Mapping):
        content = {key: value for key, value in content.items() if key != "alexnet_kernels"}
    state = find_state(content, name, part)
    notes = []
    if state.left_out:
        notes.append(f"left out what is beside the network: {listed(state.left_out)}")
    where = f"{format}, under {state.where}" if state.where else format
    found = FileWeights(where, state.tensors, notes=tuple(notes))
    if isinstance(header, Mapping) and header:
        try:
            found = _described(found, header)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{name} lacks a part of its header: {first_line(error)}") from error
    return found


def _described(found: FileWeights, header: Mapping[str, Any]) -> FileWeights:
    """With what the header of a run of this package says."""
    origin = header.get("origin")
    settings = header["settings"]
    chosen = {key: settings[key] for key in ("activation", "pooling", "norm", "init")}
    config = {"preset": variant(settings["preset"], **chosen), **{key: settings[key] for key in ("width", "dropout")}}
    if isinstance(origin, Mapping):
        config = dict(origin["config"])
    config.update(num_classes=len(header["classes"]), classes=[str(label) for label in header["classes"]])
    return _with_config(found, config)


def _with_config(found: FileWeights, config: Any) -> FileWeights:
    """With what a config says, as of `models.config_of`."""
    said = description_of(config)
    given = ("width", "dropout", "in_channels", "conv1_padding")
    arguments = {key: said.arguments[key] for key in given if said.arguments[key] is not None}
    return replace(
        found,
        preset=said.arguments["preset"],
        arguments=arguments,
        classes=said.classes or found.classes,
        preprocessing=said.preprocessing or found.preprocessing,
    )


def _named(found: FileWeights, path: Path) -> FileWeights:
    """With the preprocessing that torchvision documents for its file."""
    return replace(found, preprocessing=TORCHVISION) if path.name == TORCHVISION_FILE else found


def _read_folder(folder: Path) -> FileWeights:
    if not is_folder_of_weights(folder):
        raise ValueError(
            f"{str(folder)!r} is a folder without {WEIGHTS}: give a file, such as a run's best.ckpt, or a folder "
            f"with {CONFIG} and {WEIGHTS}"
        )
    if not (folder / WEIGHTS).is_file():
        return convnet.read(folder)
    found = read(folder / WEIGHTS)
    if not os.path.lexists(folder / CONFIG):
        return found
    config = read_config(folder / CONFIG)
    try:
        return _with_config(found, config)
    except ValueError as error:
        raise InputError(f"{str(folder / CONFIG)!r} can't be read: {first_line(error)}") from error
