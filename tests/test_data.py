"""Reading images: trees and zips, formats, every error; the augmentation's draws and statistics."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import datasets, decoding, image_set, source
from alexnet_kernels.training.augmentation import Crops, PixelSums, Statistics, draws, stored_size


def write(
    path: Path, color: tuple[int, ...] = (10, 200, 30), size: tuple[int, int] = (8, 8), mode: str = "RGB"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color if len(color) > 1 else color[0]).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for split, count in (("train", 3), ("val", 2)):
        for name, red in (("ant", 50), ("bee", 150)):
            for i in range(count):
                write(root / split / name / f"{i}.png", (red, i, 0))
    return root


def zipped(tree: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(tree.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(tree).as_posix())
    return path


def pixels(images_: image_set.ImageSet) -> Tensor:
    return images_.__getitems__(range(len(images_)))["images"]


def test_tree_gives_sorted_classes_and_pixels(tree: Path) -> None:
    train, val = datasets.open_data(tree, 4)
    assert train.classes == val.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert pixels(train)[:, 2, 2].tolist() == [
        [50, 0, 0],
        [50, 1, 0],
        [50, 2, 0],
        [150, 0, 0],
        [150, 1, 0],
        [150, 2, 0],
    ]


@pytest.mark.parametrize("prefix", ["", "made of/the folder/"], ids=["contents", "folder"])
def test_zip_equals_tree(tree: Path, tmp_path: Path, prefix: str) -> None:
    # Only one folder above train/ and val/ is searched.
    archive = zipped(tree, tmp_path / "tree.zip", prefix.split("/")[0] + "/" if prefix else "")
    for a, b in zip(datasets.open_data(tree, 4), datasets.open_data(archive, 4), strict=True):
        assert torch.equal(pixels(a), pixels(b))
        assert (a.files, a.classes) == (b.files, b.classes)


@pytest.mark.parametrize("kind", ["tree", "zip"])
def test_lazy_equals_in_memory_and_survives_pickling(tree: Path, tmp_path: Path, kind: str) -> None:
    path = tree if kind == "tree" else zipped(tree, tmp_path / "tree.zip")
    eager, lazy = datasets.open_data(path, 4)[0], datasets.open_data(path, 4, in_memory=0)[0]
    assert eager.pixels is not None
    assert lazy.pixels is None
    for dataset in (lazy, pickle.loads(pickle.dumps(lazy))):
        batch, expected = dataset.__getitems__([4, 1]), eager.__getitems__([4, 1])
        for key in ("images", "labels", "indices"):
            assert torch.equal(batch[key], expected[key])


def test_hidden_and_other_files_are_no_images(tree: Path) -> None:
    (tree / "train" / "ant" / "notes.txt").write_text("no image")
    write(tree / "train" / "ant" / ".hidden.png")
    write(tree / "train" / "ant" / "deeper" / "SHOUTED.PNG", (50, 9, 0))
    train, _ = datasets.open_data(tree, 4)
    assert [Path(name).name for name in train.files[:4]] == ["0.png", "1.png", "2.png", "SHOUTED.PNG"]


def encoded(mode: str, color: object, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    Image.new(mode, (6, 4), color).save(file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (encoded("L", 77, format="png"), (77, 77, 77)),
        (encoded("1", 1, format="png"), (255, 255, 255)),
        (encoded("LA", (77, 255), format="png"), (77, 77, 77)),
        (encoded("RGBA", (10, 20, 30, 255), format="png"), (10, 20, 30)),
        (encoded("RGBA", (10, 20, 30, 0), format="png"), (255, 255, 255)),
        (encoded("I;16", 0x8000, format="png"), (128, 128, 128)),
        (encoded("CMYK", (0, 255, 255, 0), format="tiff"), (255, 0, 0)),
    ],
    ids=["grey", "bilevel", "grey-alpha", "rgba", "transparent", "16-bit", "cmyk"],
)
def test_every_mode_becomes_rgb(file: io.BytesIO, expected: tuple[int, ...]) -> None:
    image = decoding.decode(file, 4)
    assert image.shape == (4, 4, 3)
    assert image.dtype == torch.uint8
    assert (image == torch.tensor(expected)).all()


def test_palette_becomes_rgb() -> None:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE).save(file, format="png")
    assert decoding.decode(file, None).unique(dim=0).flatten(0, 1).unique(dim=0).tolist() == [[200, 100, 50]]


def test_orientation_of_exif_is_applied() -> None:
    source = Image.new("RGB", (8, 4), "black")
    source.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees clockwise
    file = io.BytesIO()
    source.save(file, format="png", exif=exif)
    image = decoding.decode(file, None)
    assert image.shape == (8, 4, 3)
    assert image[0].eq(255).all()
    assert image[-1].eq(0).all()


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (5, 5)], ids=["tall", "wide", "square"])
def test_resizes_the_shorter_side_and_keeps_the_centre(shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, format="png")
    side = min(shape)
    whole = image.resize((image.width * 4 // side, image.height * 4 // side), Image.Resampling.BICUBIC)
    left, top = (whole.width - 4) // 2, (whole.height - 4) // 2
    expected = torch.from_numpy(np.array(whole.crop((left, top, left + 4, top + 4)))).int()
    torch.testing.assert_close(decoding.decode(file, 4).int(), expected, rtol=0, atol=1)


def test_very_long_image_is_cropped_before_it_grows() -> None:
    file = io.BytesIO()
    Image.new("RGB", (100_000, 1), "red").save(file, format="png")
    assert decoding.decode(file, 64).unique(dim=1).shape == (64, 1, 3)


def test_shipped_images() -> None:
    train, val = datasets.open_data(datasets.SHIPPED, 32)
    assert (len(train), len(val), len(train.classes)) == (4000, 1000, 10)
    assert train.labels.bincount().tolist() == [400] * 10
    assert val.labels.bincount().tolist() == [100] * 10
    assert not {name.removeprefix("train/") for name in train.files} <= {
        name.removeprefix("val/") for name in val.files
    }
    assert 100 < pixels(val).float().mean() < 140
    assert (datasets.SHIPPED.parent / "README.md").read_text().count("CIFAR-10") >= 1


def refused(path: Path, *words: str, **options: object) -> None:
    with pytest.raises(InputError) as caught:
        datasets.open_data(path, 4, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class TestErrors:
    def test_nothing_there(self, tmp_path: Path) -> None:
        refused(tmp_path / "no", "no such folder or zip", str(tmp_path / "no"))

    def test_empty_folder(self, tmp_path: Path) -> None:
        refused(tmp_path, "no train/", "empty")

    def test_no_split(self, tree: Path) -> None:
        (tree / "val").rename(tree / "dev")
        refused(tree, "no val/", "it holds dev, train")

    def test_no_classes(self, tree: Path) -> None:
        for file in (tree / "train").rglob("*.png"):
            file.rename(tree / "train" / f"{file.parent.name}{file.name}")
        for name in ("ant", "bee"):
            (tree / "train" / name).rmdir()
        refused(tree, "no classes in train/")

    def test_class_without_images(self, tree: Path) -> None:
        (tree / "train" / "cow").mkdir()
        (tree / "train" / "cow" / "milk.txt").write_text("moo")
        refused(tree, "no images in train/cow", ".png")

    def test_classes_that_differ(self, tree: Path) -> None:
        write(tree / "train" / "cow" / "0.png")
        write(tree / "val" / "dog" / "0.png")
        refused(tree, "classes of train/ and val/ differ", "train/cow", "val/dog")

    def test_file_that_is_no_zip(self, tmp_path: Path) -> None:
        (tmp_path / "data.zip").write_bytes(b"PK not really")
        refused(tmp_path / "data.zip", "neither a folder nor a readable zip")

    def test_truncated_zip(self, tree: Path, tmp_path: Path) -> None:
        archive = zipped(tree, tmp_path / "data.zip")
        archive.write_bytes(archive.read_bytes()[:-40])
        refused(archive, "neither a folder nor a readable zip")

    @pytest.mark.parametrize(
        "name", ["../evil.png", "/evil.png", "train/../../evil.png", "C:/evil.png", "..\\evil.png"]
    )
    def test_zip_that_names_files_outside(self, tree: Path, tmp_path: Path, name: str) -> None:
        archive = zipped(tree, tmp_path / "data.zip")
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr(name, b"x")
        refused(archive, "a file outside itself", "evil.png")

    def test_bad_choice(self, tree: Path) -> None:
        with pytest.raises(ValueError, match="'refuse' or 'skip', got 'ignore'"):
            datasets.open_data(tree, 4, bad_images="ignore")


class TestBadImages:
    @pytest.fixture
    def spoilt(self, tree: Path) -> Path:
        """Two of the five training images that sort first can't be read: one is truncated, one is no image."""
        whole = tree / "train" / "ant" / "0.png"
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(whole)
        whole.write_bytes(whole.read_bytes()[:3000])
        (tree / "train" / "bee" / "1.png").write_bytes(b"no image")
        (tree / "val" / "bee" / "0.png").write_bytes(b"")
        return tree

    def test_refused_by_name_and_number(self, spoilt: Path) -> None:
        refused(spoilt, "2 images can't be read", "train/ant/0.png: ", "train/bee/1.png: ", "--bad-images skip")

    @pytest.mark.parametrize("kind", ["tree", "zip"])
    def test_skipped(self, spoilt: Path, tmp_path: Path, kind: str) -> None:
        path = spoilt if kind == "tree" else zipped(spoilt, tmp_path / "data.zip")
        train, val = datasets.open_data(path, 4, bad_images="skip")
        assert [name.split(":")[0] for name in train.bad] == ["train/ant/0.png", "train/bee/1.png"]
        assert [name.split(":")[0] for name in val.bad] == ["val/bee/0.png"]
        assert train.labels.tolist() == [0, 0, 1, 1]
        assert pixels(train)[:, 0, 0].tolist() == [[50, 1, 0], [50, 2, 0], [150, 0, 0], [150, 2, 0]]

    def test_lazy_batches_are_without_them(self, spoilt: Path) -> None:
        train, _ = datasets.open_data(spoilt, 4, in_memory=0)
        batch = train.__getitems__([0, 1, 4, 5])
        assert batch["indices"].tolist() == [1, 5]
        assert batch["labels"].tolist() == [0, 1]
        assert batch["images"][:, 0, 0].tolist() == [[50, 1, 0], [150, 2, 0]]
        assert [name.split(":")[0] for name in batch["bad"]] == ["train/ant/0.png", "train/bee/1.png"]

    def test_class_left_without_images(self, tree: Path) -> None:
        for file in (tree / "train" / "bee").iterdir():
            file.write_bytes(b"no image")
        refused(tree, "no images in train/bee", bad_images="skip")

    def test_member_with_a_wrong_checksum(self, tree: Path, tmp_path: Path) -> None:
        archive = zipped(tree, tmp_path / "data.zip")
        content = bytearray(archive.read_bytes())
        place = content.find(b"IHDR")
        content[place] ^= 0xFF
        archive.write_bytes(content)
        refused(archive, "1 image can't be read", "train/ant/0.png")

    def test_read_image_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"x\.png is not a readable image: no known image format"):
            decoding.read_image(tmp_path / "x.png", 4)
        with pytest.raises(InputError, match=r"y\.png does not exist"):
            decoding.read_image(tmp_path / "y.png", 4)


