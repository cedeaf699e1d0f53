"""Images in an ImageFolder tree, or in a zip of one, as uint8 tensors.

    root/train/<class>/**/<image>      root/val/<class>/**/<image>

A class's number is its name's place in sorted order. Zips are read in place, nothing is unpacked.
"""

from __future__ import annotations

import errno
import io
import os
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.training.augmentation import Statistics, stored_size

__all__ = ["EXTENSIONS", "SHIPPED", "Batch", "ImageSet", "Source", "StoredImages", "decode", "open_data", "read_image"]

SHIPPED = Path(__file__).parent.parent / "data" / "cifar10_small.zip"
"""The image set that comes with the package."""

EXTENSIONS = frozenset((".gif", ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))

IN_MEMORY = 2 << 30
"""Bytes up to which a set is decoded once and held; a larger one is decoded again in every epoch."""

_MACHINE_ERRORS = frozenset(
    (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE,
        errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN,
    )
)  # fmt: skip

_NAMED = 5


def decode(file: io.BytesIO | Path, size: int | None) -> Tensor:
    """The image as uint8 [size, size, 3]: the shorter side resized (bicubic), the centre kept.

    With size=None, [height, width, 3] as stored. A JPEG more than four times as large is decoded at a half, a
    quarter or an eighth of its size, at least twice the square's. Grey, palette, CMYK and 16-bit images become RGB,
    transparent ones are laid on white, and an EXIF orientation is applied. A damaged file raises what its
    decoder raises.
    """
    with Image.open(file) as opened:
        if size is not None:
            opened.draft(None, (2 * size, 2 * size))
        opened.load()
        image = _rgb(ImageOps.exif_transpose(opened))
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey, which convert would cut off at 255.
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Without Pillow's remarks on large images, palettes and metadata; for one thread of a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_image(path: str | Path, size: int) -> Tensor:
    """`decode` of a file of the user's; InputError where that fails."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder, an image file is expected")
    try:
        with no_warnings():
            return decode(path, size)
    except Exception as error:
        raise InputError(f"{path} is not a readable image: {reason(error)}") from error


def reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    return " ".join(str(error).split()) or type(error).__name__


class Source:
    """The files below a folder or inside a zip, by their POSIX paths relative to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path}: there is no such folder or zip")
        self._local = threading.local()
        self._is_zip = self.path.is_file()
        if self._is_zip:
            try:
                with zipfile.ZipFile(self.path) as archive:
                    members = archive.infolist()
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{path} is neither a folder nor a readable zip: {error}") from error
            files = [member.filename for member in members if not member.is_dir()]
            for name in files:
                parts = PurePosixPath(name.replace("\\", "/")).parts
                if not parts or parts[0] == "/" or ":" in parts[0] or ".." in parts or "\\" in name:
                    raise InputError(f"{path}: the zip names a file outside itself, {name!r}")
            folders = [member.filename.rstrip("/") for member in members if member.is_dir()]
        else:
            files, folders = [], []
            for folder, subfolders, names in os.walk(self.path, followlinks=True):
                relative = Path(folder).relative_to(self.path)
                folders += [(relative / name).as_posix() for name in subfolders]
                files += [(relative / name).as_posix() for name in names]
        self._prefix = _common_folder(files) if self._is_zip else ""
        self._sizes = {member.filename: member.file_size for member in members} if self._is_zip else {}
        cut = len(self._prefix)
        self.files = sorted(name[cut:] for name in files if name.startswith(self._prefix) and _visible(name))
        self.folders = sorted(
            name[cut:] for name in folders if name.startswith(self._prefix) and len(name) > cut and _visible(name)
        )

    def size_of(self, name: str) -> int:
        """Bytes of a file; -1 for a link to nothing."""
        if self._is_zip:
            return self._sizes[self._prefix + name]
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return -1

    def at_fault(self, error: Exception) -> bool:
        """Whether the machine or the whole source failed, not the image that was read."""
        return isinstance(error, MemoryError) or (
            isinstance(error, OSError) and (error.errno in _MACHINE_ERRORS or not self.path.exists())
        )

    def __getstate__(self) -> dict[str, object]:
        # For opening files; the lists are long.
        lists = ("files", "folders", "_sizes")
        return {key: value for key, value in self.__dict__.items() if key not in ("_local", *lists)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.files, self.folders, self._sizes = [], [], {}
        self._local = threading.local()

    def open(self, name: str) -> io.BytesIO:
        if not self._is_zip:
            return io.BytesIO((self.path / name).read_bytes())
        # An archive's handle has one position: each thread of each process reads through its own.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.archive, self._local.process = zipfile.ZipFile(self.path), os.getpid()
        return io.BytesIO(self._local.archive.read(self._prefix + name))


def _visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _common_folder(files: Sequence[str]) -> str:
    """The one folder that holds all, where a zip was made of a folder instead of its contents."""
    tops = {name.split("/")[0] for name in files if _visible(name)}
    if len(tops) == 1 and not tops & {"train", "val"}:
        return f"{tops.pop()}/"
    return ""


class Batch(TypedDict):
    """Images of a set."""

    images: Tensor
    """uint8 [n, size, size, 3]; in training and evaluation float32 [n, 3, h, w] once augmented."""
    labels: Tensor
    """int64 [n]"""
    indices: Tensor
    """int64 [n], places in the set."""
    bad: list[str]
    """Files that could not be read, each with its reason; they are missing from the others."""


class StoredImages(torch.utils.data.Dataset):
    """One split's images, wherever they are."""

    files: list[str]
    """The images' names, <split>/<class>/..."""
    labels: Tensor
    """int64 [N]"""
    classes: list[str]
    size: int
    """Side of the squares."""
    pixels: Tensor | None = None
    """The whole set, uint8 [N, size, size, 3], or None where it is read batch by batch."""
    bad: Sequence[str] = ()
    """Unreadable files that were left out, each with its reason."""
    statistics: Statistics | None = None
    """Of all training images, where they are known."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        raise NotImplementedError

    def sample(self, count: int) -> Tensor:
        """Up to `count` images, evenly spaced through the set, uint8 [n, size, size, 3]."""
        step = max(1, -(-len(self) // count))
        return self.__getitems__(list(range(0, len(self), step)))["images"]


@dataclass
class ImageSet(StoredImages):
    """One split's images in a folder or zip: `pixels` if they were decoded at once."""

    source: Source
    files: list[str]
    labels: Tensor
    classes: list[str]
    size: int
    pixels: Tensor | None = None
    bad: list[str] = field(default_factory=list)

    def __getitems__(self, places: Sequence[int]) -> Batch:
        indices = torch.as_tensor(places, dtype=torch.int64)
        bad: list[str] = []
        if self.pixels is not None:
            images = self.pixels[indices]
        else:
            images = torch.empty(len(places), self.size, self.size, 3, dtype=torch.uint8)
            good = []
            with no_warnings():
                for row, place in enumerate(places):
                    try:
                        images[row] = decode(self.source.open(self.files[place]), self.size)
                        good.append(row)
                    except Exception as error:
                        bad.append(f"{self.files[place]}: {reason(error)}")
            if bad:
                images, indices = images[good], indices[good]
        return {"images": images, "labels": self.labels[indices], "indices": indices, "bad": bad}


def _split(source: Source, split: str, size: int) -> ImageSet:
    where = f"{source.path}"
    prefix = f"{split}/"
    if not any(name == split or name.startswith(prefix) for name in [*source.files, *source.folders]):
        found = sorted({name.split("/")[0] for name in [*source.files, *source.folders]})
        held = (
            f"it holds {', '.join(found[:_NAMED])}{', ...' if len(found) > _NAMED else ''}" if found else "it is empty"
        )
        raise InputError(f"{where}: there is no {split}/ in it ({held}); train/<class>/ and val/<class>/ are expected")
    inside = [name.removeprefix(prefix) for name in source.files if name.startswith(prefix)]
    folders = {name.removeprefix(prefix).split("/")[0] for name in source.folders if name.startswith(prefix)}
    classes = sorted(folders | {name.split("/")[0] for name in inside if "/" in name})
    if not classes:
        raise InputError(f"{where}: there are no classes in {split}/; a folder of images for each is expected")
    number = {name: i for i, name in enumerate(classes)}
    files = [name for name in inside if "/" in name and PurePosixPath(name).suffix.lower() in EXTENSIONS]
    labels = torch.tensor([number[name.split("/")[0]] for name in files], dtype=torch.int64)
    result = ImageSet(source, [prefix + name for name in files], labels, classes, size)
    check_classes(result, split)
    return result


def check_classes(images: ImageSet, split: str) -> None:
    counts = torch.bincount(images.labels, minlength=len(images.classes)).tolist()
    empty = [name for name, count in zip(images.classes, counts, strict=True) if not count]
    if empty:
        raise InputError(
            f"{images.source.path}: no images in {_listed([f'{split}/{name}' for name in empty])} "
            f"(one of {', '.join(sorted(EXTENSIONS))} each)"
        )


def check_room(images: StoredImages, crop: int, path: str | Path) -> None:
    """InputError where the squares, as a folder was prepared, are smaller than the crops."""
    if images.size < crop:
        raise InputError(
            f"--image-size {crop}: {path} was prepared at {images.size} x {images.size}; "
            f"prepare it with --size {stored_size(crop)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def refuse(bad: Sequence[str]) -> InputError:
    """The error that unreadable images are under `--bad-images refuse`."""
    count = f"{len(bad)} image{'s' * (len(bad) != 1)} can't be read"
    return InputError(f"{count}: {_listed(bad)}; --bad-images skip leaves such images out")


def _decode_all(images: ImageSet, progress: Callable[[int], None]) -> Iterator[tuple[int, Tensor | str]]:
    def one(place: int) -> Tensor | str:
        try:
            return decode(images.source.open(images.files[place]), images.size)
        except Exception as error:
            return f"{images.files[place]}: {reason(error)}"

    with no_warnings(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for place, result in enumerate(pool.map(one, range(len(images)))):
            progress(1)
            yield place, result


def _load(images: ImageSet, bad_images: str, progress: Callable[[int], None]) -> None:
    """Decode the set into memory, leaving out unreadable images or refusing them."""
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
            raise refuse(images.bad)
        pixels, images.labels = pixels[good], images.labels[good]
        images.files = [images.files[place] for place in good]
        check_classes(images, images.files[0].split("/")[0] if images.files else "")
    images.pixels = pixels


def open_data(
    path: str | Path,
    size: int,
    splits: Sequence[str] = ("train", "val"),
    *,
    bad_images: str = "refuse",
    in_memory: int = IN_MEMORY,
    progress: Callable[[int], None] = lambda count: None,
) -> Sequence[StoredImages]:
    """The splits of an ImageFolder tree, of a zip of one or of a prepared folder, as squares of `size` pixels.

    Args:
        path: the folder or the zip.
        size: side of the stored squares, in pixels; a prepared folder's own are of the size it was prepared at.
        splits: names of the folders to read; their classes must agree.
        bad_images: "refuse" unreadable images with an error that names them, or "skip" them.
        in_memory: bytes up to which the splits together are decoded at once and held in memory.
        progress: called with the number of images read since its last call.

    Raises:
        InputError: nothing there, no classes, a class without images, classes that differ, unreadable images.
    """
    if bad_images not in ("refuse", "skip"):
        raise ValueError(f"bad_images must be 'refuse' or 'skip', got {bad_images!r}")
    from alexnet_kernels.training import shards

    if shards.is_prepared(path):
        return shards.open_shards(path, splits)
    sets = open_splits(Source(path), splits, size)
    if sum(map(len, sets)) * size * size * 3 <= in_memory:
        for images in sets:
            _load(images, bad_images, progress)
    return sets


def open_splits(source: Source, splits: Sequence[str], size: int) -> list[ImageSet]:
    """The splits by name, none of their images read; InputError as of `open_data`."""
    sets = [_split(source, split, size) for split in splits]
    for split, images in zip(splits[1:], sets[1:], strict=True):
        if images.classes != sets[0].classes:
            only = [f"{splits[0]}/{name}" for name in sets[0].classes if name not in images.classes]
            only += [f"{split}/{name}" for name in images.classes if name not in sets[0].classes]
            raise InputError(
                f"{source.path}: the classes of {splits[0]}/ and {split}/ differ: {_listed(only)} in one only"
            )
    return sets
