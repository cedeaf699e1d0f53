"""Splits of an image set as uint8 tensors: their interface, and the splits of an ImageFolder tree or a zip of one.

    root/train/<class>/**/<image>      root/val/<class>/**/<image>

Classes are numbered in the sorted order of their names. Validation images may lie in val/ itself, beside a file of
labels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import decoding
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.formats import EXTENSIONS, HEAD, OTHER_SUFFIXES, kind_of, suffix_of
from alexnet_kernels.training.labels import Labels, read_labels
from alexnet_kernels.training.reading import USUAL, Reading, find_split, locate, note_of
from alexnet_kernels.training.source import Source

__all__ = [
    "Batch",
    "ImageSet",
    "StoredImages",
    "check_classes",
    "check_stored_size",
    "check_unread",
    "decode_into_memory",
    "difference",
    "images_among",
    "open_splits",
    "unreadable",
]

_LISTED = 5
"""Names that an error message lists."""


class Batch(TypedDict):
    """Some images of a set."""

    images: Tensor
    """uint8 [n, size, size, 3] as stored; float32 [n, 3, h, w] once augmented."""
    labels: Tensor
    """int64 [n]"""
    indices: Tensor
    """int64 [n], the images' places in the set."""
    bad: list[str]
    """Unreadable files, each with the reason; the tensors do not contain them."""


