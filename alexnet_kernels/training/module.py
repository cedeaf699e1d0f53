"""The training step: a LightningModule around an AlexNet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels._dispatch.layout import local
from alexnet_kernels._errors import RunError
from alexnet_kernels.capture import CapturedStep, set_rate
from alexnet_kernels.models import AlexNet
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import precision
from alexnet_kernels.training.checkpoint import MODEL
from alexnet_kernels.training.diagnosis import Movement
from alexnet_kernels.training.distributed.team import Team
from alexnet_kernels.training.header import KEY, Header, History, from_dict, to_dict
from alexnet_kernels.training.image_set import Batch, unreadable
from alexnet_kernels.training.metrics import EpochMetrics
from alexnet_kernels.training.settings import PURE

__all__ = ["Classifier"]


class Classifier(pl.LightningModule):
    """Trains an AlexNet on batches of stored images, which it augments on their device.

    Crops and dropout masks are functions of the seed, the epoch and the step. A resumed run therefore draws the same as
    an uninterrupted one, and several processes the same as one.

    Args:
        model: the network.
        header: what the checkpoints say about the run.
        bad_images: "refuse" raises InputError for an unreadable image, "skip" collects its name in `bad`.
        team: the processes of the run.
        graph: whether a GPU runs the training step as one CUDA graph, where it can: in one process, without loss
            scaling.
        notify: takes messages about that; None for warnings.

    Attributes:
        history: the figures of the finished epochs; `on_load_checkpoint` restores them.
        epoch_images, epoch_seconds: images of this epoch's steps, over all processes, and the time of the steps.
    """

    def __init__(
        self,
        model: AlexNet,
        header: Header,
        bad_images: str = "refuse",
        team: Team | None = None,
        graph: bool = True,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.header, self.history = header, History()
        self.began = False  # whether a checkpoint, if any, has been restored
        self.team = team or Team()
        self.bad_images = bad_images
        self.bad: set[str] = set()
        self.train_metrics = EpochMetrics(len(header.classes), self.team)
        self.val_metrics = EpochMetrics(len(header.classes), self.team)
        self.crops = header.crops(precision.input_dtype(header.settings.precision))
        # Taken before the model is moved or split, for the optimizer.
        self._masters = precision.round_weights(model) if header.settings.precision == PURE else {}
        self.epoch_images = 0
        self.epoch_seconds = self._step_began = 0.0
        self.graph, self.notify = graph, notify
        # Loss scaling reads on the CPU whether the gradients are finite, and parallel runs sum them between processes.
        self.whole_step = self.team.parallel is None and header.settings.precision != "16"
        self._step: CapturedStep | None = None
        # `training_step` runs several backward passes per optimizer step.
        self.automatic_optimization = False

    def configure_optimizers(self) -> SGD:
        """SGD with two groups, weights and biases. A group's lr_scale is its factor on the learning rate."""
        settings = self.header.settings
        named = dict(self.model.named_parameters())
        groups = []
        for biases, scale, decay in ((False, 1.0, 1.0), (True, settings.bias_lr, settings.bias_decay)):
            params = [param for name, param in named.items() if name.endswith("bias") == biases]
            groups.append({"params": params, "lr_scale": scale, "weight_decay": settings.weight_decay * decay})
        optimizer = SGD(groups, settings.lr, momentum=settings.momentum, rule=settings.rule)
        if settings.precision == PURE:
            masters: dict[Tensor, Tensor] = {
                named[name]: self._masters.pop(name) for name in precision.rounded_names(self.model)
            }
            optimizer.set_masters(masters)
            if settings.accumulate > 1:
                for param in masters:
                    # The parts' gradients are added in float32.
                    param.grad_dtype = torch.float32
        return optimizer

    def _optimized(self) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        return sorted((name for name, _ in self.model.named_parameters()), key=lambda name: name.endswith("bias"))

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # Crops are drawn on the CPU. Copying the indices to the device and back would synchronize with it.
        indices = batch["indices"]
        moved: Batch = super().transfer_batch_to_device(
            {key: value for key, value in batch.items() if key != "indices"}, device, dataloader_idx
        )
        moved["indices"] = indices
        return moved

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.trainer.training and self.whole_step:
            return batch  # augmented in the step
        if self.trainer.training:
            batch["images"] = self.crops.random(batch["images"], batch["indices"], self.current_epoch)
        else:
            batch["images"] = self.crops.centre(batch["images"])
        return batch

    def on_train_start(self) -> None:
        self.began = True
        if self.graph and not self.whole_step and self.device.type == "cuda" and self.notify is not None:
            reason = "--precision 16 scales the loss" if self.team.parallel is None else "--parallel"
            self.notify(f"the training step is not captured as a CUDA graph: {reason}")
        self._step_began = time.perf_counter()

    def on_train_epoch_start(self) -> None:
        self.epoch_images, self.epoch_seconds, self._step_began = 0, 0.0, time.perf_counter()
        self.train_metrics.reset()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        settings = self.header.settings
        torch.manual_seed((settings.seed << 32) + self.global_step)
        errors = [1 - row["val_top1"] for row in self.history.epochs]
        self.lr = settings.lr_at(self.global_step, int(self.trainer.num_training_batches), errors)
        for group in self.trainer.optimizers[0].param_groups:
            set_rate(group, self.lr * group["lr_scale"])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        count = len(batch["labels"])
        self._note_bad(batch["bad"])
        if not count:
            return
        if self.whole_step:
            self._take_whole_step(batch)
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        parts = self.header.settings.accumulate
        chunks = list(zip(batch["images"].chunk(parts), batch["labels"].chunk(parts), strict=True))
        for pixels, labels in chunks:
            with self._no_sync() if labels is not chunks[-1][1] else nullcontext():
                logits = self.model(pixels).float()
                loss = F.cross_entropy(logits, labels)
                self.manual_backward(loss * (len(labels) / count))
            self.train_metrics.update(loss.detach(), logits.detach(), labels)
        optimizer.step()
        self.team.report_progress()

    def _take_whole_step(self, batch: Batch) -> None:
        images, labels = batch["images"], batch["labels"]
        if self._step is None:
            self._step = CapturedStep(
                self.model,
                self.trainer.optimizers[0],
                _loss,
                augment=self.crops.apply,
                accumulate=self.header.settings.accumulate,
                capture=None if self.graph else False,
                notify=self.notify,
            )
        # What Lightning's optimizer counts around its step.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        loss, logits = self._step(images, labels, *self.crops.draw(images, batch["indices"], self.current_epoch))
        progress.increment_completed()
        self.train_metrics.update(loss, logits.float(), labels)
        self.team.report_progress()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        now = time.perf_counter()
        self.epoch_images += len(batch["labels"]) * self.team.batch_shard[1]
        self.epoch_seconds += now - self._step_began
        self._step_began = now

    def _no_sync(self) -> Any:
        """A block whose gradients are summed over the processes by the next backward pass after it."""
        parallelism = getattr(self.model, "parallelism", None)
        return nullcontext() if parallelism is None else parallelism.no_sync()

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        labels = batch["labels"]
        self._note_bad(batch["bad"])
        if not len(labels):
            return
        logits = self.model(batch["images"]).float()
        self.team.report_progress()
        # Padding images are excluded.
        own = self.trainer.val_dataloaders.without_padding(batch_idx)  # type: ignore[union-attr]
        logits, labels = logits[:own], labels[:own]
        if len(labels):
            self.val_metrics.update(F.cross_entropy(logits, labels), logits, labels)

    def on_train_epoch_end(self) -> None:
        row: dict[str, float] = {"epoch": self.current_epoch + 1, "step": self.global_step}
        row |= {"lr": self.lr}
        row |= self.train_metrics.compute("train") | self.val_metrics.compute("val")
        row |= {"images_per_s": self.images_per_second(), "seconds": self.epoch_seconds}
        if not math.isfinite(row["val_loss"]):
            raise self._diverged()
        self.check_finite()
        self.history.epochs.append(row)
        self.history.layers += [{"epoch": row["epoch"], "step": row["step"]} | layer for layer in self.layer_figures()]
        self.train_metrics.reset()

    def images_per_second(self) -> float:
        """Images per second of this epoch's training steps, over all processes."""
        return self.epoch_images / max(self.epoch_seconds, 1e-9)

    def check_finite(self) -> None:
        """Raise RunError if a loss of this epoch, a weight or its momentum is not finite. Waits for the device."""
        state = self.trainer.optimizers[0].state
        tensors = [state.get(param, {}).get("master", param) for param in self.model.parameters()]
        tensors += [values["momentum_buffer"] for values in state.values() if "momentum_buffer" in values]
        norms = torch.stack(torch._foreach_norm([local(tensor.detach()) for tensor in tensors]))
        lost = not math.isfinite(self.train_metrics.compute("train")["train_loss"])
        if self.team.max(int(lost or not norms.isfinite().all())):
            raise self._diverged()

    def _diverged(self) -> RunError:
        lr = self.header.settings.lr
        return RunError(
            f"the loss or a weight is not finite in epoch {self.current_epoch + 1}, step {self.global_step}: "
            f"try a lower --lr than {lr:g}"
        )

    def layer_figures(self) -> list[dict[str, Any]]:
        """{name, w, dw, ratio} for each parameter: mean magnitudes of its elements and of its last step, and dw / w."""
        optimizer = self.trainer.optimizers[0]
        names = {param: name for name, param in self.model.named_parameters()}
        found: list[tuple[str, float]] = []
        sums: list[Tensor] = []
        for group in optimizer.param_groups:
            # Under the paper's rule the momentum buffer is the step, under torch's the step divided by the rate.
            factor = 1.0 if group["rule"] == "paper" else float(group["lr"])
            for param in group["params"]:
                state = optimizer.state.get(param, {})
                if "momentum_buffer" not in state:
                    continue
                found.append((names[param], factor))
                for tensor in (state.get("master", param.detach()), state["momentum_buffer"]):
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

    def movements(self) -> list[Movement]:
        """The last step of every layer's weights beside what weight decay alone makes of them. A collective."""
        parameters = dict(self.model.named_parameters())
        decays: dict[Tensor, float] = {}
        for group in self.trainer.optimizers[0].param_groups:
            decay = float(group["lr"]) * group["weight_decay"] / (1 - group["momentum"])
            decays |= dict.fromkeys(group["params"], decay)
        rows = [(row["name"], row["ratio"]) for row in self.layer_figures()]
        return [
            Movement(name.removesuffix(".weight"), ratio, decays[parameters[name]])
            for name, ratio in rows
            if parameters[name].dim() > 1
        ]

    def on_save_checkpoint(self, content: dict[str, Any]) -> None:
        content[KEY] = to_dict(self.header, self.history)
        for state in content.get("optimizer_states", ()):
            for group in state["param_groups"]:
                group["lr"] = float(group["lr"])
        content["train_metrics"] = self.train_metrics.state()
        if self.header.settings.precision == PURE:
            precision.split_masters(content, MODEL, self._optimized())

    def on_load_checkpoint(self, content: dict[str, Any]) -> None:
        _, self.history = from_dict(content[KEY])
        self.train_metrics.set_state(content["train_metrics"])
        if self.header.settings.precision == PURE:
            precision.join_masters(content, MODEL, self._optimized(), precision.rounded_names(self.model))

    def _note_bad(self, bad: list[str]) -> None:
        if bad and self.bad_images == "refuse":
            raise unreadable(bad)
        self.bad.update(bad)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)
