"""The checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from alexnet_kernels._files import link_atomically
from alexnet_kernels.training import checkpoint
from alexnet_kernels.training.callbacks.stop import Stopped, StopRequest
from alexnet_kernels.training.module import Classifier

__all__ = ["AtomicCheckpointIO", "CheckpointCallback"]

CHECK_EVERY = 100
"""Steps between two checks that losses and weights are finite."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints completely or not at all, and reads them with weights_only."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.save(checkpoint_, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return checkpoint.load(path).content


class CheckpointCallback(Checkpoint):
    """Writes last.ckpt and best.ckpt (the highest top-1) to a folder, and stops the run when it is requested.

    last.ckpt is written after every epoch and every `every` steps. On a stop request it is written after the step, and
    `Stopped` is raised. A state that is not finite is never saved. Of several processes, rank 0 writes.
    """

    def __init__(self, folder: Path, stop: StopRequest, every: int = 1000) -> None:
        self.last, self.best = folder / "last.ckpt", folder / "best.ckpt"
        self.stop, self.every = stop, every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.replace_lightning_handler()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        # After the last batch, `on_train_epoch_end` follows.
        if batch_idx + 1 == trainer.num_training_batches:
            return
        reason = self.stop.reason()
        if reason or trainer.global_step % self.every == 0:
            pl_module.check_finite()
            trainer.save_checkpoint(self.last)
        elif trainer.global_step % CHECK_EVERY == 0:
            pl_module.check_finite()
        if reason:
            raise Stopped(reason)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        history = pl_module.history
        trainer.save_checkpoint(self.last)
        if trainer.is_global_zero and history.best() is history.epochs[-1]:
            link_atomically(self.last, self.best)
        if len(history.epochs) < pl_module.header.settings.epochs and (reason := self.stop.reason()):
            raise Stopped(reason)
