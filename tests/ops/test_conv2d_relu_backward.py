"""The gradients of conv2d_relu by the package's own kernels, emulated on the CPU, against float64."""

from __future__ import annotations

import copy
import random as randoms
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import Convolution
from platforms import BACKENDS, emulation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels import reference, unfuse, use_backend
from alexnet_kernels.nn import FusedSequential, fusion, runs
from alexnet_kernels.ops import conv2d_relu
from alexnet_kernels.ops.conv2d_relu import LIBRARY, MMA, OWN, WGMMA, conv2d_relu_by

module = sys.modules["alexnet_kernels.ops.conv2d_relu"]

pytestmark = [
    pytest.mark.skipif(
        emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
    ),
    pytest.mark.usefixtures("cuda"),
]

NAMES = {OWN: "own", MMA: "mma", WGMMA: "wgmma"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_kernel = pytest.mark.parametrize("kernel", [MMA, WGMMA], ids=NAMES.get)


@dataclass(frozen=True)
class Case(Convolution):
    def operands(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The output's gradient, the input and the weight."""
        x, w = self.input_and_weight(dtype)
        return self.tensor(*self.output_size, dtype=dtype), x, w

    @property
    def output_size(self) -> tuple[int, ...]:
        window = zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        return self.batch, self.groups * self.K, *((n + 2 * p - k) // s + 1 for n, k, s, p in window)

    @property
    def options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.groups


def operators() -> Any:
    return getattr(torch.ops, emulation.NAMESPACE)


def exact(case: Case, g: Tensor, x: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The gradients of input, weight and bias in float64, each with the sum of its terms' sizes."""

    def of(change: Any) -> tuple[Tensor, ...]:
        values = (change(t.double().contiguous()) for t in (g, x, w))
        rest = ([1, 1], False, [0, 0], case.groups, [True] * 3)
        return torch.ops.aten.convolution_backward(*values, [w.shape[0]], case.stride, case.padding, *rest)

    return list(zip(of(lambda t: t), of(torch.abs), strict=True))


def assert_rounded_once(found: Tensor, expected: Tensor, size: Tensor, what: str) -> None:
    """`size`: of the terms that were added in float32."""
    bound = torch.finfo(found.dtype).eps / 2 * 1.01 * expected.abs() + 2.0**-20 * size + 1e-7
    excess = ((found.double() - expected).abs() - bound).max().item()
    assert found.shape == expected.shape
    assert excess <= 0, f"{what}: beyond the bound by {excess}"


def check_weight(kernel: int, case: Case, dtype: torch.dtype) -> None:
    g, x, w = case.operands(dtype)
    dw, db = operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, kernel)
    assert (dw.dtype, db.dtype) == (dtype, dtype)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    _, weight, bias = exact(case, g, x, w)
    assert_rounded_once(dw, *weight, f"weight of {case}")
    assert_rounded_once(db, *bias, f"bias of {case}")


def check_input(kernel: int, case: Case, dtype: torch.dtype, masked: bool) -> None:
    g, x, w = case.operands(dtype)
    dx = operators().conv2d_relu_backward_input(g, None, x, w, *case.options, masked, kernel)
    assert dx.dtype == dtype
    assert dx.is_contiguous(memory_format=torch.channels_last)
    expected, size = exact(case, g, x, w)[0]
    assert_rounded_once(dx, torch.where(x.double() <= 0, 0, expected) if masked else expected, size, str(case))


# The convolutions of AlexNet, the first one after space_to_depth, and of torchvision's, on smaller images.
LAYERS = {
    "conv1": Case(1, 48, (13, 13), 96, (3, 3)),
    "conv2": Case(1, 48, (7, 7), 128, (5, 5), padding=(2, 2), groups=2),
    "conv3": Case(1, 256, (5, 5), 384, (3, 3), padding=(1, 1)),
    "conv4": Case(1, 192, (5, 5), 192, (3, 3), padding=(1, 1), groups=2),
    "conv5": Case(1, 192, (5, 5), 128, (3, 3), padding=(1, 1), groups=2),
    "torchvision 2": Case(1, 64, (7, 7), 192, (5, 5), padding=(2, 2)),
}


@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
def test_input_of_layers(kernel: int, layer: str, cuda) -> None:
    torch.manual_seed(len(layer))
    cuda.set_device(multiprocessors=1)  # large tiles
    check_input(kernel, LAYERS[layer], torch.bfloat16, layer != "conv3")


@every_kernel
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_of_layers(kernel: int, layer: str, cuda) -> None:
    torch.manual_seed(len(layer))
    cuda.set_device(multiprocessors=1)
    check_weight(kernel, LAYERS[layer], torch.bfloat16)
    if kernel == MMA:
        assert cuda.last_launch()["conflicts"] == 0


# Filters and terms that end within a tile, windows that leave the image, images that end within a chunk.
CASES = [
    Case(3, 16, (9, 8), 136, (3, 3), padding=(1, 1), groups=2),
    Case(3, 8, (9, 8), 72, (2, 3), stride=(1, 2)),
    Case(5, 5, (9, 8), 70, (3, 3), padding=(2, 0), groups=2),
    Case(2, 24, (11, 12), 104, (4, 5), stride=(3, 2), padding=(2, 3)),
    Case(40, 8, (3, 2), 8, (3, 2), padding=(1, 1)),
]


# Units, filters and channels that end within a tile, the last channels with fewer units than the first, boxes that
# leave the image and the batch, several units of a warp in one row of taps and across rows.
WGMMA_CASES = [
    Case(3, 16, (9, 8), 136, (3, 3), padding=(1, 1), groups=2),
    Case(2, 72, (6, 20), 24, (2, 3), padding=(1, 2)),
    Case(1, 8, (4, 300), 8, (1, 3), padding=(0, 2)),
    Case(1, 24, (17, 19), 104, (4, 5), padding=(2, 3), groups=3),
    Case(40, 8, (3, 2), 8, (3, 2), padding=(1, 1)),
    Case(2, 80, (5, 4), 200, (1, 1)),
]


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize("case", WGMMA_CASES, ids=lambda case: f"{case.C}x{case.K}")
def test_weight_by_wgmma(case: Case, multiprocessors: int, dtype: torch.dtype, cuda) -> None:
    torch.manual_seed(2)
    cuda.set_device(multiprocessors=multiprocessors)
    cuda.set_order(multiprocessors % 3)
    check_weight(WGMMA, case, dtype)


@pytest.mark.parametrize(("size", "d"), [((57, 7), 2), ((7, 57), 3)], ids=["rows", "columns"])
def test_what_is_outside_of_the_image_does_not_count(size: tuple[int, int], d: int, cuda) -> None:
    """Boxes that 55 is no multiple of: their pixels beyond have pixels of x, which only the last tap may see."""
    case = Case(1, 8, size, 8, (3, 3))
    g, x, w = case.operands(torch.bfloat16)
    x.select(d, -1).fill_(torch.nan)
    for kernel in (MMA, WGMMA):
        dw, db = operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, kernel)
        assert dw.select(d, 2).isnan().all()
        assert dw.narrow(d, 0, 2).isfinite().all()
        assert db.isfinite().all()


def test_warps_without_a_unit_stay_in_shared_memory(cuda) -> None:
    """One unit of four, in boxes of long rows."""
    torch.manual_seed(0)
    cuda.set_device(multiprocessors=1)
    check_weight(WGMMA, Case(12, 8, (1, 254), 8, (1, 1)), torch.bfloat16)


@every_kernel
def test_what_is_beyond_a_box_does_not_count(kernel: int, cuda) -> None:
    """25 pixels fill up 32 terms with zeros, not with infinity times zero."""
    torch.manual_seed(0)
    case = Case(1, 8, (5, 5), 8, (1, 1))
    g, x, w = case.operands(torch.bfloat16)
    x[..., 0, 0] = torch.inf
    dw, db = operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, kernel)
    assert dw.isinf().all()
    assert db.isfinite().all()


@every_dtype
@pytest.mark.parametrize("multiprocessors", [1, 40])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.C}x{case.K}")
def test_weight(case: Case, multiprocessors: int, dtype: torch.dtype, cuda) -> None:
    torch.manual_seed(1)
    cuda.set_device(multiprocessors=multiprocessors)  # one split, or several
    check_weight(MMA, case, dtype)


