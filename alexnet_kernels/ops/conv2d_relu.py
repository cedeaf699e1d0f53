"""Convolution, bias and ReLU.

See: schema in csrc/library.cpp, csrc/cpu/conv2d_relu.cpp, reference.conv2d_relu, tests/ops/test_conv2d_relu.py.
Autocast: input, weight and bias are cast to the autocast dtype, as for torch's conv2d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels.backends import select
from alexnet_kernels.ops import _common

OP = "conv2d_relu"


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`max(0, conv2d(input, weight) + bias)`; ReLU's mask in backward comes from the output, nothing else is stored.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16; any memory format, channels_last is the
            fast one.
        weight: [K, C / groups, R, S] in the input's dtype (autocast casts both).
        bias: [K] or None.
        stride, padding: pixels, an int or (rows, columns); zeros are padded on all sides.
        groups: input and output channels are split in `groups` towers that do not see each other.
        relu: False leaves ReLU to the op that follows, which can take it for nothing (`max_pool2d`, `lrn_max_pool2d`).
        backend: see `alexnet_kernels.backends`.

    Returns:
        [N, K, OH, OW] (or [K, OH, OW]) in the input's memory format, `OH = floor((H + 2 * padding - R) / stride) + 1`.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: another rank, shapes or groups that do not fit, an image smaller than the kernel.
        RuntimeError: tensors on different devices.

    Source: Krizhevsky et al. 2012, sections 3.1 and 3.5.
    """
    stride, padding = _common.pair(OP, "stride", stride, 1), _common.pair(OP, "padding", padding, 0)
    images = input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == 3 else input
    _check(images, weight, bias, stride, padding, groups)
    if select(OP, images, backend) == "native":
        output = F.conv2d(images, weight, bias, stride, padding, 1, groups)
        output = F.relu(output) if relu else output
    else:
        output = torch.ops.alexnet_kernels.conv2d_relu(images, weight, bias, stride, padding, groups, relu)
    return output.squeeze(0) if input.dim() == 3 else output


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int) -> list:
    """Checks the arguments; the output's shape."""
    _common.check_images(OP, input)
    _common.check_like(OP, "weight", weight, input)
    _common.check_floating(OP, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{OP}: weight must be [K, C / groups, R, S], not of shape {list(weight.shape)}")
    _common.check_groups(OP, groups, weight.shape[0], "output channels")
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{OP}: the input has {input.shape[1]} channels, but weight {list(weight.shape)} with groups={groups} "
            f"takes {weight.shape[1] * groups}"
        )
    _common.check_same_dtype(OP, "weight", weight, input)
    if bias is not None:
        _common.check_like(OP, "bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{OP}: bias must be [{weight.shape[0]}], not of shape {list(bias.shape)}")
        _common.check_same_dtype(OP, "bias", bias, input)
    shape = [input.shape[0], weight.shape[0]]
    for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True):
        if size + 2 * pad < kernel:
            raise ValueError(
                f"{OP}: an image of {input.shape[2]} x {input.shape[3]} (padding {padding}) is smaller than the "
                f"kernel {weight.shape[2]} x {weight.shape[3]}"
            )
        shape.append((size + 2 * pad - kernel) // step + 1)
    return shape


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int, relu: bool) -> Tensor:
    return _common.empty_like(input, _check(input, weight, bias, stride, padding, groups))


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, ctx.stride, ctx.padding, ctx.groups, ctx.relu = inputs
    ctx.bias_size = None if bias is None else [weight.shape[0]]
    ctx.save_for_backward(input, weight, output if ctx.relu else None)


def _backward(ctx, grad: Tensor):
    input, weight, output = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.alexnet_kernels.relu_dropout_backward(grad, output, 1.0)
    needed = [*ctx.needs_input_grad[:2], ctx.bias_size is not None and ctx.needs_input_grad[2]]
    grads = torch.ops.aten.convolution_backward(
        grad, input, weight, ctx.bias_size, ctx.stride, ctx.padding, [1, 1], False, [0, 0], ctx.groups, needed
    )
    return *grads, None, None, None, None


_common.register(OP, _fake, _backward, _setup_context)
_common.register_autocast(OP)
