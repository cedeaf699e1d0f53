"""The command `alexnet-kernels`: prepare, train, evaluate, predict, convert, bench, throughput, info.

Exit status: 0; 1 for a run that failed; 2 for a mistake in what was asked; 130 where a run was interrupted.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alexnet_kernels import __version__, _library, backends
from alexnet_kernels._errors import InputError, MissingPackage, RunError, require
from alexnet_kernels._files import output_path, write_atomically, write_errors
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.models import PRESETS, AlexNet, count_parameters
from alexnet_kernels.parallel import PLANS
from alexnet_kernels.training.processes import TIMEOUT, Parallel, launch
from alexnet_kernels.training.settings import Settings, default_recipe, recipe_names, settings_of

if TYPE_CHECKING:
    from alexnet_kernels.training.run import Result

__all__ = ["main"]

PROGRAM = "alexnet-kernels"
_CHECKPOINT = "a .ckpt or .safetensors file, or a run's folder for its best"
_PICTURED = 40
_TABLE, _WORST = 50, 25
_SETTINGS = tuple(setting.name for setting in fields(Settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or the process's; returns its exit status."""
    options = _parser().parse_args(argv)
    options.arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is not None or not getattr(options, "parallel", None) or "RANK" not in os.environ:
        return _status_of(options)
    status = 1
    try:
        status = _status_of(options)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        # Threads of gloo's that still let go of tensors while Python shuts down abort the process, now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status_of(options: argparse.Namespace) -> int:
    try:
        return options.run(options)
    except (InputError, MissingPackage) as error:
        return _fail(str(error), 2)
    except RunError as error:
        return _fail(str(error), 1)
    except torch.OutOfMemoryError:
        return _fail("the device is out of memory: try a smaller --batch-size or --image-size", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read the output has gone; so that Python's exit doesn't find out again:
        sys.stdout = None  # type: ignore[assignment]
        return 1


def _fail(message: str, status: int) -> int:
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"{PROGRAM}: error: {rank}{message}", file=sys.stderr, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="AlexNet: train it, evaluate it, predict with it.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    _train_parser(commands)

    evaluate = commands.add_parser("evaluate", help="top-1 and top-5 of a checkpoint")
    evaluate.add_argument("checkpoint", help=_CHECKPOINT)
    evaluate.add_argument("--data", metavar="PATH", help="as for train; val/ is used (default: the package's images)")
    evaluate.add_argument("--ten-crop", action="store_true", help="average over ten crops, as in the paper")
    evaluate.add_argument("--batch-size", type=_positive, default=100, metavar="N")
    evaluate.add_argument("--per-class", action="store_true", help="print each class's figures, the worst first")
    evaluate.add_argument(
        "--confusion", metavar="PATH", help="write how often each class was taken for each, a .csv or .png file"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON, of all figures")
    _bad_images(evaluate)
    _where(evaluate)
    evaluate.set_defaults(run=_evaluate)

    predict = commands.add_parser("predict", help="the likeliest classes of images")
    predict.add_argument("checkpoint", help=_CHECKPOINT)
    predict.add_argument("images", nargs="+", metavar="image")
    predict.add_argument("--ten-crop", action="store_true", help="average over ten crops, as in the paper")
    predict.add_argument(
        "--picture", metavar="PATH", help=f"draw the images, {_PICTURED} at most, and their classes, a .png file"
    )
    predict.add_argument("--json", action="store_true", help="print JSON")
    _where(predict)
    predict.set_defaults(run=_predict)

    convert = commands.add_parser("convert", help="a checkpoint's network as a safetensors file")
    convert.add_argument("checkpoint", help=_CHECKPOINT)
    convert.add_argument("out", metavar="OUT.safetensors", help="a new file, which evaluate and predict take")
    convert.set_defaults(run=_convert)

    prepare = commands.add_parser(
        "prepare",
        help="images as memory-mapped squares, for training",
        description="Writes images of any size as squares that training reads without decoding them again. "
        "Stopped, the same command goes on.",
    )
    prepare.add_argument("source", help="a folder, or a zip of one, with <split>/<class>/ images")
    prepare.add_argument("destination", help="a new folder, or one that the same command began")
    prepare.add_argument("--size", type=_positive, default=256, metavar="PIXELS",
        help="side of the squares: shorter side resized, centre kept (default: 256)")  # fmt: skip
    prepare.add_argument("--splits", nargs="+", default=["train", "val"], metavar="NAME", help="(default: train val)")
    prepare.add_argument("--shard-images", type=_positive, default=4096, metavar="N",
        help="images in a file (default: 4096)")  # fmt: skip
    prepare.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one a core, up to 16)")
    _bad_images(prepare, "skip")
    prepare.set_defaults(run=_prepare)

    _bench_parser(commands)

    throughput = commands.add_parser(
        "throughput",
        help="images/s of reading, augmentation and training, each by itself",
        description="Measures the input side of training and, beside it, the network's step, each by itself.",
    )
    throughput.add_argument("--data", metavar="PATH", help="as for train (default: the package's images)")
    throughput.add_argument("--recipe", metavar="NAME", help="as for train")
    throughput.add_argument("--preset", choices=tuple(PRESETS), help="the network (default: the recipe's)")
    throughput.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="of the input (default: the recipe's)"
    )
    throughput.add_argument("--batch-size", type=_positive, metavar="N", help="(default: the recipe's)")
    throughput.add_argument("--workers", type=_count, metavar="N", help="as for train")
    throughput.add_argument("--seconds", type=_duration, default=5.0, metavar="TIME", help="of each part (default: 5s)")
    throughput.add_argument("--json", action="store_true", help="print JSON")
    _bad_images(throughput)
    _where(throughput)
    throughput.set_defaults(run=_throughput)

    info = commands.add_parser("info", help="versions, device, backends of each op, presets")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _bench_parser(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="every op and network against its peers",
        description="Times every op at AlexNet's layers, and whole networks, beside PyTorch's operators, "
        "torch.compile, torchvision, ONNX Runtime and what else is installed, after checking that all compute the "
        "same. The exit status is 1 if one of this package's is wrong or can't run.",
    )
    add = bench.add_argument
    add("what", nargs="*", metavar="ops|nets", help="(default: both)")
    add("--only", metavar="REGEX", help="rows whose name it finds; --list prints the names")
    add("--list", action="store_true", help="print the rows and their variants, and measure nothing")
    add("--batches", type=_numbers, metavar="N,N", help="(default: 1,32; on a GPU 1,32,128,256,1024)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    add("--seconds", type=_duration, default=1.0, metavar="TIME",
        help="of a row's variants together, each direction (default: 1s); at least five rounds")  # fmt: skip
    add("--rounds", type=_positive, default=15, metavar="N", help="at most (default: 15)")
    add("--smoke", action="store_true", help="every op, network and peer once, small: whether they work")
    add("--out", type=Path, metavar="PREFIX", help="write PREFIX.json, PREFIX.md and pictures, PREFIX_*.png")
    add("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"),
        help="print what changed between two .json files; the exit status is 1 if something got slower")  # fmt: skip
    add("--threshold", type=float, default=0.1, metavar="PART", help="of --compare: a change to tell (default: 0.1)")
    bench.set_defaults(run=_bench)


