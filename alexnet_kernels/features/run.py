"""Activations of images into a folder. An interrupted run continues where it stopped, and ends in the same bytes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, first_line, shortened
from alexnet_kernels._files import read_bounded, write_atomically, write_errors
from alexnet_kernels._lock import locked
from alexnet_kernels._version import __version__
from alexnet_kernels.features.images import batches_of, open_images
from alexnet_kernels.features.layers import POOLS, find_layers
from alexnet_kernels.features.memory import evaluating, stages_of
from alexnet_kernels.features.store import DTYPES, FORMAT, FORMATS, INDEX, NAMES, Features, load, writer
from alexnet_kernels.models import config_of
from alexnet_kernels.training.checkpoint import Network
from alexnet_kernels.training.image_set import Batch, StoredImages, unreadable

__all__ = ["PROGRESS", "extract_to", "needed_bytes"]

PROGRESS = "progress.json"
"""What a folder holds instead of index.json until it is finished."""
_COLUMNS = ("row", "name", "label", "class", "sha256")
_SAVE_EVERY = 5.0
"""Seconds between two points at which a killed run can continue."""


@dataclass
class _State:
    """How far a run is. `images` are those that were read, `rows` those that were written."""

    images: int = 0
    rows: int = 0
    names_bytes: int = 0
    shards: int = 0
    skipped: list[str] = field(default_factory=list)
    overflowed: list[int] = field(default_factory=list)
    """By layer, the finite values that the dtype can't hold."""
    nan: list[int] = field(default_factory=list)

    def copy(self) -> _State:
        return _State(**asdict(self))

    def check(self) -> None:
        """TypeError unless all is of its type."""
        for value in (self.images, self.rows, self.names_bytes, self.shards, *self.overflowed, *self.nan):
            if not isinstance(value, int) or value < 0:
                raise TypeError("a count is no whole number")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@torch.no_grad()
def extract_to(
    out: str | Path,
    network: Network,
    data: str | Path | None = None,
    *,
    layers: Sequence[str],
    split: str | None = None,
    pool: str = "none",
    dtype: str = "float32",
    format: str = "npy",
    batch_size: int = 100,
    workers: int | None = None,
    bad_images: str = "refuse",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notify: Callable[[str], None] = _warn,
    save_every: float = _SAVE_EVERY,
) -> Features:
    """Write the activations of images into the folder `out`, and return them, as `load(out)` does.

    The centre crop of each image is taken, as for evaluation, in the precision of the network's run. Memory holds some
    batches, and the images' names. If the run is interrupted, even killed, the same call continues it.

    Args:
        out: a new folder, or one that the same call began.
        network: of `training.checkpoint.load_network`.
        data, split: the images, see `open_images`.
        layers: names such as conv1, relu1, pool5, fc6, or modules' names, such as features.0 (see `layers_of`).
        pool: "none" keeps maps, [N, C, H, W]; "mean" and "max" over their pixels give [N, C].
        dtype: "float32" or "float16", in which values above 65,504 become infinite, with a warning.
        format: "npy", a file a layer, or "safetensors", files of about 256 MiB with all layers.
        batch_size: images that are computed at a time.
        workers: processes that read images; None for one per core, up to 8, and none for few images.
        bad_images: "refuse" unreadable images with an error, or "skip" them: they have no row.
        progress: called with the numbers of images done and of all.
        notify: called with a line when the first values that are not finite are met, and about the images found.
        save_every: seconds between two points from which a killed run continues.

    Raises:
        InputError: unknown layers or options, no images, unreadable images, not enough space, or a folder of something
            else: of another checkpoint, images or options.
        RunError: the files can't be written.
    """
    for name, value, allowed in (("pool", pool, POOLS), ("dtype", dtype, (*DTYPES,)), ("format", format, FORMATS)):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    folder, header = Path(out), network.header
    found = find_layers(network.model, layers)
    images, split_name = open_images(data, split, header.stored_size, bad_images)
    if images.size != header.stored_size:
        raise InputError(
            f"--data {data} was prepared at {images.size} x {images.size}, the checkpoint needs "
            f"{header.stored_size} x {header.stored_size}: prepare it with --size {header.stored_size}"
        )
    if note := getattr(images, "note", ""):
        notify(note)
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(images) > 4 * batch_size else 0
    device = next(network.model.parameters()).device
    with evaluating(network.model):
        stages = stages_of(network, found, pool)
        blank = torch.zeros(1, header.stored_size, header.stored_size, 3, dtype=torch.uint8, device=device)
        shapes = [tuple(output.shape[1:]) for output in stages(network.crops.centre(blank))]
        index = {
            "version": FORMAT,
            "package": __version__,
            "format": format,
            "pool": pool,
            "layers": [
                {"name": layer.name, "module": layer.module, "shape": list(shape), "dtype": dtype}
                for layer, shape in zip(found, shapes, strict=True)
            ],
            "checkpoint": _checkpoint(network),
            "data": {
                "path": "" if data is None else str(data),
                "split": split_name,
                "images": len(images),
                "fingerprint": images.fingerprint(),
                "classes": list(images.classes),
            },
            "precision": header.settings.precision,
            "device": device.type,
            "batch_size": batch_size,
            "bad_images": bad_images,
        }
        # Names of files need not be UTF-8.
        index = json.loads(json.dumps(index).encode(errors="backslashreplace"))
        run = _Run(folder, network, stages, images, index, workers, progress, notify, save_every)
        with write_errors(folder):
            state = _begin(folder, index)
        with locked(folder, f"{folder} is being written by another process"):
            if state is None:
                progress(len(images), len(images))
            else:
                run.fill(state)
    return load(folder)


