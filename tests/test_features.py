"""Activations of layers: equal to those of forward hooks, in memory and in files; interrupted and refused runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alexnet_kernels import AlexNet, features, unfuse
from alexnet_kernels._errors import InputError
from alexnet_kernels.models import PRESETS
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.checkpoint import Network
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.settings import settings_of

pytest.importorskip("PIL", reason="of the extra `train`")
pytest.importorskip("lightning", reason="of the extra `train`")

from PIL import Image
from runs import environment

from alexnet_kernels.cli import main
from alexnet_kernels.features import run, store
from alexnet_kernels.features.images import open_images

SIZE = 64


def network(preset: str = "batchnorm", precision: str = "32", classes: int = 3) -> Network:
    torch.manual_seed(0)
    settings = settings_of(preset, image_size=SIZE, width=0.1, precision=precision, mean="channel")
    stored = stored_size(SIZE)
    statistics = Statistics.of(torch.randint(256, (4, stored, stored, 3), dtype=torch.uint8))
    header = Header(settings, [f"class {i}" for i in range(classes)], statistics, "", 4, "none", stored)
    model = header.model().requires_grad_(False).eval()
    return Network(model.to(memory_format=torch.channels_last), header)


def hooked(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every layer's output by module name, by hooks on an unfused copy."""
    plain = AlexNet(preset=model._spec, width=0.1, num_classes=model.classifier[-1].out_features).eval()
    plain.load_state_dict(model.state_dict())
    found: dict[str, torch.Tensor] = {}
    for name, module in unfuse(plain).named_modules():
        if name and not isinstance(module, nn.Sequential):
            module.register_forward_hook(lambda m, i, y, name=name: found.__setitem__(name, y.clone()))
    with torch.no_grad():
        plain(x)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """7 images in val/a and 5 in val/b."""
    root = tmp_path / "tree"
    for name, count in (("a", 7), ("b", 5)):
        (root / "val" / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(ord(name) * 100 + i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_layer_is_what_a_hook_sees(preset: str) -> None:
    torch.manual_seed(0)
    model = AlexNet(preset=preset, width=0.1, num_classes=5)
    x = torch.randn(3, 3, 96, 96)
    expected = hooked(model, x)
    layers = features.layers_of(model)
    assert model.training
    together = features.extract(model, x, [layer.name for layer in layers], batch_size=2)
    assert model.training
    for layer in layers:
        torch.testing.assert_close(together[layer.name], expected[layer.module], rtol=1e-3, atol=1e-5)
    # One at a time, with as much as can be fused before it.
    for layer in layers[::3]:
        alone = features.extract(model, x, [layer.module])[layer.module]
        torch.testing.assert_close(alone, expected[layer.module], rtol=1e-3, atol=1e-5)
    pooled = features.extract(model, x, ["conv5", "fc6", "relu6"], pool="mean")
    torch.testing.assert_close(pooled["relu6"], together["relu6"])
    torch.testing.assert_close(pooled["conv5"], together["conv5"].mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled["fc6"], together["fc6"])
    most = features.extract(model, x, ["conv5"], pool="max", dtype=torch.float16)["conv5"]
    torch.testing.assert_close(most, together["conv5"].amax((2, 3)).half(), rtol=1e-2, atol=1e-3)


def test_names() -> None:
    def names(preset: str) -> list[str]:
        return [layer.name for layer in features.layers_of(AlexNet(preset=preset, width=0.1, device="meta"))]

    assert names("torchvision")[:4] == ["conv1", "relu1", "pool1", "conv2"]
    assert names("torchvision")[-8:] == ["avgpool", "drop5", "fc6", "relu6", "drop6", "fc7", "relu7", "fc8"]
    assert names("as_run")[1:6] == ["conv1", "norm1", "pool1", "relu1", "conv2"]
    assert "map_norm2" in names("as_run")
    assert names("paper")[-4:] == ["fc7", "relu7", "drop7", "fc8"]


def test_the_pass_ends_at_the_last_wanted_layer() -> None:
    model = AlexNet(preset="torchvision", width=0.1)
    called: list[str] = []
    for name in ("classifier.1", "features.10"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    features.extract(model, torch.randn(1, 3, 64, 64), ["pool5", "relu1"])
    assert called == ["features.10"]


def test_bad_arguments() -> None:
    model, x = AlexNet(preset="caffe", width=0.1), torch.randn(1, 3, 67, 67)
    for layers, message in (
        (["conv9"], "there is no layer conv9; there are conv1, relu1, norm1, pool1"),
        (["conv1", "features.0"], "conv1 and features.0 are one layer"),
        ("conv1", "a list of layers is expected"),
        ([], "a list of layers is expected"),
    ):
        with pytest.raises(InputError, match=message):
            features.extract(model, x, layers)
    with pytest.raises(InputError, match="pool must be one of none, mean, max"):
        features.extract(model, x, ["conv1"], pool="min")
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        features.extract(model, x, ["conv1"], batch_size=0)
    with pytest.raises(InputError, match="need a Network"):
        features.extract(model, torch.zeros(1, 64, 64, 3, dtype=torch.uint8), ["conv1"])
    with pytest.raises(InputError, match="no AlexNet"):
        features.extract(nn.Linear(2, 2), x, ["conv1"])

    class Mine(AlexNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / 2)

    with pytest.raises(InputError, match="Mine has a forward pass of its own"):
        features.extract(Mine(preset="caffe", width=0.1), x, ["conv1"])


def test_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = models.alexnet(num_classes=3), torch.randn(1, 3, 64, 64)
    found = features.extract(model, x, ["conv1", "features.1", "fc8"])
    with torch.no_grad():
        torch.testing.assert_close(found["conv1"], model.features[0](x))
        torch.testing.assert_close(found["features.1"], found["conv1"].relu())
        torch.testing.assert_close(found["fc8"], model.eval()(x))


@pytest.mark.parametrize("preset", ["paper", "torchvision"])
@pytest.mark.parametrize("mean", ["image", "channel"])
def test_a_network_knows_what_its_images_are_made_of(preset: str, mean: str) -> None:
    net = network(preset)
    header = replace(net.header, settings=replace(net.header.settings, mean=mean))
    model = header.model()
    assert model.classes == ("class 0", "class 1", "class 2")
    pixels = torch.randint(256, (2, header.stored_size, header.stored_size, 3), dtype=torch.uint8)
    expected = model.preprocessing
    assert expected is not None
    average = expected.mean if mean == "image" else expected.mean[:, None, None]
    x = pixels.permute(0, 3, 1, 2).float() - average
    x = x if expected.std is None else x / expected.std[:, None, None]
    at = (header.stored_size - SIZE) // 2
    torch.testing.assert_close(header.crops().centre(pixels), x[:, :, at : at + SIZE, at : at + SIZE])


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_files_hold_what_memory_gives(format: str, tree: Path, tmp_path: Path) -> None:
    net, layers = network("torchvision", "bf16"), ["relu6", "conv1", "features.10"]
    if format == "safetensors":
        pytest.importorskip("safetensors")
    found = features.extract_to(tmp_path / "out", net, tree, layers=layers, format=format, batch_size=5)
    images = open_images(tree, "val", net.header.stored_size)[0]
    expected = features.extract(net, images.__getitems__(range(12))["images"], layers, batch_size=5)
    assert found.layers == layers
    assert len(found) == 12
    for name in layers:
        np.testing.assert_array_equal(np.asarray(found[name]), expected[name].numpy())
        np.testing.assert_array_equal(found[name][3], expected[name][3])
        np.testing.assert_array_equal(found[name][[8, 2]], expected[name][[8, 2]])
    assert found.names == [f"val/a/{i}.png" for i in range(7)] + [f"val/b/{i}.png" for i in range(5)]
    assert found.labels.tolist() == [0] * 7 + [1] * 5
    assert found.classes == ["a", "b"]
    row = (tmp_path / "out" / "names.csv").read_text().splitlines()[8]
    assert row.startswith("7,val/b/0.png,1,b,")
    assert found.index["precision"] == "bf16"
    assert found.index["layers"][0]["shape"] == list(expected["relu6"].shape)
    assert "progress.json" not in contents(tmp_path / "out")


def test_a_folder_without_classes_and_a_list(tree: Path, tmp_path: Path) -> None:
    net = network()
    flat = tree / "val" / "a"
    (flat / "notes.md").write_text("no image")
    found = features.extract_to(tmp_path / "flat", net, flat, layers=["fc8"])
    assert found.names == [f"{i}.png" for i in range(7)]
    assert found.labels.tolist() == [-1] * 7
    assert found.index["ignored"] == 1
    classes = features.extract_to(tmp_path / "classes", net, tree / "val", layers=["fc8"])
    assert classes.classes == ["a", "b"]
    assert classes.labels.tolist() == [0] * 7 + [1] * 5
    (tree / "list.txt").write_text(f"val/b/3.png\n{flat}/2.png\r\n\nval/a/1.png\n")
    listed = features.extract_to(tmp_path / "listed", net, tree / "list.txt", layers=["fc8"])
    assert listed.names == ["val/b/3.png", f"{flat}/2.png", "val/a/1.png"]
    np.testing.assert_allclose(np.asarray(listed["fc8"]), classes["fc8"][[10, 2, 1]], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="is a list of files, which has no splits"):
        features.extract_to(tmp_path / "new", net, tree / "list.txt", layers=["fc8"], split="val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there are no images in it"):
        features.extract_to(tmp_path / "new", net, tmp_path / "empty", layers=["fc8"])
    assert not (tmp_path / "new").exists()


PROGRAM = """
import os, signal, sys
from test_features import killed_at
killed_at(3, lambda: os.kill(os.getpid(), signal.SIGKILL), sys.argv[1], sys.argv[2])
"""


def killed_at(batch: int, kill: Any, out: str | Path, data: str | Path, **options: Any) -> features.Features:
    """A run in one thread that calls `kill` after that many batches of two images."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == batch:
            kill()

    options = {
        "layers": ["conv1", "fc6"],
        "batch_size": 2,
        "bad_images": "skip",
        "workers": 0,
        "save_every": 0,
        **options,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run.extract_to(out, network(), data, progress=progress, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    (tree / "val" / "a" / "1.png").write_bytes(b"damaged")
    path = os.pathsep.join((environment()["PYTHONPATH"], str(Path(__file__).parent)))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), str(tree)]
    done = subprocess.run(command, env={**environment(), "PYTHONPATH": path}, cwd=tmp_path, timeout=300)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match="was not finished"):
        features.load(tmp_path / "killed")
    state = json.loads((tmp_path / "killed" / "progress.json").read_text())["state"]
    assert (state["images"], state["rows"]) == (4, 3)
    found = killed_at(-1, None, tmp_path / "killed", tree)
    killed_at(-1, None, tmp_path / "whole", tree)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert found["fc6"].shape[0] == len(found) == 11
    assert len(found.index["skipped"]) == 1
    assert "val/a/1.png" in found.index["skipped"][0]
    assert "val/a/1.png" not in found.names


def test_shards_of_a_killed_run_end_in_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    monkeypatch.setattr(store, "_SHARD", 20_000)
    with pytest.raises(Killed):
        killed_at(4, kill, tmp_path / "killed", tree, format="safetensors")
    found = killed_at(-1, None, tmp_path / "killed", tree, format="safetensors")
    killed_at(-1, None, tmp_path / "whole", tree, format="safetensors", save_every=1e9)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert found.index["shards"] > 1
    plain = killed_at(-1, None, tmp_path / "npy", tree)
    np.testing.assert_array_equal(np.asarray(found["conv1"]), plain["conv1"])


def test_an_interrupted_run_keeps_whole_batches(tree: Path, tmp_path: Path) -> None:
    net, options = network(), {"layers": ["conv2", "fc7"], "batch_size": 5}

    def interrupt(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.extract_to(tmp_path / "out", net, tree, progress=interrupt, **options)
    calls: list[int] = []
    features.extract_to(tmp_path / "out", net, tree, progress=lambda done, total: calls.append(done), **options)
    assert calls == [12]
    features.extract_to(tmp_path / "whole", net, tree, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_of_something_else_is_refused(tree: Path, tmp_path: Path) -> None:
    net, out = network(), tmp_path / "out"
    options: dict[str, Any] = {"layers": ["fc6"], "batch_size": 5}
    features.extract_to(out, net, tree, **options)
    before = contents(out)
    features.extract_to(out, net, tree, **options)  # nothing is left to do
    changed = network()
    changed.model.features[0].bias[0] += 1
    moved = tmp_path / "moved"
    tree.rename(moved)
    features.extract_to(out, net, moved, **options)
    (moved / "val" / "b" / "9.png").write_bytes((moved / "val" / "b" / "0.png").read_bytes())
    for given, message in (
        ({"data": moved}, "holds features of other images"),
        ({"data": moved / "val" / "a"}, "holds features of other images"),
    ):
        with pytest.raises(InputError, match=message):
            features.extract_to(out, net, **{**options, **given})
    (moved / "val" / "b" / "9.png").unlink()
    for given, message in (
        ({"network": changed}, "holds features of another checkpoint"),
        ({"layers": ["fc7"]}, "holds features of layers fc6"),
        ({"dtype": "float16"}, "holds features of layers fc6 in another form"),
        ({"pool": "max"}, "holds features of pool none, not max"),
        ({"format": "safetensors"}, "holds features of format npy, not safetensors"),
        ({"batch_size": 6}, "holds features of batch-size 5, not 6"),
    ):
        with pytest.raises(InputError, match=message):
            features.extract_to(**{"out": out, "network": net, "data": moved, **options, **given})
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no features that this command began"):
        features.extract_to(tmp_path / "mine", net, moved, **options)
    (out / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index.json is damaged"):
        features.extract_to(out, net, moved, **options)
    with pytest.raises(InputError, match=r"index.json is damaged"):
        features.load(out)


@pytest.mark.parametrize(
    "forged",
    [
        [],
        {"version": 9},
        {"images": "x"},
        {"images": 13},
        {"format": "pickle"},
        {"shards": -1},
        {"layers": [1]},
        {"layers": [{"name": "../fc6", "dtype": "float32", "shape": [12, 8]}]},
        {"layers": [{"name": "fc6", "dtype": "object", "shape": [12, 8]}]},
        {"layers": [{"name": "fc6", "dtype": "float32", "shape": [12, 9]}]},
        {"layers": [{"name": "fc7", "dtype": "float32", "shape": [12, 8]}]},
        {"data": {"classes": [1]}},
    ],
)
def test_a_forged_index_is_refused(forged: Any, tmp_path: Path) -> None:
    index = {
        "version": 1, "format": "npy", "images": 12, "shards": 0, "data": {"classes": []},
        "layers": [{"name": "fc6", "dtype": "float32", "shape": [12, 8]}],
    }  # fmt: skip
    np.save(tmp_path / "fc6.npy", np.zeros((12, 8), np.float32))
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert features.load(tmp_path)["fc6"].shape == (12, 8)
    (tmp_path / "index.json").write_text(json.dumps({**index, **forged} if isinstance(forged, dict) else forged))
    with pytest.raises(InputError) as found:
        np.asarray(features.load(tmp_path)[json.loads((tmp_path / "index.json").read_text())["layers"][0]["name"]])
    assert "\n" not in str(found.value)


def test_unreadable_images_are_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "val" / "b" / "3.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"1 image can't be read: val/b/3.png.*--bad-images skip"):
        features.extract_to(tmp_path / "out", network(), tree, layers=["fc6"], batch_size=5)
    with pytest.raises(InputError, match="holds features of bad-images refuse, not skip"):
        features.extract_to(tmp_path / "out", network(), tree, layers=["fc6"], batch_size=5, bad_images="skip")


def test_space_is_checked_before(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(InputError, match=r"out needs [\d,]+ bytes, .* has 100 left"):
        features.extract_to(tmp_path / "out", network(), tree, layers=["fc6"])
    assert not (tmp_path / "out").exists()


def test_what_float16_can_not_hold_is_said_once(tree: Path, tmp_path: Path) -> None:
    net = network()
    net.model.classifier[-1].bias[0] = 1e6
    net.model.classifier[-1].bias[1] = float("nan")
    said: list[str] = []
    found = features.extract_to(
        tmp_path / "out", net, tree, layers=["fc8", "fc7"], dtype="float16", batch_size=4, notify=said.append
    )
    assert said == [
        "among the first 4 images 4 values of fc8 are above what float16 holds, and infinite; 4 values of fc8 are NaN"
    ]
    assert [(row["overflowed"], row["nan"]) for row in found.index["layers"]] == [(12, 12), (0, 0)]
    assert found["fc8"].dtype == np.float16
    assert np.isinf(found["fc8"][:, 0]).all()


def test_memory_does_not_grow_with_the_set(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a batch is computed or held at a time, and nothing is decoded ahead of it."""
    sizes: list[int] = []
    forward = run.stages_of

    def watched(*arguments: Any) -> Any:
        stages = forward(*arguments)
        return lambda x: sizes.append(len(x)) or stages(x)

    monkeypatch.setattr(run, "stages_of", watched)
    features.extract_to(tmp_path / "out", network(), tree, layers=["conv1"], batch_size=3, workers=0)
    assert sizes == [1, 3, 3, 3, 3]
    assert open_images(tree, None, 73)[0].pixels is None


@pytest.mark.slow
def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("rich")
    ckpt = tmp_path / "net.safetensors"
    checkpoint.export(network(), ckpt)
    command = ["extract", str(ckpt), "--device", "cpu", "--data", str(tree)]
    assert main([*command, "--list"]) == 0
    assert "batch_norm2  features.5" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "out"), "--layers", "relu1", "fc6", "--workers", "2", "--batch-size", "2"]
    assert main([*command, *out, "--pool", "mean"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"relu1 \(features.2\): 12 x \d+, float32\n", printed)
    assert "12 images of val" in printed
    assert features.load(tmp_path / "out")["relu1"].ndim == 2
    assert main([*command, *out]) == 2
    assert "holds features of pool mean, not none: name another" in capsys.readouterr().err
    assert main(command) == 2
    assert "extract needs --layers and --out" in capsys.readouterr().err


def test_importing_features_needs_no_optional_package(tmp_path: Path) -> None:
    names = ("lightning", "PIL", "torchmetrics", "safetensors", "matplotlib", "rich")
    program = f"import sys; sys.modules.update(dict.fromkeys({names!r})); import alexnet_kernels.features"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), cwd=tmp_path)
