"""The CUDA kernels emulated on the CPU: launches, thread order, networks, unaligned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import FORMATS, assert_close, assert_same, check_network, every_format, forward_backward

from alexnet_kernels import AlexNet, ops, optim, reference, use_backend
from alexnet_kernels.op_info import OP_INFOS

try:
    import emulation
except ImportError:
    emulation = None

pytestmark = pytest.mark.skipif(
    emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
)


@pytest.fixture(autouse=True)
def module() -> Iterator[object]:
    with emulation.emulated() as module:
        yield module


@pytest.fixture
def launches(module) -> Callable[[], int]:
    """Returns how many kernels were launched since its last call."""
    before = module.last_launch()["launches"]

    def count() -> int:
        nonlocal before
        now = module.last_launch()["launches"]
        before, new = now, now - before
        return new

    return count


@pytest.fixture
def order(module) -> Iterator[Callable[[int], None]]:
    yield module.set_order
    module.set_order(0)


def image(*shape: int, memory_format: torch.memory_format, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def on_images(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    info = OP_INFOS[name]
    assert info.on_images is not None
    return lambda x: info.op(**info.on_images(x))


# Ops that run this package's kernels only.
OPS = {name: on_images(name) for name, info in OP_INFOS.items() if info.on_images and not info.casts}
OPS["even window"] = lambda x: ops.local_response_norm(x, 4, alpha=0.1)


@every_format
@pytest.mark.parametrize("op", OPS)
def test_the_order_of_threads_changes_no_bit(op: str, memory_format: torch.memory_format, order) -> None:
    x = image(3, 48, 11, 9, memory_format=memory_format)
    with use_backend("cuda"):
        expected = forward_backward(OPS[op], x)
        for seed in (1, 2, 3):
            order(seed)
            assert_same(forward_backward(OPS[op], x), expected, f"order {seed}")


def test_what_is_fused_is_one_launch(launches) -> None:
    x = image(2, 96, 13, 13, memory_format=torch.channels_last).requires_grad_()
    fused = {op: OPS[op] for op in ("max_pool2d", "local_response_norm", "lrn_max_pool2d", "dropout")}
    with use_backend("cuda"):
        for op, function in fused.items():
            launches()
            out = function(x)
            assert launches() == 1, op
            out.float().sum().backward()
            assert launches() == 1, f"{op} backward"


def test_a_step_over_all_parameters_is_one_launch(launches) -> None:
    model = AlexNet(num_classes=7, width=0.1)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, rule="paper")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with use_backend("cuda"):
        optimizer.step()
    assert launches() == 1


@pytest.mark.parametrize("shard", [None, (1, 3, 20), (0, 2, 11)], ids=["whole", "columns", "rows"])
@pytest.mark.parametrize("shape", [(6, 7), (4, 16), (3, 8, 5, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS.keys())
def test_dropout_draws_the_bits_of_the_cpu_kernel(shape, shard, memory_format) -> None:
    x = torch.randn(shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    settings = {"p": 0.3, "seed": -5, "offset": 2**40 + 3, "shard": shard}
    assert_same(ops.dropout(x, **settings, backend="cuda"), ops.dropout(x, **settings, backend="cpu"))


@pytest.mark.parametrize("preset", ["paper", "as_run", "caffenet", "batchnorm"])
def test_the_network_equals_pytorchs_own_operators(preset: str) -> None:
    check_network(preset, "cuda")


def test_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="backend 'cuda' takes float32, bfloat16 and float16, not"):
        ops.max_pool2d(torch.zeros(1, 1, 5, 5, dtype=torch.float64), backend="cuda")


def test_memory_that_is_not_aligned(launches) -> None:
    x = torch.randn(1 + 2 * 16 * 7 * 7)[1:].view(2, 7, 7, 16).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.data_ptr() % 16 != 0
    for op in OPS:
        expected = forward_backward(lambda x, op=op: OPS[op](x), x.clone())
        with use_backend("cuda"):
            launches()
            actual = forward_backward(lambda x, op=op: OPS[op](x), x)
            assert launches() >= 2
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


class TestPools:
    @pytest.mark.parametrize("op", ["max_pool2d", "lrn_max_pool2d"])
    @pytest.mark.parametrize("channels", [8, 28], ids=["one vector a pixel", "seven"])
    def test_sums_of_the_bias_over_many_steps(self, op: str, channels: int, launches: Callable[[], int]) -> None:
        """More steps than blocks: each block takes several, and a second launch adds the sums of the blocks."""
        height, width = (760, 720) if channels == 8 else (361, 415)
        x = image(1, channels, height, width, memory_format=torch.channels_last, dtype=torch.float32)
        bias = torch.randn(channels).requires_grad_()
        arguments = {"alpha": 0.5} if op == "lrn_max_pool2d" else {}
        out = getattr(ops, op)(x.requires_grad_(), bias=bias, relu=True, backend="cuda", **arguments)
        grad = torch.randn_like(out)
        assert launches() == 1
        grad_input, grad_bias = torch.autograd.grad(out, [x, bias], grad)
        assert launches() == 2
        expected = grad_input.double().sum((0, 2, 3))
        torch.testing.assert_close(grad_bias.double(), expected, rtol=1e-5, atol=1e-3)
        again = torch.autograd.grad(getattr(ops, op)(x, bias=bias, relu=True, backend="cuda", **arguments), bias, grad)
        assert_same(again[0], grad_bias)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize(
        ("channels", "height", "width"),
        [(8, 3, 3), (16, 9, 200), (96, 31, 19), (480, 5, 9), (1280, 3, 5), (2048, 5, 3), (4096, 3, 4)],
    )
    def test_tiles_of_any_width(self, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
        """From many columns in a block of few channels to more channels than a block takes."""
        x = image(2, channels, height, width, memory_format=torch.channels_last, dtype=dtype)
        bias = torch.randn(channels)
        for padding, ceil_mode in ((0, False), (1, False), (0, True), (1, True)):
            arguments = {"alpha": 0.5, "padding": padding, "ceil_mode": ceil_mode, "relu": True}
            leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
            out = ops.lrn_max_pool2d(leaves[0], bias=leaves[1], **arguments, backend="cuda")
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            expected = reference.lrn_max_pool2d(wide[0], bias=wide[1], **arguments)
            assert_close(out, expected)
            others = torch.autograd.grad(expected, wide, torch.ones_like(expected))
            # A tie of rounded values may go to another pixel.
            for grad, other in zip(grads, others, strict=True):
                wrong = (grad.double() - other).abs() > 0.02 * other.abs().max()
                assert wrong.double().mean() < 0.002
