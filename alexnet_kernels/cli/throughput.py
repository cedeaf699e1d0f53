"""`alexnet-kernels throughput`"""

from __future__ import annotations

import argparse
import json
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
from alexnet_kernels.training.settings import default_recipe, settings_of

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "throughput",
        help="images/s of reading, augmentation and training, each by itself",
        description="Measures reading and augmentation of images and the network's training step, each by itself.",
    )
    add = parser.add_argument
    add("--data", type=path, metavar="PATH", help="as for train (default: the package's images)")
    add("--recipe", type=path, metavar="NAME", help="as for train")
    add("--preset", choices=tuple(PRESETS), help="the network (default: the recipe's)")
    add("--image-size", type=positive, metavar="PIXELS", help="side of the network's input (default: the recipe's)")
    add("--batch-size", type=positive, metavar="N", help="images per step (default: the recipe's)")
    add("--workers", type=count, metavar="N", help="as for train")
    add("--seconds", type=duration, default=5.0, metavar="TIME", help="time of each measurement (default: 5s)")
    add("--json", action="store_true", help="print JSON")
    add_bad_images(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    require(f"{PROGRAM} throughput", "PIL", "torchmetrics", "yaml", "lightning")
    from alexnet_kernels.training.throughput import throughput

    given = {name: getattr(options, name) for name in ("preset", "image_size", "batch_size")}
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
    held = "held in memory" if not result["workers"] else f"read by {result['workers']} processes"
    say(
        f"{result['images']:,} images of {result['data']}, {held}; batches of {result['batch_size']}, "
        f"{result['image_size']} x {result['image_size']}, on {result['device']}; images/s:"
    )
    for name, what in (
        ("read", "reading"),
        ("augment", "crops, mirroring, colours, mean"),
        ("input", "both, one after the other"),
        ("step", f"training step of preset {settings.preset} ({result['parameters']:,} parameters)"),
    ):
        print(f"{result[name]:>10,.0f}  {what}")
    return 0
