"""Local response normalisation and the max-pooling after it, fused; optionally with the bias and the ReLU before
them.

See: schema in csrc/library.cpp, csrc/cpu/lrn_max_pool2d.cpp, csrc/cuda/lrn_max_pool2d.cu,
alexnet_kernels/triton/lrn_max_pool2d.py, reference.lrn_max_pool2d, op_info/lrn_max_pool2d.py,
tests/ops/test_lrn_max_pool2d.py.
Autocast: the input's dtype is kept; the kernels compute in float32 (float64 for float64). A float32 bias goes with any
16-bit input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch.double_backward import double_backward
from alexnet_kernels._dispatch.layout import empty_like, in_format_of
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels.backends import kernels_of, select
from alexnet_kernels.ops.local_response_norm import check_lrn, local_response_norm
from alexnet_kernels.ops.max_pool2d import (
    Window,
    check_pool,
    empty_bias_gradient,
    gather,
    max_pool2d,
    window_of,
)

OP = "lrn_max_pool2d"


def lrn_max_pool2d(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    groups: int = 1,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] | None = 2,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`max_pool2d(local_response_norm(x))`, where x is `input + bias` or, with `relu`, `max(0, input + bias)`.

    The normalised activations, the largest tensor of an AlexNet, are never stored: forward saves the input and one byte
    for each window, and backward recomputes them and applies ReLU's mask. Arguments, result and errors are those of
    `local_response_norm` and `max_pool2d`, bias [C] included; input is [N, C, H, W]. bfloat16 and float16 are rounded
    once, after pooling.

    Source: Krizhevsky et al. 2012, section 3.5.
    """
    window = window_of(OP, kernel_size, stride, padding)
    _check(input, bias, size, groups, window, ceil_mode)
    chosen = select(OP, input, backend)
    if chosen == "native":
        x = input if bias is None else input + bias.reshape(-1, 1, 1)
        x = torch.relu(x) if relu else x
        x = local_response_norm(x, size, alpha, beta, k, groups, backend="native")
        output = max_pool2d(x, *window, ceil_mode, backend="native")
        return in_format_of(output.to(input.dtype), input)
    return kernels_of(chosen).lrn_max_pool2d(input, bias, size, alpha, beta, k, groups, *window, ceil_mode, relu)[0]


def _check(input: Tensor, bias: Tensor | None, size: int, groups: int, window: Window, ceil_mode: bool) -> list:
    shape = check_pool(OP, input, bias, window, ceil_mode)
    check_lrn(OP, input, size, groups)
    return shape


def _fake(input, bias, size, alpha, beta, k, groups, kernel_size, stride, padding, ceil_mode, relu):
    shape = _check(input, bias, size, groups, window_of(OP, kernel_size, stride, padding), ceil_mode)
    return empty_like(input, shape), empty_like(input, shape, torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, bias, *lrn, kernel_size, stride, padding, _, relu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, bias, output[1])
    ctx.args = (*lrn, kernel_size, stride, padding, relu)


def _backward(kernels, ctx, grad: Tensor, _):
    input, bias, argmax = ctx.saved_tensors
    grad_input, grad_bias = kernels.lrn_max_pool2d_backward(grad, input, bias, argmax, *ctx.args)
    return grad_input, None if bias is None else grad_bias, *[None] * 10


def _fake_backward(grad: Tensor, input: Tensor, bias: Tensor | None, argmax: Tensor, *args) -> tuple[Tensor, Tensor]:
    return empty_like(input), empty_bias_gradient(grad, bias)


def _setup_double_backward(ctx, inputs, output) -> None:
    grad, input, bias, argmax, *ctx.lrn, kernel_size, stride, padding, ctx.relu = inputs
    ctx.window = Window(kernel_size, stride, padding)
    if bias is None:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(grad, input, bias, argmax)


def _double_backward(kernels, ctx, *grad_grads: Tensor | None):
    grad, input, bias, argmax = ctx.saved_tensors
    inputs = [input] if bias is None else [input, bias]

    def function(x: Tensor, *bias: Tensor) -> Tensor:
        for b in bias:
            x = x + b.reshape(-1, 1, 1)
        x = torch.relu(x) if ctx.relu else x
        return gather(reference.local_response_norm(x, *ctx.lrn), argmax, ctx.window)

    grads = double_backward(function, inputs, grad, grad_grads[: len(inputs)])
    return *grads, *[None] * (13 - len(grads))


register_op(OP, _fake, _backward, _setup_context)
register_operator(f"{OP}_backward", _fake_backward, _double_backward, _setup_double_backward)
