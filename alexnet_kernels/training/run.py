"""One training run, from its specification to its pictures."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from rich.console import Console
from rich.progress import Progress

from alexnet_kernels._errors import InputError, RunError, first_line, out_of_memory, printable
from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels._version import __version__
from alexnet_kernels.models import AlexNet, count_parameters
from alexnet_kernels.training import datasets, decoding, image_set, precision
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.callbacks.checkpoint import AtomicCheckpointIO, CheckpointCallback
from alexnet_kernels.training.callbacks.csv_files import CSVCallback, write_history
from alexnet_kernels.training.callbacks.progress import ProgressCallback
from alexnet_kernels.training.callbacks.stop import Stopped, StopRequest
from alexnet_kernels.training.callbacks.tensorboard import TensorBoardCallback
from alexnet_kernels.training.devices import pick_device
from alexnet_kernels.training.distributed.strategy import AlexNetStrategy
from alexnet_kernels.training.distributed.team import Team, join
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.loader import ImageDataModule
from alexnet_kernels.training.module import Classifier
from alexnet_kernels.training.run_folder import RECIPE, lock, new_folder, put_in_order, refuse_existing
from alexnet_kernels.training.run_pictures import draw_pictures
from alexnet_kernels.training.settings import Settings, save_recipe
from alexnet_kernels.training.spec import ResumePoint, RunSpec

__all__ = ["Result", "train"]

_STATISTICS_IMAGES = 10_000
_PRECISIONS: dict[str, Any] = {"bf16": "bf16-mixed", "16": "16-mixed"}  # others are "32-true": nothing is converted
_TRAFFIC = {None: None, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass
class Result:
    """What a run reached, and where its files are."""

    folder: Path
    history: list[dict[str, float]]
    """A row per epoch, see `History`."""
    best: dict[str, float]
    """The row of the best epoch; empty if no epoch was finished."""
    classes: int
    parameters: int
    seconds: float
    """Duration of this call, including reading images."""
    skipped: list[str]
    """Unreadable images and folders that were left out."""
    ignored: int
    """Files in the splits that are not taken for images."""
    stopped: str | None
    """Why the run ended before its last epoch, or None."""


def train(spec: RunSpec, console: Console | None = None) -> Result:
    """Train an AlexNet. Checkpoints, metrics.csv and pictures are left in the run's folder.

    Args:
        spec: the run.
        console: for progress; None prints nothing.

    Raises:
        InputError: settings, images or a checkpoint that can't be used.
        RunError: a loss that is not finite, a checkpoint that can't be written, no memory left.
    """
    began = time.monotonic()
    keep_freed_memory()
    console = console or Console(quiet=True)
    if spec.parallel is None:
        with ExitStack() as held:
            return _train(spec, console, Team(), began, held)
    with join(spec.parallel, spec.device) as team:
        if team.rank > 0:
            console = Console(quiet=True)
        cuda = spec.device != "cpu" and torch.cuda.is_available()
        local = replace(
            spec,
            device=f"cuda:{team.local_rank}" if cuda else "cpu",
            in_memory=spec.in_memory // team.local_size,
        )
        with ExitStack() as held:
            return _train(local, console, team, began, held)


def _train(spec: RunSpec, console: Console, team: Team, began: float, held: ExitStack) -> Result:
    """`held` keeps the lock of the run's folder."""
    device = pick_device(spec.device)
    settings = precision.resolve(spec.settings, device, team.parallel is not None)
    auto = spec.settings.precision == "auto"
    spec = replace(spec, settings=settings)
    if spec.resume is not None:
        _take(spec.resume, team, held)
    _check_settings(spec, device, team)
    sets = _read_images(spec, console, team)
    fingerprints = [images.fingerprint() for images in sets]
    team.report_progress()
    header = _header(spec, sets[0], " ".join(fingerprints))
    _check_sets(spec, header, sets, fingerprints, team)
    torch.manual_seed(settings.seed)
    model = header.model()
    parameters = count_parameters(model)
    folder = team.folder = _folder(spec, team, held)
    introduction = _introduction(settings, auto, sets, parameters, device, folder, team)
    console.print(introduction, highlight=False, soft_wrap=True, markup=False)

    def notify(message: str) -> None:
        console.print(message, highlight=False, soft_wrap=True, markup=False)

    module = Classifier(model.to(memory_format=torch.channels_last), header, spec.bad_images, team, spec.graph, notify)
    left = None if spec.max_seconds is None else spec.max_seconds - (time.monotonic() - began)
    stop, board = StopRequest(left, team), TensorBoardCallback(folder / "tensorboard")
    callbacks = [
        ProgressCallback(console, spec.log_every),
        board,
        CSVCallback(folder),
        CheckpointCallback(folder, stop, spec.save_every),
    ]
    stopped: str | None = None
    with _lightning_notices_off():
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            precision=_PRECISIONS.get(settings.precision, "32-true"),
            max_epochs=settings.epochs,
            callbacks=callbacks,
            default_root_dir=folder,
            **_devices(team, device),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        data = ImageDataModule(sets[0], sets[1], settings, spec.workers, team.batch_shard, device)
        try:
            with stop.signals(), _machine_errors(folder, team), _restore_errors(spec.resume, module):
                trainer.fit(module, data, ckpt_path=None if spec.resume is None else spec.resume.path)
        except Stopped as reason:
            stopped = str(reason)
    team.finish()
    history = module.history
    if history.epochs and team.rank == 0:
        with _machine_errors(folder, team):
            write_history(history, folder)
            board.add_pictures(draw_pictures(history, sets, folder, device), trainer.global_step)
    return Result(
        folder,
        history.epochs,
        history.best() if history.epochs else {},
        len(header.classes),
        parameters,
        time.monotonic() - began,
        sorted({*sets[0].bad, *sets[1].bad, *module.bad}),
        len(sets[0].ignored) + len(sets[1].ignored),
        stopped,
    )


