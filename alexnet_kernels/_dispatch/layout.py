"""Memory formats of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels._torch_private import is_mapped, is_transformed


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The memory format of a result computed from this tensor; csrc/common/tensor.h holds the same rule."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    slice_of_channels_last = tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]
    return torch.channels_last if slice_of_channels_last else torch.contiguous_format


def in_format_of(result: Tensor, tensor: Tensor) -> Tensor:
    """The result in the memory format of results computed from `tensor`.

    Inside a vmap as it is: torch answers no question for a memory format there.
    """
    return result if is_transformed() and is_mapped() else result.contiguous(memory_format=memory_format_of(tensor))


def empty_like(tensor: Tensor, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the memory format of results, for fakes."""
    return torch.empty(
        tensor.shape if shape is None else shape,
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        memory_format=memory_format_of(tensor),
    )


def local(tensor: Any) -> Any:
    """The local shard of a DTensor; anything else unchanged."""
    # torch may be built without torch.distributed.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
