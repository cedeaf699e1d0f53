from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    assert_close,
    every_format,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import within_map_response_norm

STRONG = {"alpha": 2.0, "k": 1.5}


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_stay_inside_their_window(value, memory_format, device, backend):
    x = random((2, 20, 12, 11), torch.float32, memory_format, device)
    x[0, 0, 0, 0] = x[1, 17, 6, 5] = value
    out = within_map_response_norm(x, **STRONG, backend=backend)
    assert_close(out, reference.within_map_response_norm(x.double(), **STRONG))
    assert out.isnan().any()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_definition_by_its_formula(size: int) -> None:
    x = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    expected = torch.empty_like(x)
    for y, z in itertools.product(range(4), range(6)):
        top, left = max(0, y - size // 2), max(0, z - size // 2)
        near = x[0, 0, top : y + (size - 1) // 2 + 1, left : z + (size - 1) // 2 + 1]
        expected[0, 0, y, z] = x[0, 0, y, z] / (1.5 + 0.7 / size**2 * near.square().sum()) ** 0.6
    actual = reference.within_map_response_norm(x, size, alpha=0.7, beta=0.6, k=1.5)
    torch.testing.assert_close(actual, expected)
