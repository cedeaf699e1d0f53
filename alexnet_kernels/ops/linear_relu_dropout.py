"""A fully-connected layer with its ReLU and dropout: the library's GEMM and one pass over its output.

See: schema in csrc/library.cpp, csrc/cpu/linear_relu_dropout.cpp, csrc/cuda/linear_relu_dropout.cu,
alexnet_kernels/triton/linear_relu_dropout.py, reference.linear_relu_dropout, op_info/linear_relu_dropout.py,
tests/ops/test_linear_relu_dropout.py.
Autocast: input, weight and bias are cast to the autocast dtype, as for torch's linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._errors import TensorValueError
from alexnet_kernels.backends import kernels_of, select
from alexnet_kernels.ops.dropout import Shard, dropout, factor_of, layout_of, seed_tensor, shards_of

OP = "linear_relu_dropout"


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    seed: int | Tensor | None = None,
    offset: int = 0,
    *,
    relu: bool = True,
    scale_at: str = "training",
    shard: Shard | None = None,
    backend: str | None = None,
) -> Tensor:
    """`dropout(max(0, input @ weight.T + bias))`.

    No mask is stored: the gradient passes where the output is positive. With dropout, a copy of the output is kept for
    that, so that the caller may write into the output, as after torch.nn.Dropout.

    Args:
        input: [*, I]; float32, float64, bfloat16 or float16.
        weight: [O, I] in the input's dtype (autocast casts both).
        bias: [O] or None.
        p, training, seed, offset, scale_at, shard: those of `dropout`, for the output's elements.
        relu: False leaves ReLU out.
        backend: see `alexnet_kernels.backends`.

    Returns:
        [*, O] in the input's dtype.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: shapes that do not fit, or what `dropout` refuses.
        RuntimeError: tensors on different devices.

    Source: Krizhevsky et al. 2012, sections 3.1 and 4.2, the layers fc6 and fc7.
    """
    shape = _check(input, weight, bias)
    drop, scale = factor_of(OP, p, training, scale_at)
    chosen = select(OP, input, backend)
    if chosen == "native":
        output = F.linear(input, weight, bias)
        output = F.relu(output) if relu else output
        return dropout(output, p, training, seed, offset, scale_at=scale_at, shard=shard, backend="native")
    key = seed_tensor(OP, seed if drop > 0 else 0, input.device)
    row, row_stride, base = layout_of(shape, shards_of(OP, shape, shard))
    if row == row_stride or shape.numel() == row:
        # One contiguous run of elements: the kernel processes it a row of the output at a time.
        row = row_stride = shape[-1]
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output = kernels_of(chosen).linear_relu_dropout(
        rows, weight, bias, relu, drop, scale, key, offset, row, row_stride, base
    )
    return output if input.dim() == 2 else output.reshape(shape)


@checks.cache_validation
def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.Size:
    """Checks the arguments; returns the output's shape."""
    checks.check_tensor(OP, "input", input)
    checks.check_floating(OP, "input", input)
    checks.check_device(OP, "weight", weight, input)
    checks.check_floating(OP, "weight", weight)
    if weight.dim() != 2:
        raise TensorValueError(f"{OP}: weight must be [O, I], not of shape {list(weight.shape)}")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise TensorValueError(
            f"{OP}: input must be [*, {weight.shape[1]}] for weight {list(weight.shape)}, not {list(input.shape)}"
        )
    checks.check_same_dtype(OP, "weight", weight, input)
    if bias is not None:
        checks.check_device(OP, "bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise TensorValueError(f"{OP}: bias must be [{weight.shape[0]}], not of shape {list(bias.shape)}")
        checks.check_same_dtype(OP, "bias", bias, input)
    return torch.Size([*input.shape[:-1], weight.shape[0]])


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *args) -> Tensor:
    return input.new_empty(_check(input, weight, bias))


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, ctx.relu, ctx.p, ctx.scale, seed, *ctx.layout = inputs
    ctx.bias = bias is not None
    # As after torch's modules, the caller may write into the result of dropout, but not into that of ReLU.
    saved = output.clone() if ctx.relu and (ctx.p > 0 or ctx.scale != 1) else output
    ctx.save_for_backward(input, weight, saved if ctx.relu else None, seed)


def _backward(kernels, ctx, grad: Tensor):
    input, weight, output, seed = ctx.saved_tensors
    if ctx.relu:
        grad = kernels.relu_dropout_backward(grad, output, ctx.scale)
    elif ctx.p > 0 or ctx.scale != 1:
        grad = kernels.dropout(grad, ctx.p, ctx.scale, seed, *ctx.layout)
    grad_input = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = grad.t() @ input if ctx.needs_input_grad[1] else None
    grad_bias = grad.sum(0) if ctx.bias and ctx.needs_input_grad[2] else None
    return grad_input, grad_weight, grad_bias, *[None] * 8


def _fake_mask(grad: Tensor, output: Tensor, scale: float) -> Tensor:
    return empty_like(output)


def _setup_mask_context(ctx, inputs, output) -> None:
    _, values, ctx.scale = inputs
    ctx.save_for_backward(values)


def _mask_backward(kernels, ctx, grad_grad: Tensor):
    return kernels.relu_dropout_backward(grad_grad, *ctx.saved_tensors, ctx.scale), None, None


register_op(OP, _fake, _backward, _setup_context, autocast=True)
register_operator("relu_dropout_backward", _fake_mask, _mask_backward, _setup_mask_context)
