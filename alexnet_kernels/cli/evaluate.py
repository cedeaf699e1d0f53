"""`alexnet-kernels evaluate`"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

from alexnet_kernels._errors import require
from alexnet_kernels._files import output_path, write_atomically, write_errors
from alexnet_kernels.cli.arguments import (
    CHECKPOINT,
    PROGRAM,
    add_bad_images,
    add_device,
    add_reading,
    cell,
    path,
    positive,
    reading_of,
    say,
    say_notes,
    use_backend,
)
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.devices import pick_device

__all__ = ["add_parser", "run"]

_TABLE, _WORST = 50, 25
"""Classes that --per-class prints, and the number of the worst that it prints if there are more."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="top-1 and top-5 accuracy of a checkpoint")
    add = parser.add_argument
    add("checkpoint", type=path, help=CHECKPOINT)
    add(
        "--data",
        type=path,
        metavar="PATH",
        help="as for train; val/ is used (default: the images that the run was trained on)",
    )
    add("--ten-crop", action="store_true", help="average over ten crops, as in the paper")
    add("--batch-size", type=positive, default=100, metavar="N", help="images per batch (default: 100)")
    add("--per-class", action="store_true", help="print each class's figures, the worst first")
    add("--confusion", type=path, metavar="PATH", help="write the confusion matrix, a .csv or .png file")
    add("--json", action="store_true", help="print all figures as JSON")
    add_bad_images(parser)
    add_reading(parser, "val_split", "val_labels", "synsets", "empty_classes")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    table = options.per_class and not options.json
    picture = options.confusion is not None and options.confusion.lower().endswith(".png")
    require(f"{PROGRAM} evaluate", "PIL", "torchmetrics", *["rich"] * table, *["matplotlib"] * picture)
    from alexnet_kernels.training import datasets, inference
    from alexnet_kernels.training.reading import Reading

    if options.confusion is not None:
        output_path(options.confusion, ".csv", ".png", option="--confusion")
    network = checkpoint.load_network(options.checkpoint, pick_device(options.device))
    say_notes(network.notes, quiet=options.json)
    data = options.data or network.header.data or None
    given = reading_of(options)
    reading = Reading(**given) if options.data else datasets.reading_again(network.header.reading, given, data)
    crops = 10 if options.ten_crop else 1
    result = inference.evaluate(
        network, data, crops=crops, batch_size=options.batch_size, bad_images=options.bad_images, reading=reading
    )
    if options.confusion is not None:
        _write_confusion(result["confusion"], network.header.classes, Path(options.confusion))
    if options.json:
        print(json.dumps({**result, "crops": crops}))
        return 0
    if result.get("by_order"):
        say("note: the set's class names are not the network's: its classes are taken in their order")
    if skipped := result["skipped"]:
        say(f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}")
    if ignored := result.get("ignored"):
        say(f"ignored {ignored} files that are hidden, in no class or not taken for images")
    for note in result.get("notes", ()):
        say(note)
    print(
        f"top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  of {result['images']} images, "
        f"{crops} crop{'s' * (crops > 1)}, preset {network.model.preset}"
    )
    if table:
        _print_classes(result["per_class"], result["confusion"])
    return 0


def _write_confusion(counts: list[list[int]], classes: list[str], target: Path) -> None:
    if target.suffix.lower() == ".png":
        from alexnet_kernels.training import pictures

        with write_errors(target):
            pictures.confusion(counts, classes, target)
        return
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["true", *classes])
    rows.writerows([name, *row] for name, row in zip(classes, counts, strict=True))
    with write_errors(target):
        write_atomically(target, text.getvalue())


def _print_classes(per_class: dict[str, dict[str, Any]], confusion: list[list[int]]) -> None:
    """Print a table of the classes that have images, the worst first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(per_class)
    classes = [i for i, row in enumerate(per_class.values()) if row["images"]]
    classes.sort(key=lambda i: (per_class[names[i]]["top1"], per_class[names[i]]["top5"]))
    shown = classes if len(names) <= _TABLE else classes[:_WORST]
    table = Table("class", "images", "top-1", "top-5", "most often taken for")
    for i in shown:
        row = per_class[names[i]]
        wrong = [0 if other == i else times for other, times in enumerate(confusion[i])]
        most = max(wrong)
        other = f"{names[wrong.index(most)]} ({most})" if most else ""
        table.add_row(
            Text(cell(names[i])),
            str(row["images"]),
            f"{row['top1']:.1%}",
            f"{row['top5']:.1%}",
            Text(cell(other)),
        )
    Console().print(table)
    if len(shown) < len(classes):
        print(f"the {len(shown)} worst of {len(names)} classes; --json has all")
