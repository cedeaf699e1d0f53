"""Decoding of image files to uint8 RGB tensors."""

from __future__ import annotations

import functools
import importlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, features
from torch import Tensor

from alexnet_kernels._errors import InputError
from alexnet_kernels._files import read_bounded
from alexnet_kernels.training.formats import FORMATS, HEAD, LARGEST, kind_of
from alexnet_kernels.training.repair import without_metadata

__all__ = [
    "decode",
    "error_reason",
    "mode_of",
    "open_image",
    "pillow_warnings_off",
    "read_image",
]

_MANY_PIXELS = 32 << 20
"""Pixels of an image of which a process decodes one at a time, whatever the number of its threads."""
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_ONE_LARGE = threading.Lock()


@functools.cache
def _decoders() -> tuple[str, ...]:
    """The formats of `FORMATS` that this Pillow knows; HEIF is pillow-heif's, where it is installed."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: io.BytesIO | Path) -> Image.Image:
    """Pillow's `Image.open` with the decoders of `FORMATS` only."""
    return Image.open(file, formats=_decoders())


def decode(file: io.BytesIO | Path, size: int | None) -> Tensor:
    """The image as uint8 [size, size, 3]: the shorter side resized (bicubic), the centre kept.

    With size=None, [height, width, 3] as stored. A JPEG more than four times as large as the square is decoded at 1/2,
    1/4 or 1/8 of its size, but at least twice the square's. Grey, palette, CMYK and 16-bit images are converted to RGB,
    transparent ones are composed on white, and an EXIF orientation is applied, if it can be read. Metadata that the
    decoder fails at are ignored. ValueError for pixels of 32 bits or in floating point, whose range is unknown, and for
    a format whose decoder is not installed. For a damaged file, the decoder's own exception is raised.
    """
    return _tolerant(file, lambda source: _decode(source, size))


def mode_of(file: io.BytesIO) -> str:
    """Pillow's mode of the image's pixels. Raises as `decode` does. The file is at its start before and after."""
    try:
        return _tolerant(file, _mode)
    finally:
        file.seek(0)


_Result = TypeVar("_Result")


def _tolerant(file: io.BytesIO | Path, read: Callable[[io.BytesIO | Path], _Result]) -> _Result:
    """`read` of the file, or of it without its metadata if that fails."""
    try:
        return read(file)
    except (MemoryError, Image.DecompressionBombError):
        raise
    except Exception as error:
        content = file.getvalue() if isinstance(file, io.BytesIO) else read_bounded(file, LARGEST)
        for repaired in without_metadata(content):
            try:
                return read(io.BytesIO(repaired))
            except MemoryError:
                raise
            except Exception:
                continue
        if lacking := _lacking(kind_of(content[:HEAD])):
            raise ValueError(lacking) from error
        raise


def _lacking(kind: str | None) -> str:
    """Why no image of the format can be decoded here, or ""."""
    if kind == "HEIF" and kind not in _decoders():
        return "HEIF needs pillow-heif; install it with: pip install pillow-heif"
    feature = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}.get(kind or "")
    checked = feature in (*features.modules, *features.codecs)
    if feature is None or (kind in _decoders() and (not checked or features.check(feature))):
        return ""
    return f"this Pillow was built without a decoder for {kind}"


def _mode(file: io.BytesIO | Path) -> str:
    with open_image(file) as image:
        return image.mode


def _decode(file: io.BytesIO | Path, size: int | None) -> Tensor:
    with open_image(file) as opened:
        if size is not None:
            opened.draft(None, (2 * size, 2 * size))
        with _ONE_LARGE if opened.width * opened.height > _MANY_PIXELS else nullcontext():
            opened.load()
            image = _upright(_rgb(opened), _orientation(opened))
            if size is not None:
                side = min(image.size)
                left, top = (image.width - side) / 2, (image.height - side) / 2
                box = (left, top, left + side, top + side)
                image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            return torch.from_numpy(np.array(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_grey(image))
    elif image.mode == "I" and image.format in ("PNG", "PPM"):
        # 16 bits, in more: Pillow's own conversion clips them at 255.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("32-bit pixels have no known range")
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """The upper eight bits of pixels of 16 bits, or of the 12 that a TIFF may hold."""
    tags = getattr(image, "tag_v2", {})
    bits = 12 if tags.get(_BITS) in ((12,), 12) else 16
    pixels = np.asarray(image).astype(np.uint16)
    grey = (pixels >> (bits - 8)).clip(max=255).astype(np.uint8)
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 for none and for metadata that can't be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


@contextmanager
def pillow_warnings_off() -> Iterator[None]:
    """Silence Pillow's warnings about large images, palettes and metadata. Not thread-safe, as `warnings` is not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def read_image(path: str | Path, size: int) -> Tensor:
    """`decode` of a file that the user named. Raises InputError if it can't be read."""
    try:
        with pillow_warnings_off():
            return decode(io.BytesIO(read_bounded(path, LARGEST)), size)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder, an image file is expected") from error
    except MemoryError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a readable image: {error_reason(error)}") from error


def error_reason(error: BaseException) -> str:
    """The error's message on one line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no known image format ({', '.join(FORMATS[:8])} or another, see docs/data.md)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
