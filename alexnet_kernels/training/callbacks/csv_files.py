"""The figures of a run as CSV files."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from alexnet_kernels._files import write_csv
from alexnet_kernels.training.header import History
from alexnet_kernels.training.module import Classifier

__all__ = ["CSVCallback", "write_history"]


class CSVCallback(Checkpoint):
    """Writes metrics.csv and layers.csv after each epoch. Of several processes, rank 0 writes.

    Place it before `CheckpointCallback`: a run that is killed between the two repeats the epoch and its rows. The other
    way round, the files of a run killed after its last checkpoint would stay incomplete.
    """

    # Lightning calls Checkpoint callbacks after the module's own hook, which adds the epoch's rows.

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        if trainer.is_global_zero:
            write_history(pl_module.history, self.folder)


def write_history(history: History, folder: Path) -> None:
    """Write metrics.csv and layers.csv."""
    write_csv(history.epochs, folder / "metrics.csv")
    write_csv(history.layers, folder / "layers.csv")
