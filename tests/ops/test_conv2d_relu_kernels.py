"""The package's own convolution kernels, emulated on the CPU, against float64."""

from __future__ import annotations

import random as randoms
import struct
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from convolutions import Convolution
from platforms import emulation
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(
        emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
    ),
    pytest.mark.usefixtures("cuda"),
]

KERNELS = ["mma", "wgmma"]
ALGORITHMS = {"own": 1, "mma": 2, "wgmma": 3}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_kernel_and_dtype = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel}-{name}")
        for kernel in KERNELS
        for name, dtype in DTYPES.items()
        if kernel == "mma" or name != "fp32"
    ],
)


def convolve(
    kernel: str,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    relu: bool,
) -> Tensor:
    operators = getattr(torch.ops, emulation.NAMESPACE)
    return operators.conv2d_relu(x, w, bias, stride, padding, groups, relu, ALGORITHMS[kernel])


@dataclass(frozen=True)
class Case(Convolution):
    bias: bool = True
    relu: bool = True

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        x, w = self.input_and_weight(dtype)
        return x, w, self.tensor(self.groups * self.K, dtype=dtype) if self.bias else None


def check(kernel: str, case: Case, dtype: torch.dtype) -> Tensor:
    x, w, bias = case.inputs(dtype)
    y = convolve(kernel, x, w, bias, case.stride, case.padding, case.groups, case.relu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), w.double(), None, case.stride, case.padding, 1, case.groups)
    # Operands of TF32 are off by 2^-11 at most, whose sum over a filter grows as its square root.
    operands = 2.0**-9 if dtype == torch.float32 else 2.0**-18
    sizes = F.conv2d(x.double() ** 2, w.double() ** 2, None, case.stride, case.padding, 1, case.groups).sqrt()
    if bias is not None:
        exact = exact + bias.double().view(-1, 1, 1)
    expected = exact.relu() if case.relu else exact
    result = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[dtype]
    bound = operands * sizes + 1.01 * result * expected.abs() + 2e-6
    error = (y.double() - expected).abs()
    assert y.shape == expected.shape
    worst = (error - bound).max().item()
    assert worst <= 0, f"{case}: beyond the bound by {worst}, at {(error - bound).argmax().item()}"
    return y


# The convolutions of AlexNet, the first one after space_to_depth, and of torchvision's.
LAYERS = {
    "conv1": Case(1, 48, (57, 57), 96, (3, 3)),
    "conv2": Case(1, 48, (27, 27), 128, (5, 5), padding=(2, 2), groups=2),
    "conv3": Case(1, 256, (13, 13), 384, (3, 3), padding=(1, 1)),
    "conv4": Case(1, 192, (13, 13), 192, (3, 3), padding=(1, 1), groups=2),
    "conv5": Case(1, 192, (13, 13), 128, (3, 3), padding=(1, 1), groups=2),
    "torchvision 1": Case(1, 48, (57, 57), 64, (3, 3)),
    "torchvision 2": Case(1, 64, (27, 27), 192, (5, 5), padding=(2, 2)),
    "torchvision 4": Case(1, 384, (13, 13), 256, (3, 3), padding=(1, 1)),
}


# Several tiles in both directions, with parts of tiles at the ends.
ORDERED = [
    Case(2, 48, (13, 13), 136, (3, 3), padding=(1, 1), groups=2),
    Case(3, 16, (9, 8), 70, (2, 3), stride=(1, 2)),
    Case(3, 5, (9, 8), 70, (3, 3), padding=(2, 0), groups=2),
]


@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(kernel: str, layer: str, cuda) -> None:
    torch.manual_seed(len(layer))
    cuda.set_device(multiprocessors=1)  # large tiles
    check(kernel, LAYERS[layer], torch.bfloat16)


