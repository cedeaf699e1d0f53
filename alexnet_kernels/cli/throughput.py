"""`alexnet-kernels throughput`"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from alexnet_kernels._errors import require
from alexnet_kernels.cli.arguments import (
    PROGRAM,
    add_bad_images,
    add_device,
    add_reading,
    count,
    duration,
    path,
    positive,
    reading_of,
    say,
    use_backend,
    workers_of,
)
from alexnet_kernels.models import PRESETS
from alexnet_kernels.training.devices import pick_device
from alexnet_kernels.training.settings import PRECISIONS, default_recipe, settings_of

__all__ = ["add_parser", "run", "verdict"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "throughput",
        help="images/s of reading, augmentation and training, and which of them binds",
        description="Measures reading images, copying them to the device, augmentation and the network's training "
        "step, each by itself and all together, and says which binds.",
    )
    add = parser.add_argument
    add("--data", type=path, metavar="PATH", help="as for train (default: the package's images)")
    add("--recipe", type=path, metavar="NAME", help="as for train")
    add("--preset", choices=tuple(PRESETS), help="the network (default: the recipe's)")
    add("--image-size", type=positive, metavar="PIXELS", help="side of the network's input (default: the recipe's)")
    add("--batch-size", type=positive, metavar="N", help="images per step (default: the recipe's)")
    add("--precision", choices=PRECISIONS, help="as for train")
    add("--workers", type=count, metavar="N", help="as for train")
    add("--seconds", type=duration, default=5.0, metavar="TIME", help="time of each measurement (default: 5s)")
    add("--json", action="store_true", help="print JSON")
    add_bad_images(parser)
    add_reading(parser, "train_split", "empty_classes")
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    require(f"{PROGRAM} throughput", "PIL", "torchmetrics", "yaml", "lightning")
    from alexnet_kernels.training.precision import words
    from alexnet_kernels.training.reading import Reading
    from alexnet_kernels.training.throughput import throughput

    given = {name: getattr(options, name) for name in ("preset", "image_size", "batch_size", "precision")}
    recipe = options.recipe or default_recipe(options.data is None, options.preset)
    settings = settings_of(recipe, **{name: value for name, value in given.items() if value is not None})
    result = throughput(
        settings,
        options.data,
        pick_device(options.device),
        workers=workers_of(options),
        seconds=options.seconds,
        bad_images=options.bad_images,
        reading=Reading(**reading_of(options)),
    )
    if options.json:
        print(json.dumps(result))
        return 0
    processes = (
        f"{result['workers']} {'threads' if result['prepared'] else 'processes'}"
        if result["workers"]
        else "this process"
    )
    held = "held in memory" if result["in_memory"] else f"read by {processes}"
    say(
        f"{result['images']:,} images of {result['data']}, {held}; batches of {result['batch_size']}, "
        f"{result['image_size']} x {result['image_size']}, on {result['device']} in "
        f"{words(result['precision'])}; images/s:"
    )
    for name, what in (
        ("read", "reading"),
        ("fetch", "reading the files without decoding them, by this process alone"),
        ("copy", "copying to the device"),
        ("augment", "crops, mirroring, colours, mean"),
        ("input", "reading and these, one after the other"),
        ("step", f"training step of preset {settings.preset} ({result['parameters']:,} parameters)"),
        ("together", "all together, as in train"),
    ):
        if result[name] is not None:
            print(f"{result[name]:>10,.0f}  {what}")
    print(verdict(result))
    return 0


_FILES = 0.5
"""The part of the rate of reading files alone from which on reading them, and not decoding, is what takes the time."""


def verdict(result: Mapping[str, Any]) -> str:
    """One line that says which part of training binds, and what to do about it."""
    if result["binds"] == "sum":
        parts = {what: result["limit"] / result[name] for name, what in (("read", _reading(result)),
                 ("augment", "augmentation"), ("step", "the step"))}  # fmt: skip
        most = max(parts, key=lambda what: parts[what])
        shares = ", ".join(f"{what} {share:.0%}" for what, share in parts.items())
        advice = {
            "the step": "a GPU, or a smaller --image-size or network, makes that faster",
            "augmentation": "--color-shift 0 makes that faster",
        }.get(most) or _advice(result)
        return (
            f"reading, augmentation and the step share the CPU's cores, so that their times add up: "
            f"{result['limit']:,.0f} images/s; {shares} of the time; {advice}"
        )
    stepping = 1 / (1 / result["augment"] + 1 / result["step"])
    stages = {"read": result["read"], "copy": result["copy"], "step": stepping}
    names = {"read": "reading", "copy": "copying", "step": "stepping"}
    others = [f"{names[name]} has {rate / result['limit']:.1f} times that" for name, rate in stages.items()
              if name != result["binds"]]  # fmt: skip
    binds = {**names, "read": _reading(result)}[result["binds"]]
    advice = {
        "read": _advice(result),
        "copy": "the GPU's PCIe link, or the memory that is copied from, is slow",
        "step": "the images keep up" if result["augment"] > result["step"] else "augmentation takes most of it",
    }[result["binds"]]
    return f"{binds} binds: {result['limit']:,.0f} images/s; {', '.join(others)}; {advice}"


def _reading(result: Mapping[str, Any]) -> str:
    """What reading spends its time with: "decoding", "reading files" or "reading"."""
    if result["fetch"] is None:
        return "reading"
    files = result["fetch"] * max(1, result["workers"])
    return "reading files" if result["read"] > _FILES * files else "decoding"


def _advice(result: Mapping[str, Any]) -> str:
    """What to do where reading binds."""
    if result["in_memory"]:
        return "the images are held in memory, and the CPU gathers them no faster"
    more = f"more --workers than {result['workers']}"
    if result["prepared"]:
        rate = result["read"] * 3 * result["stored_size"] ** 2 / 1e9
        return f"that is {rate:.1f} GB/s: put the set on a faster disk or in memory, or try {more}"
    return f"try `{PROGRAM} prepare`, or {more}"
