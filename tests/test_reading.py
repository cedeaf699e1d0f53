"""Image sets as people have them: formats, damaged metadata, names, zips, splits, labels in files, empty classes."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

pytest.importorskip("lightning")

from runs import environment, train

from alexnet_kernels._errors import InputError
from alexnet_kernels.cli import main
from alexnet_kernels.training import checkpoint, datasets, decoding, formats, inference, shards, source
from alexnet_kernels.training.labels import read_labels
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.prepare import prepare
from alexnet_kernels.training.reading import Reading
from alexnet_kernels.training.settings import settings_of
from alexnet_kernels.training.spec import resumed_run

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 20, 3), np.uint8))
SMALL = {"image_size": 64, "width": 0.04, "epochs": 1, "batch_size": 4, "precision": "32"}


def encoded(form: str, image: Image.Image = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PNG = encoded("png")


def make(root: Path, splits: Sequence[str] = ("train", "val"), classes: Sequence[str] = ("ant", "bee")) -> Path:
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                (root / split / name / f"{i}.png").write_bytes(PNG)
    return root


def zipped(root: Path, path: Path, prefix: str = "", separator: str = "/") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(file for file in root.rglob("*") if file.is_file()):
            info = zipfile.ZipInfo("x")
            info.filename = prefix + str(file.relative_to(root)).replace("/", separator)
            archive.writestr(info, file.read_bytes())
    return path


class TestFormats:
    FILES = (
        (".jfif", "JPEG"), (".jpe", "JPEG"), (".mpo", "MPO"), (".jp2", "JPEG2000"), (".avif", "AVIF"), (".tga", "TGA"),
        (".ico", "ICO"), (".dds", "DDS"), (".pcx", "PCX"), ("", "PNG"), (".jpg_large", "JPEG"), (".image", "WEBP"),
        (".1", "TIFF"), (".x", "BMP"), (".y", "PPM"), (".z", "AVIF"), (".w", "JPEG2000"), (".v", "ICO"),
    )  # fmt: skip

    @pytest.mark.parametrize("kind", ["folder", "zip"])
    def test_by_suffix_or_content(self, tmp_path: Path, kind: str) -> None:
        root, expected = make(tmp_path / "set"), []
        for suffix, form in self.FILES:
            if form == "AVIF" and not features.check("avif"):
                continue
            expected.append(f"train/ant/x{suffix}")
            (root / expected[-1]).write_bytes(encoded(form))
        for name in ("README.txt", "Thumbs.db", "none", "page.q", "empty", "P5 is a page.b"):
            (root / "train/ant" / name).write_bytes(b"" if name == "empty" else b"P5 is text\nBM II*")
        os.mkfifo(root / "train/ant/pipe")
        found = datasets.open_data(root if kind == "folder" else self.without_pipe(root, tmp_path), 16)[0]
        assert found.files[2:-2] == sorted(expected)
        assert found.bad == []
        assert len(found.ignored) == (7 if kind == "folder" else 6)
        assert found.ignored["train/ant/Thumbs.db"] == "not taken for an image, by its suffix"
        assert found.ignored["train/ant/page.q"] == "not taken for an image, by its suffix and first bytes"

    def without_pipe(self, root: Path, tmp_path: Path) -> Path:
        (root / "train/ant/pipe").unlink()
        return zipped(root, tmp_path / "set.zip")

    def test_known_suffixes_are_not_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        root, opened = make(tmp_path / "set"), []
        (root / "train/ant/x.csv").write_bytes(PNG)
        (root / "train/ant/x.odd").write_bytes(PNG)
        monkeypatch.setattr(source, "read_head", lambda path, count: opened.append(path.name) or PNG[:count])
        assert len(datasets.open_data(root, 16, in_memory=0)[0]) == 5
        assert opened == ["x.odd"]

    @pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "HEIF"])
    def test_decoder_that_is_not_there_is_named(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        head = {"AVIF": b"\0\0\0\x1cftypavif", "JPEG2000": b"\xffO\xffQ", "HEIF": b"\0\0\0\x1cftypheic"}[kind]
        monkeypatch.setattr(features, "check", lambda name: False)
        monkeypatch.setattr(decoding, "_decoders", lambda: ("JPEG", "JPEG2000"))
        message = "HEIF needs pillow-heif" if kind == "HEIF" else f"this Pillow was built without a decoder for {kind}"
        with pytest.raises(ValueError, match=message):
            decoding.decode(io.BytesIO(head + bytes(60)), 4)

    def test_signatures_are_those_of_pillow(self) -> None:
        for form in ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "ICO", "ICNS", "SGI", "DDS"):
            assert formats.kind_of(encoded(form)[: formats.HEAD]) == form


class TestMetadata:
    """Pixels are read whatever the metadata are, and truncated pixels are not."""

    def chunk(self, kind: bytes, content: bytes, crc: int | None = None) -> bytes:
        crc = zlib.crc32(kind + content) if crc is None else crc
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    def damaged(self, name: str) -> bytes:
        if name.startswith("png"):
            bomb = zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 1))
            added = {
                "png-text": self.chunk(b"zTXt", b"a\0\0" + bomb),
                "png-itxt": self.chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
                "png-icc": self.chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22))),
                "png-crc": self.chunk(b"tIME", b"1234567", crc=1),
                "png-short": self.chunk(b"pHYs", b"12"),
                "png-apng": self.chunk(b"acTL", b"1"),
            }[name]
            exif = self.chunk(b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
            return PNG[:33] + exif + added + PNG[33:]
        if name == "tiff":
            content = bytearray(encoded("tiff", dpi=(72, 72)))
            (place,) = struct.unpack_from("<I", content, 4)
            for at in range(place + 2, place + 2 + 12 * content[place], 12):
                if struct.unpack_from("<H", content, at)[0] in (282, 283, 296):
                    struct.pack_into("<HI", content, at + 2, 3, 0x7FFFFFFF)
            return bytes(content)
        jpeg = encoded("jpeg")
        added = {
            "jpeg-mpf": b"\xff\xe2\0\x0cMPF\0II*\0\xff\xff",
            "jpeg-photoshop": b"\xff\xed\0\x1aPhotoshop 3.0\x008BIM\x03",
            "jpeg-icc": b"\xff\xe2\0\x10ICC_PROFILE\0\x09",
        }[name]
        return jpeg[:2] + added + jpeg[2:]

    @pytest.mark.parametrize(
        "name",
        ["png-text", "png-itxt", "png-icc", "png-crc", "png-short", "png-apng", "tiff", "jpeg-mpf", "jpeg-photoshop",
         "jpeg-icc"],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore")
    def test_damaged(self, name: str) -> None:
        content = self.damaged(name)
        turned = (20, 16, 3) if name.startswith("png") else (16, 20, 3)
        assert decoding.decode(io.BytesIO(content), None).shape == turned
        assert decoding.mode_of(io.BytesIO(content)) == "RGB"
        plain = {"p": PNG, "t": encoded("tiff"), "j": encoded("jpeg")}[name[0]]
        expected = decoding.decode(io.BytesIO(plain), None)
        found = decoding.decode(io.BytesIO(content), None)
        assert torch.equal(found, expected.rot90(-1) if turned[0] == 20 else expected)

    def test_damaged_name_of_a_chunk(self) -> None:
        """A palette whose chunk was damaged is not left out as metadata are."""
        content = encoded("png", PICTURE.convert("P"))
        assert b"PLTE" in content
        with pytest.raises((OSError, SyntaxError)):
            decoding.decode(io.BytesIO(content.replace(b"PLTE", b"PLtE")), None)

    @pytest.mark.parametrize("form", ["png", "jpeg", "tiff"])
    def test_truncated_pixels(self, form: str) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8))
        content = encoded(form, noise)
        cut = content[: len(content) // 2] if form != "tiff" else content[:8] + content[2000:]
        with pytest.raises((OSError, SyntaxError, ValueError)):
            decoding.decode(io.BytesIO(cut), 8)


class TestNames:
    C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}  # noqa: RUF012

    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        """Classes caf\\xe9, which is not UTF-8, and ñandú, which is; a file \\xff.png and one that can't be read."""
        root = make(tmp_path / "bäume", classes=("cat", "ñandú"))
        for split in (b"train", b"val"):
            os.rename(os.fsencode(root) + b"/" + split + b"/cat", os.fsencode(root) + b"/" + split + b"/caf\xe9")
        os.rename(os.fsencode(root) + b"/train/caf\xe9/0.png", os.fsencode(root) + b"/train/caf\xe9/\xff.png")
        (root / "train" / "ñandú" / "é.png").write_bytes(b"no image")
        return root

    def command(self, locale: dict[str, str], *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alexnet_kernels", *map(str, arguments)],
            cwd="/",
            env={**environment(), **locale},
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    def test_in_any_locale(self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        settings = settings_of("quick", **SMALL)
        result = train(settings, tree, out=tmp_path / "run", bad_images="skip")
        classes = ["caf\udce9", "ñandú"]
        assert checkpoint.load(tmp_path / "run" / "best.ckpt").header.classes == classes
        assert [line.partition(":")[0] for line in result.skipped] == ["train/ñandú/é.png"]
        table = self.command(self.C, "evaluate", tmp_path / "run", "--per-class", "--confusion", tmp_path / "c.png")
        assert {"caf\\xe9", "\\xf1and\\xfa"} <= {cell.strip() for row in table.splitlines() for cell in row.split("|")}
        assert len({len(row) for row in table.splitlines() if row.startswith(("|", "+"))}) == 1
        text = self.command(self.C, "prepare", tree, tmp_path / "set", "--size", "73", "--workers", "1")
        assert "1 images left out" in text
        assert prepare(tree, tmp_path / "set", size=73).left_out == 1  # the same source as in the other locale
        files = json.loads((tmp_path / "set/train/files.json").read_text())
        assert files[:2] == ["caf\udce9/1.png", "caf\udce9/\udcff.png"]
        assert "train/ñandú/é.png,left out" in (tmp_path / "set/report.csv").read_text()
        a, b = datasets.open_data(tmp_path / "set", 73)[0], datasets.open_data(tree, 73, bad_images="skip")[0]
        assert (a.files, a.classes) == (b.files, b.classes)
        assert a.fingerprint().partition(":")[0] == b.fingerprint().partition(":")[0]
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "set"), "--json"]) == 0
        assert list(json.loads(capsys.readouterr().out)["per_class"]) == classes

    def test_of_zips(self, tmp_path: Path) -> None:
        """UTF-8 with and without the flag that says so, and code page 437."""
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for split in ("train", "val"):
                for name in ("ñandú", "plain"):
                    archive.writestr(f"{split}/{name}/0.png", PNG)
                archive.writestr(f"{split}/XXXXX/0.png", PNG)
                archive.writestr(f"{split}/YY/0.png", PNG)
        content = path.read_bytes().replace(b"XXXXX", "crème".encode()[:5]).replace(b"YY", b"\x82t")
        content = content.replace("crème".encode()[:5], "été".encode())
        path.write_bytes(content)
        assert datasets.open_data(path, 4)[0].classes == sorted(["ñandú", "plain", "été", "ét"])

    @pytest.mark.parametrize("prefix", ["", "top\\", "top/", "./"])
    def test_backslashes(self, tmp_path: Path, prefix: str) -> None:
        root = make(tmp_path / "set")
        path = zipped(root, tmp_path / "set.zip", prefix, "\\")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{prefix}train/bee/2.png".replace("\\", "/"), PNG)
        for in_memory in (0, 1 << 20):
            found = datasets.open_data(path, 4, in_memory=in_memory)[0]
            assert found.files[-1] == "train/bee/2.png"
            assert len(found.__getitems__(range(5))["labels"]) == 5


