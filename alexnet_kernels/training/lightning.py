"""The training run in PyTorch Lightning's terms: module, data module, checkpoint files, callbacks."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler
from torchmetrics import Metric, SumMetric

from alexnet_kernels._errors import RunError
from alexnet_kernels._files import link_atomically, write_atomically
from alexnet_kernels.models import AlexNet
from alexnet_kernels.ops._common import local
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import checkpoint, images
from alexnet_kernels.training.metrics import accuracies
from alexnet_kernels.training.processes import Team
from alexnet_kernels.training.settings import Settings

__all__ = ["AtomicCheckpointIO", "Bar", "Board", "Classifier", "Images", "Saver", "Stopped"]


CHECKED = 100
"""Steps after which the losses are looked at."""
_ONE_SIGNAL = 3.0
"""Seconds within which two signals to one of several processes are taken for one."""


class Stopped(Exception):
    """The run was asked to end before its last epoch; it is saved."""


class Metrics(nn.Module):
    """Mean loss, top-1 and top-5 since the last reset, of the images of all processes."""

    def __init__(self, num_classes: int, team: Team | None = None) -> None:
        super().__init__()
        self.team = team or Team()
        # MeanMetric leaves its weights out where it keeps NaN.
        self.loss = SumMetric(nan_strategy="disable", sync_on_compute=False)
        self.count = SumMetric(nan_strategy="disable", sync_on_compute=False)
        self.top1, self.top5 = accuracies(num_classes)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss.update(loss * len(labels))
        self.count.update(len(labels))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def compute(self, prefix: str, everyone: bool = True) -> dict[str, float]:
        """{<prefix>_loss, _top1, _top5}; all processes call it, unless `everyone` is False and it looks at this
        one's images only."""
        counted: list[Any] = [self.loss.sum_value, self.count.sum_value]
        for metric in (self.top1, self.top5):
            state: dict[str, Any] = metric.metric_state
            counted += [state["tp"], state["tp"] + state["fn"]]
        sums = [float(value.sum()) for value in counted]
        if everyone:
            sums = self.team.sum(sums)
        loss, count, *right = sums
        names = (f"{prefix}_loss", f"{prefix}_top1", f"{prefix}_top5")
        if not count:
            return dict.fromkeys(names, math.nan)
        return dict(zip(names, (loss / count, right[0] / right[1], right[2] / right[3]), strict=True))

    def reset(self) -> None:
        for _, metric in self._metrics():
            metric.reset()

    def state(self) -> dict[str, dict[str, Any]]:
        """What all processes have counted so far; all call it."""
        own: dict[str, dict[str, Any]] = {name: dict(metric.metric_state) for name, metric in self._metrics()}
        if self.team.size > 1:
            parts = [(values, part) for values in own.values() for part in values]
            flat = torch.cat([values[part].flatten().double().cpu() for values, part in parts])
            sums = torch.tensor(self.team.sum(flat.tolist()), dtype=torch.float64) / self.team.duplicates
            sizes = [values[part].numel() for values, part in parts]
            for (values, part), total in zip(parts, sums.split(sizes), strict=True):
                values[part] = total.view(values[part].shape).to(values[part].dtype)
        return own

    def set_state(self, state: dict[str, dict[str, Any]]) -> None:
        """What was counted before counts as one process's, and that of its duplicates."""
        if self.team.rows[0] > 0:
            return
        for name, metric in self._metrics():
            for part, value in state[name].items():
                setattr(metric, part, value.to(metric.device))

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [("loss", self.loss), ("count", self.count), ("top1", self.top1), ("top5", self.top5)]


