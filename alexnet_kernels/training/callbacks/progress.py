"""Console output of a run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_kernels.training.diagnosis import hint, learns
from alexnet_kernels.training.module import Classifier

__all__ = ["ProgressCallback"]

_REFRESH = 0.25
"""Seconds between two updates of the bar."""


class ProgressCallback(Callback):
    """Prints a line per epoch, which ends with a hint if the network does not learn, and progress inside epochs.

    On a terminal a bar, otherwise a line every `every` seconds, 0 for none.
    """

    def __init__(self, console: Console, every: float = 60.0) -> None:
        self.console, self.every = console, every
        self.progress: Progress | None = None
        self._shown_at = self._began = 0.0
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(12), TimeRemainingColumn(compact=True)]
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console, transient=True)
        if self.console.is_terminal:
            self.progress.start()
        self.steps = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        self.task = self.progress.add_task("", total=self.steps, completed=trainer.global_step, status="")
        self._began = time.perf_counter()
        self._shown_at = self._began if self._by_lines() else 0.0
        self._first = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        assert self.progress is not None
        now, every = time.perf_counter(), self.every if self._by_lines() else _REFRESH
        # Reading the metrics synchronizes with the device.
        if self.console.quiet or not every or now - self._shown_at < every:
            return
        self._shown_at = now
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        values = pl_module.train_metrics.compute("train", all_processes=False)
        if not self._by_lines():
            status = f"{pl_module.images_per_second():.0f} images/s  {_status(values, 'train')}"
            self.progress.update(self.task, description=epoch, completed=trainer.global_step, status=status)
            return
        left = (now - self._began) / (trainer.global_step - self._first) * (self.steps - trainer.global_step)
        # The module counts a step after its callbacks: the first of an epoch has no rate yet.
        rate = f"  {pl_module.images_per_second():.0f} images/s" if pl_module.epoch_images else ""
        self.console.print(
            f"{epoch} step {batch_idx + 1}/{trainer.num_training_batches}{rate}"
            f"  train {_status(values, 'train')}  {_duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )

    def _by_lines(self) -> bool:
        return not self.console.is_terminal

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Called before the module's own hook, which resets the metrics.
        assert isinstance(pl_module, Classifier)
        values = pl_module.train_metrics.compute("train")
        self.console.print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {pl_module.images_per_second():6.0f} images/s"
            f"  train {_status(values, 'train')}"
            f"  val {_status(pl_module.val_metrics.compute('val'), 'val')}"
            f"{self._hint(trainer, pl_module, values['train_loss'])}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )

    def _hint(self, trainer: pl.Trainer, pl_module: Classifier, loss: float) -> str:
        settings, classes = pl_module.header.settings, len(pl_module.header.classes)
        warming = trainer.current_epoch * int(trainer.num_training_batches) < round(settings.warmup * self.steps)
        # The figures of the layers are a collective of all processes, which have the same loss.
        if warming or learns(loss, classes):
            return ""
        return f"  {hint(loss, classes, pl_module.movements(), settings.init == 'he')}"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{round(seconds)} s"


def _status(values: dict[str, float], prefix: str) -> str:
    loss, top1, top5 = (values[f"{prefix}_{name}"] for name in ("loss", "top1", "top5"))
    return f"loss {loss:.3f} top-1 {top1:6.1%} top-5 {top5:6.1%}"
