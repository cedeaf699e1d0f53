"""Image files without their metadata, for decoders that fail at metadata instead of ignoring them. Pixels are kept."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

__all__ = ["without_metadata"]

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_METADATA = frozenset(
    (
        b"acTL", b"bKGD", b"cHRM", b"cICP", b"cLLI", b"dSIG", b"eXIf", b"fcTL", b"fdAT", b"gAMA", b"gIFg", b"gIFx",
        b"hIST", b"iCCP", b"iTXt", b"mDCV", b"oFFs", b"pCAL", b"pHYs", b"sBIT", b"sCAL", b"sPLT", b"sRGB", b"sTER",
        b"tEXt", b"tIME", b"zTXt",
    )
)  # fmt: skip
_JFIF, _EXIF, _ADOBE, _COMMENT = 0xE0, 0xE1, 0xEE, 0xFE
_TIFF_TAGS = frozenset(
    (
        *range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, *range(290, 294), 317, 320, *range(322, 326), 332,
        336, 338, 339, 347, *range(512, 522), *range(529, 533),
    )
)  # fmt: skip
"""Tags that say what the pixels are, and the orientation."""
_TIFF_ENTRY = 12


def without_metadata(content: bytes) -> Iterator[bytes]:
    """The file of a PNG, JPEG or TIFF without its metadata: first with the orientation, then without. Else nothing.

    A file that ends early ends early in these as well.
    """
    if content.startswith(_PNG):
        yield _png(content, (*_PNG_PIXELS, b"eXIf"))
        yield _png(content, _PNG_PIXELS)
    elif content.startswith(b"\xff\xd8"):
        yield _jpeg(content, (_JFIF, _EXIF, _ADOBE))
        yield _jpeg(content, (_ADOBE,))
    elif content[:4] in (b"II*\0", b"MM\0*"):
        yield _tiff(content)


def _png(content: bytes, kept: tuple[bytes, ...]) -> bytes:
    result, place = [_PNG], len(_PNG)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        whole = content[place:end]
        intact = struct.pack(">I", zlib.crc32(whole[4:-4])) == whole[-4:]
        # A damaged chunk of another name may have been one of pixels: the decoder refuses it.
        if kind in _PNG_PIXELS or (kind in kept and intact) or not (intact or kind in _PNG_METADATA):
            result.append(whole)
        place = end
    return b"".join(result)


def _jpeg(content: bytes, kept: tuple[int, ...]) -> bytes:
    """Without the application segments and comments before the first scan but those of the markers `kept`."""
    result, place = [content[:2]], 2
    while place + 4 <= len(content):
        marker = content[place + 1]
        if content[place] != 0xFF or marker == 0xDA:
            break
        if marker == 0xFF:
            place += 1
            continue
        end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        application = 0xE0 <= marker <= 0xEF or marker == _COMMENT
        exif = marker == _EXIF and content[place + 4 : place + 8] == b"Exif"
        if not application or (marker in kept and (marker != _EXIF or exif)):
            result.append(content[place:end])
        place = end
    return b"".join([*result, content[place:]])


def _tiff(content: bytes) -> bytes:
    """With the first directory alone, in its place, and of that what describes the pixels."""
    order = "<" if content[:1] == b"I" else ">"
    (place,) = struct.unpack_from(order + "I", content, 4)
    if place + 2 > len(content):
        return content
    (count,) = struct.unpack_from(order + "H", content, place)
    entries = [content[at : at + _TIFF_ENTRY] for at in range(place + 2, place + 2 + count * _TIFF_ENTRY, _TIFF_ENTRY)]
    kept = [e for e in entries if len(e) == _TIFF_ENTRY and struct.unpack_from(order + "H", e)[0] in _TIFF_TAGS]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)
    return content[:place] + directory + content[place + len(directory) :]