def _begin(folder: Path, index: dict[str, Any]) -> _State | None:
    """The state to continue from; None if the folder is finished. InputError if it is another's."""
    if (folder / INDEX).is_file() or (folder / PROGRESS).is_file():
        path = folder / (INDEX if (folder / INDEX).is_file() else PROGRESS)
        try:
            found = json.loads(read_bounded(path, 1 << 30))
            plan = found if path.name == INDEX else found["index"]
            differing = [key for key in index if not _same(key, plan.get(key), index[key])]
            state = None if path.name == INDEX else _State(**found["state"])
            if state is not None:
                state.check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged: {first_line(error)}") from error
        if differing:
            raise InputError(f"{folder} holds features of {_difference(differing[0], plan, index)}: name another")
        if state is not None:
            _check_files(folder, index, state)
        return state
    if folder.exists() and (not folder.is_dir() or any(path.name != ".lock" for path in folder.iterdir())):
        raise InputError(f"{folder} exists and holds no features that this command began: name another")
    parent = folder.parent
    if not parent.is_dir():
        raise InputError(f"{folder}: there is no folder {parent}")
    needed, free = needed_bytes(index), shutil.disk_usage(parent).free
    if needed > free:
        raise InputError(f"{folder} needs {needed:,} bytes, {parent} has {free:,} left")
    folder.mkdir(exist_ok=True)
    layers = len(index["layers"])
    state = _State(overflowed=[0] * layers, nan=[0] * layers)
    _save(folder, index, state)
    return state


def _same(key: str, found: Any, wanted: Any) -> bool:
    if key == "layers" and isinstance(found, list):
        # A finished index has the number of images in front, and counts.
        return len(found) == len(wanted) and all(
            {**old, "shape": old["shape"][-len(new["shape"]) :]}.items() >= new.items()
            for old, new in zip(found, wanted, strict=True)
        )
    if key == "data" and isinstance(found, dict):
        # The same images may have moved.
        return {**found, "path": ""} == {**wanted, "path": ""}
    return found == wanted