def _train_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a network; without arguments, on the images that come with the package",
        description="Trains an AlexNet, without arguments on 4000 small images that come with the package.",
    )
    add = train.add_argument
    add(
        "--data",
        metavar="PATH",
        help="what `prepare` made, or a folder, or a zip of one, with train/<class>/ and val/<class>/ images",
    )
    _bad_images(train)
    add("--workers", type=_count, metavar="N",
        help="processes that read a set too large for memory (default: one a core, up to 8)")  # fmt: skip
    add("--out", metavar="FOLDER", help="of the run, a new one (default: the next free runs/<preset>-<n>)")
    add("--resume", metavar="RUN", help="go on with a run's folder or checkpoint, in its folder, with its settings")
    add("--max-time", type=_duration, metavar="TIME", help="stop after, say, 90s, 10m or 1h30m; can be resumed")
    add("--save-every", type=_positive, default=1000, metavar="N",
        help="steps between checkpoints inside an epoch (default: 1000; one after each epoch, too)")  # fmt: skip
    _where(train)
    processes = train.add_argument_group(
        "several processes",
        "One network on several GPUs or processor cores, here or, started by torchrun, on several "
        "machines. See docs/parallel.md.",
    )
    add = processes.add_argument
    add("--parallel", choices=PLANS,
        help="towers: filters and neurons in two halves, as in the paper; hybrid: images for the convolutions, neurons "
        "for fc6 to fc8; data: images")  # fmt: skip
    add("--processes", type=_positive, metavar="N", help="(default: one a GPU, without GPUs two)")
    add("--towers", type=_positive, default=2, metavar="N", help="processes that share a network (default: 2)")
    add("--traffic", choices=("bf16", "16"), help="bits of activations between processes (default: as computed)")
    add(
        "--fully-sharded",
        action="store_true",
        help="leave each process with a part of what the data-parallel ones have in common, by FSDP2's fully_shard",
    )
    add("--timeout", type=_duration, default=TIMEOUT, metavar="TIME",
        help="without a finished step, after which a run is taken to hang (default: 10m)")  # fmt: skip
    settings = train.add_argument_group(
        "settings", "What the result depends on. A recipe fills them in, an option replaces the recipe's value."
    )
    settings.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"{', '.join(recipe_names())}, or a .yaml file, such as the recipe.yaml that every run leaves "
        "(default: quick for the package's images; with --data the preset's)",
    )
    for setting in fields(Settings):
        option, choices, type_ = "--" + setting.name.replace("_", "-"), setting.metadata["choices"], str(setting.type)
        settings.add_argument(
            option,
            type={"int": _count, "float": float, "str": str}.get(type_, _numbers),
            choices=choices,
            metavar=None if choices else {"int": "N", "float": "X"}.get(type_, "N,N"),
            help=setting.metadata["help"],
        )
    train.set_defaults(run=_train)


