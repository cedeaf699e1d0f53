"""Times cuDNN's convolutions alone (forward, input gradient and filter gradient), beside this package's op.

The op's variants are those of the benchmarks: "cuda" is what the backend chooses; "cuda, wgmma" and so on are its
kernels one by one, forward and backward.

Forms of the same convolution: "plain" or "grouped", as the layer defines it; "split", one convolution a group, each on
its own tensors (the time excludes joining them); "space-to-depth", stride 1 on pixel blocks already stored as channels.
The op's time includes bias, ReLU and their gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels.bench import roofline
from alexnet_kernels.bench.cases import cases
from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.op_row import OpRow
from alexnet_kernels.bench.timing import Call, input_sets, measure
from alexnet_kernels.op_info._layers import CONVOLUTIONS

ALONE = ("forward", "input gradient", "filter gradient")
OP = ("op, forward", "op, backward")
Operands = tuple[Tensor, Tensor, Tensor]  # input, filters, output gradient


class Form:
    """A convolution of random numbers in channels_last, in one or several parts."""

    def __init__(self, layer: str, dtype: torch.dtype, batch: int, device: torch.device, form: str) -> None:
        filters, channels, kernel, stride, padding, groups, size = CONVOLUTIONS[layer]
        self.stride, self.padding, self.groups = stride, padding, groups
        parts, inputs = 1, channels * groups
        if form == "split":
            parts, self.groups = groups, 1
            filters, inputs = filters // groups, channels
        elif form == "space-to-depth":
            out = (size + 2 * padding - kernel) // stride + 1
            kernel = -(-kernel // stride)
            size, inputs = out + kernel - 1, inputs * stride**2
            channels, self.stride, self.padding = inputs, 1, 0
        out = (size + 2 * self.padding - kernel) // self.stride + 1

        def images(*shape: int) -> Tensor:
            values = torch.randn(shape, device=device).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        self.parts: list[Operands] = [
            (
                images(batch, inputs, size, size),
                images(filters, channels, kernel, kernel),
                images(batch, filters, out, out),
            )
            for _ in range(parts)
        ]

    def call(self, direction: str) -> Call:
        pair = [self.stride] * 2, [self.padding] * 2, [1, 1]

        def forward() -> None:
            for x, w, _ in self.parts:
                torch.ops.aten.convolution(x, w, None, *pair, False, [0, 0], self.groups)

        def gradient(mask: list[bool]) -> Call:
            def call() -> None:
                for x, w, g in self.parts:
                    torch.ops.aten.convolution_backward(g, x, w, None, *pair, False, [0, 0], self.groups, mask)

            return call

        if direction == "forward":
            return forward
        return gradient([direction == "input gradient", direction == "filter gradient", False])


def time_layer(
    layer: str,
    dtype: torch.dtype,
    batch: int,
    device: torch.device,
    small: bool = False,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """Times one convolution layer, in seconds.

    Returns {"layer", "operations", "bytes", "cached", "missing": {BACKEND: reason}, DIRECTION: {VARIANT: timing}} for
    each direction of ALONE and OP. `small` measures one round on one set of inputs. `skip`: variants of the op,
    as in `OpRow.time`.
    """
    case = next(
        case
        for case in cases()
        if (case.op, case.layer, case.dtype, case.channels_last) == ("conv2d_relu", layer, dtype, True)
    )
    groups, stride = CONVOLUTIONS[layer][5], CONVOLUTIONS[layer][3]
    forms = ["grouped" if groups > 1 else "plain"]
    forms += ["split"] if groups > 1 else []
    forms += ["space-to-depth"] if stride > 1 else []
    moved = int(case.work.moved(batch, False))
    sets = 1 if small else input_sets(moved, device)
    found: dict[str, Any] = {
        "layer": layer,
        "operations": case.work.done(batch, False),
        "bytes": moved,
        "cached": moved * sets < cache_bytes(device),
    }
    timing: dict[str, Any] = {"seconds": 0.05, "rounds": 1} if small else {"seconds": 0.4, "rounds": 10}

    made = {form: [Form(layer, dtype, batch, device, form) for _ in range(sets)] for form in forms}
    for direction in ALONE:
        calls = {form: [one.call(direction) for one in all_] for form, all_ in made.items()}
        times = measure(calls, device, **timing)
        found[direction] = {name: value.to_json() for name, value in times.items()}
    del made
    row = OpRow(case, batch, apart=True, most_sets=sets).time(device, **timing, skip=skip).to_json()
    found["missing"] = row["missing"]
    for direction, passed in zip(OP, ("forward", "backward"), strict=True):
        found[direction] = dict(row[passed]["times"])
        found[direction] |= {name: {"error": why} for name, why in (row["wrong"] | row["errors"]).items()}
    return found


def rate(found: dict[str, Any], direction: str, seconds: float) -> float:
    """Operations per second. Each gradient takes as many operations as the forward pass; the op's backward computes
    both gradients, except for conv1, whose input needs none.
    """
    passes = 1.0
    if direction == OP[1]:
        passes = 1.0 if found["layer"] == "conv1" else 2.0
    return passes * found["operations"] / seconds


def floor(found: dict[str, Any], ceilings: roofline.Ceilings, dtype: str = "bf16") -> float:
    """The least seconds of one pass at the measured rates."""
    return ceilings.seconds(found["bytes"], found["operations"], dtype)