def _check_settings(spec: RunSpec, device: torch.device, team: Team) -> None:
    """Raise InputError for settings that the device, the network or the processes can't run, or an existing folder."""
    settings = spec.settings
    model = AlexNet(2, settings.network(), width=settings.width, device="meta")
    smallest = max(model.min_size)
    if settings.image_size < smallest:
        raise InputError(
            f"--image-size {settings.image_size} is too small for preset {settings.preset!r}: {smallest} at least"
        )
    if team.parallel is None:
        _check_memory(settings, count_parameters(model), device)
    else:
        team.parallel.check(team.size, settings)
        own = {**settings.to_dict(), **asdict(team.parallel), "version": __version__}
        own |= {"save_every": spec.save_every, "bad_images": spec.bad_images}
        team.check_same(**own, torch=torch.__version__.split("+")[0])
    folder = spec.out if spec.resume is None else spec.resume.path.parent
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise InputError(f"the run's folder {folder}: TensorBoard needs a name in UTF-8") from None
    if spec.resume is None and spec.out is not None and team.rank == 0 and not team.restarted:
        refuse_existing(spec.out)


def _check_memory(settings: Settings, parameters: int, device: torch.device) -> None:
    """Raise InputError if the device lacks the memory of the state: a kernel without memory kills processes."""
    needed = 3 * 4 * parameters
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise InputError(
            f"--width {settings.width:g}: the weights of preset {settings.preset}, their gradients and momentum take "
            f"{needed / 1e9:,.0f} GB, {device} has {total / 1e9:,.0f} GB"
        )


def _check_sets(
    spec: RunSpec, header: Header, sets: Sequence[image_set.StoredImages], fingerprints: Sequence[str], team: Team
) -> None:
    """Raise InputError unless all processes have the same images and the same state to resume."""
    if team.size == 1:
        return
    if team.batch_shard[1] > 1:
        batch_size = header.settings.batch_size
        if len(sets[0]) < batch_size:
            raise InputError(
                f"--batch-size {batch_size}: the {len(sets[0])} training images are fewer than a batch and don't split "
                "evenly over processes"
            )
        if spec.bad_images == "skip" and any(isinstance(s, image_set.ImageSet) and s.pixels is None for s in sets):
            raise InputError(
                "--bad-images skip, of images that are not held in memory, would give the processes shards of "
                "different sizes: `alexnet-kernels prepare` leaves unreadable images out beforehand"
            )
    resume = spec.resume
    team.check_same(
        training_images=(len(sets[0]), fingerprints[0]),
        validation_images=(len(sets[1]), fingerprints[1]),
        state_to_resume=None if resume is None else (len(resume.history.epochs), repr(resume.history.epochs[-1:])),
    )


def _devices(team: Team, device: torch.device) -> dict[str, Any]:
    """The trainer's arguments for devices and processes."""
    parallel = team.parallel
    if parallel is None:
        return {
            "devices": [device.index or 0] if device.type == "cuda" else 1,
            "plugins": [AtomicCheckpointIO()],
        }
    traffic = _TRAFFIC[parallel.traffic]
    return {
        "devices": team.local_size,
        "num_nodes": team.size // team.local_size,
        "strategy": AlexNetStrategy(parallel.plan, parallel.towers, traffic, parallel.fully_sharded),
        "plugins": [AtomicCheckpointIO(), TorchElasticEnvironment()],
        "use_distributed_sampler": False,
    }


def _take(resume: ResumePoint, team: Team, held: ExitStack) -> None:
    """Lock the folder of the resumed run and put it in order."""

    def take() -> None:
        held.enter_context(lock(resume.path.parent))
        put_in_order(resume.path)

    with _machine_errors(resume.path.parent, team):
        team.from_first(take)


