"""Which implementation backend "auto" runs, by kind of call.

The user's table, which `alexnet-kernels tune` writes, comes first, then the package's, of each the row of the nearest
kind (`kinds.distance`), then a rule. The choice for a geometry is made once, and depends on no time that is measured
while the program runs: the same tables give the same choices, so the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from alexnet_kernels._dispatch import tuned
from alexnet_kernels._dispatch.kinds import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    BOTH,
    CONVOLUTION,
    DTYPES,
    FORMATS,
    FORWARD,
    Kind,
    Row,
    nearest,
    power_of_two,
    shape_names,
)
from alexnet_kernels._dispatch.layout import memory_format_of
from alexnet_kernels._torch_private import constant_when_compiled, is_static

VARIABLE = "ALEXNET_KERNELS_TUNED"
"""The environment variable that says whether the user's table counts: "1" or "0"."""
if (_given := os.environ.get(VARIABLE, "1")) not in ("0", "1"):
    raise ValueError(f"{VARIABLE}={_given!r}: '0' or '1' expected")
_tuned = _given == "1"

H100 = (
    "NVIDIA H100 80GB HBM3, driver 580.159.04, torch 2.11.0+cu130, cuDNN 9.19, Triton 3.6.0, commit 3058d2e, batch 128"
)


def _measured(
    name: str, shape: tuple[int, ...], times: dict[str, float], note: str = "", direction: str = FORWARD
) -> Row:
    kind = Kind(CONVOLUTION, direction, "9.0", "bfloat16", "channels_last", shape)
    by_name = {each: {direction: time} for each, time in times.items()}
    return Row(kind, name, "measured", by_name, f"{H100}{'; ' if note else ''}{note}")


_ALONE = "triton with bias and ReLU, the library's convolution alone"
COMMITTED: tuple[Row, ...] = (
    # benchmarks/results/h100/report.md, "Convolutions one by one". AlexNet's conv1 after space_to_depth, whose time is
    # in all of these; without an epilogue 100.6 us are cuDNN's and 33.9 us the rearrangement's.
    _measured(
        "triton", (96, 48, 3, 3, 1, 1, 1, 1 << 19, 1), {"library": 197.1, "triton": 166.3}, "space_to_depth in all"
    ),
    _measured(
        "library",
        (96, 48, 3, 3, 1, 1, 1, 1 << 19, 0),
        {"library": 134.5, "triton": 166.3},
        f"space_to_depth in all; {_ALONE}",
    ),
    # conv2.
    _measured("triton", (128, 48, 5, 5, 1, 1, 2, 1 << 17, 1), {"library": 279.7, "triton": 138.0}),
    _measured("triton", (128, 48, 5, 5, 1, 1, 2, 1 << 17, 0), {"library": 250.2, "triton": 138.0}, _ALONE),
    # conv3. The library's is cuDNN's kernel with bias and ReLU.
    _measured("library", (384, 256, 3, 3, 1, 1, 1, 1 << 14, 1), {"library": 68.8, "triton": 72.4}),
    # conv4.
    _measured("triton", (192, 192, 3, 3, 1, 1, 2, 1 << 14, 1), {"library": 121.9, "triton": 79.4}),
    # conv5.
    _measured("triton", (128, 192, 3, 3, 1, 1, 2, 1 << 14, 1), {"library": 69.0, "triton": 44.8}),
    _measured("triton", (128, 192, 3, 3, 1, 1, 2, 1 << 14, 0), {"library": 63.2, "triton": 44.8}, _ALONE),
)
"""The package's table. No row of another op: the pools, norms and augmentation, CUDA and Triton, were rewritten after
the H100's report, and no GPU has timed them since."""

RULES = {
    "conv2d_relu, forward": "space_to_depth with a square stride smaller than the kernel, at most 4 channels, one "
    "group and channels_last: on a GPU always, as its tensor cores need runs of 16 channels or more; on a CPU in "
    "bfloat16 from 6 images on, and in compiled graphs. Else library",
    "conv2d_relu, gradients": "library: on an H100 Triton's both took as long (conv1) or longer (conv2 903 us, cuDNN's "
    "739); cuDNN's in groups apart took less, but that leaves the copies of slices out; no GPU has run this package's",
    "other ops": "cuda",
    "float16": "as bfloat16 where only that has rows",
}
"""What holds where no row is near."""

_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}

CACHES: list[dict] = []
"""What `forget` clears."""
MOST_CACHED = 4096
_chosen: dict[tuple, str] = {}
CACHES.append(_chosen)


def is_tuned() -> bool:
    """Whether the user's table counts."""
    return _tuned


