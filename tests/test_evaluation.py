"""Figures of each class, features of images and their neighbours, and the pictures of them."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("lightning")

from runs import train

from alexnet_kernels._errors import InputError
from alexnet_kernels.cli import main
from alexnet_kernels.training import checkpoint, datasets, inference, pictures
from alexnet_kernels.training.augmentation import Statistics
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.settings import settings_of

TINY = settings_of("quick", preset="batchnorm", epochs=1, batch_size=8, image_size=64, width=0.04, precision="32")
COUNTS = {"ant": 5, "bee": 1, "cow": 4, "dog": 3, "eel": 2, "fox": 4, "gnu": 6}
"""Validation images of each class."""
LABELS = [label for label, count in enumerate(COUNTS.values()) for _ in range(count)]


def network_of(classes: list[str], **changes: Any) -> checkpoint.Network:
    """A network with its initial values."""
    statistics = Statistics.of(torch.randint(0, 256, (2, 73, 73, 3), dtype=torch.uint8))
    header = Header(replace(TINY, **changes), classes, statistics, "", 2, "", 73)
    return checkpoint.Network(header.model().eval(), header)


def squares(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 73, 73, 3), dtype=torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, two training images of each class."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count in COUNTS.items():
            (root / split / name).mkdir(parents=True)
            for i in range(2 if split == "train" else count):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("network") / "x.safetensors"
    checkpoint.export(network_of(list(COUNTS)), path)
    return path


def counted(scores: Tensor, labels: list[int]) -> tuple[list[list[int]], list[dict[str, float]]]:
    """The confusion and each class's figures, one image after the other."""
    total = scores.shape[1]
    table = [[0] * total for _ in range(total)]
    rows = [{"images": 0, "top1": 0.0, "top5": 0.0} for _ in range(total)]
    for values, label in zip(scores.tolist(), labels, strict=True):
        order = sorted(range(total), key=lambda place: -values[place])
        table[label][order[0]] += 1
        rows[label]["images"] += 1
        rows[label]["top1"] += order[0] == label
        rows[label]["top5"] += label in order[:5]
    for row in rows:
        row["top1"] /= row["images"] or 1
        row["top5"] /= row["images"] or 1
    return table, rows


