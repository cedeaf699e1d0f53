"""How right a network is."""

from __future__ import annotations

from torchmetrics.classification import MulticlassAccuracy

__all__ = ["accuracies"]


def accuracies(num_classes: int) -> tuple[MulticlassAccuracy, MulticlassAccuracy]:
    """Top-1 and top-5 (of as many classes as there are, below five) over all images alike."""

    def top(k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro", validate_args=False)

    return top(1), top(5)
