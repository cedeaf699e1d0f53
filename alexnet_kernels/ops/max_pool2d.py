"""Overlapping max-pooling with a one-byte argmax, optionally with the bias and the ReLU before it.

See: schema in csrc/library.cpp, csrc/cpu/max_pool2d.cpp, csrc/cuda/max_pool2d.cu, alexnet_kernels/triton/max_pool2d.py,
reference.max_pool2d, op_info/max_pool2d.py, tests/ops/test_max_pool2d.py.
Autocast: the input's dtype is kept; a float32 bias goes with any 16-bit input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._errors import TensorTypeError, TensorValueError
from alexnet_kernels.backends import kernels_of, select

OP = "max_pool2d"
MOST_PIXELS = 256
"""Of a window, whose positions fit one byte."""
NOWHERE = 255
"""The argmax of a window that ReLU sets to zero: no position, since windows with ReLU have at most 255 pixels."""


class Window(NamedTuple):
    """The geometry of a 2-d pooling, [rows, columns] each."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] | None = 2,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The maximum of each window of x: the input plus a bias of each channel and, with `relu`, max(0, that).

    Without them what torch.nn.functional.max_pool2d computes, NaN and ties included; backward is bitwise repeatable,
    because each input pixel gathers from its windows. The bias is added to the maximum, in float32 (float64 for
    float64), and the sum is rounded once: a pass over the output in place of one over the input. The gradient
    goes to the maximum of the input also where an infinite or NaN bias makes all sums equal, and a bias of infinity
    makes NaN of -infinity only where that is the maximum.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16; any memory format.
        kernel_size, stride, padding: pixels, an int or (rows, columns). A window holds at most 256 pixels. Padding
            takes no part in the maximum; it is at most half the kernel. The stride None is the kernel_size, the default
            of torch.nn.functional.max_pool2d.
        ceil_mode: windows may extend beyond the bottom and right edges.
        bias: [C] or None; in the input's dtype, or float32 where that is bfloat16 or float16.
        relu: applies max(0, x) at no cost.
        backend: see `alexnet_kernels.backends`.

    Returns:
        [N, C, OH, OW] (or [C, OH, OW]) in the input's dtype and memory format, with
        `OH = floor((H + 2 * padding - kernel_size) / stride) + 1` (ceil with ceil_mode).

    Raises:
        TypeError: input or bias isn't a floating-point tensor, bias has another dtype, or a size isn't integer.
        ValueError: another rank, a bias of another shape, or an image smaller than the window (with ceil_mode, than the
            smallest part of a window that torch accepts).
        RuntimeError: tensors on different devices.

    Source: Krizhevsky et al. 2012, section 3.4.
    """
    window = window_of(OP, kernel_size, stride, padding)
    images = input.unsqueeze(0) if checks.is_image(input) else input
    check_pool(OP, images, bias, window, ceil_mode)
    chosen = select(OP, images, backend)
    if chosen != "native":
        kernels = kernels_of(chosen)
        apart = relu and _area(window) > NOWHERE  # no byte is left for the windows that ReLU sets to zero
        output = kernels.max_pool2d(images, bias, *window, ceil_mode, relu and not apart)[0]
        if apart:
            output = kernels.max_pool2d(output, None, [1, 1], [1, 1], [0, 0], False, True)[0]
    elif bias is None:
        output = F.max_pool2d(F.relu(images) if relu else images, *window, ceil_mode=ceil_mode)
    else:
        maximum = F.max_pool2d(images, *window, ceil_mode=ceil_mode) + bias.reshape(-1, 1, 1)
        output = (F.relu(maximum) if relu else maximum).to(images.dtype)
    return output.squeeze(0) if input.dim() == 3 else output


def window_of(op: str, kernel_size: Any, stride: Any, padding: Any) -> Window:
    if type(kernel_size) is type(stride) is type(padding) is int and not torch.compiler.is_compiling():
        return _square(op, kernel_size, stride, padding)
    return _window(op, kernel_size, stride, padding)


@functools.lru_cache(maxsize=64)
def _square(op: str, kernel_size: int, stride: int, padding: int) -> Window:
    return _window(op, kernel_size, stride, padding)


def _window(op: str, kernel_size: Any, stride: Any, padding: Any) -> Window:
    window = Window(
        checks.pair(op, "kernel_size", kernel_size, 1),
        checks.pair(op, "stride", kernel_size if stride is None else stride, 1),
        checks.pair(op, "padding", padding, 0),
    )
    for kernel, pad in zip(window.kernel_size, window.padding, strict=True):
        if 2 * pad > kernel:
            raise TensorValueError(f"{op}: padding must be at most half the kernel, not {pad} of {kernel}")
    if _area(window) > MOST_PIXELS:
        raise ValueError(f"{op}: a window holds at most {MOST_PIXELS} pixels, not {window.kernel_size}")
    return window


def _area(window: Window) -> int:
    return window.kernel_size[0] * window.kernel_size[1]


def check_pool(op: str, input: Tensor, bias: Tensor | None, window: Window, ceil_mode: bool) -> list:
    """Checks the arguments; returns the output's shape."""
    return _check(op, input, bias, *window, ceil_mode)


