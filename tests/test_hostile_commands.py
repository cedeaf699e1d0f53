"""Every option of every command with hostile values, names and surroundings: exit status 0, or one line and another."""

from __future__ import annotations

import argparse
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")

from runs import environment, shipped_images

from alexnet_kernels import backends, cli
from alexnet_kernels._errors import RunError, printable
from alexnet_kernels.cli import main
from alexnet_kernels.cli.arguments import path
from alexnet_kernels.models import AlexNet
from alexnet_kernels.training import checkpoint, inference, prepare, run, throughput

pytestmark = pytest.mark.slow

COMMANDS = (
    "train", "evaluate", "predict", "extract", "convert", "prepare", "bench", "throughput", "tune", "info",
)  # fmt: skip
NUMBERS = (
    "", "0", "-1", "1e999", "nan", "inf", "1" * 5000, "99999999999999999999", "0x10", "1_0", "٣", "²", " 4", "1e-320",
    "2147483648", "1,,2", ",", "1h1h", "h", "None", "--", "\x1b[2J", "a\nb", "\udce9",
)  # fmt: skip
PATHS = (
    "", "\0", "a" * 300, "x/" * 3000, "/dev/null", "/dev/full", "/dev/zero", "pipe", "loop", "latin-\udce9",
    "\x1b[2J.png", "a\nb.yaml", ".", "-", "none.yaml", "none.png", "none/x.csv", "tree", "run", "run/recipe.yaml",
    "run/best.ckpt", "tree/train/cat", "(", "cuda:", "cuda:-1", "cuda:²", "meta",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree of images and a run, a pipe and a link to itself."""
    root = tmp_path_factory.mktemp("place")
    shipped_images(root / "tree", ("cat", "ship"), train=4, val=2)
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    assert main(["train", *base("train", root), "--out", str(root / "run")]) == 0
    return root


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before, threads = backends.get_backend(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    backends.set_backend(before)
    torch.set_num_threads(threads)


def base(command: str, root: Path) -> list[str]:
    """Valid arguments: positional ones first."""
    small = ["--preset", "batchnorm", "--image-size", "64", "--batch-size", "4"]
    data = ["--data", str(root / "tree")]
    return {
        "train": [*data, *small, "--width", "0.04", "--epochs", "1", "--precision", "32", "--lr", "0.01"],
        "evaluate": [str(root / "run"), *data],
        "predict": [str(root / "run"), str(next((root / "tree").rglob("*.png"), ""))],
        "extract": [str(root / "run"), *data, "--layers", "fc8", "--out", "out", "--workers", "0"],
        "convert": [str(root / "run"), "out.safetensors"],
        "prepare": [str(root / "tree"), "out", "--size", "32", "--workers", "1"],
        "bench": ["--list"],
        "throughput": [*data, *small],
        "tune": ["--show"],
        "info": [],
    }[command]


def variants(command: str, root: Path) -> Iterator[list[str]]:
    """The command's valid arguments with each argument in turn replaced by each hostile value."""
    groups = cli._parser()._subparsers
    assert groups is not None
    (choice,) = groups._group_actions
    actions = [action for action in choice.choices[command]._actions if not isinstance(action, argparse._HelpAction)]
    positional = [action for action in actions if not action.option_strings]
    for action in actions:
        values = PATHS if action.type in (None, path) else NUMBERS
        for value in (values[:3] if action.choices else values) if action.nargs != 0 else ():
            arguments = base(command, root)
            if action in positional:
                at = positional.index(action)
                yield [command, *arguments[:at], value, *arguments[at + 1 :]]
                continue
            option = action.option_strings[-1]
            if option in arguments:
                at = arguments.index(option)
                del arguments[at : at + 2]
            if action.nargs == 2:
                yield [command, *arguments, option, value, "run/metrics.csv"]
            else:
                yield [command, *arguments, f"{option}={value}"]
        if action.nargs == 0:
            yield [command, *base(command, root), action.option_strings[-1]]


def problem(status: object, out: str, err: str) -> str | None:
    """What is wrong with the end of a command."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("alexnet-kernels") and "error: " in line]
    if any((ord(c) < 32 and c != "\n") or 0xD800 <= ord(c) < 0xE000 for c in out + err):
        return "prints control characters"
    if status == 0:
        return f"prints {err!r}" if err else None
    if status not in (1, 2):
        return f"ends with {status!r}"
    if len(errors) != 1 or lines[-1] != errors[0] or not (len(lines) == 1 or lines[0].startswith("usage")):
        return f"prints {len(lines)} lines: {err[-300:]!r}"
    return None


@pytest.mark.parametrize("command", COMMANDS)
def test_values_of_options(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that a command does before it computes, with every value. In this process, for speed."""

    def begun(*arguments: object, **options: object) -> None:
        raise RunError("the run begins")

    monkeypatch.setattr(run.pl, "Trainer", begun)
    monkeypatch.setattr(throughput, "_rate", lambda *arguments: 1.0)
    monkeypatch.setattr(cli.train, "launch", lambda *arguments: 0)
    write = prepare.write_shards
    monkeypatch.setattr(prepare, "write_shards", lambda tasks, workers, progress: write(tasks, 1, progress))
    monkeypatch.setattr(run.Header, "model", lambda self, device=None: model)
    model = AlexNet(2, "batchnorm", width=0.04)
    parser = cli._parser()
    monkeypatch.setattr(cli, "_parser", lambda: parser)
    found = []
    for number, arguments in enumerate(variants(command, place)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("tree", "run", "pipe", "loop"):
            (folder / name).symlink_to(place / name)
        monkeypatch.chdir(folder)
        status: object
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
        if reason := problem(status, *capsys.readouterr()):
            found.append(f"{[word[:40] for word in arguments]}: {reason}")
    assert found == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory"),
        OSError(28, "No space left on device", "there"),
        OSError(24, "Too many open files"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "convert", "prepare", "throughput"])
def test_failures_of_the_machine(
    command: str, error: BaseException, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where a command first reads its images or its network."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    target = "open_splits" if command in ("train", "prepare", "throughput") else "load_network"
    modules = [m for name, m in sys.modules.items() if name.startswith("alexnet_kernels.training.")]
    for module in modules:
        if hasattr(module, target):
            monkeypatch.setattr(module, target, fail)
    status = main([command, *base(command, place)])
    err = capsys.readouterr().err
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert err.count("\n") == 1
    words = {"KeyboardInterrupt": "interrupted", "OSError": str(getattr(error, "strerror", ""))}
    assert words.get(type(error).__name__, "out of memory") in err


def test_network_larger_than_the_memory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.os, "sysconf", lambda name: 1)
    assert main(["train", *base("train", place)]) == 2
    assert "--width 0.04: the weights of preset batchnorm" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_memory_of_predict_is_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = AlexNet.forward

    def forward(self: AlexNet, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return original(self, x)

    monkeypatch.setattr(AlexNet, "forward", forward)
    network = checkpoint.load_network(place / "run")
    image = next((place / "tree").rglob("*.png"))
    assert len(inference.predict(network, [image] * 250)) == 250
    assert sizes == [100, 100, 50]


class TestNames:
    """Of files and classes: bytes that are not UTF-8, and escape sequences."""

    NAMES = (os.fsdecode(b"caf\xe9"), "\x1b[31mred\x1b[0m two\nlines \u202egpj")

    def test_printable(self) -> None:
        assert [printable(name) for name in self.NAMES] == [
            "caf\\xe9", "\\x1b[31mred\\x1b[0m two\\nlines \\u202egpj"
        ]  # fmt: skip
        assert printable("naïve 日本　語 👩‍🔬") == "naïve 日本　語 👩‍🔬"

    @pytest.mark.parametrize("name", NAMES, ids=["latin-1", "control"])
    def test_in_every_command(
        self,
        name: str,
        place: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        tree = tmp_path / f"tree {name}"
        shipped_images(tree, ("cat", "ship"), train=4, val=2)
        for split in ("train", "val"):
            (tree / split / "cat").rename(tree / split / name)
            (tree / split / name / f"{name}.png").write_bytes(b"no image")
        options = [*base("train", tmp_path)[2:], "--data", str(tree), "--bad-images", "skip"]
        # TensorBoard refuses a run's folder that is not UTF-8.
        run_, set_ = "run" if "\udce9" in name else f"run {name}", f"set {name}"
        image = str(next(path for path in (tree / "val" / name).iterdir() if path.stat().st_size > 10))
        for command in (
            ["train", *options, "--out", f"run {name}"],
            ["train", *options, "--out", "run" if "\udce9" in name else f"run {name}"],
            ["evaluate", run_, "--per-class", "--bad-images", "skip"],
            ["evaluate", run_, "--confusion", "x.csv"],
            ["evaluate", run_, "--confusion", "x.png", "--bad-images", "skip"],
            ["evaluate", run_, "--confusion", "x.csv", "--bad-images", "skip", "--json"],
            ["predict", run_, image, "--picture", f"{name}.png"],
            ["predict", run_, image, "--json"],
            ["predict", run_, str(tree / "val" / name / f"{name}.png")],
            ["convert", run_, f"{name}.safetensors"],
            ["evaluate", f"{name}.safetensors", "--data", str(tree), "--bad-images", "skip"],
            ["prepare", str(tree), set_, "--size", "73", "--workers", "1"],
            ["evaluate", run_, "--data", set_],
            [
                "throughput",
                "--data",
                set_,
                "--seconds",
                "0.001s",
                "--preset",
                "batchnorm",
                "--image-size",
                "64",
                "--workers",
                "0",
            ],
        ):
            status = main(command)
            out, err = capsys.readouterr()
            assert problem(status, out, err) is None, command
            assert status == (0 if "error" not in err else 2), command
        assert (tmp_path / set_ / "report.csv").read_bytes().decode().count("left out") == 2


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alexnet_kernels", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_interrupt_during_imports() -> None:
    process = start("info", env=environment(), cwd="/")
    deadline = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert (out, err) == ("", "alexnet-kernels: error: interrupted\n")


def test_inherited_variables(place: Path) -> None:
    """Of notebooks, schedulers and torchrun, and a user's matplotlibrc."""
    style = place / "matplotlibrc"
    style.write_text("text.usetex: True\n")
    variables = {
        "MPLBACKEND": "module://not_installed.backend_inline", "MATPLOTLIBRC": str(style), "RANK": "x",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3", "NODE_RANK": "x", "SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0", "JSM_NAMESPACE_RANK": "x",
        "TORCHELASTIC_RESTART_COUNT": "x", "PYTHONIOENCODING": "ascii", "COLUMNS": "0",
    }  # fmt: skip
    process = start("train", *base("train", place), cwd=place, env={**environment(), **variables})
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "curves.png" in out


def test_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "alexnet_kernels", "info", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment(), cwd="/",
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("alexnet-kernels: error: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [
        (0, ["train", "BASE", "--out", "new"]),
        (300, ["train", "BASE", "--out", "new"]),
        (100_000, ["train", "BASE", "--out", "new"]),
        (1000, ["convert", "run", "out.safetensors"]),
        (100, ["evaluate", "run", "--confusion", "out.png"]),
        (10, ["evaluate", "run", "--confusion", "out.csv"]),
        (1000, ["predict", "run", "IMAGE", "--picture", "out.png"]),
        (1000, ["prepare", "tree", "out", "--size", "32", "--workers", "1"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else str(value),
)
def test_reason_of_a_full_disk(
    place: Path, limit: int, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Simulated by a limit on the size of files: the same error from the same call, with another reason."""
    for name in ("tree", "run"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    given = {"BASE": base("train", place), "IMAGE": base("predict", place)[1:]}
    words = [word for argument in arguments for word in given.get(argument, [argument])]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out, err = capsys.readouterr()
    assert status == 1, out + err
    assert err.count("\n") == 1, err
    assert "File too large" in err
    assert not [path for path in tmp_path.glob("out*") if path.is_file()]
