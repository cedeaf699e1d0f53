"""One training run, from its settings to its pictures."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import Progress

from alexnet_kernels import __version__
from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels.models import AlexNet, count_parameters
from alexnet_kernels.training import checkpoint, images, inference, pictures
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.lightning import AtomicCheckpointIO, Bar, Board, Classifier, Images, Saver, Stopped
from alexnet_kernels.training.processes import Parallel, Team, join
from alexnet_kernels.training.settings import Settings, save_recipe

__all__ = ["Result", "train"]

_STATISTICS_IMAGES = 10_000
_NEIGHBOURS = 2000
"""Training images among which the nearest to some validation images are looked for."""
_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass
class Result:
    """Of a run: what was reached, and where it is."""

    folder: Path
    history: list[dict[str, float]]
    best: dict[str, float]
    """The row of the best epoch; empty if none was finished."""
    classes: int
    parameters: int
    seconds: float
    """Of this call, reading included."""
    skipped: list[str]
    """Unreadable images that were left out."""
    stopped: str | None
    """Why the run ended before its last epoch, or None."""


def train(
    settings: Settings,
    data: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    max_seconds: float | None = None,
    save_every: int = 1000,
    accumulate: int | None = None,
    bad_images: str = "refuse",
    in_memory: int = images.IN_MEMORY,
    parallel: Parallel | None = None,
    console: Console | None = None,
) -> Result:
    """Train an AlexNet, leaving its checkpoints, metrics.csv and pictures in a folder.

    Args:
        settings: what the result depends on; with resume, the checkpoint's own are taken.
        data: what `prepare` made, or an ImageFolder tree with train/ and val/, or a zip of one; None for the
            images of the package.
        out: the run's folder, which must not exist; None for the next free runs/<preset>-<n>. Processes that torchrun
            starts anew go on with the run in it.
        resume: a checkpoint, or the folder of a run, to go on with in that folder. With the same device and
            number of threads the weights come out, on a CPU, as those of a run that never stopped. Another number of
            processes, or one, may go on with it.
        device: auto (CUDA if there is a device), cpu, cuda or cuda:<n>.
        workers: processes that read images where a set is too large to be held in memory.
        max_seconds: ends the run after the step that passes them.
        save_every: steps between checkpoints inside an epoch; one is written after every epoch, too.
        accumulate: in place of the settings' own, for a resumed run that lacks memory.
        bad_images: "refuse" or "skip".
        in_memory: bytes up to which images are held in memory, by all processes of a machine together.
        parallel: how the network is split over processes, each of which makes this call, with torchrun's environment
            variables (see `processes.launch`); None for one process.
        console: for progress; None prints nothing.

    Raises:
        InputError: settings, images or checkpoint that can't be used.
        RunError: a loss that is not finite, a checkpoint that can't be written, no memory left.
    """
    console = console or Console(quiet=True)
    options: dict[str, Any] = {
        "resume": resume, "workers": workers, "max_seconds": max_seconds, "save_every": save_every,
        "accumulate": accumulate, "bad_images": bad_images,
    }  # fmt: skip
    if parallel is None:
        return _train(settings, data, out, in_memory, device, console, Team(), **options)
    with join(parallel, device) as team:
        if team.rank > 0:
            console = Console(quiet=True)
        device = f"cuda:{team.local_rank}" if device != "cpu" and torch.cuda.is_available() else "cpu"
        return _train(settings, data, out, in_memory // team.local_size, device, console, team, **options)


def _train(
    settings: Settings,
    data: str | Path | None,
    out: str | Path | None,
    in_memory: int,
    device: str,
    console: Console,
    team: Team,
    *,
    resume: str | Path | None,
    workers: int,
    max_seconds: float | None,
    save_every: int,
    accumulate: int | None,
    bad_images: str,
) -> Result:
    began = time.monotonic()
    resumed: checkpoint.Header | None = None
    if resume is None and out is not None and team.restarted and (Path(out) / "last.ckpt").exists():
        resume = out
    if resume is not None:
        resume = checkpoint.find(resume, "last.ckpt")
        resumed = checkpoint.load(resume, mmap=True)[0]
        settings = resumed.settings
        if len(resumed.history) >= settings.epochs:
            raise InputError(f"{resume} has finished its {settings.epochs} epochs: there is nothing to resume")
        if accumulate is not None:
            settings = resumed.settings = replace(settings, accumulate=accumulate)
        if team.rank == 0:
            _remove_temporaries(resume.parent)
        if data is None and resumed.data:
            data = resumed.data
    target = inference.pick_device(device)
    if settings.precision == "16" and target.type != "cuda":
        raise InputError("--precision 16 needs a CUDA device; --precision bf16 and 32 run everywhere")
    _check_size(settings)
    _check_split(settings, team)
    if resume is None and out is not None and team.rank == 0 and not team.restarted:
        _refuse_existing(Path(out))

    sets = _read(data or images.SHIPPED, settings.image_size, bad_images, in_memory, console, team)
    header = _header(settings, data, sets[0], resumed)
    _check_sets(header, sets, bad_images, resumed, team)
    torch.manual_seed(settings.seed)
    model = header.model()
    parameters = count_parameters(model)

    def make_folder() -> Path:
        folder = _new_folder(out, settings.preset, team.restarted and out is not None)
        save_recipe(settings, folder / "recipe.yaml")
        return folder

    folder = team.folder = resume.parent if resume is not None else team.from_first(make_folder)
    introduction = _introduction(settings, sets, parameters, target, folder, team)
    console.print(introduction, highlight=False, soft_wrap=True, markup=False)

    module = Classifier(model.to(memory_format=torch.channels_last), header, bad_images, team)
    saver = Saver(folder, None if max_seconds is None else max_seconds - (time.monotonic() - began), save_every, team)
    board = Board(folder / "tensorboard")
    stopped: str | None = None
    with _quiet():
        trainer = pl.Trainer(
            accelerator="gpu" if target.type == "cuda" else "cpu",
            precision=_PRECISIONS[settings.precision],
            max_epochs=settings.epochs,
            callbacks=[Bar(console), board, saver],
            default_root_dir=folder,
            **_processes(team, target),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        module_data = Images(sets[0], sets[1], settings, workers, team.rows)
        try:
            with saver.signals(), _explained(folder, team):
                trainer.fit(module, module_data, ckpt_path=resume)
        except Stopped as reason:
            stopped = str(reason)
    skipped = sorted({*sets[0].bad, *sets[1].bad, *module.bad})
    team.leave()
    if header.history and team.rank == 0:
        with _explained(folder, team):
            board.pictures(_draw(module, sets, folder, target), trainer.global_step)
    best = header.best() if header.history else {}
    return Result(
        folder,
        header.history,
        best,
        len(header.classes),
        parameters,
        time.monotonic() - began,
        skipped,
        stopped,
    )


def _check_size(settings: Settings) -> None:
    model = AlexNet(2, settings.network(), width=settings.width, device="meta")
    smallest = max(model.min_size)
    if settings.image_size < smallest:
        raise InputError(
            f"--image-size {settings.image_size} is too small for preset {settings.preset!r}: {smallest} at least"
        )


def _check_split(settings: Settings, team: Team) -> None:
    """InputError unless the network and a batch split over the processes, which all want the same."""
    parallel = team.parallel
    if parallel is None:
        return
    parallel.check(team.size, settings)
    mine = {**settings.to_dict(), **asdict(parallel), "version": __version__}
    team.check_same(**mine, torch=torch.__version__.split("+")[0])


def _check_sets(
    header: checkpoint.Header,
    sets: Sequence[images.StoredImages],
    bad_images: str,
    resumed: checkpoint.Header | None,
    team: Team,
) -> None:
    """InputError unless all processes read the same images, and go on from the same state."""
    if team.size == 1:
        return
    if team.rows[1] > 1:
        if len(sets[0]) < header.settings.batch_size:
            raise InputError(
                f"--batch-size {header.settings.batch_size}: there are {len(sets[0])} training images, fewer than a "
                "batch, which don't split evenly over processes"
            )
        if bad_images == "skip" and any(isinstance(set_, images.ImageSet) and set_.pixels is None for set_ in sets):
            raise InputError(
                "--bad-images skip, of images that are read as they are needed, would give processes unequal parts: "
                "`alexnet-kernels prepare` leaves unreadable images out beforehand"
            )
    team.check_same(
        training_images=(len(sets[0]), header.fingerprint),
        validation_images=(len(sets[1]), _fingerprint(sets[1])),
        state_to_resume=None if resumed is None else (len(resumed.history), repr(resumed.history[-1:])),
    )


def _processes(team: Team, device: torch.device) -> dict[str, Any]:
    """What Lightning's trainer is told of devices and processes."""
    if team.parallel is None:
        return {
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "plugins": [AtomicCheckpointIO()],
        }
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    from alexnet_kernels.training.strategy import AlexNetStrategy

    parallel = team.parallel
    traffic = {"bf16": torch.bfloat16, "16": torch.float16}.get(parallel.traffic or "")
    return {
        "devices": team.local_size,
        "num_nodes": team.size // team.local_size,
        "strategy": AlexNetStrategy(parallel.plan, parallel.towers, traffic, parallel.fully_sharded),
        "plugins": [AtomicCheckpointIO(), TorchElasticEnvironment()],
        "use_distributed_sampler": False,
    }


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        hint = ""
        if (folder / "last.ckpt").exists():
            hint = f", or go on with that run: --resume {folder}"
        raise InputError(f"--out {folder} exists: name another folder{hint}")