def _difference(key: str, plan: dict[str, Any], index: dict[str, Any]) -> str:
    if key in ("data", "checkpoint"):
        return {"data": "other images", "checkpoint": "another checkpoint"}[key]
    if key == "layers":
        names, others = (", ".join(row["name"] for row in one["layers"]) for one in (plan, index))
        return f"layers {names} in another form or order than {others}" if names == others else f"layers {names}"
    return f"{key.replace('_', '-')} {shortened(plan.get(key))}, not {shortened(index[key])}"


def _check_files(folder: Path, index: dict[str, Any], state: _State) -> None:
    names = [NAMES] if state.rows else []
    if index["format"] == "npy" and state.rows:
        names += [f"{row['name']}.npy" for row in index["layers"]]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"{folder} has lost {missing[0]}: delete the folder, and begin again")
    if state.rows and (folder / NAMES).stat().st_size < state.names_bytes:
        raise InputError(f"{folder / NAMES} is shorter than it was: delete the folder, and begin again")


def needed_bytes(index: dict[str, Any]) -> int:
    """Bytes of all activations."""
    return sum(
        index["data"]["images"] * math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize for row in index["layers"]
    )


def _save(folder: Path, index: dict[str, Any], state: _State) -> None:
    write_atomically(folder / PROGRESS, json.dumps({"index": index, "state": asdict(state)}))


@dataclass(frozen=True)
class _Run:
    """The computation of what a folder lacks."""

    folder: Path
    network: Network
    stages: Any
    images: StoredImages
    index: dict[str, Any]
    workers: int
    progress: Callable[[int, int], None]
    notify: Callable[[str], None]
    save_every: float

    def fill(self, state: _State) -> None:
        """Write the rows of the images that `state` lacks, and finish."""
        index, layers = self.index, self.index["layers"]
        shapes, dtype = {row["name"]: tuple(row["shape"]) for row in layers}, layers[0]["dtype"]
        with contextlib.ExitStack() as opened:
            with write_errors(self.folder):
                files = writer(index["format"], self.folder, shapes, len(self.images), dtype, state.rows, state.shards)
                opened.callback(files.close)
                names = opened.enter_context((self.folder / NAMES).open("ab"))
                names.truncate(state.names_bytes)
            state = self._rows(state, files, names)
            if not state.rows:
                raise InputError(f"{index['data']['path'] or 'the package'}: none of the images can be read")
            with write_errors(self.folder):
                self._commit(files, names, state, True)
                files.finish(state.rows)
        with write_errors(self.folder):
            self._finish(state)

    def _rows(self, state: _State, files: Any, names: BinaryIO) -> _State:
        """Write the rows. Each batch makes a new state, so that an interruption leaves a whole one."""
        index, total = self.index, len(self.images)
        state = state.copy()
        if not state.names_bytes:
            state.names_bytes = names.write(_lines([_COLUMNS]))
            state.skipped = list(self.images.bad)
        told, saved = any(state.overflowed) or any(state.nan), time.monotonic()
        try:
            for batch in batches_of(self.images, state.images, index["batch_size"], self.workers):
                if batch["bad"] and index["bad_images"] == "refuse":
                    raise unreadable(batch["bad"])
                after = self._batch(batch, state.copy(), files, names)
                after.images = min(after.images + index["batch_size"], total)
                after.skipped += batch["bad"]
                state = after
                if not told and (any(state.overflowed) or any(state.nan)):
                    told = True
                    self.notify(f"among the first {state.images:,} images {_not_finite(index, state)}")
                self.progress(state.images, total)
                # Where a shard ends must not depend on time.
                if index["format"] != "npy" or time.monotonic() - saved >= self.save_every:
                    with write_errors(self.folder):
                        self._commit(files, names, state, False)
                    saved = time.monotonic()
        except (InputError, KeyboardInterrupt):
            with write_errors(self.folder):
                if index["format"] == "npy":
                    self._commit(files, names, state, True)
            raise
        return state

    def _batch(self, batch: Batch, state: _State, files: Any, names: BinaryIO) -> _State:
        if not len(batch["indices"]):
            return state
        device = next(self.network.model.parameters()).device
        outputs = self.stages(self.network.crops.centre(batch["images"].to(device)))
        dtype = DTYPES[self.index["layers"][0]["dtype"]]
        arrays = [_array(output, dtype, state, i) for i, output in enumerate(outputs)]
        with write_errors(self.folder):
            files.write(state.rows, arrays)
            state.names_bytes += names.write(_lines(_names(self.images, batch, state.rows)))
        state.rows += len(batch["indices"])
        return state

    def _commit(self, files: Any, names: BinaryIO, state: _State, force: bool) -> None:
        names.flush()
        if files.commit(state.rows, force):
            os.fsync(names.fileno())
            state.shards = getattr(files, "shards", 0)
            _save(self.folder, self.index, state)

    def _finish(self, state: _State) -> None:
        with (self.folder / NAMES).open("rb") as content:
            digest = _digest(content)
        layers = [
            {**row, "shape": [state.rows, *row["shape"]], "overflowed": state.overflowed[i], "nan": state.nan[i]}
            for i, row in enumerate(self.index["layers"])
        ]
        final = {
            **self.index,
            "layers": layers,
            "images": state.rows,
            "shards": state.shards,
            "ignored": len(self.images.ignored),
            "skipped": [name.encode(errors="backslashreplace").decode() for name in state.skipped],
            "names": {"file": NAMES, "sha256": digest},
        }
        write_atomically(self.folder / INDEX, json.dumps(final, indent=1) + "\n")
        (self.folder / PROGRESS).unlink(missing_ok=True)


