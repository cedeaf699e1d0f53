"""FusedSequential on backend "cuda": a pool adds the bias of the convolution before it, and sums its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused import assert_same_function, conv, lrn, plain, pool
from platforms import emulation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels import use_backend
from alexnet_kernels.nn import FusedSequential, runs

pytestmark = pytest.mark.skipif(
    emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
)

RUNS: dict[str, tuple[Callable[[], list[nn.Module]], str, bool]] = {
    "conv-relu-lrn-pool": (lambda: [conv(), nn.ReLU(), lrn(), pool()], "lrn_max_pool2d", True),
    "conv-relu-pool": (lambda: [conv(), nn.ReLU(True), pool()], "max_pool2d", True),
    "conv-lrn-pool": (lambda: [conv(), lrn(), pool()], "lrn_max_pool2d", False),
    "conv-pool-relu": (lambda: [conv(), pool(), nn.ReLU(True)], "max_pool2d", True),
    "conv-pool": (lambda: [conv(), pool()], "max_pool2d", False),
}
every_run = pytest.mark.parametrize("run", RUNS)


@pytest.fixture(autouse=True)
def cuda() -> Iterator[None]:
    with emulation.emulated(), use_backend("cuda"):
        yield


class Recorder(TorchDispatchMode):
    """Records the operators of the kernels and torch's convolutions, with their arguments."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        # What else there is copies and rounds nothing but the gradient of a sum, and detaches.
        if namespace == emulation.NAMESPACE or "conv" in name or "relu" in name or "add" in name or "sum" in name:
            self.calls.append((name, args))
        return func(*args, **kwargs or {})


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 8, 13, 13)).to(dtype).contiguous(memory_format=torch.channels_last)


def children(run: str) -> list[nn.Module]:
    return [conv(8), *RUNS[run][0]()[1:]]


@every_run
def test_the_pool_adds_the_bias(run: str) -> None:
    fused = FusedSequential(*children(run))
    _, op, relu = RUNS[run]
    with Recorder() as recorder:
        out = fused(images().requires_grad_())
    assert [name for name, _ in recorder.calls] == ["conv2d_relu", op]
    (_, convolution), (_, pooling) = recorder.calls
    assert convolution[2] is None
    assert convolution[-1] is False
    assert pooling[1].data_ptr() == fused[0].bias.data_ptr()
    assert pooling[-1] is relu
    with Recorder() as recorder:
        out.backward(torch.ones_like(out))
    assert [name for name, _ in recorder.calls] == [f"{op}_backward", "convolution_backward"]
    backward = recorder.calls[1][1]
    assert backward[3] is None
    assert backward[-1] == [True, True, False]


@every_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_values_and_gradients(run: str, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    fused = FusedSequential(*children(run))
    # Exact in bfloat16, so that what differs was rounded on the way.
    for parameter in fused.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).float() / 8
    x = torch.randint(-2, 3, (2, 8, 13, 13)).float().contiguous(memory_format=torch.channels_last)
    exact = plain(fused).double()
    wide = x.double().requires_grad_()
    expected = exact(wide)
    grad = torch.randint(-4, 5, expected.shape).double()
    wanted = [g.clone() for g in torch.autograd.grad(expected, [wide, *exact.parameters()], grad)]
    fused.to(torch.float32 if autocast else dtype)
    x = x.to(torch.float32 if autocast else dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
        out = fused(x)
    assert out.dtype == dtype
    found = torch.autograd.grad(out, [x, *fused.parameters()], grad.to(out.dtype))
    assert [g.dtype for g in found] == [t.dtype for t in (x, *fused.parameters())]
    slack = 1e-5 if dtype == torch.float32 else 0.03
    for actual, right in zip((out, *found), (expected, *wanted), strict=True):
        error = (actual.double() - right).abs().max() / right.abs().max()
        assert error <= slack


def test_a_float32_bias_is_not_rounded_under_autocast() -> None:
    fused = FusedSequential(nn.Conv2d(8, 8, 1), nn.ReLU(), pool())
    nn.init.zeros_(fused[0].weight)
    fused[0].bias.data.fill_(1 + 2**-9 + 2**-12)  # rounds down to 1 in bfloat16 by itself
    fused[0].weight.data[:, 0] = 2.0**-8
    x = images().fill_(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (fused(x) == 1 + 2**-7).all()  # 1 + 2^-9 + 2^-12 + 2^-9 rounds up


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: setattr(layers[0], "bias", None),
        lambda layers: layers[1].register_forward_hook(lambda *_: None),
        lambda layers: layers[2].register_full_backward_hook(lambda *_: None),
    ],
    ids=["without-bias", "hook-on-relu", "hook-on-pool"],
)
def test_where_the_convolution_keeps_its_bias(change: Callable[[nn.Sequential], Any]) -> None:
    fused = FusedSequential(conv(8), nn.ReLU(), pool())
    change(fused)
    with Recorder() as recorder:
        fused(images())
    pools = [args for name, args in recorder.calls if name == "max_pool2d"]
    assert all(args[1] is None for args in pools)
    exact = FusedSequential(*fused).double()
    with use_backend("native"):
        assert_same_function(exact, plain(exact), images(dtype=torch.float64))


@pytest.mark.parametrize("chosen", ["cpu", "native"])
def test_other_backends_leave_the_bias_to_the_convolution(chosen: str) -> None:
    fused = FusedSequential(conv(8), nn.ReLU(), pool())
    seen: list[Any] = []
    original = runs.max_pool2d
    with pytest.MonkeyPatch.context() as patch, use_backend(chosen):
        patch.setattr(runs, "max_pool2d", lambda *args, **kwargs: seen.append(kwargs) or original(*args, **kwargs))
        fused(images())
    assert [kwargs["bias"] for kwargs in seen] == [None]


def test_a_bias_of_another_dtype_is_refused_as_ever() -> None:
    fused = FusedSequential(conv(8).to(torch.bfloat16), nn.ReLU(), pool())
    fused[0].bias.data = fused[0].bias.data.float()
    with pytest.raises(TypeError, match=r"conv2d_relu: bias is torch.float32, but the input is torch.bfloat16"):
        fused(images(dtype=torch.bfloat16))


@every_run
def test_compiled(run: str, fresh_dynamo: None) -> None:
    fused = FusedSequential(*children(run))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = images()
    results = []
    for module in (fused, compiled):
        fused.zero_grad()
        out = module(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in fused.parameters())])
    for eager, captured in zip(*results, strict=True):
        assert torch.equal(eager, captured)


def test_functional_call_takes_its_own_bias() -> None:
    fused = FusedSequential(conv(8), nn.ReLU(), pool())
    given = {name: torch.randn_like(value) for name, value in fused.named_parameters()}
    x = images()
    other = FusedSequential(conv(8), nn.ReLU(), pool())
    other.load_state_dict(given)
    assert torch.equal(torch.func.functional_call(fused, given, (x,)), other(x))
