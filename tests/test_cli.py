"""The command: its output and files, and one line instead of a traceback for every invalid input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from runs import shipped_images

from alexnet_kernels import _library, backends
from alexnet_kernels._errors import InputError
from alexnet_kernels.cli import main
from alexnet_kernels.cli.throughput import verdict
from alexnet_kernels.models import PRESETS
from alexnet_kernels.training import checkpoint, datasets
from alexnet_kernels.training.throughput import binding

SMALL = ["--width", "0.04", "--image-size", "64", "--batch-size", "6", "--epochs", "2", "--precision", "32"]


@pytest.fixture(autouse=True)
def restored_backend() -> object:
    before = backends.get_backend()
    yield
    backends.set_backend(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("cat", "ship"), train=6, val=3)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "--data", str(data), "--preset", "batchnorm", "--out", str(folder), *SMALL]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str, status: int = 2) -> None:
    """Asserts one line on stderr; argparse's own errors print the usage before it."""
    try:
        result: object = main(arguments)
    except SystemExit as exit_:
        result = exit_.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("alexnet-kernels") and "error: " in line]
    assert result == status
    assert len(lines) == 1
    assert captured.err.rstrip().endswith(lines[0])
    assert "Traceback" not in captured.err + captured.out
    for word in words:
        assert word in lines[0], lines[0]