class TestEvaluate:
    @pytest.mark.parametrize("crops", [1, 10])
    def test_agrees_with_plain_counting(self, saved: Path, data: Path, crops: int) -> None:
        network = checkpoint.load_network(saved)
        result = inference.evaluate(network, data, crops=crops, batch_size=7)
        (val_set,) = datasets.open_data(data, 73, ("val",))
        table, rows = counted(inference.probabilities(network, val_set.pixels, crops), LABELS)
        assert result["confusion"] == table
        assert list(result["per_class"]) == list(COUNTS)
        for row, expected in zip(result["per_class"].values(), rows, strict=True):
            assert row == pytest.approx(expected)

    def test_of_any_probabilities(self, saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Half of the predictions are right, so that no figure is 0 or 1."""
        scores = torch.rand(len(LABELS), len(COUNTS))
        scores[::2] += nn.functional.one_hot(torch.tensor(LABELS), len(COUNTS))[::2]
        scores /= scores.sum(1, keepdim=True)
        batches = iter(scores.split(4))
        monkeypatch.setattr(inference, "probabilities", lambda *arguments: next(batches))
        result = inference.evaluate(checkpoint.load_network(saved), data, batch_size=4)
        table, rows = counted(scores, LABELS)
        assert result["confusion"] == table
        assert list(result["per_class"].values()) == [pytest.approx(row) for row in rows]
        assert [sum(row) for row in result["confusion"]] == list(COUNTS.values())
        right = sum(result["confusion"][place][place] for place in range(len(COUNTS)))
        assert result["top1"] == pytest.approx(right / len(LABELS))
        assert len(LABELS) / 2 <= right < len(LABELS)
        for name in ("top1", "top5"):
            summed = sum(row["images"] * row[name] for row in result["per_class"].values())
            assert summed / len(LABELS) == pytest.approx(result[name])

    def test_class_of_which_nothing_can_be_read(
        self, saved: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in COUNTS:
            (tmp_path / "val" / name).mkdir(parents=True)
            content = b"no image" if name == "cow" else (data / "val" / name / "0.png").read_bytes()
            (tmp_path / "val" / name / "0.png").write_bytes(content)
        monkeypatch.setattr(datasets, "open_data", functools.partial(datasets.open_data, in_memory=0))
        result = inference.evaluate(checkpoint.load_network(saved), tmp_path, bad_images="skip")
        assert result["images"] == 6
        assert result["per_class"]["cow"] == {"images": 0, "top1": None, "top5": None}
        assert result["confusion"][2] == [0] * 7

    def test_prepared_at_another_size(self, saved: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prepared = datasets.open_data(data, 40, ("val",))
        monkeypatch.setattr(datasets, "open_data", lambda *args, **options: prepared)
        with pytest.raises(InputError, match=r"was prepared at 40 x 40, the checkpoint needs 73 x 73.*--size 73"):
            inference.evaluate(checkpoint.load_network(saved), data)


class TestEvaluateCommand:
    def test_json_and_csv(self, saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "x.csv"
        command = ["evaluate", str(saved), "--data", str(data), "--json", "--per-class", "--confusion", str(path)]
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        expected = inference.evaluate(checkpoint.load_network(saved), data)
        for name in ("top1", "top5", "images", "confusion", "per_class"):
            assert result[name] == expected[name]
        with path.open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["true", *COUNTS]
        assert [row[0] for row in rows] == list(COUNTS)
        assert [[int(value) for value in row[1:]] for row in rows] == expected["confusion"]

    def test_table_and_picture(
        self, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        table = [[3, 1, 1], [0, 4, 0], [2, 0, 0]]
        per_class = {
            "right": {"images": 4, "top1": 1.0, "top5": 1.0},
            "sometimes": {"images": 5, "top1": 0.6, "top5": 1.0},
            "wrong": {"images": 2, "top1": 0.0, "top5": 0.5},
        }
        order = ["sometimes", "right", "wrong"]
        self.stub(monkeypatch, {name: per_class[name] for name in order}, table)
        path = tmp_path / "x.PNG"
        assert main(["evaluate", str(saved), "--per-class", "--confusion", str(path)]) == 0
        out = capsys.readouterr().out
        lines = [[part.strip() for part in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
        assert lines == [
            ["wrong", "2", "0.0%", "50.0%", "sometimes (2)"],
            ["sometimes", "5", "60.0%", "100.0%", "right (1)"],
            ["right", "4", "100.0%", "100.0%", ""],
        ]
        assert "worst" not in out
        with Image.open(path) as image:
            assert image.format == "PNG"

    def test_table_of_many_classes(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        total = 60
        per_class = {f"class{i}": {"images": 1, "top1": i / 60, "top5": 1.0} for i in range(total)}
        self.stub(monkeypatch, per_class, np.eye(total, dtype=int).tolist())
        assert main(["evaluate", str(saved), "--per-class"]) == 0
        out = capsys.readouterr().out
        assert [line.split()[1] for line in out.splitlines() if "│" in line] == [f"class{i}" for i in range(25)]
        assert "the 25 worst of 60 classes" in out

    def stub(self, monkeypatch: pytest.MonkeyPatch, per_class: dict[str, Any], table: list[list[int]]) -> None:
        result = {"top1": 0.5, "top5": 0.9, "images": 11, "seconds": 1.0, "skipped": []}
        result |= {"confusion": table, "per_class": per_class}
        monkeypatch.setattr(inference, "evaluate", lambda *args, **options: result)
        network = network_of(list(per_class))
        monkeypatch.setattr(checkpoint, "load_network", lambda *args: network)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("x.txt", "--confusion x.txt: a .csv or .png file is expected"),
            ("no/x.png", "--confusion no/x.png: there is no folder no"),
        ],
    )
    def test_mistakes(
        self, saved: Path, path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        assert main(["evaluate", str(saved), "--confusion", path]) == 2
        assert capsys.readouterr().err == f"alexnet-kernels: error: {message}\n"
        assert not list(tmp_path.iterdir())

    def test_file_that_can_not_be_written(
        self, saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("x.csv", "x.png"):
            (tmp_path / name).mkdir()
            command = ["evaluate", str(saved), "--data", str(data), "--confusion", str(tmp_path / name)]
            assert main(command) == 1
            assert f"{name} could not be written: " in capsys.readouterr().err


class TestFeatures:
    @pytest.mark.parametrize("preset", ["batchnorm", "paper", "torchvision"])
    def test_are_what_the_last_layer_sees(self, preset: str) -> None:
        network = network_of(list(COUNTS), preset=preset)
        pixels = squares(5)
        features = inference.features(network, pixels)
        assert features.dtype == torch.float32
        x = torch.flatten(network.model.avgpool(network.model.features(network.crops.centre(pixels))), 1)
        *hidden, last = network.model.classifier.children()
        with torch.no_grad():
            for layer in hidden:
                x = layer(x)
            assert features.shape == (5, last.in_features)
            torch.testing.assert_close(features, x)
            expected = inference.probabilities(network, pixels)
            torch.testing.assert_close(last(features).softmax(1), expected)
        assert (features >= 0).all()
        assert (features > 0).any()

    def test_in_the_precision_of_training(self) -> None:
        network = network_of(list(COUNTS), precision="bf16")
        features = inference.features(network, squares(3))
        assert features.dtype == torch.float32
        assert torch.equal(features, features.bfloat16().float())

    def test_of_more_images_than_a_batch(self) -> None:
        network = network_of(list(COUNTS), width=0.02)
        pixels = squares(207)
        features = inference.features(network, pixels)
        assert len(features) == 207
        for place in (0, 99, 100, 206):
            torch.testing.assert_close(features[place : place + 1], inference.features(network, pixels[place, None]))
        assert inference.features(network, pixels[:0]).shape == (0, features.shape[1])

    def test_leave_the_network_alone(self) -> None:
        network = network_of(list(COUNTS))
        inference.features(network, squares(2))
        assert not any(layer._forward_pre_hooks for layer in network.model.modules())


def tile(path: Path, row: int, column: int, size: int) -> Tensor:
    """The image in that row and column of the picture that `pictures.neighbours` wrote."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = torch.from_numpy(np.array(picture))
    top, left = row * (size + 2), column * (size + 2) + (10 if column else 0)
    return pixels[top : top + size, left : left + size]


class TestNeighbours:
    def test_are_in_order_of_distance(self, tmp_path: Path) -> None:
        queries, training = squares(2)[:, :9, :9], squares(8)[:, :9, :9]
        distances = torch.tensor([5.0, 2, 7, 1, 2, 9, 3, 8])
        features = torch.stack([distances, torch.zeros(8)], 1)
        path = tmp_path / "x.png"
        pictures.neighbours(queries, training, torch.tensor([[0.0, 0], [10.0, 0]]), features, path)
        for row, nearest in enumerate([[3, 1, 4, 6, 0, 2], [5, 7, 2, 0, 6, 1]]):
            assert torch.equal(tile(path, row, 0, 9), queries[row])
            for column, place in enumerate(nearest):
                assert torch.equal(tile(path, row, column + 1, 9), training[place])
        with Image.open(path) as picture:
            assert picture.size == (7 * 9 + 12 + 5 * 2, 2 * 9 + 2)
            pixels = np.array(picture)
        assert (pixels[9:11] == 255).all()
        assert (pixels[:, 9:21] == 255).all()
        assert (pixels[:, 30:32] == 255).all()

    def test_own_copy_is_the_nearest(self, tmp_path: Path) -> None:
        network = network_of(list(COUNTS))
        training = squares(20)
        queries = training[[13, 4, 19]]
        path = tmp_path / "x.png"
        of_queries, of_training = inference.features(network, queries), inference.features(network, training)
        pictures.neighbours(queries, training, of_queries, of_training, path, count=2)
        for row, query in enumerate(queries):
            assert torch.equal(tile(path, row, 1, 73), query)
            assert not torch.equal(tile(path, row, 2, 73), query)

    def test_fewer_images_than_asked_for(self, tmp_path: Path) -> None:
        pictures.neighbours(squares(1), squares(3), torch.zeros(1, 4), torch.rand(3, 4), tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.size == (4 * 73 + 12 + 2 * 2, 73)

    def test_of_a_run(self, data: Path, tmp_path: Path) -> None:
        folder = train(TINY, data, out=tmp_path / "run").folder
        path = folder / "neighbours.png"
        train_set, val_set = datasets.open_data(data, 73)
        crops = inference.centre(val_set.pixels, 64)
        assert torch.equal(tile(path, 0, 0, 64), crops[0])
        assert torch.equal(tile(path, 5, 0, 64), crops[-1])
        network = checkpoint.load_network(folder)
        features = inference.features(network, train_set.pixels)
        distances = (features - inference.features(network, val_set.pixels[:1])).norm(dim=1)
        nearest = inference.centre(train_set.pixels, 64)[distances.argmin()]
        assert torch.equal(tile(path, 0, 1, 64), nearest)


RED, BLUE = (234, 147, 147), (143, 187, 217)
"""The bars' colours, on white."""


def bars(path: Path, colour: tuple[int, ...]) -> int:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.array(picture.convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) <= 2).sum())


