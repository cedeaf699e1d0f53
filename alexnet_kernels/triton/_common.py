"""Registration of the Triton operators, and the memory layouts of their tensors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_kernels import _library
from alexnet_kernels._dispatch.layout import memory_format_of


def on_its_device(function: Callable) -> Callable:
    """The function, run with its first tensor's device as the current one, where Triton launches."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else next(iter(args[0]), None)
        if (
            first is not None
            and first.is_cuda
            and torch.cuda.is_initialized()  # False while fake tensors are traced without a GPU
            and first.device.index != torch.cuda.current_device()
        ):
            with torch.cuda.device(first.device):
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def triton_op(function: Callable) -> Callable:
    """Registers a function that launches kernels as the operator of its name, into which torch.compile traces.

    `implement` adds the fake, autograd and autocast of the native operator of that name. Under Triton's interpreter,
    whose kernels cannot be traced, the operator is opaque to torch.compile.
    """
    name = f"{_library.TRITON_NAMESPACE}::{function.__name__}"
    function = on_its_device(function)
    if _library.INTERPRETED:
        return torch.library.custom_op(name, function, mutates_args=())
    return torch.library.triton_op(name, function, mutates_args=())


def wrap_triton(kernel):
    """torch.library.wrap_triton; interpreted kernels, which torch 2.11 refuses there, are returned unchanged."""
    return kernel if _library.INTERPRETED else torch.library.wrap_triton(kernel)


class Layout(NamedTuple):
    """The strides, in elements, of images [N, C, H, W] without gaps."""

    n: int
    c: int
    h: int
    w: int


def layout_of(tensor: Tensor) -> Layout:
    return Layout(*tensor.stride())


def contiguous_as(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor in a memory format with canonical strides, also for dimensions of size 1."""
    tensor = tensor.contiguous(memory_format=memory_format)
    if tensor.dim() != 4:
        return tensor
    _, c, h, w = tensor.shape
    channels_last = memory_format == torch.channels_last
    strides = (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


# Indices of a tile that begins before the last pixel fit 32 bits.
LARGEST = 2**31 - 2**16


def check_size(*images: Tensor) -> None:
    """Raises where the pixels of a batch, or the elements of an image, do not fit the kernels' 32-bit indices."""
    for tensor in images:
        n, c, h, w = tensor.shape
        if n * h * w >= LARGEST or c * h * w >= LARGEST:
            raise ValueError(f"Triton kernels take fewer than {LARGEST} pixels, not tensors of shape {[n, c, h, w]}")


def in_own_format(tensor: Tensor) -> tuple[Tensor, torch.memory_format]:
    """The tensor without gaps in the memory format of its results, and that format."""
    if tensor.dim() == 4 and tensor.shape[1] * tensor.shape[2] * tensor.shape[3] >= 2**31:
        raise ValueError(f"Triton kernels take images of fewer than 2^31 elements, not of shape {list(tensor.shape)}")
    memory_format = memory_format_of(tensor)
    return contiguous_as(tensor, memory_format), memory_format
