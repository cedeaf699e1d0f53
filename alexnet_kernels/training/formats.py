"""Which files are images: by their suffix, or by their first bytes where the suffix says nothing."""

from __future__ import annotations

import os
import re

__all__ = ["EXTENSIONS", "FORMATS", "HEAD", "LARGEST", "OTHER_SUFFIXES", "kind_of", "suffix_of"]

FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000", "ICO", "CUR", "ICNS", "DIB", "PCX",
    "DCX", "PSD", "QOI", "SGI", "SUN", "DDS", "FTEX", "BLP", "GBR", "PIXAR", "MSP", "XBM", "XPM", "FLI", "TGA",
)  # fmt: skip
"""Pillow's decoders that are called: those that decode pixels themselves, in this process, and know their files by the
first bytes. TGA, the only format without a signature, comes last.

The others are not. EPS starts Ghostscript, WMF draws by Windows, and IPTC opens what it embeds by any decoder. BUFR,
GRIB, HDF5 and MPEG only recognise their files. FITS, MCIDAS and SPIDER hold measurements, whose range is unknown. IM,
IMT and PCD have no signature, so that they would be tried on every damaged file; XVTHUMB are thumbnails."""

_IMAGES = """
    .apng .avif .avifs .blp .bmp .bw .cur .dcx .dds .dib .flc .fli .ftc .ftu .gbr .gif .heic .heics .heif .heifs .hif
    .icb .icns .ico .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo .msp .pbm .pcx .pfm .pgm .png .pnm .ppm
    .psd .pxr .qoi .ras .rgb .rgba .sgi .tga .tif .tiff .vda .vst .webp .xbm .xpm"""
EXTENSIONS = frozenset(_IMAGES.split())
"""Suffixes, in lower case, of the files that are taken for images without a look at them."""

_TEXT = """
    .csv .doc .docx .htm .html .ini .json .jsonl .log .md .ndjson .odt .ods .rst .rtf .srt .tex .toml .tsv .txt .xls
    .xlsx .xml .yaml .yml """
_DATA = """
    .arrow .ckpt .db .feather .h5 .hdf .hdf5 .lmdb .mat .mdb .nc .npy .npz .onnx .parquet .pickle .pkl .pt .pth
    .safetensors .sqlite .tfrecord """
_PROGRAMS = ".c .cpp .css .dll .exe .h .ipynb .js .lnk .m .md5 .py .sha1 .sha256 .sh .so .torrent .url "
_ARCHIVES = ".7z .bz2 .gz .lz4 .rar .tar .tbz2 .tgz .txz .xz .zip .zst "
_MOVIES = ".avi .flac .m4a .m4v .mkv .mov .mp3 .mp4 .mpeg .mpg .ogg .wav .webm .wmv"
_NOT_READ = """
    .ai .arw .bufr .cr2 .cr3 .dcm .dng .emf .eps .fit .fits .grb .grib .iim .im .nef .nii .orf .pcd .pdf .pef .ps .raf
    .rw2 .srw .svg .wmf"""
_UNFINISHED = ".crdownload .download .part .partial .tmp"

_SUFFIX = "not taken for an image, by its suffix"
OTHER_SUFFIXES = {
    **dict.fromkeys((_TEXT + _DATA + _PROGRAMS + _ARCHIVES + _MOVIES).split(), _SUFFIX),
    **dict.fromkeys(_NOT_READ.split(), "of a format that is not read"),
    **dict.fromkeys(_UNFINISHED.split(), "an unfinished download, by its suffix"),
}
"""Suffixes, in lower case, of files that are left out without a look at them, and the reason.

Cameras' raw files hold a thumbnail that Pillow would take for the image."""

LARGEST = 256 << 20
"""Bytes of the largest file that is read as an image."""

HEAD = 64
"""Bytes by which `kind_of` knows a file."""

_SIGNATURES = tuple(
    (kind, re.compile(pattern, re.DOTALL))
    for kind, pattern in (
        ("JPEG", rb"\xff\xd8\xff"),
        ("PNG", rb"\x89PNG\r\n\x1a\n"),
        ("GIF", rb"GIF8[79]a"),
        ("BMP", rb"BM.{4}\0{4}.{4}[\x0c-\x7c]\0\0\0"),
        ("TIFF", rb"II[*+]\0|MM\0[*+]"),
        ("WEBP", rb"RIFF.{4}WEBP"),
        ("AVIF", rb".{4}ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4})*avi[fs])"),
        ("HEIF", rb".{4}ftyp(?:hei[cmsx]|hev[cmsx]|mif1|msf1)"),
        ("JPEG2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xffO\xffQ"),
        ("PPM", rb"P[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d"),
        ("ICO", rb"\0\0\x01\0[\x01-\x40]\0.{3}\0"),
        ("ICNS", rb"icns\0"),
        ("PSD", rb"8BPS\0\x01"),
        ("QOI", rb"qoif"),
        ("SUN", rb"\x59\xa6\x6a\x95"),
        ("SGI", rb"\x01\xda[\0\x01][\x01\x02]"),
        ("DDS", rb"DDS \x7c\0\0\0"),
    )
)


def kind_of(head: bytes) -> str | None:
    """The format of a file that begins with `head`, at least `HEAD` bytes or the whole file; None for no image."""
    return next((kind for kind, signature in _SIGNATURES if signature.match(head)), None)


def suffix_of(name: str) -> str:
    """The suffix of a path, in lower case; "" for none."""
    return os.path.splitext(name)[1].lower()
