"""Preparing image sets: bitwise identical results, every kind of image, and reading them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from runs import environment, train

from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels.cli import main
from alexnet_kernels.training import checkpoint, datasets, decoding, image_set, shards
from alexnet_kernels.training.augmentation import Statistics
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.prepare import prepare
from alexnet_kernels.training.settings import settings_of

SIZE = 24

pytestmark = pytest.mark.slow


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR).convert(mode)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 11 images in train/ and 4 in val/ of each."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 11), ("val", 4)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (30 + 3 * i, 60 - 2 * i)
                picture(100 * label + i + len(split), size=size).save(root / split / name / f"{i:02d}.jpg")
    return root


@pytest.fixture(scope="module")
def prepared(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "set"
    prepare(tree, folder, size=SIZE, shard_images=5)
    return folder


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def pixels(images_: image_set.StoredImages) -> torch.Tensor:
    return images_.__getitems__(range(len(images_)))["images"]


class TestResult:
    def test_holds_what_decoding_gives(self, tree: Path, prepared: Path) -> None:
        for read, decoded in zip(datasets.open_data(prepared, 7), datasets.open_data(tree, SIZE), strict=True):
            assert isinstance(read, shards.ShardSet)
            assert read.size == SIZE
            assert read.classes == decoded.classes == ["ant", "bee"]
            assert read.files == decoded.files
            for places in (range(len(decoded)), [3, 0, len(decoded) - 1]):
                a, b = read.__getitems__(places), decoded.__getitems__(places)
                assert a["bad"] == b["bad"] == []
                for key in ("images", "labels", "indices"):
                    assert torch.equal(a[key], b[key]), key

    def test_statistics_are_of_every_training_image(self, tree: Path, prepared: Path) -> None:
        expected = Statistics.of(pixels(datasets.open_data(tree, SIZE)[0]))
        for split in datasets.open_data(prepared, SIZE):
            assert torch.equal(split.statistics.mean_image, expected.mean_image)
            assert split.statistics.mean == expected.mean
            assert split.statistics.components == expected.components

    def test_files(self, prepared: Path) -> None:
        names = {path.relative_to(prepared).as_posix() for path in prepared.rglob("*") if path.is_file()}
        assert {name for name in names if name.startswith("train/")} == {
            *(f"train/images-0000{i}.npy" for i in range(5)), "train/labels.npy", "train/files.json",
            "train/checksums.npy",
        }  # fmt: skip
        assert {name for name in names if "/" not in name} == {
            "index.json", "plan.json", "statistics.npz", "report.csv"
        }  # fmt: skip
        assert np.load(prepared / "train" / "images-00004.npy").shape == (2, SIZE, SIZE, 3)

    def test_any_number_of_processes_writes_the_same_bytes(self, tree: Path, prepared: Path, tmp_path: Path) -> None:
        prepare(tree, tmp_path / "set", size=SIZE, shard_images=5, workers=2)
        assert contents(tmp_path / "set") == contents(prepared)

    def test_zip_equals_tree(self, tree: Path, prepared: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
            for path in tree.rglob("*.jpg"):
                archive.write(path, path.relative_to(tree))
        prepare(tmp_path / "tree.zip", tmp_path / "set", size=SIZE, shard_images=5)
        a, b = contents(tmp_path / "set"), contents(prepared)
        assert a.pop("plan.json") != b.pop("plan.json")
        assert a == b

    def test_through_processes_and_pickles(self, prepared: Path) -> None:
        train_set = datasets.open_data(prepared, SIZE)[0]
        copy = pickle.loads(pickle.dumps(train_set))
        assert torch.equal(pixels(copy), pixels(train_set))
        read = list(ImageLoader(train_set, 4, workers=2, seed=1))
        here = list(ImageLoader(train_set, 4, workers=0, seed=1))
        assert len(read) == 5
        for a, b in zip(read, here, strict=True):
            assert torch.equal(a["images"], b["images"])
            assert torch.equal(a["indices"], b["indices"])

    def test_trains_and_is_evaluated_as_the_tree(
        self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = settings_of(
            "paper", init="he", epochs=2, batch_size=8, image_size=64, width=0.04, precision="32", lr=0.001
        )
        prepare(tree, tmp_path / "set", size=73, shard_images=5)
        folders = [train(settings, data, out=tmp_path / f"run-{data.name}").folder for data in (tree, tmp_path / "set")]
        a, b = (checkpoint.load(folder / "last.ckpt").content["state_dict"] for folder in folders)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert main(["evaluate", str(folders[1])]) == 0
        assert main(["evaluate", str(folders[1]), "--data", str(tree)]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == second

    def test_of_too_small_a_size(self, prepared: Path, tmp_path: Path) -> None:
        settings = settings_of("quick", epochs=1, batch_size=8, image_size=64, width=0.04)
        with pytest.raises(InputError, match=r"was prepared at 24 x 24; prepare it with --size 73"):
            train(settings, prepared, out=tmp_path / "run")


class TestImages:
    """Images of each kind among ordinary ones."""

    def tree(self, root: Path, **files: bytes) -> Path:
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                (root / split / name).mkdir(parents=True)
                for i in range(2):
                    picture(i).save(root / split / name / f"{i}.png")
        for name, content in files.items():
            (root / "train" / "ant" / name.replace("_", ".")).write_bytes(content)
        return root

    def encoded(self, image: Image.Image, form: str, **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    def test_every_kind_is_read_or_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        jpeg = self.encoded(picture(5, size=(300, 200)), "jpeg")
        files = {
            "grey_jpg": self.encoded(picture(1, "L"), "jpeg"),
            "cmyk_jpg": self.encoded(picture(2, "CMYK"), "jpeg"),
            "palette_png": self.encoded(picture(3).quantize(16), "png"),
            "transparent_png": self.encoded(picture(4, "RGBA"), "png"),
            "large_jpg": self.encoded(picture(6, size=(1000, 800)), "jpeg"),
            "thin_png": self.encoded(picture(7, size=(200, 5)), "png"),
            "empty_jpg": b"",
            "cut_jpg": jpeg[: len(jpeg) // 2],
            "text_jpg": b"no image",
            "frames_gif": self.encoded(picture(9).quantize(8), "gif", save_all=True, append_images=[picture(10)]),
            "huge_png": self.encoded(Image.new("RGB", (3000, 3000)), "png"),
        }
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000_000)
        root = self.tree(tmp_path / "tree", **files)
        (root / "train" / "ant" / "dangling.png").symlink_to(root / "nothing")
        report = prepare(root, tmp_path / "set", size=SIZE)
        assert (report.counts, report.left_out, report.converted) == ({"train": 11, "val": 4}, 5, 5)
        with (tmp_path / "set" / "report.csv").open() as file:
            rows = {Path(row["image"]).name: (row["what"], row["reason"]) for row in csv.DictReader(file)}
        assert {name: reason for name, (what, reason) in rows.items() if what == "converted"} == {
            "grey.jpg": "L", "cmyk.jpg": "CMYK", "palette.png": "P", "transparent.png": "RGBA", "frames.gif": "P"
        }  # fmt: skip
        assert {name for name, (what, _) in rows.items() if what == "left out"} == {
            "empty.jpg", "cut.jpg", "text.jpg", "huge.png", "dangling.png"
        }  # fmt: skip
        assert "pixels" in rows["huge.png"][1]
        train_set = datasets.open_data(tmp_path / "set", SIZE)[0]
        for name, square in zip(train_set.files, pixels(train_set), strict=True):
            assert torch.equal(square, decoding.decode(root / name, SIZE)), name

    def test_large_photograph_is_decoded_smaller_to_nearly_the_same(self, tmp_path: Path) -> None:
        original = picture(8, size=(1600, 1200))
        original.save(tmp_path / "large.jpg", quality=95)
        original.save(tmp_path / "large.png")
        a, b = (decoding.decode(tmp_path / f"large.{kind}", 64).float() for kind in ("jpg", "png"))
        assert (a - b).abs().mean() < 3

    def test_refused(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path / "tree", bad_png=b"no image")
        with pytest.raises(InputError, match=r"1 image can't be read: train/ant/bad\.png: no known image format"):
            prepare(root, tmp_path / "set", size=SIZE, bad_images="refuse")
        with pytest.raises(InputError, match="is not finished: run `alexnet-kernels prepare` again"):
            datasets.open_data(tmp_path / "set", SIZE)
        assert prepare(root, tmp_path / "set", size=SIZE).left_out == 1

    def test_class_of_which_nothing_is_left(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path / "tree")
        for path in (root / "val" / "bee").iterdir():
            path.write_bytes(b"")
        with pytest.raises(InputError, match="no images in val/bee"):
            prepare(root, tmp_path / "set", size=SIZE)


def _group(process: Path) -> int | None:
    """The process group of a running process, by its folder in /proc."""
    try:
        state, _, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else int(group)


def interrupt(source: Path, folder: Path, options: list[str], ready: Callable[[], bool], delay: float = 0.0) -> None:
    """Ctrl-C in the command's terminal, `delay` seconds after it is ready: one line, and no process is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "alexnet_kernels", "prepare", str(source), str(folder), *options],
        cwd="/",
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    try:
        while not ready():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, error) == (
        130,
        "alexnet-kernels: error: interrupted; run the same command to continue\n",
    )
    while any(_group(task) == process.pid for task in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestGoingOn:
    def test_killed_at_any_moment(self, tree: Path, prepared: Path, tmp_path: Path) -> None:
        slow = (
            "import sys, time; from alexnet_kernels.training import decoding; decode = decoding.decode\n"
            "def slowly(*arguments):\n    time.sleep(0.03)\n    return decode(*arguments)\n"
            "decoding.decode = slowly\nfrom alexnet_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        folder = tmp_path / "set"
        options = ["--size", str(SIZE), "--shard-images", "5", "--workers", "1"]
        command = [sys.executable, "-c", slow, "prepare", str(tree), str(folder), *options]
        for records in (0, 2, 4):
            process = subprocess.Popen(command)
            try:
                deadline = time.monotonic() + 60
                while len(list(folder.glob("*/record-*.npz"))) < records or not (folder / "plan.json").exists():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
            assert not (folder / "index.json").exists()
        (folder / "train" / ".images-00004.npy.x.tmp").write_bytes(b"what a kill left behind")
        calls: list[tuple[int, int]] = []
        prepare(tree, folder, size=SIZE, shard_images=5, progress=lambda done, total: calls.append((done, total)))
        assert calls[0][0] >= 20
        assert calls[-1] == (30, 30)
        assert contents(folder) == contents(prepared)

    def test_interrupt(self, tree: Path, prepared: Path, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        many = tmp_path / "many"
        for split in ("train", "val"):
            for name in ("ant", "bee"):
                (many / split / name).mkdir(parents=True)
                for i in range(200):
                    os.link(tree / split / name / "00.jpg", many / split / name / f"{i:03d}.jpg")
        options = ["--shard-images", "20", "--workers", "2"]
        interrupt(many, folder, options, lambda: any(folder.glob("*/record-*.npz")))
        assert prepare(many, folder, shard_images=20).counts == {"train": 400, "val": 400}

    def test_interrupt_while_processes_start(self, tree: Path, prepared: Path, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        options = ["--size", str(SIZE), "--shard-images", "5", "--workers", "2"]
        interrupt(tree, folder, options, (folder / "plan.json").exists, delay=0.5)
        prepare(tree, folder, size=SIZE, shard_images=5)
        assert contents(folder) == contents(prepared)

    def test_shard_that_was_lost_is_written_again(
        self, tree: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import alexnet_kernels.training.prepare as module

        def stop(*arguments: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, "_finish", stop)
            with pytest.raises(KeyboardInterrupt):
                module.prepare(tree, tmp_path / "set", size=SIZE, shard_images=5)
        (tmp_path / "set" / "train" / "images-00001.npy").unlink()
        cut = tmp_path / "set" / "train" / "images-00003.npy"
        cut.write_bytes(cut.read_bytes()[:1000])
        prepare(tree, tmp_path / "set", size=SIZE, shard_images=5)
        assert contents(tmp_path / "set") == contents(prepared)

    def test_source_that_goes_away(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, original = tmp_path / "tree", decoding.decode
        shutil.copytree(tree, source)
        calls = []

        def decode(*arguments: object) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) == 12:
                source.rename(tmp_path / "unmounted")
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(decoding, "decode", decode)
            with pytest.raises(RunError, match="No such file or directory; finished files are kept"):
                prepare(source, tmp_path / "set", size=SIZE, shard_images=5)
        (tmp_path / "unmounted").rename(source)
        assert prepare(source, tmp_path / "set", size=SIZE, shard_images=5).left_out == 0

    def test_two_at_once(self, tree: Path, tmp_path: Path) -> None:
        def again(done: int, total: int) -> None:
            if done == 7:
                with pytest.raises(InputError, match="another process is preparing"):
                    prepare(tree, tmp_path / "set", size=SIZE, shard_images=5)
                seen.append(done)

        seen: list[int] = []
        prepare(tree, tmp_path / "set", size=SIZE, shard_images=5, progress=again)
        assert seen == [7]

    def test_finished_already(self, tree: Path, prepared: Path) -> None:
        before = contents(prepared)
        assert prepare(tree, prepared, size=SIZE, shard_images=5).counts == {"train": 22, "val": 8}
        assert contents(prepared) == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 30}, "size was 24, is 30"),
            ({"shard_images": 6}, "shard_images was 5, is 6"),
            ({"splits": ("train",)}, r"splits was \['train', 'val'\], is \['train'\]"),
        ],
    )
    def test_begun_otherwise(self, tree: Path, prepared: Path, options: dict, message: str) -> None:
        with pytest.raises(InputError, match=message):
            prepare(tree, prepared, **{"size": SIZE, "shard_images": 5, **options})

    def test_images_that_changed(self, prepared: Path, tree: Path) -> None:
        path = tree / "train" / "ant" / "00.jpg"
        content = path.read_bytes()
        try:
            for changed in (
                content + b"x",
                content[:-1] + b"x",
                content[:99] + bytes([content[99] ^ 1]) + content[100:],
            ):
                path.write_bytes(changed)
                with pytest.raises(InputError, match="was begun with other arguments: the images differ"):
                    prepare(tree, prepared, size=SIZE, shard_images=5)
        finally:
            path.write_bytes(content)

    def test_folder_of_somebody_elses(self, tree: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="exists and is not empty"):
            prepare(tree, tmp_path, size=SIZE)
        with pytest.raises(InputError, match=r"notes\.txt is a file"):
            prepare(tree, tmp_path / "notes.txt", size=SIZE)

    @pytest.mark.parametrize("workers", ["1", "2"])
    def test_full_disk(self, tree: Path, prepared: Path, tmp_path: Path, workers: str) -> None:
        """Simulated by a limit on the size of files: the same error from the same call."""
        folder = tmp_path / "set"
        options = ["--size", str(SIZE), "--shard-images", "5", "--workers", workers]
        done = subprocess.run(
            [sys.executable, "-m", "alexnet_kernels", "prepare", str(tree), str(folder), *options],
            cwd="/",
            env=environment(),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert f"{folder} can't be written: File too large; finished files are kept" in done.stderr
        assert not list(folder.glob("*/.*.tmp"))
        prepare(tree, folder, size=SIZE, shard_images=5)
        assert contents(folder) == contents(prepared)

    def test_process_that_is_killed(self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import alexnet_kernels.training.prepare as module

        def progress(done: int, total: int) -> None:
            for line in Path("/proc/self/task").glob("*/children"):
                for child in line.read_text().split():
                    # One that was killed before may be gone by now.
                    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                            os.kill(int(child), signal.SIGKILL)

        with pytest.raises(RunError, match="a process that reads images was killed"):
            module.prepare(tree, tmp_path / "set", size=SIZE, shard_images=5, workers=2, progress=progress)


class TestDamage:
    @pytest.fixture
    def copy(self, tree: Path, tmp_path: Path) -> Path:
        prepare(tree, tmp_path / "set", size=SIZE, shard_images=5)
        return tmp_path / "set"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train/images-00002.npy", None, r"images-00002\.npy is missing or truncated"),
            ("train/images-00002.npy", 1000, r"images-00002\.npy is missing or truncated"),
            ("train/labels.npy", 130, r"train/labels\.npy is damaged"),
            ("val/files.json", 5, r"val/files\.json is damaged"),
            ("statistics.npz", 50, "is damaged"),
            ("index.json", 20, "is damaged"),
            ("index.json", None, "is not finished"),
        ],
    )
    def test_is_named(self, copy: Path, name: str, content: int | None, message: str) -> None:
        path = copy / name
        whole = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(whole[:content])
        with pytest.raises(InputError, match=message):
            datasets.open_data(copy, SIZE)

    def test_another_files_images(self, copy: Path) -> None:
        np.save(copy / "train" / "images-00001.npy", np.zeros((5, SIZE, SIZE, 3), np.float32))
        with pytest.raises(InputError, match=r"images-00001\.npy holds float32 .* where uint8 .* is expected"):
            datasets.open_data(copy, SIZE)

    def test_other_format(self, copy: Path) -> None:
        index = (copy / "index.json").read_text()
        (copy / "index.json").write_text(index.replace('"format": 2', '"format": 3'))
        with pytest.raises(InputError, match="is of format 3, this version reads 2"):
            datasets.open_data(copy, SIZE)

    def test_format_of_earlier_versions(self, copy: Path) -> None:
        before = [pixels(images) for images in datasets.open_data(copy, SIZE)]
        index = json.loads((copy / "index.json").read_text())
        for split in index["splits"]:
            (copy / split / "checksums.npy").unlink()
        old = {key: value for key, value in index.items() if key not in ("checksums", "crc32")} | {"format": 1}
        (copy / "index.json").write_text(json.dumps(old))
        for images, expected in zip(datasets.open_data(copy, SIZE), before, strict=True):
            assert torch.equal(pixels(images), expected)
            assert images.checksums()[0] == ""

    def test_flipped_bits_and_sectors_of_zeros(self, copy: Path) -> None:
        """Of any file: it is named when the set is opened, or the image when it is read."""
        chance = random.Random(0)
        before = [pixels(images) for images in datasets.open_data(copy, SIZE)]
        others = [copy / "index.json", copy / "statistics.npz", *copy.rglob("files.json")]
        for path in [*sorted(copy.rglob("*.npy")), *others]:
            whole = path.read_bytes()
            for i in range(6):
                content = bytearray(whole)
                if i % 2:
                    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                else:
                    start = chance.randrange(-(-len(content) // 512)) * 512
                    content[start : start + 512] = bytes(len(content[start : start + 512]))
                path.write_bytes(content)
                try:
                    opened = datasets.open_data(copy, SIZE)
                except InputError:
                    continue
                for images, expected in zip(opened, before, strict=True):
                    batch = images.__getitems__(range(len(images)))
                    assert torch.equal(batch["images"], expected[batch["indices"]])
                    assert len(batch["bad"]) == len(expected) - len(batch["indices"])
                    assert all("damaged" in line for line in batch["bad"])
            path.write_bytes(whole)

    def test_damaged_image_ends_a_run(self, tree: Path, tmp_path: Path) -> None:
        prepare(tree, tmp_path / "set", size=73, shard_images=5)
        shard = tmp_path / "set" / "train" / "images-00002.npy"
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(content)
        settings = settings_of("quick", epochs=1, batch_size=22, image_size=64, width=0.04, precision="32")
        with pytest.raises(InputError, match=r"1 image can't be read: train/bee/03\.jpg: it is damaged in .*set"):
            train(settings, tmp_path / "set", out=tmp_path / "run")

    def test_split_that_was_not_prepared(self, tree: Path, tmp_path: Path) -> None:
        prepare(tree, tmp_path / "set", size=SIZE, splits=("val",))
        with pytest.raises(InputError, match="train was not prepared, only val"):
            datasets.open_data(tmp_path / "set", SIZE)
        assert len(datasets.open_data(tmp_path / "set", SIZE, ("val",))[0]) == 8


class TestCommand:
    def test_summary(self, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["prepare", str(tree), str(tmp_path / "set"), "--size", "24", "--workers", "1"]
        assert main(command) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path}/set: 22 train, 8 val images of 2 classes, 24 x 24, in ")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{tmp}/no", "{tmp}/set"], "there is no such folder or zip"),
            (["{tmp}", "{tmp}/set"], "there is no train/ in it"),
            (["{tree}", "{tmp}/set", "--splits", "test"], "there is no test/ in it"),
            (["{prepared}", "{tmp}/set"], "is already a prepared folder"),
            (["{tree}", "/dev/null/set"], "can't be written"),
            (["{tree}", "{tmp}/set", "--splits", "val", "val"], "splits must be different names, got val, val"),
        ],
    )
    def test_mistakes(
        self, tree: Path, prepared: Path, tmp_path: Path, arguments: list[str], message: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        places = {"tree": tree, "prepared": prepared, "tmp": tmp_path}
        assert main(["prepare", *(argument.format(**places) for argument in arguments)]) in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
