"""Loss and accuracy metrics."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from alexnet_kernels.training.distributed.team import Team

__all__ = ["EpochMetrics", "accuracies", "confusion"]


def accuracies(
    num_classes: int, average: Literal["micro", "none"] = "micro"
) -> tuple[MulticlassAccuracy, MulticlassAccuracy]:
    """Top-1 and top-5 accuracy (top-k with all classes if there are fewer than five).

    average: "micro" counts all images alike, "none" gives one value per class.
    """

    def top(k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(
            num_classes,
            top_k=min(k, num_classes),
            average=average,
            validate_args=False,
            # `EpochMetrics` sums all metrics over the processes in one collective.
            sync_on_compute=False,
        )

    return top(1), top(5)


def confusion(num_classes: int) -> MulticlassConfusionMatrix:
    """Numbers of images, int64 [true class, predicted class]."""
    return MulticlassConfusionMatrix(num_classes, validate_args=False)


class EpochMetrics(nn.Module):
    """Mean loss, top-1 and top-5 since the last reset, over the images of all processes."""

    def __init__(self, num_classes: int, team: Team | None = None) -> None:
        super().__init__()
        self.team = team or Team()
        # MeanMetric drops the weight of a value that is NaN.
        self.loss = SumMetric(nan_strategy="disable", sync_on_compute=False)
        self.count = SumMetric(nan_strategy="disable", sync_on_compute=False)
        self.top1, self.top5 = accuracies(num_classes)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """loss: the mean over the images; logits: [n, num_classes]; labels: int64 [n]."""
        self.loss.update(loss * len(labels))
        self.count.update(len(labels))
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)

    def compute(self, prefix: str, all_processes: bool = True) -> dict[str, float]:
        """{<prefix>_loss, <prefix>_top1, <prefix>_top5}; NaN without images.

        A collective of all processes, unless `all_processes` is False: then of this process's images only.
        """
        counted: list[Any] = [self.loss.sum_value, self.count.sum_value]
        for metric in (self.top1, self.top5):
            state: dict[str, Any] = metric.metric_state
            counted += [state["tp"], state["tp"] + state["fn"]]
        sums = [float(value.sum()) for value in counted]
        if all_processes:
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
        """The counts of all processes, as of one process. A collective of all processes."""
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
        """Restore the counts of `state`, in the processes of the first batch shard. Those of the others stay zero."""
        if self.team.batch_shard[0] > 0:
            return
        for name, metric in self._metrics():
            for part, value in state[name].items():
                setattr(metric, part, value.to(metric.device))

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [("loss", self.loss), ("count", self.count), ("top1", self.top1), ("top5", self.top5)]
