"""Console output of a run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_kernels.training.module import Classifier

__all__ = ["ProgressCallback"]

_REFRESH = 0.25
"""Seconds between two updates of the bar."""


class ProgressCallback(Callback):
    """Prints a line per epoch; on a terminal, also a bar with images/s, loss, top-1 and top-5."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self._shown_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(12), TimeRemainingColumn(compact=True)]
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console, transient=True)
        if self.console.is_terminal:
            self.progress.start()
        steps = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        self.task = self.progress.add_task("", total=steps, completed=trainer.global_step, status="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        assert self.progress is not None
        now = time.perf_counter()
        # Reading the metrics synchronizes with the device.
        if not self.console.is_terminal or now - self._shown_at < _REFRESH:
            return
        self._shown_at = now
        self.progress.update(
            self.task,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            completed=trainer.global_step,
            status=f"{pl_module.images_per_second():.0f} images/s  "
            + _status(pl_module.train_metrics.compute("train", all_processes=False), "train"),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Called before the module's own hook, which resets the metrics.
        assert isinstance(pl_module, Classifier)
        self.console.print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {pl_module.images_per_second():6.0f} images/s"
            f"  train {_status(pl_module.train_metrics.compute('train'), 'train')}"
            f"  val {_status(pl_module.val_metrics.compute('val'), 'val')}",
            highlight=False,
            soft_wrap=True,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _status(values: dict[str, float], prefix: str) -> str:
    loss, top1, top5 = (values[f"{prefix}_{name}"] for name in ("loss", "top1", "top5"))
    return f"loss {loss:.3f} top-1 {top1:6.1%} top-5 {top5:6.1%}"
