"""The folder of a run: created, locked while the run lasts, and put in order before it is resumed.

An epoch's last.ckpt is written before best.ckpt, which becomes a link to it if the epoch is the best. A run that is
killed in between is put right from last.ckpt.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels._files import link_atomically, remove_temporaries
from alexnet_kernels._lock import locked
from alexnet_kernels.training import checkpoint

__all__ = ["PICTURES", "is_complete", "lock", "new_folder", "put_in_order", "refuse_existing"]

PICTURES = ("filters.png", "curves.png", "predictions.png", "neighbours.png")
"""What `draw_pictures` leaves, in this order."""
RECIPE = "recipe.yaml"
_FILES = ("best.ckpt", "metrics.csv", "layers.csv", *PICTURES)
"""What a run leaves besides last.ckpt."""


def refuse_existing(folder: Path) -> None:
    """Raise InputError if there is something at the path."""
    if folder.exists():
        hint = f", or resume that run: --resume {folder}" if (folder / "last.ckpt").exists() else ""
        raise InputError(f"--out {folder} exists: name another folder{hint}")


def new_folder(out: Path | None, preset: str, may_exist: bool) -> Path:
    """Create the folder `out`, or the next free runs/<preset>-<n>."""
    number = 0
    while True:
        number += 1
        folder = out if out is not None else Path("runs") / f"{preset}-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=may_exist)
        except FileExistsError:
            if out is not None:
                refuse_existing(folder)
                raise InputError(f"--out {folder}: a part of the path is no folder") from None
        except OSError as error:
            reason = error.strerror or errno.errorcode.get(error.errno or 0, "")
            raise InputError(f"the run's folder {folder} can't be created: {reason}") from error
        else:
            return folder


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run's lock inside the block. InputError if another process trains the run."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder, f"another process is training the run in {folder}: wait until it ends"))
        except OSError as error:
            raise RunError(f"{folder}: {error.strerror or error}") from error
        yield


def put_in_order(path: Path) -> None:
    """Before a run is resumed from the checkpoint `path`: remove what a killed process left, make best.ckpt agree.

    best.ckpt is then the best epoch of the checkpoint's history. One of another continuation of the run, which a resume
    from an older checkpoint leaves, is renamed.
    """
    folder, best = path.parent, path.parent / "best.ckpt"
    remove_temporaries(folder)
    resumed = checkpoint.load(path, mmap=True)
    if _agrees(best, resumed):
        return
    if resumed.ends_best_epoch():
        link_atomically(path, best)
    elif best.is_file():
        os.replace(best, folder / "best-other.ckpt")


def _agrees(best: Path, resumed: checkpoint.Checkpoint) -> bool:
    """Whether best.ckpt is that of the best epoch of the resumed run, or there is none yet."""
    epochs = resumed.history.epochs
    try:
        found = checkpoint.load(best, mmap=True).history.epochs if best.is_file() else []
    except InputError:
        # It is damaged.
        found = []
    return found[-1:] == ([resumed.history.best()] if epochs else [])


def is_complete(path: Path) -> bool:
    """Whether a run whose last epoch is in the checkpoint `path` has left all its files, and nothing else.

    A checkpoint in another folder than a run's counts as complete.
    """
    folder = path.parent
    if not (folder / RECIPE).is_file():
        return True
    present = all((folder / name).is_file() for name in _FILES) and not any(folder.glob(".*.tmp"))
    return present and checkpoint.best_in(folder).name == "best.ckpt"
