"""Files that hold code instead of data: no function and no command that takes a path executes it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

pytest.importorskip("lightning")

from runs import shipped_images

from alexnet_kernels import AlexNet, alexnet, cli, parallel
from alexnet_kernels.bench import report
from alexnet_kernels.gpu_check.__main__ import main as gpu_check
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import checkpoint, datasets, decoding
from alexnet_kernels.training.prepare import prepare
from alexnet_kernels.training.settings import settings_of
from alexnet_kernels.training.spec import resumed_run

MADE = "made-by-the-file"

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*torch.distributed is")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (MADE,)


def of(write: Callable[[io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


OBJECTS = np.array([Evil(), None], dtype=object)
CONTENTS = {
    "pickle 2": pickle.dumps(Evil(), 2),
    "pickle 5": pickle.dumps({"state_dict": Evil()}, 5),
    "torch.save": of(lambda file: torch.save({"alexnet_kernels": Evil()}, file)),
    "torch.save, old": of(lambda file: torch.save([Evil()], file, _use_new_zipfile_serialization=False)),
    "npy": of(lambda file: np.save(file, OBJECTS, allow_pickle=True)),
    "npz": of(lambda file: np.savez(file, kept=OBJECTS, places=OBJECTS, count=OBJECTS)),
    "yaml": f"epochs: !!python/object/apply:os.mkdir [{MADE}]\n".encode(),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set, another that was interrupted, and a folder of parallel.save."""
    folder = tmp_path_factory.mktemp("written")
    images = shipped_images(folder / "images", ("cat", "ship"), train=2, val=1)
    prepare(images, folder / "prepared", size=8)
    prepare(images, folder / "begun", size=8)
    (folder / "begun" / "index.json").unlink()
    torch.manual_seed(0)
    model, optimizer = network()
    model(torch.randn(1, 3, 224, 224)).sum().backward()
    optimizer.step()
    parallel.save(model, optimizer, folder / "split")
    return folder


def network() -> tuple[AlexNet, SGD]:
    model = AlexNet(num_classes=2, width=0.04)
    return model, SGD(model.parameters())


@pytest.fixture(params=list(CONTENTS))
def content(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """A hostile file's content. Nothing of it may have been executed after the test."""
    monkeypatch.chdir(tmp_path)
    yield CONTENTS[request.param]
    assert not Path(MADE).exists()


def refuses(call: Callable[[], Any]) -> None:
    with pytest.raises((Exception, SystemExit)):
        call()
    assert not Path(MADE).exists()


def test_the_contents_are_hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loads: dict[str, Callable[[bytes], Any]] = {
        "pickle 2": pickle.loads,
        "pickle 5": pickle.loads,
        "torch.save": lambda found: torch.load(io.BytesIO(found), weights_only=False),
        "torch.save, old": lambda found: torch.load(io.BytesIO(found), weights_only=False),
        "npy": lambda found: np.load(io.BytesIO(found), allow_pickle=True),
        "npz": lambda found: np.load(io.BytesIO(found), allow_pickle=True)["places"],
    }
    for name, load in loads.items():
        load(CONTENTS[name])
        os.rmdir(MADE)


def test_weights(content: bytes) -> None:
    for suffix in (".pt", ".pth", ".safetensors", ".npz"):
        Path(f"weights{suffix}").write_bytes(content)
        refuses(lambda suffix=suffix: alexnet(weights=f"weights{suffix}"))


def test_checkpoints_and_recipes(content: bytes) -> None:
    Path("run").mkdir()
    for name in ("run/best.ckpt", "run/last.ckpt", "x.ckpt", "x.safetensors", "x.yaml"):
        Path(name).write_bytes(content)
    for name in ("run", "x.ckpt", "x.safetensors"):
        refuses(lambda name=name: checkpoint.load_network(name))
        refuses(lambda name=name: checkpoint.load(name))
        refuses(lambda name=name: resumed_run(name))
    refuses(lambda: settings_of("x.yaml"))


def test_distributed_checkpoints(content: bytes, written: Path) -> None:
    shutil.copytree(written / "split", "split")
    model, optimizer = network()
    parallel.load(model, optimizer, "split")
    Path("split/checksums.json").unlink(missing_ok=True)  # as folders of earlier versions, or made by someone else
    index, shard = Path("split/.metadata"), Path("split/__0_0.distcp")
    whole, values = index.read_bytes(), shard.read_bytes()
    index.write_bytes(content)
    refuses(lambda: parallel.load(model, optimizer, "split"))
    for key in ("model.features.0.weight", "optimizer.param_groups.0.lr"):
        metadata = pickle.loads(whole)
        (place,) = (place for index, place in metadata.storage_data.items() if index.fqn == key)
        place.offset, place.length = len(values), len(content)
        index.write_bytes(pickle.dumps(metadata))
        shard.write_bytes(values + content)
        refuses(lambda: parallel.load(model, optimizer, "split"))
    index.write_bytes(whole)
    parallel.load(model, optimizer, "split")


def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, written: Path) -> None:
    shutil.copytree(written / "split", tmp_path / "split")
    (tmp_path / "split" / "checksums.json").unlink(missing_ok=True)
    index = tmp_path / "split" / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    index.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"it names a file outside the folder, '\.\./elsewhere'"):
        parallel.load(*network(), tmp_path / "split")


