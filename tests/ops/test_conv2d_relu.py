from __future__ import annotations

import random as randoms
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import contract
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPE_IDS,
    assert_close,
    assert_same,
    check_compiled,
    every_format,
    raises,
    random,
)
from platforms import BACKENDS, emulation
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels import _library, backends, reference, use_backend
from alexnet_kernels._dispatch import choices
from alexnet_kernels._dispatch.kinds import Row
from alexnet_kernels._dispatch.layout import memory_format_of
from alexnet_kernels.backends import kernels_of
from alexnet_kernels.models import PRESETS, AlexNet
from alexnet_kernels.op_info import OP_INFOS
from alexnet_kernels.ops import conv2d_relu
from alexnet_kernels.ops.conv2d_relu import LIBRARY, MMA, OWN, WGMMA, conv2d_relu_by
from alexnet_kernels.ops.conv2d_relu import _is_wrong_in_torch as is_wrong_in_torch


def tensors(shape, weight_shape, dtype, memory_format, device, bias=True):
    fan_in = weight_shape[1:].numel() if isinstance(weight_shape, torch.Size) else 1
    for extent in weight_shape[1:]:
        fan_in *= extent
    return {
        "input": random(shape, dtype, memory_format, device),
        "weight": random(weight_shape, dtype, memory_format, device, scale=fan_in**-0.5),
        "bias": random(weight_shape[:1], dtype, device=device, scale=0.5) if bias else None,
    }


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_gradients_only_where_wanted(frozen, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, torch.contiguous_format, device)
    leaves = {k: v.clone().requires_grad_(k != frozen) for k, v in values.items()}
    full = {k: v.clone().requires_grad_() for k, v in values.items()}
    conv2d_relu(**leaves, backend=backend).square().sum().backward()
    conv2d_relu(**full, backend=backend).square().sum().backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, full[name].grad.double(), what=name)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nan_and_infinity(value, dtype, memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), dtype, memory_format, device)
    values["input"][1, 3, 2, 2] = value
    out = conv2d_relu(**values, backend=backend)
    expected = reference.conv2d_relu(**{k: v.double() for k, v in values.items()})
    assert_same(out.isnan(), expected.isnan())
    assert_same(out.isinf(), expected.isinf())
    assert not out.isfinite().all()


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    x, w, b = torch.zeros(2, 8, 7, 7), torch.zeros(16, 4, 3, 3), torch.zeros(16)

    def call(x=x, w=w, b=b, stride=1, padding=0, groups=2):
        return lambda: conv2d_relu(x, w, b, stride, padding, groups, backend=choice)

    raises(TypeError, r"input must be a Tensor, not list", call(x=[1.0]))
    raises(TypeError, r"input must be float32.* not torch.int64", call(x=x.long()))
    raises(ValueError, r"input must be \[N, C, H, W\], not of shape \[8, 7\]", call(x=x[0, :, :, 0]))
    raises(ValueError, r"weight must be .* not of shape \[16, 4\]", call(w=w[:, :, 0, 0]))
    raises(ValueError, r"bias must be \[16\], not of shape \[15\]", call(b=b[1:]))
    raises(TypeError, r"weight is torch.float64, but the input is torch.float32", call(w=w.double()))
    raises(TypeError, r"bias is torch.bfloat16, but the input is torch.float32", call(b=b.bfloat16()))
    raises(ValueError, r"groups=3 does not divide the 16 output channels", call(groups=3))
    raises(ValueError, r"groups must be a positive int, not 0", call(groups=0))
    raises(ValueError, r"input has 8 channels, but weight \[16, 4, 3, 3\] with groups=1", call(groups=1))
    raises(ValueError, r"stride must be at least 1, not 0", call(stride=0))
    raises(ValueError, r"padding must be at least 0, not -1", call(padding=-1))
    raises(TypeError, r"stride must be an int or two ints, not 1.5", call(stride=1.5))
    raises(ValueError, r"padding must be integers, 'valid' or 'same', not 'full'", call(padding="full"))
    raises(ValueError, r"padding 'same' needs stride 1, not \[2, 2\]", call(padding="same", stride=2))
    raises(ValueError, r"an image of 2 x 7 .* is smaller than the kernel 3 x 3", call(x=x[:, :, :2]))
    raises(RuntimeError, r"weight is on meta, but the input is on cpu", call(w=w.to("meta")))