def set_tuned(enabled: bool) -> None:
    """Whether the user's table, written by `alexnet-kernels tune`, counts from now on, in all threads.

    Functions that torch.compile has compiled keep their choices.
    """
    global _tuned
    _tuned = enabled
    forget()


def forget() -> None:
    """Makes every choice anew, from the tables as they are now."""
    tuned.forget()
    for cache in CACHES:
        cache.clear()


def user_rows(device: torch.device) -> Sequence[Row]:
    """The user's table for a device; empty where it does not count."""
    return tuned.rows_of(device) if _tuned else ()


def choose(op: str, input: Tensor, dtype: torch.dtype) -> str:
    """The implementation, forward and backward, for a call on `input` that computes in `dtype`; of no convolution."""
    if torch.compiler.is_compiling():
        elements, static = input.numel(), is_static(input.numel())
        return _find(op, BOTH, True, input.device, dtype, _is_channels_last(input), (elements,)) if static else "cuda"
    key = (op, input.device, dtype, input.shape, _is_channels_last(input))
    try:
        return _chosen[key]
    except (KeyError, TypeError):  # symbolic sizes have no hash
        pass
    if not is_static(input.numel()):
        return "cuda"
    return _remember(key, _find(op, BOTH, True, input.device, dtype, key[-1], (input.numel(),)))


