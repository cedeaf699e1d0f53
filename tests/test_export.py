"""Safetensors files: `convert` keeps the checkpoint's network bitwise, and other files are refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("safetensors")

from runs import shipped_images, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from alexnet_kernels import alexnet
from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels.cli import main
from alexnet_kernels.training import checkpoint, inference
from alexnet_kernels.training.augmentation import Statistics
from alexnet_kernels.training.header import KEY, Header, to_dict
from alexnet_kernels.training.settings import settings_of

TINY = settings_of(
    "quick",
    preset="batchnorm",
    epochs=1,
    warmup=0.0,
    batch_size=8,
    image_size=64,
    width=0.04,
    precision="32",
    mean="image",
)
CLASSES = ("cat", "frog", "ship")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), CLASSES, train=6, val=4)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, data, out=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "x.safetensors"
    checkpoint.export(checkpoint.load_network(run), path)
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def assert_same(network: checkpoint.Network, other: checkpoint.Network) -> None:
    values, others = to_dict(network.header, network.history), to_dict(other.header, other.history)
    image, other_image = values["statistics"].pop("mean_image"), others["statistics"].pop("mean_image")
    assert image.dtype == other_image.dtype == torch.float32
    assert torch.equal(image, other_image)
    assert repr(values) == repr(others)  # a NaN is not equal to itself
    state, other_state = network.model.state_dict(), other.model.state_dict()
    assert list(state) == list(other_state)
    for key, value in state.items():
        assert value.dtype == other_state[key].dtype
        assert torch.equal(value, other_state[key]), key
    pixels = torch.randint(0, 256, (3, *[network.header.stored_size] * 2, 3), dtype=torch.uint8)
    for crops in (1, 10):
        expected = inference.probabilities(network, pixels, crops)
        assert torch.equal(inference.probabilities(other, pixels, crops), expected)


class TestRoundTrip:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"mean": "channel", "precision": "bf16"},
            {"preset": "paper", "image_size": 67, "lr": 0.001, "precision": "bf16-pure"},
        ],
        ids=str,
    )
    def test_in_every_bit(self, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
        run = train(replace(TINY, **changes), data, out=tmp_path / "run").folder
        network = checkpoint.load_network(run)
        path = tmp_path / "x.safetensors"
        checkpoint.export(network, path)
        assert_same(network, checkpoint.load_network(path))

    def test_of_an_export(self, exported: Path, tmp_path: Path) -> None:
        network = checkpoint.load_network(exported)
        checkpoint.export(network, tmp_path / "again.safetensors")
        assert_same(network, checkpoint.load_network(tmp_path / "again.safetensors"))

    def test_content(self, run: Path, exported: Path) -> None:
        saved = checkpoint.load(run / "best.ckpt")
        content = saved.content
        tensors = load_file(exported)
        assert {f"model.{key}" for key in tensors} == set(content["state_dict"])
        assert all(torch.equal(value, content["state_dict"][f"model.{key}"]) for key, value in tensors.items())
        described = metadata(exported)
        assert set(described) == {"format", "alexnet_kernels", "alexnet_kernels_crc32"}
        assert described["format"] == "pt"
        values = json.loads(described["alexnet_kernels"])
        assert values["classes"] == list(CLASSES)
        assert values["settings"] == {**TINY.to_dict(), "lr_epochs": list(TINY.lr_epochs)}
        assert values["history"] == saved.history.epochs
        assert values["layers"] == saved.history.layers
        assert values["train_images"] == 18


class TestOthersTakeIt:
    def test_torchvision(self, tmp_path: Path) -> None:
        models = pytest.importorskip("torchvision").models
        settings = replace(TINY, preset="torchvision", width=1.0)
        statistics = Statistics.of(torch.randint(0, 256, (2, 73, 73, 3), dtype=torch.uint8))
        header = Header(settings, list(CLASSES), statistics, "", 2, "", 73)
        network = checkpoint.Network(header.model().eval(), header)
        path = tmp_path / "x.safetensors"
        checkpoint.export(network, path)
        theirs = models.alexnet(num_classes=3).eval()
        theirs.load_state_dict(load_file(path))
        path.unlink()  # 228 MB
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(theirs(x), network.model(x), rtol=1e-3, atol=1e-5)

    def test_alexnet(self, exported: Path) -> None:
        model = alexnet(weights=str(exported), preset="batchnorm", width=TINY.width).eval()
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x), checkpoint.load_network(exported).model(x))


class TestCommand:
    def test_evaluate_and_predict_agree(
        self, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "x.safetensors"
        assert main(["convert", str(run), str(path)]) == 0
        assert f"{path}  {path.stat().st_size:,} bytes" in capsys.readouterr().out
        assert list(tmp_path.iterdir()) == [path]
        results = []
        for source in (run, path):
            assert main(["evaluate", str(source), "--json"]) == 0  # on the run's own data
            results.append({**json.loads(capsys.readouterr().out), "seconds": 0})
        assert results[0] == results[1]
        assert results[0]["images"] == 12
        predicted = []
        for source in (run / "best.ckpt", path):
            assert main(["predict", str(source), str(next(data.rglob("*.png"))), "--json"]) == 0
            predicted.append(capsys.readouterr().out)
        assert predicted[0] == predicted[1]

    def test_mistakes(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        there = tmp_path / "there.safetensors"
        there.write_bytes(b"before")

        def fails(source: object, out: object, *words: str) -> None:
            assert main(["convert", str(source), str(out)]) == 2
            captured = capsys.readouterr()
            assert captured.err.count("\n") == 1
            assert all(word in captured.err for word in words), captured.err

        fails(run, there, "there.safetensors exists: name another file")
        fails(run, tmp_path / "x.gz", "x.gz: a .pth, .pt, .safetensors, .onnx file or a folder's name without suffix")
        fails(run, tmp_path / "no" / "x.safetensors", "there is no folder", str(tmp_path / "no"))
        fails(tmp_path / "no.ckpt", tmp_path / "x.safetensors", "no.ckpt does not exist")
        fails(tmp_path, tmp_path / "x.safetensors", "no checkpoint best.ckpt")
        fails(there, tmp_path / "x.safetensors", "there.safetensors is not a readable safetensors file")
        assert there.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [there]

    def test_without_the_package(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "safetensors", None)
        for command in (["convert", "x", str(tmp_path / "x.safetensors")], ["evaluate", str(exported)]):
            assert main(command) == 2
            remedy = "needs safetensors; install it with: pip install 'alexnet_kernels[weights]'"
            assert remedy in capsys.readouterr().err


class TestWriting:
    def test_disk_that_is_full(self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        network = checkpoint.load_network(exported)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"x\.safetensors could not be written: No space left on device"):
            checkpoint.export(network, tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())

    def test_is_whole_before_it_has_its_name(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(source: str, target: Path) -> None:
            shutil.copy(source, tmp_path / "written.safetensors")
            raise KeyboardInterrupt

        network = checkpoint.load_network(exported)
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.export(network, tmp_path / "x.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["written.safetensors"]
        assert_same(network, checkpoint.load_network(tmp_path / "written.safetensors"))


def described(change: Callable[[dict[str, Any]], object]) -> Callable[[str], dict[str, str]]:
    """The metadata of an export after a change of its header."""

    def make(text: str) -> dict[str, str]:
        values = json.loads(text)
        change(values)
        return {"format": "pt", KEY: json.dumps(values)}

    return make


class TestBadFiles:
    @pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.5, 0.999])
    def test_cut_off(self, exported: Path, tmp_path: Path, part: float) -> None:
        whole = exported.read_bytes()
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError, match=r"cut\.safetensors is not a readable safetensors file"):
            checkpoint.load_network(path)

    def test_of_another_kind(self, run: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        path.write_bytes((run / "best.ckpt").read_bytes())
        assert_same(checkpoint.load_network(path), checkpoint.load_network(run))
        for content in (bytes(100), b"\xff" * 100):
            path.write_bytes(content)
            with pytest.raises(InputError, match=r"x\.safetensors is not a readable safetensors file"):
                checkpoint.load_network(path)

    @pytest.mark.parametrize("foreign", [None, {"format": "pt"}])
    def test_without_a_header(self, exported: Path, tmp_path: Path, foreign: dict[str, str] | None) -> None:
        path = tmp_path / "x.safetensors"
        save_file(load_file(exported), path, foreign)
        found, own = checkpoint.load_network(path), checkpoint.load_network(exported)
        assert found.header.origin["format"] == "safetensors"
        assert found.model.preset == "batchnorm"
        assert found.header.classes == ["0", "1", "2"]
        assert all(torch.equal(value, own.model.state_dict()[key]) for key, value in found.model.state_dict().items())

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda text: {KEY: text[:-9]}, "lacks a part of its header"),
            (lambda text: {KEY: "[1, 2]"}, "lacks a part of its header"),
            (described(lambda values: values.pop("history")), "lacks a part of its header: 'history'"),
            (described(lambda values: values.update(stored_size=74)), "lacks a part of its header"),
            (
                described(lambda values: values["statistics"].update(mean_image="?")),
                "lacks a part of its header",
            ),
            (described(lambda values: values.update(format=99)), "can't be used: it is of format 99"),
            (described(lambda values: values["settings"].pop("lr")), "can't be used: settings lr are missing"),
            (
                described(lambda values: values["classes"].append("dog")),
                r"does not hold the weights of preset 'batchnorm' with 4 classes and width 0\.04",
            ),
        ],
    )
    def test_another_header(
        self, exported: Path, tmp_path: Path, make: Callable[[str], dict[str, str]], message: str
    ) -> None:
        path = tmp_path / "x.safetensors"
        save_file(load_file(exported), path, make(metadata(exported)[KEY]))
        with pytest.raises(InputError, match=rf"x\.safetensors {message}") as caught:
            checkpoint.load_network(path)
        assert "\n" not in str(caught.value)

    def test_weights_that_are_missing(self, exported: Path, tmp_path: Path) -> None:
        tensors = load_file(exported)
        tensors.pop("classifier.0.weight")
        described = metadata(exported)
        save_file(tensors, tmp_path / "x.safetensors", described)
        with pytest.raises(InputError, match=r"not a readable .*: it is damaged, or was changed by another program"):
            checkpoint.load_network(tmp_path / "x.safetensors")
        del described["alexnet_kernels_crc32"]
        save_file(tensors, tmp_path / "x.safetensors", described)
        with pytest.raises(InputError, match=r"does not hold the weights of .*classifier\.0\.weight"):
            checkpoint.load_network(tmp_path / "x.safetensors")
