"""Decoding of image files to uint8 RGB tensors."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from alexnet_kernels._errors import InputError

__all__ = ["EXTENSIONS", "decode", "error_reason", "pillow_warnings_off", "read_image"]

EXTENSIONS = frozenset((".gif", ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
"""Suffixes, in lower case, of the files that are taken for images."""


def decode(file: io.BytesIO | Path, size: int | None) -> Tensor:
    """The image as uint8 [size, size, 3]: the shorter side resized (bicubic), the centre kept.

    With size=None, [height, width, 3] as stored. A JPEG more than four times as large as the square is decoded at 1/2,
    1/4 or 1/8 of its size, but at least twice the square's. Grey, palette, CMYK and 16-bit images are converted to RGB,
    transparent ones are composed on white, and an EXIF orientation is applied. For a damaged file, the decoder's own
    exception is raised.
    """
    with Image.open(file) as opened:
        if size is not None:
            opened.draft(None, (2 * size, 2 * size))
        opened.load()
        image = _rgb(ImageOps.exif_transpose(opened))
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's own conversion clips it at 255.
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@contextmanager
def pillow_warnings_off() -> Iterator[None]:
    """Silence Pillow's warnings about large images, palettes and metadata. Not thread-safe, as `warnings` is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_image(path: str | Path, size: int) -> Tensor:
    """`decode` of a file that the user named. Raises InputError if it can't be read."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder, an image file is expected")
    try:
        with pillow_warnings_off():
            return decode(path, size)
    except Exception as error:
        raise InputError(f"{path} is not a readable image: {error_reason(error)}") from error


def error_reason(error: BaseException) -> str:
    """The error's message on one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    return " ".join(str(error).split()) or type(error).__name__