def choose_directions(
    on_gpu: bool,
    input: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    epilogue: bool = True,
) -> tuple[str, str, str]:
    """The implementations for a convolution: forward, the input's gradient, the weight's.

    on_gpu: whether kernels for GPUs run, as the emulation of CUDA does on a CPU.
    """
    channels_last = _is_channels_last(input)
    (images, _, *extents), (filters, channels, *kernel) = input.shape, weight.shape
    if images == 0:
        return "library", "library", "library"
    pixels = [(extents[d] + 2 * padding[d] - kernel[d]) // stride[d] + 1 for d in (0, 1)]
    shape = (filters, channels, *kernel, *stride, groups, images * pixels[0] * pixels[1], int(epilogue))
    if not all(map(is_static, shape)) or _is_huge(input, shape, padding):
        rule = on_gpu, dtype_name(dtype), channels_last, channels, kernel, stride, groups, None
        return _rule(FORWARD, *rule), _rule(BACKWARD_INPUT, *rule), _rule(BACKWARD_WEIGHT, *rule)
    many = None if torch.compiler.is_compiling() else images
    return _find_directions(on_gpu, input.device, dtype, channels_last, shape, many)


def kind_of(
    op: str, direction: str, device: str, dtype: torch.dtype, channels_last: bool, shape: Sequence[int]
) -> Kind:
    """The kind of a call, from the numbers of its shape as they are."""
    sizes = dict(zip(shape_names(op), shape, strict=True))
    for name in ("rows", "elements"):
        if name in sizes:
            sizes[name] = power_of_two(sizes[name])
    if op == CONVOLUTION:
        sizes["filters"] //= sizes["groups"]
        sizes["epilogue"] = 1 if device == "cpu" or direction != FORWARD else sizes["epilogue"]
    format = FORMATS[0] if channels_last else FORMATS[1]
    return Kind(op, direction, device, dtype_name(dtype), format, tuple(sizes.values()))


def row_for(kind: Kind, rows: Iterable[Row]) -> Row | None:
    """The row that counts for a kind of calls; None if none is near. Rows of bfloat16 serve float16, after its own."""
    rows = tuple(rows)
    found = nearest(kind, rows)
    if found is None and kind.dtype == "float16":
        found = nearest(kind._replace(dtype="bfloat16"), rows)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as kinds have it."""
    return _DTYPE_NAMES.get(dtype, "other")


def device_name(device: torch.device) -> str:
    """A device as kinds have it: "cpu", or a compute capability."""
    if device.type == "cuda" and torch.cuda.is_available():
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return device.type


@constant_when_compiled
def has_rows(op: str, device: torch.device) -> bool:
    """Whether a table has rows of the op for a device."""
    name = device_name(device)
    rows = (*user_rows(device), *COMMITTED)
    return any(row.kind.op == op and row.kind.device == name for row in rows)


@constant_when_compiled
def _find(
    op: str,
    direction: str,
    on_gpu: bool,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
    shape: tuple[int, ...],
    images: int | None = None,
) -> str:
    name = device_name(device)
    if on_gpu and name == "cpu":
        name = "emulated"
    kind = kind_of(op, direction, name, dtype, channels_last, shape)
    row = row_for(kind, user_rows(device))
    return (row and _name_in(row, kind)) or committed_choice(kind, images)


@constant_when_compiled
def _find_directions(
    on_gpu: bool,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
    shape: tuple[int, ...],
    images: int | None,
) -> tuple[str, str, str]:
    rest = on_gpu, device, dtype, channels_last, shape, images
    return (
        _find(CONVOLUTION, FORWARD, *rest),
        _find(CONVOLUTION, BACKWARD_INPUT, *rest),
        _find(CONVOLUTION, BACKWARD_WEIGHT, *rest),
    )


def committed_choice(kind: Kind, images: int | None) -> str:
    """The choice without the user's table. `images` is None in a compiled graph, which serves any batch size."""
    row = row_for(kind, COMMITTED)
    if row is not None and (name := _name_in(row, kind)):
        return name
    if kind.op != CONVOLUTION:
        return "cuda"
    return _rule(kind.direction, kind.device != "cpu", kind.dtype, *_layout(kind), images)


def _name_in(row: Row, kind: Kind) -> str | None:
    """What a row that is near says of a kind of calls; None if that does not take them."""
    if row.name == "space_to_depth" and not takes_space_to_depth(*_layout(kind)):
        return None
    # wgmma alone raises where it does not take a call.
    return "own" if row.name == "wgmma" else row.name


def _layout(kind: Kind) -> tuple[bool, int, list[int], list[int], int]:
    """The arguments of `takes_space_to_depth`."""
    _, channels, *kernel, stride_height, stride_width, groups, _, _ = kind.shape
    return kind.format == FORMATS[0], channels, kernel, [stride_height, stride_width], groups


def _rule(
    direction: str,
    on_gpu: bool,
    dtype: str,
    channels_last: bool,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    groups: int,
    images: int | None,
) -> str:
    """For a convolution that no row is near."""
    if direction != FORWARD or not takes_space_to_depth(channels_last, channels, kernel, stride, groups):
        return "library"
    return "space_to_depth" if gains_by_space_to_depth(on_gpu, dtype, images) else "library"


def takes_space_to_depth(
    channels_last: bool, channels: int, kernel: Sequence[int], stride: Sequence[int], groups: int
) -> bool:
    """Whether a convolution may be computed with its blocks of pixels as channels."""
    return (
        groups == 1 and stride[0] == stride[1] > 1 and stride[0] < min(kernel[0], kernel[1])
        and channels <= 4 and channels_last
    )  # fmt: skip


def gains_by_space_to_depth(on_gpu: bool, dtype: str, images: int | None) -> bool:
    """Whether a convolution that takes it, such as AlexNet's first, is faster so.

    Measured on two AVX512-BF16 cores with torch 2.14, 11x11 kernels, stride 4, on [N, 3, 224, 224], channels last,
    bfloat16: forward 13.0 -> 10.8 ms at N = 16, forward and backward 26.2 -> 23.5; below 6 images rearranging the
    weight costs more than it saves. In float32 the weight gradient loses more than the rest gains. A GPU's tensor
    cores need runs of 16 channels or more, in any dtype, and the input's gradient needs stride 1: on an H100 in
    bfloat16, batch 128, 197 us against 1098.
    """
    return on_gpu or (dtype == "bfloat16" and (images is None or images >= 6))


def _is_huge(input: Tensor, shape: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a call exceeds what kernels other than the library's take."""
    filters, *_, rows, _ = shape
    sides = [size + 2 * pad for size, pad in zip(input.shape[2:], padding, strict=True)]
    most = (1 << 31) - (1 << 16)
    return input.numel() >= most or filters * rows >= most or max(*sides, shape[4], shape[5]) > 1 << 23


def _is_channels_last(input: Tensor) -> bool:
    return memory_format_of(input) == torch.channels_last


def _remember(key: tuple, name: str) -> str:
    if len(_chosen) >= MOST_CACHED:
        _chosen.clear()
    _chosen[key] = name
    return name


def in_force(device: torch.device) -> list[Row]:
    """The rows of both tables for a device, the user's first; of the package's, those that no user's row replaces."""
    name = device_name(device)
    user = list(user_rows(device))
    kinds = {row.kind for row in user}
    return user + [row for row in COMMITTED if row.kind.device == name and row.kind not in kinds]


__all__ = [
    "BOTH",
    "CACHES",
    "COMMITTED",
    "CONVOLUTION",
    "MOST_CACHED",
    "RULES",
    "VARIABLE",
    "choose",
    "choose_directions",
    "committed_choice",
    "device_name",
    "dtype_name",
    "forget",
    "gains_by_space_to_depth",
    "has_rows",
    "in_force",
    "is_tuned",
    "kind_of",
    "row_for",
    "set_tuned",
    "takes_space_to_depth",
    "user_rows",
]
