"""Images, folders and zips that were made to harm: each is read, left out with a reason or refused in one line."""

from __future__ import annotations

import ast
import io
import os
import resource
import signal
import socket
import struct
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

import alexnet_kernels
from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels._files import atomic_file
from alexnet_kernels.training import datasets, decoding, formats, image_set, source
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.prepare import prepare

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    """Ends a test that waits for a pipe or walks in a circle."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PNG = encoded(Image.new("RGB", (9, 8), (200, 100, 50)), "png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """One image in each of two classes of both splits."""
    for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "0.png").write_bytes(PNG)
    return tmp_path / "tree"


def left_out(path: Path, **options: object) -> list[str]:
    """The lines of what training leaves out of the training images. The others are those of `tree`, read."""
    (found, _) = datasets.open_data(path, 4, bad_images="skip", **options)
    assert found.files == ["train/ant/0.png", "train/bee/0.png"]
    return list(found.bad)


class TestDecoders:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_of_formats_that_are_not_listed_are_not_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Image.init()
        called = []

        def watched(name: str, factory: object, accept: object) -> tuple[object, object]:
            def opened(*arguments: object) -> object:
                called.append(name)
                return factory(*arguments)

            return opened, accept

        for name, (factory, accept) in list(Image.OPEN.items()):
            monkeypatch.setitem(Image.OPEN, name, watched(name, factory, accept))
        writable = set(Image.SAVE) - {"PDF", "PALM", "MPO", "GRIB", "BUFR", "HDF5", "WMF"}
        files = [EPS]
        for name in sorted(writable):
            try:
                files.append(encoded(Image.new("RGB" if name != "XBM" else "1", (16, 16)), name))
            except (OSError, KeyError, ValueError, RuntimeError):
                continue
        assert len(files) > 12
        for file in files:
            try:
                decoding.decode(io.BytesIO(file), 4)
            except Image.UnidentifiedImageError:
                continue
        assert len(set(called)) > 12
        assert set(called) <= set(formats.FORMATS)

    def test_programs_are_not_started(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "bin" / "gs"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        (tree / "train" / "ant" / "1.png").write_bytes(EPS)
        (line,) = left_out(tree)
        assert line.startswith("train/ant/1.png: no known image format (JPEG, PNG")
        assert not (tmp_path / "started").exists()

    def test_every_suffix_is_of_a_listed_format(self) -> None:
        Image.init()
        known = Image.registered_extensions()
        plugin = {".heic", ".heics", ".heif", ".heifs", ".hif"}
        found = {known[suffix] for suffix in formats.EXTENSIONS - plugin} - {"MPO"}
        assert found == set(formats.FORMATS) - {"HEIF"}
        assert not formats.EXTENSIONS & set(formats.OTHER_SUFFIXES)
        # Every suffix that Pillow knows is read or is left out for a reason.
        assert set(known) - set(formats.OTHER_SUFFIXES) - formats.EXTENSIONS <= {".ps", ".pdf", ".palm", ".hdf", ".h5"}

    def test_every_call_names_its_formats(self) -> None:
        """A call of Pillow's Image.open without `formats` reads every format."""
        calls = []
        for path in Path(alexnet_kernels.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    calls.append({word.arg for word in node.keywords})
        assert calls
        assert all("formats" in words for words in calls)


class TestPixels:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (encoded(Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), "tiff"), 0x80),
            (encoded(Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), "tiff", tiffinfo={262: 0}), 255 - 0x80),
            (encoded(Image.fromarray(np.full((8, 8), 0xFFFF, np.uint16)), "png"), 255),
            (b"P5 8 8 65535\n" + b"\x40\x00" * 64, 0x40),
            (b"P5 8 8 4095\n" + b"\x08\x00" * 64, 0x80),
        ],
        ids=["tiff", "white-is-zero", "png", "pgm", "12-bit-pgm"],
    )
    def test_of_16_bits_are_scaled(self, content: bytes, expected: int) -> None:
        assert decoding.decode(io.BytesIO(content), 4).unique().tolist() == [expected]

    def test_of_12_bits_are_scaled(self) -> None:
        rows = bytes([0x80, 0x08, 0x00]) * 4 * 8  # pairs of 0x800
        entries = [(256, 4, 8), (257, 4, 8), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
        entries += [(278, 4, 8), (279, 4, len(rows))]
        table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        content = (
            b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(entries)) + table + bytes(4)
        )
        assert decoding.decode(io.BytesIO(content), 4).unique().tolist() == [0x80]

    @pytest.mark.parametrize("dtype", [np.int32, np.float32])
    @pytest.mark.parametrize("value", [1, 200, 1 << 20])
    def test_of_32_bits_are_refused(self, dtype: type, value: int) -> None:
        content = encoded(Image.fromarray(np.full((8, 8), value, dtype)), "tiff")
        with pytest.raises(ValueError, match="pixels have no known range"):
            decoding.decode(io.BytesIO(content), 4)

    def test_too_many_of_them(self, tree: Path) -> None:
        """A million by a million, in a file of 60 bytes."""
        header = struct.pack(">II5B", 1_000_000, 1_000_000, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zipfile.crc32(chunk))
        (tree / "train" / "ant" / "1.png").write_bytes(content + bytes(4) + b"IDAT" + bytes(4))
        (line,) = left_out(tree)
        assert "exceeds limit" in line

    def test_large_images_are_decoded_one_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        running, most = [0], [0]
        original = decoding._upright

        def watched(image: Image.Image, orientation: int) -> Image.Image:
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.01)
            running[0] -= 1
            return original(image, orientation)

        monkeypatch.setattr(decoding, "_upright", watched)
        monkeypatch.setattr(decoding, "_MANY_PIXELS", 70)
        barrier = threading.Barrier(4)

        def one(place: int) -> torch.Tensor:
            barrier.wait()
            return decoding.decode(io.BytesIO(PNG), 4)

        with ThreadPoolExecutor(4) as pool:
            assert len(list(pool.map(one, range(4)))) == 4
        assert most[0] == 1


