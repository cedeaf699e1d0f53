from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_same,
    cases,
    check,
    check_compiled,
    check_gradients,
    check_repeatable,
    distinct,
    every_dtype,
    every_format,
    forward_backward,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import max_pool2d

SHAPES = cases(
    ((1, 48, 13, 11), {}),
    ((1, 64, 7, 9), {"relu": True}),
    ((2, 17, 13, 9), {}),
    ((2, 16, 6, 8), {"kernel_size": 2}),
    ((2, 5, 7, 7), {"kernel_size": 2, "relu": True}),
    ((1, 20, 6, 5), {"stride": 1}),
    ((1, 20, 5, 6), {"stride": 1, "padding": 1}),
    ((2, 9, 8, 8), {"ceil_mode": True}),
    ((2, 9, 8, 7), {"ceil_mode": True, "padding": 1}),
    ((2, 9, 6, 7), {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True}),
    ((2, 17, 2, 5), {"ceil_mode": True}),
    ((2, 33, 9, 11), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    ((2, 3, 9, 12), {"kernel_size": (1, 4), "stride": (2, 3), "padding": (0, 2), "relu": True}),
    ((1, 3, 20, 19), {"kernel_size": 16, "stride": 3, "padding": 8}),
    ((1, 18, 9, 9), {"kernel_size": 1, "stride": 2}),
    ((1, 18, 3, 3), {}),
    ((1, 2, 10, 10), {"kernel_size": 2, "stride": 5}),
    ((2, 1, 7, 7), {"relu": True}),
    ((0, 16, 7, 7), {}),
)


@every_format
@every_dtype
@SHAPES
def test_equals_the_definition(shape, options, dtype, memory_format, device, backend):
    x = random(shape, dtype, memory_format, device)
    check(max_pool2d, reference.max_pool2d, {"input": x}, options, backend=backend, exact=True)


@every_format
@every_dtype
@SHAPES
def test_ties_go_to_the_first(shape, options, dtype, memory_format, device, backend):
    x = torch.randint(-1, 2, shape).to(device, dtype).contiguous(memory_format=memory_format)
    check(max_pool2d, reference.max_pool2d, {"input": x}, options, backend=backend, exact=True)


@every_format
@every_dtype
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_and_infinity(relu, dtype, memory_format, device, backend):
    x = random((2, 20, 9, 9), dtype, memory_format, device)
    x[0, 0, 4, 4] = x[1, 17, 0, 1] = torch.nan
    x[0, 1, 2, 2] = torch.inf
    x[1, 3] = -torch.inf
    expected = reference.max_pool2d(x.double(), relu=relu)
    out = max_pool2d(x, relu=relu, backend=backend)
    assert_same(out.double(), expected)
    assert out.isnan().sum() == 5
    if not relu and not (x.is_cuda and backend == "native"):  # whose gradient goes to another NaN of a window
        check(max_pool2d, reference.max_pool2d, {"input": x}, {}, backend=backend, exact=True)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_every_half_precision_number(relu, dtype, memory_format, device, backend):
    """Both zeros, infinities and NaNs among them win and lose as they do in float32, in values and gradients."""
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0, -1.0]).to(dtype).view(torch.int16)
    every = torch.arange(2**16).sub(2**15).to(torch.int16)[torch.randperm(2**16, generator=generator)]
    bits = torch.cat([every, few[torch.randint(len(few), (2**14,), generator=generator)]])
    x = bits.view(dtype).reshape(2, 40, 32, 32).to(device).contiguous(memory_format=memory_format).requires_grad_()
    wide = x.detach().float().requires_grad_()
    out, expected = (max_pool2d(t, 3, 2, 1, relu=relu, backend=backend) for t in (x, wide))
    assert_same(out.float(), expected)
    grad = torch.arange(out.numel(), device=device).remainder(7).add(1).reshape(out.shape).to(dtype)
    grads = torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(expected, wide, grad.float())[0]
    assert torch.equal(grads[0].float(), grads[1])


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases(((1, 96, 55, 55), {}), ((1, 256, 27, 27), {"relu": True}), ((1, 256, 13, 13), {}))
def test_alexnets_layers(shape, options, dtype, memory_format, device):
    x = random(shape, dtype, memory_format, device)
    check(max_pool2d, reference.max_pool2d, {"input": x}, options, exact=True)


@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_input_of_any_strides(layout, dtype, device, backend):
    x = {
        "sliced": lambda: random((4, 20, 7, 14), dtype, device=device)[::2, :, :, ::2],
        "transposed": lambda: random((2, 7, 20, 6), dtype, device=device).permute(0, 2, 3, 1),
        "expanded": lambda: random((1, 20, 1, 1), dtype, device=device).expand(2, 20, 7, 6),
        "offset": lambda: random((2, 21, 7, 6), dtype, torch.channels_last, device)[:, 1:],
    }[layout]()
    check(max_pool2d, reference.max_pool2d, {"input": x}, {}, backend=backend, exact=True)


