from __future__ import annotations

from collections.abc import Callable

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
from alexnet_kernels.ops import local_response_norm

STRONG = {"alpha": 0.5, "k": 1.5}  # makes the normalisation visible


@every_dtype
@pytest.mark.parametrize("shape", [(3, 17, 6), (2, 12, 2, 3, 4)], ids=["3d", "5d"])
def test_takes_other_ranks(shape, dtype, device, backend):
    x = random(shape, dtype, device=device)
    check_op("local_response_norm", {"input": x, **STRONG}, backend)


@every_format
@every_dtype
def test_large_and_small_values(dtype, memory_format, device, backend):
    x = random((2, 24, 3, 3), torch.float64, memory_format, device)
    x = (x * 10.0 ** torch.randint(-3, 5, x.shape, device=device)).clamp(-6e4, 6e4).to(dtype)
    check_op("local_response_norm", {"input": x, **STRONG}, backend)


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


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return local_response_norm(x, **STRONG)

    x = random((2, 20, 5, 4), device=device)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    wider = random((5, 20, 5, 4), device=device)
    assert_same(program.module()(wider), local_response_norm(wider, **STRONG))


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


def test_second_derivatives_that_are_differentiated_again() -> None:
    """The gradient that backward gets is a function of the input, too."""

    def derivatives(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        x = torch.linspace(-2, 2, 54, dtype=torch.float64).reshape(1, 6, 3, 3).requires_grad_()
        found, value = [], function(x, **STRONG).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            found.append(gradient.detach())
            value = gradient.sin().sum()
        return found

    for actual, expected in zip(
        derivatives(local_response_norm), derivatives(reference.local_response_norm), strict=True
    ):
        torch.testing.assert_close(actual, expected)
