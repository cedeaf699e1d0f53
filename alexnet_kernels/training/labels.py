"""Classes of images that are in no class folders, from a file beside them, as ImageNet's validation images have one."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from alexnet_kernels._errors import InputError, first_line, require, shortened
from alexnet_kernels._files import read_bounded

__all__ = ["Labels", "read_labels"]

_LARGEST = 64 << 20
_CLASSES = 1000
"""Classes of ILSVRC, whose synsets come first in the devkit's meta.mat."""
_SYNSET = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"(\d+)$")


class Labels:
    """The classes of images: by their names without suffix, or in their order."""

    def __init__(self, path: str, by_name: dict[str, str], in_order: list[str]) -> None:
        self.path, self._by_name, self._in_order = path, by_name, in_order

    def of(self, names: Sequence[str]) -> dict[str, str]:
        """The class of each image by its name; images that the file does not name are missing.

        A file without names is in the order of the numbers at the end of the images' names, from 1 on, or of the sorted
        names if it has as many lines as there are images. InputError if neither is so.
        """
        stems = {name: _stem(name) for name in names}
        if not self._in_order:
            return {name: self._by_name[stem] for name, stem in stems.items() if stem in self._by_name}
        count, numbers = len(self._in_order), {}
        for name, stem in stems.items():
            if (number := _NUMBER.search(stem)) and 1 <= int(number[1][-9:]) <= count:
                numbers[name] = int(number[1][-9:])
        if len(set(numbers.values())) == len(names):
            return {name: self._in_order[number - 1] for name, number in numbers.items()}
        if count != len(names):
            raise InputError(
                f"--val-labels {self.path} has the classes of {count:,} images in their order, there are {len(names):,}"
            )
        return dict(zip(sorted(names), self._in_order, strict=True))


def read_labels(path: str | Path, synsets: str | Path = "") -> Labels:
    """The classes that a file gives. One line an image, in one of these forms:

        <image>,<class>[ ...]    CSV, a first line ImageId,... is left out: Kaggle's LOC_val_solution.csv
        <image> <class>          names of classes
        <image> <number>         Caffe's val.txt: numbers from 0 in the order of `synsets`
        <class>                  in the order of the images: TensorFlow's imagenet_2012_validation_synset_labels.txt
        <number>                 ILSVRC2012_validation_ground_truth.txt: numbers from 1 in the devkit's order

    An image is named with or without its suffix and folders.

    Args:
        path: the file.
        synsets: a file with a class's name at the start of each line, in the order of the numbers (Caffe's synsets.txt
            or synset_words.txt), or the devkit's meta.mat.

    Raises:
        InputError: another form, numbers without `synsets` or outside of them, the devkit's numbers with sorted names.
        MissingPackage: meta.mat without scipy.
    """
    rows = [_fields(line) for line in _lines(path, "--val-labels")]
    if rows and len(rows[0]) > 1 and rows[0][0].lower() in ("imageid", "image", "filename", "file", "id", "name"):
        rows = rows[1:]
    if not rows:
        raise InputError(f"--val-labels {path} has no lines")
    width = min(len(rows[0]), 2)
    wrong = next((i for i, row in enumerate(rows, 1) if min(len(row), 2) != width), 0)
    if wrong:
        raise InputError(f"--val-labels {path}: line {wrong} is not of the form of the first one")
    classes = [row[width - 1] for row in rows]
    if all(name.isdecimal() for name in classes):
        classes = _named(path, [int(name[:9]) for name in classes], synsets, first=2 - width)
    elif synsets:
        raise InputError(f"--synsets is for numbers, --val-labels {path} has names of classes")
    if width == 1:
        return Labels(str(path), {}, classes)
    by_name: dict[str, str] = {}
    for row, name in zip(rows, classes, strict=True):
        if by_name.setdefault(_stem(row[0]), name) != name:
            raise InputError(f"--val-labels {path} has two classes for {row[0]}")
    return Labels(str(path), by_name, [])


def _named(path: str | Path, numbers: list[int], synsets: str | Path, first: int) -> list[str]:
    """The names of classes by their numbers from `first` on."""
    if not synsets:
        order = "meta.mat of the devkit" if first else "synsets.txt or synset_words.txt of Caffe"
        raise InputError(
            f"--val-labels {path} has numbers: name the file with the classes' names in their order by --synsets, "
            f"for ImageNet {order}"
        )
    names = _synsets(synsets)
    if first and names == sorted(names) and _SYNSET.fullmatch(names[0]):
        raise InputError(
            f"--synsets {synsets} is sorted, which is Caffe's and Kaggle's order; the numbers of --val-labels {path} "
            "are in the order of ILSVRC's devkit: name its meta.mat"
        )
    least, most = min(numbers), max(numbers)
    if least < first or most >= first + len(names):
        raise InputError(
            f"--val-labels {path} has numbers from {least} to {most}, --synsets {synsets} names {first} to "
            f"{first + len(names) - 1}"
        )
    return [names[number - first] for number in numbers]


def _synsets(path: str | Path) -> list[str]:
    if str(path).lower().endswith(".mat"):
        names = _of_devkit(path)
    else:
        names = [fields[0] for line in _lines(path, "--synsets") if (fields := line.split())]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(f"--synsets {path}: a line for each class is expected, which begins with its name")
    return names


def _of_devkit(path: str | Path) -> list[str]:
    require(f"--synsets {path}", "scipy")
    from scipy.io import loadmat

    _read(path, "--synsets")
    try:
        rows = loadmat(path, squeeze_me=True)["synsets"]
        pairs = sorted((int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in rows)
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"--synsets {path} is not meta.mat of ILSVRC's devkit: {first_line(error)}") from error
    return [name for number, name in pairs if number <= _CLASSES]


def _lines(path: str | Path, option: str) -> list[str]:
    try:
        return [line for line in _read(path, option).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeError as error:
        raise InputError(f"{option} {path} is not a text: {first_line(error)}") from error


def _read(path: str | Path, option: str) -> bytes:
    try:
        return read_bounded(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _fields(line: str) -> list[str]:
    """The fields of a line of CSV, or of one with tabs or spaces between them. Of Kaggle's boxes, the synset alone."""
    if "," in line:
        try:
            found = next(csv.reader([line]))
        except csv.Error as error:
            raise InputError(f"--val-labels: {shortened(line)!r} is not a line of CSV: {error}") from error
        first = (found[1].split() or [""])[0]
        return [found[0].strip(), first if _SYNSET.fullmatch(first) else found[1].strip()]
    return line.split("\t") if "\t" in line else line.split()


def _stem(name: str) -> str:
    """An image's name without folders and suffix."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return base.rpartition(".")[0] or base
