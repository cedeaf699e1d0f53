"""Which splits and classes of an image set are read: names that sets use, where they are, and flat splits."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels.training.formats import EXTENSIONS, suffix_of
from alexnet_kernels.training.source import Source

__all__ = ["USUAL", "Reading", "find_split", "locate", "note_of"]

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
}
"""Names of a split in any case, the first one found taken."""
_TEST = ("test", "testing")
_DEEPEST = 4
"""Folders between the top of a set and its splits."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the splits of an image set are read; each field is an option of `train`."""

    train_split: str = "train"
    """Folder of the training images. "train" also stands for training, in any case."""
    val_split: str = "val"
    """Folder of the validation images. "val" also stands for valid, validation and test, in this order, in any case."""
    empty_classes: str = "refuse"
    """"refuse" class folders without images with an error, or "skip" them."""
    val_labels: str = ""
    """File of the classes of validation images that are in no class folders, see `labels.read_labels`."""
    synsets: str = ""
    """File of the classes' names, where `val_labels` has numbers."""

    def __post_init__(self) -> None:
        for name in ("train_split", "val_split"):
            value, option = getattr(self, name), "--" + name.replace("_", "-")
            if not value or value.startswith(".") or "/" in value or "\0" in value:
                raise InputError(f"{option}: the name of a folder in the set is expected, got {shortened(value)!r}")
        if self.train_split == self.val_split:
            raise InputError(f"--train-split and --val-split are both {self.val_split}: two folders are expected")
        if self.empty_classes not in ("refuse", "skip"):
            raise InputError(f"--empty-classes must be refuse or skip, got {shortened(self.empty_classes)}")
        if self.synsets and not self.val_labels:
            raise InputError("--synsets needs --val-labels, the file whose numbers it names")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reading:
        """Inverse of `asdict`. TypeError unless the values are texts; names of later versions are left out."""
        if not isinstance(values, Mapping):
            raise TypeError("how its images are read is not told by names and texts")
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        if not all(isinstance(value, str) for value in known.values()):
            raise TypeError("how its images are read is not told by texts")
        return cls(**known)

    def resolved(self) -> Reading:
        """The same with absolute paths."""
        paths = {name: os.path.abspath(value) for name in ("val_labels", "synsets") if (value := getattr(self, name))}
        return replace(self, **paths)

    def name_of(self, split: str) -> str:
        """The name to look for of the split "train" or "val"; other names are their own."""
        return {"train": self.train_split, "val": self.val_split}.get(split, split)


USUAL = Reading()


def find_split(wanted: str, found: Iterable[str]) -> str | None:
    """The name among `found` of the split `wanted`. "train" and "val" stand for other names, see `Reading`."""
    names = sorted(found)
    if wanted in names:
        return wanted
    for known in _NAMES.get(wanted, ()):
        for name in names:
            if name.lower() == known:
                return name
    return None


def note_of(wanted: str, found: str) -> str:
    """What a user should know about the split that was found, or ""."""
    if wanted == "val" and found.lower() in _TEST:
        return f"there is no val/: {found}/ is taken for validation"
    return ""


def locate(source: Source, splits: Sequence[str]) -> str:
    """Enter the folder of the source that holds the splits, if its top holds none of them.

    Returns a note that names the folder, or "". InputError if several folders could be meant.
    """
    children: dict[str, set[str]] = {}
    for folder in source.folders:
        above, _, name = folder.rpartition("/")
        children.setdefault(above, set()).add(name)
    if any(find_split(split, children.get("", ())) for split in splits):
        return ""
    candidates = []
    for folder, names in children.items():
        found = [find_split(split, names) for split in splits]
        if not folder or folder.count("/") >= _DEEPEST or not all(found):
            continue
        if any(_holds_images(source, f"{folder}/{split}/") for split in found):
            candidates.append(folder)
    if len(candidates) > 1:
        raise InputError(
            f"{source.path} has {', '.join(splits)} in {', '.join(sorted(candidates)[:5])}: name one of these folders"
        )
    if not candidates:
        return ""
    source.enter(candidates[0])
    return f"the images are those in {candidates[0]}/"


def _holds_images(source: Source, prefix: str) -> bool:
    at = bisect_left(source.files, prefix)
    while at < len(source.files) and source.files[at].startswith(prefix):
        if suffix_of(source.files[at]) in EXTENSIONS:
            return True
        at += 1
    return False