def drawn(seed: int, unit_stride: bool) -> Case:
    draw = randoms.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    window, padding = pair(1, 5), pair(0, 3)
    if unit_stride:
        padding = min(padding[0], window[0] - 1), min(padding[1], window[1] - 1)
    size = tuple(max(draw.randint(2, 12), k - 2 * p) for k, p in zip(window, padding, strict=True))
    vectors = draw.random() < 0.6
    return Case(
        batch=draw.randint(1, 6),
        C=8 * draw.randint(1, 6) if vectors else draw.randint(2, 30),
        size=(size[0], size[1]),
        K=8 * draw.randint(1, 20) if vectors else draw.randint(1, 100),
        kernel=window,
        stride=(1, 1) if unit_stride else pair(1, 4),
        padding=padding,
        groups=draw.choice([1, 1, 2, 3]),
        skipped=draw.choice([0, 0, 0, 1]),
    )


@every_dtype
@pytest.mark.parametrize("seed", range(12))
def test_any_convolution(seed: int, dtype: torch.dtype, cuda) -> None:
    torch.manual_seed(seed)
    cuda.set_order(seed % 4)
    cuda.set_device(multiprocessors=1 if seed % 2 else 132)
    check_weight(MMA, drawn(seed, unit_stride=False), dtype)
    check_weight(OWN, drawn(200 + seed, unit_stride=True), dtype)
    check_input(OWN, drawn(100 + seed, unit_stride=True), dtype, masked=seed % 3 > 0)


