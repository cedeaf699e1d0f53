"""Files that are whole but hold something else than they should: one line and an exit status, no traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from runs import shipped_images, train

from alexnet_kernels import cli
from alexnet_kernels.parallel.checkpoint_folder import problem_of
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.settings import settings_of

KEY = "alexnet_kernels"
TINY = settings_of("quick", epochs=1, batch_size=4, image_size=64, width=0.04, precision="32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("cat", "ship"), train=4, val=2)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(TINY, data, out=tmp_path_factory.mktemp("runs") / "run").folder


def fails_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert len(said) < 2000
    return said


HEADERS: dict[str, Any] = {
    "classes": [[], "cat", None, 3],
    "stored_size": [1.5, "64", None, -1],
    "train_images": ["many", None],
    "statistics": [None, {}, {"mean": 3}],
    "history": [[None], [3], {}, [{"val_top1": torch.zeros(1)}]],
    "layers": [[{"name": torch.zeros(2)}], 3],
    "settings": [None, {}, [1]],
    "data": [3, None],
}
STATISTICS: dict[str, Any] = {
    "mean": [(1.0,), "abc", None, 3],
    "std": [(1.0, 2.0), None],
    "components": [(), ((1.0, 2.0),) * 3, "x"],
    "mean_image": [None, torch.zeros(3, 2, 2), torch.zeros(3, 64, 64, dtype=torch.int64), [1.0]],
}
WEIGHTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "complex": lambda t: t.to(torch.complex64),
    "float64": torch.Tensor.double,
    "integers": torch.Tensor.long,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": torch.Tensor.to_sparse,
    "no tensor": lambda t: t.tolist(),
    "another shape": lambda t: t[:1],
}
UNUSED = [("lr_schedulers", ["text"]), ("callbacks", {"a": 1})]
"""Parts that a run takes nothing from."""
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "train_metrics")


def forged(run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    content = checkpoint.load(run / "last.ckpt").content
    change(content)
    torch.save(content, tmp_path / "x.ckpt")
    return str(tmp_path / "x.ckpt")


@pytest.mark.parametrize("name", [*HEADERS, *STATISTICS])
def test_header(name: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in {**HEADERS, **STATISTICS}[name]:

        def change(content: dict[str, Any], value: Any = value) -> None:
            (content[KEY] if name in HEADERS else content[KEY]["statistics"])[name] = value

        path = forged(run, tmp_path, change)
        for command in (["evaluate", path, "--data", str(data)], ["convert", path, str(tmp_path / "x.safetensors")]):
            fails_in_one_line(command, capsys)
        fails_in_one_line(["train", "--resume", path, "--data", str(data)], capsys)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict[str, Any]) -> None:
        weights = content["state_dict"]
        weights["model.classifier.3.weight"] = WEIGHTS[kind](weights["model.classifier.3.weight"])

    path = forged(run, tmp_path, change)
    fails_in_one_line(["evaluate", path, "--data", str(data)], capsys)
    fails_in_one_line(["convert", path, str(tmp_path / "x.safetensors")], capsys)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [None, 3.5, "text", ["text"], {"a": 1}], ids=str)
def test_parts_for_resuming(
    part: str, value: Any, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(content: dict[str, Any]) -> None:
        content[KEY]["settings"] = {**content[KEY]["settings"], "epochs": 2}
        content[part] = value

    path = forged(run, tmp_path, change)
    if (part, value) in UNUSED:
        assert cli.main(["train", "--resume", path, "--data", str(data)]) == 0
    else:
        fails_in_one_line(["train", "--resume", path, "--data", str(data)], capsys)


RECIPE = "epochs: 1\nbatch_size: 4\nlr: 0.1\nschedule: constant\n"
RECIPES = {
    "impossible date": "epochs: 2020-13-45\n",
    "list": RECIPE + "preset: [paper]\n",
    "map": RECIPE + "preset: {a: b}\n",
    "deep": "[" * 20000,
    "digits": "epochs: " + "9" * 5000,
    "int of a word": 'epochs: !!int "x"\n',
    "float of a word": 'epochs: !!float "x"\n',
    "bool of a word": "epochs: !!bool maybe\n",
    "timestamp of a word": 'epochs: !!timestamp "x"\n',
    "rate of 400 digits": RECIPE.replace("0.1", "9" * 400),
    "batch of 30 digits": RECIPE.replace("batch_size: 4", "batch_size: 1" + "0" * 30),
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + RECIPE
    + "preset: *i\n",
}


@pytest.mark.parametrize("kind", RECIPES)
def test_recipes(kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text(RECIPES[kind])
    out = tmp_path / "run"
    fails_in_one_line(["train", "--recipe", str(tmp_path / "x.yaml"), "--data", str(data), "--out", str(out)], capsys)
    assert not out.exists()


def test_deep_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = tmp_path / "x.json"
    deep.write_text("[" * 100000)
    fails_in_one_line(["bench", "--compare", str(deep), str(deep)], capsys)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(b"")
    (tmp_path / "folder" / "checksums.json").write_text(deep.read_text())
    assert "is damaged" in problem_of(tmp_path / "folder")


def test_an_index_that_asks_for_gigabytes(tmp_path: Path) -> None:
    """Nine bytes, by which the unpickler in C allocates 2^28 places."""
    import resource

    (tmp_path / ".metadata").write_bytes(b"\x80\x02Nr" + struct.pack("<I", 0x0FFFFFFF) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "no index of a checkpoint" in problem_of(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_checksums_of_other_files(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    for listed in ({}, {".metadata": 1, "gone": 2}):
        (tmp_path / "checksums.json").write_text(json.dumps(listed))
        assert problem_of(tmp_path).endswith("checksums.json is of other files")