@checks.cache_validation
def _check(
    op: str, input: Tensor, bias: Tensor | None, kernel_size: list, stride: list, padding: list, ceil_mode: bool
) -> list:
    window = Window(kernel_size, stride, padding)
    checks.check_images(op, input)
    if bias is not None:
        checks.check_device(op, "bias", bias, input)
        allowed = [input.dtype, *([torch.float32] if input.dtype in checks.LOW_PRECISION else [])]
        if bias.dtype not in allowed:
            raise TensorTypeError(f"{op}: bias must be {' or '.join(map(str, allowed))}, not {bias.dtype}")
        if list(bias.shape) != [input.shape[1]]:
            raise TensorValueError(f"{op}: bias must be [{input.shape[1]}], not of shape {list(bias.shape)}")
    shape = list(input.shape[:2])
    for size, kernel, step, pad in zip(input.shape[2:], *window, strict=True):
        windows = reference.pool_output_size(size, kernel, step, pad, ceil_mode)
        if size < 1 or windows < 1:
            raise TensorValueError(
                f"{op}: an image of {input.shape[2]} x {input.shape[3]} is smaller than the window "
                f"{window.kernel_size[0]} x {window.kernel_size[1]} (padding {window.padding})"
            )
        shape.append(windows)
    return shape


def gather(values: Tensor, argmax: Tensor, window: Window) -> Tensor:
    """The values [N, C, H, W] of each window's winner: differentiable, for double backward."""
    height, width = values.shape[2:]
    (_, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = window
    position = argmax.long()
    in_window = position < _area(window)  # others than NOWHERE no forward call gives
    rows = torch.arange(argmax.shape[2], device=argmax.device).unsqueeze(-1) * stride_h - pad_h + position // kernel_w
    columns = torch.arange(argmax.shape[3], device=argmax.device) * stride_w - pad_w + position % kernel_w
    inside = in_window & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    at = (rows * width + columns).where(inside, 0).flatten(2)
    winners = values.reshape(*values.shape[:2], height * width).gather(2, at).reshape(argmax.shape)
    return winners.where(inside, 0)


def empty_bias_gradient(grad: Tensor, bias: Tensor | None) -> Tensor:
    """For fakes: the bias's gradient; without a bias of no elements."""
    return grad.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)


def _fake(
    input: Tensor, bias: Tensor | None, kernel_size, stride, padding, ceil_mode: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    window = window_of(OP, kernel_size, stride, padding)
    shape = check_pool(OP, input, bias, window, ceil_mode)
    return empty_like(input, shape), empty_like(input, shape, torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, bias, kernel_size, stride, padding, _, _ = inputs
    argmax = output[1]
    ctx.mark_non_differentiable(argmax)
    ctx.save_for_backward(argmax)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.args = (list(input.shape), kernel_size, stride, padding)


def _backward(kernels, ctx, grad: Tensor, _):
    (argmax,) = ctx.saved_tensors
    bias = None
    if ctx.needs_input_grad[1]:  # its values are not: they may have changed since
        bias = argmax.new_empty(argmax.shape[1], dtype=ctx.bias_dtype)
    grad_input, grad_bias = kernels.max_pool2d_backward(grad, argmax, bias, *ctx.args)
    return grad_input, None if bias is None else grad_bias, *[None] * 5


def _fake_backward(grad: Tensor, argmax: Tensor, bias: Tensor | None, input_size, *args):
    return empty_like(argmax, input_size, grad.dtype), empty_bias_gradient(grad, bias)


def _setup_double_backward(ctx, inputs, output) -> None:
    grad, argmax, bias, _, *window = inputs
    ctx.window, ctx.dtype = Window(*window), grad.dtype
    if bias is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(argmax)


def _double_backward(kernels, ctx, grad_grad: Tensor | None, grad_grad_bias: Tensor | None):
    (argmax,) = ctx.saved_tensors
    grad = None if grad_grad is None else gather(grad_grad, argmax, ctx.window)
    if grad_grad_bias is not None and grad_grad_bias.numel():
        of_bias = grad_grad_bias.to(ctx.dtype).reshape(-1, 1, 1)
        of_bias = of_bias.where(argmax <= _area(ctx.window) - 1, 0)  # 256 is no byte
        grad = of_bias if grad is None else grad + of_bias
    return grad, *[None] * 6


register_op(OP, _fake, _backward, _setup_context)
register_operator(f"{OP}_backward", _fake_backward, _double_backward, _setup_double_backward)
