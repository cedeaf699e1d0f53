from __future__ import annotations

import pytest
import torch
from helpers import (
    TOLERANCES,
    assert_close,
    assert_same,
    cases,
    check,
    check_compiled,
    check_gradients,
    check_repeatable,
    clear_winner,
    distinct,
    every_dtype,
    every_format,
    forward_backward,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import local_response_norm, lrn_max_pool2d, max_pool2d

STRONG = {"alpha": 0.5, "k": 1.5}
LRN = ("size", "alpha", "beta", "k", "groups")


def settled(dtype: torch.dtype):
    """The windows whose maximum no rounding to dtype can move (and where ReLU is not at its corner)."""

    def windows(input: torch.Tensor, relu: bool = False, **options: object) -> torch.Tensor:
        lrn = {k: v for k, v in options.items() if k in LRN}
        pool = {k: v for k, v in options.items() if k not in LRN}
        x = torch.relu(input) if relu else input
        return clear_winner(reference.local_response_norm(x, **lrn), 4 * TOLERANCES[dtype].relative, **pool)

    return windows


def check_lrn_max_pool2d(x: torch.Tensor, options: dict, backend: str | None = None, **more: object) -> None:
    check(
        lrn_max_pool2d,
        reference.lrn_max_pool2d,
        {"input": x},
        options,
        backend=backend,
        settled=settled(x.dtype),
        **more,
    )


@every_format
@every_dtype
@cases(
    ((1, 96, 7, 7), {"alpha": 5e-4, "k": 2.0, "relu": True}),
    ((2, 64, 7, 5), {"groups": 2, "relu": True, **STRONG}),
    ((2, 16, 7, 9), STRONG),
    ((2, 37, 9, 7), {"relu": True, **STRONG}),
    ((2, 20, 7, 7), {"groups": 4, **STRONG}),
    ((2, 21, 7, 5), {"size": 4, "groups": 3, **STRONG}),
    ((1, 33, 5, 5), {"size": 9, "relu": True, **STRONG}),
    ((2, 3, 5, 5), {"size": 7, **STRONG}),
    ((2, 1, 5, 5), {"size": 1, **STRONG}),
    ((2, 24, 6, 8), {"kernel_size": 2, **STRONG}),
    ((2, 24, 5, 6), {"stride": 1, "padding": 1, **STRONG}),
    ((2, 24, 8, 8), {"ceil_mode": True, "relu": True, **STRONG}),
    ((2, 24, 2, 2), {"ceil_mode": True, **STRONG}),
    ((2, 19, 9, 11), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), **STRONG}),
    ((1, 19, 9, 9), {"kernel_size": 1, "stride": 3, **STRONG}),
    ((2, 24, 5, 5), {"beta": 0.31, **STRONG}),
    ((2, 24, 5, 5), {"beta": 1.0, "relu": True, **STRONG}),
    ((2, 24, 5, 5), {"alpha": 0.0, "k": 2.0}),
    ((0, 16, 7, 7), STRONG),
)
def test_equals_the_definition(shape, options, dtype, memory_format, device, backend):
    check_lrn_max_pool2d(random(shape, dtype, memory_format, device), options, backend)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases(((1, 96, 55, 55), {"alpha": 5e-4, "k": 2.0, "relu": True}), ((1, 256, 27, 27), {"k": 2.0, "groups": 2}))
def test_alexnets_layers(shape, options, dtype, memory_format, device):
    x = random(shape, dtype, memory_format, device)
    check_lrn_max_pool2d(x, options)


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


@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_input_of_any_strides(layout, dtype, device, backend):
    x = {
        "sliced": lambda: random((4, 20, 7, 14), dtype, device=device)[::2, :, :, ::2],
        "transposed": lambda: random((2, 7, 20, 6), dtype, device=device).permute(0, 2, 3, 1),
        "expanded": lambda: random((1, 20, 7, 6), dtype, device=device).expand(2, 20, 7, 6),
        "offset": lambda: random((2, 21, 7, 6), dtype, torch.channels_last, device)[:, 1:],
    }[layout]()
    check_lrn_max_pool2d(x, STRONG, backend)


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
    # One step between neighbours in a window: no near ties, so that the gradient reaches the op as it is.
    x = (random((1, 20, 1, 1)) + distinct((2, 20, 7, 9), torch.float32, 0.05)).to(device, dtype)
    x = x.contiguous(memory_format=memory_format)
    options = {"alpha": 1e-4, "relu": True}
    won = settled(dtype)(x.double(), **options)
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    (actual,) = torch.autograd.grad(lrn_max_pool2d(leaf, **options, backend=backend), leaf, grad)
    (expected,) = torch.autograd.grad(reference.lrn_max_pool2d(exact, **options), exact, grad.double())
    # Where a window has near ties, leave out every place that it covers and their channels' neighbours.
    unclear = torch.nn.functional.interpolate((~won).any(1, keepdim=True).double(), size=(7, 9)) > 0
    unclear = torch.nn.functional.max_pool2d(unclear.double(), 5, 1, 2) > 0
    keep = ~unclear.expand_as(actual)
    assert_close(torch.where(keep, actual, 0), torch.where(keep, expected, 0))


@pytest.mark.float64
@every_format
@pytest.mark.parametrize(("size", "groups", "relu"), [(5, 1, False), (3, 2, True)])
def test_first_and_second_derivatives(size, groups, relu, memory_format, device, backend):
    x = distinct((1, 4, 3, 5), step=0.02).to(device).contiguous(memory_format=memory_format)
    check_gradients(lambda x: lrn_max_pool2d(x, size, 0.05, 0.75, 1.2, groups, relu=relu, backend=backend), [x])


@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, device, backend, threads):
    x = random((4, 48, 13, 13), dtype, memory_format, device)
    check_repeatable(lambda x: lrn_max_pool2d(x, **STRONG, relu=True, backend=backend), [x], threads)


@every_format
def test_registration(memory_format, device):
    operator = torch.ops.alexnet_kernels.lrn_max_pool2d.default
    for shape in ((2, 12, 7, 5), (0, 12, 7, 5)):
        x = random(shape, torch.float32, memory_format, device).requires_grad_()
        torch.library.opcheck(operator, (x, 5, 0.5, 0.75, 1.0, 2, [3, 3], [2, 2], [0, 0], True, True))


@every_format
def test_compiles(memory_format, device, backend, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, memory_format, device)
    check_compiled(lambda x: lrn_max_pool2d(x * 2, **STRONG, backend=backend), [x], dynamic=backend != "native")


def test_compiles_with_inductor(device, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, torch.channels_last, device)
    check_compiled(lambda x: lrn_max_pool2d(x, **STRONG, relu=True), [x], compiler="inductor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_keeps_the_inputs_dtype(dtype, device):
    x = random((2, 20, 7, 9), dtype, device=device)
    expected = forward_backward(lambda x: lrn_max_pool2d(x, **STRONG), x)
    with torch.autocast(device, torch.bfloat16):
        actual = forward_backward(lambda x: lrn_max_pool2d(x, **STRONG), x)
    assert actual[0].dtype == dtype
    assert_same(actual, expected)
