"""Random arguments: every op equals its definition, whatever path its kernels take; every geometry of a pool is right.

`pytest --fuzz N` multiplies the number of arguments by N.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from contract import Case, check, expected, map_tensors, restride, runs
from helpers import FORMATS
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info import OP_INFOS, OpInfo, Sample, Setting

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.slow

EXAMPLES = {"cpu": 400, "cuda": 80, "triton": 4}
"""Of each op, by backend. Without a GPU, CUDA is emulated and Triton interpreted."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def skip_native(backend: str) -> None:
    if backend not in EXAMPLES:
        pytest.skip("PyTorch's own operators")


@st.composite
def cases(draw: st.DrawFn, info: OpInfo, device: str, backend: str) -> tuple[Sample, Setting, str]:
    """Arguments, where they are computed, and the layout of the first tensor."""
    sample = info.domain(lambda values: draw(st.sampled_from(values)))
    dtype = draw(st.sampled_from([dtype for dtype in DTYPES if info.takes(sample, dtype)]))
    memory_format = draw(st.sampled_from(list(FORMATS.values()))) if info.images else torch.contiguous_format
    setting = Setting(backend, device, dtype, memory_format)
    assume(runs(setting))
    return sample, setting, draw(st.sampled_from(("", "", "sliced", "transposed", "offset")))


@pytest.mark.parametrize("op", OP_INFOS)
def test_random_arguments_equal_the_definition(op: str, device: str, backend: str, fuzz: int) -> None:
    info = OP_INFOS[op]
    skip_native(backend)

    @settings(
        max_examples=EXAMPLES[backend] * fuzz,
        deadline=None,
        database=None,
        derandomize=fuzz == 1,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(info, device, backend), st.integers(0, 2**32))
    def run(drawn: tuple[Sample, Setting, str], seed: int) -> None:
        sample, setting, layout = drawn
        case = Case(info, sample, setting)
        torch.manual_seed(seed)
        inputs = case.inputs()
        if layout:
            first = next(name for name, value in inputs.items() if isinstance(value, Tensor | list))
            if first not in info.modifies:
                inputs[first] = map_tensors(lambda t: restride(t, layout), inputs[first])
        try:
            info.call(**inputs, backend=backend)
        except ValueError:
            reject()
        check(case, expected(info, inputs), formats=False)

    run()


def windows(kernels: range, strides: range) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding along one axis."""
    return [(k, s, p) for k in kernels for s in strides for p in range(k // 2 + 1)]


Pair = tuple[int, int]


def pool_of(op: str, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, backend: str) -> Tensor:
    """The pool of the input itself: a normalisation with alpha = 0 and k = 1 changes nothing."""
    if op == "max_pool2d":
        return ops.max_pool2d(input, kernel, stride, padding, ceil_mode, backend=backend)
    return ops.lrn_max_pool2d(input, 5, 0.0, 0.75, 1.0, 1, kernel, stride, padding, ceil_mode, backend=backend)


@pytest.mark.parametrize("op", ["max_pool2d", "lrn_max_pool2d"])
def test_shapes_of_every_small_pool(op: str, device: str, backend: str) -> None:
    """Those of torch; what torch refuses is refused."""
    wrong = []
    sides = range(1, 4 if backend == "triton" else 9)
    for size, (kernel, stride, padding), ceil_mode in itertools.product(range(8), windows(sides, sides), (False, True)):
        arguments = torch.zeros(1, 1, size, 1, device=device), (kernel, 1), (stride, 1), (padding, 0)
        try:
            expected_shape = F.max_pool2d(*arguments, ceil_mode=ceil_mode).shape
        except RuntimeError:
            expected_shape = None
        shape = reference.pool_output_size(size, kernel, stride, padding, ceil_mode)
        try:
            given_shape = pool_of(op, *arguments, ceil_mode, backend).shape
        except ValueError:
            given_shape = None
        if given_shape != expected_shape or (size and shape >= 1 and (1, 1, shape, 1) != expected_shape):
            wrong.append((size, kernel, stride, padding, ceil_mode))
    assert wrong == []


@pytest.mark.parametrize("op", ["max_pool2d", "lrn_max_pool2d"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_geometries_of_pools(op: str, device: str, backend: str, memory_format: torch.memory_format, fuzz: int) -> None:
    """Sizes 1 to 7, kernels and strides up to 5 and every padding, drawn at random from a fixed seed."""
    skip_native(backend)
    axes = [
        (size, *window)
        for size, window in itertools.product(range(1, 8), windows(range(1, 6), range(1, 6)))
        if size + 2 * window[2] >= window[0]
    ]
    chance = random.Random(fuzz)
    wrong = []
    for _ in range(EXAMPLES[backend] * 4 * fuzz):
        (h, *rows), (w, *columns) = chance.choice(axes), chance.choice(axes)
        kernel, stride, padding = zip(rows, columns, strict=True)
        channels, dtype = chance.choice((1, 3, 8, 17, 40)), chance.choice((torch.float32, torch.bfloat16))
        ceil_mode = chance.random() < 0.5
        # Distinct in bfloat16 too, so that every winner is certain; integers, so that every sum of gradients is exact.
        values = torch.randperm(255)[torch.arange(2 * channels * h * w) % 255] - 127
        x = values.reshape(2, channels, h, w).to(device, dtype).contiguous(memory_format=memory_format)
        results = []
        for function in (pool_of, torch_pool):
            leaf = x.detach().requires_grad_()
            output = function(op, leaf, kernel, stride, padding, ceil_mode, backend)
            grad = torch.arange(output.numel()).reshape(output.shape) % 7 - 3
            results.append((output.detach(), *torch.autograd.grad(output, leaf, grad.to(x))))
        if not all(map(torch.equal, *results)):
            wrong.append((list(x.shape), dtype, kernel, stride, padding, ceil_mode))
    assert wrong == []


def torch_pool(
    op: str, input: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, backend: str
) -> Tensor:
    return F.max_pool2d(input.contiguous(), kernel, stride, padding, ceil_mode=ceil_mode)