class TestSpaceToDepth:
    """The bfloat16, channels_last path of strided convolutions of six images or more with few channels."""

    def test_fewer_images_go_the_plain_way(self):
        image = torch.randn(5, 3, 39, 39).bfloat16().contiguous(memory_format=torch.channels_last)
        with torch.profiler.profile() as profile:
            conv2d_relu(image, torch.randn(16, 3, 11, 11).bfloat16(), None, 4, 2)
        assert "alexnet_kernels::space_to_depth" not in {event.key for event in profile.key_averages()}

    @pytest.mark.parametrize(
        ("size", "kernel", "stride", "padding"),
        [((39, 39), 11, 4, 2), ((37, 29), 7, 3, 0), ((20, 20), 5, 2, 1), ((23, 31), 4, 3, 1), ((11, 11), 11, 4, 0)],
    )
    def test_equals_the_plain_convolution(self, size, kernel, stride, padding):
        image = torch.randn(6, 3, *size).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = torch.randn(16, 3, kernel, kernel).bfloat16()
        ours = [image.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()]
        exact = [image.double().requires_grad_(), weight.double().requires_grad_()]
        with torch.profiler.profile() as profile:
            out = conv2d_relu(*ours, None, stride, padding, relu=False, backend="cpu")
        assert "alexnet_kernels::space_to_depth" in {event.key for event in profile.key_averages()}
        expected = torch.nn.functional.conv2d(*exact, None, stride, padding)
        assert out.shape == expected.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item())
        grad = torch.randint(-4, 5, out.shape).bfloat16()
        for actual, wanted in zip(
            torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
        ):
            atol = 2**-7 * wanted.abs().max().item()
            torch.testing.assert_close(actual.double(), wanted, rtol=2**-7, atol=atol)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_there_and_back(self, memory_format):
        image = torch.randn(2, 3, 8, 12).contiguous(memory_format=memory_format)
        args = (4, [0, 0], [2, 3], torch.float32)
        blocks = torch.ops.alexnet_kernels.space_to_depth(image, *args)
        assert torch.equal(blocks[:, (1 * 4 + 2) * 3 + 1], image[:, 1, 1::4, 2::4])
        assert torch.equal(torch.ops.alexnet_kernels.depth_to_space(blocks, 4, [0, 0], [8, 12], torch.float32), image)

    @every_format
    @pytest.mark.parametrize(
        ("channels", "size", "block", "padding", "blocks"),
        [
            (3, (21, 24), 4, (2, 2), (6, 7)),
            (3, (16, 16), 4, (0, 0), (4, 4)),
            (3, (21, 19), 4, (1, 3), (6, 6)),
            (3, (5, 9), 4, (9, 13), (7, 8)),
            (4, (9, 10), 2, (1, 1), (6, 6)),
            (1, (12, 20), 4, (0, 4), (3, 7)),
            (2, (7, 9), 3, (1, 2), (4, 5)),
            (6, (8, 8), 2, (2, 1), (5, 5)),
            (16, (3, 2), 1, (0, 1), (3, 5)),
        ],
        ids=str,
    )
    def test_every_layout(self, channels, size, block, padding, blocks, memory_format, device, backend):
        if backend == "native":
            pytest.skip("it has no such operators")
        kernels = kernels_of(backend)
        (height, width), (rows, columns) = size, blocks
        image = torch.randn(5, channels, *size)
        image[0, 0, 0, 0], image[1, -1, -1, -1] = torch.nan, torch.inf
        padded = F.pad(image, (padding[1], block * columns, padding[0], block * rows))
        parts = padded[:, :, : rows * block, : columns * block].unflatten(3, (-1, block)).unflatten(2, (-1, block))
        depth = parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        values = torch.randn(depth.shape)
        parts = values.unflatten(1, (block, block, channels)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
        padded = F.pad(parts, (0, width + padding[1], 0, height + padding[0]))
        space = padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]

        def placed(tensor, memory_format):
            """In memory that begins `offset` elements after an aligned address."""
            tensor = tensor.to(device, given)
            strides = tensor.contiguous(memory_format=memory_format).stride()
            return tensor.new_empty(tensor.numel() + offset).as_strided(tensor.shape, strides, offset).copy_(tensor)

        f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
        dtypes = ((f32, f32), (bf16, bf16), (f32, bf16), (f16, f32), (bf16, f16))
        for (given, wanted), offset in product(dtypes, (0, 1, 2)):
            what = f"{given} to {wanted}, offset {offset}"
            result = kernels.space_to_depth(placed(image, memory_format), block, padding, blocks, wanted)
            assert_same(result.cpu(), depth.to(given).to(wanted), what)
            assert result.is_contiguous(memory_format=torch.channels_last)
            result = kernels.depth_to_space(placed(values, torch.channels_last), block, padding, size, wanted)
            assert_same(result.cpu(), space.to(given).to(wanted), what)
            assert result.is_contiguous(memory_format=torch.channels_last)

    def test_opcheck_and_gradients(self):
        image = torch.randn(1, 3, 9, 7, dtype=torch.float64, requires_grad=True)
        args = (4, [2, 2], [3, 2], torch.float64)
        torch.library.opcheck(torch.ops.alexnet_kernels.space_to_depth.default, (image, *args))
        assert torch.autograd.gradcheck(lambda x: torch.ops.alexnet_kernels.space_to_depth(x, *args), image)
        assert torch.autograd.gradgradcheck(lambda x: torch.ops.alexnet_kernels.space_to_depth(x, *args), image)


SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FORMATS = (torch.channels_last, torch.contiguous_format)


def wrong(input, weight, bias, stride, padding, groups, backend=None) -> dict[str, float]:
    """The results of a convolution, output and gradients, that differ from float64's by more than rounding."""
    leaves = {"input": input, "weight": weight, "bias": bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    output = conv2d_relu(*leaves.values(), stride, padding, groups, relu=False, backend=backend)
    grad = torch.randn_like(output)
    found = {"output": output, **dict(zip(leaves, torch.autograd.grad(output, leaves.values(), grad), strict=True))}

    def exact(change) -> list:
        dense = (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in (*leaves.values(), grad))
        x, w, b, g = (change(tensor.double()) for tensor in dense)
        rest = ([1, 1], False, [0, 0], groups, [True] * 3)
        backward = torch.ops.aten.convolution_backward(g, x, w, list(b.shape), stride, padding, *rest)
        return [F.conv2d(x, w, b, stride, padding, 1, groups), *backward]

    unit = torch.finfo(input.dtype).eps
    errors = {}
    for (name, value), right, size in zip(found.items(), exact(lambda t: t), exact(torch.abs), strict=True):
        error = ((value.double() - right).abs() - 2 * unit * size).max().item()
        if not error <= 1e-6:
            errors[name] = error
    return errors


class TestAgainstFloat64:
    """oneDNN computes some convolutions of 16-bit elements wrong on the CPU."""

    @staticmethod
    def small_geometries(seed: int) -> Iterator[tuple]:
        """Small images, large windows, strides and paddings; half of them with strides above the width."""
        draw = randoms.Random(seed)
        while True:
            groups, channels, filters = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 16]), draw.choice([1, 2, 16])
            size = [draw.randint(1, 3), draw.randint(1, 6)]
            kernel = [draw.randint(1, 3), draw.randint(1, 9)]
            stride = [draw.randint(1, 3), draw.randint(1, 6)]
            padding = [draw.randint(0, 3), draw.randint(0, 6)]
            if all(s + 2 * p >= k for s, p, k in zip(size, padding, kernel, strict=True)):
                shape = (draw.randint(1, 3), groups * channels, *size)
                yield shape, (groups * filters, channels, *kernel), stride, padding, groups

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
    @pytest.mark.parametrize("choice", ["cpu", "native"])
    def test_small_geometries(self, choice, dtype):
        formats = list(product(FORMATS, repeat=2))
        for number, (shape, kernel, *rest) in zip(range(400), self.small_geometries(1), strict=False):
            of_input, of_weight = formats[number % 4]
            x, w = random(shape, dtype, of_input), random(kernel, dtype, of_weight)
            failed = wrong(x, w, random(kernel[:1], dtype), *rest, backend=choice)
            assert failed == {}, (shape, kernel, *rest, of_input, of_weight)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("order", [(2, 0, 3, 1), (3, 0, 2, 1), (2, 3, 0, 1)])
    def test_unusual_strides_of_dimensions_of_one_element(self, order, dtype):
        """torch's gradient of grouped weights in channels_last is wrong for them in float64 and float16."""
        shapes = (1, 4, 2, 1), (2, 4, 1, 2), (1, 4, 1, 1), (1, 4, 3, 3)
        for shape, window in product(shapes, ((1, 1), (2, 1), (1, 2))):
            if shape[2] < window[0] or shape[3] < window[1]:
                continue
            x = random(shape, dtype).permute(order).contiguous().permute([order.index(d) for d in range(4)])
            w = random((2, 2, *window), dtype, torch.channels_last)
            assert wrong(x, w, random((2,), dtype), [1, 1], [0, 0], 2) == {}, (x.shape, x.stride(), window)

    def test_every_convolution_of_the_presets(self):
        convolutions = convolutions_of_presets()
        assert len(convolutions) > 100
        assert any(kernel[1:] == (48, 3, 3) for _, kernel, *_ in convolutions)  # space_to_depth's
        failed = {}
        for shape, kernel, stride, padding, groups in convolutions:
            for dtype, memory_format in product(SIXTEEN_BITS, FORMATS):
                values = tensors(shape, kernel, dtype, memory_format, "cpu")
                assert not is_wrong_in_torch(values["input"], values["weight"], dtype, stride, padding)
                if errors := wrong(*values.values(), stride, padding, groups):
                    failed[shape, kernel, dtype, memory_format] = errors
        assert failed == {}


