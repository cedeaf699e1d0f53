"""`alexnet-kernels convert`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alexnet_kernels.cli.arguments import CHECKPOINT, path, say, say_notes
from alexnet_kernels.models import PRESETS
from alexnet_kernels.training import checkpoint, exporting

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("convert", help="write a network's weights as a file of another format")
    add = parser.add_argument
    add("checkpoint", type=path, help=CHECKPOINT)
    add(
        "out",
        type=path,
        help="a new file: .pth or .pt (a state_dict), .safetensors (with all that evaluate and predict need), .onnx; "
        "or a folder (config.json and model.safetensors, as on the Hugging Face Hub)",
    )
    add("--to", choices=tuple(exporting.KINDS), help="the format (default: by OUT's suffix)")
    add("--preset", choices=tuple(PRESETS), help="the network, for weights that fit several presets")
    add("--part", metavar="NAME", help="the model meant in a file with several, such as state_dict_ema")
    add("--channels", choices=("RGB", "BGR"), default="RGB", help="order of the images that OUT takes (default: RGB)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    kind = exporting.kind_of(out, options.to, options.channels)
    network = checkpoint.load_network(options.checkpoint, preset=options.preset, part=options.part)
    exporting.write(network, out, kind, options.channels)
    header, model = network.header, network.model
    if header.origin is not None:
        width = header.settings.width
        say(
            f"read {header.origin['format']}: preset {model.preset}{f', width {width:g}' if width != 1 else ''}, "
            f"{len(header.classes)} classes"
        )
    say_notes(network.notes)
    say(f"{out}  {_size(out):,} bytes")
    return 0


def _size(out: Path) -> int:
    return sum(file.stat().st_size for file in out.iterdir()) if out.is_dir() else out.stat().st_size