class TestAugmentation:
    def test_statistics_are_of_the_pixels(self) -> None:
        data = torch.randint(0, 256, (300, 5, 4, 3), dtype=torch.uint8)
        data[..., 1] = (data[..., 0].int() * 3 // 4).to(torch.uint8)
        statistics = Statistics.of(data)
        flat = data.reshape(-1, 3).double()
        torch.testing.assert_close(torch.tensor(statistics.mean).double(), flat.mean(0))
        torch.testing.assert_close(torch.tensor(statistics.std).double(), flat.std(0, correction=0))
        covariance = torch.cov((flat / 255).T, correction=0)
        components = torch.tensor(statistics.components).double() / 255
        values = components.norm(dim=1)
        assert values[0] > values[1] > values[2] >= 0
        # Each row is an eigenvector times its eigenvalue.
        torch.testing.assert_close(components @ covariance, components * values[:, None], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values.sum(), covariance.trace(), rtol=1e-5, atol=0)

    def test_draws_belong_to_seed_epoch_and_image(self) -> None:
        whole = draws(3, 5, torch.arange(1000))
        assert torch.equal(draws(3, 5, torch.tensor([7, 2])), whole[[7, 2]])
        assert not torch.equal(draws(4, 5, torch.arange(1000)), whole)
        assert not torch.equal(draws(3, 6, torch.arange(1000)), whole)
        assert whole.min() >= 0
        assert whole.max() < 1
        torch.testing.assert_close(whole.mean(0), torch.full((8,), 0.5).double(), rtol=0, atol=0.05)
        assert torch.corrcoef(whole.T).fill_diagonal_(0).abs().max() < 0.15

    def test_sums_add_up_in_any_order(self) -> None:
        data = torch.randint(0, 256, (50, 5, 5, 3), dtype=torch.uint8)
        whole = PixelSums.of(data)
        parts = PixelSums.of(data[37:]) + PixelSums.of(data[:9]) + PixelSums.of(data[9:37])
        assert whole.count == parts.count == 50
        assert torch.equal(whole.places, parts.places)
        assert torch.equal(whole.products, parts.products)
        assert torch.equal(whole.statistics().mean_image, parts.statistics().mean_image)
        torch.testing.assert_close(whole.statistics().mean_image, data.float().mean(0).permute(2, 0, 1))

    def test_random_crop_is_a_crop_mirrored_or_not_with_a_colour_shift(self) -> None:
        count, size = 200, 6
        data = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8)
        components = ((60.0, 60.0, 60.0), (0.0,) * 3, (0.0,) * 3)
        statistics = Statistics((100.0, 110.0, 120.0), (1.0, 1.0, 1.0), components, torch.zeros(3, 8, 8))
        out = Crops(size, statistics).random(data, torch.arange(count), 0)
        plain = Crops(size, statistics, color_std=0.0).random(data, torch.arange(count), 0)
        double = Crops(size, statistics, color_std=0.2).random(data, torch.arange(count), 0)
        torch.testing.assert_close(double - plain, 2 * (out - plain), rtol=1e-4, atol=1e-3)
        assert out.shape == (count, 3, size, size)
        out = out + torch.tensor(statistics.mean)[:, None, None]
        places, shifts, mirrored = set(), [], 0
        for image, result in zip(data.permute(0, 3, 1, 2).float(), out, strict=True):
            found = [
                (top, left, flip, difference.mean().item())
                for top in range(3)
                for left in range(3)
                for flip in (False, True)
                for crop in [image[:, top : top + size, left : left + size]]
                for difference in [result - (crop.flip(-1) if flip else crop)]
                if difference.std() < 1e-3
            ]
            assert len(found) == 1
            top, left, flip, shift = found[0]
            places.add((top, left))
            mirrored += flip
            shifts.append(shift)
        assert len(places) == 9
        assert 70 <= mirrored <= 130
        assert abs(np.std(shifts) - 6) < 1  # a tenth of the component
        assert abs(np.mean(shifts)) < 1.5

    def test_random_crop_does_not_depend_on_the_batch(self) -> None:
        data = torch.randint(0, 256, (10, 8, 8, 3), dtype=torch.uint8)
        crops = Crops(6, Statistics.of(data), scale=torch.full((3,), 0.5), seed=1)
        whole = crops.random(data, torch.arange(10), 2)
        part = torch.tensor([8, 3])
        assert torch.equal(crops.random(data[part], part, 2), whole[part])
        assert not torch.equal(crops.random(data, torch.arange(10), 3), whole)

    def test_centre_and_ten_crops(self) -> None:
        data = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
        statistics = Statistics((0.0,) * 3, (1.0,) * 3, ((0.0,) * 3,) * 3, torch.zeros(3, 8, 8))
        image = data.permute(0, 3, 1, 2).float()
        assert torch.equal(Crops(6, statistics).centre(data), image[:, :, 1:7, 1:7])
        crops = Crops(6, statistics).ten(data)
        assert len(crops) == 10
        assert torch.equal(crops[0], image[:, :, :6, :6])
        assert torch.equal(crops[6], image[:, :, 2:, 2:])
        assert torch.equal(crops[9], image[:, :, 1:7, 1:7].flip(-1))

    def test_mean_image_is_subtracted_at_each_pixels_own_place(self) -> None:
        data = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
        crops = Crops(6, Statistics.of(data), mean="image", color_std=0.0)
        centred = data.permute(0, 3, 1, 2).float() - data.float().mean(0).permute(2, 0, 1)
        torch.testing.assert_close(crops.centre(data), centred[:, :, 1:7, 1:7])
        torch.testing.assert_close(crops.ten(data)[3], centred[:, :, :6, 2:].flip(-1))
        for result, whole in zip(crops.random(data, torch.arange(30), 0), centred, strict=True):
            windows = [whole[:, top : top + 6, left : left + 6] for top in range(3) for left in range(3)]
            found = [w for window in windows for w in (window, window.flip(-1)) if torch.allclose(result, w, atol=1e-3)]
            assert len(found) == 1

    def test_stored_size_is_the_papers_and_caffes(self) -> None:
        assert stored_size(224) == stored_size(227) == 256