def _where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<n> (default: auto)")
    parser.add_argument("--backend", choices=backends.BACKENDS, help="of the ops (default: auto)")


def _bad_images(parser: argparse.ArgumentParser, default: str = "refuse") -> None:
    parser.add_argument(
        "--bad-images",
        choices=("refuse", "skip"),
        default=default,
        help=f"unreadable images (default: {default})",
    )


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 expected")
    return value


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: not negative expected")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    """Of 30,60,80."""
    return tuple(_count(part) for part in text.split(",") if part)


def _duration(text: str) -> float:
    """Seconds of 90, 90s, 10m, 1h30m."""
    total, number, units = 0.0, "", {"h": 3600, "m": 60, "s": 1}
    try:
        for letter in text:
            if letter in units:
                total += float(number) * units.pop(letter)
                number = ""
            else:
                number += letter
        total += float(number) if number else 0.0
    except ValueError:
        total = 0.0
    if not 0 < total < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 10m or 1h30m")
    return total


def _workers(options: argparse.Namespace, most: int = 8) -> int:
    """As asked, or one a core up to `most`."""
    return min(most, os.cpu_count() or 1) if options.workers is None else options.workers


def _use_backend(options: argparse.Namespace) -> None:
    if options.backend is None:
        return
    missing = [(row["op"], row["backends"].get(options.backend, "available")) for row in backends.report()]
    if options.backend != "auto":
        for op, state in missing:
            if state != "available":
                raise InputError(f"--backend {options.backend} is not available for {op}: {state}")
    backends.set_backend(options.backend)


def _settings(options: argparse.Namespace) -> Settings:
    values = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    recipe = options.recipe or default_recipe(options.data is None, options.preset, options.parallel is not None)
    return settings_of(recipe, **values)


def _resumed_settings(options: argparse.Namespace) -> Settings:
    """The checkpoint's, which options may repeat and not change, but for --accumulate."""
    from alexnet_kernels.training import checkpoint

    if options.out is not None:
        raise InputError("--out can't be used with --resume, which goes on in the run's own folder")
    if options.recipe is not None:
        raise InputError("--recipe can't be used with --resume, which goes on with the run's own settings")
    path = checkpoint.find(options.resume, "last.ckpt")
    settings = checkpoint.load(path, mmap=True)[0].settings
    for name in _SETTINGS:
        given, saved = getattr(options, name), getattr(settings, name)
        if given is not None and given != saved and name != "accumulate":
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} {given} can't be used with --resume: {path} was begun with {saved}")
    return settings


def _train(options: argparse.Namespace) -> int:
    _use_backend(options)
    require(f"{PROGRAM} train", "PIL", "rich", "matplotlib", "torchmetrics", "yaml", "tensorboard", "lightning")
    parallel = _parallel(options)
    if parallel is not None and "RANK" not in os.environ:
        return _launch(options, parallel)
    return _run(options, parallel)


