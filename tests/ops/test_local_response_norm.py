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
from alexnet_kernels.ops import local_response_norm

STRONG = {"alpha": 0.5, "k": 1.5}  # so that the normalisation shows


@every_format
@every_dtype
@cases(
    ((1, 96, 3, 5), {"alpha": 5e-4, "k": 2.0}),
    ((2, 64, 4, 3), {"groups": 2, **STRONG}),
    ((2, 16, 5, 7), {"size": 5, **STRONG}),
    ((2, 37, 3, 5), {"size": 5, **STRONG}),
    ((2, 20, 4, 3), {"size": 5, "groups": 4, **STRONG}),
    ((2, 21, 1, 9), {"size": 4, "groups": 3, **STRONG}),
    ((1, 35, 6, 1), {"size": 2, **STRONG}),
    ((3, 19, 2, 2), {"size": 1, **STRONG}),
    ((1, 33, 3, 3), {"size": 9, **STRONG}),
    ((2, 3, 4, 4), {"size": 7, **STRONG}),
    ((2, 1, 4, 4), {"size": 5, **STRONG}),
    ((2, 24, 3, 3), {"beta": 0.5, **STRONG}),
    ((2, 24, 3, 3), {"beta": 1.0, **STRONG}),
    ((2, 24, 3, 3), {"beta": 0.31, **STRONG}),
    ((2, 24, 3, 3), {"beta": 0.0, **STRONG}),
    ((2, 24, 3, 3), {"alpha": 0.0, "k": 3.0}),
    ((2, 24, 3, 3), {"alpha": 1.0, "k": 0.0}),
    ((0, 16, 4, 4), STRONG),
    ((2, 16, 0, 4), STRONG),
)
def test_equals_the_definition(shape, options, dtype, memory_format, device, backend):
    x = random(shape, dtype, memory_format, device)
    check(local_response_norm, reference.local_response_norm, {"input": x}, options, backend=backend)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@cases(((1, 96, 55, 55), {"alpha": 5e-4, "k": 2.0}), ((1, 256, 27, 27), {"k": 2.0, "groups": 2}))
def test_alexnets_layers(shape, options, dtype, memory_format, device):
    x = random(shape, dtype, memory_format, device)
    check(local_response_norm, reference.local_response_norm, {"input": x}, options)


@every_dtype
@pytest.mark.parametrize("shape", [(3, 17, 6), (2, 12, 2, 3, 4)], ids=["3d", "5d"])
def test_takes_other_ranks(shape, dtype, device, backend):
    x = random(shape, dtype, device=device)
    check(local_response_norm, reference.local_response_norm, {"input": x}, STRONG, backend=backend)


@every_format
@every_dtype
def test_large_and_small_values(dtype, memory_format, device, backend):
    x = random((2, 24, 3, 3), torch.float64, memory_format, device)
    x = (x * 10.0 ** torch.randint(-3, 5, x.shape, device=device)).clamp(-6e4, 6e4).to(dtype)
    check(local_response_norm, reference.local_response_norm, {"input": x}, STRONG, backend=backend)


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_inside_their_window(value, memory_format, device, backend):
    x = random((2, 40, 3, 3), torch.float32, memory_format, device)
    x[0, 0, 1, 1] = x[1, 21, 0, 2] = value
    expected = reference.local_response_norm(x.double(), **STRONG)
    out = local_response_norm(x, **STRONG, backend=backend)
    assert_close(out, expected)
    assert out.isnan().any()
    if value != value:
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        local_response_norm(leaf, **STRONG, backend=backend).sum().backward()
        reference.local_response_norm(exact, **STRONG).sum().backward()
        assert_close(leaf.grad, exact.grad)


@every_dtype
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "offset"])
def test_input_of_any_strides(layout, dtype, device, backend):
    x = {
        "sliced": lambda: random((4, 20, 5, 12), dtype, device=device)[::2, :, :, ::3],
        "transposed": lambda: random((2, 5, 20, 4), dtype, device=device).permute(0, 2, 3, 1),
        "expanded": lambda: random((1, 20, 1, 1), dtype, device=device).expand(2, 20, 5, 4),
        "offset": lambda: random((2, 21, 5, 4), dtype, torch.channels_last, device)[:, 1:],
    }[layout]()
    check(local_response_norm, reference.local_response_norm, {"input": x}, STRONG, backend=backend)


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
    check(local_response_norm, reference.local_response_norm, {"input": x}, STRONG, backend=backend, grad=grad)


@pytest.mark.float64
@every_format
@pytest.mark.parametrize(("size", "groups", "beta"), [(5, 1, 0.75), (4, 2, 0.6), (3, 3, 1.0)])
def test_first_and_second_derivatives(size, groups, beta, memory_format, device, backend):
    x = random((2, 6, 1, 2), torch.float64, memory_format, device)
    check_gradients(lambda x: local_response_norm(x, size, 0.5, beta, 1.2, groups, backend=backend), [x])


@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, device, backend, threads):
    x = random((4, 48, 13, 13), dtype, memory_format, device)
    check_repeatable(lambda x: local_response_norm(x, **STRONG, backend=backend), [x], threads)


@every_format
def test_registration(memory_format, device):
    operator = torch.ops.alexnet_kernels.local_response_norm.default
    x = random((2, 12, 3, 5), torch.float32, memory_format, device)
    torch.library.opcheck(operator, (x.requires_grad_(), 5, 0.5, 0.75, 1.0, 2))
    torch.library.opcheck(operator, (random((0, 12, 3, 5), device=device), 4, 0.5, 0.75, 1.0, 1))


@every_format
def test_compiles(memory_format, device, backend, fresh_dynamo):
    x = random((2, 20, 5, 4), torch.float32, memory_format, device)
    check_compiled(lambda x: local_response_norm(x * 2, **STRONG, backend=backend), [x], dynamic=backend != "native")


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return local_response_norm(x, **STRONG)

    x = random((2, 20, 5, 4), device=device)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wider = random((5, 20, 5, 4), device=device)
    assert_same(program.module()(wider), local_response_norm(wider, **STRONG))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_keeps_the_inputs_dtype(dtype, device):
    x = random((2, 20, 5, 4), dtype, device=device)
    expected = forward_backward(lambda x: local_response_norm(x, **STRONG), x)
    with torch.autocast(device, torch.bfloat16):
        actual = forward_backward(lambda x: local_response_norm(x, **STRONG), x)
    assert actual[0].dtype == dtype
    assert_same(actual, expected)


def test_auto_is_one_of_the_backends_and_equals_the_definition(device):
    x = random((2, 20, 5, 4), device=device)
    check(local_response_norm, reference.local_response_norm, {"input": x}, STRONG)


def test_onnx_cases(device, backend):
    node = pytest.importorskip("onnx.backend.test.case.node", exc_type=ImportError)
    from onnx import numpy_helper

    found = [case for case in node.collect_testcases(None) if case.model.graph.node[0].op_type == "LRN"]
    assert found
    for case in found:
        attributes = {a.name: a.i or a.f for a in case.model.graph.node[0].attribute}
        (inputs, outputs) = case.data_sets[0]
        x = torch.from_numpy(numpy_helper.to_array(inputs[0]) if not hasattr(inputs[0], "dtype") else inputs[0])
        out = local_response_norm(
            x.to(device),
            attributes["size"],
            attributes.get("alpha", 1e-4),
            attributes.get("beta", 0.75),
            attributes.get("bias", 1.0),
            backend=backend,
        )
        torch.testing.assert_close(out.cpu(), torch.from_numpy(outputs[0]), rtol=1e-5, atol=1e-6)
