"""Predicts the times of the package's own convolution kernels at AlexNet's layers, batch 128, 16 bits.

    python benchmarks/convolution_budget.py

A launch is described by its tiles: what the tensor cores multiply for one, and what is copied for it from the L2 cache
to shared memory. Its time is at least that of its products, of these copies, and of the least bytes of DRAM; the
longest of the three is the prediction. cuda_resources.py writes it to its report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cuda_budget import BATCH, COPY, Recorded

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
        """Of the input, the filters and the output."""
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

    @property
    def name(self) -> str:
        return f"{self.layer.name}, {self.way}"

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

    def us(self, device: str) -> float:
        return max(self.times(device).values())

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


def launches() -> list[Launch]:
    """Those at AlexNet's layers, as the kernels choose their tiles."""
    layers = {name: layer(name) for name in CONVOLUTIONS}
    return [
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
        "assumptions. **Predicted** is the longest of the three.",
        "",
        "| layer, kernel | tiles | of rows x columns x terms | tensor, us | useful | L2, us | DRAM, us, H100 / H200 | "
        "predicted, us, H100 / H200 | binds, H100 / H200 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for launch in launches():
        dram = " / ".join(f"{launch.times(device)['DRAM']:.1f}" for device in COPY)
        predicted = " / ".join(f"{launch.us(device):.1f}" for device in COPY)
        binds = " / ".join(launch.binds(device) for device in COPY)
        lines.append(
            f"| {launch.name} | {launch.tiles} | {launch.rows} x {launch.columns} x {launch.terms} | "
            f"{launch.tensor_us:.1f} | {launch.useful:.0%} | {launch.l2_us:.1f} | {dram} | {predicted} | {binds} |"
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
            f"| {launch.layer}, {launch.way} | `{launch.kernel}` | {launch.blocks} x {launch.threads} | "
            f"{registers.get((launch.source, launch.kernel), '-')} | {launch.shared} B |"
            for launch in recorded
        ]
    return lines


def main() -> int:
    print("\n".join(markdown([], [])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
