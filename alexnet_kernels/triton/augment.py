"""Crops, mirrors, shifts colours, subtracts the mean, scales, casts and lays out a batch of images in one pass.

See: alexnet_kernels/ops/augment.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import triton_op, wrap_triton


# A program computes BLOCK elements of one image's crop, in the memory order of the output. images uint8 [N, H, W, 3];
# crops int64 [N, 2]; flips uint8 [N]; shift [N, 3]; mean [3], [3, h, w] or [3, H, W] (MEAN_DIMS 1; 3, of MEAN_H x
# MEAN_W); scale [3]; out [N, 3, h, w]. Pixels outside the image, of an invalid crop, are not read.
@triton.jit
def augment_kernel(
    images_ptr, crops_ptr, flips_ptr, shift_ptr, mean_ptr, scale_ptr, out_ptr, H, W, h, w, blocks,
    FLIPS: tl.constexpr, SHIFT: tl.constexpr, MEAN_DIMS: tl.constexpr, WHOLE_MEAN: tl.constexpr, SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n = program // blocks
    at = (program - n * blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < 3 * h * w
    if CHANNELS_LAST:
        c = at % 3
        pixel = at // 3
    else:
        c = at // (h * w)
        pixel = at % (h * w)
    y = pixel // w
    x = pixel % w
    row = tl.load(crops_ptr + 2 * n).to(tl.int32) + y
    column = tl.load(crops_ptr + 2 * n + 1).to(tl.int32) + x
    if FLIPS:
        column += tl.where(tl.load(flips_ptr + n) != 0, w - 1 - 2 * x, 0)
    inside = mask & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    image = n.to(tl.int64) * H * W * 3
    value = tl.load(images_ptr + image + (row * W + column) * 3 + c, mask=inside, other=0).to(tl.float32)
    offset = tl.zeros([BLOCK], tl.float32)
    if MEAN_DIMS == 1:
        offset += tl.load(mean_ptr + c, mask=mask, other=0)
    if MEAN_DIMS == 3:
        index = (c * H + row) * W + column if WHOLE_MEAN else (c * h + y) * w + x
        offset += tl.load(mean_ptr + index, mask=inside, other=0)
    if SHIFT:
        offset -= tl.load(shift_ptr + n * 3 + c, mask=mask, other=0)
    value -= offset
    if SCALE:
        value *= tl.load(scale_ptr + c, mask=mask, other=0)
    tl.store(out_ptr + n.to(tl.int64) * (3 * h * w) + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton_op
def augment(
    images: Tensor,
    crops: Tensor,
    size: Sequence[int],
    flips: Tensor | None,
    color_shift: Tensor | None,
    mean: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    count, height, width, _ = images.shape
    out = torch.empty(count, 3, *size, dtype=dtype, device=images.device, memory_format=memory_format)
    if out.numel() == 0:
        return out

    def values(tensor: Tensor | None) -> Tensor:
        return images if tensor is None else tensor.to(torch.float32).contiguous()

    blocks = triton.cdiv(3 * size[0] * size[1], _config.ELEMENTS.block)
    wrap_triton(augment_kernel)[(count * blocks,)](
        images.contiguous(),
        crops.contiguous(),
        images if flips is None else flips.contiguous().view(torch.uint8),
        values(color_shift),
        values(mean),
        values(scale),
        out, height, width, *size, blocks,
        FLIPS=flips is not None,
        SHIFT=color_shift is not None,
        MEAN_DIMS=0 if mean is None else mean.dim(),
        WHOLE_MEAN=mean is not None and list(mean.shape[1:]) == [height, width],
        SCALE=scale is not None,
        CHANNELS_LAST=channels_last, BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps,
    )  # fmt: skip
    return out
