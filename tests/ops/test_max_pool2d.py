from __future__ import annotations

import pytest
import torch
from contract import check_op
from helpers import (
    assert_close,
    assert_same,
    every_dtype,
    every_format,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.op_info import OP_INFOS, Maker
from alexnet_kernels.ops import max_pool2d


@every_format
@every_dtype
@pytest.mark.parametrize("sample", OP_INFOS["max_pool2d"].samples, ids=lambda sample: sample.id)
def test_ties_go_to_the_first(sample, dtype, memory_format, device, backend):
    x = torch.randint(-1, 2, sample.shape).to(device, dtype).contiguous(memory_format=memory_format)
    inputs = OP_INFOS["max_pool2d"].inputs(sample, Maker(dtype, memory_format, device))
    check_op("max_pool2d", {**inputs, "input": x}, backend)


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


def test_second_derivative_of_positions_outside_the_image():
    """No forward call gives them; the backward operator and its derivative ignore them."""
    grad = torch.ones(1, 1, 1, 2, dtype=torch.double, requires_grad=True)
    argmax = torch.tensor([[[[0, 2]]]], dtype=torch.uint8)
    result, _ = torch.ops.alexnet_kernels.max_pool2d_backward(
        grad, None, argmax, None, [1, 1, 3, 5], [3, 3], [3, 3], [0, 0], False
    )
    assert result.sum() == 1
    assert torch.autograd.grad(result.sum(), grad)[0].flatten().tolist() == [1, 0]
