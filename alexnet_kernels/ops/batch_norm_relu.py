"""Batch normalisation and ReLU in one pass.

See: schema in csrc/library.cpp, csrc/cpu/batch_norm_relu.cpp, csrc/cuda/batch_norm_relu.cu,
alexnet_kernels/triton/batch_norm_relu.py, reference.batch_norm_relu, op_info/batch_norm_relu.py,
tests/ops/test_batch_norm_relu.py.
Autocast: the input's dtype is kept; statistics and parameters are float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.double_backward import double_backward
from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._errors import TensorValueError
from alexnet_kernels.backends import kernels_of, select

OP = "batch_norm_relu"


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """`max(0, (input - mean) / sqrt(var + eps) * weight + bias)`, channel by channel.

    What relu(torch.nn.functional.batch_norm(...)) computes. Only the input is stored: backward recomputes ReLU's mask.

    Args:
        input: [N, C, H, W]; float32, float64, bfloat16 or float16; any memory format.
        running_mean, running_var: [C]; training updates them in place, `(1 - momentum) * running + momentum * batch`
            with the unbiased variance; inference normalises by them. May be None in training.
        weight, bias: [C] or None; float32 may go with a bfloat16 or float16 input.
        training: normalise by the batch mean and biased variance.
        eps: added to the variance.
        backend: see `alexnet_kernels.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: another rank or shape, no running statistics for inference, or training on one value a channel.
        RuntimeError: tensors on different devices.

    Source: Ioffe and Szegedy 2015, algorithms 1 and 2.
    """
    _check(input, running_mean, running_var, weight, bias, training)
    count = input.numel() // max(1, input.shape[1])
    if training and count == 1:
        raise TensorValueError(f"{OP}: training needs more than one value a channel, input is {list(input.shape)}")
    chosen = select(OP, input, backend)
    if chosen == "native":
        if input.numel() == 0:  # torch divides by the count
            return input.clone()
        return F.relu(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))
    output, mean, var = kernels_of(chosen).batch_norm_relu(
        input, running_mean, running_var, weight, bias, training, eps
    )
    if training and count > 1:
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                if running is not None:
                    running.mul_(1 - momentum).add_(batch, alpha=momentum)
    return output


@checks.cache_validation
def _check(input: Tensor, running_mean, running_var, weight, bias, training: bool) -> None:
    checks.check_images(OP, input)
    vectors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, vector in vectors.items():
        if vector is None:
            continue
        checks.check_device(OP, name, vector, input)
        checks.check_floating(OP, name, vector)
        if list(vector.shape) != [input.shape[1]]:
            raise TensorValueError(f"{OP}: {name} must be [{input.shape[1]}], not of shape {list(vector.shape)}")
    if not training and (running_mean is None or running_var is None):
        raise ValueError(f"{OP}: inference needs running_mean and running_var")


def _statistics_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _fake(input: Tensor, running_mean, running_var, weight, bias, training: bool, eps: float):
    _check(input, running_mean, running_var, weight, bias, training)
    mean = torch.empty(input.shape[1], dtype=_statistics_dtype(input), device=input.device)
    return empty_like(input), mean, torch.empty_like(mean)


def _setup_context(ctx, inputs, output) -> None:
    input, _, _, weight, bias, ctx.training, ctx.eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, *output[1:], weight, bias)


def _backward(kernels, ctx, grad: Tensor, *_):
    input, mean, var, weight, bias = ctx.saved_tensors
    grads = kernels.batch_norm_relu_backward(grad, input, mean, var, weight, bias, ctx.training, ctx.eps)
    grad_weight = None if weight is None else grads[1].to(weight.dtype)
    grad_bias = None if bias is None else grads[2].to(bias.dtype)
    return grads[0], None, None, grad_weight, grad_bias, None, None


def _fake_backward(grad: Tensor, input: Tensor, mean: Tensor, var: Tensor, *args):
    statistics = torch.empty(input.shape[1], dtype=_statistics_dtype(input), device=input.device)
    return empty_like(input), statistics, torch.empty_like(statistics)


def _setup_double_backward(ctx, inputs, output) -> None:
    grad, input, mean, var, weight, bias, ctx.training, ctx.eps = inputs
    ctx.save_for_backward(grad, input, mean, var, weight, bias)


def _double_backward(kernels, ctx, *grad_grads: Tensor | None):
    grad, input, mean, var, weight, bias = ctx.saved_tensors
    w = torch.ones_like(mean) if weight is None else weight
    b = torch.zeros_like(mean) if bias is None else bias

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.batch_norm_relu(x, mean, var, w, b, ctx.training, 0.0, ctx.eps)[0]

    grads = double_backward(function, [input, w, b], grad, grad_grads)
    grad_weight = None if weight is None else grads[2]
    grad_bias = None if bias is None else grads[3]
    return grads[0], grads[1], None, None, grad_weight, grad_bias, None, None


register_op(OP, _fake, _backward, _setup_context)
register_operator(f"{OP}_backward", _fake_backward, _double_backward, _setup_double_backward)
