"""The plans, and which models they can split."""

from __future__ import annotations

from torch import nn

from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import Dropout, LocalResponseNorm

__all__ = ["PLANS", "batch_shard", "split_problem"]

PLANS = ("towers", "hybrid", "data")


def batch_shard(plan: str, rank: int, ranks: int, towers: int) -> tuple[int, int]:
    """(index, count): which of `count` equal shards of a batch is the rank's.

    In plan "towers", `towers` neighbouring ranks have the same shard.
    """
    return (rank // towers, ranks // towers) if plan == "towers" else (rank, ranks)


def split_problem(model: AlexNet, plan: str, towers: int) -> str:
    """Why the plan can't split the model over so many towers, or an empty string."""
    spec = model._spec
    towers = 1 if plan == "data" else towers
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch normalisation's statistics would be those of a batch shard"
    if plan == "towers" and towers not in (1, spec.groups):
        other = "" if spec.groups > 1 else "; plans 'hybrid' and 'data' can split it"
        return f"preset {model.preset!r} has {spec.groups} tower{'s' * (spec.groups > 1)}, the mesh {towers}{other}"
    known = (nn.Conv2d, nn.Linear, nn.LocalResponseNorm, nn.Dropout)
    allowed = (nn.Conv2d, nn.Linear, LocalResponseNorm, nn.Dropout, Dropout)
    for module in (*model.features.children(), *model.classifier.children()):
        if isinstance(module, known) and type(module) not in allowed:
            return f"{type(module).__name__} in place of one of AlexNet's layers"
    linears = [layer for layer in model.classifier.children() if isinstance(layer, nn.Linear)]
    if any(layer.out_features % towers for layer in linears[:-1]):
        return f"{linears[0].out_features} neurons don't split into {towers} towers"
    if plan == "towers":
        for module in model.features.children():
            if isinstance(module, nn.Conv2d) and module.out_channels % towers:
                return f"{module.out_channels} filters don't split into {towers} towers"
    return ""
