"""Writes an ImageFolder tree, or a zip of one, as the squares that training reads.

Images are written in the order of their names, `shard_images` to a file. Each file is written by one process, and its
bytes do not depend on the number of processes. A process holds one decoded image and 64 squares at a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels._files import atomic_file, portable_path, remove_temporaries, write_atomically
from alexnet_kernels._lock import locked
from alexnet_kernels.training import image_set, shards
from alexnet_kernels.training.augmentation import PixelSums
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.shard_checksums import CHECKSUMS, INDEX, STATISTICS, add_checksums
from alexnet_kernels.training.shard_writer import ShardTask, write_shards
from alexnet_kernels.training.source import Source

__all__ = ["Report", "prepare"]


@dataclass
class Report:
    """The result of `prepare`."""

    counts: dict[str, int]
    """Images of each split."""
    classes: int
    left_out: int
    """Images that can't be read, and folders that can't be listed."""
    ignored: int
    """Files that are not taken for images, or are in no class."""
    converted: int
    """Grey, CMYK, palette and other images that were converted to RGB."""
    seconds: float
    notes: list[str]
    """What a user should know about how the splits were found."""


def prepare(
    source: str | Path,
    destination: str | Path,
    *,
    size: int = 256,
    splits: Sequence[str] = ("train", "val"),
    shard_images: int = 4096,
    workers: int = 1,
    bad_images: str = "skip",
    reading: Reading = USUAL,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a prepared set, or continue what an interrupted call began. The result is bitwise identical either way.

    Args:
        source: a folder or zip with <split>/<class>/<image> for each split; images of any size and of the formats of
            `formats.FORMATS`.
        destination: a new folder, or one begun with the same arguments.
        size: side of the squares in pixels. The shorter side is resized to it, the centre kept.
        splits: names of the splits; "train" and "val" are those of `reading`. The statistics are those of the first.
        shard_images: images per file.
        workers: processes.
        bad_images: "skip" leaves unreadable images and folders out and lists them in report.csv; "refuse" raises
            InputError.
        reading: names of the splits, what becomes of empty classes, and the labels of a flat split.
        progress: called with the number of images done, including those of earlier calls, and the total.

    Raises:
        InputError: no images, a size above 8192, a destination with other content, refused images.
        ValueError: a number below 1, another value of `bad_images`.
        RunError: the disk is full or read-only, or a process died. Finished files are kept.
    """
    if bad_images not in ("refuse", "skip"):
        raise ValueError(f"bad_images must be 'refuse' or 'skip', got {bad_images!r}")
    for name, value in (("size", size), ("shard_images", shard_images), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if size > shards.LARGEST_SIZE:
        raise InputError(f"--size must be from 1 to {shards.LARGEST_SIZE}, got {size}")
    if not splits or len(set(splits)) < len(splits):
        raise InputError(f"splits must be different names, got {', '.join(splits) or 'none'}")
    began, root = time.monotonic(), Path(destination)
    if shards.is_prepared(source):
        raise InputError(f"{source} is already a prepared folder")
    tree = Source(source)
    sets = image_set.open_splits(tree, [reading.name_of(split) for split in splits], size, reading)
    image_set.check_unread(sets, bad_images)
    splits = [images_.split for images_ in sets]
    plan: dict[str, Any] = {
        "format": shards.FORMAT,
        "source": portable_path(str(Path(source).resolve())),
        "size": size,
        "shard_images": shard_images,
        "splits": list(splits),
        "images": _digest(tree, sets),
    }
    if reading.empty_classes != "refuse":
        plan["empty_classes"] = reading.empty_classes
    with _disk_errors(root):
        finished = _begin(root, plan)
        tasks = [
            ShardTask(tree, split, number, files, labels, size, root / split)
            for split, images_ in zip(splits, sets, strict=True)
            for number, (files, labels) in enumerate(_parts(images_, shard_images))
        ]
        with locked(root, f"another process is preparing {root}"):
            for folder in (root, *(root / split for split in splits)):
                remove_temporaries(folder)
            if finished:
                shards.open_shards(root, splits)
            else:
                write_shards(tasks, workers, progress)
                _finish(root, plan, tasks, sets, bad_images)
            for task in tasks:
                task.record.unlink(missing_ok=True)
    index = json.loads((root / INDEX).read_text())
    return Report(
        {split: sum(part["shards"]) for split, part in index["splits"].items()},
        len(index["classes"]),
        index["left_out"],
        sum(len(images_.ignored) for images_ in sets),
        index["converted"],
        time.monotonic() - began,
        [images_.note for images_ in sets if images_.note],
    )


def _digest(source: Source, sets: Sequence[image_set.ImageSet]) -> str:
    digest = hashlib.sha256()
    for images_ in sets:
        kind, sums = source.checksums(images_.files)
        labelled = images_.names_with_classes()
        for name, shown, checksum in zip(images_.files, labelled, sums, strict=True):
            digest.update(f"{shown}\0{source.size_of(name)}\0{kind}\0{checksum}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _parts(images_: image_set.ImageSet, count: int) -> Iterator[tuple[list[str], list[int]]]:
    for start in range(0, len(images_), count):
        yield images_.files[start : start + count], images_.labels[start : start + count].tolist()


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{root} can't be written: {error.strerror or error}; finished files are kept, run the same command to "
            "continue"
        ) from error
    except MemoryError as error:
        raise RunError("out of memory; run the same command with fewer --workers to continue") from error


def _begin(root: Path, plan: dict[str, Any]) -> bool:
    """Create the folder, or check that it was begun with this plan. Returns whether it is finished."""
    path = root / shards.PLAN
    if root.exists() and not root.is_dir():
        raise InputError(f"{root} is a file; a new folder is expected")
    if path.is_file():
        try:
            begun = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is damaged: remove {root} and start again") from error
        differing = [name for name in {**plan, **begun} if begun.get(name) != plan.get(name)]
        if differing:
            what = "; ".join(
                "the images differ" if name == "images" else f"{name} was {begun.get(name)}, is {plan.get(name)}"
                for name in differing
            )
            raise InputError(f"{root} was begun with other arguments: {what}; name another folder")
    elif root.exists() and any(root.iterdir()):
        raise InputError(f"{root} exists and is not empty: name a new folder")
    for split in plan["splits"]:
        (root / split).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _write_json(path, plan)
    return (root / INDEX).is_file()


def _finish(
    root: Path, plan: dict[str, Any], tasks: list[ShardTask], sets: Sequence[image_set.ImageSet], bad_images: str
) -> None:
    """Write the labels, names, statistics and report of the whole set, index.json last."""
    notes: list[list[str]] = []
    for images_ in sets:
        notes += [[name, "left out", reason] for name, _, reason in (line.rpartition(": ") for line in images_.bad)]
        notes += [[name, "ignored", reason] for name, reason in images_.ignored.items()]
    splits: dict[str, dict[str, list[int]]] = {}
    for split, images_ in zip(plan["splits"], sets, strict=True):
        files: list[str] = []
        labels: list[int] = []
        counts: list[int] = []
        checksums: list[np.ndarray] = []
        sums = PixelSums.of(torch.empty(0, plan["size"], plan["size"], 3, dtype=torch.uint8))
        for task in (task for task in tasks if task.split == split):
            with np.load(task.record) as record:
                kept = record["kept"].tolist()
                checksums.append(record["checksums"])
                sums += PixelSums(
                    int(record["count"]), torch.from_numpy(record["places"]), torch.from_numpy(record["products"])
                )
                notes += json.loads(record["notes"].tobytes())
            files += [task.files[place].removeprefix(f"{split}/") for place in kept]
            labels += [task.labels[place] for place in kept]
            counts.append(len(kept))
        images_.files, images_.labels = files, torch.tensor(labels, dtype=torch.int64)
        if bad_images == "skip":
            image_set.check_classes(images_)
        splits[split] = {"shards": counts}
        with atomic_file(root / split / "labels.npy") as file:
            np.save(file, np.array(labels, dtype=np.int64))
        with atomic_file(root / split / CHECKSUMS) as file:
            np.save(file, np.concatenate(checksums))
        _write_json(root / split / "files.json", files)
        if split == plan["splits"][0]:
            with atomic_file(root / STATISTICS) as file:
                np.savez(file, count=np.array(sums.count), places=sums.places.numpy(), products=sums.products.numpy())
    left_out = [f"{name}: {reason}" for name, what, reason in notes if what == "left out"]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["image", "what", "reason"], *notes])
    write_atomically(root / shards.REPORT, text.getvalue())
    if left_out and bad_images == "refuse":
        raise image_set.unreadable(left_out)
    index = {
        "format": plan["format"],
        "size": plan["size"],
        "classes": sets[0].classes,
        "splits": splits,
        "left_out": len(left_out),
        "converted": sum(what == "converted" for _, what, _ in notes),
    }
    add_checksums(root, index)
    _write_json(root / INDEX, index)


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content))
