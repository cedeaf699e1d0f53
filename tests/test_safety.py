"""A run's results survive kills, signals, full disks, values that are not finite, and lack of memory."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from runs import assert_same as assert_same_checkpoints
from runs import environment, figures, shipped_images, train

from alexnet_kernels._errors import RunError
from alexnet_kernels.models import AlexNet
from alexnet_kernels.training import checkpoint, decoding, image_set
from alexnet_kernels.training.callbacks.checkpoint import CheckpointCallback
from alexnet_kernels.training.module import Classifier
from alexnet_kernels.training.settings import save_recipe, settings_of

TINY = settings_of("quick", epochs=3, batch_size=4, image_size=64, width=0.04, precision="32")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of two classes for training, 6 for validation."""
    return shipped_images(tmp_path_factory.mktemp("data"), ("cat", "ship"), train=12, val=3)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    return train(TINY, data, out=tmp_path_factory.mktemp("runs") / "run").folder


def assert_same(first: Path, second: Path) -> None:
    """Asserts that the last checkpoints of two runs are bitwise identical, with the same figures of every epoch."""
    a, b = first / "last.ckpt", second / "last.ckpt"
    assert_same_checkpoints(a, b)
    assert figures(a) == figures(b)
    assert checkpoint.load(a).history.layers == checkpoint.load(b).history.layers


# Steps take a millisecond or so each: a run must last long enough to be killed inside one.
SLOW = """
import sys, time
from alexnet_kernels.training.module import Classifier
step = Classifier.training_step
def slow(*arguments):
    time.sleep(0.05)
    return step(*arguments)
Classifier.training_step = slow
from alexnet_kernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, "train", "--save-every", "1", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd="/"
    )


def wait_for(process: subprocess.Popen[str], path: Path, changed_since: float = 0.0) -> None:
    deadline = time.monotonic() + 100
    while not (path.exists() and path.stat().st_mtime > changed_since):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_again_and_again_a_run_ends_with_the_same_bits(run: Path, data: Path, tmp_path: Path) -> None:
    folder, last = tmp_path / "run", tmp_path / "run" / "last.ckpt"
    save_recipe(TINY, tmp_path / "tiny.yaml")
    begin = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", str(data), "--out", str(folder)]
    chance = random.Random()
    kills, steps = 0, [0]
    for arguments in (begin, *[["--resume", str(folder)]] * 3):
        since = last.stat().st_mtime if last.exists() else 0.0
        process = start(*arguments)
        try:
            wait_for(process, last, since)
            time.sleep(chance.uniform(0, 0.1))
        finally:
            process.kill()
            process.wait()
        kills += process.returncode == -signal.SIGKILL
        steps.append(checkpoint.load(last).content["global_step"])
    assert kills >= 3
    assert steps == sorted(set(steps))
    if steps[-1] < 18:
        (folder / ".last.ckpt.x.tmp").write_bytes(b"what a kill left behind")
        assert train(TINY, resume=folder).stopped is None
        assert not list(folder.glob(".*.tmp"))
    assert_same(run, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signals_save_at_once(run: Path, data: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    save_recipe(TINY, tmp_path / "tiny.yaml")
    process = start("--recipe", str(tmp_path / "tiny.yaml"), "--data", str(data), "--out", str(folder))
    try:
        wait_for(process, folder / "last.ckpt")
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert f"interrupted; resume with: alexnet-kernels train --resume {folder}" in out
    assert "Traceback" not in out
    assert train(TINY, resume=folder).stopped is None
    assert_same(run, folder)


def test_sigterm_between_two_steps_and_in_validation(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Lightning itself checks for the signal, and would end the run without saving it."""
    for place, step in (("on_train_batch_start", 3), ("on_validation_epoch_start", 6)):
        original = getattr(Classifier, place)

        def signalled(
            self: Classifier, *rest: object, original: Callable[..., None] = original, step: int = step
        ) -> None:
            if self.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, *rest)

        folder = tmp_path / place
        with monkeypatch.context() as patch:
            patch.setattr(Classifier, place, signalled)
            assert train(TINY, data, out=folder).stopped == "interrupted"
        assert checkpoint.load(folder / "last.ckpt").content["global_step"] in (step, step + 1)
        train(TINY, resume=folder)
        assert_same(run, folder)


@pytest.mark.parametrize(("place", "step"), [("on_train_batch_end", 3), ("on_train_epoch_end", 6)])
def test_sigterm_right_after_the_run_looked_for_it(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, step: int
) -> None:
    original = getattr(CheckpointCallback, place)

    def signalled(self: CheckpointCallback, trainer: Any, *rest: Any) -> None:
        original(self, trainer, *rest)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointCallback, place, signalled)
        assert train(TINY, data, out=tmp_path / "run").stopped == "interrupted"
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").content["global_step"] == step + 1
    train(TINY, resume=tmp_path / "run")
    assert_same(run, tmp_path / "run")


