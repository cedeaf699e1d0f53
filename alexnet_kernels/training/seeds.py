"""The same run with several seeds: its folder, what is left to do, and mean and spread of its figures.

FOLDER/seeds.json        the seeds and the path of the images
FOLDER/recipe.yaml       every setting, with the first seed
FOLDER/seed-<n>/         an ordinary run
FOLDER/seeds.csv         figures of each seed's best epoch
FOLDER/summary.csv       mean, spread and range of each figure, of the best and of the last epochs
FOLDER/epochs.csv        mean and standard deviation of each figure after each epoch
FOLDER/curves.png        loss and error over the epochs, with one standard deviation on either side
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels._files import local_path, portable_path, read_bounded, write_atomically, write_csv
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.datasets import reading_again
from alexnet_kernels.training.header import History
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.run_folder import RECIPE, lock, new_folder, refuse_existing
from alexnet_kernels.training.settings import Settings, save_recipe, settings_of
from alexnet_kernels.training.spec import RunSpec, check_given, is_finished, new_run, resumed_run

__all__ = ["INDEX", "MOST", "Figures", "SeedRuns", "epoch_rows", "summary_rows"]

INDEX = "seeds.json"
"""The file that makes a folder one of several seeds."""
MOST = 1000
"""Seeds of one folder."""
_FORMAT = 1
_LARGEST = 1 << 20
_COUNTS = ("epoch", "step")

Figures = Mapping[int, History]
"""The history of each seed."""


@dataclass(frozen=True)
class SeedRuns:
    """A folder of runs that differ in their seed alone."""

    folder: Path
    settings: Settings
    """Of the first seed."""
    seeds: tuple[int, ...]
    data: str | None
    """Path of the images, None for the package's."""
    reading: Reading = USUAL
    """How they are read."""

    @classmethod
    def create(
        cls, settings: Settings, count: int, data: str | None, out: str | Path | None, reading: Mapping[str, str]
    ) -> SeedRuns:
        """A new folder for `count` seeds from the settings' on. InputError if `out` exists; None: the next free one."""
        if not 1 <= count <= MOST:
            raise InputError(f"--seeds must be from 1 to {MOST}, got {count}")
        seeds, how = tuple(range(settings.seed, settings.seed + count)), Reading(**reading).resolved()
        replace(settings, seed=seeds[-1])  # checks it
        if out is not None:
            refuse_existing(Path(out))
        folder = new_folder(None if out is None else Path(out), settings.preset, may_exist=False)
        runs = cls(folder, settings, seeds, None if data is None else str(Path(data).resolve()), how)
        save_recipe(settings, folder / RECIPE)
        runs.write_index()
        return runs

    def write_index(self) -> None:
        """Write seeds.json."""
        data = None if self.data is None else portable_path(self.data)
        index = {"format": _FORMAT, "seeds": list(self.seeds), "data": data, "reading": asdict(self.reading)}
        write_atomically(self.folder / INDEX, json.dumps(index) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> SeedRuns:
        """The folder that `create` made. InputError if its files can't be used."""
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            raise InputError(f"{folder} is not a folder of several seeds: it has no {INDEX}")
        try:
            index = json.loads(read_bounded(path, _LARGEST))
            seeds, data, version = index["seeds"], index["data"], index["format"]
            reading = Reading.from_dict(index["reading"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged or of another kind") from error
        if version != _FORMAT:
            raise InputError(f"{path} is of format {shortened(version)}; this version reads format {_FORMAT}")
        right = isinstance(seeds, list) and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
        if not right or not 1 <= len(seeds) <= MOST or len(set(seeds)) < len(seeds):
            raise InputError(f"{path} lists no seeds, or seeds out of range")
        if not isinstance(data, str | None):
            raise InputError(f"{path} names no path of images")
        data = None if data is None else local_path(data)
        recipe = folder / RECIPE
        if not recipe.is_file():
            raise InputError(f"{recipe} is missing: it holds the settings of the seeds in {folder}")
        return cls(folder, settings_of(str(recipe)), tuple(seeds), data, reading)

    def extended(self, count: int | None) -> SeedRuns:
        """The same folder with `count` seeds, of which the new ones follow the last. InputError if it has more.

        `write_index` records them.
        """
        if count is None or count == len(self.seeds):
            return self
        if not len(self.seeds) < count <= MOST:
            raise InputError(f"--seeds {count}: {self.folder} has {len(self.seeds)}; from there to {MOST} are allowed")
        more = range(max(self.seeds) + 1, max(self.seeds) + 1 + count - len(self.seeds))
        replace(self.settings, seed=more[-1])
        return replace(self, seeds=(*self.seeds, *more))

    def remove_if_unused(self) -> None:
        """Remove a folder in which no run has begun, as after an error in the settings."""
        if not any(self.folder_of(seed).exists() for seed in self.seeds):
            shutil.rmtree(self.folder)

    def folder_of(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}"

    def unfinished(self) -> list[int]:
        """The seeds whose runs are not begun or not complete."""
        return [seed for seed in self.seeds if not self._is_finished(seed)]

    def _is_finished(self, seed: int) -> bool:
        path = self.folder_of(seed) / "last.ckpt"
        return path.is_file() and is_finished(checkpoint.load(path, mmap=True), path)

    def spec(
        self,
        seed: int,
        given: Mapping[str, Any],
        data: str | None = None,
        *,
        reading: Mapping[str, str] = MappingProxyType({}),
        **options: Any,
    ) -> RunSpec:
        """The run of a seed, new or resumed. Arguments as of `resumed_run`.

        A folder without a checkpoint, which a run leaves that is killed in its first steps, is removed.
        """
        folder = self.folder_of(seed)
        if (folder / "last.ckpt").is_file():
            return resumed_run(folder, {**given, "seed": seed}, data, reading=reading, **options)
        check_given(given, self.settings, self.folder)
        if folder.is_dir():
            if any(folder.glob("*.ckpt")):
                raise InputError(f"{folder} has no last.ckpt to resume from: remove it to train the seed again")
            # A process whose starter was killed may be in its first steps there.
            with lock(folder):
                shutil.rmtree(folder)
        accumulate = given.get("accumulate", self.settings.accumulate)
        settings = replace(self.settings, accumulate=accumulate, seed=seed)
        again = asdict(reading_again(self.reading, reading, data))
        return new_run(settings, data if data is not None else self.data, folder, reading=again, **options)

    def figures(self) -> Figures:
        """Of the seeds that have finished all their epochs."""
        found = {}
        for seed in self.seeds:
            path = self.folder_of(seed) / "last.ckpt"
            if path.is_file():
                history = checkpoint.load(path, mmap=True).history
                if len(history.epochs) >= self.settings.epochs:
                    found[seed] = history
        return found

    def write_figures(self, figures: Figures) -> None:
        """Write seeds.csv, summary.csv, epochs.csv and curves.png."""
        # Matplotlib is needed only here.
        from alexnet_kernels.training import pictures

        if not figures:
            return
        write_csv([{"seed": seed, **history.best()} for seed, history in figures.items()], self.folder / "seeds.csv")
        write_csv(summary_rows(figures), self.folder / "summary.csv")
        rows = epoch_rows(figures)
        write_csv(rows, self.folder / "epochs.csv")
        curves = [{name.removesuffix("_mean"): value for name, value in row.items()} for row in rows]
        spread = [{name.removesuffix("_std"): value for name, value in row.items()} for row in rows]
        pictures.curves(curves, self.folder / "curves.png", spread)


def _spread(values: Sequence[float]) -> float:
    """The sample standard deviation; nan of one value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def summary_rows(figures: Figures) -> list[dict[str, Any]]:
    """A row for each figure of the seeds' best epochs, and of their last: runs, mean, std, min, max.

    The best epoch is the first with the highest top-1. std is the sample standard deviation, with n - 1 in its divisor;
    nan for one seed.
    """
    rows = []
    for epoch in ("best", "last"):
        chosen = [history.best() if epoch == "best" else history.epochs[-1] for history in figures.values()]
        for name in chosen[0] if chosen else ():
            values = [row[name] for row in chosen]
            mean, std = statistics.fmean(values), _spread(values)
            row = {"epoch": epoch, "figure": name, "runs": len(values), "mean": mean, "std": std}
            rows.append({**row, "min": min(values), "max": max(values)})
    return rows


def epoch_rows(figures: Figures) -> list[dict[str, float]]:
    """A row for each epoch: the runs that finished it, and <figure>_mean and <figure>_std of each figure."""
    rows = []
    histories = [history.epochs for history in figures.values()]
    for i in range(max(map(len, histories), default=0)):
        reached = [history[i] for history in histories if len(history) > i]
        row: dict[str, float] = {"epoch": reached[0]["epoch"], "runs": len(reached)}
        for name in reached[0]:
            if name not in _COUNTS:
                values = [values[name] for values in reached]
                row |= {f"{name}_mean": statistics.fmean(values), f"{name}_std": _spread(values)}
        rows.append(row)
    return rows
