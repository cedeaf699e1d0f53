"""Each script of examples/ with its smallest arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import alexnet_kernels
from alexnet_kernels import AlexNet, unfuse

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    """What `python command` prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(alexnet_kernels.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
    }
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ops_and_fuse() -> None:
    printed = run(EXAMPLES / "ops_and_fuse.py", "--batch", "2", "--size", "79", "--device", "cpu")
    differences = [float(x) for x in re.findall(r"(\S+) relative to PyTorch's", printed)]
    assert len(differences) == 8
    assert max(differences) < 1e-4
    assert "the same elements in NCHW: True" in printed
    assert re.search(r"forward and backward: \S+ ms, fused \S+ ms", printed)


def test_fine_tune(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, of the extra `train`")
    for split in ("train", "val"):
        for name, value in (("dark", 40), ("light", 210)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = np.random.default_rng(index).integers(value - 30, value + 30, (70, 80, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{index}.png")
    small = ("--data", tmp_path, "--size", "64", "--width", "0.125", "--batch", "8", "--device", "cpu")
    weights = tmp_path / "tuned.pth"

    printed = run(EXAMPLES / "fine_tune.py", *small, "--epochs", "20", "--out", weights)
    assert "16 training and 16 validation images of 2 classes" in printed
    accuracies = re.findall(r"epoch \d+: loss \d+\.\d+, validation accuracy (\d+\.\d)%", printed)
    assert len(accuracies) == 20
    assert accuracies[-1] == "100.0"

    printed = run(EXAMPLES / "fine_tune.py", *small, "--epochs", "3", "--weights", weights, "--preset", "batchnorm")
    assert "epoch 3" in printed
    assert "validation accuracy 100.0%" in printed


def test_lpips_distance() -> None:
    printed = run(EXAMPLES / "lpips_distance.py", "--baseline", "--size", "64", "--device", "cpu")
    assert "unweighted baseline, not LPIPS" in printed
    pairs = [(float(a), float(b)) for a, b in re.findall(r"distance (\S+), fused (\S+)", printed)]
    assert pairs[0] == (0, 0)
    assert [a for a, _ in pairs] == sorted(a for a, _ in pairs)
    assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-3)
    assert "distances and gradients agree" in printed


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("plan", ["towers", "hybrid"])
def test_two_towers(plan: str) -> None:
    small = ("--plan", plan, "--steps", "2", "--size", "79", "--width", "0.125")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*launch, EXAMPLES / "two_towers.py", *small)
    losses = [(float(a), float(b)) for a, b in re.findall(r"loss (\S+), one process (\S+)", printed)]
    assert len(losses) == 2
    for two, one in losses:
        assert two == pytest.approx(one, rel=1e-3)
    held, whole = re.search(r"a rank holds (\S+) of (\S+) parameters", printed).groups()
    assert int(held.replace(",", "")) < int(whole.replace(",", ""))


def test_extract_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="needs Pillow, of the extra `train`")
    weights, out = tmp_path / "alexnet.pth", tmp_path / "features.npz"
    model = AlexNet(preset="torchvision")
    torch.save(model.state_dict(), weights)
    small = ("--weights", weights, "--size", "64", "--limit", "1", "--device", "cpu")
    printed = run(EXAMPLES / "extract_features.py", *small, "--out", out)
    assert "features.12: 10 x 256" in printed
    assert "classifier.5: 10 x 4096" in printed

    monkeypatch.syspath_prepend(EXAMPLES)
    from images import MEAN, STD, load_images

    images, labels, classes, names = load_images(None, "val", 64, 1)
    pixels = (images - MEAN) / STD
    with torch.no_grad():
        maps = unfuse(model.eval()).features(pixels.permute(0, 3, 1, 2))
        hidden = model.classifier[:6](model.avgpool(maps).flatten(1))
    with np.load(out) as arrays:
        assert arrays["labels"].tolist() == labels.tolist() == list(range(10))
        assert arrays["names"].tolist() == names
        assert arrays["classes"].tolist() == classes
        np.testing.assert_allclose(arrays["features.12"], maps.mean((2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(arrays["classifier.5"], hidden, rtol=1e-4, atol=1e-5)
