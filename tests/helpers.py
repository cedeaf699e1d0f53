"""Shared by the tests: inputs, tolerances, and the comparison with the definitions in float64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from alexnet_kernels import AlexNet, use_backend
from alexnet_kernels.op_info import Maker
from alexnet_kernels.op_info._record import TOLERANCES

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_IDS = {dtype: name for name, dtype in DTYPES.items()}

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())


def benchmark(name: str) -> ModuleType:
    """Imports the script benchmarks/<name>.py."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def random(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
    scale: float = 1.0,
) -> Tensor:
    """Normal deviates, the same on every device."""
    return Maker(dtype, memory_format, device)(*shape, scale=scale)


def assert_close(
    actual: Tensor, expected: Tensor, *, slack: str = "sums", what: str = "", allowed: float = 0.0
) -> None:
    """Asserts closeness to a float64 tensor; NaN and infinities must agree.

    Args:
        slack: the field of Tolerance that bounds the error relative to the largest element.
        allowed: an absolute error that is always accepted.
    """
    tolerance = TOLERANCES[actual.dtype]
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        expected.detach().double(),
        rtol=tolerance.relative,
        atol=max(largest * getattr(tolerance, slack), allowed),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def assert_same(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], what: str = "") -> None:
    """Asserts equal values; NaN equals NaN."""
    if not isinstance(actual, Tensor):
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{what}[{i}]")
        return
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_format(actual: Tensor, memory_format: torch.memory_format, what: str = "") -> None:
    assert actual.is_contiguous(memory_format=memory_format), f"{what}: {memory_format}, strides {actual.stride()}"


def upcast(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def gradients(out: Tensor, inputs: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad), strict=True))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def check_gradients(function: Callable[..., Any], inputs: Iterable[Tensor], *, twice: bool = True) -> None:
    """Compares first, and with `twice` second, derivatives with numerical ones in float64."""
    leaves = tuple(x.detach().double().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, leaves)
    if twice:
        assert torch.autograd.gradgradcheck(function, leaves)


def forward_backward(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output, and every input's gradient for an output gradient that depends on the output's shape alone."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def check_repeatable(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    threads: Callable[[int], None],
    *,
    across: bool = True,
) -> None:
    """Asserts bitwise identical outputs and gradients in every run; with `across`, for one thread and for two."""
    threads(1)
    alone = forward_backward(function, *inputs)
    assert_same(forward_backward(function, *inputs), alone, "one thread, second run")
    threads(2)
    first = alone if across else forward_backward(function, *inputs)
    for run in range(3):
        assert_same(forward_backward(function, *inputs), first, f"two threads, run {run}")


def check_compiled(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    compiler: str = "aot_eager",
    *,
    dynamic: bool = True,
) -> None:
    """Asserts that torch.compile captures the whole function, and computes bitwise identical results.

    inductor fuses torch's own operators, so that its results may differ by rounding. With `dynamic`, checks dynamic
    shapes for two batch sizes as well.
    """

    def same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        if compiler == "inductor":
            torch.testing.assert_close(actual, expected, msg=lambda text: f"{what}: {text}")
        else:
            assert_same(actual, expected, what)

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    same(forward_backward(compiled, *inputs), forward_backward(function, *inputs), "compiled")
    if dynamic:
        compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
        wider = [torch.cat([inputs[0], inputs[0]]), *inputs[1:]]
        for tensors in (inputs, wider):
            same(forward_backward(compiled, *tensors), forward_backward(function, *tensors), "dynamic")


def raises(error: type[Exception], match: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=match):
        call()


def check_network(preset: str, backend: str) -> None:
    """Compares an AlexNet's logits and gradients by a backend with those by PyTorch's own operators."""
    model = AlexNet(num_classes=5, preset=preset, width=0.17).eval()
    images = random((2, 3, 71, 71), memory_format=torch.channels_last)
    results = []
    for name in (backend, "native"):
        model.zero_grad()
        with use_backend(name):
            logits = model(images)
            logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-12)
