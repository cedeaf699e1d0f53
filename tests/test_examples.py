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
    assert "random filters, not LPIPS" in printed
    distances = [float(a) for a in re.findall(r"distance (\S+)", printed)]
    assert distances[0] == 0
    assert distances == sorted(distances)
    rows = [row.split() for row in re.search(r"all pairs: (.*)", printed)[1].split(";")]
    assert [float(row[i]) for i, row in enumerate(rows)] == pytest.approx(distances, abs=1e-3)
    assert "lpips agrees" in printed or "lpips is not installed" in printed


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


def test_rsa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="needs Pillow, of the extra `train`")
    pytest.importorskip("matplotlib", reason="of the extra `train`")
    out = tmp_path / "rsa.png"
    small = ("--images", "2", "--size", "64", "--width", "0.1", "--permutations", "20")
    printed = run(EXAMPLES / "rsa.py", *small, "--out", out)
    assert "20 images of 10 categories, random weights" in printed
    assert len(re.findall(r"^(?:pool|relu)\d +-?\d\.\d{3} +-?\d\.\d{3} +\d\.\d{3}$", printed, re.MULTILINE)) == 7
    assert re.search(r"^pool1 +1\.000 ", printed, re.MULTILINE)
    assert out.stat().st_size > 1000

    monkeypatch.syspath_prepend(EXAMPLES)
    import rsa

    x = np.array([[1.0, 2, 3, 4], [2, 4, 6, 8.1], [4, 3, 2, 1]])
    np.testing.assert_allclose(rsa.rdm(x), 1 - np.corrcoef(x), atol=1e-12)
    a, b = np.array([1.0, 2, 2, 3]), np.array([0.0, 0, 1, 1])
    assert rsa.ranks(a).tolist() == [1, 2.5, 2.5, 4]
    assert rsa.spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1.5, 1.5, 3.5, 3.5])[0, 1])
    assert rsa.kendall_tau_a(a, b) == pytest.approx(3 / 6)
    category = np.kron(1 - np.eye(3), np.ones((4, 4)))
    assert rsa.permutation_p(category, category, 50, 0) == pytest.approx(1 / 51)


def test_brainscore_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="needs Pillow, of the extra `train`")
    monkeypatch.delenv("ALEXNET_CHECKPOINT", raising=False)
    printed = run(EXAMPLES / "brainscore_model.py")
    # The layers of Brain-Score's own alexnet, which is torchvision's.
    layers = "features.2 features.5 features.7 features.9 features.12 classifier.2 classifier.5"
    assert f"layers {layers}" in printed
    assert "features.12: 10 x 256 x 6 x 6" in printed
    assert "logits: 10 x 1000" in printed
    assert "brainscore_vision" in printed
