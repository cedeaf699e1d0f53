from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import check_op
from helpers import (
    assert_close,
    assert_same,
    every_dtype,
    every_format,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.op_info import OP_INFOS, Maker
from alexnet_kernels.ops import lrn_max_pool2d, max_pool2d


@every_format
@every_dtype
@pytest.mark.parametrize("sample", OP_INFOS["max_pool2d"].samples, ids=lambda sample: sample.id)
def test_ties_go_to_the_first(sample, dtype, memory_format, device, backend):
    x = torch.randint(-1, 2, sample.shape).to(device, dtype).contiguous(memory_format=memory_format)
    inputs = OP_INFOS["max_pool2d"].inputs(sample, Maker(dtype, memory_format, device))
    check_op("max_pool2d", {**inputs, "input": x}, backend)


@every_format
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_the_bias_may_change_before_backward(relu, memory_format, device, backend):
    """As it may after an addition of torch's: its gradient does not depend on it."""
    x = random((2, 20, 9, 9), torch.float32, memory_format, device)
    gradients = []
    for changed in (False, True):
        leaf, bias = x.clone().requires_grad_(), torch.ones(20, device=device, requires_grad=True)
        out = max_pool2d(leaf, bias=bias, relu=relu, backend=backend)
        if changed:
            with torch.no_grad():
                bias.add_(1)
        gradients.append(torch.autograd.grad(out.sum(), (leaf, bias)))
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(before, after)


def with_nan_and_infinity(dtype: torch.dtype, memory_format: torch.memory_format, device: str) -> torch.Tensor:
    x = random((2, 20, 9, 9), dtype, memory_format, device)
    x[0, 0, 4, 4] = x[1, 17, 0, 1] = torch.nan
    x[0, 1, 2, 2] = torch.inf
    x[1, 3] = -torch.inf
    return x


@every_format
@every_dtype
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_and_infinity(relu, dtype, memory_format, device, backend):
    x = with_nan_and_infinity(dtype, memory_format, device)
    expected = reference.max_pool2d(x.double(), relu=relu)
    out = max_pool2d(x, relu=relu, backend=backend)
    assert_same(out.double(), expected)
    assert out.isnan().sum() == 5
    if not relu and not (x.is_cuda and backend == "native"):  # its gradient goes to another NaN of the window
        check_op("max_pool2d", {"input": x}, backend)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_every_half_precision_number(relu, dtype, memory_format, device, backend):
    """Values and gradients are those of float32, also for signed zeros, infinities and NaNs."""
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


BIASES = {"own": None, "float32": torch.float32}
every_bias = pytest.mark.parametrize("bias_dtype", BIASES.values(), ids=BIASES)


@every_format
@every_dtype
@every_bias
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_the_sum_with_the_bias_is_rounded_once(relu, bias_dtype, dtype, memory_format, device, backend):
    if bias_dtype is not None and dtype == torch.float64:
        pytest.skip("a float64 input takes a float64 bias")
    x = random((2, 21, 9, 10), dtype, memory_format, device)
    bias = random((21,), bias_dtype or dtype, device=device)
    out = max_pool2d(x, bias=bias, relu=relu, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maximum = reference.max_pool2d(x.to(wide)) + bias.to(wide)[:, None, None]
    assert_same(out, (maximum.relu() if relu else maximum).to(dtype))


@every_format
def test_relus_gradient_at_nan_and_zero_is_torchs(memory_format, device, backend):
    x = random((2, 20, 9, 9), torch.float32, memory_format, device)
    x[0, 0, 4, 4], x[0, 1], x[1, 2], x[1, 3] = torch.nan, 0.0, -0.0, -torch.inf
    x.requires_grad_()
    out, expected = max_pool2d(x, relu=True, backend=backend), torch.relu(torch.nn.functional.max_pool2d(x, 3, 2))
    grad = random(out.shape, torch.float32, memory_format, device).mul(8).round()
    assert_same(torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@every_format
@pytest.mark.parametrize("kernel", [(16, 16), (5, 51)], ids=["256", "255"])
def test_the_largest_windows_with_relu(kernel, memory_format, device, backend):
    x = random((2, 3, 19, 55), torch.float32, memory_format, device).sub(3)
    bias = torch.tensor([0.0, 1.0, -1.0], device=device)
    check_op("max_pool2d", {"input": x, "kernel_size": kernel, "bias": bias, "relu": True}, backend)


@every_format
@every_dtype
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_infinity_and_zeros_with_a_bias(relu, dtype, memory_format, device, backend):
    x = with_nan_and_infinity(dtype, memory_format, device)
    x[:, 4], x[:, 5], x[:, 6] = 0.0, -0.0, -1.0
    bias = random((20,), dtype, device=device)
    bias[4:7] = torch.tensor([-0.0, -0.0, 1.0])
    bias[7], bias[8], bias[9] = torch.nan, torch.inf, -torch.inf
    bias[1] = -torch.inf
    out = max_pool2d(x.requires_grad_(), bias=bias.requires_grad_(), relu=relu, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = reference.max_pool2d(x.to(wide), bias=bias.to(wide), relu=relu).to(dtype)
    assert_same(out, expected)
    grads = torch.autograd.grad(out, [x, bias], torch.ones_like(out))
    assert [bool(grad.isfinite().all()) for grad in grads] == [True, True]
    if relu:  # sums of zero are not positive
        assert not grads[0][:, 4:7].any()
        assert not grads[1][4:7].any()


@every_format
@every_dtype
@every_bias
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_the_gradient_of_the_bias_is_summed_in_float32(relu, bias_dtype, dtype, memory_format, device, backend):
    """More terms than bfloat16 or float16 can count."""
    if bias_dtype is not None and dtype == torch.float64:
        pytest.skip("a float64 input takes a float64 bias")
    x = random((3, 5, 61, 67), dtype, memory_format, device).abs().requires_grad_()
    bias = torch.full((5,), 0.5, dtype=bias_dtype or dtype, device=device)
    bias[3] = -100
    out = max_pool2d(x, bias=bias.requires_grad_(), relu=relu, backend=backend)
    (grad,) = torch.autograd.grad(out, bias, torch.ones_like(out))
    count = float(out[:, 0].numel())
    expected = torch.tensor([count, count, count, 0.0 if relu else count, count], device=device)
    assert_same(grad, expected.to(bias.dtype))


@every_format
def test_a_frozen_bias_or_input(memory_format, device, backend):
    x, bias = random((2, 9, 7, 7), torch.float32, memory_format, device), random((9,), device=device)
    leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    both = torch.autograd.grad(max_pool2d(*leaves[:1], bias=leaves[1], relu=True, backend=backend).sum(), leaves)
    (alone,) = torch.autograd.grad(max_pool2d(leaves[0], bias=bias, relu=True, backend=backend).sum(), leaves[0])
    assert_same(alone, both[0])
    (alone,) = torch.autograd.grad(max_pool2d(x, bias=leaves[1], relu=True, backend=backend).sum(), leaves[1])
    assert_same(alone, both[1])


def test_an_image_without_a_batch_takes_a_bias(device, backend):
    x, bias = random((9, 7, 7), device=device), random((9,), device=device)
    expected = max_pool2d(x[None], bias=bias, backend=backend)[0]
    assert_same(max_pool2d(x, bias=bias, backend=backend), expected)


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors_of_the_bias(choice):
    x, bias = torch.zeros(2, 8, 7, 7), torch.zeros(8)

    def call(x=x, bias=bias):
        return lambda: max_pool2d(x, bias=bias, backend=choice)

    raises(TypeError, r"max_pool2d: bias must be a Tensor, not list", call(bias=[0.0] * 8))
    raises(ValueError, r"max_pool2d: bias must be \[8\], not of shape \[7\]", call(bias=bias[1:]))
    raises(ValueError, r"max_pool2d: bias must be \[8\], not of shape \[8, 1\]", call(bias=bias[:, None]))
    raises(TypeError, r"max_pool2d: bias must be torch.float32, not torch.bfloat16", call(bias=bias.bfloat16()))
    message = r"max_pool2d: bias must be torch.bfloat16 or torch.float32, not torch.float16"
    raises(TypeError, message, call(x.bfloat16(), bias.half()))
    raises(TypeError, r"max_pool2d: bias must be torch.float64, not torch.float32", call(x.double()))
    raises(RuntimeError, r"max_pool2d: bias is on meta, but the input is on cpu", call(bias=bias.to("meta")))


@every_format
@every_dtype
def test_overlapping_gradients_add_in_float32(dtype, memory_format, device, backend):
    x = torch.zeros(1, 17, 5, 5, dtype=dtype, device=device).contiguous(memory_format=memory_format)
    x[:, :, 2, 2] = 1
    exact, grad = x.double().requires_grad_(), random((1, 17, 3, 3), dtype, memory_format, device)
    x.requires_grad_()
    (actual,) = torch.autograd.grad(max_pool2d(x, stride=1, backend=backend), x, grad)
    (expected,) = torch.autograd.grad(reference.max_pool2d(exact, stride=1), exact, grad.double())
    assert_close(actual, expected, slack="library" if backend == "native" else "sums")


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


@pytest.mark.parametrize("kernel", [2, (3, 2), [3], np.int64(2)], ids=str)
def test_torchs_default_stride_and_sizes(kernel, device, backend):
    x = random((2, 3, 9, 8), device=device)
    assert_same(max_pool2d(x, kernel, None, backend=backend), torch.nn.functional.max_pool2d(x, kernel))
    fused = lrn_max_pool2d(x, kernel_size=kernel, stride=None, backend=backend)
    assert_same(fused, lrn_max_pool2d(x, kernel_size=kernel, stride=kernel, backend=backend))
    raises(TypeError, "stride must be an int or two ints, not 'x'", lambda: max_pool2d(x, 3, "x", backend=backend))


def test_second_derivative_of_positions_outside_the_image():
    """No forward call gives them; the backward operator and its derivative ignore them."""
    grad = torch.ones(1, 1, 1, 2, dtype=torch.double, requires_grad=True)
    argmax = torch.tensor([[[[0, 2]]]], dtype=torch.uint8)
    result, _ = torch.ops.alexnet_kernels.max_pool2d_backward(grad, argmax, None, [1, 1, 3, 5], [3, 3], [3, 3], [0, 0])
    assert result.sum() == 1
    assert torch.autograd.grad(result.sum(), grad)[0].flatten().tolist() == [1, 0]