class TestMetadata:
    @pytest.mark.parametrize("orientation", range(10))
    @pytest.mark.parametrize("form", ["png", "jpeg", "tiff", "webp"])
    def test_orientation(self, form: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))
        content = encoded(pixels, form, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)).convert("RGB"))
        if form == "tiff":  # the decoder turns these
            expected = Image.open(io.BytesIO(content)).convert("RGB")
        assert torch.equal(decoding.decode(io.BytesIO(content), None), torch.from_numpy(np.array(expected)))

    @pytest.mark.parametrize(
        ("form", "exif"),
        [
            ("png", b"\0\x08\0\2\1\x12\0\3"),
            ("png", b"Exif\0\0II*\0\xff\xff\xff\xff"),
            ("jpeg", b"Exif\0\0"),
            ("jpeg", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_that_is_damaged_is_ignored(self, form: str, exif: bytes) -> None:
        content = encoded(Image.new("RGB", (6, 4), "white"), form, exif=exif)
        assert decoding.decode(io.BytesIO(content), None).shape == (4, 6, 3)

    def test_orientation_beside_a_damaged_entry(self) -> None:
        rational = struct.pack("<HHII", 0x011A, 10, 1, 8 + 2 + 24 + 4)
        entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + rational
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4) + struct.pack("<ii", -1, 0)
        content = encoded(Image.new("RGB", (6, 4), "white"), "jpeg", exif=exif)
        assert decoding.decode(io.BytesIO(content), None).shape == (6, 4, 3)


class TestFolders:
    @pytest.mark.parametrize("target", [".", "..", "../..", "../bee"], ids=["itself", "split", "root", "two"])
    def test_links_in_circles(self, tree: Path, target: str) -> None:
        (tree / "train" / "ant" / "loop").symlink_to(target)
        if target == "../bee":
            (tree / "train" / "bee" / "loop").symlink_to("../ant")
        found = datasets.open_data(tree, 4, bad_images="skip")[0]
        assert found.bad
        assert all(line.endswith(": a link to a folder that holds it") for line in found.bad)
        assert len(found) <= 5
        with pytest.raises(
            InputError, match=r"folders? can't be read: train/ant/loop.*; --bad-images skip leaves such"
        ):
            datasets.open_data(tree, 4)

    def test_link_elsewhere_is_followed(self, tree: Path, tmp_path: Path) -> None:
        (tree / "train" / "ant").rename(tmp_path / "ant")
        (tree / "train" / "ant").symlink_to(tmp_path / "ant")
        assert left_out(tree) == []

    def test_that_can_not_be_listed(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tree / "train" / "ant" / "locked").mkdir()
        original = os.scandir

        def scandir(path: Path) -> object:
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(os, "scandir", scandir)
        assert left_out(tree) == ["train/ant/locked: Permission denied"]
        assert left_out(tree, in_memory=0) == ["train/ant/locked: Permission denied"]
        message = "1 folder can't be read: train/ant/locked: Permission denied"
        with pytest.raises(InputError, match=message):
            datasets.open_data(tree, 4, in_memory=0)
        with pytest.raises(InputError, match=message):
            prepare(tree, tmp_path / "refused", size=4, bad_images="refuse")
        assert not (tmp_path / "refused").exists()
        assert prepare(tree, tmp_path / "set", size=4).left_out == 1
        assert "train/ant/locked,left out,Permission denied" in (tmp_path / "set" / "report.csv").read_text()

    def test_of_other_files(self, tree: Path, tmp_path: Path) -> None:
        for name in ("notes.txt", "Thumbs.db", "raw.dng", "half.png.part"):
            (tree / "train" / "ant" / name).write_bytes(PNG)
        (tree / "train" / "stray.png").write_bytes(PNG)
        assert left_out(tree) == []
        (tree / "train" / "ant" / "none").write_bytes(b"no image")
        (tree / "train" / "ant" / ".hidden.png").write_bytes(PNG)
        assert len(datasets.open_data(tree, 4)[0].ignored) == 7
        report = prepare(tree, tmp_path / "set", size=4)
        assert (report.ignored, report.left_out, report.converted) == (7, 0, 0)
        rows = (tmp_path / "set" / "report.csv").read_text().splitlines()
        assert 'train/ant/Thumbs.db,ignored,"not taken for an image, by its suffix"' in rows
        assert 'train/ant/none,ignored,"not taken for an image, by its suffix and first bytes"' in rows
        assert "train/ant/.hidden.png,ignored,hidden" in rows
        assert "train/ant/raw.dng,ignored,of a format that is not read" in rows
        assert "train/stray.png,ignored,in no class" in rows
        assert len(rows) == 8

    @pytest.mark.parametrize("kind", ["pipe", "socket", "device", "dangling", "circular"])
    @pytest.mark.parametrize("in_memory", [0, 1 << 20])
    def test_of_files_that_are_none(
        self, tree: Path, kind: str, in_memory: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tree / "train" / "ant" / "1.png"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(path.parent)
            socket.socket(socket.AF_UNIX).bind("1.png")
        else:
            path.symlink_to({"device": "/dev/zero", "dangling": "nothing", "circular": "1.png"}[kind])
        found = datasets.open_data(tree, 4, bad_images="skip", in_memory=in_memory)[0]
        lines = found.bad or found.__getitems__(range(len(found)))["bad"]
        assert [line.partition(": ")[0] for line in lines] == ["train/ant/1.png"]
        with pytest.raises(InputError, match=r"1\.png "):
            decoding.read_image(path, 4)

    @pytest.mark.parametrize("kind", ["pipe", "device"])
    def test_path_of_the_set(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "data.zip"
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        with pytest.raises(InputError, match="is neither a folder nor a readable zip: it is not a regular file"):
            datasets.open_data(path, 4)

    def test_file_that_is_too_large(self, tree: Path) -> None:
        with (tree / "train" / "ant" / "1.png").open("wb") as file:
            file.truncate(1 << 40)
        assert left_out(tree) == ["train/ant/1.png: it has 1,099,511,627,776 bytes, at most 268,435,456 are read"]


class TestZips:
    @pytest.fixture
    def archive(self, tree: Path, tmp_path: Path) -> Path:
        with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
            for path in sorted(tree.rglob("*.png")):
                archive.write(path, path.relative_to(tree))
        return tmp_path / "tree.zip"

    def add(self, archive: Path, content: bytes, packing: int = zipfile.ZIP_DEFLATED) -> None:
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("train/ant/1.png", content, packing)

    def declare(self, archive: Path, size: int) -> None:
        """Change the size that the directory of the zip declares for the last file."""
        content = bytearray(archive.read_bytes())
        struct.pack_into("<I", content, content.rindex(b"PK\1\2") + 24, size)
        archive.write_bytes(content)

    @pytest.mark.parametrize("packing", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    @pytest.mark.parametrize("declared", [100, 32 << 20, 0xFFFFFFF0])
    def test_bombs(self, archive: Path, packing: int, declared: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """32 MB in a few kilobytes, which declare less, as much or more."""
        monkeypatch.setattr(source, "LARGEST", 1 << 20)
        self.add(archive, bytes(32 << 20), packing)
        self.declare(archive, declared)
        tracemalloc.start()
        try:
            (line,) = left_out(archive)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()
        assert line.startswith("train/ant/1.png: ")

    def test_that_declare_more_than_they_hold(self, archive: Path) -> None:
        self.add(archive, PNG)
        self.declare(archive, len(PNG) + 1)
        assert left_out(archive) == [f"train/ant/1.png: it has {len(PNG)} bytes, the zip declares {len(PNG) + 1}"]

    def test_damaged_directories(self, archive: Path) -> None:
        """Every byte of a directory, changed: the set is read, in part, or refused in one line."""
        content = archive.read_bytes()
        for place in range(content.index(b"PK\1\2"), len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 0xFF
            archive.write_bytes(damaged)
            try:
                datasets.open_data(archive, 4, bad_images="skip")
            except InputError as error:
                assert "\n" not in str(error)  # noqa: PT017

    def test_names_with_backslashes(self, tree: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
            for path in [tree, *sorted(tree.rglob("*"))]:
                info = zipfile.ZipInfo("x")
                info.filename = str(path.relative_to(tree.parent)).replace("/", "\\") + "\\" * path.is_dir()
                archive.writestr(info, b"" if path.is_dir() else path.read_bytes())
        assert left_out(tmp_path / "windows.zip") == []
        lazy = datasets.open_data(tmp_path / "windows.zip", 4, in_memory=0)[0]
        assert lazy.__getitems__([0, 1])["bad"] == []

    def test_names_outside_with_backslashes(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
            archive.writestr("..\\evil.png", PNG)
        with pytest.raises(InputError, match="names a file outside itself"):
            datasets.open_data(tmp_path / "windows.zip", 4)


class TestShards:
    @pytest.fixture
    def truncated(self, tree: Path, tmp_path: Path) -> image_set.StoredImages:
        prepare(tree, tmp_path / "set", size=32)
        found = datasets.open_data(tmp_path / "set", 32)[0]
        assert len(found.__getitems__([0, 1])["labels"]) == 2
        os.truncate(tmp_path / "set" / "train" / "images-00000.npy", 128 + 32 * 32 * 3 + 1)
        return found

    def test_truncated_while_they_are_read(self, truncated: image_set.StoredImages) -> None:
        assert len(truncated.__getitems__([0])["labels"]) == 1
        with pytest.raises(RunError, match=r"images-00000\.npy was truncated while it was read: remove [^\n]*$"):
            list(ImageLoader(truncated, 1, 0))

    def test_error_of_a_process_that_reads_is_one_line(
        self, truncated: image_set.StoredImages, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """torch puts the traceback of the process into the message."""

        def iterate(self: DataLoader) -> None:
            try:
                truncated.__getitems__([1])
            except RunError:
                wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
            wrapper.reraise()

        monkeypatch.setattr(DataLoader, "__iter__", iterate)
        with pytest.raises(RunError) as caught:
            list(ImageLoader(truncated, 1, 1))
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert "images-00000.npy was truncated" in str(caught.value)

    def test_more_of_them_than_may_be_open(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from alexnet_kernels.training import shards

        monkeypatch.setattr(shards, "_OPEN", 2)
        for i in range(1, 5):
            (tree / "train" / "ant" / f"{i}.png").write_bytes(PNG)
        prepare(tree, tmp_path / "set", size=8, shard_images=1)
        found = datasets.open_data(tmp_path / "set", 8)[0]
        assert len(found.__getitems__([0, 5, 3, 0, 1, 2, 4])["labels"]) == 7
        opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        assert sum(path.is_relative_to(tmp_path) for path in opened) == 2

    def test_mistaken_index(self, tree: Path, tmp_path: Path) -> None:
        prepare(tree, tmp_path / "set", size=8)
        index = tmp_path / "set" / "index.json"
        text = index.read_text()
        for old, new in (
            ('"size": 8', '"size": -8'), ('"size": 8', '"size": 1e99'), ('"size": 8', '"size": "8"'),
            ('"size": 8', '"size": 9'), ('"ant"', "1"), ('["ant", "bee"]', "null"), ('["ant", "bee"]', '["ant"]'),
            ("[2]", "[-2]"), ("[2]", "2"), ("[2]", '["2"]'), ("[2]", "[99999999999999999999]"), ("{", "["),
            (text, "[]"), (text, "7"), (text, "[" * 100_000), ('"splits": {', '"splits": 1, "x": {'),
        ):  # fmt: skip
            assert old in text
            index.write_text(text.replace(old, new, 1))
            with pytest.raises(InputError) as caught:
                datasets.open_data(tmp_path / "set", 8)
            assert "\n" not in str(caught.value)


def test_reason_of_a_failing_write_is_kept(tmp_path: Path) -> None:
    """torch.save raises a RuntimeError about positions, in place of the OSError of its file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), atomic_file(tmp_path / "x") as file:
            torch.save({"x": torch.zeros(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
