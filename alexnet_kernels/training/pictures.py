"""Pictures of a run: conv1's filters, its curves, its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from alexnet_kernels.training.checkpoint import atomic_file

__all__ = ["curves", "filter_grid", "filters", "predictions"]


def filter_grid(weight: Tensor, towers: int = 2, columns: int = 16) -> Tensor:
    """conv1's kernels [K, 3, R, S] in rows of `columns`, one tower below the other, uint8 [H, W, 3].

    Each kernel fills 0..255 by itself. One pixel of white between kernels, four between towers; 96 kernels in
    two towers make six rows, as in the paper's Figure 3.
    """
    kernels = weight.detach().float().cpu()
    low = kernels.amin((1, 2, 3), keepdim=True)
    span = (kernels.amax((1, 2, 3), keepdim=True) - low).clamp(min=1e-12)
    pixels = ((kernels - low) / span * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    height, width = pixels.shape[1:3]
    parts = list(pixels.chunk(towers))
    columns = min(columns, max(map(len, parts)))
    blocks = []
    for part in parts:
        rows = -(-len(part) // columns)
        block = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=torch.uint8)
        for i, kernel in enumerate(part):
            top, left = i // columns * (height + 1), i % columns * (width + 1)
            block[top : top + height, left : left + width] = kernel
        blocks += [block, torch.full((4, block.shape[1], 3), 255, dtype=torch.uint8)]
    return torch.cat(blocks[:-1])


def filters(weight: Tensor, path: Path, towers: int = 2, zoom: int = 5) -> None:
    """`filter_grid` as a PNG, each weight zoom x zoom pixels."""
    grid = filter_grid(weight, towers).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    with atomic_file(path) as file:
        Image.fromarray(np.asarray(grid)).save(file, format="png")


def _write(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Loss and error over the epochs, as a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for split, style in (("train", "--"), ("val", "-")):
        left.plot(epochs, [row[f"{split}_loss"] for row in history], style, marker=".", label=split)
        for name, colour in (("top1", "C0"), ("top5", "C1")):
            error = [100 * (1 - row[f"{split}_{name}"]) for row in history]
            right.plot(epochs, error, style, color=colour, marker=".", label=f"{split} {name[:3]}-{name[3:]}")
    left.set(xlabel="epoch", ylabel="cross-entropy")
    right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


def predictions(
    images: Tensor, labels: Sequence[int], probabilities: Tensor, classes: Sequence[str], path: Path
) -> None:
    """Images uint8 [n, H, W, 3] with their class and the five likeliest, as in the paper's Figure 4, as a
    PNG.

    probabilities [n, classes]; a red bar is the right class.
    """
    columns = 4
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        above, below = axes[i // columns * 2, i % columns], axes[i // columns * 2 + 1, i % columns]
        above.imshow(image.cpu().numpy())
        above.set_title(classes[label], fontsize=10)
        values, places = probabilities[i].float().cpu().topk(min(5, len(classes)))
        names = [classes[place] for place in places.tolist()]
        colours = ["tab:red" if place == label else "tab:blue" for place in places.tolist()]
        below.set_axis_on()
        below.barh(range(len(names)), values.tolist(), color=colours, alpha=0.5)
        below.set(xlim=(0, 1), xticks=[], yticks=[], ylim=(len(names) - 0.5, -0.5))
        for row, name in enumerate(names):
            below.text(0.02, row, name, va="center", fontsize=8)
    _write(figure, path)