def _new_folder(out: str | Path | None, preset: str, begun: bool) -> Path:
    """The run's folder; it may exist only where the run was begun before."""
    number = 0
    while True:
        number += 1
        folder = Path(out) if out is not None else Path("runs") / f"{preset}-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=begun)
        except FileExistsError:
            if out is not None:
                _refuse_existing(folder)
                raise InputError(f"--out {folder}: a part of the path is no folder") from None
        except OSError as error:
            reason = error.strerror or errno.errorcode.get(error.errno or 0, "")
            raise InputError(f"the run's folder {folder} can't be made: {reason}") from error
        else:
            return folder


def _remove_temporaries(folder: Path) -> None:
    """What a killed process was writing."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


@contextmanager
def _explained(folder: Path, team: Team) -> Iterator[None]:
    """Failures of the machine in one line, and what is left of the run."""
    try:
        yield
    except SystemExit as exit_:
        # What Lightning makes of a second Ctrl-C.
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, RunError):
            reason = str(error)
        elif _out_of_memory(error):
            reason = "there is no memory left: try --accumulate 2 or more, which takes a batch in parts"
        elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
            reason = f"{error.filename or folder}: {error.strerror or error}"
        elif "DataLoader worker" in str(error):
            reason = f"a process that reads images ended: {images.reason(error)}; try fewer --workers"
        else:
            raise
        raise RunError(reason + team.kept()) from error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _read(
    path: str | Path, crop: int, bad_images: str, in_memory: int, console: Console, team: Team
) -> Sequence[images.StoredImages]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading images", total=None)

        def advance(count: int) -> None:
            team.moved()
            progress.advance(task, count)

        sets = images.open_data(
            path,
            stored_size(crop),
            bad_images=bad_images,
            in_memory=in_memory,
            progress=advance,
        )
    if len(sets[0].classes) < 2:
        raise InputError(f"--data {path}: two classes at least are needed, there is only {sets[0].classes[0]!r}")
    images.check_room(sets[0], crop, path)
    return sets


def _fingerprint(image_set: images.StoredImages) -> str:
    """Of the images' names, in order."""
    return hashlib.sha256("\n".join(image_set.files).encode()).hexdigest()