def _run(options: argparse.Namespace, parallel: Parallel | None) -> int:
    settings = _settings(options) if options.resume is None else _resumed_settings(options)

    from rich.console import Console

    from alexnet_kernels.training.run import train

    console = Console()
    keep_freed_memory()
    result = train(
        settings,
        options.data,
        out=options.out,
        resume=options.resume,
        device=options.device,
        workers=_workers(options),
        max_seconds=options.max_time,
        save_every=options.save_every,
        accumulate=options.accumulate,
        bad_images=options.bad_images,
        parallel=parallel,
        console=console,
    )
    if int(os.environ.get("RANK", "0")) == 0 or parallel is None:
        _summary(result, console, parallel)
    return 130 if result.stopped == "interrupted" else 0


def _parallel(options: argparse.Namespace) -> Parallel | None:
    if options.parallel is None:
        for name, default in (("processes", None), ("towers", 2), ("traffic", None), ("fully_sharded", False)):
            if getattr(options, name) != default:
                raise InputError(f"--{name.replace('_', '-')} needs --parallel")
        return None
    if options.device.startswith("cuda:"):
        raise InputError(f"--device {options.device} can't be used with --parallel, whose processes take a GPU each")
    return Parallel(options.parallel, options.towers, options.traffic, options.fully_sharded, options.timeout)


def _launch(options: argparse.Namespace, parallel: Parallel) -> int:
    """The run in processes of this machine; what can be refused is refused before any starts."""
    from alexnet_kernels.training.inference import pick_device

    gpus = torch.cuda.device_count() if pick_device(options.device).type == "cuda" else 0
    count = options.processes or gpus or 2
    if gpus and count > gpus:
        raise InputError(f"--processes {count} need as many GPUs, there are {gpus}; --device cpu needs none")
    settings = _settings(options) if options.resume is None else _resumed_settings(options)
    if options.accumulate is not None:
        settings = replace(settings, accumulate=options.accumulate)
    parallel.check(count, settings)
    return launch(count, options.arguments)


def _summary(result: Result, console: Any, parallel: Parallel | None) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    if result.skipped:
        say(f"left out {len(result.skipped)} unreadable images: {'; '.join(result.skipped[:5])}")
    if result.best:
        best = result.best
        last = result.history[-1]
        say(
            f"top-1 {best['val_top1']:.1%}  top-5 {best['val_top5']:.1%}  on the validation images, epoch "
            f"{best['epoch']} (chance: {1 / result.classes:.1%})"
        )
        say(f"{last['images_per_s']:.0f} images/s in training; {_time(result.seconds)} in all")
        for name, what in (
            ("best.ckpt", "the network of that epoch"),
            ("last.ckpt", "the last state"),
            ("metrics.csv", "every epoch's figures"),
            ("layers.csv", "every layer's |w| and |dw| after each epoch"),
            ("filters.png", "conv1's filters"),
            ("curves.png", "loss and error"),
            ("predictions.png", "some validation images and their five likeliest classes"),
            ("neighbours.png", "and the training images most like them to the network"),
            ("tensorboard", "the same for TensorBoard"),
            ("recipe.yaml", "every setting, for --recipe"),
        ):
            if (result.folder / name).exists():
                say(f"  {result.folder / name}  {what}")
    if result.stopped is not None:
        how = "" if parallel is None else parallel.option()
        say(f"{result.stopped}; go on with: {PROGRAM} train --resume {result.folder}{how}")


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _evaluate(options: argparse.Namespace) -> int:
    _use_backend(options)
    table = options.per_class and not options.json
    picture = options.confusion is not None and options.confusion.lower().endswith(".png")
    require(f"{PROGRAM} evaluate", "PIL", "torchmetrics", *["rich"] * table, *["matplotlib"] * picture)
    from alexnet_kernels.training import checkpoint, inference

    if options.confusion is not None:
        output_path(options.confusion, ".csv", ".png", option="--confusion")
    network = checkpoint.load_network(options.checkpoint, inference.pick_device(options.device))
    data = options.data or network.header.data or None
    crops = 10 if options.ten_crop else 1
    result = inference.evaluate(
        network, data, crops=crops, batch_size=options.batch_size, bad_images=options.bad_images
    )
    if options.confusion is not None:
        _write_confusion(result["confusion"], network.header.classes, Path(options.confusion))
    if options.json:
        print(json.dumps({**result, "crops": crops}))
        return 0
    if skipped := result["skipped"]:
        print(f"left out {len(skipped)} unreadable images: {'; '.join(skipped[:5])}")
    print(
        f"top-1 {result['top1']:.2%}  top-5 {result['top5']:.2%}  of {result['images']} images, "
        f"{crops} crop{'s' * (crops > 1)}, preset {network.header.settings.preset}"
    )
    if table:
        _print_classes(result["per_class"], result["confusion"])
    return 0


