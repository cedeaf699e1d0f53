"""Batch normalisation and ReLU.

See: alexnet_kernels/ops/batch_norm_relu.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels._dispatch.layout import empty_like
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._channels import is_channels_last
from alexnet_kernels.triton._common import check_size, contiguous_as, in_own_format, triton_op, wrap_triton


@triton.jit
def row_offset(row, PIXELS, SAMPLE, PIXEL):
    """The offset of pixel `row` of the batch in memory: int64."""
    return (row // PIXELS).to(tl.int64) * SAMPLE + row % PIXELS * PIXEL


# A program takes one part of the pixels, BLOCK_C channels. x [rows, C] by strides; partial [2, parts, C]: mean and sum
# of squared deviations.
@triton.jit
def bn_moments_kernel(
    x_ptr, partial_ptr, rows, parts, C, PIXELS, SAMPLE, PIXEL, CHANNEL,
    PART: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * PART
    count = tl.minimum(rows - first, PART)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(0, PART, BLOCK_R):
        r = i + tl.arange(0, BLOCK_R)
        mask = (r < count)[:, None] & (c < C)[None, :]
        at = row_offset(first + r, PIXELS, SAMPLE, PIXEL)[:, None] + (c * CHANNEL)[None, :]
        total += tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    mean = tl.sum(total, 0) / count
    # The second pass sums deviations from the rounded mean; their own mean corrects it.
    rest = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(0, PART, BLOCK_R):
        r = i + tl.arange(0, BLOCK_R)
        mask = (r < count)[:, None] & (c < C)[None, :]
        at = row_offset(first + r, PIXELS, SAMPLE, PIXEL)[:, None] + (c * CHANNEL)[None, :]
        delta = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32) - mean[None, :]
        delta = tl.where(mask, delta, 0.0)
        rest += delta
        squares += delta * delta
    rest_mean = tl.sum(rest, 0) / count
    to = partial_ptr + part * C + c
    tl.store(to, mean + rest_mean, mask=c < C)
    tl.store(to + parts * C, tl.sum(squares, 0) - rest_mean * rest_mean * count, mask=c < C)


# A program computes BLOCK_C channels, from BLOCK_P parts at a time. mean = sum n m / rows over parts of n pixels and
# mean m, corrected by the mean deviation from it; var = (sum of squares inside the parts + sum n (m - mean)^2) / rows.
@triton.jit
def bn_combine_moments_kernel(
    partial_ptr, mean_ptr, var_ptr, rows, parts, C, PART: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        mean, count, _ = load_part(partial_ptr, start, rows, parts, c, C, PART, BLOCK_P)
        total += mean * count
    centre = tl.sum(total, 0) / rows
    rest = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        mean, count, inside = load_part(partial_ptr, start, rows, parts, c, C, PART, BLOCK_P)
        delta = mean - centre[None, :]
        rest += count * delta
        squares += inside + count * delta * delta
    shift = tl.sum(rest, 0) / rows
    tl.store(mean_ptr + c, centre + shift, mask=c < C)
    tl.store(var_ptr + c, tl.maximum(tl.sum(squares, 0) / rows - shift * shift, 0.0), mask=c < C)


@triton.jit
def load_part(partial_ptr, start, rows, parts, c, C, PART: tl.constexpr, BLOCK_P: tl.constexpr):
    """(mean, pixels, sum of squared deviations) of BLOCK_P parts; parts beyond the last have 0 pixels."""
    part = start + tl.arange(0, BLOCK_P)
    mask = (part < parts)[:, None] & (c < C)[None, :]
    at = partial_ptr + part[:, None] * C + c[None, :]
    count = tl.where(part < parts, tl.minimum(rows - part * PART, PART), 0).to(tl.float32)
    return tl.load(at, mask=mask, other=0), count[:, None], tl.load(at + parts * C, mask=mask, other=0)


@triton.jit
def channel_values(mean_ptr, var_ptr, w_ptr, b_ptr, c, C, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(mean, 1 / sqrt(var + eps), weight, bias) of the channels."""
    mean = tl.load(mean_ptr + c, mask=c < C, other=0).to(tl.float32)
    scale = 1 / tl.sqrt_rn(tl.load(var_ptr + c, mask=c < C, other=1).to(tl.float32) + eps)
    weight = tl.full(c.shape, 1.0, tl.float32)
    bias = tl.zeros(c.shape, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(w_ptr + c, mask=c < C, other=0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + c, mask=c < C, other=0).to(tl.float32)
    return mean, scale, weight, bias


# A program computes BLOCK_R pixels by BLOCK_C channels. out = max(0, (x - mean) scale weight + bias).
@triton.jit
def bn_forward_kernel(
    x_ptr, out_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, rows, C, PIXELS, SAMPLE, PIXEL, CHANNEL, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (first + r < rows)[:, None] & (c < C)[None, :]
    mean, scale, weight, bias = channel_values(mean_ptr, var_ptr, w_ptr, b_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    at = row_offset(first + r, PIXELS, SAMPLE, PIXEL)[:, None] + (c * CHANNEL)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    y = (x - mean[None, :]) * (scale * weight)[None, :] + bias[None, :]
    y = tl.where(y < 0, 0.0, y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def masked_gradient(g_ptr, x_ptr, at, mask, mean, scale, weight, bias):
    """(gradient masked by ReLU, which is recomputed; normalised input)."""
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=mask, other=0).to(tl.float32)
    y = (x - mean[None, :]) * (scale * weight)[None, :] + bias[None, :]
    return tl.where(mask & ~(y <= 0), g, 0.0), (x - mean[None, :]) * scale[None, :]


# A program takes one part of the pixels, BLOCK_C channels. partial [2, parts, C]: sums of g and of g times the
# normalised input.
@triton.jit
def bn_backward_sums_kernel(
    g_ptr, x_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, partial_ptr, rows, parts, C, PIXELS, SAMPLE, PIXEL, CHANNEL, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, PART: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * PART
    mean, scale, weight, bias = channel_values(mean_ptr, var_ptr, w_ptr, b_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    sums = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i in range(0, PART, BLOCK_R):
        r = first + i + tl.arange(0, BLOCK_R)
        mask = ((r < rows) & (r < first + PART))[:, None] & (c < C)[None, :]
        at = row_offset(r, PIXELS, SAMPLE, PIXEL)[:, None] + (c * CHANNEL)[None, :]
        g, normal = masked_gradient(g_ptr, x_ptr, at, mask, mean, scale, weight, bias)
        sums += g
        products += tl.where(mask, g * normal, 0.0)
    to = partial_ptr + part * C + c
    tl.store(to, tl.sum(sums, 0), mask=c < C)
    tl.store(to + parts * C, tl.sum(products, 0), mask=c < C)


# A program computes BLOCK_C channels, from BLOCK_P parts at a time.
@triton.jit
def bn_combine_sums_kernel(
    partial_ptr, grad_weight_ptr, grad_bias_ptr, parts, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < parts)[:, None] & (c < C)[None, :]
        at = partial_ptr + part[:, None] * C + c[None, :]
        sums += tl.load(at, mask=mask, other=0)
        products += tl.load(at + parts * C, mask=mask, other=0)
    tl.store(grad_bias_ptr + c, tl.sum(sums, 0), mask=c < C)
    tl.store(grad_weight_ptr + c, tl.sum(products, 0), mask=c < C)


# A program computes BLOCK_R pixels by BLOCK_C channels. dx = (g - mean(g) - n mean(g n)) scale weight, n the normalised
# input; without the means in inference.
@triton.jit
def bn_backward_kernel(
    g_ptr, x_ptr, dx_ptr, mean_ptr, var_ptr, w_ptr, b_ptr, grad_weight_ptr, grad_bias_ptr,
    rows, C, PIXELS, SAMPLE, PIXEL, CHANNEL, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_R
    r = tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (first + r < rows)[:, None] & (c < C)[None, :]
    mean, scale, weight, bias = channel_values(mean_ptr, var_ptr, w_ptr, b_ptr, c, C, eps, HAS_WEIGHT, HAS_BIAS)
    at = row_offset(first + r, PIXELS, SAMPLE, PIXEL)[:, None] + (c * CHANNEL)[None, :]
    g, normal = masked_gradient(g_ptr, x_ptr, at, mask, mean, scale, weight, bias)
    if TRAINING:
        mean_g = tl.load(grad_bias_ptr + c, mask=c < C, other=0) / rows
        mean_gn = tl.load(grad_weight_ptr + c, mask=c < C, other=0) / rows
        g = g - mean_g[None, :] - normal * mean_gn[None, :]
    tl.store(dx_ptr + at, (g * (scale * weight)[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


class _PixelMatrix:
    """The images as a matrix of pixels by channels: its memory layout and its tiles."""

    def __init__(self, x: Tensor, memory_format: torch.memory_format) -> None:
        check_size(x)
        n, c, h, w = x.shape
        channels_last = is_channels_last(memory_format)
        tile = _config.BATCH_NORM_CHANNELS_LAST if channels_last else _config.BATCH_NORM_CONTIGUOUS
        self.rows, self.channels = n * h * w, c
        self.parts = triton.cdiv(self.rows, _config.BATCH_NORM_PART)
        pixel, channel = (c, 1) if channels_last else (1, h * w)
        self.layout = (c, h * w, c * h * w, pixel, channel)  # the kernels' C, PIXELS, SAMPLE, PIXEL, CHANNEL
        self.columns = triton.cdiv(c, tile.columns)
        self.tiles = (triton.cdiv(self.rows, tile.rows), self.columns)
        self.block = {"BLOCK_R": tile.rows, "BLOCK_C": tile.columns, "num_warps": tile.num_warps}

    def empty(self, x: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)


def _combination(channels: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the constants of the kernels that combine parts."""
    tile = _config.BATCH_NORM_COMBINE
    constants = {"BLOCK_P": tile.rows, "BLOCK_C": tile.columns, "num_warps": tile.num_warps}
    return (triton.cdiv(channels, tile.columns),), constants


@triton_op
def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, memory_format = in_own_format(input)
    matrix = _PixelMatrix(x, memory_format)
    out = empty_like(x)
    if x.numel() == 0:
        values = (0.0, 0.0) if training else (running_mean, running_var)
        mean, var = (matrix.empty(x, matrix.channels).copy_(torch.as_tensor(v)) for v in values)
        return out, mean, var
    if training:
        mean, var = matrix.empty(x, matrix.channels), matrix.empty(x, matrix.channels)
        partial = matrix.empty(x, 2, matrix.parts, matrix.channels)
        wrap_triton(bn_moments_kernel)[(matrix.parts, matrix.columns)](
            x, partial, matrix.rows, matrix.parts, *matrix.layout, PART=_config.BATCH_NORM_PART, **matrix.block
        )
        grid, constants = _combination(matrix.channels)
        wrap_triton(bn_combine_moments_kernel)[grid](
            partial, mean, var, matrix.rows, matrix.parts, matrix.channels, PART=_config.BATCH_NORM_PART, **constants
        )
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = (matrix.empty(x, matrix.channels).copy_(running) for running in (running_mean, running_var))
    w, b = (mean if v is None else v.contiguous() for v in (weight, bias))
    wrap_triton(bn_forward_kernel)[matrix.tiles](
        x, out, mean, var, w, b, matrix.rows, *matrix.layout, eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **matrix.block,
    )  # fmt: skip
    return out, mean, var


@triton_op
def batch_norm_relu_backward(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, memory_format = in_own_format(input)
    g = contiguous_as(grad, memory_format)
    matrix = _PixelMatrix(x, memory_format)
    dx = empty_like(x)
    grad_weight, grad_bias = matrix.empty(x, matrix.channels), matrix.empty(x, matrix.channels)
    if x.numel() == 0:
        return dx, grad_weight.zero_(), grad_bias.zero_()
    w, b = (mean if v is None else v.contiguous() for v in (weight, bias))
    partial = matrix.empty(x, 2, matrix.parts, matrix.channels)
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None}
    wrap_triton(bn_backward_sums_kernel)[(matrix.parts, matrix.columns)](
        g, x, mean, var, w, b, partial, matrix.rows, matrix.parts, *matrix.layout, eps,
        **flags, PART=_config.BATCH_NORM_PART, **matrix.block,
    )  # fmt: skip
    grid, constants = _combination(matrix.channels)
    wrap_triton(bn_combine_sums_kernel)[grid](
        partial, grad_weight, grad_bias, matrix.parts, matrix.channels, **constants
    )
    wrap_triton(bn_backward_kernel)[matrix.tiles](
        g, x, dx, mean, var, w, b, grad_weight, grad_bias, matrix.rows, *matrix.layout, eps,
        **flags, TRAINING=training, **matrix.block,
    )  # fmt: skip
    return dx, grad_weight, grad_bias
