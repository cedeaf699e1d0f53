"""`alexnet-kernels train`"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from alexnet_kernels import _library
from alexnet_kernels._errors import InputError, RunError, printable, require
from alexnet_kernels._files import write_errors
from alexnet_kernels.cli.arguments import (
    PROGRAM,
    add_bad_images,
    add_device,
    add_reading,
    count,
    duration,
    elapsed,
    numbers,
    path,
    positive,
    reading_of,
    use_backend,
    workers_of,
)
from alexnet_kernels.parallel import PLANS
from alexnet_kernels.training.devices import pick_device
from alexnet_kernels.training.distributed.config import TIMEOUT, ParallelConfig
from alexnet_kernels.training.distributed.launcher import launch
from alexnet_kernels.training.settings import Settings, default_recipe, recipe_names, settings_of

if TYPE_CHECKING:
    from alexnet_kernels.training.run import Result
    from alexnet_kernels.training.spec import RunSpec

__all__ = ["add_parser", "run"]

_SETTINGS = tuple(setting.name for setting in fields(Settings))
_FILES = (
    ("best.ckpt", "the network of that epoch"),
    ("last.ckpt", "the last state"),
    ("metrics.csv", "every epoch's figures"),
    ("layers.csv", "every layer's |w| and |dw| after each epoch"),
    ("filters.png", "conv1's filters"),
    ("curves.png", "loss and error"),
    ("predictions.png", "some validation images and their five likeliest classes"),
    ("neighbours.png", "some validation images and the training images with the nearest features"),
    ("tensorboard", "the same for TensorBoard"),
    ("recipe.yaml", "every setting, for --recipe"),
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a network; without arguments, on the images that come with the package",
        description="Trains an AlexNet, without arguments on 4000 small images that come with the package.",
    )
    add = parser.add_argument
    add("--data", type=path, metavar="PATH",
        help="a folder that `prepare` wrote, or a folder or zip with train/<class>/ and val/<class>/ "
        "images")  # fmt: skip
    add_bad_images(parser)
    add_reading(parser)
    add("--workers", type=count, metavar="N",
        help="processes that read a set too large for memory, threads for a prepared set (default: one per core, "
        "up to 8)")  # fmt: skip
    add("--out", type=path, metavar="FOLDER", help="new folder for the run (default: the next free runs/<preset>-<n>)")
    add(
        "--resume",
        type=path,
        metavar="RUN",
        help="resume from a run's folder or checkpoint, in its folder, with its settings",
    )
    add("--seeds", type=positive, metavar="N",
        help="the same run with N seeds, from --seed on: one after the other, or one a GPU; mean and spread of every "
        "figure")  # fmt: skip
    add("--max-time", type=duration, metavar="TIME", help="stop after, say, 90s, 10m or 1h30m; can be resumed")
    add("--save-every", type=positive, default=1000, metavar="N",
        help="steps between checkpoints inside an epoch (default: 1000; one also after each epoch)")  # fmt: skip
    add("--log-every", type=_interval, default=60.0, metavar="SECONDS",
        help="time between two lines of progress inside an epoch, if the output is not a terminal; 0 for none "
        "(default: 60)")  # fmt: skip
    add_device(parser)
    add("--no-graph", action="store_true",
        help="do not run the training step on a GPU as one CUDA graph; the results are the same bits")  # fmt: skip
    _add_parallel(parser)
    _add_settings(parser)
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    return 0.0 if text == "0" else duration(text)


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "One network on several GPUs or processor cores, on this machine or, started by torchrun, on several "
        "machines. See docs/parallel.md.",
    )
    add = group.add_argument
    add("--parallel", choices=PLANS,
        help="towers: filters and neurons in two halves, as in the paper; hybrid: images for the convolutions, neurons "
        "for fc6 to fc8; data: images")  # fmt: skip
    add("--processes", type=positive, metavar="N", help="(default: one per GPU, without GPUs two)")
    add("--towers", type=positive, default=2, metavar="N", help="processes that share a network (default: 2)")
    add("--traffic", choices=("bf16", "16"),
        help="dtype of the activations sent between processes (default: as computed)")  # fmt: skip
    add("--fully-sharded", action="store_true",
        help="shard the parameters that data-parallel processes share, by FSDP2's fully_shard")  # fmt: skip
    add("--timeout", type=duration, default=TIMEOUT, metavar="TIME",
        help="time without a finished step after which the run counts as hung (default: 10m)")  # fmt: skip


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "settings", "What the result depends on. A recipe sets them, an option overrides the recipe's value."
    )
    group.add_argument(
        "--recipe",
        type=path,
        metavar="NAME",
        help=f"{', '.join(recipe_names())}, or a .yaml file, such as the recipe.yaml that every run leaves "
        "(default: quick for the package's images; with --data the preset's)",
    )
    types: dict[str, Callable[[str], Any]] = {"int": count, "float": float, "str": str}
    for setting in fields(Settings):
        choices, type_ = setting.metadata["choices"], str(setting.type)
        group.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=types.get(type_, numbers),
            choices=choices,
            metavar=None if choices else {"int": "N", "float": "X"}.get(type_, "N,N"),
            help=setting.metadata["help"],
        )


def run(options: argparse.Namespace) -> int:
    use_backend(options)
    require(f"{PROGRAM} train", "PIL", "rich", "matplotlib", "torchmetrics", "yaml", "tensorboard", "lightning")
    parallel = _parallel(options)
    if options.seeds is not None or (options.resume is not None and _is_of_seeds(options.resume)):
        return _run_seeds(options)
    if parallel is not None and "RANK" not in os.environ:
        return _launch(options, parallel)
    from rich.console import Console

    from alexnet_kernels.training.run import train

    console, speaks = Console(), parallel is None or int(os.environ.get("RANK", "0")) == 0
    if speaks and (reason := _library.slow_path(pick_device(options.device))):
        console.print(f"without this package's kernels: {reason}", highlight=False, soft_wrap=True, markup=False)
    result = train(_spec(options, parallel), console)
    if speaks:
        _print_summary(result, console, parallel)
    return 130 if result.stopped == "interrupted" else 0


def _spec(options: argparse.Namespace, parallel: ParallelConfig | None) -> RunSpec:
    from alexnet_kernels.training.spec import new_run, resumed_run

    common = {**_common(options), "parallel": parallel}
    if options.resume is None:
        return new_run(_settings(options, parallel is not None), options.data, options.out, **common)
    _refuse_with_resume(options)
    return resumed_run(options.resume, _given(options), options.data, **common)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}


def _settings(options: argparse.Namespace, parallel: bool) -> Settings:
    recipe = options.recipe or default_recipe(options.data is None, options.preset, parallel)
    return settings_of(recipe, **_given(options))


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `RunSpec`."""
    return {
        "device": options.device,
        "workers": workers_of(options),
        "max_seconds": options.max_time,
        "save_every": options.save_every,
        "log_every": options.log_every,
        "bad_images": options.bad_images,
        "reading": reading_of(options),
        "graph": not options.no_graph,
    }


