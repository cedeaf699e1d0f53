"""Modules over the ops, and a `Sequential` that runs its children fused."""

from alexnet_kernels.nn.fusion import FusedSequential
from alexnet_kernels.nn.modules import AdaptiveAvgPool2d, Dropout, LocalResponseNorm, WithinMapResponseNorm

__all__ = ["AdaptiveAvgPool2d", "Dropout", "FusedSequential", "LocalResponseNorm", "WithinMapResponseNorm"]