def convolutions_of_presets() -> list[tuple]:
    """(input shape, weight shape, stride, padding, groups) of every call of conv2d by a preset's AlexNet.

    Images of the smallest size, of some above it and of the preset's; filters of the smallest count and all.
    """
    found, conv2d = {}, torch.conv2d

    def record(input, weight, bias, stride, padding, dilation, groups):
        call = (tuple(input.shape), tuple(weight.shape), list(stride), list(padding), groups)
        found[str(call)] = call
        return conv2d(input, weight, bias, stride, padding, dilation, groups)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(sys.modules["alexnet_kernels.ops.conv2d_relu"], "_conv2d", record)
        for preset in PRESETS.values():
            for width in (0.001, 1.0):
                model = AlexNet(2, replace(preset, neurons=8), width=width).bfloat16().eval()
                least = max(model.min_size)
                sizes = [*range(least, least + 9, 2), preset.input_size] if width < 1 else [least]
                for size, batch in product(sizes, (1, 2, 6)):
                    x = torch.zeros(batch, 3, size, size, dtype=torch.bfloat16)
                    # From 6 images on, conv1 is computed by space_to_depth.
                    part = model if batch < 6 else model.features[:1]
                    if size < 200 or batch == 1:
                        part(x.contiguous(memory_format=torch.channels_last))
    return list(found.values())