def _write_confusion(counts: list[list[int]], classes: list[str], path: Path) -> None:

    if path.suffix.lower() == ".png":
        from alexnet_kernels.training import pictures

        with write_errors(path):
            pictures.confusion(counts, classes, path)
        return
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["true", *classes])
    rows.writerows([name, *row] for name, row in zip(classes, counts, strict=True))
    with write_errors(path):
        write_atomically(path, text.getvalue())


def _print_classes(per_class: dict[str, dict[str, Any]], confusion: list[list[int]]) -> None:
    """A table of the classes that have images, the worst first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(per_class)
    places = [place for place, row in enumerate(per_class.values()) if row["images"]]
    places.sort(key=lambda place: (per_class[names[place]]["top1"], per_class[names[place]]["top5"]))
    shown = places if len(names) <= _TABLE else places[:_WORST]
    table = Table("class", "images", "top-1", "top-5", "most often taken for")
    for place in shown:
        row = per_class[names[place]]
        wrong = [0 if other == place else count for other, count in enumerate(confusion[place])]
        most = max(wrong)
        other = f"{names[wrong.index(most)]} ({most})" if most else ""
        table.add_row(Text(names[place]), str(row["images"]), f"{row['top1']:.1%}", f"{row['top5']:.1%}", Text(other))
    Console().print(table)
    if len(shown) < len(places):
        print(f"the {len(shown)} worst of {len(names)} classes; --json has all")


def _predict(options: argparse.Namespace) -> int:
    _use_backend(options)
    require(f"{PROGRAM} predict", "PIL", *([] if options.json else ["rich"]))
    if options.picture is not None:
        require(f"{PROGRAM} predict --picture", "matplotlib")
    from alexnet_kernels.training import checkpoint, inference

    if options.picture is not None:
        output_path(options.picture, ".png", option="--picture")
        if len(options.images) > _PICTURED:
            raise InputError(f"--picture draws {_PICTURED} images at most, got {len(options.images)}")
    network = checkpoint.load_network(options.checkpoint, inference.pick_device(options.device))
    pixels = inference.read(network, options.images)
    probabilities = inference.probabilities(network, pixels, 10 if options.ten_crop else 1)
    results = inference.likeliest(network, probabilities)
    if options.picture is not None:
        from alexnet_kernels.training import pictures

        path, header = Path(options.picture), network.header
        seen = inference.seen(pixels, header.settings.image_size)
        titles = [Path(name).name for name in options.images]
        with write_errors(path):
            pictures.predictions(seen, None, probabilities, header.classes, path, titles)
    if options.json:
        rows = [
            {"image": path, "classes": [{"class": name, "probability": p} for name, p in result]}
            for path, result in zip(options.images, results, strict=True)
        ]
        print(json.dumps(rows))
        return 0
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "class", "probability")
    for path, result in zip(options.images, results, strict=True):
        for i, (name, p) in enumerate(result):
            last = i + 1 == len(result)
            table.add_row(Text(path if i == 0 else ""), Text(name), f"{p:6.1%}", end_section=last)
    Console().print(table)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    require(f"{PROGRAM} prepare", "PIL", "rich")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from alexnet_kernels.training.prepare import prepare

    columns = (TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    began: list[tuple[float, int]] = []
    with Progress(*columns, TimeRemainingColumn(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, rate="")

        def progress(done: int, total: int) -> None:
            # Images of an earlier call are not this one's speed.
            if not began:
                began.append((time.monotonic(), done))
            passed = time.monotonic() - began[0][0]
            rate = f"{(done - began[0][1]) / passed:,.0f} images/s" if passed > 1 else ""
            bar.update(task, completed=done, total=total, rate=rate)

        try:
            report = prepare(
                options.source,
                options.destination,
                size=options.size,
                splits=options.splits,
                shard_images=options.shard_images,
                workers=_workers(options, 16),
                bad_images=options.bad_images,
                progress=progress,
            )
        except KeyboardInterrupt:
            return _fail("interrupted; the same command goes on", 130)
    counts = ", ".join(f"{count:,} {split}" for split, count in report.counts.items())
    print(
        f"{options.destination}: {counts} images of {report.classes} classes, {options.size} x {options.size}, "
        f"in {_time(report.seconds)}"
    )
    if report.left_out or report.converted:
        print(
            f"{report.left_out} images left out, {report.converted} converted to RGB: "
            f"{os.path.join(options.destination, 'report.csv')}"
        )
    return 0


def _convert(options: argparse.Namespace) -> int:
    require(f"{PROGRAM} convert", "safetensors")
    from alexnet_kernels.training import checkpoint

    out = checkpoint.export_path(options.out)
    checkpoint.export(checkpoint.load_network(options.checkpoint), out)
    print(f"{out}  {out.stat().st_size:,} bytes")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from alexnet_kernels.testing import bench, tables
    from alexnet_kernels.training import inference

    if options.compare:
        try:
            reports = [bench.load(path) for path in options.compare]
        except bench.FormatError as error:
            raise InputError(f"--compare {error}") from None
        lines, slower = tables.compare(reports[0], reports[1], options.threshold)
        print("\n".join(lines))
        return 1 if slower else 0
    for kind in options.what:
        if kind not in bench.KINDS:
            raise InputError(f"{kind!r} is not one of {', '.join(bench.KINDS)}")
    if options.batches is not None and not (options.batches and min(options.batches)):
        raise InputError("--batches: numbers of at least 1 expected")
    device = inference.pick_device(options.device)
    if device.type not in bench.BATCHES:
        raise InputError(f"--device {options.device}: cpu or cuda expected")
    try:
        chosen = bench.select(
            bench.rows(device, options.what or bench.KINDS, options.batches, options.smoke), options.only
        )
    except re.error as error:
        raise InputError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not chosen:
        raise InputError(f"--only {options.only!r} finds no row; --list prints their names")
    if options.list:
        for row in chosen:
            print(f"{row.name}: {', '.join(row.variants(device))}")
        return 0
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {options.out}: {error.strerror}") from None
    report = bench.run(
        device,
        chosen,
        **(bench.SMOKE_TIMING if options.smoke else {"seconds": options.seconds, "rounds": options.rounds}),
        small=options.smoke,
        out=options.out,
        say=lambda line: print(line, flush=True),
    )
    if options.out is not None:
        written = [f"{options.out}.json", f"{options.out}.md", *map(str, bench.pictures(report, options.out))]
        print(f"wrote {', '.join(written)}")
    faults = bench.failed(report)
    for fault in faults:
        print(f"{PROGRAM}: error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _throughput(options: argparse.Namespace) -> int:
    _use_backend(options)
    require(f"{PROGRAM} throughput", "PIL", "torchmetrics", "yaml", "lightning")
    from alexnet_kernels.training import inference
    from alexnet_kernels.training.throughput import throughput

    given = {name: getattr(options, name) for name in ("preset", "image_size", "batch_size")}
    recipe = options.recipe or default_recipe(options.data is None, options.preset)
    settings = settings_of(recipe, **{name: value for name, value in given.items() if value is not None})
    keep_freed_memory()
    result = throughput(
        settings,
        options.data,
        inference.pick_device(options.device),
        workers=_workers(options),
        seconds=options.seconds,
        bad_images=options.bad_images,
    )
    if options.json:
        print(json.dumps(result))
        return 0
    held = "held in memory" if not result["workers"] else f"read by {result['workers']} processes"
    print(
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


def _info(options: argparse.Namespace) -> int:
    library = _library.status()
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    presets = {}
    for name, preset in PRESETS.items():
        model = AlexNet(preset=name, device="meta")
        presets[name] = {
            "source": preset.source,
            "input_size": preset.input_size,
            "parameters": count_parameters(model),
        }
    facts: dict[str, Any] = {
        "versions": {
            "alexnet_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "devices": devices,
        "library": library,
        "backend": backends.get_backend(),
        "ops": backends.report(),
        "presets": presets,
    }
    if options.json:
        print(json.dumps(facts, default=str))
        return 0
    print("  ".join(f"{name} {value}" for name, value in facts["versions"].items()))
    print(f"devices: {', '.join(devices)} ({torch.get_num_threads()} CPU threads)")
    if library["loaded"]:
        cuda = f"CUDA kernels for {', '.join(library['archs'])}" if library["cuda_built"] else "no CUDA kernels"
        print(f"library: {library['path']}, {library['isa']} on the CPU, {cuda}")
    else:
        print(f"library: not loaded: {library['reason']}")
    print(f"backend: {facts['backend']}")
    _print_ops(facts["ops"])
    print("\npresets")
    for name, row in presets.items():
        print(f"  {name:<12} {row['input_size']} px  {row['parameters']:,} parameters  {row['source']}")
    return 0


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
