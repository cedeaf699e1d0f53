"""The specification of one training run: everything that `train` depends on, resolved once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import checkpoint, datasets
from alexnet_kernels.training.distributed.config import ParallelConfig
from alexnet_kernels.training.distributed.environment import attempt
from alexnet_kernels.training.header import Header, History
from alexnet_kernels.training.reading import USUAL, Reading
from alexnet_kernels.training.run_folder import is_complete
from alexnet_kernels.training.settings import Settings

__all__ = ["ResumePoint", "RunSpec", "check_given", "is_finished", "new_run", "resumed_run"]


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, without its tensors: Lightning reads them when training starts."""

    path: Path
    header: Header
    history: History


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run, new or resumed. Made by `new_run` and `resumed_run`, which take the fields from `device` on as options."""

    settings: Settings
    """What the result depends on."""
    data: str | Path | None
    """The image set, as of `open_data`; None for the package's images."""
    out: Path | None
    """The folder of a new run; None for the next free runs/<preset>-<n>. A resumed run stays in its folder."""
    resume: ResumePoint | None = None
    device: str = "auto"
    """auto (CUDA if available), cpu, cuda or cuda:<n>."""
    workers: int = 0
    """Processes that read images, threads for a prepared set, if the set is too large to be held in memory."""
    max_seconds: float | None = None
    """Stop after the step that passes this time."""
    save_every: int = 1000
    """Steps between checkpoints inside an epoch. A checkpoint is also written after every epoch."""
    log_every: float = 60.0
    """Seconds between two lines of progress inside an epoch, if the output is not a terminal; 0 for none."""
    bad_images: str = "refuse"
    """"refuse" unreadable images with an error, or "skip" them."""
    reading: Reading = USUAL
    """Names of the splits, what becomes of empty classes, and the labels of a flat split."""
    graph: bool = True
    """Whether one GPU runs the training step as one CUDA graph. The weights are bitwise the same."""
    in_memory: int = datasets.IN_MEMORY
    """Bytes up to which images are held in memory, by all processes of a machine together."""
    parallel: ParallelConfig | None = None
    """How the run is split over processes, each of which calls `train` with torchrun's environment variables (see
    `launch`). None for one process."""


_PARTS: dict[str, type] = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}
"""What a checkpoint holds for resuming, besides its header."""


def new_run(
    settings: Settings,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    reading: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> RunSpec:
    """A new run in the folder `out`, which must not exist; None for the next free runs/<preset>-<n>.

    If torchrun has restarted the processes after a failure and `out` has a checkpoint, the run is resumed from it.
    reading: fields of `Reading`. options: fields of `RunSpec`.
    """
    if options.get("parallel") is not None and out is not None and attempt() and (Path(out) / "last.ckpt").exists():
        return resumed_run(out, {"accumulate": settings.accumulate}, data, reading=reading, **options)
    return RunSpec(
        settings=settings,
        data=data,
        out=None if out is None else Path(out),
        reading=Reading(**reading),
        **options,
    )


def check_given(given: Mapping[str, Any], own: Settings, begun: Path) -> None:
    """InputError if a setting that is given again would change the results of what was begun with `own`."""
    for name, value in given.items():
        if (name, value) == ("precision", "auto"):
            continue  # what it stood for when the run was begun
        if value != getattr(own, name) and name != "accumulate":
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} {value} can't be used with --resume: {begun} was begun with {getattr(own, name)}"
            )


def is_finished(saved: checkpoint.Checkpoint, path: Path) -> bool:
    """Whether the run of the checkpoint, which was read from `path`, has ended and left all its files."""
    return len(saved.history.epochs) >= saved.header.settings.epochs and is_complete(path)


def resumed_run(
    path: str | Path,
    settings: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    *,
    reading: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> RunSpec:
    """A run that continues from a checkpoint, or from last.ckpt in a run's folder, in that folder.

    With the same device and number of threads, the weights on a CPU are bitwise identical to those of an uninterrupted
    run. The number of processes may change. A run that was killed after its last epoch only gets the files it lacks.

    Args:
        path: the checkpoint or the folder. Its header is read here, once.
        settings: settings that were given again. Only `accumulate` may differ from the checkpoint's.
        data: the same images at another path; None for the path in the checkpoint.
        reading: fields of `Reading` that differ from the checkpoint's, as the path of a file that has moved.
        options: fields of `RunSpec`.

    Raises:
        InputError: no readable checkpoint, a finished run, or a setting that differs.
    """
    path = checkpoint.find(path, "last.ckpt")
    # Mapped, so that only the header is read.
    saved = checkpoint.load(path, mmap=True)
    for name, kind in _PARTS.items():
        if not isinstance(saved.content.get(name), kind):
            raise InputError(f"{path} can't be resumed: its {name} is missing or of another kind")
    resume = ResumePoint(path, saved.header, saved.history)
    given, own = dict(settings or {}), resume.header.settings
    check_given(given, own, path)
    if is_finished(saved, path):
        raise InputError(f"{path} has finished its {own.epochs} epochs: there is nothing to resume")
    return RunSpec(
        settings=replace(own, accumulate=given.get("accumulate", own.accumulate)),
        data=data if data is not None else resume.header.data or None,
        out=path.parent,
        resume=resume,
        reading=datasets.reading_again(resume.header.reading, reading, data),
        **options,
    )
