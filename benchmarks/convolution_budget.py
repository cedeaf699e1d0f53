"""Predicts the times of the package's own convolution kernels at AlexNet's layers, batch 128, 16 bits.

    python benchmarks/convolution_budget.py

A launch is described by its tiles: what the tensor cores multiply for one, and what is copied for it from the L2 cache
to shared memory. Its time is at least that of its products, of these copies, and of the least bytes of DRAM; the
longest of the three is the prediction. The filter gradient's sums of each split of the pixels go to L2 and back, for
another kernel to add them: their time comes on top. cuda_resources.py writes it to its report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cuda_budget import BATCH, COPY, DIRECTIONS, Recorded

from alexnet_kernels.op_info._layers import CONVOLUTIONS

BYTES = 2  # of an element
MULTIPROCESSORS = 132
# Assumptions, which no measurement has confirmed: the clock under load; the rate of L2 to shared memory, of all
# multiprocessors; the share of wgmma's rate that mma.sync reaches.
CLOCK = 1.755e9
L2 = 5.5e12
MMA_SHARE = 0.62
# Of a multiprocessor in a clock: m64nNk16 takes N / 2 clocks.
PRODUCTS = 64 * 16 * 2
MMA_ROWS, MMA_CHUNK = 128, 32
FORWARD, INPUT, FILTER = DIRECTIONS.values()


@dataclass(frozen=True)
class Layer:
    """A convolution with stride 1: sizes of its input and output, channels and filters of one group."""

    name: str
    images: int
    in_size: int
    out_size: int
    channels: int
    filters: int
    groups: int
    kernel: int

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def products(self) -> int:
        """Multiplications of the definition."""
        return self.images * self.out_size**2 * self.groups * self.filters * self.taps * self.channels

    @property
    def bytes(self) -> int:
        """Of the input, the filters and the output, or of their gradients."""
        inputs = self.images * self.in_size**2 * self.groups * self.channels
        outputs = self.images * self.out_size**2 * self.groups * self.filters
        return BYTES * (inputs + self.groups * self.filters * self.taps * self.channels + outputs)


@dataclass(frozen=True)
class Launch:
    """A launch: `tiles` products of rows x terms by terms x columns, as the tensor cores compute them."""

    layer: Layer
    way: str  # "wgmma" or "mma"
    tiles: int
    rows: int
    columns: int
    terms: int
    tile_bytes: int  # copied from L2 to shared memory for a tile
    block_bytes: int = 0  # and once for a block, of which each multiprocessor has one
    sums: int = 0  # float32, of all splits
    direction: str = FORWARD

    @property
    def name(self) -> str:
        return f"{self.layer.name}, {self.direction}, {self.way}"

    @property
    def tensor_us(self) -> float:
        """Of the products, on the multiprocessor with the most tiles."""
        rate = PRODUCTS * (MMA_SHARE if self.way == "mma" else 1)
        clocks = self.rows * self.columns * self.terms / rate
        return math.ceil(self.tiles / MULTIPROCESSORS) * clocks / CLOCK * 1e6

    @property
    def l2_bytes(self) -> int:
        return self.tiles * self.tile_bytes + min(self.tiles, MULTIPROCESSORS) * self.block_bytes

    @property
    def l2_us(self) -> float:
        return self.l2_bytes / L2 * 1e6

    def times(self, device: str) -> dict[str, float]:
        """Microseconds of each part."""
        return {"tensor cores": self.tensor_us, "L2": self.l2_us, "DRAM": self.layer.bytes / COPY[device] * 1e6}

    @property
    def sums_us(self) -> float:
        """Of writing and reading the splits' sums."""
        return 2 * 4 * self.sums / L2 * 1e6

    def us(self, device: str) -> float:
        return max(self.times(device).values()) + self.sums_us

    def binds(self, device: str) -> str:
        times = self.times(device)
        return max(times, key=lambda part: times[part])

    @property
    def useful(self) -> float:
        """The share of the products on the busiest multiprocessor's time that the definition asks for."""
        slots = math.ceil(self.tiles / MULTIPROCESSORS) * MULTIPROCESSORS
        return self.layer.products / (slots * self.rows * self.columns * self.terms)


