"""Training runs: learning, bitwise identical resuming, failing writes, and the files of a run."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning")

from graph_recorder import RecordedGraphs
from runs import assert_same, figures, shipped_images, train

from alexnet_kernels import ops, use_backend
from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels._files import atomic_file, link_atomically
from alexnet_kernels.backends import kernels_of
from alexnet_kernels.capture import CapturedStep
from alexnet_kernels.models import AlexNet
from alexnet_kernels.training import checkpoint, datasets, inference, module, pictures
from alexnet_kernels.training import run as run_module
from alexnet_kernels.training.callbacks.checkpoint import CheckpointCallback
from alexnet_kernels.training.callbacks.progress import ProgressCallback
from alexnet_kernels.training.callbacks.stop import StopRequest
from alexnet_kernels.training.callbacks.tensorboard import TensorBoardCallback
from alexnet_kernels.training.devices import pick_device
from alexnet_kernels.training.header import KEY
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.metrics import EpochMetrics
from alexnet_kernels.training.prepare import prepare
from alexnet_kernels.training.settings import settings_of
from alexnet_kernels.training.spec import resumed_run

TINY = settings_of("quick", epochs=2, batch_size=8, image_size=64, width=0.04, precision="32")


def augment_without_reading(
    images: torch.Tensor,
    crops: torch.Tensor,
    size: tuple[int, int],
    *options: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The op, which on a CPU reads the crops to check them."""
    return kernels_of("cpu").augment(images, crops, size, *options, dtype, True)


CLASSES = ("airplane", "automobile", "ship")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), CLASSES, train=12, val=6)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return train(TINY, data, out=tmp_path_factory.mktemp("runs") / "run").folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).content["state_dict"]


