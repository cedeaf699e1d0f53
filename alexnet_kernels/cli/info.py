"""`alexnet-kernels info`"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from typing import Any

import torch

from alexnet_kernels import _library, backends
from alexnet_kernels._errors import printable
from alexnet_kernels._version import __version__
from alexnet_kernels.cli import tune
from alexnet_kernels.models import PRESETS, AlexNet, count_parameters

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, backends of each op, presets")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, default=str))
        return 0
    library = facts["library"]
    print("  ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    print(f"devices: {', '.join(facts['devices'])} ({torch.get_num_threads()} CPU threads)")
    if library["loaded"]:
        cuda = "no CUDA kernels"
        if library["cuda_built"]:
            wgmma = "with" if library["wgmma"] else "without"
            cuda = f"CUDA kernels for {', '.join(library['archs'])}, {wgmma} the wgmma convolution"
        print(f"library: {library['path']}, {library['isa']} on the CPU, {cuda}")
    else:
        print(f"library: not loaded: {library['reason']}")
    for reason in library["unserved"]:
        print(f"GPU: {reason}")
    print(f"backend: {facts['backend']}")
    for table in facts["choices"].values():
        print(printable(table["text"]))
    _print_ops(facts["ops"])
    print("\npresets")
    for name, row in facts["presets"].items():
        print(f"  {name:<12} {row['input_size']} px  {row['parameters']:,} parameters  {row['source']}")
    return 0


def _facts() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is printed
        unserved = list(dict.fromkeys(_library.unserved_gpus().values()))
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "alexnet_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "devices": devices,
        "library": _library.status() | {"unserved": unserved},
        "backend": backends.get_backend(),
        "choices": {str(device): tune.status(device) | {"text": tune.describe(device)} for device in _torch_devices()},
        "ops": backends.report(),
        "presets": {
            name: {
                "source": preset.source,
                "input_size": preset.input_size,
                "parameters": count_parameters(AlexNet(preset=name, device="meta")),
            }
            for name, preset in PRESETS.items()
        },
    }


def _torch_devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def _print_ops(report: list[dict[str, Any]]) -> None:
    names = list(report[0]["backends"])
    width = max(len(row["op"]) for row in report)
    print("\nop".ljust(width + 3) + "  ".join(f"{name:<7}" for name in names))
    reasons: dict[str, str] = {}
    for row in report:
        cells = []
        for name in names:
            state = row["backends"][name]
            if state == "available":
                cells.append("yes")
            else:
                cells.append(f"no [{reasons.setdefault(state, str(len(reasons) + 1))}]")
        print(row["op"].ljust(width + 2) + "  ".join(f"{cell:<7}" for cell in cells).rstrip())
    for reason, number in reasons.items():
        print(f"[{number}] {reason}")
