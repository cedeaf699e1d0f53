"""`alexnet-kernels convert`"""

from __future__ import annotations

import argparse
from typing import Any

from alexnet_kernels._errors import require
from alexnet_kernels.cli.arguments import CHECKPOINT, PROGRAM, path, say
from alexnet_kernels.training import checkpoint

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("convert", help="write a checkpoint's network as a safetensors file")
    parser.add_argument("checkpoint", type=path, help=CHECKPOINT)
    parser.add_argument("out", type=path, metavar="OUT.safetensors", help="a new file, which evaluate and predict read")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    require(f"{PROGRAM} convert", "safetensors")
    out = checkpoint.export_path(options.out)
    checkpoint.export(checkpoint.load_network(options.checkpoint), out)
    say(f"{out}  {out.stat().st_size:,} bytes")
    return 0