@every_format
@every_dtype
@pytest.mark.parametrize("layout", ["expanded", "other_format", "sliced"])
def test_output_gradient_of_any_strides(layout, dtype, memory_format, device, backend):
    shape = (2, 20, 3, 4)
    other = torch.contiguous_format if memory_format is torch.channels_last else torch.channels_last
    grad = {
        "expanded": lambda: torch.full((1, 1, 1, 1), 3.0, dtype=dtype, device=device).expand(shape),
        "other_format": lambda: torch.randint(-4, 5, shape).to(device, dtype).contiguous(memory_format=other),
        "sliced": lambda: torch.randint(-4, 5, (2, 40, 3, 4)).to(device, dtype)[:, ::2],
    }[layout]()
    x = random((2, 20, 7, 9), dtype, memory_format, device)
    for relu in (False, True):
        options = {"relu": relu}
        check(max_pool2d, reference.max_pool2d, {"input": x}, options, backend=backend, exact=True, grad=grad)


@every_format
@every_dtype
def test_overlapping_gradients_add_in_float32(dtype, memory_format, device, backend):
    x = torch.zeros(1, 17, 5, 5, dtype=dtype, device=device).contiguous(memory_format=memory_format)
    x[:, :, 2, 2] = 1
    check(
        max_pool2d,
        reference.max_pool2d,
        {"input": x},
        {"stride": 1},
        backend=backend,
        grad=random((1, 17, 3, 3), dtype, memory_format, device),
        slack="library" if backend == "native" else "sums",
    )


@pytest.mark.float64
@every_format
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_first_and_second_derivatives(relu, memory_format, device, backend):
    x = distinct((1, 2, 5, 5)).to(device).contiguous(memory_format=memory_format)
    check_gradients(lambda x: max_pool2d(x, relu=relu, backend=backend), [x])


@every_format
@every_dtype
def test_second_derivative_through_a_nonlinearity(dtype, memory_format, device, backend):
    x = random((1, 18, 7, 7), dtype, memory_format, device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (first,) = torch.autograd.grad(max_pool2d(x, backend=backend).double().square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(reference.max_pool2d(exact).square().sum(), exact, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected_second,) = torch.autograd.grad(expected.sum(), exact)
    assert_same(second.double(), expected_second)


@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, device, backend, threads):
    x = random((4, 48, 13, 13), dtype, memory_format, device)
    check_repeatable(lambda x: max_pool2d(x, backend=backend), [x], threads)


@every_format
def test_registration(memory_format, device):
    operator = torch.ops.alexnet_kernels.max_pool2d.default
    for shape in ((2, 12, 7, 5), (0, 12, 7, 5)):
        x = random(shape, torch.float32, memory_format, device).requires_grad_()
        torch.library.opcheck(operator, (x, [3, 3], [2, 2], [1, 1], True, True))


@every_format
def test_compiles(memory_format, device, backend, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, memory_format, device)
    check_compiled(lambda x: max_pool2d(x * 2, relu=True, backend=backend), [x], dynamic=backend != "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_keeps_the_inputs_dtype(dtype, device):
    x = random((2, 20, 7, 9), dtype, device=device)
    expected = forward_backward(max_pool2d, x)
    with torch.autocast(device, torch.bfloat16):
        actual = forward_backward(max_pool2d, x)
    assert actual[0].dtype == dtype
    assert_same(actual, expected)


def test_auto_equals_the_definition(device):
    x = random((2, 20, 7, 9), device=device)
    check(max_pool2d, reference.max_pool2d, {"input": x}, {}, exact=True)


def test_onnx_cases(device, backend):
    node = pytest.importorskip("onnx.backend.test.case.node", exc_type=ImportError)
    tried = 0
    for case in node.collect_testcases(None):
        description = case.model.graph.node[0]
        if description.op_type != "MaxPool" or len(description.output) != 1:
            continue
        attributes = {a.name: list(a.ints) or a.i or a.s.decode() for a in description.attribute}
        inputs, outputs = case.data_sets[0]
        kernel, pads = attributes["kernel_shape"], attributes.get("pads", [0, 0, 0, 0])
        plain = attributes.get("auto_pad", "NOTSET") == "NOTSET" and set(attributes.get("dilations", [1])) == {1}
        if not plain or len(kernel) != 2 or pads[:2] != pads[2:] or inputs[0].dtype.kind != "f":
            continue
        x = torch.from_numpy(inputs[0]).to(device)
        padding = tuple(pads[:2])
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            continue
        strides = tuple(attributes.get("strides", [1, 1]))
        ceil_mode = bool(attributes.get("ceil_mode", 0))
        out = max_pool2d(x, tuple(kernel), strides, padding, ceil_mode, backend=backend)
        assert_same(out.cpu(), torch.from_numpy(outputs[0]), case.name)
        tried += 1
    assert tried >= 4