class TestTrain:
    def test_prints_progress_and_a_summary(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "run"
        command = [
            "train",
            "--data",
            str(data),
            "--preset",
            "caffe",
            "--out",
            str(folder),
            *SMALL,
            "--lr",
            "1e-9",
            "--log-every",
            "0.001",
        ]
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "preset caffe" in out
        # Without a rate as long as no step was counted.
        assert re.search(r"^epoch 2/2 step 1/\d+  train loss [\d.]+ top-1 .*%  \d+ s left$", out, re.M)
        assert re.search(r"^epoch 1/2 step 2/\d+  \d+ images/s  train loss [\d.]+ top-1 .*%  \d+ s left$", out, re.M)
        assert (
            len(re.findall(r"not learning: the loss is that of guessing, ln\(2\) = 0\.693; .*: try .*--lr", out)) == 2
        )
        assert "12 training and 6 validation images of 2 classes, 64 x 64" in out
        assert len(re.findall(r"epoch +\d/2 +\d+ images/s  train loss [\d.]+ top-1 +[\d.]+%.* val loss", out)) == 2
        assert re.search(r"top-1 [\d.]+%  top-5 100\.0%  on the validation images, epoch [12] \(chance: 50\.0%\)", out)
        for name in ("best.ckpt", "last.ckpt", "metrics.csv", "filters.png", "curves.png", "predictions.png"):
            assert str(folder / name) in out
            assert (folder / name).stat().st_size > 0

    def test_unreadable_images_are_skipped_and_counted(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        archive = tmp_path / "data.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(data.rglob("*.png")):
                file.write(path, path.relative_to(data).as_posix())
            file.writestr("train/cat/broken.png", b"no image")
        command = [
            "train",
            "--data",
            str(archive),
            "--preset",
            "batchnorm",
            "--out",
            str(tmp_path / "run"),
            *SMALL,
        ]
        fails(capsys, command, "1 image can't be read: train/cat/broken.png", "--bad-images skip")
        assert not (tmp_path / "run").exists()
        assert main([*command, "--bad-images", "skip"]) == 0
        assert "left out 1 unreadable images: train/cat/broken.png" in capsys.readouterr().out

    def test_interrupt_saves_and_tells_how_to_go_on(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Ctrl-C, in a separate process."""
        folder = tmp_path / "run"
        command = [sys.executable, "-m", "alexnet_kernels", "train"]
        settings = [
            "--data",
            str(data),
            "--preset",
            "batchnorm",
            *SMALL[:-4],
            "--epochs",
            "4000",
            "--precision",
            "32",
        ]
        process = subprocess.Popen(
            [*command, *settings, "--out", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            deadline = time.monotonic() + 100
            while not (folder / "last.ckpt").exists():
                assert process.poll() is None, process.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130, out
        assert f"interrupted; resume with: alexnet-kernels train --resume {folder}" in out
        assert "Traceback" not in out
        saved = checkpoint.load(folder / "last.ckpt")
        content = saved.content
        assert saved.history.epochs
        assert content["global_step"] // 2 == len(saved.history.epochs)
        assert main(["train", "--resume", str(folder), "--max-time", "0.000001s"]) == 0
        assert "out of time; resume with" in capsys.readouterr().out
        assert checkpoint.load(folder / "last.ckpt").content["global_step"] == content["global_step"] + 1

    def test_time_limit_and_resume(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = tmp_path / "run"
        command = ["train", "--data", str(data), "--preset", "batchnorm", "--out", str(folder), *SMALL]
        assert main([*command, "--max-time", "0.000001s"]) == 0
        assert f"out of time; resume with: alexnet-kernels train --resume {folder}" in capsys.readouterr().out
        fails(capsys, ["train", "--resume", str(folder), "--lr", "0.5"], "--lr 0.5 can't be used with --resume")
        fails(capsys, ["train", "--resume", str(folder), "--out", "x"], "--out can't be used with --resume")
        fails(capsys, ["train", "--resume", str(folder), "--recipe", "paper"], "--recipe can't be used with --resume")
        assert main(["train", "--resume", str(folder), "--width", "0.04"]) == 0
        assert "epoch   2/2" in capsys.readouterr().out
        fails(capsys, ["train", "--resume", str(folder)], "finished its 2 epochs", "nothing to resume")

    def test_recipe_of_an_earlier_run(self, run: Path, data: Path, tmp_path: Path) -> None:
        command = ["train", "--data", str(data), "--recipe", str(run / "recipe.yaml"), "--out", str(tmp_path / "run")]
        assert main([*command, "--seed", "3"]) == 0
        settings = checkpoint.load(run / "last.ckpt").header.settings
        assert checkpoint.load(tmp_path / "run" / "last.ckpt").header.settings == replace(settings, seed=3)

    def test_existing_folder_is_never_overwritten(
        self, run: Path, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        fails(capsys, ["train", "--data", str(data), "--out", str(run), *SMALL], "exists", f"--resume {run}")
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--epochs", "0"], ["--epochs", "at least 1"]),
            (["--epochs", "many"], ["--epochs", "'many' is not a whole number"]),
            (["--batch-size", "-3"], ["--batch-size", "not negative"]),
            (["--lr", "0"], ["--lr must be a positive number, got 0"]),
            (["--lr", "nan"], ["--lr must be a positive number, got nan"]),
            (["--lr", "fast"], ["--lr", "invalid float value: 'fast'"]),
            (["--momentum", "1"], ["--momentum must be in [0, 1), got 1"]),
            (["--weight-decay", "-1"], ["--weight-decay must be"]),
            (["--dropout", "1"], ["--dropout must be in [0, 1)"]),
            (["--width", "0"], ["--width must be"]),
            (["--image-size", "5000"], ["--image-size must be from 1 to 4096, got 5000"]),
            (["--image-size", "20"], ["--image-size 20 is too small for preset", "at least"]),
            (["--seed", "-1"], ["--seed", "not negative"]),
            (["--seed", "4294967296"], ["--seed must be from 0 to 2^31 - 1"]),
            (["--workers", "x"], ["--workers", "'x' is not a whole number"]),
            (["--preset", "vgg"], ["--preset", "invalid choice", "batchnorm"]),
            (["--precision", "8"], ["--precision", "invalid choice", "bf16"]),
            (["--precision", "16", "--device", "cpu"], ["--precision 16 needs a CUDA device"]),
            (["--device", "tpu"], ["--device must be auto, cpu, cuda or cuda:<n>, got tpu"]),
            (["--device", "cuda:99"], ["--device cuda:99", "CUDA devices"]),
            (["--backend", "fastest"], ["--backend", "invalid choice"]),
            (["--recipe", "nice"], ["--recipe nice: there is no such recipe", "as_run", "paper"]),
            (["--schedule", "exp"], ["--schedule", "invalid choice", "plateau"]),
            (["--lr-epochs", "30,x"], ["--lr-epochs", "'x' is not a whole number"]),
            (["--lr-epochs", "30,20"], ["--lr-epochs must be rising numbers from 1 on, got (30, 20)"]),
            (["--accumulate", "65"], ["--accumulate must be from 1 to the batch size, got 65"]),
            (["--save-every", "0"], ["--save-every", "at least 1"]),
            (["--max-time", "soon"], ["--max-time", "'soon' is not a time such as 90s, 10m or 1h30m"]),
            (["--max-time", "-5m"], ["--max-time"]),
            (["--bad-images", "fix"], ["--bad-images", "invalid choice"]),
            (["--data", "no/such/place"], ["no/such/place", "no such folder or zip"]),
            (["--resume", "no/such/run"], ["no/such/run does not exist"]),
            (["--out", "/dev/null/run"], ["/dev/null/run"]),
            (["--quickly"], ["unrecognized arguments: --quickly"]),
        ],
        ids=lambda value: "=".join(value) if value and value[0].startswith("--") else "",
    )
    def test_mistakes(
        self, arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        fails(capsys, ["train", *arguments], *words)
        assert not list(tmp_path.iterdir())

    def test_no_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def train(spec: Any, console: object) -> None:
            wanted.append(spec.graph)
            raise InputError("stop")

        wanted: list[bool] = []
        monkeypatch.setattr("alexnet_kernels.training.run.train", train)
        assert [main(["train", *options]) for options in ([], ["--no-graph"])] == [2, 2]
        assert wanted == [True, False]

    def test_backend_that_is_not_there(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        report = [{"op": "dropout", "backends": {"cpu": "available", "cuda": "there is no nvcc"}}]
        monkeypatch.setattr(backends, "report", lambda: report)
        fails(
            capsys,
            ["train", "--backend", "cuda"],
            "--backend cuda is not available for dropout: there is no nvcc",
        )

    def test_durations(self) -> None:
        from alexnet_kernels.cli.arguments import duration

        assert [duration(text) for text in ("90", "90s", "10m", "1h30m", "0.5h")] == [
            90,
            90,
            600,
            5400,
            1800,
        ]


class TestMissingPackages:
    @pytest.mark.parametrize(
        ("command", "module", "name"),
        [
            (["train"], "lightning", "lightning"),
            (["train"], "torchmetrics", "torchmetrics"),
            (["train"], "matplotlib", "matplotlib"),
            (["train"], "yaml", "PyYAML"),
            (["train"], "tensorboard", "tensorboard"),
            (["evaluate", "x.ckpt"], "PIL", "Pillow"),
            (["predict", "x.ckpt", "y.png"], "rich", "rich"),
        ],
    )
    def test_names_the_package_and_the_remedy(
        self, command: list[str], module: str, name: str, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)
        fails(capsys, command, f"needs {name}; install it with: pip install 'alexnet_kernels[train]'")

    def test_info_and_help_need_none(self) -> None:
        code = (
            "import sys\n"
            "names = 'lightning torchmetrics matplotlib rich PIL safetensors yaml tensorboard'\n"
            "for name in names.split():\n"
            "    sys.modules[name] = None\n"
            "from alexnet_kernels.cli import main\n"
            "main(['info'])\n"
            "main(['train', '--help'])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--bad-images" in done.stdout


class TestEvaluate:
    def test_prints_accuracy(self, run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        best = checkpoint.load(run / "best.ckpt").history.best()
        assert main(["evaluate", str(run)]) == 0  # on the run's own data
        expected = f"top-1 {best['val_top1']:.2%}  top-5 100.00%  of 6 images, 1 crop, preset batchnorm"
        assert expected in capsys.readouterr().out
        assert main(["evaluate", str(run / "best.ckpt"), "--data", str(data), "--json", "--ten-crop"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["images"] == 6
        assert result["crops"] == 10
        assert 0 <= result["top1"] <= result["top5"] == 1

    def test_mistakes(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(capsys, ["evaluate", "no.ckpt"], "checkpoint no.ckpt does not exist")
        fails(capsys, ["evaluate", str(tmp_path)], "no checkpoint best.ckpt")
        fails(capsys, ["evaluate", str(run), "--data", str(datasets.SHIPPED)], "2 classes are not the 10")
        fails(capsys, ["evaluate", str(run), "--data", str(tmp_path)], "no val/", "empty")
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes((run / "best.ckpt").read_bytes()[:1000])
        fails(capsys, ["evaluate", str(cut)], "not a readable checkpoint")
        torch.save([1, 2], tmp_path / "list.ckpt")
        fails(capsys, ["evaluate", str(tmp_path / "list.ckpt")], "holds a list, not a state dict")


class TestPredict:
    def test_table(self, run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = [str(path) for path in sorted((data / "val").rglob("*.png"))[:2]]
        assert main(["predict", str(run), *paths]) == 0
        out = capsys.readouterr().out
        assert len(re.findall(r"\b(cat|ship) +│ +[\d.]+%", out)) == 4

    def test_json(self, run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = str(next((data / "val").rglob("*.png")))
        assert main(["predict", str(run), path, "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["image"] == path
        assert {entry["class"] for entry in row["classes"]} == {"cat", "ship"}
        assert sum(entry["probability"] for entry in row["classes"]) == pytest.approx(1, abs=1e-5)

    def test_mistakes(self, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "x.png").write_bytes(b"no image")
        fails(capsys, ["predict", str(run), str(tmp_path / "x.png")], "x.png is not a readable image")
        fails(capsys, ["predict", str(run), str(tmp_path / "y.png")], "y.png does not exist")
        fails(capsys, ["predict", str(run), str(tmp_path)], "is a folder, an image file is expected")
        fails(capsys, ["predict", str(run)], "required: image")


class TestThroughput:
    ARGUMENTS = ("--image-size", "64", "--batch-size", "4", "--seconds", "0.05s")

    def test_measures_every_part(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["throughput", "--data", str(data), "--preset", "batchnorm", *self.ARGUMENTS]) == 0
        out = capsys.readouterr().out
        assert f"12 images of {data}, held in memory; batches of 4, 64 x 64, on cpu" in out
        rates = re.findall(r"^ +([\d,]+)  (\S+)", out, flags=re.MULTILINE)
        assert [name for _, name in rates] == ["reading", "crops,", "reading", "training", "all"]
        assert all(int(rate.replace(",", "")) > 0 for rate, _ in rates)
        assert "training step of preset batchnorm" in out
        line = out.splitlines()[-1]
        assert re.fullmatch(r"reading, .* share the CPU's cores, .* add up: [\d,]+ images/s; reading \d+%, .*", line)

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["throughput", *self.ARGUMENTS, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["images"], result["batch_size"], result["workers"]) == (4000, 4, 0)
        assert min(result[name] for name in ("read", "augment", "input", "step", "together")) > 0
        assert (result["copy"], result["binds"]) == (None, "sum")
        times = sum(1 / result[name] for name in ("read", "augment", "step"))
        assert result["limit"] == pytest.approx(1 / times)

    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            (
                {"prepared": True},
                "stepping binds: 5,000 images/s; reading has 3.1 times that, copying has 4.0 times that; the images "
                "keep up",
            ),
            (
                {"read": 1000.0, "fetch": 900.0},
                "decoding binds: 1,000 images/s; copying has 20.0 times that, stepping has 5.0 times that; try "
                "`alexnet-kernels prepare`, or more --workers than 8",
            ),
            (
                {"read": 1000.0, "fetch": 200.0},
                "reading files binds: 1,000 images/s; copying has 20.0 times that, stepping has 5.0 times that; try "
                "`alexnet-kernels prepare`, or more --workers than 8",
            ),
            (
                {"read": 1000.0, "prepared": True},
                "reading binds: 1,000 images/s; copying has 20.0 times that, stepping has 5.0 times that; that is "
                "0.2 GB/s: put the set on a faster disk or in memory, or try more --workers than 8",
            ),
            (
                {"read": 1000.0, "in_memory": True},
                "reading binds: 1,000 images/s; copying has 20.0 times that, stepping has 5.0 times that; the images "
                "are held in memory, and the CPU gathers them no faster",
            ),
            (
                {"copy": 2500.0},
                "copying binds: 2,500 images/s; reading has 6.2 times that, stepping has 2.0 times that; the "
                "GPU's PCIe link, or the memory that is copied from, is slow",
            ),
        ],
    )
    def test_says_what_binds_on_a_gpu(self, changes: dict[str, Any], line: str) -> None:
        """A step of 6,000 images/s and augmentation of 30,000 make 5,000."""
        rates = {"read": 15500.0, "copy": 20000.0, "augment": 30000.0, "step": 6000.0} | changes
        binds, limit = binding(rates)
        facts = {"prepared": False, "in_memory": False, "workers": 8, "stored_size": 256, "fetch": None} | changes
        assert verdict({**rates, **facts, "binds": binds, "limit": limit}) == line

    def test_mistakes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fails(capsys, ["throughput", "--data", str(tmp_path)], "no train/", "empty")
        fails(capsys, ["throughput", "--recipe", "nice"], "there is no such recipe")
        fails(capsys, ["throughput", "--seconds", "0"], "--seconds", "is not a time")


class TestInfo:
    def test_text_is_the_same_as_a_module(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert torch.__version__ in out
        for row in backends.report():
            assert re.search(rf"^{row['op']} +(yes|no)", out, re.MULTILINE)
            for state in row["backends"].values():
                assert state == "available" or state in out
        for name in PRESETS:
            assert re.search(rf"^  {name} .* parameters", out, re.MULTILINE)
        assert "60,965,224" in out
        command = [sys.executable, "-m", "alexnet_kernels", "info"]
        # From elsewhere: the source tree would shadow the installed package.
        env = {**os.environ, "PYTHONPATH": str(Path(backends.__file__).parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=env)
        threads = r"\d+ CPU threads"
        assert re.sub(threads, "", done.stdout) == re.sub(threads, "", out)

    @pytest.mark.parametrize(
        ("built", "wgmma", "told"),
        [
            (True, True, "CUDA kernels for 8.0, 9.0a, with the wgmma convolution"),
            (True, False, "CUDA kernels for 8.0, 9.0a, without the wgmma convolution"),
            (False, False, "no CUDA kernels"),
        ],
    )
    def test_the_library_s_kernels(self, built, wgmma, told, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        status = {"loaded": True, "path": "_C.so", "isa": "avx2", "cuda_built": built, "archs": ["8.0", "9.0a"]}
        monkeypatch.setattr(_library, "status", lambda: status | {"wgmma": wgmma})
        assert main(["info"]) == 0
        assert f"\nlibrary: _C.so, avx2 on the CPU, {told}\n" in capsys.readouterr().out

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["ops"] == backends.report()
        assert set(facts["presets"]) == set(PRESETS)


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, [], "required: command")
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("alexnet-kernels ")


def test_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "alexnet_kernels", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait()
