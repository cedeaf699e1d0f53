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
    count,
    duration,
    path,
    positive,
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
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    require(f"{PROGRAM} throughput", "PIL", "torchmetrics", "yaml", "lightning")
    from alexnet_kernels.training.precision import words
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
    )
    if options.json:
        print(json.dumps(result))
        return 0
    processes = f"{result['workers']} processes" if result["workers"] else "this process"
    held = "held in memory" if result["in_memory"] else f"read by {processes}"
    say(
        f"{result['images']:,} images of {result['data']}, {held}; batches of {result['batch_size']}, "
        f"{result['image_size']} x {result['image_size']}, on {result['device']} in "
        f"{words(result['precision'])}; images/s:"
    )
    for name, what in (
        ("read", "reading"),
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


def verdict(result: Mapping[str, Any]) -> str:
    """One line that says which part of training binds, and what to do where reading does."""
    if result["binds"] == "sum":
        share = result["limit"] / result["step"]
        return (
            f"reading, augmentation and the step share the CPU's cores, so that their times add up: "
            f"{result['limit']:,.0f} images/s, {share:.0%} of the time in the step"
        )
    stepping = 1 / (1 / result["augment"] + 1 / result["step"])
    stages = {"read": result["read"], "copy": result["copy"], "step": stepping}
    names = {"read": "reading", "copy": "copying", "step": "stepping"}
    others = [f"{names[name]} has {rate / result['limit']:.1f} times that" for name, rate in stages.items()
              if name != result["binds"]]  # fmt: skip
    line = f"{names[result['binds']]} binds: {result['limit']:,.0f} images/s; {', '.join(others)}"
    if result["binds"] != "read":
        return line
    if result["in_memory"]:
        return f"{line}; the images are held in memory, and the CPU gathers them no faster"
    more = f"more --workers than {result['workers']}"
    return f"{line}; try {more}" if result["prepared"] else f"{line}; try `{PROGRAM} prepare`, or {more}"
