"""Shared by the tests of training runs: a few real images, running, and the comparison of two runs."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels.training import checkpoint, datasets, run
from alexnet_kernels.training.settings import Settings
from alexnet_kernels.training.spec import new_run, resumed_run


def shipped_images(root: Path, classes: Sequence[str], train: int, val: int) -> Path:
    """Writes `train` and `val` of the package's images of each class below root. Returns root."""
    with zipfile.ZipFile(datasets.SHIPPED) as archive:
        names = archive.namelist()
        for split, count in (("train", train), ("val", val)):
            for name in classes:
                archive.extractall(root, [n for n in names if n.startswith(f"{split}/{name}/")][:count])
    return root


def train(
    settings: Settings,
    data: Path | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> run.Result:
    """Trains a new run, or a resumed one with these settings given again."""
    if resume is None:
        return run.train(new_run(settings, data, out, **options))
    return run.train(resumed_run(resume, settings.to_dict(), data, **options))


def environment() -> dict[str, str]:
    """The environment of a process that imports the package under test from any folder.

    It has one thread, since results are bitwise identical only for the same number of threads.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}


def figures(path: Path) -> list[dict[str, float]]:
    """A checkpoint's history without its timings."""
    timing = ("images_per_s", "seconds")
    history = checkpoint.load(path).history.epochs
    return [{key: value for key, value in row.items() if key not in timing} for row in history]


def assert_same(first: Path, second: Path) -> None:
    """Asserts that weights, buffers and momentum of two checkpoints are bitwise identical."""
    a, b = checkpoint.load(first).content, checkpoint.load(second).content
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for state, other in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        assert state["state"].keys() == other["state"].keys()
        for key, values in state["state"].items():
            assert torch.equal(values["momentum_buffer"], other["state"][key]["momentum_buffer"])
