"""`train --parallel`: the result of one process, resumed on any number of them; what ends a run says why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from runs import assert_same, figures, shipped_images

from alexnet_kernels import cli
from alexnet_kernels.training import checkpoint

TINY = ["--recipe", "cifar", "--preset", "paper", "--width", "0.04", "--epochs", "2", "--batch-size", "8"]
TINY += ["--precision", "32", "--device", "cpu"]
CLASSES = ("airplane", "automobile", "ship")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), CLASSES, train=12, val=5)


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "alexnet_kernels", "train", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def train(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    output, errors = process.communicate(timeout=200)
    return process.returncode, output + errors


@pytest.fixture(scope="module")
def towers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("runs") / "towers"
    status, output = train("--data", data, "--out", folder, "--parallel", "towers", *TINY)
    assert status == 0, output
    assert output.count("top-1") >= 3
    return folder


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    status, output = train("--data", data, "--out", folder, *TINY)
    assert status == 0, output
    return folder


def assert_close(first: Path, second: Path) -> None:
    a, b = (checkpoint.load(path / "last.ckpt")[1] for path in (first, second))
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][key], value, rtol=1e-3, atol=1e-5)
    for row, other in zip(figures(first / "last.ckpt"), figures(second / "last.ckpt"), strict=True):
        assert other == pytest.approx(row, rel=1e-3)


def test_towers_train_as_one_process(one: Path, towers: Path) -> None:
    assert_close(one, towers)
    assert {path.name for path in one.iterdir()} == {path.name for path in towers.iterdir()}


def test_hybrid_trains_as_one_process(one: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = train("--data", data, "--out", run, "--parallel", "hybrid", *TINY)
    assert status == 0, output
    assert_close(one, run)


def test_resumes_on_two_and_on_one(one: Path, towers: Path, data: Path, tmp_path: Path) -> None:
    for name, again in (("two", ["--parallel", "towers"]), ("one", [])):
        run = tmp_path / name
        status, output = train("--data", data, "--out", run, "--parallel", "towers", "--max-time", "0.001s", *TINY)
        assert status == 0, output
        assert checkpoint.load(run / "last.ckpt")[1]["global_step"] == 1
        status, output = train("--resume", run, "--device", "cpu", *again)
        assert status == 0, output
        if again:
            assert_same(towers / "last.ckpt", run / "last.ckpt")
            assert figures(towers / "last.ckpt") == figures(run / "last.ckpt")
        else:
            assert_close(one, run)


def ranks(launcher: int) -> dict[str, int]:
    """The launched processes, by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = re.search(r"^PPid:\s+(\d+)", (folder / "status").read_text(), re.M)
                if parent and int(parent[1]) == launcher:
                    environment = (folder / "environ").read_text()
                    found[re.search(r"\0RANK=(\d+)", "\0" + environment)[1]] = int(folder.name)
            except (OSError, TypeError):
                continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_killed_rank_ends_the_run_with_the_reason(towers: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    longer = ["200" if argument == "2" else argument for argument in TINY]
    launcher = start("--data", data, "--out", run, "--parallel", "towers", *longer)
    try:
        until = time.monotonic() + 120
        while not (run / "last.ckpt").exists() and time.monotonic() < until and launcher.poll() is None:
            time.sleep(0.1)
        os.kill(ranks(launcher.pid)["1"], signal.SIGKILL)
        began = time.monotonic()
        output = "".join(launcher.communicate(timeout=60))
        assert time.monotonic() - began < 30
    finally:
        launcher.kill()
    assert launcher.returncode == 1
    assert "rank 1 was ended by signal 9 (SIGKILL)" in output
    assert "last.ckpt is intact" in output
    assert checkpoint.load(run / "last.ckpt")[0].history


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "towers", "--processes", "3"], "multiple of 2 processes, got 3"),
        (["--processes", "2"], "--processes needs --parallel"),
        (["--parallel", "data", "--device", "cuda:1"], "--device cuda:1 can't be used with --parallel"),
        (["--resume", "nowhere", "--parallel", "data"], "nowhere does not exist"),
    ],
)
def test_refuses_before_it_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "9", "--parallel", "data"], "--batch-size 9 doesn't split evenly over the 2 parts"),
        (["--preset", "torchvision", "--parallel", "towers"], "preset 'torchvision' has 1 tower"),
    ],
)
def test_refuses_before_training(arguments: list[str], message: str, data: Path, tmp_path: Path) -> None:
    status, output = train("--data", data, "--out", tmp_path / "run", *TINY, *arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def torchrun(script: Path, *arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout + done.stderr


HANGING = """
import os, sys, time
from alexnet_kernels import cli
from alexnet_kernels.training.lightning import Classifier

def waits_for_ever():
    time.sleep(1000)

step = Classifier.training_step
def training_step(self, batch, batch_idx):
    if os.environ["RANK"] == "1" and self.global_step == 5:
        waits_for_ever()
    return step(self, batch, batch_idx)

Classifier.training_step = training_step
sys.exit(cli.main())
"""


def test_hanging_rank_ends_the_run_under_torchrun_too(data: Path, tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    status, output = torchrun(
        script, "train", "--data", data, "--out", tmp_path / "run", "--parallel", "towers", "--timeout", "10s", *TINY
    )
    assert status != 0
    assert "no step ended for 10 s: rank 1 in waits_for_ever (hanging.py:7)" in output
    assert "last.ckpt is intact" in output


OWN_MODULE = """
import sys
import lightning.pytorch as pl, torch
from alexnet_kernels import AlexNet
from alexnet_kernels.optim import SGD
from alexnet_kernels.training.strategy import AlexNetStrategy

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        # Lightning seeds the generators anew where there are several processes: other masks.
        self.net = AlexNet(4, "paper", 0.0, 0.04)
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return SGD(self.parameters(), 0.01)

pl.seed_everything(0)
images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
module = Module()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
split = {"strategy": AlexNetStrategy("towers"), "devices": 2} if sys.argv[2] == "2" else {"devices": 1}
trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
                     accumulate_grad_batches=2, enable_progress_bar=False, **split)
trainer.fit(module, loader)
trainer.save_checkpoint(sys.argv[1])
"""


def test_strategy_takes_a_module_of_the_users(tmp_path: Path) -> None:
    script = tmp_path / "own.py"
    script.write_text(OWN_MODULE)
    status, output = torchrun(script, tmp_path / "two.ckpt", 2)
    assert status == 0, output
    subprocess.run([sys.executable, str(script), str(tmp_path / "one.ckpt"), "1"], check=True, capture_output=True)
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 2
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-5)
