"""A linear layer with ReLU and dropout: torch's GEMM and one pass over its output.

See: alexnet_kernels/ops/linear_relu_dropout.py.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import contiguous_as, in_own_format, triton_op, wrap_triton
from alexnet_kernels.triton.dropout import launch_dropout


# A program computes BLOCK elements. dx = g * scale where the layer's output is positive.
@triton.jit
def relu_dropout_backward_kernel(g_ptr, out_ptr, dx_ptr, count, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=mask, other=0).to(tl.float32)
    tl.store(dx_ptr + at, tl.where(out <= 0, 0.0, g * scale).to(dx_ptr.dtype.element_ty), mask=mask)


@triton_op
def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    p: float,
    scale: float,
    seed: Tensor,
    offset: int,
    row: int,
    row_stride: int,
    base: int,
) -> Tensor:
    out = F.linear(input, weight, bias).contiguous()
    if out.numel() > 0 and (relu or p > 0 or scale != 1):
        launch_dropout(out, out, p, scale, seed, offset, row, row_stride, base, relu=relu)
    return out


@triton_op
def relu_dropout_backward(grad: Tensor, output: Tensor, scale: float) -> Tensor:
    out, memory_format = in_own_format(output)
    g = contiguous_as(grad, memory_format)
    dx = empty_like(out)
    if out.numel() > 0:
        wrap_triton(relu_dropout_backward_kernel)[(triton.cdiv(out.numel(), _config.ELEMENTS.block),)](
            g, out, dx, out.numel(), scale, BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps
        )
    return dx
