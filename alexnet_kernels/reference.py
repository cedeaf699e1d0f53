"""Every op's definition in plain PyTorch.

Each function has its op's name and arguments (less `backend`), computes in its input's dtype, and is
differentiable any number of times. Pass float64 for the values that the ops are tested against. Arguments are
assumed valid: the ops validate theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "augment",
    "batch_norm_relu",
    "conv2d_relu",
    "dropout",
    "dropout_keep",
    "linear_relu_dropout",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
    "philox",
    "philox4x32",
    "pool_output_size",
    "sgd_step",
    "within_map_response_norm",
]

_U32 = 0xFFFFFFFF


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation, bias and ReLU: `out = max(0, conv2d(input, weight) + bias)`.

    input [N, C, H, W], weight [K, C / groups, R, S], bias [K]; out [N, K, P, Q] with
    `P = floor((H + 2 * padding - R) / stride) + 1`, and Q likewise.
    Source: Krizhevsky et al. 2012, sections 3.1 and 3.5.
    """
    return torch.relu(F.conv2d(input, weight, bias, stride=stride, padding=padding, groups=groups))


def pool_output_size(size: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Windows along one axis, as torch counts them.

    `floor((size + 2 * padding - kernel_size) / stride) + 1`, or ceil for floor with `ceil_mode`, which then
    drops a last window that would start beyond the input and its left padding.
    """
    span = size + 2 * padding - kernel_size
    if not ceil_mode:
        return span // stride + 1
    windows = -(-span // stride) + 1
    return windows - 1 if (windows - 1) * stride >= size + padding else windows


def _biased(input: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """input + bias of each channel, or max(0, that) with `relu`."""
    x = input if bias is None else input + bias.to(input.dtype).reshape(-1, 1, 1)
    return torch.relu(x) if relu else x


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] | None = 2,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Maximum of each window: `out[p, q] = max_{r, s} x[p * stride + r - padding, q * stride + s - padding]`.

    input [N, C, H, W], bias [C]; r and s count the window's rows and columns; x is input + bias or, with `relu`,
    max(0, input + bias); positions outside the input take no part. Of equal maxima the first in row-major order takes
    the gradient. NaN counts as larger than any number, and a later NaN as larger than an earlier one: torch's rule.
    Source: Krizhevsky et al. 2012, section 3.4 (3x3 windows, stride 2, overlapping).
    """
    x = _biased(input, bias, relu)
    stride = kernel_size if stride is None else stride
    (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w) = map(_pair, (kernel_size, stride, padding))
    height, width = x.shape[-2:]
    p = torch.arange(pool_output_size(height, kernel_h, stride_h, pad_h, ceil_mode), device=x.device)
    q = torch.arange(pool_output_size(width, kernel_w, stride_w, pad_w, ceil_mode), device=x.device)
    best = x.new_zeros(*x.shape[:-2], p.numel(), q.numel())
    found = torch.zeros(p.numel(), q.numel(), dtype=torch.bool, device=x.device)
    for r in range(kernel_h):
        for s in range(kernel_w):
            row = p * stride_h + r - pad_h
            column = q * stride_w + s - pad_w
            inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))
            candidate = x.index_select(-2, row.clamp(0, height - 1)).index_select(-1, column.clamp(0, width - 1))
            better = (candidate > best) | candidate.isnan() | ~found
            best = torch.where(inside & better, candidate, best)
            found = found | inside
    return best