class TestRun:
    def test_leaves_its_files(self, run: Path) -> None:
        pictures_ = {"filters.png", "curves.png", "predictions.png", "neighbours.png"}
        names = {"last.ckpt", "best.ckpt", "metrics.csv", "layers.csv", "recipe.yaml", "tensorboard"}
        assert {path.name for path in run.iterdir()} == names | pictures_
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert all(0 <= float(row["val_top1"]) <= float(row["val_top5"]) == 1 for row in rows)
        assert [float(row["step"]) for row in rows] == [4, 8]
        for name in pictures_:
            with Image.open(run / name) as image:
                image.load()
                assert image.format == "PNG"
                assert np.asarray(image.convert("L")).std() > 5, name

    def test_keeps_freed_memory(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[None] = []
        monkeypatch.setattr(run_module, "keep_freed_memory", lambda: calls.append(None))
        train(TINY, data, out=tmp_path / "run", max_seconds=1e-9)
        assert len(calls) == 1

    def test_files_of_a_run_that_is_killed_after_its_figures(
        self, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The figures are written before the checkpoint, so that a resumed run completes them."""

        def killed(self: CheckpointCallback, trainer: object, *rest: object) -> None:
            if trainer.current_epoch == 1:
                raise KeyboardInterrupt
            original(self, trainer, *rest)

        original = CheckpointCallback.on_train_epoch_end
        with monkeypatch.context() as patch:
            patch.setattr(CheckpointCallback, "on_train_epoch_end", killed)
            with pytest.raises(KeyboardInterrupt):
                train(TINY, data, out=tmp_path / "run")
        assert checkpoint.load(tmp_path / "run" / "last.ckpt").content["global_step"] == 4
        assert (tmp_path / "run" / "layers.csv").read_bytes() == (run / "layers.csv").read_bytes()
        train(TINY, resume=tmp_path / "run")
        assert (tmp_path / "run" / "layers.csv").read_bytes() == (run / "layers.csv").read_bytes()
        assert_same(run / "last.ckpt", tmp_path / "run" / "last.ckpt")

    def test_same_settings_give_the_same_bits(self, run: Path, data: Path, tmp_path: Path) -> None:
        torch.manual_seed(123)
        again = train(TINY, data, out=tmp_path / "again").folder
        assert_same(run / "last.ckpt", again / "last.ckpt")
        assert figures(run / "last.ckpt") == figures(again / "last.ckpt")

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_steps_replayed_as_a_graph_give_the_same_bits(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
    ) -> None:
        """The step's operators are recorded and run again, as a GPU does. PyTorch's: this package's read the rate."""

        def recorded(*arguments: Any, **options: Any) -> CapturedStep:
            return CapturedStep(*arguments, **{**options, "graphs": graphs})

        def set_rate(group: dict[str, Any], rate: float) -> None:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else torch.tensor(rate)

        graphs = RecordedGraphs()
        settings = replace(TINY, accumulate=accumulate)
        monkeypatch.setattr(module, "set_rate", set_rate)
        with use_backend("native"):
            monkeypatch.setattr(ops, "augment", augment_without_reading)
            plain = train(settings, data, out=tmp_path / "plain", graph=False).folder
            monkeypatch.setattr(module, "CapturedStep", recorded)
            replayed = train(settings, data, out=tmp_path / "replayed").folder
        assert graphs.events.count("replay") == 5
        assert_same(plain / "last.ckpt", replayed / "last.ckpt")
        assert figures(plain / "last.ckpt") == figures(replayed / "last.ckpt")

    def test_another_seed_gives_another_network(self, run: Path, data: Path, tmp_path: Path) -> None:
        other = train(replace(TINY, seed=1), data, out=tmp_path / "other").folder
        name = "model.features.0.weight"
        assert not torch.equal(weights(run / "last.ckpt")[name], weights(other / "last.ckpt")[name])

    def test_lazy_reading_gives_the_same_bits(self, run: Path, data: Path, tmp_path: Path) -> None:
        lazy = train(TINY, data, out=tmp_path / "lazy", in_memory=0, workers=1).folder
        assert_same(run / "last.ckpt", lazy / "last.ckpt")

    def test_every_preset_trains(self, data: Path, tmp_path: Path) -> None:
        for preset in ("paper", "as_run", "caffenet", "torchvision"):
            settings = settings_of(
                preset, epochs=1, batch_size=8, image_size=96, width=0.04, precision="bf16", lr=0.003, init="he"
            )
            result = train(settings, data, out=tmp_path / preset)
            assert 0 < result.best["train_loss"] < 20
            torch.manual_seed(settings.seed)
            start = AlexNet(3, settings.network(), width=TINY.width).state_dict()
            trained = weights(result.folder / "last.ckpt")
            for key, value in start.items():
                assert not torch.equal(trained[f"model.{key}"], value), key

    def test_folders_are_numbered(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        settings = replace(TINY, epochs=1)
        assert [train(settings, data).folder.as_posix() for _ in range(2)] == [
            "runs/batchnorm-1",
            "runs/batchnorm-2",
        ]

    def test_learns(self, tmp_path: Path) -> None:
        """Three classes with different colours and shapes, against a chance of 33%."""
        root = shipped_images(tmp_path / "data", ("frog", "ship", "truck"), train=100, val=50)
        settings = replace(TINY, epochs=12, batch_size=20, width=0.12, lr=0.05, dropout=0.2)
        result = train(settings, root, out=tmp_path / "run")
        assert result.best["val_top1"] > 0.55
        assert result.history[-1]["train_loss"] < 0.95 < 1.05 < result.history[0]["train_loss"]


class TestResume:
    @pytest.mark.parametrize("step", [4, 2, 7], ids=["between epochs", "mid-epoch", "last epoch"])
    def test_to_the_same_bits(
        self, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        def ask_at(stop: StopRequest) -> str | None:
            return "interrupted" if trained[-1] >= step else None

        trained = [0]
        original = CheckpointCallback.on_train_batch_end

        def counted(self: CheckpointCallback, trainer: object, *rest: object) -> None:
            trained.append(trainer.global_step)
            original(self, trainer, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointCallback, "on_train_batch_end", counted)
            patch.setattr(StopRequest, "reason", ask_at)
            stopped = train(TINY, data, out=tmp_path / "run")
        assert stopped.stopped == "interrupted"
        assert checkpoint.load(tmp_path / "run" / "last.ckpt").content["global_step"] == step
        torch.manual_seed(99)
        resumed = train(TINY, resume=tmp_path / "run")
        assert resumed.stopped is None
        assert_same(run / "last.ckpt", tmp_path / "run" / "last.ckpt")
        assert figures(run / "last.ckpt") == figures(tmp_path / "run" / "last.ckpt")

    def test_time_limit_stops_and_resumes(self, run: Path, data: Path, tmp_path: Path) -> None:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        stopped = train(TINY, data, out=tmp_path / "run", max_seconds=1e-9)
        assert stopped.stopped == "out of time"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert checkpoint.load(tmp_path / "run" / "last.ckpt").content["global_step"] == 1
        train(TINY, resume=tmp_path / "run" / "last.ckpt")
        assert_same(run / "last.ckpt", tmp_path / "run" / "last.ckpt")

    def test_checkpoint_by_itself(self, data: Path, tmp_path: Path) -> None:
        train(TINY, data, out=tmp_path / "run", max_seconds=1e-9)
        (tmp_path / "alone").mkdir()
        shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "alone" / "saved.ckpt")
        result = train(TINY, resume=tmp_path / "alone" / "saved.ckpt")
        assert result.folder == tmp_path / "alone"
        assert (result.folder / "filters.png").exists()

    def test_is_resolved_once(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The header is read to resolve the run and to tidy its folder, tensors by Lightning, the best for pictures."""
        folder = train(TINY, data, out=tmp_path / "run", max_seconds=1e-9).folder
        mapped: list[bool] = []
        original = checkpoint.load

        def load(path: Path, mmap: bool = False) -> checkpoint.Checkpoint:
            mapped.append(mmap)
            return original(path, mmap)

        monkeypatch.setattr(checkpoint, "load", load)
        spec = resumed_run(folder)
        assert mapped == [True]
        assert (spec.settings, spec.data, spec.out) == (TINY, str(data.resolve()), folder)
        with pytest.raises(FrozenInstanceError):
            spec.settings = TINY  # type: ignore[misc]
        run_module.train(spec)
        assert mapped == [True, True, False, True]

    def test_other_settings(self, data: Path, tmp_path: Path) -> None:
        folder = train(TINY, data, out=tmp_path / "run", max_seconds=1e-9).folder
        with pytest.raises(InputError, match=f"--seed 1 can't be used with --resume: .* was begun with {TINY.seed}"):
            resumed_run(folder, {"seed": 1, "epochs": TINY.epochs})

    def test_finished_run(self, run: Path) -> None:
        with pytest.raises(InputError, match="has finished its 2 epochs"):
            train(TINY, resume=run)

    def test_other_images(self, data: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(data, tmp_path / "data")
        train(TINY, copy, out=tmp_path / "run", max_seconds=1e-9)
        first = sorted((copy / "train" / "ship").iterdir())[0]
        first.rename(first.with_name("99999.png"))
        with pytest.raises(InputError, match="begun on images of other names"):
            train(TINY, resume=tmp_path / "run")
        first.with_name("99999.png").rename(first)
        assert train(TINY, resume=tmp_path / "run").stopped is None

    @pytest.mark.parametrize(
        ("kind", "split"), [("folder", "train"), ("not in memory", "val"), ("zip", "train"), ("prepared", "val")]
    )
    def test_images_of_other_contents(self, data: Path, tmp_path: Path, kind: str, split: str) -> None:
        tree = shutil.copytree(data, tmp_path / "data")
        path = {"zip": tmp_path / "data.zip", "prepared": tmp_path / "set"}.get(kind, tree)
        options = {"in_memory": 0} if kind == "not in memory" else {}

        def make() -> None:
            if kind == "zip":
                shutil.make_archive(str(tmp_path / "data"), "zip", tree)
            if kind == "prepared":
                shutil.rmtree(path, ignore_errors=True)
                prepare(tree, path, size=73)

        make()
        train(TINY, path, out=tmp_path / "run", max_seconds=1e-9, **options)
        first, second = sorted((tree / split / "ship").iterdir())[:2]
        contents = first.read_bytes(), second.read_bytes()
        first.write_bytes(contents[1])
        make()
        names = {"train": "training", "val": "validation"}
        with pytest.raises(InputError, match=f"some {names[split]} images have changed since the run was begun"):
            train(TINY, resume=tmp_path / "run", **options)
        first.write_bytes(contents[0])
        make()
        # A folder and a zip of it hold the same.
        other = tree if kind == "zip" else None
        assert train(TINY, other, resume=tmp_path / "run", max_seconds=1e-9, **options).stopped == "out of time"

    def test_run_of_an_earlier_version(self, data: Path, tmp_path: Path) -> None:
        """Its header has a hash of the training images' names."""
        folder = train(TINY, data, out=tmp_path / "run", max_seconds=1e-9).folder
        content = checkpoint.load(folder / "last.ckpt").content
        names = content[KEY]["fingerprint"].partition(":")[0]
        for fingerprint, message in ((names[::-1], "of other names"), (names, None)):
            content[KEY]["fingerprint"] = fingerprint
            checkpoint.save(content, folder / "last.ckpt")
            if message:
                with pytest.raises(InputError, match=message):
                    train(TINY, resume=folder)
        assert train(TINY, resume=folder).stopped is None

    def test_other_data(self, data: Path, tmp_path: Path) -> None:
        train(TINY, data, out=tmp_path / "run", max_seconds=1e-9)
        with pytest.raises(InputError, match="begun on 36 images of 3 classes, the data has 4000 of 10"):
            train(TINY, datasets.SHIPPED, resume=tmp_path / "run")


class TestSteps:
    """What one step does, against the optimizer's rule by hand."""

    PLAIN = settings_of(
        "quick", preset="paper", init="he", epochs=1, batch_size=36, image_size=64, width=0.1, precision="32",
        dropout=0.0, warmup=0.0, schedule="constant", lr=0.01, weight_decay=0.1,
    )  # fmt: skip

    def gradients(self, folder: Path, data: Path) -> tuple[AlexNet, dict[str, torch.Tensor]]:
        """The network before the only step, and its gradients on the only batch."""
        header = checkpoint.load(folder / "last.ckpt").header
        torch.manual_seed(header.settings.seed)
        model = header.model().to(memory_format=torch.channels_last)
        train_set, _ = datasets.open_data(data, header.stored_size)
        (batch,) = ImageLoader(train_set, 36, 0, seed=header.settings.seed)
        x = header.crops().random(batch["images"], batch["indices"], 0)
        torch.nn.functional.cross_entropy(model(x), batch["labels"]).backward()
        return model, {name: param.grad for name, param in model.named_parameters()}

    def test_biases_have_their_own_rate_and_decay(self, data: Path, tmp_path: Path) -> None:
        settings = replace(self.PLAIN, bias_lr=3.0, bias_decay=0.5)
        folder = train(settings, data, out=tmp_path / "run").folder
        model, grads = self.gradients(folder, data)
        after = weights(folder / "last.ckpt")
        for name, param in model.named_parameters():
            rate, decay = (0.03, 0.05) if name.endswith("bias") else (0.01, 0.1)
            expected = param.detach() - rate * (grads[name] + decay * param.detach())
            torch.testing.assert_close(after[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("parts", [2, 5, 36])
    def test_a_batch_in_parts_is_the_same_step(self, data: Path, tmp_path: Path, parts: int) -> None:
        whole = train(self.PLAIN, data, out=tmp_path / "whole")
        in_parts = train(replace(self.PLAIN, accumulate=parts), data, out=tmp_path / "parts")
        a, b = (weights(result.folder / "last.ckpt") for result in (whole, in_parts))
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)
        for name in ("step", "train_loss", "train_top1", "val_loss"):
            assert in_parts.history[0][name] == pytest.approx(whole.history[0][name], rel=1e-4)

    def test_a_resumed_run_may_take_its_batches_in_parts(self, data: Path, tmp_path: Path) -> None:
        settings = replace(self.PLAIN, epochs=2)
        whole = train(settings, data, out=tmp_path / "whole")
        train(settings, data, out=tmp_path / "run", max_seconds=1e-9)
        train(replace(settings, accumulate=3), resume=tmp_path / "run")
        header = checkpoint.load(tmp_path / "run" / "last.ckpt").header
        assert header.settings == replace(settings, accumulate=3)
        for name, value in weights(whole.folder / "last.ckpt").items():
            torch.testing.assert_close(weights(tmp_path / "run" / "last.ckpt")[name], value, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("rule", ["paper", "torch"])
    def test_layer_figures_are_of_the_weights_and_their_last_step(self, data: Path, tmp_path: Path, rule: str) -> None:
        settings = replace(self.PLAIN, epochs=2, rule=rule, bias_lr=2.0)
        folder = train(settings, data, out=tmp_path / "run", max_seconds=1e-9).folder
        before = weights(folder / "last.ckpt")
        train(settings, resume=folder)
        after = weights(folder / "last.ckpt")
        with (folder / "layers.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["epoch"] == "2"]
        assert [f"model.{row['name']}" for row in rows] == list(after)
        for row in rows:
            name = f"model.{row['name']}"
            step = (after[name] - before[name]).abs().mean().item()
            assert float(row["w"]) == pytest.approx(after[name].abs().mean().item(), rel=1e-5)
            assert float(row["dw"]) == pytest.approx(step, rel=1e-2, abs=1e-7)
            assert float(row["ratio"]) == pytest.approx(float(row["dw"]) / float(row["w"]), rel=1e-5)

    def test_the_rate_drops_where_the_validation_error_stalls(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = iter([0.5, 0.6, 0.7, 0.7])
        original = EpochMetrics.compute

        def compute(self: EpochMetrics, prefix: str) -> dict[str, float]:
            values = original(self, prefix)
            return values | {"val_top1": 1 - next(errors)} if prefix == "val" else values

        monkeypatch.setattr(EpochMetrics, "compute", compute)
        monkeypatch.setattr(ProgressCallback, "on_train_epoch_end", lambda *arguments: None)
        monkeypatch.setattr(TensorBoardCallback, "on_train_epoch_end", lambda *arguments: None)
        settings = replace(self.PLAIN, epochs=4, schedule="plateau", patience=1, lr_drops=2)
        result = train(settings, data, out=tmp_path / "run")
        assert [row["lr"] for row in result.history] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_tensorboard_holds_losses_layers_and_pictures(run: Path, data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(TINY, epochs=12)
    folder = train(settings, data, out=tmp_path / "run", save_every=3).folder
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("step/train_loss")] == [20, 40]
    assert [event.step for event in events.Scalars("epoch/val_top1")] == list(range(4, 49, 4))
    history = checkpoint.load(folder / "last.ckpt").history.epochs
    assert [event.value for event in events.Scalars("epoch/val_loss")] == pytest.approx(
        [row["val_loss"] for row in history]
    )
    assert {"features.0.weight/w", "features.0.weight/dw over w"} <= set(tags["scalars"])
    assert {"filters", "curves", "predictions", "neighbours"} <= set(tags["images"])


class TestFiles:
    def test_failing_write_leaves_the_previous_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "last.ckpt"
        checkpoint.save({"value": torch.ones(3)}, path)

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"could not be written: .*No space left on device; the previous one is intact"
        ):
            checkpoint.save({"value": torch.zeros(3)}, path)
        assert torch.equal(torch.load(path, weights_only=True)["value"], torch.ones(3))
        assert list(tmp_path.iterdir()) == [path]

    def test_write_that_fails_half_way(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"before")

        def write_half() -> None:
            with atomic_file(path) as file:
                file.write(b"after")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_half()
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]

    def test_best_is_the_first_epoch_of_the_highest_top1(self, run: Path) -> None:
        best = checkpoint.load(run / "best.ckpt")
        top1 = [row["val_top1"] for row in checkpoint.load(run / "last.ckpt").history.epochs]
        assert len(best.history.epochs) == top1.index(max(top1)) + 1
        assert best.content["global_step"] == 4 * len(best.history.epochs)

    def test_best_survives_the_next_last(self, tmp_path: Path) -> None:
        last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
        checkpoint.save({"epoch": 1}, last)
        link_atomically(last, best)
        checkpoint.save({"epoch": 2}, last)
        assert torch.load(best, weights_only=True) == {"epoch": 1}
        link_atomically(last, best)
        assert torch.load(best, weights_only=True) == {"epoch": 2}
        assert len(list(tmp_path.iterdir())) == 2

    def test_link_copies_where_there_are_no_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*paths: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "link", refuse)
        (tmp_path / "last").write_bytes(b"content")
        link_atomically(tmp_path / "last", tmp_path / "best")
        assert (tmp_path / "best").read_bytes() == b"content"
        assert len(list(tmp_path.iterdir())) == 2


class TestBadCheckpoints:
    def change(self, run: Path, path: Path, **changes: object) -> Path:
        content = torch.load(run / "best.ckpt", weights_only=True)
        for name, value in changes.items():
            content[KEY][name] = value
        torch.save(content, path)
        return path

    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
    def test_cut_off(self, run: Path, tmp_path: Path, part: float) -> None:
        whole = (run / "best.ckpt").read_bytes()
        path = tmp_path / "cut.ckpt"
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(InputError, match=r"cut\.ckpt is not a readable checkpoint"):
            checkpoint.load_network(path)

    def test_not_ours(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(InputError, match=r"other\.ckpt' holds no weights of AlexNet"):
            checkpoint.load_network(tmp_path / "other.ckpt")

    def test_code_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "made"),)

        torch.save({KEY: Evil()}, tmp_path / "evil.ckpt")
        with pytest.raises(InputError, match="not a readable checkpoint"):
            checkpoint.load_network(tmp_path / "evil.ckpt")
        assert not (tmp_path / "made").exists()

    def test_another_preset(self, run: Path, tmp_path: Path) -> None:
        settings = replace(TINY, preset="paper").to_dict()
        path = self.change(run, tmp_path / "x.ckpt", settings=settings)
        with pytest.raises(InputError, match="does not hold the weights of preset 'paper' with 3 classes"):
            checkpoint.load_network(path)

    def test_another_number_of_classes(self, run: Path, tmp_path: Path) -> None:
        path = self.change(run, tmp_path / "x.ckpt", classes=["a", "b", "c", "d"])
        with pytest.raises(InputError, match=r"with 4 classes and width 0\.04"):
            checkpoint.load_network(path)

    def test_newer_format(self, run: Path, tmp_path: Path) -> None:
        path = self.change(run, tmp_path / "x.ckpt", format=3)
        with pytest.raises(InputError, match="it is of format 3"):
            checkpoint.load_network(path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            checkpoint.load_network(tmp_path / "no.ckpt")
        with pytest.raises(InputError, match=r"no checkpoint best\.ckpt in"):
            checkpoint.load_network(tmp_path)


class TestInference:
    def test_evaluate_agrees_with_the_run(self, run: Path, data: Path) -> None:
        network = checkpoint.load_network(run)
        result = inference.evaluate(network, data, batch_size=5)
        assert result["images"] == 18
        assert result["top1"] == pytest.approx(network.history.best()["val_top1"])
        assert result["top5"] == 1

    def test_predict_agrees_with_evaluate(self, run: Path, data: Path) -> None:
        network = checkpoint.load_network(run)
        paths = sorted((data / "val").rglob("*.png"))
        right = sum(
            result[0][0] == path.parent.name
            for path, result in zip(paths, inference.predict(network, paths), strict=True)
        )
        assert right / len(paths) == pytest.approx(inference.evaluate(network, data)["top1"])

    def test_predictions_are_sorted_probabilities(self, run: Path, data: Path) -> None:
        network = checkpoint.load_network(run)
        for crops in (1, 10):
            (result,) = inference.predict(network, [next((data / "val").rglob("*.png"))], crops=crops)
            assert {name for name, _ in result} == set(CLASSES)
            values = [value for _, value in result]
            assert values == sorted(values, reverse=True)
            assert sum(values) == pytest.approx(1, abs=1e-5)

    def test_ten_crops_are_averaged(self, run: Path) -> None:
        network = checkpoint.load_network(run)
        size = 73
        # All crops of an image of one colour are equal, and so is their mean.
        flat = torch.full((1, size, size, 3), 90, dtype=torch.uint8)
        one, ten = (inference.probabilities(network, flat, crops) for crops in (1, 10))
        torch.testing.assert_close(one, ten)
        noise = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
        assert not torch.equal(inference.probabilities(network, noise), inference.probabilities(network, noise, 10))

    def test_other_classes(self, run: Path) -> None:
        with pytest.raises(InputError, match=r"3 classes are not the 10 of .*: bird, cat"):
            inference.evaluate(checkpoint.load_network(run))

    @pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "cpu:0"])
    def test_device_that_is_not_there(self, name: str) -> None:
        with pytest.raises(InputError, match=f"--device.*{name}"):
            pick_device(name)


class TestPieces:
    def test_every_epoch_shows_every_image_once_in_its_own_order(self, data: Path) -> None:
        train_set, _ = datasets.open_data(data, 4)
        loader = ImageLoader(train_set, 6, 0, seed=0)
        orders = []
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)
            orders.append([int(i) for batch in loader for i in batch["indices"]])
        assert [sorted(order) for order in orders] == [list(range(36))] * 2
        assert orders[0] != orders[1]
        loader.load_state_dict({"batches": 2})
        assert [int(i) for batch in loader for i in batch["indices"]] == orders[1][12:]

    def test_filters_in_two_towers(self) -> None:
        weight = torch.randn(96, 3, 11, 11)
        grid = pictures.filter_grid(weight)
        # Six rows of sixteen with a line between them, four lines between the towers.
        assert grid.shape == (2 * (3 * 12 - 1) + 4, 16 * 12 - 1, 3)
        for number, (top, left) in {0: (0, 0), 17: (12, 12), 48: (39, 0), 95: (63, 180)}.items():
            kernel = weight[number]
            expected = (kernel - kernel.min()) / (kernel.max() - kernel.min()) * 255
            shown = grid[top : top + 11, left : left + 11].permute(2, 0, 1).float()
            torch.testing.assert_close(shown, expected, rtol=0, atol=0.51)
        assert grid[35:39].eq(255).all()

    def test_filters_of_one_tower(self) -> None:
        assert pictures.filter_grid(torch.randn(64, 3, 11, 11), towers=1).shape == (47, 191, 3)
        assert pictures.filter_grid(torch.zeros(5, 3, 11, 11), towers=1).shape == (11, 59, 3)

    def test_image_too_small_for_the_network(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"--image-size 30 is too small for preset 'paper': .* at least"):
            train(replace(TINY, preset="paper", image_size=30), data, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_half_precision_on_a_cpu(self, data: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--precision 16 needs a CUDA device"):
            train(replace(TINY, precision="16"), data, out=tmp_path / "run", device="cpu")

    def test_one_class_is_not_enough(self, data: Path, tmp_path: Path) -> None:
        for split in ("train", "val"):
            (tmp_path / "one" / split).mkdir(parents=True)
            (tmp_path / "one" / split / "ship").symlink_to(data / split / "ship")
        with pytest.raises(InputError, match="at least two classes are needed, there is only 'ship'"):
            train(TINY, tmp_path / "one", out=tmp_path / "run")

    def test_lazy_bad_images(self, data: Path, tmp_path: Path) -> None:
        root = tmp_path / "data"
        for file in data.rglob("*.png"):
            copy = root / file.relative_to(data)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        spoilt = sorted((root / "train" / "ship").iterdir())[3]
        spoilt.write_bytes(b"no image")
        options = {"in_memory": 0, "out": tmp_path / "run"}
        with pytest.raises(InputError, match=rf"1 image can't be read: train/ship/{spoilt.name}.*--bad-images skip"):
            train(replace(TINY, batch_size=36), root, **options)
        result = train(replace(TINY, epochs=1), root, bad_images="skip", in_memory=0, out=tmp_path / "skipping")
        assert [name.split(":")[0] for name in result.skipped] == [f"train/ship/{spoilt.name}"]
