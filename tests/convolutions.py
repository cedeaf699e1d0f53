"""Convolutions for the tests of the CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """x [batch, groups C, H, W] and groups K filters [C, R, S]."""

    batch: int
    C: int
    size: tuple[int, int]
    K: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1
    skipped: int = 0  # elements by which tensors are off their alignment

    def tensor(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Random numbers: a vector, or images in channels_last."""
        memory = torch.randn(self.skipped + torch.Size(size).numel()).mul_(scale).to(dtype)[self.skipped :]
        if len(size) == 1:
            return memory
        return memory.view(size[0], *size[2:], size[1]).permute(0, 3, 1, 2)

    def input_and_weight(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = self.tensor(self.batch, self.groups * self.C, *self.size, dtype=dtype)
        fan_in = self.C * self.kernel[0] * self.kernel[1]
        return x, self.tensor(self.groups * self.K, self.C, *self.kernel, dtype=dtype, scale=fan_in**-0.5)
