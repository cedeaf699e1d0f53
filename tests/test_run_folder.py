"""The folder of a run: best.ckpt and last.ckpt agree, one process writes, nothing is missing or left over."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from runs import assert_same, environment, shipped_images, train

from alexnet_kernels import AlexNet, parallel
from alexnet_kernels._errors import InputError
from alexnet_kernels._files import atomic_file
from alexnet_kernels._lock import locked
from alexnet_kernels.models.weights import read_weights
from alexnet_kernels.training import checkpoint, pictures
from alexnet_kernels.training.callbacks import checkpoint as checkpoint_callback
from alexnet_kernels.training.metrics import EpochMetrics
from alexnet_kernels.training.module import Classifier
from alexnet_kernels.training.run_folder import PICTURES
from alexnet_kernels.training.settings import settings_of

TINY = settings_of("quick", epochs=3, batch_size=8, image_size=64, width=0.04, precision="32")
FILES = {"best.ckpt", "last.ckpt", "metrics.csv", "layers.csv", "recipe.yaml", "tensorboard", *PICTURES}


class Killed(BaseException):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("cat", "ship"), train=8, val=3)


@pytest.fixture
def rising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each epoch is better than those before."""
    compute, start, epoch = EpochMetrics.compute, Classifier.on_train_epoch_start, [0]

    def better(self: EpochMetrics, prefix: str, **options: Any) -> dict[str, float]:
        values = compute(self, prefix, **options)
        return {**values, "val_top1": epoch[0] / 10} if prefix == "val" else values

    def started(self: Classifier) -> None:
        epoch[0] = self.current_epoch
        start(self)

    monkeypatch.setattr(EpochMetrics, "compute", better)
    monkeypatch.setattr(Classifier, "on_train_epoch_start", started)


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Replaces a function by one whose n-th call is the end."""
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.usefixtures("rising")
@pytest.mark.parametrize("call", [1, 3])
def test_killed_between_last_and_best(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, checkpoint_callback, "link_atomically", call)
        with pytest.raises(Killed):
            train(TINY, data, out=folder)
    epochs = checkpoint.load(folder / "last.ckpt").history.epochs
    assert len(epochs) == call
    best = max(epochs, key=lambda row: row["val_top1"])
    assert checkpoint.load_network(folder).history.epochs[-1] == best
    result = train(TINY, resume=folder)
    assert len(result.history) == 3
    assert checkpoint.load(folder / "best.ckpt").history.epochs[-1] == result.best
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.usefixtures("rising")
def test_damaged_best_is_made_anew_from_last(data: Path, tmp_path: Path) -> None:
    folder = train(replace(TINY, epochs=2), data, out=tmp_path / "run").folder
    epochs = checkpoint.load(folder / "last.ckpt").history.epochs
    (folder / "best.ckpt").unlink()
    (folder / "best.ckpt").write_bytes(b"damaged")
    assert checkpoint.load_network(folder).history.epochs == epochs
    train(replace(TINY, epochs=2), resume=folder)
    assert checkpoint.load(folder / "best.ckpt").history.epochs == epochs
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, data, out=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A finished run, which may be changed. Its files are no links to each other."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_best_of_another_continuation_is_set_aside(copy: Path, data: Path, tmp_path: Path) -> None:
    first = train(replace(TINY, epochs=3), data, out=tmp_path / "short", max_seconds=1e-9).folder
    shutil.copy(first / "last.ckpt", copy / "older.ckpt")
    resumed = train(TINY, resume=copy / "older.ckpt")
    assert checkpoint.load(copy / "best.ckpt").history.epochs[-1] == resumed.best
    assert checkpoint.load(copy / "best.ckpt").history.epochs == resumed.history[: int(resumed.best["epoch"])]


@pytest.mark.parametrize("drawing", ["curves", "neighbours"])
def test_killed_while_pictures_are_drawn(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawing: str
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed_at(patch, pictures, drawing, 1)
        with pytest.raises(Killed):
            train(TINY, data, out=folder)
    (folder / ".filters.png.x.tmp").write_bytes(b"what a kill left behind")
    result = train(TINY, resume=folder)
    assert len(result.history) == 3
    assert {path.name for path in folder.iterdir()} == FILES
    assert_same(run / "last.ckpt", folder / "last.ckpt")
    with pytest.raises(InputError, match="finished its 3 epochs: there is nothing to resume"):
        train(TINY, resume=folder)


def test_resuming_a_finished_run_restores_what_is_missing(copy: Path) -> None:
    before = (copy / "metrics.csv").read_bytes()
    (copy / "metrics.csv").unlink()
    (copy / "curves.png").unlink()
    train(TINY, resume=copy)
    assert (copy / "metrics.csv").read_bytes() == before
    assert {path.name for path in copy.iterdir()} == FILES


def test_a_run_is_trained_by_one_process_at_a_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, step, tried = tmp_path / "run", Classifier.training_step, []

    def interfering(self: Classifier, *arguments: Any) -> None:
        if self.global_step == 1:
            (folder / ".last.ckpt.x.tmp").write_bytes(b"what the first process is writing")
            shutil.copy(saved / "last.ckpt", folder / "last.ckpt")
            with pytest.raises(InputError, match="another process is training the run in"):
                train(TINY, resume=folder)
            tried.append((folder / ".last.ckpt.x.tmp").exists())
        step(self, *arguments)

    saved = train(TINY, data, out=tmp_path / "saved", max_seconds=1e-9).folder
    monkeypatch.setattr(Classifier, "training_step", interfering)
    train(replace(TINY, epochs=1), data, out=folder)
    assert tried == [True]
    assert not (folder / ".lock").exists()


HOLDS = """
import sys, pathlib
from alexnet_kernels._lock import locked
with locked(pathlib.Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"^busy$"), locked(tmp_path, "busy"):
            pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path, "busy"), pytest.raises(InputError, match=r"^busy$"), locked(tmp_path, "busy"):
        pass
    assert not list(tmp_path.iterdir())