def layer(name: str) -> Layer:
    """One of AlexNet's, as the kernels see it: a stride is a convolution of blocks of pixels (space_to_depth)."""
    filters, channels, kernel, stride, padding, groups, size = CONVOLUTIONS[name]
    out_size = (size + 2 * padding - kernel) // stride + 1
    taps = -(-kernel // stride)
    in_size = size if stride == 1 else out_size + taps - 1
    return Layer(name, BATCH, in_size, out_size, channels * stride**2, filters // groups, groups, taps)


def wgmma(
    layer: Layer, box: tuple[int, int, int], rows: int, columns: int, chunk: int, *, resident: bool = False
) -> Launch:
    """A launch of conv2d_relu_sm90a.cu.

    For a chunk of channels, a tile's pixels of x and those around them are copied once, and for each tap all columns of
    w; where `resident`, those are copied once for a block.

    box: the pixels of a tile, along images, rows and columns
    rows: those that the tensor cores multiply, of which the pixels are the first
    """
    n, h, w = box
    boxes = -(-layer.images // n) * -(-layer.out_size // h) * -(-layer.out_size // w)
    chunks = -(-layer.channels // chunk)
    around = layer.kernel - 1
    x_bytes = chunks * n * (h + around) * (w + around) * chunk * BYTES
    w_bytes = layer.taps * chunks * columns * chunk * BYTES
    tiles = boxes * layer.groups * -(-layer.filters // columns)
    terms = layer.taps * chunks * chunk
    if resident:
        return Launch(layer, "wgmma", tiles, rows, columns, terms, x_bytes, w_bytes)
    return Launch(layer, "wgmma", tiles, rows, columns, terms, x_bytes + w_bytes)


def mma(layer: Layer, columns: int) -> Launch:
    """A launch of conv2d_relu_sm80.cu, which copies every term of every row and column."""
    row_tiles = -(-layer.images * layer.out_size**2 // MMA_ROWS)
    tiles = row_tiles * layer.groups * -(-layer.filters // columns)
    terms = -(-layer.taps * layer.channels // MMA_CHUNK) * MMA_CHUNK
    return Launch(layer, "mma", tiles, MMA_ROWS, columns, terms, (MMA_ROWS + columns) * terms * BYTES)


def mirrored(layer: Layer) -> Layer:
    """The convolution of the output's gradient that the input's gradient is."""
    return replace(
        layer,
        in_size=layer.out_size,
        out_size=layer.in_size,
        channels=layer.filters,
        filters=layer.channels,
    )


def weight_wgmma(
    layer: Layer, box: tuple[int, int, int], tap_rows: int, units: int, columns: int, splits: int
) -> Launch:
    """A launch of conv2d_relu_backward_weight_sm90a.cu.

    A tile has `units` times 16 channels of one tap by `columns` filters, and its split of the boxes of pixels.

    box: pixels, along images, rows and columns
    tap_rows: rows of taps that a tile's units span
    """
    n, h, w = box
    boxes = -(-layer.images // n) * -(-layer.out_size // h) * -(-layer.out_size // w)
    own = -(-boxes // splits)
    channels, unit = min(layer.channels, 64), 16
    blocks = -(-layer.taps * -(-channels // unit) // units) * -(-layer.channels // 64)
    tiles = blocks * -(-layer.filters // columns) * layer.groups * splits
    pixels = n * h * w
    x_bytes = n * (h + tap_rows - 1) * (w + layer.kernel - 1) * channels * BYTES
    sums = splits * layer.groups * layer.filters * layer.taps * layer.channels
    terms = own * -(-pixels // 16) * 16
    tile_bytes = own * (x_bytes + pixels * columns * BYTES)
    return Launch(layer, "wgmma", tiles, unit * units, columns, terms, tile_bytes, sums=sums, direction=FILTER)


def weight_mma(layer: Layer, columns: int, splits: int) -> Launch:
    """A launch of conv2d_relu_backward_weight_sm80.cu, which copies every term of every row and column."""
    row_tiles = -(-layer.taps * layer.channels // MMA_ROWS)
    tiles = row_tiles * -(-layer.filters // columns) * layer.groups * splits
    chunks = -(-layer.images * layer.out_size**2 // MMA_CHUNK)
    terms = -(-chunks // splits) * MMA_CHUNK
    sums = splits * layer.groups * layer.filters * layer.taps * layer.channels
    tile_bytes = (MMA_ROWS + columns) * terms * BYTES
    return Launch(layer, "mma", tiles, MMA_ROWS, columns, terms, tile_bytes, sums=sums, direction=FILTER)


def launches() -> list[Launch]:
    """Those at AlexNet's layers, as the kernels choose their tiles. conv1's input gets no gradient."""
    layers = {name: layer(name) for name in CONVOLUTIONS}
    inputs = {name: mirrored(one) for name, one in layers.items()}
    forward = [
        wgmma(layers["conv1"], (3, 3, 28), 256, 96, 48, resident=True),
        mma(layers["conv1"], 96),
        wgmma(layers["conv2"], (1, 9, 27), 256, 128, 48),
        mma(layers["conv2"], 128),
        wgmma(layers["conv3"], (1, 13, 13), 192, 192, 64),
        mma(layers["conv3"], 128),
        wgmma(layers["conv4"], (1, 13, 13), 192, 192, 64),
        mma(layers["conv4"], 64),
        wgmma(layers["conv5"], (1, 13, 13), 192, 128, 64),
        mma(layers["conv5"], 128),
    ]
    by_input = [
        wgmma(inputs["conv2"], (1, 9, 27), 256, 64, 64),
        mma(inputs["conv2"], 64),
        wgmma(inputs["conv3"], (1, 13, 13), 192, 128, 64),
        mma(inputs["conv3"], 128),
        wgmma(inputs["conv4"], (1, 13, 13), 192, 192, 64),
        mma(inputs["conv4"], 64),
        wgmma(inputs["conv5"], (1, 13, 13), 192, 192, 64),
        mma(inputs["conv5"], 64),
    ]
    by_filter = [
        weight_wgmma(layers["conv1"], (2, 5, 19), 3, 32, 96, 132),
        weight_mma(layers["conv1"], 96, 66),
        weight_wgmma(layers["conv2"], (1, 9, 27), 3, 16, 128, 13),
        weight_mma(layers["conv2"], 128, 13),
        weight_wgmma(layers["conv3"], (1, 13, 13), 1, 12, 192, 5),
        weight_mma(layers["conv3"], 128, 9),
        weight_wgmma(layers["conv4"], (1, 13, 13), 1, 12, 192, 7),
        weight_mma(layers["conv4"], 96, 9),
        weight_wgmma(layers["conv5"], (1, 13, 13), 3, 36, 64, 11),
        weight_mma(layers["conv5"], 128, 9),
    ]
    return [*forward, *(replace(one, direction=INPUT) for one in by_input), *by_filter]


class Kernel(Protocol):
    """What the report says of a kernel's machine code."""

    source: str
    arch: str
    registers: int

    @property
    def title(self) -> str: ...


def markdown(recorded: Sequence[Recorded], kernels: Sequence[Kernel]) -> list[str]:
    """A section of cuda_resources.md."""
    lines = [
        "## Predicted times of the convolution kernels",
        "",
        f"AlexNet's layers at batch {BATCH} in bfloat16, on compute capability 9.0 with {MULTIPROCESSORS}",
        "multiprocessors; a prediction from the tiles (benchmarks/convolution_budget.py), which no GPU has confirmed.",
        f"**Tensor**: the products of the multiprocessor with the most tiles at {CLOCK / 1e9} GHz, where a",
        f"multiprocessor multiplies {PRODUCTS} pairs a clock by wgmma, and by mma.sync {MMA_SHARE:.0%} of that;",
        "**useful** is the share of them that the definition asks for. **L2**: the copies of all tiles to shared",
        f"memory at {L2 / 1e12} TB/s. **DRAM**: input, filters and output, once each, at {COPY['H100'] / 1e12} TB/s",
        f"(H100) or {COPY['H200'] / 1e12} TB/s (H200). The clock, the L2 cache's rate and mma.sync's share are",
        "assumptions. **Sums**: the filter gradient's, of each split of the pixels, to L2 and back. **Predicted** is",
        "the longest of the first three, and the sums. Not counted: turning the filters for the input gradient.",
        "",
        "| layer, kernel | tiles | of rows x columns x terms | tensor, us | useful | L2, us | DRAM, us, H100 / H200 | "
        "sums, us | predicted, us, H100 / H200 | binds, H100 / H200 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for launch in launches():
        dram = " / ".join(f"{launch.times(device)['DRAM']:.1f}" for device in COPY)
        predicted = " / ".join(f"{launch.us(device):.1f}" for device in COPY)
        binds = " / ".join(launch.binds(device) for device in COPY)
        lines.append(
            f"| {launch.name} | {launch.tiles} | {launch.rows} x {launch.columns} x {launch.terms} | "
            f"{launch.tensor_us:.1f} | {launch.useful:.0%} | {launch.l2_us:.1f} | {dram} | "
            f"{launch.sums_us:.1f} | {predicted} | {binds} |"
        )
    if recorded:
        lines += [
            "",
            "What the operator launches there (recorded in the emulation, on 132 multiprocessors):",
            "",
            "| layer | kernel | blocks x threads | registers | dynamic shared memory |",
            "|---|---|---|---|---|",
        ]
        registers = {
            (kernel.source, kernel.title): kernel.registers for kernel in kernels if kernel.arch.startswith("sm_90")
        }
        lines += [
            f"| {launch.name} | `{launch.kernel}` | {launch.blocks} x {launch.threads} | "
            f"{registers.get((launch.source, launch.kernel), '-')} | {launch.shared} B |"
            for launch in recorded
        ]
    return lines


def main() -> int:
    print("\n".join(markdown([], [])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
