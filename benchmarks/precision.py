"""Compares the accuracy that training reaches in float32, in bfloat16 by autocast and in pure bfloat16.

    python benchmarks/precision.py [DATA] [--runs FOLDER] [--seeds N] [--epochs N] [--recipe NAME] [--width X]
        [--threads N] [--out FILE]

Trains a recipe in each precision from several seeds; DATA is as for `alexnet-kernels train`, by default the package's
images. Runs of a seed have the same initial float32 weights, order, crops and dropout masks. Each run has its own
folder below --runs: unfinished runs are resumed, finished ones are not repeated. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from ablation import history_of, spread

from alexnet_kernels.bench.machine import commit, cpu
from alexnet_kernels.training.settings import settings_of

PRECISIONS = {"32": "float32", "bf16": "bfloat16 by autocast", "bf16-pure": "pure bfloat16, float32 masters"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="the image set (default: the package's images)")
    parser.add_argument("--runs", type=Path, default=Path("runs/precision"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    histories: dict[str, list[list[dict[str, float]]]] = {precision: [] for precision in PRECISIONS}
    for seed in range(options.seeds):
        for precision, runs in histories.items():
            changes = {"epochs": options.epochs, "width": options.width, "seed": seed, "precision": precision}
            folder = options.runs / f"{options.recipe}-{precision}-width{options.width:g}-{options.epochs}-{seed}"
            runs.append(history_of(settings_of(options.recipe, **changes), options.data, folder))
            print(f"{folder.name}: validation error {1 - runs[-1][-1]['val_top1']:.2%}", flush=True)
    _write(options, histories)


def _write(options: argparse.Namespace, histories: dict[str, list[list[dict[str, float]]]]) -> None:
    steps = int(histories["32"][0][-1]["step"])
    facts = {
        "data": "the package's images" if options.data is None else Path(options.data).name,
        "recipe": f"{options.recipe}, width {options.width:g}, {options.epochs} epochs ({steps} steps), "
        f"seeds 0 to {options.seeds - 1}",
        "torch": torch.__version__,
        "cpu": cpu(),
        "threads": options.threads,
        "commit": commit() or "unknown",
    }
    rows = []
    for precision, runs in histories.items():
        last = [run[-1] for run in runs]
        base = [run[-1] for run in histories["32"]]
        rows.append(
            {
                "precision": precision,
                "val_loss": [row["val_loss"] for row in last],
                "val_error": [100 * (1 - row["val_top1"]) for row in last],
                "difference": [100 * (b["val_top1"] - a["val_top1"]) for a, b in zip(last, base, strict=True)],
                "train_loss": [row["train_loss"] for row in last],
                "histories": runs,
            }
        )
    options.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    lines = ["# Accuracy by precision", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "After the last epoch, mean and range over the seeds: top-1 error in percent on the validation images, its",
        "difference from float32 seed by seed, and the losses. The recipe's schedule is shortened to these epochs.",
        "",
        "| `--precision` | | validation error | difference | validation loss | training loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row["precision"] == "32" else spread(row["difference"], "+.1f")
        lines.append(
            f"| `{row['precision']}` | {PRECISIONS[row['precision']]} | {spread(row['val_error'], '.1f')} "
            f"| {difference} | {spread(row['val_loss'], '.3f')} | {spread(row['train_loss'], '.3f')} |"
        )
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