def test_input_in_tf32() -> None:
    torch.manual_seed(0)
    case = Case(2, 12, (6, 5), 20, (3, 3), padding=(1, 1), groups=2)
    g, x, w = case.operands(torch.float32)
    expected, size = exact(case, g, x, w)[0]
    dx = operators().conv2d_relu_backward_input(g, None, x, w, *case.options, True, MMA)
    assert ((dx - torch.where(x <= 0, 0, expected)).abs() <= 2**-10 * size).all()


@every_kernel
def test_the_order_of_threads_changes_no_bit(kernel: int, cuda) -> None:
    torch.manual_seed(1)
    case = Case(2, 48, (7, 9), 136, (3, 3), padding=(1, 1), groups=2)
    g, x, w = case.operands(torch.bfloat16)

    def gradients() -> list[Tensor]:
        results = [operators().conv2d_relu_backward_input(g, None, x, w, *case.options, True, kernel)]
        results += operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, kernel)
        return results

    expected = gradients()
    for order in range(1, 4):
        cuda.set_order(order)
        assert all(map(torch.equal, gradients(), expected)), order


@every_kernel
@pytest.mark.parametrize("C", [8, 12])
def test_the_mask_is_zero_whatever_the_gradient(kernel: int, C: int) -> None:
    if kernel == WGMMA and C % 8:
        pytest.skip("it takes multiples of 8")
    case = Case(1, C, (4, 5), 8, (3, 3), padding=(1, 1))
    g, x, w = case.operands(torch.bfloat16)
    g.fill_(torch.nan)
    x[0, 3, 2] = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])
    dx = operators().conv2d_relu_backward_input(g, None, x, w, *case.options, True, kernel)
    assert torch.equal(dx.isnan(), ~(x <= 0))
    assert (dx[x <= 0] == 0).all()


@pytest.mark.parametrize("algorithm", [LIBRARY, OWN, MMA])
def test_the_mask_of_the_output(algorithm: int) -> None:
    torch.manual_seed(2)
    case = Case(2, 8, (6, 5), 16, (3, 3), padding=(1, 1), groups=2)
    g, x, w = case.operands(torch.bfloat16)
    output = F.conv2d(x, w, None, *case.options[:2], 1, case.groups).relu()
    masked = torch.where(output > 0, g, 0)
    rest = x, w, *case.options
    for operator, options in (("input", (False,)), ("weight", ())):
        call = getattr(operators(), f"conv2d_relu_backward_{operator}")
        found, expected = call(g, output, *rest, *options, algorithm), call(masked, None, *rest, *options, algorithm)
        assert all(map(torch.equal, found, expected))


# Filters of a tile and splits of the pixels, at batch 128 on 132 multiprocessors.
DIVISIONS = {
    "conv1": (Case(128, 48, (57, 57), 96, (3, 3)), 96, 66),
    "conv2": (Case(128, 48, (27, 27), 128, (5, 5), padding=(2, 2), groups=2), 128, 13),
    "conv3": (Case(128, 256, (13, 13), 384, (3, 3), padding=(1, 1)), 128, 9),
    "conv4": (Case(128, 192, (13, 13), 192, (3, 3), padding=(1, 1), groups=2), 96, 9),
    "conv5": (Case(128, 192, (13, 13), 128, (3, 3), padding=(1, 1), groups=2), 128, 9),
}


