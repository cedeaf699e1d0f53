"""Splits of an image set as uint8 tensors: their interface, and the splits of an ImageFolder tree or a zip of one.

    root/train/<class>/**/<image>      root/val/<class>/**/<image>

Classes are numbered in the sorted order of their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypedDict

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import decoding
from alexnet_kernels.training.augmentation import Statistics, stored_size
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
    """Names of the images, <split>/<class>/..."""
    labels: Tensor
    """int64 [N]"""
    classes: list[str]
    size: int
    """Side of the stored squares, in pixels."""
    pixels: Tensor | None = None
    """The whole split, uint8 [N, size, size, 3], or None if it is read batch by batch."""
    bad: Sequence[str] = ()
    """Unreadable files and folders that were left out, each with the reason."""
    ignored: Sequence[str] = ()
    """Files that are not taken for images, for their suffix or because they are in no class."""
    statistics: Statistics | None = None
    """Pixel statistics of all training images, if they are known."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        raise NotImplementedError

    def checksums(self) -> tuple[str, Sequence[int]]:
        """A checksum of each image, and its kind; "" if there are none."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the images' names, in order, a colon, the kind of checksum of their contents and a hash of those."""
        kind, sums = self.checksums()
        names = hashlib.sha256("\n".join(self.files).encode(errors="surrogateescape")).hexdigest()
        return f"{names}:{kind}-{hashlib.sha256(','.join(map(str, sums)).encode()).hexdigest()}"

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
    ignored: list[str] = field(default_factory=list)

    def checksums(self) -> tuple[str, Sequence[int]]:
        return self.source.checksums(self.files)

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


def _split(source: Source, split: str, size: int) -> ImageSet:
    where = f"{source.path}"
    prefix = f"{split}/"
    if not any(name == split or name.startswith(prefix) for name in [*source.files, *source.folders]):
        found = sorted({name.split("/")[0] for name in [*source.files, *source.folders]})
        held = (
            f"it holds {', '.join(found[:_LISTED])}{', ...' if len(found) > _LISTED else ''}"
            if found
            else "it is empty"
        )
        raise InputError(f"{where}: there is no {split}/ in it ({held}); train/<class>/ and val/<class>/ are expected")
    inside = [name.removeprefix(prefix) for name in source.files if name.startswith(prefix)]
    folders = {name.removeprefix(prefix).split("/")[0] for name in source.folders if name.startswith(prefix)}
    classes = sorted(folders | {name.split("/")[0] for name in inside if "/" in name})
    unread = [line for line in source.unread if line.startswith((prefix, f"{split}:"))]
    if not classes:
        reason = f"; not read: {_listed(unread)}" if unread else ""
        raise InputError(f"{where}: there are no classes in {split}/; a folder of images for each is expected{reason}")
    number = {name: i for i, name in enumerate(classes)}
    files: list[str] = []
    ignored: list[str] = []
    for name in inside:
        image = "/" in name and PurePosixPath(name).suffix.lower() in decoding.EXTENSIONS
        (files if image else ignored).append(prefix + name)
    labels = torch.tensor([number[name.split("/")[1]] for name in files], dtype=torch.int64)
    result = ImageSet(source, files, labels, classes, size, bad=unread, ignored=ignored)
    check_classes(result, split)
    return result


def check_classes(images: ImageSet, split: str) -> None:
    """InputError if a class has no images."""
    counts = torch.bincount(images.labels, minlength=len(images.classes)).tolist()
    empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"{images.source.path}: no images in {_listed([f'{split}/{name}' for name in empty])} "
            f"(one of {', '.join(sorted(decoding.EXTENSIONS))} each)"
            + (f"; not read: {_listed(images.bad)}" if images.bad else "")
        )


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
        check_classes(images, images.files[0].split("/")[0] if images.files else "")
    images.pixels = pixels


def open_splits(source: Source, splits: Sequence[str], size: int) -> list[ImageSet]:
    """The splits by name, without reading images.

    Raises InputError for a missing split, a class without images, or splits with different classes.
    """
    sets = [_split(source, split, size) for split in splits]
    for split, images in zip(splits[1:], sets[1:], strict=True):
        if images.classes != sets[0].classes:
            only = [f"{splits[0]}/{name}" for name in sets[0].classes if name not in images.classes]
            only += [f"{split}/{name}" for name in images.classes if name not in sets[0].classes]
            raise InputError(
                f"{source.path}: the classes of {splits[0]}/ and {split}/ differ: {_listed(only)} in one only"
            )
    return sets
