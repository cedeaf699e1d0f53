"""Drawing of filters, curves, predictions, nearest neighbours and confusion matrices, as PNG files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colors, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from alexnet_kernels._errors import printable
from alexnet_kernels._files import atomic_file

__all__ = ["confusion", "curves", "filter_grid", "filters", "neighbours", "predictions"]

# A matplotlibrc of the user's may ask for LaTeX.
_DEFAULTS = style.context("default")


def filter_grid(weight: Tensor, towers: int = 2, columns: int = 16) -> Tensor:
    """conv1's kernels [K, 3, R, S] in rows of `columns`, one tower below the other, uint8 [H, W, 3].

    Each kernel is scaled to 0..255. One white pixel separates kernels, four separate towers. 96 kernels in two towers
    make six rows, as in the paper's Figure 3.
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
    """Write `filter_grid` as a PNG, with zoom x zoom pixels per weight."""
    grid = filter_grid(weight, towers).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    with atomic_file(path) as file:
        Image.fromarray(np.asarray(grid)).save(file, format="png")


def _write(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_file(path) as file, warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(file, format="png", dpi=110)


@_DEFAULTS
def curves(history: Sequence[dict[str, float]], path: Path, spread: Sequence[dict[str, float]] | None = None) -> None:
    """Write loss and error over the epochs as a PNG. spread: rows of the half widths of the bands around the curves."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for split, dashes, colour in (("train", "--", "C0"), ("val", "-", "C1")):
        lines = [(left, f"{split}_loss", colour, split)]
        for i, name in enumerate(("top1", "top5")):
            lines.append((right, f"{split}_{name}", f"C{i}", f"{split} {name[:3]}-{name[3:]}"))
        for axes, key, shade, label in lines:
            values = np.array([row[key] for row in history])
            drawn = values if axes is left else 100 * (1 - values)
            axes.plot(epochs, drawn, dashes, color=shade, marker=".", label=label)
            if spread is not None:
                half = (1 if axes is left else 100) * np.array([row[key] for row in spread])
                axes.fill_between(epochs, drawn - half, drawn + half, color=shade, alpha=0.15, linewidth=0)
    left.set(xlabel="epoch", ylabel="cross-entropy")
    right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    _write(figure, path)


@_DEFAULTS
def predictions(
    images: Tensor,
    labels: Sequence[int] | None,
    probabilities: Tensor,
    classes: Sequence[str],
    path: Path,
    titles: Sequence[str] | None = None,
) -> None:
    """Write images with their class and the five likeliest classes, as in the paper's Figure 4, as a PNG.

    Args:
        images: uint8 [n, H, W, 3].
        labels: the true classes, whose bars are red; None draws all bars in blue.
        probabilities: [n, classes].
        classes: names.
        path: of the PNG.
        titles: one for each image, in place of the name of its class.
    """
    if titles is None:
        titles = [""] * len(images) if labels is None else [classes[label] for label in labels]
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 2] * rows)
    for ax in axes.flat:
        ax.set_axis_off()
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        above, below = axes[i // columns * 2, i % columns], axes[i // columns * 2 + 1, i % columns]
        above.imshow(image.cpu().numpy())
        values, places = probabilities[i].float().cpu().topk(min(5, len(classes)))
        names = [printable(classes[place]) for place in places.tolist()]
        right = None if labels is None else labels[i]
        colours = ["tab:red" if place == right else "tab:blue" for place in places.tolist()]
        below.set_axis_on()
        below.set_title(_short(title), fontsize=10, parse_math=False)
        below.barh(range(len(names)), values.tolist(), color=colours, alpha=0.5)
        below.set(xlim=(0, 1), xticks=[], yticks=[], ylim=(len(names) - 0.5, -0.5))
        for row, name in enumerate(names):
            below.text(0.02, row, name, va="center", fontsize=8, clip_on=True, parse_math=False)
    _write(figure, path)


def _short(name: str, length: int = 30) -> str:
    name, half = printable(name), length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def neighbours(
    queries: Tensor,
    training_images: Tensor,
    query_features: Tensor,
    training_features: Tensor,
    path: Path,
    count: int = 6,
) -> None:
    """Write a row for each query: the query, then the training images with the nearest features, as in the paper's
    Figure 4, as a PNG.

    Nearest is the smallest Euclidean distance; of equal distances, the first. Two white pixels separate images, twelve
    the first column from the second.

    Args:
        queries, training_images: uint8 [q, H, W, 3] and [n, H, W, 3].
        query_features, training_features: float32 [q, F] and [n, F].
        path: of the PNG.
        count: training images per row, or all if there are fewer.
    """
    # The faster matrix product gives a nonzero distance between an image and its copy.
    distances = torch.cdist(query_features, training_features, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.argsort(dim=1, stable=True)[:, :count]
    height, width = queries.shape[1] + 2, queries.shape[2] + 2
    shape = (len(queries) * height - 2, (nearest.shape[1] + 1) * width + 8, 3)
    grid = torch.full(shape, 255, dtype=torch.uint8)
    for row, (query, places) in enumerate(zip(queries, nearest, strict=True)):
        for column, image in enumerate([query, *training_images[places]]):
            top, left = row * height, column * width + (10 if column else 0)
            grid[top : top + height - 2, left : left + width - 2] = image
    with atomic_file(path) as file:
        Image.fromarray(grid.numpy()).save(file, format="png")


@_DEFAULTS
def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Write a confusion matrix, true classes in rows and predicted ones in columns, as a PNG.

    A darker cell is a larger share of its row. Up to 20 classes the numbers are written; up to 50 every class is named,
    of more about forty.
    """
    total = len(classes)
    table = np.asarray(counts)
    share = table / table.sum(1, keepdims=True).clip(min=1)
    # In inches; a thousand classes get two pixels each.
    side = min(23.0, 3 + 0.4 * total)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # The square root of the share makes one error in a hundred visible.
    axes.imshow(share, cmap="Blues", norm=colors.PowerNorm(0.5, 0, 1), interpolation="nearest")
    named = range(0, total, 1 if total <= 50 else -(-total // 40))
    names = [_short(classes[place], 20) for place in named]
    axes.set_xticks(named, names, rotation=90, parse_math=False)
    axes.set_yticks(named, names, parse_math=False)
    axes.set(xlabel="likeliest class", ylabel="true class")
    if total <= 20:
        for row, column in np.argwhere(table):
            colour = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, table[row, column], ha="center", va="center", fontsize=8, color=colour)
    _write(figure, path)
