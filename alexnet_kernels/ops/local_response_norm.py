"""Local response normalisation across channels.

See: schema in csrc/library.cpp, csrc/cpu/local_response_norm.cpp, csrc/cuda/local_response_norm.cu,
alexnet_kernels/triton/local_response_norm.py, reference.local_response_norm, op_info/local_response_norm.py,
tests/ops/test_local_response_norm.py.
Autocast: the input's dtype is kept; the kernels compute in float32 (float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.double_backward import double_backward
from alexnet_kernels._dispatch.layout import empty_like, in_format_of
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._errors import TensorValueError
from alexnet_kernels.backends import kernels_of, select

OP = "local_response_norm"


def local_response_norm(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """`b[i] = a[i] / (k + alpha / size * sum_j a[j]^2)^beta`, the sum over the `size` channels nearest to i.

    The convention of torch.nn.LocalResponseNorm, Caffe and cuDNN, in which alpha is divided by size. The paper prints
    the sum undivided: its k = 2, n = 5, alpha = 1e-4, beta = 0.75 is `size=5, alpha=5e-4, beta=0.75, k=2` here; the
    network of the 2012 code is `alpha=1e-4, k=2`.

    Args:
        input: [N, C, *], at least three dimensions; float32, float64, bfloat16 or float16; any memory format.
        size: channels in the window, cut at the edges.
        groups: the window stays inside one of `groups` equal parts of the channels (the paper's towers).
        backend: see `alexnet_kernels.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: input isn't a floating-point tensor.
        ValueError: fewer than three dimensions, size < 1, or groups that don't divide the channels.

    Source: Krizhevsky et al. 2012, section 3.3.
    """
    check_lrn(OP, input, size, groups)
    chosen = select(OP, input, backend)
    if chosen == "native":
        return _native(input, size, alpha, beta, k, groups)
    images = input if input.dim() == 4 else input.flatten(2).unsqueeze(-1)
    output = kernels_of(chosen).local_response_norm(images, size, alpha, beta, k, groups)
    return output if input.dim() == 4 else output.reshape(input.shape)


@checks.cache_validation
def check_lrn(op: str, input: Tensor, size: int, groups: int) -> None:
    checks.check_tensor(op, "input", input)
    checks.check_floating(op, "input", input)
    if input.dim() < 3:
        raise TensorValueError(f"{op}: input must be [N, C, *] with at least three dimensions, not {list(input.shape)}")
    if not isinstance(size, checks.INTEGERS) or size < 1:
        raise ValueError(f"{op}: size must be a positive int, not {size!r}")
    checks.check_groups(op, groups, input.shape[1])


def _native(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    if input.numel() == 0:
        return input.clone()
    images = input if input.dim() == 4 else input.flatten(2).unsqueeze(-1)
    output = plain_local_response_norm(images, size, alpha, beta, k, groups).reshape(input.shape)
    return in_format_of(output, input)


def plain_local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """The op for [N, C, H, W] in few operators of PyTorch, for TorchScript and exporters too.

    torch's own function has no groups, squares in the input's precision, and has no such kernel for the CPU.
    """
    wide = input.float() if input.dtype == torch.bfloat16 or input.dtype == torch.float16 else input
    towers = F.pad((wide * wide).unflatten(1, [groups, -1]), [0, 0, 0, 0, size // 2, (size - 1) // 2])
    mean = F.avg_pool3d(towers, [size, 1, 1], 1)
    return (wide / (mean.flatten(1, 2) * alpha + k) ** beta).to(input.dtype)


def _fake(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    check_lrn(OP, input, size, groups)
    return empty_like(input)


def _setup_context(ctx, inputs, output) -> None:
    input, *ctx.args = inputs
    ctx.save_for_backward(input)


def _backward(kernels, ctx, grad: Tensor):
    (input,) = ctx.saved_tensors
    grad_input = kernels.local_response_norm_backward(grad, input, *ctx.args)
    return grad_input, None, None, None, None, None


def _fake_backward(grad: Tensor, input: Tensor, *args) -> Tensor:
    return empty_like(input)


def _setup_double_backward(ctx, inputs, output) -> None:
    grad, input, *ctx.args = inputs
    ctx.save_for_backward(grad, input)


def _double_backward(kernels, ctx, grad_grad: Tensor):
    grad, input = ctx.saved_tensors
    grads = double_backward(lambda x: reference.local_response_norm(x, *ctx.args), [input], grad, [grad_grad])
    return *grads, None, None, None, None, None


register_op(OP, _fake, _backward, _setup_context)
register_operator(f"{OP}_backward", _fake_backward, _double_backward, _setup_double_backward)