def _header(
    settings: Settings, data: str | Path | None, train_set: images.StoredImages, resumed: checkpoint.Header | None
) -> checkpoint.Header:
    fingerprint = _fingerprint(train_set)
    if resumed is None:
        statistics = train_set.statistics
        if statistics is None:
            sample = train_set.sample(len(train_set) if train_set.pixels is not None else _STATISTICS_IMAGES)
            if not len(sample):
                raise InputError(f"--data {data}: none of the images looked at can be read")
            statistics = Statistics.of(sample)
        path = "" if data is None else str(Path(data).resolve())
        return checkpoint.Header(
            settings, train_set.classes, statistics, path, len(train_set), fingerprint, train_set.size
        )
    if resumed.classes != train_set.classes or resumed.train_images != len(train_set):
        raise InputError(
            f"the run was begun on {resumed.train_images} images of {len(resumed.classes)} classes, the data "
            f"has {len(train_set)} of {len(train_set.classes)}: a resumed run needs the same"
        )
    if resumed.fingerprint != fingerprint or resumed.stored_size != train_set.size:
        raise InputError(
            f"the run was begun on images of other names, or of {resumed.stored_size} pixels instead of "
            f"{train_set.size}: a resumed run needs the same"
        )
    return resumed


def _introduction(
    settings: Settings,
    sets: Sequence[images.StoredImages],
    parameters: int,
    device: torch.device,
    folder: Path,
    team: Team,
) -> str:
    train_set, val_set = sets
    where = f"on {device}"
    if team.parallel is not None:
        where = f"{team.parallel.plan} of {team.size} processes on {device.type}"
    return (
        f"AlexNet, preset {settings.preset}, {parameters:,} parameters, {where} in {settings.precision}"
        f"{' bit' if settings.precision.isdigit() else ''}\n"
        f"{len(train_set):,} training and {len(val_set):,} validation images of "
        f"{len(train_set.classes)} classes, "
        f"{settings.image_size} x {settings.image_size}; {settings.epochs} epochs of batches of "
        f"{settings.batch_size}; in {folder}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notices, which speak to who writes a training script."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", category=UserWarning, message=".*isinstance.treespec.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _draw(module: Classifier, sets: Sequence[images.StoredImages], folder: Path, device: torch.device) -> list[Path]:
    """Writes the run's pictures; returns their paths."""
    val_set = sets[1]
    settings = module.header.settings
    pictures.curves(module.header.history, folder / "curves.png")
    best = folder / "best.ckpt"
    # A checkpoint resumed by itself has no best beside it until an epoch does better.
    network = checkpoint.load_network(best if best.exists() else folder / "last.ckpt", device)
    conv1 = next(layer for layer in network.model.features.children() if isinstance(layer, torch.nn.Conv2d))
    towers = 2 if any(getattr(layer, "groups", 1) > 1 for layer in network.model.features.children()) else 1
    pictures.filters(conv1.weight, folder / "filters.png", towers)
    # Twelve images, evenly spaced through the classes.
    places = torch.linspace(0, len(val_set) - 1, min(12, len(val_set))).long().tolist()
    batch = val_set.__getitems__(places)
    if len(batch["labels"]):
        probabilities = inference.probabilities(network, batch["images"])
        labels = batch["labels"].tolist()
        pictures.predictions(
            inference.seen(batch["images"], settings.image_size),
            labels,
            probabilities,
            module.header.classes,
            folder / "predictions.png",
        )
    _draw_neighbours(network, sets, folder / "neighbours.png")
    names = ("filters.png", "curves.png", "predictions.png", "neighbours.png")
    return [folder / name for name in names if (folder / name).exists()]


def _draw_neighbours(network: checkpoint.Network, sets: Sequence[images.StoredImages], path: Path) -> None:
    train_set, val_set = sets
    places = torch.linspace(0, len(val_set) - 1, min(6, len(val_set))).long().tolist()
    queries, training = val_set.__getitems__(places)["images"], train_set.sample(_NEIGHBOURS)
    if len(queries) and len(training):
        size = network.header.settings.image_size
        pictures.neighbours(
            inference.seen(queries, size),
            inference.seen(training, size),
            inference.features(network, queries),
            inference.features(network, training),
            path,
        )
