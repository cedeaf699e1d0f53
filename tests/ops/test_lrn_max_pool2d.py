from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    check_compiled,
    every_format,
    forward_backward,
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


def test_compiles_with_inductor(device, fresh_dynamo):
    x = random((2, 20, 7, 9), torch.float32, torch.channels_last, device)
    check_compiled(lambda x: lrn_max_pool2d(x, **STRONG, relu=True), [x], compiler="inductor")
