"""How right a network is."""

from __future__ import annotations

from typing import Literal

from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

__all__ = ["accuracies", "confusion"]


def accuracies(
    num_classes: int, average: Literal["micro", "none"] = "micro"
) -> tuple[MulticlassAccuracy, MulticlassAccuracy]:
    """Top-1 and top-5 (of as many classes as there are, below five) over all images alike, or ("none") of each
    class's images."""

    def top(k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(
            num_classes,
            top_k=min(k, num_classes),
            average=average,
            validate_args=False,
            # Where there are several processes, their sums are taken in one exchange.
            sync_on_compute=False,
        )

    return top(1), top(5)


def confusion(num_classes: int) -> MulticlassConfusionMatrix:
    """Numbers of images, int64 [true class, likeliest class]."""
    return MulticlassConfusionMatrix(num_classes, validate_args=False)