class TestPredictions:
    def test_right_class_has_a_red_bar(self, tmp_path: Path) -> None:
        grey = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
        probabilities = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.06, 0.04]])
        lengths = []
        for label in range(6):
            pictures.predictions(grey, [label], probabilities, "abcdef", tmp_path / "x.png")
            lengths.append(bars(tmp_path / "x.png", RED))
            assert bars(tmp_path / "x.png", BLUE) > 0
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[4] > lengths[5] == 0

    def test_command(self, saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = [str(path) for path in sorted((data / "val").rglob("*.png"))[:5]]
        assert main(["predict", str(saved), *paths, "--json"]) == 0
        expected = capsys.readouterr().out
        assert main(["predict", str(saved), *paths, "--json", "--picture", str(tmp_path / "x.png")]) == 0
        assert capsys.readouterr().out == expected
        assert bars(tmp_path / "x.png", BLUE) > 0
        assert bars(tmp_path / "x.png", RED) == 0

    def test_any_name(self, saved: Path, data: Path, tmp_path: Path) -> None:
        """TeX formulas, missing glyphs, and a great length."""
        image = tmp_path / f"$\\frac$ 名 {'x' * 200}.png"
        image.write_bytes((data / "val" / "ant" / "0.png").read_bytes())
        assert main(["predict", str(saved), str(image), "--json", "--picture", str(tmp_path / "x.png")]) == 0
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.width < 500

    @pytest.mark.parametrize(
        ("path", "count", "message"),
        [
            ("x.jpg", 1, "--picture x.jpg: a .png file is expected"),
            ("no/x.png", 1, "--picture no/x.png: there is no folder no"),
            ("x.png", 41, "--picture draws at most 40 images, got 41"),
        ],
    )
    def test_mistakes(
        self, saved: Path, data: Path, path: str, count: int, message: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        names = [str(data / "val" / "ant" / "0.png")] * count
        assert main(["predict", str(saved), *names, "--picture", path]) == 2
        captured = capsys.readouterr()
        assert captured.err == f"alexnet-kernels: error: {message}\n"
        assert not captured.out
        assert not list(tmp_path.iterdir())


class TestConfusionPicture:
    def test_rows_are_the_true_classes(self, tmp_path: Path) -> None:
        """Every image is taken for the second class, so its column is dark."""
        pictures.confusion([[0, 9], [0, 9]], ["a", "b"], tmp_path / "columns.png")
        pictures.confusion([[9, 0], [0, 9]], ["a", "b"], tmp_path / "right.png")
        quarters = []
        for name in ("columns.png", "right.png"):
            with Image.open(tmp_path / name) as picture:
                grey = np.array(picture.convert("L")).astype(float)
            dark = grey < 100
            middle, centre = grey.shape[0] // 2, grey.shape[1] // 2
            quarters.append([[dark[part, side].mean() > 0.2 for side in (slice(centre), slice(centre, None))]
                             for part in (slice(middle), slice(middle, None))])  # fmt: skip
        assert quarters == [[[False, True], [False, True]], [[True, False], [False, True]]]

    def test_of_many_classes(self, tmp_path: Path) -> None:
        total = 300
        pictures.confusion(np.eye(total, dtype=int).tolist(), [f"{i}$" for i in range(total)], tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as picture:
            assert total < picture.width == picture.height < 4000
