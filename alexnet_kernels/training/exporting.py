"""Networks as files for other programs: a state_dict, safetensors, a folder for the Hugging Face Hub, ONNX."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, RunError, require
from alexnet_kernels._files import atomic_file, link_atomically, output_path, write_errors
from alexnet_kernels.models import config_of, model_of
from alexnet_kernels.models.formats import onnx
from alexnet_kernels.models.formats.detect import METADATA
from alexnet_kernels.training import checkpoint

__all__ = ["KINDS", "kind_of", "write"]

KINDS = {
    "pth": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "folder": ("",),
}
"""The kinds of files and the suffixes that stand for them."""


def kind_of(path: str | Path, kind: str | None = None, channels: str = "RGB") -> str:
    """The kind that the suffix of a new file stands for, or the one asked for.

    Raises InputError for another suffix, a path that exists or a folder that doesn't, MissingPackage.
    """
    path = Path(path)
    if kind is None:
        suffix = path.suffix.lower()
        kind = next((name for name, suffixes in KINDS.items() if suffix in suffixes), None)
        if kind is None:
            known = ", ".join(s for suffixes in KINDS.values() for s in suffixes if s)
            raise InputError(f"{path}: a {known} file or a folder's name without suffix is expected, or --to")
    output_path(path, path.suffix.lower())
    if path.exists():
        raise InputError(f"{path} exists: name another {'folder' if kind == 'folder' else 'file'}")
    if channels != "RGB" and kind not in ("pth", "onnx"):
        raise InputError(f"--channels {channels}: networks of this package take RGB; .pth and .onnx files may not")
    if kind == "onnx":
        require("an ONNX file", "onnx", extra="weights")
    if kind == "safetensors":
        require("a safetensors file", "safetensors", extra="weights")
    if kind == "folder":
        require("a folder for the Hugging Face Hub", "huggingface_hub", "safetensors", extra="weights")
    return kind


def write(network: checkpoint.Network, path: str | Path, kind: str | None = None, channels: str = "RGB") -> None:
    """Write the network, its weights in the dtypes in which they were read, bit by bit.

    Args:
        path: a new file, or folder.
        kind: "pth", the state_dict as of torch.save, with the keys of `AlexNet`, which for preset torchvision are
            torchvision's; "safetensors", of `checkpoint.export`; "folder", of `AlexNet.save_pretrained`; "onnx", the
            network in evaluation mode for any batch of images of its size, in float32. None: by the path's suffix.
        channels: BGR for weights that take images in Caffe's order, of kind pth and onnx.

    Raises InputError if the path exists, RunError if it can't be written, and then no file is left; MissingPackage.
    """
    path = Path(path)
    kind = kind_of(path, kind, channels)
    if kind == "pth":
        _write_state(network, path, channels)
    elif kind == "folder":
        _write_folder(network, path)
    elif kind == "onnx":
        _write_onnx(network, path, channels)
    else:
        checkpoint.export(network, path, any_suffix=True)


def _write_state(network: checkpoint.Network, path: Path, channels: str) -> None:
    state = network.state()
    try:
        with write_errors(path), atomic_file(path) as file:
            torch.save(state if channels == "RGB" else _turned(state), file)
    except RuntimeError as error:
        raise error if isinstance(error, RunError) else RunError(f"{path} could not be written: {error}") from error


def _write_folder(network: checkpoint.Network, path: Path) -> None:
    copy = model_of(config_of(network.model), device="meta")
    copy.load_state_dict(network.state(), assign=True)
    with write_errors(path):
        copy.save_pretrained(path)


def _write_onnx(network: checkpoint.Network, path: Path, channels: str) -> None:
    # The suffix may be another with --to.
    with write_errors(path), tempfile.TemporaryDirectory(prefix=".onnx.", dir=path.parent) as folder:
        written = Path(folder) / "model.onnx"
        described = {METADATA: json.dumps(config_of(network.model))}
        onnx.write(network.model, written, described, channels=channels)
        link_atomically(written, path)


def _turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict with conv1's input channels in the opposite order."""
    first = next(key for key, value in state.items() if value.dim() == 4)
    return {**state, first: state[first].flip(1).contiguous()}
