"""Cross-entropy over logits that are split over the towers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alexnet_kernels.parallel.collectives import Exchange, Group, all_reduce
from alexnet_kernels.parallel.parallelism import Parallelism, parallelism_of

__all__ = ["cross_entropy"]


def cross_entropy(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy for a model split by `parallelize(..., gather_logits=False)`.

    Args:
        model: the model.
        logits: the model's output, [images of the tower, classes of this tower].
        labels: int64 [images that this rank passed to the model].

    Returns:
        A scalar, the same on each rank of a tower group; float32 for bfloat16 and float16 logits. In plan "hybrid" the
        mean is over the images of all ranks of the group. Three numbers per image are sent, never the logits.

    Raises:
        TypeError: labels are not int64.
        ValueError: the numbers of labels and images differ, or the model is not split.
    """
    plan: Parallelism = parallelism_of(model)
    if labels.dtype != torch.int64:
        raise TypeError(f"cross_entropy: labels must be int64, not {labels.dtype}")
    rows = len(logits) // (plan.tower.size if plan.name == "hybrid" else 1)
    if labels.shape != (rows,):
        raise ValueError(f"cross_entropy: {rows} images need labels [{rows}], not {list(labels.shape)}")
    if plan.name == "hybrid" and plan.tower.size > 1:
        exchange = Exchange("labels", plan.tower)
        received = exchange.start(labels)
        exchange.wait()
        labels = received.flatten()
    return _CrossEntropy.apply(logits, labels, plan.tower, plan.first_class)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, tower: Group, first: int) -> Tensor:
        z = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        count = z.shape[1]
        high = z.amax(1) if count else z.new_full((len(z),), -torch.inf)
        all_reduce("loss", high, tower, dist.ReduceOp.MAX)
        powers = (z - high[:, None]).exp()
        own = ((labels >= first) & (labels < first + count)).to(z.dtype)
        places = (labels - first).clamp(0, max(count - 1, 0))[:, None]
        target = z.gather(1, places)[:, 0] * own if count else torch.zeros_like(high)
        sums = torch.stack([powers.sum(1), target])
        all_reduce("loss", sums, tower)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(powers / sums[0, :, None], places, own)
        return (sums[0].log() + high - sums[1]).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, places, own = ctx.saved_tensors
        result = softmax.clone()
        if result.shape[1]:
            result.scatter_add_(1, places, -own[:, None])
        return (result * (grad / len(result))).to(ctx.dtype), None, None, None
