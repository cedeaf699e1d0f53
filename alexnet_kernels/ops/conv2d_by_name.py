"""The implementations of a convolution by name, beyond the algorithms of one operator: split in groups, and gradients.

See: ops/conv2d_relu.py, _dispatch/choices.py for the names. Part of conv2d_relu.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels._dispatch.kinds import GRADIENTS
from alexnet_kernels._dispatch.layout import memory_format_of
from alexnet_kernels.backends import kernels_of


def split_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    relu: bool,
) -> Tensor:
    """The library's convolution, one a group, joined. Arguments and result are conv2d_relu's."""
    biases: Sequence[Tensor | None] = [None] * groups if bias is None else bias.chunk(groups)
    parts = [
        F.conv2d(x, w, b, stride, padding)
        for x, w, b in zip(input.chunk(groups, 1), weight.chunk(groups), biases, strict=True)
    ]
    output = torch.cat(parts, 1).contiguous(memory_format=memory_format_of(input))
    return F.relu(output) if relu else output


def gradient_of_input(
    name: str,
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    *,
    mask_input: bool = False,
    kernels: Any = None,
) -> Tensor:
    """The input's gradient by an implementation of GRADIENTS.

    "library" and "split" are differentiable, the others are not.

    Args:
        output: if given, it is ReLU's and masks the gradient.
        mask_input: the input is ReLU's and masks its gradient.
        kernels: the CUDA operators; None for those of backend "cuda".
    """
    operands = input, weight, stride, padding, groups
    if _named(name) == "triton":
        return kernels_of("triton").conv2d_relu_backward_input(grad, output, *operands, mask_input)
    if name not in _BY_TORCH:
        kernels = kernels or kernels_of("cuda")
        return kernels.conv2d_relu_backward_input(grad, output, *operands, mask_input, GRADIENTS.index(name))
    masked = _masked(grad, output)
    if name == "library" or groups == 1:
        result = _library((masked, input, weight), None, stride, padding, groups, [True, False, False])[0]
    else:
        parts = [
            _library(part, None, stride, padding, 1, [True, False, False])[0]
            for part in _parts(groups, masked, input, weight)
        ]
        result = torch.cat(parts, 1).contiguous(memory_format=memory_format_of(input))
    return _masked(result, input if mask_input else None)


def gradient_of_weight(
    name: str,
    grad: Tensor,
    output: Tensor | None,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    with_bias: bool = True,
    *,
    kernels: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and, if wanted, bias, as `gradient_of_input`."""
    operands = input, weight, stride, padding, groups
    if _named(name) not in _BY_TORCH:
        if name == "triton":
            of_weight, of_bias = kernels_of("triton").conv2d_relu_backward_weight(grad, output, *operands)
        else:
            kernels = kernels or kernels_of("cuda")
            of_weight, of_bias = kernels.conv2d_relu_backward_weight(grad, output, *operands, GRADIENTS.index(name))
        return of_weight, of_bias if with_bias else None
    masked, wanted = _masked(grad, output), [False, True, with_bias]
    if name == "library" or groups == 1:
        size = [weight.shape[0]] if with_bias else None
        return _library((masked, input, weight), size, stride, padding, groups, wanted)[1:]
    size = [weight.shape[0] // groups] if with_bias else None
    parts = [_library(part, size, stride, padding, 1, wanted)[1:] for part in _parts(groups, masked, input, weight)]
    of_weight = torch.cat([part[0] for part in parts]).contiguous(memory_format=memory_format_of(weight))
    return of_weight, torch.cat([part[1] for part in parts]) if with_bias else None


_BY_TORCH = ("library", "split")


def _named(name: str) -> str:
    if name not in GRADIENTS:
        raise ValueError(
            f"conv2d_relu: {name!r} computes no gradient: one of {', '.join(map(repr, GRADIENTS))} expected"
        )
    return name


def _masked(grad: Tensor, output: Tensor | None) -> Tensor:
    return grad if output is None else torch.ops.aten.threshold_backward(grad, output, 0)


def _parts(groups: int, grad: Tensor, input: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(grad.chunk(groups, 1), input.chunk(groups, 1), weight.chunk(groups), strict=True)


def _library(
    operands: tuple[Tensor, Tensor, Tensor],
    bias_size: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Any, ...]:
    """torch's gradients, from (gradient, input, weight), of input, weight and bias, None where not wanted."""
    geometry = bias_size, stride, padding, [1, 1], False, [0, 0], groups
    return torch.ops.aten.convolution_backward(*operands, *geometry, wanted)