class Classifier(pl.LightningModule):
    """Trains an AlexNet on batches of an ImageSet, augmenting them on their device.

    Crops and dropout masks are functions of the seed, the epoch and the step, so that a resumed run draws
    what the whole one would, and each of several processes what one would.
    """

    def __init__(
        self, model: AlexNet, header: checkpoint.Header, bad_images: str = "refuse", team: Team | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.header = header
        self.team = team or Team()
        self.bad_images = bad_images
        self.bad: set[str] = set()
        self.train_metrics = Metrics(len(header.classes), self.team)
        self.val_metrics = Metrics(len(header.classes), self.team)
        self.crops = header.crops()
        self.epoch_images = 0
        self.epoch_seconds = 0.0
        # Batches are taken in parts.
        self.automatic_optimization = False

    def configure_optimizers(self) -> SGD:
        """Two groups, weights and biases, each with lr_scale, its factor on the learning rate."""
        settings = self.header.settings
        named = list(self.model.named_parameters())
        groups = []
        for biases, scale, decay in ((False, 1.0, 1.0), (True, settings.bias_lr, settings.bias_decay)):
            params = [param for name, param in named if name.endswith("bias") == biases]
            groups.append({"params": params, "lr_scale": scale, "weight_decay": settings.weight_decay * decay})
        return SGD(groups, settings.lr, momentum=settings.momentum, rule=settings.rule)

    def transfer_batch_to_device(self, batch: images.Batch, device: torch.device, dataloader_idx: int) -> images.Batch:
        # Crops are drawn on the CPU: sending indices away and fetching them back would wait for the device.
        indices = batch["indices"]
        moved: images.Batch = super().transfer_batch_to_device(
            {key: value for key, value in batch.items() if key != "indices"}, device, dataloader_idx
        )
        moved["indices"] = indices
        return moved

    def on_after_batch_transfer(self, batch: images.Batch, dataloader_idx: int) -> images.Batch:
        if self.trainer.training:
            batch["images"] = self.crops.random(batch["images"], batch["indices"], self.current_epoch)
        else:
            batch["images"] = self.crops.centre(batch["images"])
        return batch

    def on_train_epoch_start(self) -> None:
        self.epoch_images, self.epoch_seconds = 0, 0.0
        self.train_metrics.reset()

    def on_train_batch_start(self, batch: images.Batch, batch_idx: int) -> None:
        settings = self.header.settings
        torch.manual_seed((settings.seed << 32) + self.global_step)
        errors = [1 - row["val_top1"] for row in self.header.history]
        self.lr = settings.lr_at(self.global_step, int(self.trainer.num_training_batches), errors)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * group["lr_scale"]

    def training_step(self, batch: images.Batch, batch_idx: int) -> None:
        count = len(batch["labels"])
        self._note_bad(batch["bad"])
        if not count:
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        parts = self.header.settings.accumulate
        chunks = list(zip(batch["images"].chunk(parts), batch["labels"].chunk(parts), strict=True))
        for pixels, labels in chunks:
            with self._gradients_stay() if labels is not chunks[-1][1] else nullcontext():
                logits = self.model(pixels).float()
                loss = F.cross_entropy(logits, labels)
                self.manual_backward(loss * (len(labels) / count))
            self.train_metrics.update(loss.detach(), logits.detach(), labels)
        optimizer.step()
        self.epoch_images += count * self.team.rows[1]
        self.team.moved()

    def _gradients_stay(self) -> Any:
        """A block whose gradients are summed over the processes with those that follow it."""
        parallelism = getattr(self.model, "parallelism", None)
        return nullcontext() if parallelism is None else parallelism.no_sync()

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()

    def validation_step(self, batch: images.Batch, batch_idx: int) -> None:
        labels = batch["labels"]
        self._note_bad(batch["bad"])
        if not len(labels):
            return
        logits = self.model(batch["images"]).float()
        self.team.moved()
        # What only fills up a process's part isn't counted.
        own = self.trainer.val_dataloaders.own(batch_idx)  # type: ignore[union-attr]
        logits, labels = logits[:own], labels[:own]
        if len(labels):
            self.val_metrics.update(F.cross_entropy(logits, labels), logits, labels)

    def on_train_epoch_end(self) -> None:
        row: dict[str, float] = {"epoch": self.current_epoch + 1, "step": self.global_step}
        row |= {"lr": self.lr}
        row |= self.train_metrics.compute("train") | self.val_metrics.compute("val")
        row |= {
            "images_per_s": self.epoch_images / max(self.epoch_seconds, 1e-9),
            "seconds": self.epoch_seconds,
        }
        if not math.isfinite(row["val_loss"]):
            raise self.diverged()
        self.check_finite()
        self.header.history.append(row)
        self.header.layers += [{"epoch": row["epoch"], "step": row["step"]} | layer for layer in self.layer_figures()]
        self.train_metrics.reset()

    def check_finite(self) -> None:
        """RunError if a loss of this epoch, a weight or its momentum is not finite; waits for the device."""
        state = self.trainer.optimizers[0].state.values()
        tensors = [*self.model.parameters(), *(values["momentum_buffer"] for values in state)]
        norms = torch.stack(torch._foreach_norm([local(tensor.detach()) for tensor in tensors]))
        lost = not math.isfinite(self.train_metrics.compute("train")["train_loss"])
        if self.team.highest(int(lost or not norms.isfinite().all())):
            raise self.diverged()

    def diverged(self) -> RunError:
        lr = self.header.settings.lr
        return RunError(
            f"the loss or a weight is not finite in epoch {self.current_epoch + 1}, step {self.global_step}: "
            f"try a lower --lr than {lr:g}"
        )

    def layer_figures(self) -> list[dict[str, Any]]:
        """Of each parameter, the mean magnitude of its elements and of its last step's: {name, w, dw, ratio}."""
        optimizer = self.trainer.optimizers[0]
        names = {param: name for name, param in self.model.named_parameters()}
        found: list[tuple[str, float]] = []
        sums: list[Tensor] = []
        for group in optimizer.param_groups:
            # The paper's momentum is the step itself.
            factor = 1.0 if group["rule"] == "paper" else group["lr"]
            for param in group["params"]:
                if param not in optimizer.state:
                    continue
                found.append((names[param], factor))
                for tensor in (param.detach(), optimizer.state[param]["momentum_buffer"]):
                    sums.append(local(tensor).abs().sum(dtype=torch.float64))
                sums.append(torch.tensor(float(local(param).numel()), dtype=torch.float64, device=sums[-1].device))
        rows = []
        totals = self.team.sum(torch.stack(sums).tolist() if sums else [])
        for i, (name, factor) in enumerate(found):
            total_w, total_dw, count = totals[3 * i : 3 * i + 3]
            w, dw = total_w / count, factor * total_dw / count
            rows.append({"name": name, "w": w, "dw": dw, "ratio": dw / w if w else math.nan})
        order = {name: i for i, name in enumerate(names.values())}
        return sorted(rows, key=lambda row: order[row["name"]])

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        content[checkpoint.KEY] = self.header.to_dict()
        content["train_metrics"] = self.train_metrics.state()

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        self.header.history = list(content[checkpoint.KEY]["history"])
        self.header.layers = list(content[checkpoint.KEY]["layers"])
        self.train_metrics.set_state(content["train_metrics"])

    def _note_bad(self, bad: list[str]) -> None:
        if bad and self.bad_images == "refuse":
            raise images.refuse(bad)
        self.bad.update(bad)


class Shuffled(Sampler[int]):
    """The places 0 ... length - 1 in an order that is a function of (seed, epoch), from the start-th on."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        start, self.start = self.start, 0
        return iter(order[start:])


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(worker: int) -> None:
    # A terminal or a scheduler signals all processes; readers must outlive the step that is then saved.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Shares(BatchSampler):
    """Of each batch the places that are one process's: the index-th of equal parts, of each accumulated part of it.

    A batch that doesn't split is filled up with its last place.
    """

    def __init__(
        self, sampler: Any, batch_size: int, drop_last: bool, rows: tuple[int, int] = (0, 1), accumulate: int = 1
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rows, self.accumulate = rows, accumulate

    def __iter__(self) -> Iterator[list[int]]:
        index, parts = self.rows
        for places in super().__iter__():
            if parts == 1:
                yield places
                continue
            length = -(-len(places) // self.accumulate)
            own: list[int] = []
            for start in range(0, len(places), length):
                chunk = places[start : start + length]
                share = -(-len(chunk) // parts)
                taken = chunk[index * share : (index + 1) * share]
                own += taken + [chunk[-1]] * (share - len(taken))
            yield own


class Batches(DataLoader):
    """Batches of an ImageSet, in order or shuffled, or a process's parts of them; resumes between two batches of an
    epoch."""

    def __init__(
        self,
        dataset: images.StoredImages,
        batch_size: int,
        workers: int,
        seed: int | None = None,
        rows: tuple[int, int] = (0, 1),
        accumulate: int = 1,
    ) -> None:
        shuffled = seed is not None
        sampler = Shuffled(len(dataset), seed) if seed is not None else SequentialSampler(dataset)
        whole = shuffled and len(dataset) >= batch_size
        super().__init__(
            dataset,
            batch_sampler=Shares(sampler, batch_size, whole, rows, accumulate),
            num_workers=0 if dataset.pixels is not None else workers,
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=torch.cuda.is_available(),
        )
        self.done = 0

    def __iter__(self) -> Iterator[images.Batch]:  # type: ignore[override]
        sampler = self.batch_sampler.sampler  # type: ignore[union-attr]
        self.done = getattr(sampler, "start", 0) // self.batch_sampler.batch_size  # type: ignore[union-attr]
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def own(self, batch: int) -> int:
        """How many of a process's places of this batch, in order, are not there to fill it up."""
        shares: Any = self.batch_sampler
        index, parts = shares.rows
        count = min(shares.batch_size, len(self.dataset) - batch * shares.batch_size)  # type: ignore[arg-type]
        share = -(-count // parts)
        return min(max(count - index * share, 0), share)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.sampler.start = (  # type: ignore[union-attr]
            state["batches"] % len(self) * self.batch_sampler.batch_size  # type: ignore[union-attr]
        )


class Images(pl.LightningDataModule):
    """A training and a validation set."""

    def __init__(
        self,
        train: images.StoredImages,
        val: images.StoredImages,
        settings: Settings,
        workers: int,
        rows: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.settings, self.workers, self.rows = settings, workers, rows

    def train_dataloader(self) -> Batches:
        settings = self.settings
        return Batches(self.train, settings.batch_size, self.workers, settings.seed, self.rows, settings.accumulate)

    def val_dataloader(self) -> Batches:
        return Batches(self.val, max(self.settings.batch_size, 100), self.workers, rows=self.rows)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Files that are written whole or not at all, and read with weights_only."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.save(checkpoint_, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return checkpoint.load(path)[1]


class Saver(Checkpoint):
    """Keeps last.ckpt, best.ckpt (by top-1), metrics.csv and layers.csv in a folder, and ends a run early.

    last.ckpt is written after every epoch and every `every` steps. SIGINT and SIGTERM inside `signals`, and the
    passing of max_seconds, save it after the step and raise `Stopped`; a second signal interrupts at once. What
    is not finite is never saved. Of several processes all stop together, and rank 0 writes.
    """

    def __init__(
        self, folder: Path, max_seconds: float | None = None, every: int = 1000, team: Team | None = None
    ) -> None:
        self.folder, self.every, self.team = folder, every, team or Team()
        self.deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.asked: str | None = None
        self.asked_at = 0.0
        self.taken = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Takes SIGINT and SIGTERM inside the block; for the main thread only, in others it does nothing."""
        # Around the trainer: it puts back the handlers it found after its callbacks have gone.
        before = {}
        self.taken = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self._ask)
        try:
            yield
        finally:
            self.taken = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning's own handler, by now in place, would end the run without saving it.
        if threading.current_thread() is threading.main_thread() and self.taken:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked is not None:
            # torchrun adds a signal of its own to the terminal's.
            if self.team.size > 1 and now - self.asked_at < _ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self.asked, self.asked_at = "interrupted", now

    def _stop_reason(self) -> str | None:
        if self.asked is None and self.deadline is not None and time.monotonic() >= self.deadline:
            self.asked = "out of time"
        reasons = (None, "out of time", "interrupted")
        return reasons[self.team.highest(reasons.index(self.asked))]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        # After the last batch the epoch is first brought to its end.
        if batch_idx + 1 == trainer.num_training_batches:
            return
        reason = self._stop_reason()
        if reason or trainer.global_step % self.every == 0:
            pl_module.check_finite()
            trainer.save_checkpoint(self.folder / "last.ckpt")
        elif trainer.global_step % CHECKED == 0:
            pl_module.check_finite()
        if reason:
            raise Stopped(reason)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        header = pl_module.header
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if self.team.rank == 0:
            if header.best() is header.history[-1]:
                link_atomically(self.folder / "last.ckpt", self.folder / "best.ckpt")
            write_csv(header.history, self.folder / "metrics.csv")
            write_csv(header.layers, self.folder / "layers.csv")
        if len(header.history) < header.settings.epochs and (reason := self._stop_reason()):
            raise Stopped(reason)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


class Board(Callback):
    """TensorBoard's events: losses and rate as they go, each epoch's figures, each layer's |w| and |dw| / |w|.

    Of several processes rank 0 writes them.
    """

    def __init__(self, folder: Path, every: int = 20) -> None:
        self.folder, self.every = folder, every
        self.writer: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not trainer.is_global_zero:
            return
        # What a killed run wrote after its last checkpoint is written again.
        self.writer = SummaryWriter(str(self.folder), purge_step=trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        if trainer.global_step % self.every == 0:
            values = pl_module.train_metrics.compute("train") | {"lr": pl_module.lr}
            self._write("step", values, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before the module's own hook, which makes the epoch's row and empties the metrics.
        assert isinstance(pl_module, Classifier)
        values = pl_module.train_metrics.compute("train") | pl_module.val_metrics.compute("val")
        self._write("epoch", values, trainer.global_step)
        for row in pl_module.layer_figures():
            self._write(row["name"], {"w": row["w"], "dw over w": row["ratio"]}, trainer.global_step)
        if self.writer is not None:
            self.writer.flush()

    def _write(self, group: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items() if self.writer is not None else ():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, paths: Sequence[Path], step: int) -> None:
        """Add PNG files, once the run has ended."""
        if self.writer is None:
            return
        for path in paths:
            with Image.open(path) as image:
                self.writer.add_image(path.stem, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.close()


class Bar(Callback):
    """A line for each epoch; on a terminal a bar, too, with images/s, loss, top-1 and top-5."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self._shown = self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(12), TimeRemainingColumn(compact=True)]
        self.progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console, transient=True)
        if self.console.is_terminal:
            self.progress.start()
        steps = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        self.task = self.progress.add_task("", total=steps, completed=trainer.global_step, status="")
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        assert self.progress is not None
        now = time.perf_counter()
        pl_module.epoch_seconds += now - self._since
        self._since = now
        # Reading the metrics waits for the device.
        if not self.console.is_terminal or now - self._shown < 0.25:
            return
        self._shown = now
        self.progress.update(
            self.task,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            completed=trainer.global_step,
            status=f"{pl_module.epoch_images / max(pl_module.epoch_seconds, 1e-9):.0f} images/s  "
            + _status(pl_module.train_metrics.compute("train", everyone=False), "train"),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Callbacks come before the module's own hook, which makes the epoch's row.
        assert isinstance(pl_module, Classifier)
        speed = pl_module.epoch_images / max(pl_module.epoch_seconds, 1e-9)
        self.console.print(
            f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}  {speed:6.0f} images/s"
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