class TestSplits:
    @pytest.mark.parametrize(
        ("names", "found"),
        [
            (("train", "valid"), ("train", "valid")),
            (("Train", "validation", "test"), ("Train", "validation")),
            (("training", "VAL", "valid"), ("training", "VAL")),
            (("train", "test"), ("train", "test")),
        ],
    )
    def test_other_names(self, tmp_path: Path, names: tuple[str, ...], found: tuple[str, str]) -> None:
        root = make(tmp_path / "set", names)
        sets = datasets.open_data(root, 16)
        prepare(root, tmp_path / "prepared", size=16)
        prepared = datasets.open_data(tmp_path / "prepared", 16)
        for first, second, name in zip(sets, prepared, found, strict=True):
            assert {file.split("/")[0] for file in first.files} == {name}
            assert first.files == second.files
            assert first.note == second.note
        assert ("test/ is taken for validation" in sets[1].note) == (found[1] == "test")

    def test_named_by_options(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root, out = make(tmp_path / "set", ("val", "fit", "check")), tmp_path / "run"
        given = {"train_split": "fit", "val_split": "check"}
        settings = settings_of("quick", **{**SMALL, "epochs": 2})
        train(settings, root, out=out, reading=given, max_seconds=1e-6)
        header = checkpoint.load(out / "last.ckpt").header
        assert (header.reading.train_split, header.reading.val_split) == ("fit", "check")
        assert resumed_run(out, {}).reading == header.reading
        with pytest.raises(InputError, match="images of other names"):
            train(settings, resume=out, reading={"val_split": "val"})
        train(settings, resume=out)
        assert main(["evaluate", str(out)]) == 0
        assert main(["evaluate", str(out), "--data", str(root), "--val-split", "fit"]) == 0
        assert main(["evaluate", str(out), "--data", str(root), "--val-split", "no"]) == 2
        assert "there is no no/ in it" in capsys.readouterr().err
        with pytest.raises(InputError, match="--train-split and --val-split are both val"):
            Reading(train_split="val")

    def test_prepared_train_and_test_can_be_trained_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = make(tmp_path / "set", ("train", "test"))
        assert prepare(root, tmp_path / "p", size=73, splits=("train", "test")).counts == {"train": 4, "test": 4}
        options = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        assert main(["train", "--data", str(tmp_path / "p"), "--out", str(tmp_path / "run"), *options]) == 0
        assert "there is no val/: test/ is taken for validation" in capsys.readouterr().out

    @pytest.mark.parametrize("kind", ["folder", "zip"])
    def test_a_few_folders_deep(self, tmp_path: Path, kind: str) -> None:
        root = tmp_path / "set"
        make(root / "ILSVRC/Data/CLS-LOC")
        make(root / "ILSVRC/Annotations/CLS-LOC")
        for path in (root / "ILSVRC/Annotations").rglob("*.png"):
            path.rename(path.with_suffix(".xml"))
        path = root if kind == "folder" else zipped(root, tmp_path / "set.zip")
        train_set, val_set = datasets.open_data(path, 16, in_memory=0)
        assert train_set.files[0] == "train/ant/0.png"
        assert train_set.note == "the images are those in ILSVRC/Data/CLS-LOC/"
        assert len(train_set.__getitems__([0])["labels"]) == 1
        assert val_set.fingerprint() == datasets.open_data(root / "ILSVRC/Data/CLS-LOC", 16)[1].fingerprint()
        make(root / "other")
        with pytest.raises(InputError, match="in ILSVRC/Data/CLS-LOC, other: name one of these folders"):
            datasets.open_data(root, 16)


class TestLabels:
    SYNSETS = ("n02119789", "n01440764", "n02084071")  # not sorted, as in the devkit

    @pytest.fixture
    def flat(self, tmp_path: Path) -> Path:
        """ImageNet's layout: val/ has no class folders."""
        root = make(tmp_path / "set", ("train",), self.SYNSETS)
        (root / "val").mkdir()
        for i in range(1, 7):
            (root / f"val/ILSVRC2012_val_{i:08d}.JPEG").write_bytes(encoded("jpeg"))
        return root

    def write(self, folder: Path, name: str) -> tuple[str, str]:
        """The file of that form, for classes 0 1 2 2 1 0 of the sorted synsets, and that of synsets if needed."""
        places, ordered = (0, 1, 2, 2, 1, 0), sorted(self.SYNSETS)
        images = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 7)]
        rows = list(zip(images, places, strict=True))
        texts = {
            "kaggle": "ImageId,PredictionString\n"
            + "".join(f"{image},{ordered[k]} 1 2 3 4 {ordered[k]} 5 6 7 8 \n" for image, k in reversed(rows)),
            "caffe": "".join(f"{image}.JPEG {k}\n" for image, k in rows),
            "tensorflow": "".join(f"{ordered[k]}\n" for k in places),
            "devkit": "".join(f"{self.SYNSETS.index(ordered[k]) + 1}\n" for k in places),
        }
        (folder / "labels.txt").write_text(texts[name])
        names = {"caffe": ordered, "devkit": self.SYNSETS}.get(name)
        if names is None:
            return str(folder / "labels.txt"), ""
        (folder / "synsets.txt").write_text("".join(f"{one} a word, another\n" for one in names))
        return str(folder / "labels.txt"), str(folder / "synsets.txt")

    @pytest.mark.parametrize("form", ["kaggle", "caffe", "tensorflow", "devkit"])
    def test_every_form(self, flat: Path, tmp_path: Path, form: str) -> None:
        labels, synsets = self.write(tmp_path, form)
        reading = Reading(val_labels=labels, synsets=synsets)
        _, val_set = datasets.open_data(flat, 16, reading=reading)
        assert val_set.classes == sorted(self.SYNSETS)
        assert val_set.labels.tolist() == [0, 1, 2, 2, 1, 0]
        prepare(flat, tmp_path / "p", size=16, reading=reading)
        prepared = datasets.open_data(tmp_path / "p", 16)[1]
        assert prepared.labels.tolist() == [0, 1, 2, 2, 1, 0]
        assert prepared.fingerprint().partition(":")[0] == val_set.fingerprint().partition(":")[0]

    def test_of_a_run(self, flat: Path, tmp_path: Path) -> None:
        labels, _ = self.write(tmp_path, "kaggle")
        settings = settings_of("quick", **{**SMALL, "epochs": 2})
        train(settings, flat, out=tmp_path / "run", reading={"val_labels": labels}, max_seconds=1e-6)
        assert checkpoint.load(tmp_path / "run/last.ckpt").header.reading.val_labels == labels
        text = Path(labels).read_text()
        first, second = sorted(self.SYNSETS)[:2]
        Path(labels).write_text(text.replace(first, "x").replace(second, first).replace("x", second))
        with pytest.raises(InputError, match="images of other names or labels"):
            train(settings, resume=tmp_path / "run")
        Path(labels).write_text(text)
        train(settings, resume=tmp_path / "run")
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        prepare(flat, tmp_path / "p", size=73, reading=Reading(val_labels=labels))
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "p")]) == 0

    @pytest.mark.parametrize(
        ("text", "synsets", "message"),
        [
            ("1\n2\n", "", "has numbers: name the file .* by --synsets, for ImageNet meta.mat of the devkit"),
            ("a.png 0\n", "", "for ImageNet synsets.txt or synset_words.txt of Caffe"),
            ("1\n2\n", "n01440764\nn02084071\n", "is sorted, which is Caffe's and Kaggle's order"),
            ("1\n3\n", "n02084071\nn01440764\n", "has numbers from 1 to 3, --synsets .* names 1 to 2"),
            ("0\n1\n", "b\na\n", "has numbers from 0 to 1, --synsets .* names 1 to 2"),
            ("a.png cat\nb.png\n", "", "line 2 is not of the form of the first one"),
            ("a.png cat\na.jpg dog\n", "", "two classes for a.jpg"),
            ("a.png cat\n", "b\na\n", "--synsets is for numbers"),
            ("", "", "has no lines"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, text: str, synsets: str, message: str) -> None:
        (tmp_path / "l").write_text(text)
        (tmp_path / "s").write_text(synsets)
        with pytest.raises(InputError, match=message):
            read_labels(tmp_path / "l", tmp_path / "s" if synsets else "")

    def test_mistakes_about_the_set(self, flat: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no classes in val/.* given by --val-labels"):
            datasets.open_data(flat, 16)
        labels, _ = self.write(tmp_path, "tensorflow")
        (flat / "val/more.png").write_bytes(PNG)
        with pytest.raises(InputError, match="has the classes of 6 images in their order, there are 7"):
            datasets.open_data(flat, 16, reading=Reading(val_labels=labels))
        with pytest.raises(InputError, match=r"--val-labels is for images in no folders, val/ has ant/"):
            datasets.open_data(make(tmp_path / "tree"), 16, reading=Reading(val_labels=labels))

    def test_meta_mat_of_the_devkit(self, tmp_path: Path) -> None:
        io_ = pytest.importorskip("scipy.io")
        kinds = [("ILSVRC2012_ID", object), ("WNID", object)]
        rows = np.array([(i + 1, name) for i, name in enumerate(self.SYNSETS)], dtype=kinds)
        io_.savemat(tmp_path / "meta.mat", {"synsets": rows.reshape(-1, 1)})
        (tmp_path / "l").write_text("2\n1\n3\n")
        found = read_labels(tmp_path / "l", tmp_path / "meta.mat").of(["x_1.png", "x_2.png", "x_3.png"])
        assert list(found.values()) == ["n01440764", "n02119789", "n02084071"]


class TestEmptyClasses:
    def test_are_left_out_where_asked(self, tmp_path: Path) -> None:
        root = make(tmp_path / "set")
        (root / "train/cow").mkdir()
        (root / "val/cow").mkdir()
        (root / "train/emu").mkdir()
        with pytest.raises(InputError, match=r"no images in train/cow, train/emu .*--empty-classes skip"):
            datasets.open_data(root, 16)
        for place in ("train/fox", "train/ant"):
            (root / place).mkdir(exist_ok=True)
            (root / place / "9.png").write_bytes(PNG)
        skip = Reading(empty_classes="skip")
        train_set, val_set = datasets.open_data(root, 16, reading=skip)
        assert train_set.classes == val_set.classes == ["ant", "bee", "fox"]
        assert train_set.labels.tolist() == [0, 0, 0, 1, 1, 2]
        assert val_set.labels.tolist() == [0, 0, 1, 1]
        assert train_set.note == "without images: train/cow, train/emu"
        prepare(root, tmp_path / "p", size=73, reading=skip)
        assert datasets.open_data(tmp_path / "p", 73)[1].labels.tolist() == [0, 0, 1, 1]
        (root / "val/emu").mkdir()
        (root / "val/emu/0.png").write_bytes(PNG)
        with pytest.raises(InputError, match=r"differ: val/emu in one only|differ: train/fox, val/emu in one only"):
            datasets.open_data(root, 16, reading=skip)

    def test_when_evaluating(self, tmp_path: Path) -> None:
        root = make(tmp_path / "set", classes=("ant", "bee", "cow"))
        train(settings_of("quick", **SMALL), root, out=tmp_path / "run")
        network = checkpoint.load_network(tmp_path / "run")
        for path in (root / "val/ant").iterdir():
            path.unlink()
        with pytest.raises(InputError, match="no images in val/ant"):
            inference.evaluate(network, root)
        result = inference.evaluate(network, root, reading=Reading(empty_classes="skip"))
        assert [sum(row) for row in result["confusion"]] == [0, 2, 2]


def test_threads_read_a_prepared_set(tmp_path: Path) -> None:
    root = make(tmp_path / "set")
    prepare(root, tmp_path / "p", size=16, shard_images=1)
    train_set = datasets.open_data(tmp_path / "p", 16)[0]
    assert isinstance(train_set, shards.ShardSet)
    expected = train_set.__getitems__([3, 1, 0, 2])
    loader = ImageLoader(train_set, 2, workers=3, seed=0)
    assert (loader.num_workers, train_set.threads) == (0, 3)
    found = train_set.__getitems__([3, 1, 0, 2])
    assert all(torch.equal(found[key], expected[key]) for key in ("images", "labels", "indices"))
    content = bytearray((tmp_path / "p/train/images-00001.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "p/train/images-00001.npy").write_bytes(content)
    batch = train_set.__getitems__([3, 1, 0, 2])
    assert batch["indices"].tolist() == [3, 0, 2]
    assert len(batch["bad"]) == 1
    with pytest.raises(IndexError):
        train_set.__getitems__([0, 1, 4])