class StoredImages(torch.utils.data.Dataset):
    """One split of an image set, however it is stored: the interface of `ImageSet` and `ShardSet`."""

    files: list[str]
    """Names of the images, <split>/<class>/..., or <split>/... where a file gave the classes."""
    labels: Tensor
    """int64 [N]"""
    classes: list[str]
    size: int
    """Side of the stored squares, in pixels."""
    pixels: Tensor | None = None
    """The whole split, uint8 [N, size, size, 3], or None if it is read batch by batch."""
    bad: Sequence[str] = ()
    """Unreadable files and folders that were left out, each with the reason."""
    ignored: Mapping[str, str] = MappingProxyType({})
    """Files of the split that are not taken for images, or are in no class, and why."""
    note: str = ""
    """What a user should know about how the split was found: one line, or ""."""
    statistics: Statistics | None = None
    """Pixel statistics of all training images, if they are known."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        raise NotImplementedError

    def use_threads(self, count: int) -> bool:
        """Read batches by `count` threads of this process. Returns False if other processes should read them."""
        return False

    def checksums(self) -> tuple[str, Sequence[int]]:
        """A checksum of each image, and its kind; "" if there are none."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the images' names, in order, a colon, the kind of checksum of their contents and a hash of those.

        With the name of an image whose class a file gave goes the class.
        """
        kind, sums = self.checksums()
        names = hashlib.sha256("\n".join(self.names_with_classes()).encode(errors="surrogateescape")).hexdigest()
        return f"{names}:{kind}-{hashlib.sha256(','.join(map(str, sums)).encode()).hexdigest()}"

    def names_with_classes(self) -> Iterator[str]:
        """The images' names, which tell the class, or the name and the class."""
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            yield name if name.count("/") > 1 else f"{name}\0{self.classes[label]}"

    def sample(self, count: int) -> Tensor:
        """Up to `count` images at equal distances in the split, uint8 [n, size, size, 3]."""
        step = max(1, -(-len(self) // count))
        return self.__getitems__(list(range(0, len(self), step)))["images"]


@dataclass
class ImageSet(StoredImages):
    """One split in a folder or zip. `pixels` holds the decoded images, or they are decoded when they are read."""

    source: Source
    files: list[str]
    labels: Tensor
    classes: list[str]
    size: int
    pixels: Tensor | None = None
    bad: list[str] = field(default_factory=list)
    ignored: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    split: str = ""
    """The split's folder."""
    may_lack_classes: bool = False
    """Whether classes may have no images."""

    def checksums(self) -> tuple[str, Sequence[int]]:
        return self.source.checksums(self.files)

    def relabel(self, classes: list[str]) -> None:
        """Number the classes of the images by their places in `classes`, which holds them all."""
        number = {name: i for i, name in enumerate(classes)}
        places = torch.tensor([number.get(name, -1) for name in self.classes], dtype=torch.int64)
        self.labels, self.classes = places[self.labels], list(classes)

    def __getitems__(self, places: Sequence[int]) -> Batch:
        indices = torch.as_tensor(places, dtype=torch.int64)
        bad: list[str] = []
        if self.pixels is not None:
            images = self.pixels[indices]
        else:
            images = torch.empty(len(places), self.size, self.size, 3, dtype=torch.uint8)
            good = []
            with decoding.pillow_warnings_off():
                for row, place in enumerate(places):
                    try:
                        images[row] = decoding.decode(self.source.open(self.files[place]), self.size)
                        good.append(row)
                    except MemoryError:
                        raise
                    except Exception as error:
                        bad.append(f"{self.files[place]}: {decoding.error_reason(error)}")
            if bad:
                images, indices = images[good], indices[good]
        return {"images": images, "labels": self.labels[indices], "indices": indices, "bad": bad}


def _split(source: Source, wanted: str, size: int, labels: Labels | None) -> ImageSet:
    where, tops = f"{source.path}", {name for name in source.folders if "/" not in name}
    split = find_split(wanted, tops)
    if split is None:
        found = sorted(tops | {name.split("/")[0] for name in source.files})
        held = (
            f"it holds {', '.join(found[:_LISTED])}{', ...' if len(found) > _LISTED else ''}"
            if found
            else "it is empty"
        )
        raise InputError(
            f"{where}: there is no {wanted}/ in it ({held}); train/<class>/ and val/<class>/ are expected, or splits "
            "named by options"
        )
    prefix = f"{split}/"
    inside = [name.removeprefix(prefix) for name in source.files if name.startswith(prefix)]
    classes = sorted({name.removeprefix(prefix).split("/")[0] for name in source.folders if name.startswith(prefix)})
    unread = [line for line in source.unread if line.startswith((prefix, f"{split}:"))]
    ignored = {name: "hidden" for name in source.hidden if name.startswith(prefix)}
    if labels is not None:
        if classes:
            raise InputError(f"{where}: --val-labels is for images in no folders, {prefix} has {classes[0]}/")
        names = images_among(source, [prefix + name for name in inside], ignored)
        class_of = labels.of(names)
        ignored |= {name: f"not in {labels.path}" for name in names if name not in class_of}
        files = [name for name in names if name in class_of]
        classes = sorted(set(class_of.values()))
        if not files:
            raise InputError(f"{where}: none of the {len(names)} images in {prefix} is in --val-labels {labels.path}")
    elif not classes:
        reason = f"; not read: {_listed(unread)}" if unread else ""
        reason += "; the classes of images in no folders are given by --val-labels" if inside else ""
        raise InputError(f"{where}: there are no classes in {prefix}; a folder of images for each is expected{reason}")
    else:
        ignored |= {prefix + name: "in no class" for name in inside if "/" not in name}
        files = images_among(source, [prefix + name for name in inside if "/" in name], ignored)
        class_of = {name: name.split("/")[1] for name in files}
    number = {name: i for i, name in enumerate(classes)}
    place = torch.tensor([number[class_of[name]] for name in files], dtype=torch.int64)
    return ImageSet(source, files, place, classes, size, None, unread, ignored, note_of(wanted, split), split)


def images_among(source: Source, names: Sequence[str], ignored: dict[str, str]) -> list[str]:
    """Those of the files that are images; adds the others to `ignored`.

    Files whose suffix says nothing are known by their first bytes.
    """
    reasons: dict[str, str] = {}
    unknown = []
    for name in names:
        if (suffix := suffix_of(name)) in EXTENSIONS:
            continue
        if suffix in OTHER_SUFFIXES:
            reasons[name] = OTHER_SUFFIXES[suffix]
        else:
            unknown.append(name)
    if unknown:
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for name, reason in zip(unknown, pool.map(lambda name: _by_content(source, name), unknown), strict=True):
                if reason:
                    reasons[name] = reason
    ignored |= reasons
    return [name for name in names if name not in reasons]


def _by_content(source: Source, name: str) -> str:
    """Why a file is no image, or "". One that can't be read may be an image, which is unreadable."""
    try:
        head = source.head(name, HEAD)
    except MemoryError:
        raise
    except ValueError as error:
        return decoding.error_reason(error)
    except Exception:
        return ""
    if not head:
        return "empty, with no suffix of images"
    return "" if kind_of(head) else "not taken for an image, by its suffix and first bytes"


def check_classes(images: ImageSet) -> None:
    """InputError if a class has no images and must not lack them."""
    empty = [] if images.may_lack_classes else _empty(images)
    if empty:
        raise InputError(
            f"{images.source.path}: no images in {_listed([f'{images.split}/{name}' for name in empty])} "
            "(.jpeg, .png and others, see docs/data.md); --empty-classes skip leaves empty folders out"
            + (f"; not read: {_listed(images.bad)}" if images.bad else "")
        )


def _empty(images: ImageSet) -> list[str]:
    """The classes without images."""
    counts = torch.bincount(images.labels, minlength=len(images.classes)).tolist()
    return [name for name, count in zip(images.classes, counts, strict=True) if not count]


def difference(before: str, now: str) -> str:
    """How images of one fingerprint differ from those of another: "names", "contents" or "".

    Checksums of different kinds, and those that an earlier version did not take, are not compared.
    """
    (names, _, contents), (other_names, _, other_contents) = before.partition(":"), now.partition(":")
    if names != other_names:
        return "names"
    kinds = contents.partition("-")[0], other_contents.partition("-")[0]
    return "contents" if kinds[0] and kinds[0] == kinds[1] and contents != other_contents else ""


def check_stored_size(images: StoredImages, crop: int, path: str | Path) -> None:
    """InputError if the images were prepared as squares smaller than the crops."""
    if images.size < crop:
        raise InputError(
            f"--image-size {crop}: {path} was prepared at {images.size} x {images.size}; "
            f"prepare it with --size {stored_size(crop)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_unread(sets: Sequence[ImageSet], bad_images: str) -> None:
    """InputError if there are folders that can't be listed and `bad_images` is "refuse". Before images are read."""
    unread = [line for images in sets for line in images.bad]
    if unread and bad_images == "refuse":
        raise unreadable(unread, "folder")


def unreadable(bad: Sequence[str], what: str = "image") -> InputError:
    """The error for unreadable images, or folders, under `--bad-images refuse`."""
    count = f"{len(bad)} {what}{'s' * (len(bad) != 1)} can't be read"
    return InputError(f"{count}: {_listed(bad)}; --bad-images skip leaves such {what}s out")


def _decode_all(images: ImageSet, progress: Callable[[int], None]) -> Iterator[tuple[int, Tensor | str]]:
    def one(place: int) -> Tensor | str:
        try:
            return decoding.decode(images.source.open(images.files[place]), images.size)
        except MemoryError:
            raise
        except Exception as error:
            return f"{images.files[place]}: {decoding.error_reason(error)}"

    with decoding.pillow_warnings_off(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for place, result in enumerate(pool.map(one, range(len(images)))):
            progress(1)
            yield place, result


def decode_into_memory(images: ImageSet, bad_images: str, progress: Callable[[int], None]) -> None:
    """Decode the split into `images.pixels`.

    Unreadable images are left out, or raise InputError if `bad_images` is "refuse". progress: called with the number of
    images decoded since its last call.
    """
    pixels = torch.empty(len(images), images.size, images.size, 3, dtype=torch.uint8)
    good = []
    for place, result in _decode_all(images, progress):
        if isinstance(result, str):
            images.bad.append(result)
        else:
            pixels[place] = result
            good.append(place)
    if images.bad:
        if bad_images == "refuse":
            raise unreadable(images.bad)
        pixels, images.labels = pixels[good], images.labels[good]
        images.files = [images.files[place] for place in good]
        check_classes(images)
    images.pixels = pixels


def open_splits(source: Source, splits: Sequence[str], size: int, reading: Reading = USUAL) -> list[ImageSet]:
    """The splits by name, without reading images.

    Splits in a folder of the source, whose top has none, are found there. Names and labels are as of `Reading`.

    Raises InputError for a missing split, a class without images, or splits with different classes.
    """
    note = locate(source, splits)
    labelled = _labelled(splits, reading)
    labels = read_labels(reading.val_labels, reading.synsets) if reading.val_labels else None
    sets = [_split(source, split, size, labels if split == labelled else None) for split in splits]
    names = [images.split for images in sets]
    if len(set(names)) < len(names):
        raise InputError(f"{source.path}: the splits {', '.join(splits)} are the same folder, {names[0]}/")
    sets[0].note = "; ".join(filter(None, (note, sets[0].note)))
    if reading.empty_classes == "skip":
        _skip_empty(sets)
    for images in sets:
        check_classes(images)
    for name, images in zip(names[1:], sets[1:], strict=True):
        if images.classes != sets[0].classes:
            only = [f"{names[0]}/{one}" for one in sets[0].classes if one not in images.classes]
            only += [f"{name}/{one}" for one in images.classes if one not in sets[0].classes]
            raise InputError(
                f"{source.path}: the classes of {names[0]}/ and {name}/ differ: {_listed(only)} in one only"
            )
    return sets


def _labelled(splits: Sequence[str], reading: Reading) -> str:
    """The split whose images are in no class folders, if `--val-labels` is given: the one for validation."""
    return next((split for split in splits if split in (reading.val_split, "val")), splits[-1])


def _skip_empty(sets: Sequence[ImageSet]) -> None:
    """Leave out the classes that have no images in the first split; other splits may lack images of the rest."""
    first = set(_empty(sets[0]))
    classes = [name for name in sets[0].classes if name not in first]
    for i, images in enumerate(sets):
        empty = set(_empty(images))
        held = [name for name in images.classes if name not in empty]
        left_out = [f"{images.split}/{name}" for name in images.classes if name in empty]
        images.relabel(classes if set(held) <= set(classes) else held)
        images.may_lack_classes = i > 0 or len(sets) == 1
        if left_out:
            images.note = "; ".join(filter(None, (images.note, f"without images: {_listed(left_out)}")))
