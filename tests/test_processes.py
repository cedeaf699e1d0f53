"""`train --parallel`: results equal to one process's, resuming with any number of processes, failures with a reason."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from runs import assert_same, environment, figures, shipped_images

from alexnet_kernels import cli
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.distributed.environment import StoreAddress, group_store, on_one_machine

TINY = ["--recipe", "cifar", "--preset", "paper", "--width", "0.04", "--epochs", "3", "--batch-size", "8"]
TINY += ["--precision", "32", "--device", "cpu"]
CLASSES = ("airplane", "automobile", "ship")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), CLASSES, train=12, val=5)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alexnet_kernels", "train", *map(str, arguments)],
        env=environment(), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
    a, b = (checkpoint.load(path / "last.ckpt").content for path in (first, second))
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


def test_four_fully_sharded_train_as_one_process_and_resume_on_one_and_four(
    one: Path, data: Path, tmp_path: Path
) -> None:
    """Two towers of two; 15 validation images don't split evenly."""
    four = ["--parallel", "towers", "--processes", "4", "--fully-sharded"]
    run, on_one = tmp_path / "run", tmp_path / "one"
    status, output = train("--data", data, "--out", run, "--max-time", "0.001s", *four, *TINY)
    assert status == 0, output
    assert f"--resume {run} --parallel towers --processes 4 --fully-sharded\n" in output
    assert checkpoint.load(run / "last.ckpt").content["global_step"] == 1
    shutil.copytree(run, on_one)
    for folder, again in ((run, four), (on_one, [])):
        status, output = train("--resume", folder, "--device", "cpu", *again)
        assert status == 0, output
        assert_close(one, folder)


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
@pytest.mark.parametrize(
    ("number", "rank", "status", "message"),
    [
        (signal.SIGKILL, "0", 1, "rank 0 was ended by signal 9 (SIGKILL); {run}/last.ckpt is intact, resume"),
        (signal.SIGKILL, "1", 1, "rank 1 was ended by signal 9 (SIGKILL); {run}/last.ckpt is intact, resume"),
        (signal.SIGSTOP, "1", 1, "rank 1 sent no heartbeat for 5 s; {run}/last.ckpt is intact, resume"),
        (signal.SIGTERM, None, 130, "interrupted; resume with: {go_on} --parallel towers --processes 2\n"),
    ],
    ids=["kills rank 0", "kills rank 1", "stops rank 1", "ends all"],
)
def test_signal_ends_the_run_with_the_reason_and_resumed_it_comes_to_the_same_bits(
    number: signal.Signals, rank: str | None, status: int, message: str, towers: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launcher = start("--data", data, "--out", run, "--parallel", "towers", "--save-every", 1, "--timeout", "10s", *TINY)
    try:
        until = time.monotonic() + 120
        processes: dict[str, int] = {}
        while not (run / "last.ckpt").exists() and time.monotonic() < until and launcher.poll() is None:
            processes = processes if len(processes) == 2 else ranks(launcher.pid)
            time.sleep(0.02)
        os.kill(launcher.pid if rank is None else processes[rank], number)
        began = time.monotonic()
        output = "".join(launcher.communicate(timeout=60))
        assert time.monotonic() - began < 40
    finally:
        launcher.kill()
    assert launcher.returncode == status, output
    assert message.format(run=run, go_on=f"alexnet-kernels train --resume {run}") in output, output
    assert "Traceback" not in output
    assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
    status, output = train("--resume", run, "--device", "cpu", "--parallel", "towers")
    assert status == 0, output
    assert_same(towers / "last.ckpt", run / "last.ckpt")
    assert figures(towers / "last.ckpt") == figures(run / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "towers", "--processes", "3"], "multiple of 2 processes, got 3"),
        (["--processes", "2"], "--processes needs --parallel"),
        (["--parallel", "data", "--device", "cuda:1"], "--device cuda:1 can't be used with --parallel"),
        (["--resume", "nowhere", "--parallel", "data"], "nowhere does not exist"),
        (["--batch-size", "9", "--parallel", "data"], "--batch-size 9 doesn't split evenly into the 2 batch shards"),
        (["--preset", "torchvision", "--parallel", "towers"], "preset 'torchvision' has 1 tower"),
        (["--preset", "batchnorm", "--parallel", "data"], "batch normalisation's statistics"),
        (["--precision", "16", "--parallel", "data"], "--precision 16 can't be used with --parallel"),
        (["--fully-sharded"], "--fully-sharded needs --parallel"),
    ],
)
def test_refuses_before_it_starts(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--device", "cpu", *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def torchrun(*arguments: object, nodes: int = 1) -> tuple[int, str]:
    """Runs two processes: both of one torchrun, or one each of two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(2 // nodes)]
    if nodes == 1:
        command.append("--standalone")
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        command += ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1"]
    command += map(str, arguments)
    started = [
        subprocess.Popen(
            command, env=environment(), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(nodes)
    ]
    output = "".join(process.communicate(timeout=200)[0] for process in started)
    return max(process.returncode for process in started), output


def test_two_nodes_come_to_the_bits_of_one(towers: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, output = torchrun(
        "-m", "alexnet_kernels", "train", "--data", data, "--out", run, "--parallel", "towers", *TINY, nodes=2
    )
    assert status == 0, output
    assert_same(towers / "last.ckpt", run / "last.ckpt")


DIFFERENT = """
import os, sys
from alexnet_kernels import cli

sys.exit(cli.main([*sys.argv[1:-3], sys.argv[-3], sys.argv[-2 + int(os.environ["RANK"])]]))
"""


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--lr", ("0.001", "0.011"), "differ in lr: rank 0 has 0.001, rank 1 0.011"),
        ("--save-every", ("3", "7"), "differ in save every: rank 0 has 3, rank 1 7"),
    ],
)
def test_processes_with_different_options_are_refused(
    option: str, values: tuple[str, str], message: str, data: Path, tmp_path: Path
) -> None:
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT)
    run = tmp_path / "run"
    arguments = ["train", "--data", data, "--out", run, "--parallel", "towers", *TINY, option, *values]
    status, output = torchrun(script, *arguments)
    assert status != 0
    assert f"the processes {message}" in output
    assert not run.exists()


def listening(processes: Iterable[int]) -> set[str]:
    """The addresses, in hexadecimal as /proc/net has them, on which the processes listen."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def is_running(process: int) -> bool:
    """Whether it has not ended; one that nobody waits for stays in /proc."""
    try:
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{process}/status").read_text(), re.M)
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds the sockets in /proc")
def test_processes_of_one_machine_listen_on_localhost_and_end_with_the_command(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = start("--data", data, "--out", run, "--parallel", "towers", "--save-every", 1, *TINY, "--epochs", 9999)
    addresses: set[str] = set()
    processes: dict[str, int] = {}
    try:
        until = time.monotonic() + 120
        while not (run / "last.ckpt").exists() and time.monotonic() < until and launcher.poll() is None:
            processes = processes if len(processes) == 2 else ranks(launcher.pid)
            with contextlib.suppress(OSError):
                addresses |= listening([launcher.pid, *processes.values()])
            time.sleep(0.02)
        assert not listening([launcher.pid])
        launcher.kill()
        output = "".join(launcher.communicate(timeout=60))
    finally:
        launcher.kill()
    assert addresses <= {"0100007F"}
    assert "ends: the process that started the run, or its machine, is gone" in output
    until = time.monotonic() + 30
    # Their output ends a moment before they do.
    while any(map(is_running, processes.values())) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_running, processes.values()))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds the sockets in /proc")