@pytest.mark.parametrize("layer", DIVISIONS)
def test_the_division_of_the_weight_s_gradient(layer: str, cuda) -> None:
    case, filters, splits = DIVISIONS[layer]
    x = torch.empty(case.batch, *case.size, case.groups * case.C, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    n, k, *size = case.output_size
    g = torch.empty(n, *size, k, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    w = torch.empty(k, *case.kernel, case.C, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    cuda.set_recording(True)
    operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, MMA)
    (_, grid, block, shared, _), *sums = cuda.recorded()
    terms = -(-case.C * case.kernel[0] * case.kernel[1] // 128)
    assert len(sums) == 2
    assert block == [2 * filters, 1, 1]
    assert grid == [splits * terms * case.groups * -(-case.K // filters), 1, 1]
    assert shared == 4 * 64 * (128 + filters)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 1)}, "stride 1"),
        ({"padding": (3, 0)}, "the padding covers a whole kernel"),
    ],
)
def test_inputs_that_the_library_takes(change: dict[str, Any], reason: str) -> None:
    torch.manual_seed(3)
    case = Case(**{**vars(Case(2, 8, (6, 7), 8, (3, 3))), **change})
    g, x, w = case.operands(torch.bfloat16)
    call = operators().conv2d_relu_backward_input
    assert torch.equal(*(call(g, None, x, w, *case.options, True, algorithm) for algorithm in (LIBRARY, OWN)))
    for algorithm, name in ((MMA, "mma.sync"), (WGMMA, "wgmma")):
        with pytest.raises(RuntimeError, match=f"the {name} kernel does not take .* input: .*{reason}"):
            call(g, None, x, w, *case.options, True, algorithm)


@pytest.mark.parametrize(
    ("batch", "dtype", "memory_format", "reason"),
    [
        (2, torch.float32, torch.channels_last, "it takes bfloat16 and float16"),
        (2, torch.bfloat16, torch.contiguous_format, "the input is not in channels_last"),
        (0, torch.bfloat16, torch.channels_last, "the input is not in channels_last|a tensor is empty"),
    ],
    ids=["fp32", "NCHW", "empty"],
)
def test_weights_that_the_library_takes(batch: int, dtype: torch.dtype, memory_format: Any, reason: str) -> None:
    torch.manual_seed(3)
    case = Case(batch, 8, (6, 7), 8, (3, 3))
    g, x, w = (t.contiguous(memory_format=memory_format) for t in case.operands(dtype))
    call = operators().conv2d_relu_backward_weight
    for found, expected in zip(*(call(g, None, x, w, *case.options, a) for a in (LIBRARY, OWN)), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match=f"the mma.sync kernel does not take .* weight: ({reason})"):
        call(g, None, x, w, *case.options, MMA)


def test_other_devices(cuda) -> None:
    case = Case(1, 8, (4, 5), 8, (3, 3))
    g, x, w = case.operands(torch.bfloat16)
    for capability, algorithm, reason in ((80, WGMMA, "capability 9.0, not 8.0"), (75, MMA, "below 8.0")):
        cuda.set_device(capability=capability)
        with pytest.raises(RuntimeError, match=reason):
            operators().conv2d_relu_backward_input(g, None, x, w, *case.options, False, algorithm)
        with pytest.raises(RuntimeError, match=reason):
            operators().conv2d_relu_backward_weight(g, None, x, w, *case.options, algorithm)


def test_weights_of_any_strides() -> None:
    torch.manual_seed(4)
    case = Case(1, 8, (5, 6), 8, (3, 2), padding=(1, 0), groups=2)
    g, x, w = case.operands(torch.bfloat16)
    call = operators().conv2d_relu_backward_input
    expected = call(g, None, x, w, *case.options, False, MMA)
    wide = torch.zeros(16, 16, 3, 4, dtype=torch.bfloat16)
    wide[:, ::2, :, 1:3] = w
    for same in (w.contiguous(), wide[:, ::2, :, 1:3]):
        assert torch.equal(call(g, None, x, same, *case.options, False, MMA), expected)
        dw, _ = operators().conv2d_relu_backward_weight(g, None, x, same, *case.options, MMA)
        assert dw.is_contiguous()


