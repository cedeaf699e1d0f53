"""Modules over the ops, and a `Sequential` that runs its children fused."""

from alexnet_kernels.nn.fusion import FusedSequential, fusion_report
from alexnet_kernels.nn.modules import Dropout, LocalResponseNorm, WithinMapResponseNorm
from alexnet_kernels.nn.report import FusionReport

__all__ = ["Dropout", "FusedSequential", "FusionReport", "LocalResponseNorm", "WithinMapResponseNorm", "fusion_report"]
