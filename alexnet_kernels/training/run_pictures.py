"""The pictures that a run leaves in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from alexnet_kernels.training import checkpoint, inference, pictures
from alexnet_kernels.training.header import History
from alexnet_kernels.training.image_set import StoredImages
from alexnet_kernels.training.run_folder import PICTURES

__all__ = ["draw_pictures"]

_PREDICTIONS = 12
"""Validation images in predictions.png."""
_QUERIES = 6
"""Validation images in neighbours.png."""
_NEIGHBOURS = 2000
"""Training images among which their nearest neighbours are searched."""


def draw_pictures(history: History, sets: Sequence[StoredImages], folder: Path, device: torch.device) -> list[Path]:
    """Write the run's pictures. Returns their paths."""
    pictures.curves(history.epochs, folder / "curves.png")
    best = folder / "best.ckpt"
    # A run resumed from a lone checkpoint has no best.ckpt until an epoch does better.
    network = checkpoint.load_network(best if best.exists() else folder / "last.ckpt", device)
    layers = list(network.model.features.children())
    conv1 = next(layer for layer in layers if isinstance(layer, torch.nn.Conv2d))
    towers = 2 if any(getattr(layer, "groups", 1) > 1 for layer in layers) else 1
    pictures.filters(conv1.weight, folder / "filters.png", towers)
    _draw_predictions(network, sets[1], folder / "predictions.png")
    _draw_neighbours(network, sets, folder / "neighbours.png")
    return [folder / name for name in PICTURES if (folder / name).exists()]


def _spaced(images: StoredImages, count: int) -> list[int]:
    """Indices of up to `count` images at equal distances, and so of different classes."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).long().tolist()


def _draw_predictions(network: checkpoint.Network, val_set: StoredImages, path: Path) -> None:
    batch = val_set.__getitems__(_spaced(val_set, _PREDICTIONS))
    if len(batch["labels"]):
        probabilities = inference.probabilities(network, batch["images"])
        shown = inference.centre(batch["images"], network.header.settings.image_size)
        pictures.predictions(shown, batch["labels"].tolist(), probabilities, network.header.classes, path)


def _draw_neighbours(network: checkpoint.Network, sets: Sequence[StoredImages], path: Path) -> None:
    train_set, val_set = sets
    queries = val_set.__getitems__(_spaced(val_set, _QUERIES))["images"]
    training = train_set.sample(_NEIGHBOURS)
    if len(queries) and len(training):
        size = network.header.settings.image_size
        pictures.neighbours(
            inference.centre(queries, size),
            inference.centre(training, size),
            inference.features(network, queries),
            inference.features(network, training),
            path,
        )