# Tiles of 132 x 1, 3 x 63 and 9 x 28 pixels, of two images or more, with a remainder along each of w, h and n.
CLIPPED = [
    Case(2, 8, (5, 263), 8, (1, 1)),
    Case(1, 16, (131, 7), 200, (3, 2), padding=(1, 1)),
    Case(5, 48, (20, 55), 96, (3, 3)),
    Case(7, 64, (9, 11), 136, (3, 3), padding=(1, 1), groups=2),
    Case(23, 24, (5, 5), 72, (2, 2)),
]


@every_kernel
@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("case", CLIPPED, ids=lambda case: f"{case.batch}x{case.size}")
def test_tiles_beyond_the_output_are_clipped(kernel: str, case: Case, multiprocessors: int, cuda) -> None:
    torch.manual_seed(1)
    cuda.set_device(multiprocessors=multiprocessors)
    check(kernel, case, torch.bfloat16)


@pytest.mark.parametrize("algorithm", ["own", "wgmma"])
def test_filters_that_shared_memory_does_not_hold(algorithm: str, cuda) -> None:
    """The pixels of a tile and those around them have more bytes than an int counts."""
    x, w = (torch.zeros(n, 182, 182, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2) for n in (256, 8))
    arguments = (x, w, None, (1, 1), (0, 0), 1, True)
    if algorithm == "wgmma":
        with pytest.raises(RuntimeError, match="too large for shared memory"):
            convolve("wgmma", *arguments)
        return
    cuda.set_recording(True)
    convolve("own", *arguments)
    ((_, grid, block, shared, _),) = cuda.recorded()
    assert (grid, block, shared) == ([2, 1, 1], [128, 1, 1], 4 * 64 * (128 + 64))  # mma.sync's


