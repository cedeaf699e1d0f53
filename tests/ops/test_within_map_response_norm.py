from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
    cases,
    check,
    check_compiled,
    check_gradients,
    check_repeatable,
    every_dtype,
    every_format,
    forward_backward,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import within_map_response_norm

STRONG = {"alpha": 2.0, "k": 1.5}


@every_format
@every_dtype
@cases(
    ((1, 48, 13, 13), {}),
    ((2, 16, 7, 9), STRONG),
    ((2, 37, 5, 6), STRONG),
    ((2, 20, 6, 5), {"size": 3, **STRONG}),
    ((2, 20, 6, 5), {"size": 4, **STRONG}),
    ((2, 20, 5, 7), {"size": 2, **STRONG}),
    ((2, 20, 3, 3), {"size": 1, **STRONG}),
    ((2, 5, 3, 4), {"size": 9, **STRONG}),
    ((2, 1, 1, 8), STRONG),
    ((2, 20, 5, 5), {"beta": 0.31, **STRONG}),
    ((2, 20, 5, 5), {"beta": 1.0, **STRONG}),
    ((2, 20, 5, 5), {"alpha": 0.0, "k": 2.0}),
    ((0, 16, 5, 5), STRONG),
)
def test_equals_the_definition(shape, options, dtype, memory_format, device, backend):
    x = random(shape, dtype, memory_format, device)
    check(within_map_response_norm, reference.within_map_response_norm, {"input": x}, options, backend=backend)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases(((1, 256, 27, 27), {}))
def test_alexnets_layers(shape, options, dtype, memory_format, device):
    x = random(shape, dtype, memory_format, device)
    check(within_map_response_norm, reference.within_map_response_norm, {"input": x}, options)


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_inside_their_window(value, memory_format, device, backend):
    x = random((2, 20, 12, 11), torch.float32, memory_format, device)
    x[0, 0, 0, 0] = x[1, 17, 6, 5] = value
    out = within_map_response_norm(x, **STRONG, backend=backend)
    assert_close(out, reference.within_map_response_norm(x.double(), **STRONG))
    assert out.isnan().any()


@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_input_of_any_strides(layout, dtype, device, backend):
    x = {
        "sliced": lambda: random((4, 20, 7, 14), dtype, device=device)[::2, :, :, ::2],
        "transposed": lambda: random((2, 7, 20, 6), dtype, device=device).permute(0, 2, 3, 1),
        "expanded": lambda: random((1, 20, 1, 1), dtype, device=device).expand(2, 20, 7, 6),
        "offset": lambda: random((2, 21, 7, 6), dtype, torch.channels_last, device)[:, 1:],
    }[layout]()
    check(within_map_response_norm, reference.within_map_response_norm, {"input": x}, STRONG, backend=backend)


@every_format
@every_dtype
@pytest.mark.parametrize("layout", ["expanded", "other_format", "sliced"])
def test_output_gradient_of_any_strides(layout, dtype, memory_format, device, backend):
    shape = (2, 20, 5, 4)
    x = random(shape, dtype, memory_format, device)
    other = torch.contiguous_format if memory_format is torch.channels_last else torch.channels_last
    grad = {
        "expanded": lambda: random((1, 1, 1, 1), dtype, device=device).expand(shape),
        "other_format": lambda: random(shape, dtype, other, device),
        "sliced": lambda: random((2, 40, 5, 4), dtype, memory_format, device)[:, ::2],
    }[layout]()
    definition = reference.within_map_response_norm
    check(within_map_response_norm, definition, {"input": x}, STRONG, backend=backend, grad=grad)


@pytest.mark.float64
@every_format
@pytest.mark.parametrize("size", [2, 3])
def test_first_and_second_derivatives(size, memory_format, device, backend):
    x = random((1, 2, 4, 3), torch.float64, memory_format, device)
    check_gradients(lambda x: within_map_response_norm(x, size, **STRONG, backend=backend), [x])


@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, device, backend, threads):
    x = random((4, 48, 13, 13), dtype, memory_format, device)
    check_repeatable(lambda x: within_map_response_norm(x, **STRONG, backend=backend), [x], threads)


@every_format
def test_registration(memory_format, device):
    operator = torch.ops.alexnet_kernels.within_map_response_norm.default
    for shape in ((2, 12, 7, 5), (0, 12, 7, 5)):
        x = random(shape, torch.float32, memory_format, device).requires_grad_()
        torch.library.opcheck(operator, (x, 5, 0.5, 0.75, 1.0))


@every_format
def test_compiles(memory_format, device, backend, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, memory_format, device)
    check_compiled(
        lambda x: within_map_response_norm(x * 2, **STRONG, backend=backend), [x], dynamic=backend != "native"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_keeps_the_inputs_dtype(dtype, device):
    x = random((2, 20, 7, 9), dtype, device=device)
    expected = forward_backward(lambda x: within_map_response_norm(x, **STRONG), x)
    with torch.autocast(device, torch.bfloat16):
        actual = forward_backward(lambda x: within_map_response_norm(x, **STRONG), x)
    assert actual[0].dtype == dtype
    assert_same(actual, expected)


def test_auto_equals_the_definition(device):
    x = random((2, 20, 7, 9), device=device)
    check(within_map_response_norm, reference.within_map_response_norm, {"input": x}, STRONG)