@contextmanager
def _restore_errors(resume: ResumePoint | None, module: Classifier) -> Iterator[None]:
    """Turn errors of a checkpoint that Lightning can't restore into an InputError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if resume is None or module.began or isinstance(error, (InputError, RunError)) or out_of_memory(error):
            raise
        raise InputError(
            f"{resume.path} can't be resumed, a part of it is of another kind: {first_line(error)}"
        ) from error


def _folder(spec: RunSpec, team: Team, held: ExitStack) -> Path:
    """The folder of the run: created and locked, with its recipe.yaml, or the one of the resumed run."""
    if spec.resume is not None:
        return spec.resume.path.parent

    def create() -> Path:
        folder = new_folder(spec.out, spec.settings.preset, team.restarted and spec.out is not None)
        held.enter_context(lock(folder))
        save_recipe(spec.settings, folder / RECIPE)
        return folder

    return team.from_first(create)


@contextmanager
def _machine_errors(folder: Path, team: Team) -> Iterator[None]:
    """Turn failures of the machine into a RunError of one line, which says how to resume the run."""
    try:
        yield
    except SystemExit as exit_:
        # Lightning's reaction to a second Ctrl-C.
        if isinstance(exit_.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, RunError):
            reason = str(error)
        elif out_of_memory(error):
            reason = "out of memory: try --accumulate 2 or more, which processes a batch in parts, or --no-graph"
        elif isinstance(error, OSError) and not isinstance(error, ConnectionError):
            reason = f"{error.filename or folder}: {error.strerror or error}"
        elif "DataLoader worker" in str(error):
            reason = f"a process that reads images ended: {decoding.error_reason(error)}; try fewer --workers"
        else:
            raise
        raise RunError(reason + team.resume_hint()) from error


def _read_images(spec: RunSpec, console: Console, team: Team) -> Sequence[image_set.StoredImages]:
    path, crop = spec.data or datasets.SHIPPED, spec.settings.image_size
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading images", total=None)

        def advance(count: int) -> None:
            team.report_progress()
            progress.advance(task, count)

        sets = datasets.open_data(
            path,
            stored_size(crop),
            bad_images=spec.bad_images,
            in_memory=spec.in_memory,
            progress=advance,
            reading=spec.reading,
        )
    if len(sets[0].classes) < 2:
        raise InputError(f"--data {path}: at least two classes are needed, there is only {sets[0].classes[0]!r}")
    image_set.check_stored_size(sets[0], crop, path)
    return sets


def _header(spec: RunSpec, train_set: image_set.StoredImages, fingerprint: str) -> Header:
    """The header of a new run, or the resumed run's. Raises InputError if that was begun on other images."""
    if spec.resume is not None:
        _check_resumed_images(spec.resume, train_set, fingerprint)
        return replace(spec.resume.header, settings=spec.settings)
    statistics = train_set.statistics
    if statistics is None:
        sample = train_set.sample(len(train_set) if train_set.pixels is not None else _STATISTICS_IMAGES)
        if not len(sample):
            raise InputError(f"--data {spec.data}: none of the sampled images can be read")
        statistics = Statistics.of(sample)
    path = "" if spec.data is None else str(Path(spec.data).resolve())
    return Header(
        spec.settings,
        train_set.classes,
        statistics,
        path,
        len(train_set),
        fingerprint,
        train_set.size,
        spec.reading.resolved(),
    )


def _check_resumed_images(resume: ResumePoint, train_set: image_set.StoredImages, fingerprint: str) -> None:
    header = resume.header
    if header.classes != train_set.classes or header.train_images != len(train_set):
        raise InputError(
            f"the run was begun on {header.train_images} images of {len(header.classes)} classes, the data "
            f"has {len(train_set)} of {len(train_set.classes)}: a resumed run needs the same images"
        )
    pairs = zip(header.fingerprint.split(), fingerprint.split(), strict=False)
    differing = [image_set.difference(before, now) for before, now in pairs]
    if "names" in differing or header.stored_size != train_set.size:
        raise InputError(
            f"the run was begun on images of other names or labels, or of {header.stored_size} pixels instead of "
            f"{train_set.size}: a resumed run needs the same images"
        )
    for what, how in zip(("training", "validation"), differing, strict=False):
        if how:
            raise InputError(f"some {what} images have changed since the run was begun: a resumed run needs the same")


def _introduction(
    settings: Settings,
    auto: bool,
    sets: Sequence[image_set.StoredImages],
    parameters: int,
    device: torch.device,
    folder: Path,
    team: Team,
) -> str:
    train_set, val_set = sets
    where = f"on {device}"
    if team.parallel is not None:
        where = f"{team.parallel.plan} of {team.size} processes on {device.type}"
    notes = "".join(f"\n{printable(images.note)}" for images in sets if images.note)
    return (
        f"AlexNet, preset {settings.preset}, {parameters:,} parameters, {where} in "
        f"{precision.words(settings.precision, auto)}\n"
        f"{len(train_set):,} training and {len(val_set):,} validation images of "
        f"{len(train_set.classes)} classes, "
        f"{settings.image_size} x {settings.image_size}; {settings.epochs} epochs of batches of "
        f"{settings.batch_size}; in {printable(str(folder))}{notes}"
    )


@contextmanager
def _lightning_notices_off() -> Iterator[None]:
    """Silence Lightning's notices, which address the author of a training script."""
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