INFO = OP_INFOS["conv2d_relu"]
LAST = torch.channels_last
FAST = {"shape": (2, 16, 6, 5), "weight_shape": (16, 8, 3, 3), "padding": 1, "groups": 2}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class Asked(TorchDispatchMode):
    """The algorithms that the operator was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.endswith("::conv2d_relu"):
            self.found.append(args[7] if len(args) > 7 else LIBRARY)  # the dispatcher drops defaults
        return func(*args, **kwargs or {})


def asked_by(call: Any) -> list[int]:
    with Asked() as asked:
        call()
    return asked.found


def given(shape, weight_shape, dtype=torch.bfloat16, memory_format=LAST, bias=True, **options) -> dict[str, Any]:
    return {**tensors(shape, weight_shape, dtype, memory_format, "cpu", bias), **options}


def excess(out: torch.Tensor, inputs: dict[str, Any], unit: float | None = None) -> float:
    """By how much an output is further from float64's than one rounding and sums in float32 put it.

    unit: relative error of each product, 0 without it.
    """
    exact, size = (
        F.conv2d(
            *(f(inputs[name].double()) for name in ("input", "weight")),
            None if inputs["bias"] is None else f(inputs["bias"].double()),
            *(inputs.get(name, default) for name, default in (("stride", 1), ("padding", 0))),
            groups=inputs.get("groups", 1),
        )
        for f in (lambda t: t, torch.abs)
    )
    exact = exact.relu() if inputs.get("relu", True) else exact
    rounding = torch.finfo(out.dtype).eps / 2
    error = (out.double() - exact).abs() - rounding * exact.abs() - ((unit or 0) + 1e-6) * size
    assert out.shape == exact.shape
    return error.max().item() if out.numel() else 0.0


@pytest.mark.skipif(
    emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
)
class TestAlgorithms:
    """The algorithms of the CUDA operator: which one runs, that each is right, and what is refused."""

    @pytest.fixture(autouse=True)
    def module(self) -> Iterator[Any]:
        with emulation.emulated() as module:
            yield module
            module.set_device()

    @pytest.fixture
    def automatic(self) -> Iterator[None]:
        """Backend "auto" takes the emulation."""
        cuda, cpu = backends.registered("cuda"), backends.registered("cpu")
        with (
            backends.substituted(replace(cpu, devices=())),
            backends.substituted(replace(cuda, automatic=None)),
        ):
            yield

    @pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=DTYPE_IDS.get)
    def test_by_name_the_packages_kernels_run(self, dtype) -> None:
        inputs = given(**FAST, dtype=dtype)
        for allowed in (False, True):
            wanted = [LIBRARY if dtype == torch.float32 and not allowed else OWN]
            with tf32(allowed):
                assert asked_by(lambda: conv2d_relu(**inputs, backend="cuda")) == wanted
                with use_backend("cuda"):
                    assert asked_by(lambda: conv2d_relu(**inputs)) == wanted

    def test_the_environment_can_rule_them_out(self, monkeypatch) -> None:
        monkeypatch.setattr(sys.modules["alexnet_kernels.ops.conv2d_relu"], "_by_name", "library")
        assert asked_by(lambda: conv2d_relu(**given(**FAST), backend="cuda")) == [LIBRARY]

    def test_paths_of_the_benchmarks(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(_library, "status", lambda: {"wgmma": True})
        inputs = given(**FAST)
        paths = INFO.paths(torch.bfloat16, True, torch.device("cpu"))
        assert {name: asked_by(lambda path=path: path.call(inputs)) for name, path in paths.items()} == {
            "cuDNN": [LIBRARY],
            "mma.sync": [MMA],
            "wgmma": [WGMMA],
        }

    def test_autocasts_dtype_counts(self) -> None:
        inputs = given(**FAST, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert asked_by(lambda: conv2d_relu(**inputs, backend="cuda"))[0] == OWN

    @pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=DTYPE_IDS.get)
    def test_auto_runs_what_the_table_says(self, automatic, monkeypatch, dtype) -> None:
        inputs = given(**FAST, dtype=dtype)
        with tf32(True):
            assert asked_by(lambda: conv2d_relu(**inputs)) == [LIBRARY]
            assert asked_by(lambda: conv2d_relu(**inputs, backend="auto")) == [LIBRARY]
            kind = choices.kind_of("conv2d_relu", "forward", "emulated", dtype, True, (16, 8, 3, 3, 1, 1, 2, 2 * 30, 1))
            names = {torch.float16: "mma", torch.bfloat16: "own", torch.float32: "mma"}
            rows = (
                Row(kind._replace(direction="backward_input"), "own", "measured"),
                Row(kind._replace(format="contiguous"), "own", "measured"),
                Row(kind, names[dtype], "measured"),
            )
            monkeypatch.setattr(choices, "COMMITTED", rows)
            choices.forget()
            wanted = {torch.float16: MMA, torch.bfloat16: OWN, torch.float32: LIBRARY}
            assert asked_by(lambda: conv2d_relu(**inputs)) == [wanted[dtype]]
        choices.forget()

    def test_mixed_settings_of_tf32(self) -> None:
        """torch.backends.cudnn.allow_tf32 raises where a program has also set fp32_precision."""
        conv, inputs = torch.backends.cudnn.conv, given(**FAST, dtype=torch.float32)
        before = conv.fp32_precision
        with tf32(True):
            try:
                conv.fp32_precision = "ieee"
                assert asked_by(lambda: conv2d_relu(**inputs, backend="cuda")) == [LIBRARY]
                conv.fp32_precision = "tf32"
                assert asked_by(lambda: conv2d_relu(**inputs, backend="cuda")) == [OWN]
            finally:
                conv.fp32_precision = before

    @pytest.mark.parametrize("allowed", [False, True], ids=["ieee", "tf32"])
    @pytest.mark.parametrize("choice", ["cuda", "auto"])
    def test_compiles(self, automatic, fresh_dynamo, choice, allowed) -> None:
        inputs = given(**FAST, dtype=torch.float32)
        names = ("input", "weight", "bias")
        options = {name: value for name, value in inputs.items() if name not in names}

        def call(*leaves):
            return conv2d_relu(*leaves, **options, backend=choice)

        with tf32(allowed):
            check_compiled(call, [inputs[name] for name in names], dynamic=False)

    @pytest.mark.parametrize("sample", INFO.samples, ids=[sample.id for sample in INFO.samples])
    @pytest.mark.parametrize("setting", list(contract.settings(INFO, chosen=lambda device: ["cuda"])), ids=str)
    def test_the_librarys_equals_the_definition(self, sample, setting) -> None:
        """Output and gradients; what backend "cuda" runs by name is compared by tests/ops/test_contract.py."""
        case = contract.Case(replace(INFO, op=partial(conv2d_relu_by, LIBRARY)), sample, setting)
        contract.check(case, contract.expected(INFO, case.inputs()))

    @pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=DTYPE_IDS.get)
    @pytest.mark.parametrize("algorithm", [OWN, MMA, WGMMA])
    @pytest.mark.parametrize(
        "options",
        [
            FAST,
            {**FAST, "bias": False},
            {**FAST, "relu": False},
            {"shape": (1, 8, 5, 5), "weight_shape": (8, 8, 1, 1)},
            {"shape": (3, 24, 3, 7), "weight_shape": (40, 24, 3, 2), "padding": (2, 0)},
            {"shape": (2, 24, 4, 4), "weight_shape": (24, 8, 4, 4), "groups": 3},
        ],
        ids=str,
    )
    def test_one_rounding(self, options, algorithm, dtype) -> None:
        inputs = given(**options, dtype=dtype)
        out = conv2d_relu_by(algorithm, **inputs, backend="cuda")
        assert excess(out, inputs) <= 0
        assert out.is_contiguous(memory_format=LAST)

    @pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=DTYPE_IDS.get)
    def test_random_convolutions(self, dtype, fuzz) -> None:
        """Small ones of any geometry, closer to float64 than cuDNN's path, which rounds twice."""
        chance = randoms.Random(f"{dtype} {fuzz}")
        compared = 0
        while compared < 40 * fuzz:
            shape, options = INFO.domain(lambda values: chance.choice(list(values)))
            options = dict(options)
            weight_shape = options.pop("weight")
            extents = zip(shape[2:], options["padding"], weight_shape[2:], strict=True)
            if shape[0] == 0 or shape[1] == 1 or any(size + 2 * pad < kernel for size, pad, kernel in extents):
                continue
            inputs = given(shape, weight_shape, dtype, **options)
            if memory_format_of(inputs["input"]) != LAST:
                continue
            out = conv2d_relu_by(OWN, **inputs, backend="cuda")
            assert excess(out, inputs, 2**-10 if dtype == torch.float32 else None) <= 0, (shape, weight_shape, options)
            compared += 1

    @pytest.mark.parametrize(
        "options",
        [
            {"shape": (2, 16, 9, 8), "weight_shape": (16, 16, 3, 3), "stride": 2},
            {"shape": (2, 14, 5, 6), "weight_shape": (10, 7, 3, 3), "padding": 1, "groups": 2},
            {"shape": (1, 3, 11, 12), "weight_shape": (5, 3, 5, 4), "stride": (3, 2), "padding": (0, 1)},
            {"shape": (2, 6, 6, 6), "weight_shape": (6, 1, 3, 3), "padding": 1, "groups": 6},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=DTYPE_IDS.get)
    def test_what_only_mma_sync_takes(self, options, dtype) -> None:
        inputs = given(**options, dtype=dtype)
        # TF32 rounds each operand to 11 bits.
        unit = 2**-10 if dtype == torch.float32 else None
        outputs = [conv2d_relu_by(algorithm, **inputs, backend="cuda") for algorithm in (MMA, OWN)]
        assert excess(outputs[0], inputs, unit) <= 0
        assert_same(*outputs)
        with pytest.raises(RuntimeError, match=r"the wgmma kernel does not take this convolution: \w"):
            kernels_of("cuda").conv2d_relu(*operator_arguments(inputs), WGMMA)

    @pytest.mark.parametrize(
        "change",
        [
            {"memory_format": torch.contiguous_format},
            {"shape": (0, 16, 6, 5)},
            {"shape": (2, 16, 1, 1), "weight_shape": (16, 8, 1, 1), "padding": 0},
            {"shape": (2, 1, 6, 5), "weight_shape": (16, 1, 3, 3), "groups": 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=DTYPE_IDS.get)
    def test_what_only_the_library_takes(self, change, dtype) -> None:
        inputs = given(**{**FAST, **change}, dtype=dtype)
        outputs = [conv2d_relu_by(algorithm, **inputs, backend="cuda") for algorithm in (OWN, LIBRARY)]
        assert_same(*outputs)
        assert outputs[0].stride() == outputs[1].stride()
        for algorithm in (MMA, WGMMA):
            with pytest.raises(RuntimeError, match=r"kernel does not take this convolution: (a tensor|the input) is"):
                kernels_of("cuda").conv2d_relu(*operator_arguments(inputs), algorithm)

    @pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, torch.float32], ids=DTYPE_IDS.get)
    @pytest.mark.parametrize("name", ["input", "weight", "bias"])
    @pytest.mark.parametrize("skipped", [1, 2, 4])
    def test_memory_that_is_not_aligned(self, name, skipped, dtype) -> None:
        inputs = given(**FAST, dtype=dtype)
        value = inputs[name]
        moved = value.new_empty(value.numel() + skipped)[skipped:].as_strided(value.shape, value.stride(), skipped)
        moved = {**inputs, name: moved.copy_(value)}
        assert_same(*(conv2d_relu_by(OWN, **arguments, backend="cuda") for arguments in (inputs, moved)))

    def test_operands_of_any_strides(self) -> None:
        inputs = given(**FAST)
        expected = conv2d_relu_by(OWN, **inputs, backend="cuda")
        wide = random((2, 20, 6, 5), torch.bfloat16, LAST)
        wide[:, 2:18] = inputs["input"]
        for name, value in {
            "input": wide[:, 2:18],
            "weight": inputs["weight"].contiguous(),
            "bias": inputs["bias"].repeat_interleave(2)[::2],
        }.items():
            assert_same(conv2d_relu_by(OWN, **{**inputs, name: value}, backend="cuda"), expected, name)

    def test_other_devices(self, module) -> None:
        inputs = given(**FAST)
        module.set_device(capability=80)
        assert excess(conv2d_relu_by(OWN, **inputs, backend="cuda"), inputs) <= 0
        with pytest.raises(RuntimeError, match=r"the wgmma kernel .* runs on compute capability 9.0, not 8.0"):
            kernels_of("cuda").conv2d_relu(*operator_arguments(inputs), WGMMA)
        module.set_device(capability=75)
        outputs = [conv2d_relu_by(algorithm, **inputs, backend="cuda") for algorithm in (OWN, LIBRARY)]
        assert_same(*outputs)
        with pytest.raises(RuntimeError, match=r"the mma.sync kernel .* compute capability is below 8.0"):
            kernels_of("cuda").conv2d_relu(*operator_arguments(inputs), MMA)

    def test_what_a_call_of_the_operator_can_not_do(self) -> None:
        operator = kernels_of("cuda").conv2d_relu
        arguments = operator_arguments(given(**FAST))
        for number in (-1, 4):
            with pytest.raises(RuntimeError, match=f"algorithm is {number}, not from 0 to 3"):
                operator(*arguments, number)
        inputs = {
            "the channels": given((2, 12, 6, 5), (16, 8, 3, 3), groups=2),
            "the kernel is larger": given((2, 16, 2, 5), (16, 8, 3, 3), groups=2),
            "different dtypes": {**given(**FAST), "weight": torch.zeros(16, 8, 3, 3)},
            "exceeds 2": given(**{**FAST, "padding": 2**24}),
        }
        for reason, value in inputs.items():
            for algorithm, name in ((MMA, "mma.sync"), (WGMMA, "wgmma")):
                message = f"the {name} kernel does not take this convolution: .*{reason}"
                with pytest.raises(RuntimeError, match=message):
                    operator(*operator_arguments(value), algorithm)
        for algorithm in (OWN, MMA, WGMMA):
            with pytest.raises(RuntimeError, match="bias has dtype"):
                operator(*operator_arguments({**given(**FAST), "bias": torch.zeros(16)}), algorithm)

    def test_gradients_by_every_algorithm(self) -> None:
        inputs = given(**FAST)
        found = []
        for algorithm in (LIBRARY, MMA, WGMMA):
            leaves = {name: inputs[name].detach().requires_grad_() for name in ("input", "weight", "bias")}
            out = conv2d_relu_by(algorithm, **{**inputs, **leaves}, backend="cuda")
            if algorithm == LIBRARY:
                grad = 2 * (out > 0.05).to(out.dtype)  # where no rounding changes a sign
            found.append(torch.autograd.grad(out, list(leaves.values()), grad))
        for gradients in found[1:]:
            for actual, expected in zip(gradients, found[0], strict=True):
                assert_close(actual, expected.double(), slack="library")


@pytest.mark.parametrize("kernel", [(3, 5), (4, 3), (2, 6)], ids=["odd", "even-rows", "even"])
@pytest.mark.parametrize("padding", ["same", "valid"])
@every_format
def test_torchs_paddings_by_name(memory_format, padding, kernel, device, backend):
    x = random((2, 8, 9, 8), torch.float64 if backend in ("cpu", "native") else torch.float32, memory_format, device)
    weight = random((6, 4, *kernel), x.dtype, device=device)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = conv2d_relu(*leaves, padding=padding, groups=2, backend=backend)
    expected = torch.relu(F.conv2d(*leaves, padding=padding, groups=2))
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (out, expected)]
    torch.testing.assert_close(*grads)