def _digest(content: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := content.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _array(output: Tensor, dtype: np.dtype, state: _State, i: int) -> np.ndarray:
    """The output in the files' dtype, with what is not finite counted."""
    values = output.float()
    result = values if dtype.itemsize == 4 else values.half()
    finite = bool(torch.isfinite(result).all())
    if not finite:
        state.nan[i] += int(values.isnan().sum())
        state.overflowed[i] += int((values.isfinite() & result.isinf()).sum())
    return result.contiguous().cpu().numpy()


def _not_finite(index: dict[str, Any], state: _State) -> str:
    parts = []
    for row, overflowed, nan in zip(index["layers"], state.overflowed, state.nan, strict=True):
        if overflowed:
            parts.append(f"{overflowed:,} values of {row['name']} are above what {row['dtype']} holds, and infinite")
        if nan:
            parts.append(f"{nan:,} values of {row['name']} are NaN")
    return "; ".join(parts)


def _names(images: StoredImages, batch: Batch, first: int) -> Iterable[tuple[Any, ...]]:
    pixels = batch["images"].numpy()
    for i, place in enumerate(batch["indices"].tolist()):
        label = int(batch["labels"][i])
        known = 0 <= label < len(images.classes)
        digest = hashlib.sha256(pixels[i].tobytes()).hexdigest()
        yield first + i, images.files[place], label if known else "", images.classes[label] if known else "", digest


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def _checkpoint(network: Network) -> dict[str, Any]:
    """What the activations depend on: a hash of the weights and of the pixels' conversion, and the network."""
    digest = hashlib.sha256()
    for key, value in network.model.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    config = config_of(network.model)
    preprocessing = network.header.preprocessing()
    for tensor in (preprocessing.mean, preprocessing.std):
        if tensor is not None:
            digest.update(tensor.float().contiguous().numpy().data)
    mean = preprocessing.mean
    return {
        "fingerprint": digest.hexdigest(),
        "network": {key: config[key] for key in ("preset", "num_classes", "width", "in_channels", "conv1_padding")},
        "preprocessing": {
            "resize": network.header.stored_size,
            "crop": network.header.settings.image_size,
            "mean": mean.tolist() if mean.dim() == 1 else "image",
            "std": None if preprocessing.std is None else preprocessing.std.tolist(),
        },
    }
