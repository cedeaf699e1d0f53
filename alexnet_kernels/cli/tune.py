"""`alexnet-kernels tune`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from alexnet_kernels._dispatch import choices, tuned
from alexnet_kernels._dispatch.kinds import Row
from alexnet_kernels._errors import InputError, printable
from alexnet_kernels.cli.arguments import PROGRAM, duration, positive, say
from alexnet_kernels.training.devices import pick_device

if TYPE_CHECKING:
    from alexnet_kernels.bench.tuning import Outcome, Task

__all__ = ["add_parser", "run"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which kernels are fastest here, for backend auto",
        description="Measures the implementations that backend auto may choose among, at the layers of the presets "
        "paper and torchvision, and writes a table of choices for this device to the user's cache folder. A choice "
        "changes only where another implementation is right, and faster beyond the noise. The exit status is 1 if "
        "an implementation is wrong or fails.",
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    add("--op", nargs="+", metavar="NAME", help="ops to measure (default: all that have a choice on the device)")
    add("--batch", nargs="+", type=positive, metavar="N", help="batch sizes (default: 16; on a GPU 128)")
    add("--dtype", nargs="+", choices=tuple(_DTYPES), help="dtypes (default: bf16 and fp32; on a GPU bf16)")
    add("--seconds", type=duration, default=0.3, metavar="TIME",
        help="time of each pass of each kind of calls, for all implementations together (default: 0.3s)")  # fmt: skip
    add("--show", action="store_true", help="print the table in force, and measure nothing")
    add("--reset", action="store_true", help="remove this device's table, and measure nothing")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.show and options.reset:
        raise InputError("--show and --reset: one at a time")
    device = pick_device(options.device)
    if options.show:
        return _show(device, options.json)
    if options.reset:
        return _reset(device, options.json)
    from alexnet_kernels.bench import tuning

    known = tuning.tunable_ops(device)
    for op in options.op or ():
        if op not in known:
            raise InputError(f"--op {op}: on {device} there is a choice for {', '.join(known)} only")
    tasks = tuning.tasks(device, options.op, options.batch, [_DTYPES[name] for name in options.dtype or ()])
    tuned.check_writable(device)
    outcomes = [_tune(task, device, options) for task in tasks]
    wrong = [f"{outcome.label}: {name}: {why}" for outcome in outcomes for name, why in outcome.wrong.items()]
    path = tuned.path_of(device)
    if options.json:
        print(json.dumps({"file": str(path), "outcomes": [outcome.to_json() for outcome in outcomes]}))
    else:
        changed = sum(outcome.name != outcome.committed for outcome in outcomes)
        say(f"{len(outcomes)} kinds of calls measured, {changed} with another choice than the package's; wrote {path}")
        if not choices.is_tuned():
            say(f"{choices.VARIABLE}=0 is set: the table does not count")
    for fault in wrong:
        print(printable(f"{PROGRAM}: error: {fault}"), file=sys.stderr)
    return 1 if wrong else 0


def _tune(task: Task, device: torch.device, options: argparse.Namespace) -> Outcome:
    from alexnet_kernels.bench import tuning

    outcome = tuning.tune(task, device, options.seconds)
    tuning.write(device, [outcome])  # after each, so that an interruption loses none
    if not options.json:
        end = "kept" if outcome.name == outcome.committed else f"in place of {outcome.committed}"
        say(f"{outcome.label}: {outcome.name}, {end}; {_times(outcome.row)}")
        sys.stdout.flush()
    return outcome


def _times(row: Row) -> str:
    """Of each implementation, its passes in microseconds."""
    parts = []
    for name, passes in row.times.items():
        times = [f"{passed} {time:,.1f}" if len(passes) > 1 else f"{time:,.1f}" for passed, time in passes.items()]
        parts.append(f"{name} {' and '.join(times)} us")
    return ", ".join(parts) or "no times"


def _show(device: torch.device, as_json: bool) -> int:
    rows = choices.in_force(device)
    if as_json:
        found = [row.to_json() | {"source": row.source} for row in rows]
        print(json.dumps(status(device) | {"rows": found, "rules": choices.RULES}))
        return 0
    say(describe(device))
    for row in rows:
        say(f"{_of(row)}: {row.name} ({row.source}); {_times(row)}{'; ' if row.note else ''}{row.note}")
    say("where no row is near:")
    for name, rule in choices.RULES.items():
        say(f"  {name}: {rule} (heuristic)")
    return 0


def _of(row: Row) -> str:
    sizes = row.kind.sizes
    if "elements" in sizes:
        shape = f"about {sizes['elements']:,} elements"
    else:
        bare = "" if sizes["epilogue"] else ", no bias or ReLU"
        shape = (
            f"{sizes['filters']} filters of {sizes['channels']} x {sizes['kernel_height']} x {sizes['kernel_width']}, "
            f"stride {sizes['stride_height']} x {sizes['stride_width']}, {sizes['groups']} groups, "
            f"about {sizes['rows']:,} pixels{bare}"
        )
    kind = row.kind
    return f"{kind.op} {kind.direction}, {kind.device}, {kind.dtype}, {kind.format}, {shape}"


def _reset(device: torch.device, as_json: bool) -> int:
    removed = tuned.remove(device)
    choices.forget()
    if as_json:
        print(json.dumps({"removed": None if removed is None else str(removed)}))
    else:
        say(f"removed {removed}" if removed else f"there is no table for {tuned.identity(device)['device']}")
    return 0


def status(device: torch.device) -> dict[str, Any]:
    """Whether the user's table counts, its file, and how many rows it has and the package's has for the device."""
    try:
        file: str | None = str(tuned.path_of(device))
    except RuntimeError:
        file = None
    rows: Sequence[Row] = choices.in_force(device)
    user = len(choices.user_rows(device))
    return {"tuned": choices.is_tuned(), "file": file, "user_rows": user, "package_rows": len(rows) - user}


def describe(device: torch.device) -> str:
    """The table in force, in a line."""
    found = status(device)
    if not found["tuned"]:
        user = f"the user's does not count ({choices.VARIABLE}=0 or set_tuned(False))"
    elif found["user_rows"]:
        user = f"{found['user_rows']} rows of {found['file']}"
    else:
        user = f"no table of the user's; `{PROGRAM} tune` writes one"
    return f"choices for {device}: {user}, then {found['package_rows']} rows of the package, then rules"
