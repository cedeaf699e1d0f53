"""`alexnet-kernels extract`"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from alexnet_kernels._errors import InputError, require
from alexnet_kernels.cli.arguments import (
    CHECKPOINT,
    PROGRAM,
    add_bad_images,
    add_device,
    count,
    elapsed,
    path,
    positive,
    say,
    use_backend,
)
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.devices import pick_device

__all__ = ["add_parser", "run"]

_EVERY = 60.0
"""Seconds between two lines of progress without a terminal."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "extract",
        help="write activations of a network's layers for images",
        description="Writes activations of a network's layers for images, a row an image, and names.csv with the "
        "images' names, labels and hashes. conv1 and fc6 are outputs before ReLU, relu1 and relu6 after it. If it is "
        "interrupted, run the same command to continue.",
    )
    add = parser.add_argument
    add("checkpoint", type=path, help=CHECKPOINT)
    add("--data", type=path, metavar="PATH",
        help="a tree, zip or prepared folder with splits, a folder of images, or a .txt file with a path a line "
        "(default: the package's images)")  # fmt: skip
    add("--split", metavar="NAME", help="the split of --data (default: val, or all images if there is none)")
    add("--layers", nargs="+", metavar="NAME", help="such as conv1 relu1 pool5 fc6, or modules such as features.3")
    add("--list", action="store_true", help="print the layers' names and shapes, and write nothing")
    add("--out", type=path, metavar="FOLDER", help="a new folder, or one that the same command began")
    add("--pool", choices=("none", "mean", "max"), default="none", help="of maps: over their pixels (default: none)")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of the files (default: float32)")
    add("--format", choices=("npy", "safetensors"), default="npy", help="a .npy file a layer, or shards of all layers")
    add("--batch-size", type=positive, default=100, metavar="N", help="images per batch (default: 100)")
    add("--workers", type=count, metavar="N", help="processes that read images (default: one per core, up to 8)")
    add_bad_images(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    if not options.list and (options.layers is None or options.out is None):
        raise InputError("extract needs --layers and --out; --list prints the layers")
    require(f"{PROGRAM} extract", *["PIL", "rich"] * (not options.list), *["safetensors"] * (options.format != "npy"))
    network = checkpoint.load_network(options.checkpoint, pick_device(options.device))
    if options.list:
        return _list(network)
    from alexnet_kernels.features.run import extract_to

    began = time.monotonic()
    with _progress() as progress:
        try:
            features = extract_to(
                options.out,
                network,
                options.data,
                layers=options.layers,
                split=options.split,
                pool=options.pool,
                dtype=options.dtype,
                format=options.format,
                batch_size=options.batch_size,
                workers=options.workers,
                bad_images=options.bad_images,
                progress=progress,
                notify=lambda line: say(f"warning: {line}"),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("run the same command to continue") from None
    for layer in features.index["layers"]:
        odd = [f"{layer[key]:,} {text}" for key, text in (("overflowed", "overflowed"), ("nan", "NaN")) if layer[key]]
        shape = " x ".join(map(str, layer["shape"]))
        say(f"{layer['name']} ({layer['module']}): {shape}, {layer['dtype']}{''.join(f', {text}' for text in odd)}")
    if skipped := features.index["skipped"]:
        say(f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}")
    if ignored := features.index["ignored"]:
        say(f"ignored {ignored} files that are not taken for images, by their suffix")
    split = features.index["data"]["split"]
    say(
        f"{options.out}: {len(features):,} images{f' of {split}' if split else ''}, preset "
        f"{network.model.preset}, in {elapsed(time.monotonic() - began)}"
    )
    return 0


def _list(network: checkpoint.Network) -> int:
    import torch

    from alexnet_kernels.features import extract, layers_of

    size, layers = network.header.settings.image_size, layers_of(network.model)
    blank = torch.zeros(1, 3, size, size, device=next(network.model.parameters()).device)
    shapes = extract(network, blank, [layer.name for layer in layers])
    for layer in layers:
        say(f"{layer.name:12} {layer.module:14} {' x '.join(map(str, shapes[layer.name].shape[1:]))}")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, or a line every minute, and the function (images done, total) that updates it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    terminal, began = sys.stderr.isatty(), time.monotonic()
    printed = [began]
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not terminal) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not terminal and time.monotonic() - printed[0] >= _EVERY:
                printed[0] = time.monotonic()
                say(f"{done:,} of {total:,} images in {elapsed(printed[0] - began)}")

        yield update