class TestChecksums:
    def test_a_zip_and_its_folder_agree(self, tree: Path, tmp_path: Path) -> None:
        archive = zipped(tree, tmp_path / "x.zip", "inside/")
        folder, packed = (datasets.open_data(path, 8, in_memory=0) for path in (tree, archive))
        assert [images.fingerprint() for images in folder] == [images.fingerprint() for images in packed]

    @pytest.mark.parametrize("limit", [0, 1 << 30], ids=["blocks", "whole"])
    def test_a_changed_byte_is_noticed(self, tree: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
        monkeypatch.setattr(source, "_WHOLE", limit)
        path = sorted((tree / "train").rglob("*.png"))[1]
        content = path.read_bytes()
        images = datasets.open_data(tree, 8, in_memory=0)[0]
        before = images.fingerprint()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert image_set.difference(before, images.fingerprint()) == "contents"
        path.write_bytes(content)
        assert image_set.difference(before, images.fingerprint()) == ""

    def test_what_differs(self) -> None:
        assert image_set.difference("a:crc32-1", "b:crc32-1") == "names"
        assert image_set.difference("a:crc32-1", "a:crc32-2") == "contents"
        assert image_set.difference("a:crc32-1", "a:blocks-2") == ""
        assert image_set.difference("a", "a:crc32-2") == ""
        assert image_set.difference("a", "b:crc32-2") == "names"

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "file").write_bytes(b"x")
        names = ["pipe", "missing", "file"]
        assert source.Source(tmp_path).checksums(names) == ("crc32", [-1, -1, zlib.crc32(b"x")])
