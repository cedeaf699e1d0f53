"""Response normalisation inside each map, the second normalisation of the network that was run in 2012.

See: schema in csrc/library.cpp, csrc/cpu/within_map_response_norm.cpp, csrc/cuda/within_map_response_norm.cu,
alexnet_kernels/triton/within_map_response_norm.py, reference.within_map_response_norm,
op_info/within_map_response_norm.py, tests/ops/test_within_map_response_norm.py.
Autocast: the input's dtype is kept; the kernels compute in float32 (float64 for float64).
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
from alexnet_kernels.backends import kernels_of, select

OP = "within_map_response_norm"


def within_map_response_norm(
    input: Tensor,
    size: int = 5,
    alpha: float = 1e-3,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """`b[y, x] = a[y, x] / (k + alpha / size^2 * sum a^2)^beta`, the sum over the window around (y, x) in its own map.

    Args:
        input: [N, C, H, W]; float32, float64, bfloat16 or float16; any memory format.
        size: pixels along each side of the window, cut at the edges (the divisor stays size^2 there).
        backend: see `alexnet_kernels.backends`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: input isn't a floating-point tensor.
        ValueError: another rank, or size < 1.

    Source: the network's code of 2012 (layers-145.cfg), whose second layer has it after the normalisation across
    channels; the paper leaves it out.
    """
    _check(input, size)
    chosen = select(OP, input, backend)
    if chosen == "native":
        if input.numel() == 0:
            return input.clone()
        return plain_within_map_response_norm(input, size, alpha, beta, k)
    return kernels_of(chosen).within_map_response_norm(input, size, alpha, beta, k)


def plain_within_map_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The op in few operators of PyTorch, for TorchScript and exporters too; bfloat16 and float16 in float32."""
    wide = input.float() if input.dtype == torch.bfloat16 or input.dtype == torch.float16 else input
    mean = F.avg_pool2d(wide * wide, size, 1, size // 2)
    if size % 2 == 0:
        mean = mean[:, :, :-1, :-1]
    return (wide / (mean * alpha + k) ** beta).to(input.dtype)


@checks.cache_validation
def _check(input: Tensor, size: int) -> None:
    checks.check_images(OP, input)
    if not isinstance(size, checks.INTEGERS) or size < 1:
        raise ValueError(f"{OP}: size must be a positive int, not {size!r}")


def _fake(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    _check(input, size)
    return empty_like(input)


def _setup_context(ctx, inputs, output) -> None:
    input, *ctx.args = inputs
    ctx.save_for_backward(input)


def _backward(kernels, ctx, grad: Tensor):
    grad_input = kernels.within_map_response_norm_backward(grad, *ctx.saved_tensors, *ctx.args)
    return grad_input, None, None, None, None


def _fake_backward(grad: Tensor, input: Tensor, *args) -> Tensor:
    return empty_like(input)


def _setup_double_backward(ctx, inputs, output) -> None:
    grad, input, *ctx.args = inputs
    ctx.save_for_backward(grad, input)


def _double_backward(kernels, ctx, grad_grad: Tensor):
    grad, input = ctx.saved_tensors
    grads = double_backward(lambda x: reference.within_map_response_norm(x, *ctx.args), [input], grad, [grad_grad])
    return *grads, None, None, None, None


register_op(OP, _fake, _backward, _setup_context)
register_operator(f"{OP}_backward", _fake_backward, _double_backward, _setup_double_backward)