def operator_arguments(inputs: dict[str, Any]) -> list[Any]:
    """Those of torch.ops.alexnet_kernels.conv2d_relu, without the algorithm."""
    two = [inputs.get(name, default) for name, default in (("stride", 1), ("padding", 0))]
    two = [[value, value] if isinstance(value, int) else list(value) for value in two]
    tensors = [inputs[name] for name in ("input", "weight", "bias")]
    return [*tensors, *two, inputs.get("groups", 1), inputs.get("relu", True)]


def test_other_devices_have_one_algorithm() -> None:
    arguments = operator_arguments(given(**FAST))
    operators = (torch.ops.alexnet_kernels.conv2d_relu, kernels_of("cpu").conv2d_relu)
    for operator in operators:
        for algorithm in (LIBRARY, OWN):
            assert_same(operator(*arguments, algorithm), operators[0](*arguments))
        for algorithm in (MMA, WGMMA):
            raises(RuntimeError, "algorithm . needs a CUDA device", partial(operator, *arguments, algorithm))


@pytest.mark.skipif("triton" not in BACKENDS["cpu"], reason="needs Triton's interpreter")
def test_triton_has_none_of_cuda_s_algorithms() -> None:
    inputs = given(**FAST)
    raises(ValueError, "algorithms 0 and -1 only, not 1", lambda: conv2d_relu_by(OWN, **inputs, backend="triton"))