def _window_sum(x: Tensor, dim: int, size: int) -> Tensor:
    """Sum of the positions `i - size // 2 ... i + (size - 1) // 2` along dim, cut at the ends."""
    length = x.shape[dim]
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    padded = torch.cat([x.new_zeros(*before, size // 2, *after), x, x.new_zeros(*before, (size - 1) // 2, *after)], dim)
    total = padded.narrow(dim, 0, length)
    for shift in range(1, size):
        total = total + padded.narrow(dim, shift, length)
    return total


def local_response_norm(
    input: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1
) -> Tensor:
    """Normalisation across channels: `b[i] = a[i] / (k + alpha / size * sum_j a[j]^2)^beta`.

    input [N, C, *]; j runs over the `size` channels `i - size // 2 ... i + (size - 1) // 2`, cut at the edges
    of the C / groups channels of i's own group (a tower). torch's, Caffe's and cuDNN's convention; the paper
    prints the formula without the division by size, so its alpha = 1e-4 is 5e-4 here.
    Source: Krizhevsky et al. 2012, section 3.3.
    """
    squares = (input * input).unflatten(1, (groups, input.shape[1] // groups))
    total = _window_sum(squares, 2, size).flatten(1, 2)
    return input / (k + alpha / size * total) ** beta


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
) -> Tensor:
    """`max_pool2d(local_response_norm(x))`, where x is input + bias, or max(0, input + bias) with `relu`.

    input [N, C, H, W], bias [C].
    Source: Krizhevsky et al. 2012, section 3.5: response normalisation, then max-pooling, after layers 1 and
    2.
    """
    x = _biased(input, bias, relu)
    return max_pool2d(local_response_norm(x, size, alpha, beta, k, groups), kernel_size, stride, padding, ceil_mode)


def within_map_response_norm(
    input: Tensor, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Normalisation inside each map: `b[y, x] = a[y, x] / (k + alpha / size^2 * sum a[y', x']^2)^beta`.

    input [N, C, H, W]; y' runs over `y - size // 2 ... y + (size - 1) // 2` and x' likewise, cut at the map's
    edges; the divisor stays size^2 there. Source: the second normalisation of layer 2 in the 2012 code
    (layers-145.cfg, rnorm of cuda-convnet), which the paper leaves out.
    """
    total = _window_sum(_window_sum(input * input, 2, size), 3, size)
    return input / (k + alpha / size**2 * total) ** beta


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`out = max(0, (input - mean) / sqrt(var + eps) * weight + bias)` for each channel.

    input [N, C, H, W]; the rest [C]. Training takes mean and (biased) variance from the batch; otherwise they
    are the running ones. Training also goes without running ones (None). Returns (out, running_mean,
    running_var): the op updates its running statistics in place, this returns the new ones, in their own
    dtype: `(1 - momentum) * running + momentum * batch`, with the batch's unbiased variance.
    Source: Ioffe and Szegedy 2015, algorithms 1 and 2; torch.nn.BatchNorm2d.
    """

    def along_channels(x: Tensor) -> Tensor:
        return x.to(input.dtype).reshape(-1, 1, 1)

    new_mean, new_var = running_mean, running_var
    if training:
        count = input.numel() // max(1, input.shape[1])
        mean = input.mean((0, 2, 3))
        var = (input - along_channels(mean)).square().mean((0, 2, 3))
        if running_mean is not None:
            new_mean = ((1 - momentum) * running_mean + momentum * mean.detach()).to(running_mean.dtype)
        if running_var is not None:
            unbiased = var.detach() * (count / (count - 1))
            new_var = ((1 - momentum) * running_var + momentum * unbiased).to(running_var.dtype)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    out = (input - along_channels(mean)) / (along_channels(var) + eps).sqrt()
    if weight is not None:
        out = out * along_channels(weight)
    if bias is not None:
        out = out + along_channels(bias)
    return torch.relu(out), new_mean, new_var


def _multiply_32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of 32-bit numbers held in int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _U32
    return high, low


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words of a four-word counter and a two-word key, all held in int64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_32(c0, 0xD2511F53)
        high1, low1 = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _U32, (k1 + 0xBB67AE85) & _U32
    return c0, c1, c2, c3


def philox(seed: int | Tensor, offset: int, index: Tensor) -> Tensor:
    """The random 32-bit word, in int64, of each `index` in the stream (seed, offset).

    The counter is (q, offset) with q = index // 4, the key is the seed, and an index takes word index % 4.
    seed and offset are 64-bit (an int64 tensor seed has one element), low word first. Any shape of int64
    index.
    """
    if isinstance(seed, Tensor):
        seed = seed.reshape(()).to(index.device)
    quad, zero = index >> 2, torch.zeros_like(index)
    words = philox4x32(
        (quad & _U32, quad >> 32, zero + (offset & _U32), zero + ((offset >> 32) & _U32)),
        (zero + (seed & _U32), zero + ((seed >> 32) & _U32)),
    )
    return torch.stack(words, -1).gather(-1, (index & 3).unsqueeze(-1)).squeeze(-1)


def dropout_keep(
    shape: Sequence[int],
    p: float,
    seed: int | Tensor,
    offset: int = 0,
    shard: tuple[int, int, int] | Sequence[tuple[int, int, int]] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which elements dropout keeps: a bool tensor of this shape, contiguous.

    An element is dropped when its Philox word is below `round(p * 2^32)`. Its index is its position in
    row-major (N, C, H, W) order, whatever the memory format; with shard = (dim, start, size), or several of them, its
    position in the whole tensor whose dimension dim has that size, of which this one is `[start, start + shape[dim])`.
    """
    shape = tuple(shape)
    whole, start = list(shape), [0] * len(shape)
    if shard:
        shards: Sequence = [shard] if isinstance(shard[0], int) else shard
        for dim, first, size in shards:
            whole[dim], start[dim] = size, first
    index = torch.zeros((), dtype=torch.int64, device=device)
    for extent, first, size in zip(shape, start, whole, strict=True):
        place = torch.arange(first, first + extent, device=device)
        index = (index * size).unsqueeze(-1) + place
    threshold = min(round(p * 2**32), 2**32)
    return philox(seed, offset, index) >= threshold


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    seed: int | Tensor = 0,
    offset: int = 0,
    *,
    scale_at: str = "training",
    shard: tuple[int, int, int] | Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """Set each element to zero with probability p, by `dropout_keep`; any shape.

    scale_at="training" (inverted dropout): kept elements times 1 / (1 - p) in training, input itself in
    inference.
    scale_at="inference" (the paper's): kept elements as they are in training, input times 1 - p in inference.
    Source: Krizhevsky et al. 2012, section 4.2; Srivastava et al. 2014, section 10 (inverted).
    """
    if not training:
        return input if scale_at == "training" else input * (1 - p)
    keep = dropout_keep(input.shape, p, seed, offset, shard, input.device)
    scale = 1 / (1 - p) if scale_at == "training" and p < 1 else 1.0
    scaled = input * scale
    drop = torch.empty_like(scaled, dtype=torch.bool).copy_(~keep)  # in the input's memory format, and so the result
    return torch.where(drop, torch.zeros_like(scaled), scaled)


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    seed: int | Tensor = 0,
    offset: int = 0,
    *,
    relu: bool = True,
    scale_at: str = "training",
    shard: tuple[int, int, int] | Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """`dropout(max(0, input @ weight.T + bias))`; without `relu`, `dropout(input @ weight.T + bias)`.

    input [*, I], weight [O, I], bias [O]; out [*, O]. Dropout counts, and shard describes, the output's
    elements.
    Source: Krizhevsky et al. 2012, sections 3.1 and 4.2: the fully-connected layers fc6 and fc7.
    """
    out = F.linear(input, weight, bias)
    if relu:
        out = torch.relu(out)
    return dropout(out, p, training, seed, offset, scale_at=scale_at, shard=shard)


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    dampening: float = 0.0,
    nesterov: bool = False,
    rule: str = "paper",
    first_step: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One step of gradient descent with momentum.

    Returns new (params, momentum_buffers, masters) and changes none of the given ones, unlike the op. With w
    the master where there is one (the parameter is then the master, rounded) and the parameter itself
    otherwise, g its gradient and v its momentum buffer:

    rule="paper": `v <- momentum * v - weight_decay * lr * w - lr * g;  w <- w + v`.
    rule="torch": `g <- g + weight_decay * w;  v <- momentum * v + (1 - dampening) * g`, or `v <- g` on the
    first step; `w <- w - lr * (g + momentum * v if nesterov else v)`. With momentum 0, v is left alone and `w
    <- w - lr * g`.

    Source: Krizhevsky et al. 2012, section 5; torch.optim.SGD.
    """
    weights = masters if len(masters) else params
    new_weights, new_buffers = [], []
    for w, g, v in zip(weights, grads, momentum_buffers, strict=True):
        w64, g64, v64 = w.double(), g.double(), v.double()
        if rule == "paper":
            v64 = momentum * v64 - weight_decay * lr * w64 - lr * g64
            w64 = w64 + v64
        else:
            g64 = g64 + weight_decay * w64
            step = g64
            if momentum != 0:
                v64 = g64 if first_step else momentum * v64 + (1 - dampening) * g64
                step = g64 + momentum * v64 if nesterov else v64
            w64 = w64 - lr * step
        new_weights.append(w64.to(w.dtype))
        new_buffers.append(v64.to(v.dtype))
    new_params = [w.to(param.dtype) for w, param in zip(new_weights, params, strict=True)]
    return new_params, new_buffers, new_weights if len(masters) else []


def augment(
    images: Tensor,
    crops: Tensor,
    size: int | Sequence[int],
    flips: Tensor | None = None,
    color_shift: Tensor | None = None,
    mean: Tensor | None = None,
    scale: float | Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Crop, flip, shift the colours, subtract the mean, scale: `out = (crop + color_shift - mean) * scale`.

    images uint8 [N, H, W, 3]; crops int64 [N, 2], each (top, left); size (h, w) or one number; flips bool
    [N], left to right; color_shift [N, 3], in the images' units of 0..255; scale a number or [3]. mean is
    [3], or [3, H, W], subtracted at positions of the image, or [3, h, w], at positions of the output: the
    two differ under a flip, and the former is assumed where H = h and W = w. out [N, 3, h, w] of `dtype` in
    `memory_format`.
    Source: Krizhevsky et al. 2012, section 4.1.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    height, width = _pair(size)
    x = images.permute(0, 3, 1, 2).to(compute)
    at_image, at_output = mean, None
    if mean is not None and (mean.dim() == 1 or mean.shape[1:] != images.shape[1:3]):
        at_image, at_output = None, mean.reshape(3, *(mean.shape[1:] or (1, 1)))
    if at_image is not None:
        x = x - at_image.to(compute)
    out = x.new_empty(x.shape[0], 3, height, width)
    for i, (top, left) in enumerate(crops.tolist()):
        crop = x[i, :, top : top + height, left : left + width]
        out[i] = crop.flip(-1) if flips is not None and bool(flips[i]) else crop
    if color_shift is not None:
        out = out + color_shift.to(compute)[:, :, None, None]
    if at_output is not None:
        out = out - at_output.to(compute)
    if scale is not None:
        out = out * (scale.to(compute).reshape(3, 1, 1) if isinstance(scale, Tensor) else scale)
    return out.to(dtype).contiguous(memory_format=memory_format)