def test_folders_of_torch_are_read(tmp_path: Path) -> None:
    """As torch.distributed.checkpoint writes them, without checksums."""
    model, optimizer = network()
    state = dict(zip(("model", "optimizer"), dcp.state_dict.get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=tmp_path / "plain")
    other, _ = network()
    parallel.load(other, None, tmp_path / "plain")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_image_sets(content: bytes, written: Path) -> None:
    Path("x.zip").write_bytes(content)
    for split in ("train", "val"):
        for name in ("a", "b"):
            Path("tree", split, name).mkdir(parents=True)
            Path("tree", split, name, "x.png").write_bytes(content)
    for path in ("x.zip", "tree"):
        refuses(lambda path=path: datasets.open_data(path, 8))
        refuses(lambda path=path: prepare(path, "new", size=8))
    refuses(lambda: decoding.decode(io.BytesIO(content), 8))
    for file in (written / "prepared").rglob("*"):
        if file.is_file() and file.name not in ("plan.json", "report.csv"):
            shutil.rmtree("prepared", ignore_errors=True)
            shutil.copytree(written / "prepared", "prepared")
            Path("prepared", file.relative_to(written / "prepared")).write_bytes(content)
            refuses(lambda: datasets.open_data("prepared", 8))
    for name in ("plan.json", "train/record-00000.npz"):
        shutil.rmtree("begun", ignore_errors=True)
        shutil.copytree(written / "begun", "begun")
        Path("begun", name).write_bytes(content)
        refuses(lambda: prepare(written / "images", "begun", size=8))


def test_reports(content: bytes) -> None:
    Path("x.json").write_bytes(content)
    refuses(lambda: report.load(Path("x.json")))
    Path("found").mkdir()
    for name in ("findings.jsonl", "report.json", "report.md"):
        Path("found", name).write_bytes(content)
    with contextlib.suppress(SystemExit):
        gpu_check(["--report", "--out", "found", "--device", "cpu"])


COMMANDS = [
    line.split()
    for line in (
        "train --data x.zip",
        "train --data tree",
        "train --recipe x.yaml",
        "train --out run",
        "train --resume run",
        "train --resume x.ckpt",
        "train --resume x.ckpt --parallel data",
        "evaluate x.ckpt",
        "evaluate x.safetensors",
        "evaluate run --data x.zip --confusion x.csv",
        "predict x.ckpt x.png",
        "predict x.safetensors x.png --picture new.png",
        "extract x.ckpt --layers fc8 --out new",
        "extract run --data x.zip --layers fc8 --out new",
        "convert x.ckpt new.safetensors",
        "convert run x.safetensors",
        "prepare x.zip new",
        "prepare tree new --bad-images refuse --workers 1",
        "prepare tree new --val-labels x.csv",
        "train --data tree --val-labels numbers.txt --synsets x.csv",
        "train --data tree --val-labels numbers.txt --synsets x.mat",
        "throughput --data x.zip",
        "throughput --recipe x.yaml",
        "bench --compare x.json x.json",
    )
]
NO_PATHS = {"device", "layers", "only", "op", "part", "split", "splits", "what"}
"""Texts that name no file."""
WRITTEN = {"bench --out"}
"""Files that are written and never read."""


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("run").mkdir()
    Path("numbers.txt").write_text("1\n2\n")
    for content in CONTENTS.values():
        for name in (
            "x.zip",
            "x.yaml",
            "x.ckpt",
            "x.safetensors",
            "x.png",
            "x.csv",
            "x.json",
            "x.mat",
            "run/best.ckpt",
            "run/last.ckpt",
        ):
            Path(name).write_bytes(content)
        for name in ("train/a", "train/b", "val/a", "val/b"):
            Path("tree", name).mkdir(parents=True, exist_ok=True)
            Path("tree", name, "x.png").write_bytes(content)
        shutil.rmtree("new", ignore_errors=True)
        assert cli.main(arguments) != 0
        assert not Path(MADE).exists()


def test_every_option_that_takes_a_path_is_among_the_commands() -> None:
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    missing = []
    for name, parser in commands.choices.items():
        tried = [arguments for arguments in COMMANDS if arguments[0] == name]
        for action in parser._actions:
            option = (action.option_strings or [""])[-1]
            text = action.type in (None, Path) and action.choices is None and action.nargs != 0
            if not text or action.dest in NO_PATHS or f"{name} {option}" in WRITTEN:
                continue
            if not any(not option or option in arguments for arguments in tried):
                missing.append(f"{name} {action.dest}")
    assert missing == []
