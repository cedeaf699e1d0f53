from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
    check_compiled,
    every_format,
    forward_backward,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import local_response_norm, lrn_max_pool2d, max_pool2d

STRONG = {"alpha": 0.5, "k": 1.5}
LRN = ("size", "alpha", "beta", "k", "groups")


@every_format
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_is_its_parts(relu, memory_format, device):
    x = random((2, 37, 13, 11), torch.float32, memory_format, device)

    def parts(x: torch.Tensor) -> torch.Tensor:
        return max_pool2d(local_response_norm(torch.relu(x) if relu else x, **STRONG))

    fused = forward_backward(lambda x: lrn_max_pool2d(x, **STRONG, relu=relu), x)
    for actual, expected in zip(fused, forward_backward(parts, x), strict=True):
        assert_close(actual, expected.double())


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_and_infinity(relu, value, memory_format, device, backend):
    x = random((2, 40, 7, 7), torch.float32, memory_format, device)
    x[0, 0, 3, 3] = x[1, 21, 0, 2] = value
    options = {"relu": relu, **STRONG}
    out = lrn_max_pool2d(x, **options, backend=backend)
    assert_close(out, reference.lrn_max_pool2d(x.double(), **options))
    assert out.isnan().any() or (relu and value == -torch.inf)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_sum_with_a_float32_bias_is_not_rounded(groups, dtype, memory_format, device, backend):
    """The values of float32, rounded once."""
    x = random((2, 36, 9, 10), dtype, memory_format, device)
    bias = random((36,), device=device)
    options = {"groups": groups, "relu": True, **STRONG}
    out = lrn_max_pool2d(x, bias=bias, **options, backend=backend)
    assert_same(out, lrn_max_pool2d(x.float() + bias[:, None, None], **options, backend=backend).to(dtype))


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_and_infinity_in_the_bias(relu, value, memory_format, device, backend):
    x, bias = random((2, 40, 7, 7), torch.float32, memory_format, device), random((40,), device=device)
    bias[21] = value
    options = {"relu": relu, **STRONG}
    out = lrn_max_pool2d(x, bias=bias, **options, backend=backend)
    assert_close(out, reference.lrn_max_pool2d(x.double(), bias=bias.double(), **options))
    assert out.isnan().any() or (relu and value == -torch.inf)


@every_format
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("padding", [0, 1])
def test_ties_go_to_the_first(padding, relu, memory_format, device, backend):
    """Pixels of equal channels tie; of the windows' maxima the first in row-major order takes the gradient."""
    kinds = torch.randint(-3, 4, (5, 40)).float()
    x = kinds[torch.randint(5, (2, 9, 8))].permute(0, 3, 1, 2).to(device).contiguous(memory_format=memory_format)
    options = {"padding": padding, "relu": relu, **STRONG}
    out, grad = forward_backward(lambda x: lrn_max_pool2d(x, **options, backend=backend), x)
    expected = forward_backward(lambda x: reference.lrn_max_pool2d(x, **options), x.double())
    assert_close(out, expected[0])
    assert_close(grad, expected[1])


@every_format
def test_the_largest_activations(memory_format, device, backend):
    """Their squares overflow: the quotients are next to nothing."""
    x = random((2, 16, 7, 7), torch.float32, memory_format, device) * 1e37
    out = lrn_max_pool2d(x, alpha=5e4, backend=backend)
    assert (out.abs() < 1e-20).all()


@every_format
def test_where_the_bias_cancels_the_input(memory_format, device, backend):
    """The sum is exactly zero, where ReLU's derivative is."""
    bias = random((40,), device=device)
    x = (-bias[:, None, None]).expand(2, 40, 7, 7).contiguous(memory_format=memory_format).requires_grad_()
    out = lrn_max_pool2d(x, bias=bias, relu=True, **STRONG, backend=backend)
    assert (out == 0).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad == 0).all()


@every_format
def test_relu_stops_gradients_that_are_nan(memory_format, device, backend):
    x = torch.ones(1, 16, 3, 3, device=device)
    x[:, 5] = -1
    x[:, 4] = torch.nan
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    (grad,) = torch.autograd.grad(lrn_max_pool2d(x, relu=True, **STRONG, backend=backend).sum(), x)
    assert (grad[:, 5] == 0).all()
    assert grad[:, 4].isnan().all()


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors_of_the_bias(choice):
    x, bias = torch.zeros(2, 8, 7, 7), torch.zeros(8)

    def call(x=x, bias=bias):
        return lambda: lrn_max_pool2d(x, bias=bias, backend=choice)

    raises(TypeError, r"lrn_max_pool2d: bias must be a Tensor, not float", call(bias=0.5))
    raises(ValueError, r"lrn_max_pool2d: bias must be \[8\], not of shape \[9\]", call(bias=torch.zeros(9)))
    raises(TypeError, r"bias must be torch.float16 or torch.float32, not torch.float64", call(x.half(), bias.double()))
    raises(RuntimeError, r"lrn_max_pool2d: bias is on meta, but the input is on cpu", call(bias=bias.to("meta")))


def test_compiles_with_inductor(device, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, torch.channels_last, device)
    check_compiled(lambda x: lrn_max_pool2d(x, **STRONG, relu=True), [x], compiler="inductor")