def test_second_interrupt_ends_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(self: Classifier, *rest: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Classifier, "on_train_batch_start", signalled)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, data, out=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_to_all_processes_of_a_run(run: Path, data: Path, tmp_path: Path) -> None:
    """As terminals and schedulers send them, also to the processes that read images."""
    folder = tmp_path / "run"
    save_recipe(TINY, tmp_path / "tiny.yaml")
    unheld = "from alexnet_kernels.training import datasets\ndatasets.IN_MEMORY = 0\nfrom alexnet_kernels.cli"
    code = SLOW.replace("0.05", "0.3").replace("from alexnet_kernels.cli", unheld)
    arguments = ["--recipe", str(tmp_path / "tiny.yaml"), "--data", str(data), "--out", str(folder), "--workers", "2"]
    command = [sys.executable, "-c", code, "train", "--save-every", "1", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(),
        cwd="/",
    )
    try:
        wait_for(process, folder / "last.ckpt")
        readers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, check=True)
        assert len(readers.stdout.split()) == 2
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "interrupted; resume with" in out
    assert "Traceback" not in out
    train(TINY, resume=folder)
    assert_same(run, folder)


def test_checkpoints_inside_an_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = checkpoint.save

    def save(content: dict, path: Path) -> None:
        written.append(content["global_step"])
        original(content, path)

    monkeypatch.setattr(checkpoint, "save", save)
    train(replace(TINY, epochs=2), data, out=tmp_path / "run", save_every=4)
    assert written == [4, 6, 8, 12]


class TestNotFinite:
    def test_diverging_run(self, data: Path, tmp_path: Path) -> None:
        message = r"not finite in epoch 1, step \d+: try a lower --lr than 1e\+20$"
        with pytest.raises(RunError, match=message):
            train(replace(TINY, lr=1e20), data, out=tmp_path / "run")
        assert not (tmp_path / "run" / "last.ckpt").exists()

    def test_one_weight_is_never_saved(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A weight that does not change the class of any validation image."""
        original = Classifier.training_step

        def spoilt(self: Classifier, *arguments: object) -> None:
            original(self, *arguments)
            if self.global_step == 9:
                momentum = self.trainer.optimizers[0].state[self.model.features[0].weight]["momentum_buffer"]
                momentum[0, 0, 0, 0] = float("inf")

        monkeypatch.setattr(Classifier, "training_step", spoilt)
        folder = tmp_path / "run"
        with pytest.raises(RunError) as error:
            train(TINY, data, out=folder, save_every=3)
        assert "not finite in epoch 2, step 9" in str(error.value)
        assert str(error.value).endswith(f"{folder}/last.ckpt is intact, resume from it with --resume {folder}")
        content = checkpoint.load(folder / "last.ckpt").content
        assert content["global_step"] == 6
        assert all(value.isfinite().all() for value in content["state_dict"].values())


class TestMachine:
    def test_full_disk(self, run: Path, data: Path, tmp_path: Path) -> None:
        """Simulated by a limit on the size of files: the same error from the same call."""
        folder = tmp_path / "run"
        train(TINY, data, out=folder, max_seconds=1e-9)
        before = (folder / "last.ckpt").read_bytes()

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

        command = [sys.executable, "-m", "alexnet_kernels", "train", "--resume", str(folder)]
        done = subprocess.run(
            command, preexec_fn=limit, capture_output=True, text=True, check=False, env=environment(), cwd="/"
        )
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("\n") == 1
        assert f"checkpoint {folder}/last.ckpt could not be written: " in done.stderr
        assert "the previous one is intact" in done.stderr
        assert (folder / "last.ckpt").read_bytes() == before
        assert not list(folder.glob(".*.tmp"))
        train(TINY, resume=folder)
        assert_same(run, folder)

    @pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
    def test_folder_that_became_read_only(self, data: Path, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        train(TINY, data, out=folder, max_seconds=1e-9)
        before = (folder / "last.ckpt").read_bytes()
        folder.chmod(0o500)
        try:
            with pytest.raises(RunError, match="Permission denied"):
                train(TINY, resume=folder)
            assert (folder / "last.ckpt").read_bytes() == before
        finally:
            folder.chmod(0o700)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            RuntimeError("[enforce fail at alloc_cpu.cpp:119] data. DefaultCPUAllocator: not enough memory"),
            MemoryError(),
        ],
        ids=["cuda", "cpu", "python"],
    )
    def test_no_memory(
        self, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        folder = tmp_path / "run"
        original = AlexNet.forward
        calls = []

        def forward(self: AlexNet, x: torch.Tensor) -> torch.Tensor:
            calls.append(x)
            if len(calls) == 5:
                raise error
            return original(self, x)

        with monkeypatch.context() as patch:
            patch.setattr(AlexNet, "forward", forward)
            with pytest.raises(RunError, match=r"out of memory: try --accumulate 2 .*last\.ckpt is intact"):
                train(TINY, data, out=folder, save_every=2)
        assert checkpoint.load(folder / "last.ckpt").content["global_step"] == 4
        train(TINY, resume=folder)
        assert_same(run, folder)

    def test_other_errors_stay_what_they_are(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: AlexNet, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a mistake in the program")

        monkeypatch.setattr(AlexNet, "forward", broken)
        with pytest.raises(RuntimeError, match=r"^a mistake in the program$"):
            train(TINY, data, out=tmp_path / "run")

    def test_reader_that_dies(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def die(*arguments: object) -> None:
            os._exit(9)

        monkeypatch.setattr(decoding, "decode", die)
        patched = image_set.ImageSet.sample

        def sample(self: image_set.ImageSet, count: int) -> torch.Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(decoding, "decode", lambda file, size: torch.zeros(size, size, 3, dtype=torch.uint8))
                return patched(self, count)

        monkeypatch.setattr(image_set.ImageSet, "sample", sample)
        with pytest.raises(RunError, match=r"a process that reads images ended: .*; try fewer --workers"):
            train(TINY, data, out=tmp_path / "run", in_memory=0, workers=1)
