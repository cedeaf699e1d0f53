"""Measures the effect of each part that the paper argues for, on images of CIFAR-10's size.

    python benchmarks/ablation.py DATA [--runs FOLDER] [--seeds N] [--epochs N] [--width X] [--threads N] [--out FILE]

Trains recipe `cifar` unchanged, and with one part changed at a time, from several seeds; DATA is as for
`alexnet-kernels train`. Each network uses the learning rate of --rates with the lowest validation error in a run of a
tenth of the epochs, as the paper chose its rates. Each run has its own folder below --runs: unfinished runs are
resumed, finished ones are not repeated. Writes OUT.json and OUT.md with the results after the last epoch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from alexnet_kernels._errors import RunError
from alexnet_kernels.bench.machine import commit, cpu
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.run import train
from alexnet_kernels.training.settings import Settings, settings_of
from alexnet_kernels.training.spec import new_run, resumed_run

WHOLE = "whole"


@dataclass
class Variation:
    name: str
    claim: str
    """The paper's section and sentence."""
    settings: dict[str, Any] = field(default_factory=dict)


VARIATIONS = [
    Variation(WHOLE, "ReLU, overlapping pooling, local response normalisation, dropout 0.5"),
    Variation("tanh for ReLU", "3.1: ReLUs train several times faster", {"activation": "tanh"}),
    Variation("pooling 2 x 2", "3.4: overlapping lowers top-1 error by 0.4%", {"pooling": "plain"}),
    Variation("no normalisation", "3.3: it lowers top-1 error by 1.4%; by 2% on CIFAR-10", {"norm": "none"}),
    Variation("no dropout", "4.2: without it the network overfits substantially", {"dropout": 0.0}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the image set, as for `alexnet-kernels train`")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0025, 0.005, 0.01, 0.02])
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ablation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {variation.name: _best_rate(variation, options) for variation in VARIATIONS}
    histories: dict[str, list[list[dict[str, float]]]] = {variation.name: [] for variation in VARIATIONS}
    for seed in range(options.seeds):
        for variation in VARIATIONS:
            history = _history(variation, options, rates[variation.name], seed, options.epochs)
            histories[variation.name].append(history)
    _write(options, rates, histories)


def _best_rate(variation: Variation, options: argparse.Namespace) -> float:
    epochs = max(1, options.epochs // 10)
    errors = {}
    for rate in options.rates:
        try:
            errors[rate] = 1 - _history(variation, options, rate, 0, epochs)[-1]["val_top1"]
        except RunError as error:
            print(f"{variation.name} at rate {rate:g}: {error}", flush=True)
    return min(errors, key=lambda rate: errors[rate])


def _history(
    variation: Variation, options: argparse.Namespace, rate: float, seed: int, epochs: int
) -> list[dict[str, float]]:
    folder = options.runs / f"{variation.name.replace(' ', '_')}-lr{rate:g}-{epochs}-{seed}"
    changes = {"lr": rate, "epochs": epochs, "width": options.width, "seed": seed}
    history = history_of(settings_of("cifar", precision="32", **changes, **variation.settings), options.data, folder)
    print(f"{folder.name}: validation error {1 - history[-1]['val_top1']:.2%}", flush=True)
    return history


def history_of(settings: Settings, data: str | None, folder: Path) -> list[dict[str, float]]:
    """The figures of the run in `folder`, which is begun or resumed unless it is finished."""
    last = folder / "last.ckpt"
    if last.exists():
        saved = checkpoint.load(last, mmap=True)
        if saved.header.settings != settings:
            sys.exit(f"{folder} holds a run with other settings; name another --runs")
        if len(saved.history.epochs) == settings.epochs:
            return saved.history.epochs
        result = train(resumed_run(folder, data=data))
    else:
        # Remains of a run that was killed before its first checkpoint, or that diverged.
        shutil.rmtree(folder, ignore_errors=True)
        result = train(new_run(settings, data, folder))
    if result.stopped:
        sys.exit(f"{result.stopped}; run the same command to continue")
    return result.history


def _write(
    options: argparse.Namespace, rates: dict[str, float], histories: dict[str, list[list[dict[str, float]]]]
) -> None:
    facts = {
        "data": Path(options.data).name,
        "recipe": f"cifar, width {options.width:g}, {options.epochs} epochs, seeds 0 to {options.seeds - 1}",
        "torch": torch.__version__,
        "cpu": cpu(),
        "threads": options.threads,
        "commit": commit() or "unknown",
    }
    rows = []
    for variation in VARIATIONS:
        runs = histories[variation.name]
        errors = [100 * (1 - run[-1]["val_top1"]) for run in runs]
        # Runs of the same seed have the same order, crops and, where the networks agree, initial values.
        whole = [100 * (1 - run[-1]["val_top1"]) for run in histories[WHOLE]]
        rows.append(
            {
                "variation": variation.name,
                "claim": variation.claim,
                "lr": rates[variation.name],
                "val_error": errors,
                "difference": [error - base for error, base in zip(errors, whole, strict=True)],
                "train_error": [100 * (1 - run[-1]["train_top1"]) for run in runs],
                "epochs_to_half": [_reached(run, 0.5) for run in runs],
                "histories": runs,
            }
        )
    options.out.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    lines = ["# The paper's parts, one changed at a time", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += [
        "",
        "Top-1 error on the validation images after the last epoch, mean and range over the seeds; its difference",
        "from the whole network, seed by seed; the training error in the last epoch, with crops and dropout; and the",
        "first epoch with less than 50% validation error.",
        "",
        "| | rate | validation error | difference | training error | epochs to 50% | the paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row["variation"] == WHOLE else spread(row["difference"], "+.1f")
        epochs = ", ".join("never" if epoch is None else str(epoch) for epoch in row["epochs_to_half"])
        lines.append(
            f"| {row['variation']} | {row['lr']:g} | {spread(row['val_error'], '.1f')} | {difference} "
            f"| {spread(row['train_error'], '.1f')} | {epochs} | {row['claim']} |"
        )
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _reached(history: list[dict[str, float]], error: float) -> int | None:
    return next((int(row["epoch"]) for row in history if 1 - row["val_top1"] < error), None)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    main()
