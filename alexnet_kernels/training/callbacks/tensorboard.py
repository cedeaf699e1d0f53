"""The figures of a run as TensorBoard events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from alexnet_kernels.training.module import Classifier

__all__ = ["TensorBoardCallback"]


class TensorBoardCallback(Callback):
    """Writes the training loss and the rate every `every` steps, and each epoch's figures and each layer's |w| and
    |dw| / |w| after the epoch. Of several processes, rank 0 writes.
    """

    def __init__(self, folder: Path, every: int = 20) -> None:
        self.folder, self.every = folder, every
        self.writer: SummaryWriter | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            # Drops what a killed run wrote after its last checkpoint: those steps are repeated.
            self.writer = SummaryWriter(str(self.folder), purge_step=trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        if trainer.global_step % self.every == 0:
            values = pl_module.train_metrics.compute("train") | {"lr": pl_module.lr}
            self._write("step", values, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Called before the module's own hook, which resets the metrics.
        assert isinstance(pl_module, Classifier)
        values = pl_module.train_metrics.compute("train") | pl_module.val_metrics.compute("val")
        self._write("epoch", values, trainer.global_step)
        for row in pl_module.layer_figures():
            self._write(row["name"], {"w": row["w"], "dw over w": row["ratio"]}, trainer.global_step)
        if self.writer is not None:
            self.writer.flush()

    def _write(self, group: str, values: dict[str, float], step: int) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def add_pictures(self, paths: Sequence[Path], step: int) -> None:
        """Add PNG files after the run, and close the writer."""
        if self.writer is None:
            # Nothing was left to train.
            self.writer = SummaryWriter(str(self.folder))
        for path in paths:
            with Image.open(path, formats=("PNG",)) as image:
                self.writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.close()