class TestDamage:
    """Files with a sector of zeros or a flipped bit are refused, or hold the same."""

    def damaged(self, content: bytes, count: int) -> Iterator[bytes]:
        chance = random.Random(0)
        for i in range(count):
            changed = bytearray(content)
            if i % 2:
                start = chance.randrange(len(content) // 512) * 512
                changed[start : start + 512] = bytes(512)
            else:
                changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            if changed != content:
                yield bytes(changed)

    def check(self, path: Path, read: Callable[[], dict[str, Any]], count: int = 40) -> None:
        content, values = path.read_bytes(), read()
        refused = 0
        for changed in self.damaged(content, count):
            path.write_bytes(changed)
            try:
                found = read()
            except (ValueError, RuntimeError):
                refused += 1
            else:
                assert found.keys() == values.keys()
                assert all(torch.equal(found[key], value) for key, value in values.items())
        path.write_bytes(content)
        read()
        assert refused > count // 2

    def test_checkpoint(self, copy: Path) -> None:
        path = copy / "best.ckpt"
        self.check(path, lambda: {k: v.clone() for k, v in checkpoint.load(path).content["state_dict"].items()})

    def test_safetensors(self, run: Path, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        checkpoint.export(checkpoint.load_network(run), path)
        self.check(path, lambda: checkpoint.load_network(path).model.state_dict())
        self.check(path, lambda: read_weights(path)[0].tensors)

    @pytest.mark.filterwarnings("ignore:.*torch.distributed is")
    def test_folder_of_a_split_model(self, tmp_path: Path) -> None:
        model = AlexNet(num_classes=2, width=0.04)
        parallel.save(model, None, tmp_path / "split")

        def read() -> dict[str, Any]:
            other = AlexNet(num_classes=2, width=0.04)
            parallel.load(other, None, tmp_path / "split")
            return other.state_dict()

        for name in (".metadata", "__0_0.distcp"):
            self.check(tmp_path / "split" / name, read, 12)

    def test_files_of_others_need_no_checksum(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"features.0.weight": torch.ones(3)}, tmp_path / "x.safetensors")
        found, _ = read_weights(tmp_path / "x.safetensors")
        assert torch.equal(found.tensors["features.0.weight"], torch.ones(3))


def test_a_damaged_last_checkpoint_is_named(copy: Path) -> None:
    with atomic_file(copy / "last.ckpt") as file:
        content = bytearray((copy / "best.ckpt").read_bytes())
        content[len(content) // 2] ^= 1
        file.write(content)
    with pytest.raises(InputError, match=r"last\.ckpt is not a readable checkpoint \(truncated, damaged"):
        train(TINY, resume=copy)