def _refuse_with_resume(options: argparse.Namespace) -> None:
    if options.out is not None:
        raise InputError("--out can't be used with --resume, which continues in the run's own folder")
    if options.recipe is not None:
        raise InputError("--recipe can't be used with --resume, which continues with the run's own settings")


def _is_of_seeds(folder: str) -> bool:
    from alexnet_kernels.training.seeds import INDEX

    return os.path.isfile(os.path.join(folder, INDEX))


def _run_seeds(options: argparse.Namespace) -> int:
    from rich.console import Console

    from alexnet_kernels.cli import seeds
    from alexnet_kernels.training.run_folder import lock
    from alexnet_kernels.training.seeds import SeedRuns
    from alexnet_kernels.training.spec import check_given

    if options.parallel is not None:
        raise InputError("--seeds can't be used with --parallel: start a run for each --seed")
    console, devices = Console(), seeds.devices_of(options.device)
    if options.resume is None:
        runs = SeedRuns.create(_settings(options, False), options.seeds, options.data, options.out, reading_of(options))
    else:
        _refuse_with_resume(options)
        runs = SeedRuns.read(options.resume).extended(options.seeds)
        check_given(_given(options), runs.settings, runs.folder)
    with lock(runs.folder):
        if options.resume is not None and options.seeds is not None:
            with write_errors(runs.folder):
                runs.write_index()
        try:
            if len(devices) > 1:
                status = seeds.run_side_by_side(runs, devices, options)
            else:
                status = seeds.run_in_turn(runs, {**_common(options), "data": options.data}, _given(options), console)
        finally:
            if options.resume is None:
                runs.remove_if_unused()
        figures = runs.figures()
        if figures:
            with write_errors(runs.folder):
                runs.write_figures(figures)
            seeds.summarize(runs, figures, console)
    if status == seeds.FAILED:
        failed = len(runs.seeds) - len(figures)
        raise RunError(f"{failed} of {len(runs.seeds)} seeds have not finished; {seeds.resume_hint(runs)}")
    return status


def _parallel(options: argparse.Namespace) -> ParallelConfig | None:
    if options.parallel is None:
        for name, default in (("processes", None), ("towers", 2), ("traffic", None), ("fully_sharded", False)):
            if getattr(options, name) != default:
                raise InputError(f"--{name.replace('_', '-')} needs --parallel")
        return None
    if options.device.startswith("cuda:"):
        raise InputError(f"--device {options.device} can't be used with --parallel, whose processes take a GPU each")
    return ParallelConfig(options.parallel, options.towers, options.traffic, options.fully_sharded, options.timeout)


def _launch(options: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Run the command in several processes of this machine, after checking its arguments."""
    gpus = torch.cuda.device_count() if pick_device(options.device).type == "cuda" else 0
    processes = options.processes or gpus or 2
    if gpus and processes > gpus:
        raise InputError(f"--processes {processes} need as many GPUs, there are {gpus}; --device cpu needs none")
    parallel.check(processes, _spec(options, parallel).settings)
    return launch(processes, options.arguments)


def _print_summary(result: Result, console: Any, parallel: ParallelConfig | None) -> None:
    def say(text: str) -> None:
        console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    if result.skipped:
        say(f"left out {len(result.skipped)} unreadable images: {'; '.join(result.skipped[:5])}")
    if result.ignored:
        say(f"ignored {result.ignored} files that are hidden, in no class or not taken for images")
    if result.best:
        best, last = result.best, result.history[-1]
        say(
            f"top-1 {best['val_top1']:.1%}  top-5 {best['val_top5']:.1%}  on the validation images, epoch "
            f"{best['epoch']} (chance: {1 / result.classes:.1%})"
        )
        say(f"{last['images_per_s']:.0f} images/s in training; {elapsed(result.seconds)} in all")
        for name, what in _FILES:
            if (result.folder / name).exists():
                say(f"  {result.folder / name}  {what}")
    if result.stopped is not None:
        split = "" if parallel is None else parallel.resume_options()
        say(f"{result.stopped}; resume with: {PROGRAM} train --resume {result.folder}{split}")
