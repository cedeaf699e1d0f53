"""Runs of several seeds: the same bits as single runs, resuming, several processes, and mean and spread."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from runs import assert_same, figures, shipped_images, train

from alexnet_kernels._errors import InputError
from alexnet_kernels.cli import main, seeds
from alexnet_kernels.training import module
from alexnet_kernels.training.header import History
from alexnet_kernels.training.run_folder import lock
from alexnet_kernels.training.seeds import SeedRuns, epoch_rows, summary_rows
from alexnet_kernels.training.settings import save_recipe, settings_of

TINY = settings_of("quick", epochs=2, batch_size=8, image_size=64, width=0.04, precision="32")
SMALL = [
    *("--recipe", "quick", "--epochs", "2", "--batch-size", "8", "--image-size", "64", "--width", "0.04"),
    *("--precision", "32"),
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(seeds.__file__).parents[2]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("airplane", "ship"), train=12, val=4)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_each_seed_is_a_run_of_its_own(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "all"
    assert main(["train", "--data", str(data), "--seeds", "2", "--seed", "5", "--out", str(folder), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 seeds" in out
    assert f"{folder}/summary.csv" in out
    for seed in (5, 6):
        alone = train(settings_of("quick", **{**TINY.to_dict(), "seed": seed}), data, out=tmp_path / str(seed)).folder
        assert_same(alone / "last.ckpt", folder / f"seed-{seed}" / "last.ckpt")

    rows = rows_of(folder / "seeds.csv")
    best = [max(figures(folder / f"seed-{seed}" / "last.ckpt"), key=lambda row: row["val_top1"]) for seed in (5, 6)]
    assert [float(row["val_top1"]) for row in rows] == [row["val_top1"] for row in best]
    summary = {(row["epoch"], row["figure"]): row for row in rows_of(folder / "summary.csv")}
    losses = [row["val_loss"] for row in best]
    assert float(summary["best", "val_loss"]["mean"]) == pytest.approx(statistics.fmean(losses))
    assert float(summary["best", "val_loss"]["std"]) == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert len(rows_of(folder / "epochs.csv")) == 2
    assert (folder / "curves.png").stat().st_size > 0

    assert main(["evaluate", str(folder)]) == 2
    assert "there is no checkpoint best.ckpt in" in (err := capsys.readouterr().err)
    assert "seed-5, seed-6 in it have one" in err

    # Finished runs stay as they are; more seeds are added to them.
    before = (folder / "seed-5" / "last.ckpt").stat().st_mtime_ns
    assert main(["train", "--resume", str(folder), "--seeds", "3"]) == 0
    assert "3 of 3 seeds" in capsys.readouterr().out
    assert (folder / "seed-5" / "last.ckpt").stat().st_mtime_ns == before
    assert (folder / "seed-7" / "best.ckpt").is_file()


def test_stopped_and_resumed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "all"
    assert (
        main(["train", "--data", str(data), "--seeds", "2", "--max-time", "0.000001s", "--out", str(folder), *SMALL])
        == 0
    )
    assert f"out of time; resume with: alexnet-kernels train --resume {folder}" in capsys.readouterr().out
    assert not (folder / "seed-1").exists()
    assert not (folder / "summary.csv").exists()
    # As a run leaves it that is killed before its first checkpoint.
    (folder / "seed-1").mkdir()
    (folder / "seed-1" / "recipe.yaml").write_text("")
    assert main(["train", "--resume", str(folder)]) == 0
    alone = train(TINY, data, out=tmp_path / "alone").folder
    assert_same(alone / "last.ckpt", folder / "seed-0" / "last.ckpt")
    assert (folder / "seed-1" / "best.ckpt").is_file()


def test_a_seed_that_fails_leaves_the_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = module.Classifier.check_finite

    def fails(self: module.Classifier) -> None:
        if self.header.settings.seed == 0:
            raise self._diverged()
        check(self)

    monkeypatch.setattr(module.Classifier, "check_finite", fails)
    folder = tmp_path / "all"
    assert main(["train", "--data", str(data), "--seeds", "2", "--out", str(folder), *SMALL]) == 1
    out, err = capsys.readouterr()
    assert "seed 0 failed: " in out
    assert "1 of 2 seeds" in out
    assert err.endswith(f"1 of 2 seeds have not finished; resume with: alexnet-kernels train --resume {folder}\n")


def test_side_by_side(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes, as on two GPUs: interrupted and resumed."""
    monkeypatch.setattr(seeds, "devices_of", lambda name: ["cpu", "cpu"])
    folder = tmp_path / "all"

    def interrupt() -> None:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not (folder / "seed-0" / "last.ckpt").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    long = ["--data", str(data), "--seeds", "3", "--out", str(folder), *SMALL, "--epochs", "30", "--max-time", "2h"]
    assert main(["train", *long]) == 130
    thread.join()
    out = capsys.readouterr().out
    assert "seed 0: AlexNet, preset batchnorm" in out
    assert f"interrupted; resume with: alexnet-kernels train --resume {folder}" in out
    assert not (folder / "seed-2").exists()
    assert main(["train", "--resume", str(folder), "--log-every", "0"]) == 0
    out = capsys.readouterr().out
    assert "seed 1: AlexNet, preset batchnorm" in out
    assert "3 of 3 seeds" in out
    assert all(len(figures(folder / f"seed-{seed}" / "last.ckpt")) == 30 for seed in range(3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "0"], "at least 1 expected"),
        (["--seeds", "1001"], "--seeds must be from 1 to 1000, got 1001"),
        (["--seeds", "2", "--seed", "2147483647"], "--seed must be from 0 to 2^31 - 1"),
        (["--seeds", "2", "--image-size", "20"], "--image-size 20 is too small"),
        (["--seeds", "2", "--parallel", "towers"], "--seeds can't be used with --parallel"),
        (["--seeds", "2", "--out", "old"], "--out old exists"),
        (["--seeds", "2", "--resume", "old"], "old is not a folder of several seeds"),
        (["--resume", "all", "--seeds", "1"], "--seeds 1: all has 2; from there to 1000 are allowed"),
        (["--resume", "all", "--lr", "0.5"], "--lr 0.5 can't be used with --resume: all was begun with"),
        (["--resume", "all", "--seeds", "3", "--lr", "0.5"], "--lr 0.5 can't be used with --resume"),
        (["--resume", "all", "--precision", "bf16"], "--precision bf16 can't be used with --resume: all was begun"),
        (["--resume", "all", "--out", "x"], "--out can't be used with --resume"),
        (["--resume", "damaged"], "seeds.json is damaged"),
        (["--resume", "empty"], "recipe.yaml is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    index = json.dumps({"format": 1, "seeds": [0, 1], "data": None, "reading": {}})
    for name, text in (("old", None), ("all", index), ("damaged", "{"), ("empty", index)):
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "seeds.json").write_text(text)
    save_recipe(TINY, tmp_path / "all" / "recipe.yaml")
    before = sorted(tmp_path.rglob("*"))
    try:
        status: object = main(["train", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != "runs"] == before
    assert (tmp_path / "all" / "seeds.json").read_text() == index


def test_what_is_left_of_a_seed(tmp_path: Path) -> None:
    """The folder of a run without last.ckpt is begun again unless a process is at work in it, or best.ckpt is there."""
    runs = SeedRuns.create(TINY, 2, None, tmp_path / "all", {})
    left = runs.folder_of(0)
    left.mkdir()
    (left / "recipe.yaml").touch()
    with lock(left), pytest.raises(InputError, match="another process is training the run in"):
        runs.spec(0, {})
    assert (left / "recipe.yaml").is_file()
    runs.spec(0, {})
    assert not left.exists()
    left.mkdir()
    (left / "best.ckpt").touch()
    with pytest.raises(InputError, match=r"seed-0 has no last\.ckpt to resume from: remove it"):
        runs.spec(0, {})


def test_mean_and_spread() -> None:
    rows = {
        s: History([{"epoch": 1, "val_top1": 0.5 + 0.1 * s, "x": float(s)}, {"epoch": 2, "val_top1": 0.4, "x": 0.0}])
        for s in (0, 1, 3)
    }
    best = {row["figure"]: row for row in summary_rows(rows) if row["epoch"] == "best"}
    last = {row["figure"]: row for row in summary_rows(rows) if row["epoch"] == "last"}
    assert (best["x"]["mean"], best["x"]["min"], best["x"]["max"], best["x"]["runs"]) == (pytest.approx(4 / 3), 0, 3, 3)
    assert best["x"]["std"] == pytest.approx((7 / 3) ** 0.5)  # deviations -4/3, -1/3, 5/3; their squares' sum 42/9
    assert last["val_top1"]["std"] == 0
    epochs = epoch_rows({**rows, 4: History(rows[0].epochs[:1])})
    assert [row["runs"] for row in epochs] == [4, 3]
    assert epochs[0]["x_mean"] == 1.0
    assert summary_rows({0: rows[0]})[0]["std"] != summary_rows({0: rows[0]})[0]["std"]  # nan: one seed has no spread