def test_rank_0_of_one_machine_hosts_the_store_on_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": port, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    before = listening([os.getpid()])
    store = group_store(0, 1, timedelta(seconds=20))
    assert listening([os.getpid()]) - before <= {"0100007F"}
    StoreAddress.of_environment().connect(timedelta(seconds=20)).set("attempt/0/key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize(
    ("host", "local", "one"),
    [
        ("127.0.0.1", None, True),
        ("localhost", "1", True),
        ("::1", "1", True),
        ("10.0.0.1", "2", True),
        ("10.0.0.1", "1", False),
        ("node0", None, False),
    ],
)
def test_one_machine(host: str, local: str | None, one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert on_one_machine() == one


HANGING = """
import os, sys, time
from alexnet_kernels import cli
from alexnet_kernels.training.module import Classifier

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


DYING = """
import os, signal, sys
from alexnet_kernels import cli
from alexnet_kernels.training.module import Classifier

step = Classifier.training_step
def training_step(self, batch, batch_idx):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

Classifier.training_step = training_step
sys.exit(cli.main())
"""


def test_torchrun_starts_a_run_anew_and_it_comes_to_the_same_bits(towers: Path, data: Path, tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    run = tmp_path / "run"
    status, output = torchrun(
        "--max-restarts", 1, script,
        "train", "--data", data, "--out", run, "--parallel", "towers", "--timeout", "10s", *TINY,
    )  # fmt: skip
    assert status == 0, output
    assert "(exitcode: -9) local_rank: 1" in output
    assert_same(towers / "last.ckpt", run / "last.ckpt")
    assert figures(towers / "last.ckpt") == figures(run / "last.ckpt")


OWN_MODULE = """
import sys
import lightning.pytorch as pl, torch
from alexnet_kernels import AlexNet
from alexnet_kernels.optim import SGD
from alexnet_kernels.training.distributed.strategy import AlexNetStrategy

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = AlexNet(4, "paper", 0.5, 0.04)
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return SGD(self.parameters(), 0.01)

pl.seed_everything(0)
images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
module = Module()
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
split = {"strategy": AlexNetStrategy("towers"), "devices": 2} if sys.argv[2] == "2" else {"devices": 1}
# Both towers see every image, in the loader's order.
split["use_distributed_sampler"] = False
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
    command = [sys.executable, str(script), str(tmp_path / "one.ckpt"), "1"]
    subprocess.run(command, check=True, capture_output=True, env=environment(), cwd="/")
    one, two = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 2
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-3, atol=1e-5)
