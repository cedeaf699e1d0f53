"""`alexnet-kernels predict`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alexnet_kernels._errors import InputError, require
from alexnet_kernels._files import output_path, write_errors
from alexnet_kernels.cli.arguments import CHECKPOINT, PROGRAM, add_device, cell, path, say_notes, use_backend
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.devices import pick_device

__all__ = ["add_parser", "run"]

_PICTURED = 40
"""Images that --picture draws."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("predict", help="the likeliest classes of images")
    add = parser.add_argument
    add("checkpoint", type=path, help=CHECKPOINT)
    add("images", type=path, nargs="+", metavar="image", help="an image file")
    add("--ten-crop", action="store_true", help="average over ten crops, as in the paper")
    add(
        "--picture",
        type=path,
        metavar="PATH",
        help=f"draw the images, at most {_PICTURED}, and their classes, a .png file",
    )
    add("--json", action="store_true", help="print JSON")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    require(f"{PROGRAM} predict", "PIL", *([] if options.json else ["rich"]))
    if options.picture is not None:
        require(f"{PROGRAM} predict --picture", "matplotlib")
        output_path(options.picture, ".png", option="--picture")
        if len(options.images) > _PICTURED:
            raise InputError(f"--picture draws at most {_PICTURED} images, got {len(options.images)}")
    from alexnet_kernels.training import inference

    network = checkpoint.load_network(options.checkpoint, pick_device(options.device))
    say_notes(network.notes, quiet=options.json)
    crops = 10 if options.ten_crop else 1
    results = inference.predict(network, options.images, crops=crops)
    if options.picture is not None:
        from alexnet_kernels.training import pictures

        target, header = Path(options.picture), network.header
        pixels = inference.read(network, options.images)
        shown = inference.centre(pixels, header.settings.image_size)
        titles = [Path(name).name for name in options.images]
        with write_errors(target):
            probabilities = inference.probabilities(network, pixels, crops)
            pictures.predictions(shown, None, probabilities, header.classes, target, titles)
    if options.json:
        rows = [
            {"image": name, "classes": [{"class": label, "probability": p} for label, p in result]}
            for name, result in zip(options.images, results, strict=True)
        ]
        print(json.dumps(rows))
    else:
        _print_table(options.images, results)
    return 0


def _print_table(images: list[str], results: list[list[tuple[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "class", "probability")
    for image, result in zip(images, results, strict=True):
        for i, (name, p) in enumerate(result):
            last = i + 1 == len(result)
            table.add_row(Text(cell(image) if i == 0 else ""), Text(cell(name)), f"{p:6.1%}", end_section=last)
    Console().print(table)