def drawn(seed: int, kernel: str) -> Case:
    """A convolution that the kernel takes."""
    draw = randoms.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    window, padding = pair(1, 5), pair(0, 3)
    size = tuple(max(draw.randint(1, 12), k - 2 * p) for k, p in zip(window, padding, strict=True))
    if size == (1, 1):  # in both memory formats
        size = (1, 2)
    vectors = kernel == "wgmma" or draw.random() < 0.5
    return Case(
        batch=draw.randint(1, 6),
        C=8 * draw.randint(1, 9) if vectors else draw.randint(2, 40),
        size=(size[0], size[1]),
        K=8 * draw.randint(1, 25)
        if kernel == "wgmma"
        else draw.choice([8 * draw.randint(1, 16), draw.randint(1, 140)]),
        kernel=window,
        stride=(1, 1) if kernel == "wgmma" else pair(1, 4),
        padding=padding,
        groups=draw.choice([1, 1, 2, 3]),
        bias=draw.random() < 0.7,
        relu=draw.random() < 0.5,
        skipped=0 if kernel == "wgmma" else draw.choice([0, 0, 0, 1]),
    )


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("kernel", "dtype", "C"),
    [
        *(("mma", dtype, C) for dtype in DTYPES.values() for C in (3, 8)),
        *(("wgmma", dtype, 8) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(kernel: str, value: float, C: int, relu: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(C)
    x, w, bias = Case(2, C, (7, 6), 16, (3, 3), groups=2, bias=True).inputs(dtype)
    x[1, 1, 2, 3] = value
    w[17, 2, 1, 0] = value
    bias[5] = value
    w[3, 1, 1, 1] = -value
    stride = (1, 1) if kernel == "wgmma" else (2, 1)
    y = convolve(kernel, x, w, bias, stride, (1, 1), 2, relu)
    # Padding is zeros, which times infinity is NaN.
    expected = F.conv2d(F.pad(x.double(), (1, 1, 1, 1)), w.double(), bias.double(), stride, groups=2)
    expected = expected.relu() if relu else expected
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    assert not y[:, 17].isfinite().all()


@pytest.mark.parametrize(
    ("kernel", "case"),
    [*(("mma", case) for case in ORDERED), ("wgmma", ORDERED[0]), ("wgmma", Case(5, 72, (6, 6), 208, (3, 3)))],
    ids=lambda value: value if isinstance(value, str) else f"{value.C}x{value.K}",
)
def test_the_order_of_threads_changes_no_bit(kernel: str, case: Case, cuda) -> None:
    torch.manual_seed(1)
    arguments = (*case.inputs(torch.bfloat16), case.stride, case.padding, case.groups, case.relu)
    expected = convolve(kernel, *arguments)
    for order in range(1, 6):
        cuda.set_order(order)
        assert torch.equal(convolve(kernel, *arguments), expected), order


@every_dtype
@pytest.mark.parametrize("K", [64, 96, 128])
def test_matrices_are_read_without_bank_conflicts(dtype: torch.dtype, K: int, cuda) -> None:
    cuda.set_device(multiprocessors=1)
    check("mma", Case(1, 24, (16, 16), K, (3, 3)), dtype)
    launch = cuda.last_launch()
    assert launch["threads"] == 2 * K
    assert launch["conflicts"] == 0


@pytest.mark.parametrize(
    ("K", "groups", "pixels", "columns"),
    [
        (96, 1, 132 * 128, 96),
        (128, 2, 132 * 128, 128),
        (384, 1, 132 * 128, 128),
        (192, 2, 132 * 128, 96),
        (192, 1, 132 * 128, 96),
        (64, 1, 132 * 128, 64),
        (160, 1, 132 * 128, 96),
        (130, 1, 132 * 128, 96),
        (1, 1, 132 * 128, 64),
        (192, 2, 128 * 13 * 13, 64),
        (128, 2, 33 * 128, 64),
        (128, 2, 33 * 128 + 1, 128),
        (96, 1, 2, 64),
    ],
)
def test_the_columns_of_a_tile(K: int, groups: int, pixels: int, columns: int, cuda) -> None:
    x = torch.zeros(1, 1, pixels, 8 * groups, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    cuda.set_recording(True)
    convolve("mma", x, torch.zeros(K * groups, 8, 1, 1, dtype=torch.bfloat16), None, (1, 1), (0, 0), groups, True)
    ((_, grid, block, shared, _),) = cuda.recorded()
    assert block == [2 * columns, 1, 1]
    assert grid == [-(-pixels // 128) * groups * -(-K // columns), 1, 1]
    assert shared == 4 * 64 * (128 + columns)


@every_kernel_and_dtype
@pytest.mark.parametrize("seed", range(40))
def test_any_convolution(kernel: str, dtype: torch.dtype, seed: int, cuda) -> None:
    torch.manual_seed(seed)
    cuda.set_order(seed % 4)
    cuda.set_device(multiprocessors=1 if seed % 2 else 132)
    check(kernel, drawn(seed, kernel), dtype)


# Box (n, h, w), rings (x, w) and whether w is resident, at batch 128 on 132 multiprocessors.
TILES = {
    "conv1": ((3, 3, 28), (3, 9), True),
    "conv2": ((1, 9, 27), (2, 12), False),
    "conv3": ((1, 13, 13), (2, 7), False),
    "conv4": ((1, 13, 13), (2, 7), False),
    "conv5": ((1, 13, 13), (2, 10), False),
}


@pytest.mark.parametrize("layer", TILES)
def test_the_tiles_of_wgmma(layer: str, cuda) -> None:
    case = replace(LAYERS[layer], batch=128)
    cuda.set_recording(True)
    convolve("wgmma", *case.inputs(torch.bfloat16), case.stride, case.padding, case.groups, True)
    ((_, _, _, _, arguments),) = cuda.recorded()
    maps = 2 * 128 * (1 if case.C % 64 == 0 else 2)
    n, h, w, *_, x_stages, w_stages, _, _, resident = struct.unpack_from("<14i?", arguments, maps)
    assert ((n, h, w), (x_stages, w_stages), resident) == TILES[layer]