class Recorder(TorchDispatchMode):
    """The operators of convolution and ReLU that are called."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if "conv" in name or "relu" in name or "threshold" in name:
            self.names.append(name)
        return func(*args, **kwargs or {})


def gradients(call: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[list[Tensor], list[str]]:
    """The gradients of a call's result, and the operators that its backward calls."""
    out = call()
    with Recorder() as recorder:
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return list(found), recorder.names


INPUT, WEIGHT, MASK = "conv2d_relu_backward_input", "conv2d_relu_backward_weight", "relu_dropout_backward"


class TestAutograd:
    """Which operators backward calls, on backend "cuda"."""

    @pytest.fixture(autouse=True)
    def emulated(self) -> Iterator[None]:
        with emulation.emulated(), use_backend("cuda"):
            yield

    def leaves(self, wanted: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        case = Case(2, 8, (6, 5), 16, (3, 3), padding=(1, 1), groups=2)
        _, x, w = case.operands(dtype)
        values = {"input": x, "weight": w, "bias": torch.randn(32).to(dtype)}
        return {name: value.requires_grad_(name in wanted) for name, value in values.items()}

    @pytest.mark.parametrize(
        ("wanted", "called"),
        [
            ("input weight bias", [MASK, INPUT, WEIGHT]),
            ("weight bias", [MASK, WEIGHT]),
            ("weight", [MASK, WEIGHT]),
            ("input", [MASK, INPUT]),
            ("input bias", [MASK, INPUT, "convolution_backward"]),
        ],
    )
    def test_only_what_is_asked_for(self, wanted: str, called: list[str]) -> None:
        values = self.leaves(wanted)
        asked = [values[name] for name in wanted.split()]
        found, names = gradients(lambda: conv2d_relu(**values, padding=1, groups=2), asked)
        assert names == called
        exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
        out = reference.conv2d_relu(**exact, padding=1, groups=2)
        expected = torch.autograd.grad(out, [exact[name] for name in wanted.split()], torch.ones_like(out))
        for actual, right in zip(found, expected, strict=True):
            assert (actual.double() - right).abs().max() <= 0.03 * right.abs().max()

    def test_a_direction_by_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = self.leaves("input weight bias")
        asked = list(values.values())
        for by_input, by_weight, called in (
            (LIBRARY, LIBRARY, ["convolution_backward"]),
            (MMA, LIBRARY, [INPUT, "convolution_backward"]),
            (LIBRARY, MMA, [WEIGHT, "convolution_backward"]),
        ):
            numbers = by_input, by_weight
            monkeypatch.setattr(module, "_gradients", lambda *_, numbers=numbers: numbers)
            _, names = gradients(lambda: conv2d_relu(**values, padding=1, groups=2), asked)
            assert names == [MASK, *called]

    @pytest.mark.parametrize("mask_input", [False, True])
    def test_double_backward(self, mask_input: bool) -> None:
        values = self.leaves("input weight", torch.float32)
        wide = {name: value.detach().double().requires_grad_() for name, value in values.items()}

        def penalty(x: dict[str, Tensor], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            out = function(**x, padding=1, groups=2)
            first = torch.autograd.grad(out.square().sum(), [x["input"], x["weight"]], create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), [x["input"], x["weight"]])

        def masked(input: Tensor, **x: Any) -> Tensor:
            return reference.conv2d_relu(input.relu() if mask_input else input, **x)

        values["input"].data.relu_()
        wide["input"].data.relu_()
        found = penalty(values, lambda **x: conv2d_relu_by(LIBRARY, **x, backend="cuda", mask_input=mask_input))
        for actual, expected in zip(found, penalty(wide, masked), strict=True):
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def conv(channels: int, filters: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, padding=1, **options)


class TestChains:
    """FusedSequential: a convolution's backward applies the mask of the ReLU before it."""

    @pytest.fixture(autouse=True, params=["cuda", "triton"])
    def emulated(self, request: pytest.FixtureRequest) -> Iterator[None]:
        if request.param == "triton" and "triton" not in BACKENDS["cpu"]:
            pytest.skip("needs Triton's interpreter")
        with emulation.emulated(), use_backend(request.param):
            self.masks = [] if request.param == "triton" else [MASK]  # of a ReLU that no convolution masks
            yield

    def module(self, *more: nn.Module) -> FusedSequential:
        torch.manual_seed(0)
        layers = [conv(8, 16), nn.ReLU(), conv(16, 8, groups=2), nn.ReLU(), conv(8, 8, bias=False), *more]
        return FusedSequential(*layers).bfloat16()

    def images(self) -> Tensor:
        return torch.randn(2, 8, 5, 6).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()

    def unchained(self, patch: pytest.MonkeyPatch, fused: FusedSequential, x: Tensor) -> list[Tensor]:
        with patch.context() as inner:
            inner.setattr(fusion, "_masks_input", lambda *_: False)
            return gradients(lambda: fused(x), [x, *fused.parameters()])[0]

    @pytest.mark.parametrize("more", ["", "R", "RP", "P"])
    def test_equals_the_unchained(self, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, x = self.module(*({"R": nn.ReLU(), "P": nn.MaxPool2d(3, 2)}[kind] for kind in more)), self.images()
        found, names = gradients(lambda: fused(x), [x, *fused.parameters()])
        last = self.masks if more == "R" else []
        assert [name for name in names if name in (INPUT, MASK)] == [*last, INPUT, INPUT, INPUT]
        assert all(map(torch.equal, found, self.unchained(monkeypatch, fused, x)))

    @pytest.mark.parametrize("hook", ["forward", "backward"])
    @pytest.mark.parametrize("child", [1, 2])
    def test_hooks_see_torch_s_gradients(self, child: int, hook: str) -> None:
        """Those of a child in the chain: it is called by itself."""
        fused, x = self.module(), self.images()
        plain = unfuse(copy.deepcopy(fused))
        seen: dict[Any, Tensor] = {}

        def gradient(module: nn.Module, given: Any, found: Any) -> None:
            seen[module] = found[0].detach()

        def tensor(module: nn.Module, given: Any, found: Tensor) -> None:
            found.register_hook(lambda grad: seen.setdefault(module, grad))

        for model in (fused, plain):
            register = model[child].register_full_backward_hook if hook == "backward" else None
            (register or model[child].register_forward_hook)(gradient if register else tensor)
            model(x).sum().backward()
        ours, theirs = seen[fused[child]], seen[plain[child]]
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()
        # Torch's ReLU hands on what it gets from the convolution behind it.
        assert (theirs != 0).float().mean() > (0.9 if child == 1 else 0.2)

    def test_the_output_of_the_whole_is_the_user_s(self) -> None:
        """Its gradient is not masked before ReLU's backward."""
        fused, x = self.module(nn.ReLU()), self.images()
        out = fused(x)
        out.retain_grad()
        (2 * out).sum().backward()
        assert (out.grad == 2).all()

    def test_no_masks_without_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "conv2d_relu_by", None)
        fused = self.module()
        with torch.no_grad():
            fused(self.images())

    def test_compiles(self, fresh_dynamo: None) -> None:
        fused, x = self.module(nn.ReLU()), self.images()
        expected, _ = gradients(lambda: fused(x), [x, *fused.parameters()])
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        found, _ = gradients(lambda: compiled(x), [x, *fused.parameters()])
        assert all(map(torch.equal, found, expected))

    def test_double_backward(self) -> None:
        fused, x = self.module().float(), self.images().detach().float().requires_grad_()
        plain = unfuse(copy.deepcopy(fused))
        found = []
        for model in (fused, plain):
            leaves = [x, *model.parameters()]
            first = torch.autograd.grad(model(x).square().sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for actual, expected in zip(*found, strict=True):
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("choice", ["cpu", "native"])
def test_masks_on_the_cpu(choice: str) -> None:
    """torch's own gradients, whatever the masks."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 8, 5, 6).relu().requires_grad_(), torch.randn(4, 8, 3, 3, requires_grad=True)

    def found(**masks: bool) -> list[Tensor]:
        return gradients(lambda: conv2d_relu_by(None, x, w, backend=choice, **masks), [x, w])[0]

    plain, masked = found(), found(masked_grad=True, mask_input=True)
    assert torch.equal(masked[0], torch.where(x > 0, plain[0], 0))
    assert torch.equal(masked[1], plain[1])
    operator = torch.ops.alexnet_kernels.conv2d_relu.default
    torch.library.opcheck(operator, (x, w, None, [1, 1], [0, 0], 1, True, 0, 0, 0, False, True))
