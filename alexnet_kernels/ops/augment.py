"""Crop, mirror, colour shift, mean subtraction, scaling, cast and layout of a batch of images in one pass.

See: schema in csrc/library.cpp, csrc/cpu/augment.cpp, csrc/cuda/augment.cu, alexnet_kernels/triton/augment.py,
reference.augment, op_info/augment.py, tests/ops/test_augment.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alexnet_kernels import reference
from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.registration import register_op
from alexnet_kernels._errors import TensorTypeError, TensorValueError
from alexnet_kernels.backends import kernels_of, select

OP = "augment"


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
    backend: str | None = None,
) -> Tensor:
    """`out = (crop + color_shift - mean) * scale` for each image of the batch.

    Args:
        images: uint8 [N, H, W, 3], as decoded.
        crops: int64 [N, 2], the (top, left) pixel of each crop.
        size: (h, w) of the crops, or one int.
        flips: bool [N], mirror the crop left to right; None for none.
        color_shift: [N, 3], added to every pixel of an image, in the images' units of 0..255; None for none.
        mean: [3]; or [3, h, w], subtracted from the crop after mirroring; or [3, H, W], subtracted at each pixel's
            position in the image (assumed when both fit); None for none.
        scale: a number or [3]; None for 1.
        dtype: of the result: float32, float64, bfloat16 or float16; computed in float32.
        memory_format: of the result: torch.channels_last or torch.contiguous_format.
        backend: see `alexnet_kernels.backends`.

    Returns:
        [N, 3, h, w]. No gradient flows.

    Raises:
        TypeError, ValueError, RuntimeError: dtypes, shapes or devices that do not fit; a crop that leaves its image.

    Source: Krizhevsky et al. 2012, section 4.1.
    """
    size = checks.pair(OP, "size", size, 1)
    if isinstance(scale, (int, float)):
        scale = torch.full((3,), float(scale), device=images.device if isinstance(images, Tensor) else None)
    _check(images, crops, size, flips, color_shift, mean, scale, dtype)
    if memory_format not in (torch.channels_last, torch.contiguous_format):
        raise ValueError(f"{OP}: memory_format must be channels_last or contiguous_format, not {memory_format}")
    if crops.numel() and images.device.type != "cpu":
        # Asynchronous: reading the values would wait for the device.
        last = [whole - part for whole, part in zip(images.shape[1:3], size, strict=True)]
        inside = (crops.amin() >= 0) & (crops[:, 0].amax() <= last[0]) & (crops[:, 1].amax() <= last[1])
        torch._assert_async(inside, f"{OP}: a crop of {size} leaves its image of {list(images.shape[1:3])}")
    elif crops.numel() and not torch.compiler.is_compiling():
        for axis, (whole, part) in enumerate(zip(images.shape[1:3], size, strict=True)):
            low, high = (int(v) for v in crops[:, axis].aminmax())
            if low < 0 or high > whole - part:
                raise ValueError(
                    f"{OP}: crops[:, {axis}] goes from {low} to {high}, but a crop of {size} lies inside an image of "
                    f"{list(images.shape[1:3])} from 0 to {whole - part} only"
                )
    chosen = select(OP, images, backend)
    if chosen == "native":
        return reference.augment(
            images, crops, size, flips, color_shift, mean, scale, dtype=dtype, memory_format=memory_format
        )
    return kernels_of(chosen).augment(
        images, crops, size, flips, color_shift, mean, scale, dtype, memory_format == torch.channels_last
    )


def _check(images, crops, size, flips, color_shift, mean, scale, dtype) -> None:
    checks.check_tensor(OP, "images", images)
    if images.dtype != torch.uint8:
        raise TensorTypeError(f"{OP}: images must be uint8, not {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3:
        raise TensorValueError(f"{OP}: images must be [N, H, W, 3], not of shape {list(images.shape)}")
    if size[0] > images.shape[1] or size[1] > images.shape[2]:
        raise TensorValueError(f"{OP}: crops of {list(size)} do not fit images of {list(images.shape[1:3])}")
    if dtype not in checks.DTYPES:
        raise TypeError(f"{OP}: dtype must be float32, float64, bfloat16 or float16, not {dtype}")
    count, size = images.shape[0], list(size)
    shapes: dict[str, tuple[Tensor | None, list]] = {
        "crops": (crops, [[count, 2]]),
        "flips": (flips, [[count]]),
        "color_shift": (color_shift, [[count, 3]]),
        "mean": (mean, [[3], [3, *size], [3, *images.shape[1:3]]]),
        "scale": (scale, [[3]]),
    }
    for name, (tensor, allowed) in shapes.items():
        if tensor is None:
            if name == "crops":
                raise TypeError(f"{OP}: crops must be a Tensor, not NoneType")
            continue
        checks.check_device(OP, name, tensor, images)
        if list(tensor.shape) not in allowed:
            raise TensorValueError(f"{OP}: {name} must be {' or '.join(map(str, allowed))}, not {list(tensor.shape)}")
    if crops.dtype != torch.int64:
        raise TensorTypeError(f"{OP}: crops must be int64, not {crops.dtype}")
    if flips is not None and flips.dtype != torch.bool:
        raise TensorTypeError(f"{OP}: flips must be bool, not {flips.dtype}")


def _fake(images, crops, size, flips, color_shift, mean, scale, dtype: torch.dtype, channels_last: bool) -> Tensor:
    _check(images, crops, size, flips, color_shift, mean, scale, dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(images.shape[0], 3, *size, dtype=dtype, device=images.device, memory_format=memory_format)


register_op(OP, _fake)
