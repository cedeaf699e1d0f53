"""Tests that need a GPU: graphs, streams, devices, tensors of more than 2^31 elements, compilation, cuDNN."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from torch import Tensor

from alexnet_kernels import AlexNet, backends, ops, optim, unfuse, use_backend
from alexnet_kernels._dispatch import choices, tuned
from alexnet_kernels.bench import tuning
from alexnet_kernels.capture import CapturedForward, CapturedStep
from alexnet_kernels.interop import dynamo_backend
from alexnet_kernels.op_info import OP_INFOS, OpInfo
from alexnet_kernels.ops.conv2d_relu import LIBRARY, MMA, WGMMA, conv2d_relu_by

DEVICE = "cuda"
pytestmark = pytest.mark.gpu

every_backend = pytest.mark.parametrize("chosen", ["cuda", "triton"])


def seed() -> Tensor:
    return torch.tensor(11, device=DEVICE)


def on_images(info: OpInfo) -> Callable[[Tensor], Tensor]:
    assert info.on_images is not None
    return lambda x: info.op(**info.on_images(x))


def strided(x: Tensor) -> Tensor:
    x = x[:, :3]
    return ops.conv2d_relu(x, torch.ones(8, 3, 5, 5, device=x.device, dtype=x.dtype) / 64, stride=2)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d_relu, strided": strided,
    **{name: on_images(info) for name, info in OP_INFOS.items() if info.on_images},
}
every_op = pytest.mark.parametrize("op", OPS)


def need(op: str, backend: str) -> None:
    if reason := backends.unavailable(op.partition(",")[0], backend):
        pytest.skip(f"{backend}: {reason}")


def images(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def assert_agree(actual: Sequence[Tensor], expected: Sequence[Tensor], op: str) -> None:
    """Asserts bitwise identity, or closeness for ops whose libraries may choose different algorithms."""
    if op.startswith(("conv2d_relu", "linear_relu_dropout")):
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0.02, atol=0.01 * e.abs().max().item())
    else:
        assert_same(actual, expected, op)


def forward_backward(op: str, x: Tensor) -> tuple[Tensor, Tensor]:
    out = OPS[op](x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return out.detach(), grad


def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of the function, and the tensors that its replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@every_backend
@every_op
def test_a_captured_graph_computes_anew(op: str, chosen: str) -> None:
    need(op, chosen)
    x = images(2, 16, 9, 9).requires_grad_()
    with use_backend(chosen):
        graph, results = captured(lambda: forward_backward(op, x))
        for _ in range(2):
            with torch.no_grad():
                x.copy_(images(2, 16, 9, 9))
            graph.replay()
            assert_agree(results, forward_backward(op, x), op)


@every_backend
def test_captured_dropout_follows_its_seed(chosen: str) -> None:
    need("dropout", chosen)
    x, key = torch.ones(3, 1000, device=DEVICE), seed()
    graph, (out,) = captured(lambda: (ops.dropout(x, seed=key, backend=chosen),))
    masks = []
    for value in (11, -3, 2**62 + 1):
        key.fill_(value)
        graph.replay()
        expected = ops.dropout(torch.ones(3, 1000), seed=value, backend="cpu")
        assert_same(out.cpu(), expected)
        masks.append(out.clone())
    assert not torch.equal(masks[0], masks[1])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 1003), (4, 24, 7, 5), (1, 1)], ids=str)
def test_dropout_draws_the_bits_of_the_cpu(chosen: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    need("dropout", chosen)
    x = torch.randn(shape).to(dtype)
    for layout in ("contiguous", "channels_last"):
        y = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.dim() == 4 else x
        actual = ops.dropout(y.to(DEVICE), 0.3, seed=-9, offset=2**33, backend=chosen)
        assert_same(actual.cpu(), ops.dropout(y, 0.3, seed=-9, offset=2**33, backend="cpu"))


@every_backend
def test_a_captured_graph_augments_anew(chosen: str) -> None:
    need("augment", chosen)

    def batch() -> list[Tensor]:
        values = [torch.randint(256, (3, 20, 24, 3), dtype=torch.uint8), torch.randint(5, (3, 2))]
        values += [torch.randint(2, (3,)) > 0, torch.randn(3, 3), torch.rand(3, 16, 18) * 255]
        return [value.to(DEVICE) for value in values]

    def augmented(images: Tensor, crops: Tensor, *options: Tensor) -> tuple[Tensor, ...]:
        return (ops.augment(images, crops, (16, 18), *options, dtype=torch.bfloat16, backend=chosen),)

    inputs = batch()
    graph, results = captured(lambda: augmented(*inputs))
    for _ in range(2):
        for kept, new in zip(inputs, batch(), strict=True):
            kept.copy_(new)
        graph.replay()
        assert_same(results, augmented(*inputs))


@every_backend
def test_a_captured_graph_updates_running_statistics(chosen: str) -> None:
    need("batch_norm_relu", chosen)
    x = images(4, 16, 9, 9, dtype=torch.float32)

    def statistics() -> list[Tensor]:
        return [torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE)]

    def normalised(running: list[Tensor]) -> tuple[Tensor, ...]:
        return (ops.batch_norm_relu(x, *running, training=True, backend=chosen),)

    replayed, expected = statistics(), statistics()
    graph, _ = captured(lambda: normalised(replayed))
    for tensor, start in zip(replayed, expected, strict=True):
        tensor.copy_(start)
    for _ in range(2):
        x.copy_(images(4, 16, 9, 9, dtype=torch.float32))
        graph.replay()
        normalised(expected)
        assert_same(replayed, expected)


@every_backend
@every_op
def test_runs_on_the_current_stream(op: str, chosen: str) -> None:
    need(op, chosen)
    x, new = images(4, 16, 27, 27).requires_grad_(), images(4, 16, 27, 27).requires_grad_()
    with use_backend(chosen):
        expected = forward_backward(op, new)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # cycles; a kernel on another stream would read the old x
            with torch.no_grad():
                x.copy_(new)
            results = forward_backward(op, x)
        stream.synchronize()
        assert_agree(results, expected, op)


@every_backend
@every_op
def test_runs_on_the_device_of_its_input(op: str, chosen: str) -> None:
    need(op, chosen)
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = images(2, 16, 9, 9)
    with use_backend(chosen), torch.no_grad():
        expected = OPS[op](x)
        out = OPS[op](x.to("cuda:1"))
    assert out.device.index == 1
    assert torch.cuda.current_device() == 0
    assert_agree([out.to("cuda:0")], [expected], op)


@every_backend
@every_op
def test_repeats_bitwise_at_full_size(op: str, chosen: str) -> None:
    need(op, chosen)
    x = images(32, 96, 27, 27).requires_grad_()
    with use_backend(chosen):
        first = forward_backward(op, x)
        for _ in range(3):
            assert_same(forward_backward(op, x), first, op)


@pytest.fixture
def memory_alone() -> Iterator[None]:
    """Serialises tests of all processes that fill much of the device's memory."""
    with open(Path(tempfile.gettempdir()) / "alexnet_kernels_memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@every_backend
@pytest.mark.parametrize("op", ["max_pool2d", "local_response_norm", "lrn_max_pool2d", "dropout"])
def test_more_elements_than_31_bits_count(op: str, chosen: str, memory_alone: None) -> None:
    need(op, chosen)
    count = 2**31 // (96 * 55 * 55) + 3
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    x = torch.empty(count, 96, 55, 55, device=DEVICE, dtype=torch.bfloat16, memory_format=torch.channels_last)
    x.normal_().requires_grad_()
    assert x.numel() > 2**31
    with use_backend(chosen):
        out, grad = forward_backward(op, x)
        for start in (0, count - 2):
            part = slice(start, start + 2)
            if op == "dropout":  # drawn by the element's number
                kept = x[part].detach().cpu().requires_grad_()
                expected = ops.dropout(kept, seed=5, shard=(0, start, count), backend="cpu")
                (slope,) = torch.autograd.grad(expected, kept, torch.ones_like(expected))
                assert_same((out[part].cpu(), grad[part].cpu()), (expected.detach(), slope), op)
            else:
                few = x[part].detach().requires_grad_()
                assert_same((out[part], grad[part]), forward_backward(op, few), op)


@pytest.mark.parametrize("preset", ["paper", "as_run", "torchvision", "batchnorm"])
def test_compiles_as_one_graph(preset: str, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    model = AlexNet(num_classes=10, preset=preset, width=0.25).to(DEVICE).eval()
    x = images(2, 3, 96, 96, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(x)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item() + 1e-12)


@pytest.mark.parametrize("inductor", [True, False], ids=["inductor", "alone"])
@pytest.mark.parametrize("preset", ["paper", "batchnorm"])
def test_fuses_plain_layers_in_torch_compile(preset: str, inductor: bool, fresh_dynamo: None) -> None:
    model = unfuse(AlexNet(10, preset, width=0.1)).to(DEVICE, memory_format=torch.channels_last).eval()
    compiled = torch.compile(model, backend=dynamo_backend, options={} if inductor else {"inductor": False})
    for batch in (4, 6):
        x = images(batch, 3, 224, 224, dtype=torch.float32)
        results = []
        for function in (compiled, model):
            model.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                out = function(x)
            out.float().square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
        assert_agree(*results, "conv2d_relu")


@pytest.mark.parametrize("chosen", ["auto", "cuda", "triton", "native"])
@pytest.mark.parametrize("preset", ["paper", "as_run", "caffenet", "torchvision", "batchnorm"])
def test_the_network_equals_float64(preset: str, chosen: str) -> None:
    need("max_pool2d", chosen)
    torch.manual_seed(0)
    model = AlexNet(num_classes=10, preset=preset, width=0.25).eval()
    x = torch.randn(2, 3, 96, 96)

    def run(model: AlexNet, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        return [t.detach().double().cpu().clone() for t in (logits, *(p.grad for p in model.parameters()))]

    with use_backend("native"):
        expected = run(model.double(), x.double())
    with use_backend(chosen):
        actual = run(model.float().to(DEVICE), x.to(DEVICE).contiguous(memory_format=torch.channels_last))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3 * e.abs().max().item() + 1e-12)


@pytest.mark.parametrize("chosen", ["auto", "cuda", "triton"])
def test_a_training_step_in_a_graph(chosen: str) -> None:
    need("max_pool2d", chosen)
    x, labels = images(4, 3, 96, 96, dtype=torch.float32), torch.arange(4, device=DEVICE)

    def trained(graphed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = AlexNet(num_classes=10, preset="paper", width=0.25, dropout=0.0).to(DEVICE)
        optimizer = optim.SGD(model.parameters(), lr=torch.tensor(1e-3, device=DEVICE), momentum=0.9, rule="paper")

        def step() -> tuple[Tensor, ...]:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            return (loss,)

        with use_backend(chosen):
            if graphed:
                graph, _ = captured(step)  # three steps to warm up; capturing takes none
                for _ in range(2):
                    graph.replay()
            else:
                for _ in range(5):
                    step()
        return [p.detach().clone() for p in model.parameters()]

    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for actual, expected in zip(trained(True), trained(False), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    finally:
        torch.backends.cudnn.deterministic = deterministic


STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "accumulated": {"dtype": torch.bfloat16, "accumulate": 3},
    "clipped": {"max_norm": 0.5},
}


@pytest.mark.parametrize("options", STEPS.values(), ids=STEPS)
def test_the_captured_step_equals_the_plain_loop(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    need("max_pool2d", "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def augmented(stored: Tensor, crops: Tensor, flips: Tensor) -> Tensor:
        return ops.augment(stored, crops, 96, flips, scale=1 / 255)

    def trained(capture: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = AlexNet(10, "batchnorm", width=0.25).to(DEVICE, memory_format=torch.channels_last)
        optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.05, device=DEVICE))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        step = CapturedStep(model, optimizer, augment=augmented, capture=capture, **options)
        results: list[Tensor] = []
        for i in range(10):
            count = 5 if i == 7 else 8
            stored = torch.randint(256, (count, 110, 110, 3), dtype=torch.uint8).to(DEVICE)
            drawn = torch.randint(15, (count, 2)), torch.rand(count) < 0.5
            torch.manual_seed(i)
            results += step(stored, torch.arange(count), *drawn)
            results += [param.grad.clone() for param in model.parameters()]
            schedule.step()
        assert step.captured == capture
        return [
            *results,
            *model.state_dict().values(),
            *(optimizer.state[p]["momentum_buffer"] for p in model.parameters()),
        ]

    torch.use_deterministic_algorithms(True)
    expected = trained(False)
    assert all(value.isfinite().all() for value in expected)
    assert_same(trained(True), expected)


class Waiting(torch.nn.Module):
    def __init__(self, wait: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.wait = wait

    def forward(self, x: Tensor) -> Tensor:
        self.wait(x)
        return x


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lambda x: x.sum().item(), "it waits for the device, at .*test_gpu"),
        (lambda x: torch.cuda.synchronize(), "Error"),
    ],
    ids=["found before the capture", "fails in the capture"],
)
def test_a_step_that_can_not_be_captured_stays_a_plain_loop(wait: Callable[[Tensor], object], said: str) -> None:
    def trained(capture: bool | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), Waiting(wait), torch.nn.Dropout(), torch.nn.Linear(32, 5))
        optimizer = optim.SGD(model.to(DEVICE).parameters(), lr=torch.tensor(0.1, device=DEVICE))
        step = CapturedStep(model, optimizer, capture=capture)
        losses = [step(torch.ones(4, 64), torch.arange(4))[0] for _ in range(6)]
        assert step.captured == 0
        return [*losses, *model.parameters()]

    expected = trained(False)
    with pytest.warns(RuntimeWarning, match=said):
        assert_same(trained(None), expected)


def test_the_captured_forward_pass_follows_the_weights() -> None:
    need("max_pool2d", "cuda")
    model = AlexNet(10, "paper", width=0.25).to(DEVICE, memory_format=torch.channels_last).eval()
    forward = CapturedForward(model, capture=True, dtype=torch.bfloat16)
    kept = []
    for _ in range(5):
        x = images(3, 3, 96, 96, dtype=torch.float32)
        with torch.no_grad():
            model.classifier[-1].bias.add_(1)
            with torch.autocast(DEVICE, torch.bfloat16):
                kept.append((model(x), forward(x)))
    assert forward.captured == 1
    for expected, actual in kept:
        assert_same(actual, expected)


@every_backend
@pytest.mark.parametrize("rule", ["paper", "torch"])
def test_a_captured_step_follows_its_schedule(rule: str, chosen: str) -> None:
    need("sgd_step", chosen)

    def stepped(graphed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((10,), (64, 50))]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = optim.SGD(params, lr=torch.tensor(0.1, device=DEVICE), rule=rule)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step: Callable[[], object] = optimizer.step
        step()
        if graphed:
            start = [value.clone() for param in params for value in (param, optimizer.state[param]["momentum_buffer"])]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            values = [value for param in params for value in (param, optimizer.state[param]["momentum_buffer"])]
            for value, before in zip(values, start, strict=True):
                value.detach().copy_(before)
            step = graph.replay
        for _ in range(3):
            schedule.step()
            step()
        return [param.detach() for param in params]

    with use_backend(chosen):
        for actual, expected in zip(stepped(True), stepped(False), strict=True):
            torch.testing.assert_close(actual, expected)


@every_backend
def test_a_captured_step_refuses_a_rate_that_it_would_keep(chosen: str) -> None:
    need("sgd_step", chosen)
    tensors = [[torch.ones(5, device=DEVICE)] for _ in range(3)]
    refused = pytest.raises(RuntimeError, match=r"a CUDA graph would keep lr=0\.1")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        ops.sgd_step(*tensors, lr=0.1, backend=chosen)
    ops.sgd_step(*tensors, lr=0.1, backend=chosen)


@every_backend
def test_a_seed_on_the_cpu_does_not_wait_for_the_device(chosen: str) -> None:
    need("dropout", chosen)
    x = torch.ones(3, 1000)
    y = x.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ops.dropout(y, seed=torch.tensor(-7), backend=chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(out.cpu(), ops.dropout(x, seed=-7, backend="cpu"))


@pytest.mark.parametrize("chosen", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_repeats_bitwise(dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("max_pool2d", chosen)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, labels = images(16, 3, 224, 224, dtype=torch.float32), torch.arange(16, device=DEVICE) % 10

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model = AlexNet(num_classes=10, preset="paper", width=0.5).to(DEVICE, memory_format=torch.channels_last)
        optimizer = optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(10):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return [loss.detach(), *(p.detach() for p in model.parameters())]

    torch.use_deterministic_algorithms(True)  # an operator that can't repeat raises
    with use_backend(chosen):
        first = trained()
        assert first[0].isfinite()
        assert_same(trained(), first)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layer", [(96, 3, 11, 4, 2, 1, 64), (64, 48, 5, 1, 2, 2, 13), (48, 32, 3, 1, 1, 1, 13)], ids=str
)
def test_convolutions_equal_cudnn(layer: tuple[int, ...], dtype: torch.dtype, chosen: str) -> None:
    need("conv2d_relu", chosen)
    filters, channels, kernel, stride, padding, groups, size = layer
    x = images(2, channels * groups, size, size, dtype=dtype)
    weight = (torch.randn(filters, channels, kernel, kernel) / (channels * kernel**2) ** 0.5).to(DEVICE, dtype)
    bias = torch.randn(filters).to(DEVICE, dtype)
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    results = []
    for name in (chosen, "native"):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = ops.conv2d_relu(*leaves, stride, padding, groups, backend=name)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape).to(dtype)
        kept = grad * (results[0][0] > 0.05 if results else out > 0.05)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, kept)))
    for actual, expected in zip(*results, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=4 * tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", [LIBRARY, MMA, WGMMA], ids=["library", "mma.sync", "wgmma"])
@pytest.mark.parametrize(
    "layer",
    [(64, 48, 5, 1, 2, 2, 27), (384, 256, 3, 1, 1, 1, 13), (128, 192, 3, 1, 1, 2, 13), (24, 7, 3, 2, 1, 1, 9)],
    ids=str,
)
def test_convolutions_by_every_algorithm(layer: tuple[int, ...], algorithm: int, dtype: torch.dtype) -> None:
    need("conv2d_relu", "cuda")
    filters, channels, kernel, stride, padding, groups, size = layer
    if algorithm == WGMMA and (
        dtype == torch.float32 or channels % 8 or stride > 1 or torch.cuda.get_device_capability() != (9, 0)
    ):
        pytest.skip("wgmma takes no such convolution here")
    x = images(3, channels * groups, size, size, dtype=dtype)
    scale = (channels * kernel**2) ** -0.5
    weight = (torch.randn(filters, channels, kernel, kernel) * scale).to(DEVICE, dtype)
    bias = torch.randn(filters).to(DEVICE, dtype)
    out = conv2d_relu_by(algorithm, x, weight, bias, stride, padding, groups, backend="cuda")
    exact, terms = (
        F.conv2d(f(x.cpu().double()), f(weight.cpu().double()), f(bias.cpu().double()), stride, padding, 1, groups)
        for f in (lambda t: t, torch.abs)
    )
    # cuDNN rounds before the bias is added as well; TF32 rounds each operand to 11 bits.
    roundings = 2 if algorithm == LIBRARY else 1
    error = (out.cpu().double() - exact.relu()).abs()
    allowed = torch.finfo(dtype).eps / 2 * roundings * (exact.abs() + (algorithm == LIBRARY) * bias.abs().max().item())
    assert (error <= allowed + (2**-10 if dtype == torch.float32 and algorithm == MMA else 1e-5) * terms).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_tables_choice(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """conv2 by Triton forward, as the package's table has it on an H100, and cuDNN's gradients."""
    need("conv2d_relu", "cuda")
    need("conv2d_relu", "triton")
    monkeypatch.setattr(choices, "device_name", lambda device: "9.0")
    choices.forget()
    x = images(32, 96, 27, 27, dtype=dtype)
    weight, bias = (torch.randn(256, 48, 5, 5) / 1200**0.5).to(DEVICE, dtype), torch.randn(256).to(DEVICE, dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = ops.conv2d_relu(*leaves, 1, 2, 2)
    assert torch.equal(out, ops.conv2d_relu(*leaves, 1, 2, 2, backend="triton"))
    grad = torch.randn_like(out)
    expected = torch.ops.aten.convolution_backward(
        grad * (out > 0), x, weight, [256], [1, 1], [2, 2], [1, 1], False, [0, 0], 2, [True] * 3
    )
    for actual, wanted in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
    choices.forget()


def test_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate of conv4 is right, and the user's table is written and read."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    conv4 = {"conv4": tuning.convolutions("paper")["conv4"]}
    monkeypatch.setattr(tuning, "convolutions", lambda preset: conv4)
    device = torch.device(DEVICE, 0)
    outcomes = [tuning.tune(task, device, 0.01) for task in tuning.tasks(device, ["conv2d_relu"], [8])]
    assert {outcome.label: outcome.wrong for outcome in outcomes if outcome.wrong} == {}
    tuning.write(device, outcomes)
    assert {row.kind for row in tuned.rows_of(device)} == {outcome.kind for outcome in outcomes}
    assert len(outcomes) == 4
    choices.forget()


def test_batches_copied_ahead_arrive_whole() -> None:
    """While the computing stream is behind, and the memory of batches that were dropped is used again."""
    pytest.importorskip("PIL")
    from alexnet_kernels.training.prefetch import CudaCopies, Prefetcher

    def batches() -> Iterator[dict[str, object]]:
        for i in range(40):
            count = 64 - i % 3
            pixels = torch.full((count, 256, 256, 3), i, dtype=torch.uint8)
            labels = torch.full((count,), i)
            yield {"images": pixels, "labels": labels, "indices": torch.arange(count), "bad": []}

    largest = []
    for batch in Prefetcher(CudaCopies(torch.device(DEVICE, 0))).iterate(batches()):
        torch.cuda._sleep(10**7)
        largest.append(torch.stack([x.long() for x in (*batch["images"].aminmax(), *batch["labels"].aminmax())]))
        assert batch["indices"].device.type == "cpu"
    assert torch.stack(largest).tolist() == [[i] * 4 for i in range(40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", [MMA, WGMMA], ids=["mma.sync", "wgmma"])
@pytest.mark.parametrize("layer", [(64, 48, 5, 2, 2, 27), (384, 256, 3, 1, 1, 13), (20, 7, 3, 0, 1, 9)], ids=str)
def test_gradients_of_convolutions_by_every_algorithm(
    layer: tuple[int, ...], algorithm: int, dtype: torch.dtype
) -> None:
    need("conv2d_relu", "cuda")
    filters, channels, kernel, padding, groups, size = layer
    if algorithm == WGMMA and (dtype == torch.float32 or channels % 8 or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("wgmma takes no such convolution here")
    x = images(3, channels * groups, size, size, dtype=dtype).relu()
    weight = (torch.randn(filters, channels, kernel, kernel) / (channels * kernel**2) ** 0.5).to(DEVICE, dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight, torch.randn(filters).to(DEVICE, dtype))]
    options = {"padding": padding, "groups": groups}
    out = conv2d_relu_by(algorithm, *leaves, **options, backend="cuda", masked_grad=True, mask_input=True)
    grad = (torch.randn_like(out) * (out > 0)).to(dtype)
    found = torch.autograd.grad(out, leaves, grad)
    operands = [t.detach().cpu().double() for t in (grad, x, weight)]

    def exact(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        rest = ([filters], [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, [True] * 3)
        dx, *others = torch.ops.aten.convolution_backward(*map(change, operands), *rest)
        return dx * (operands[1] > 0), *others

    tf32 = 2**-10 if dtype == torch.float32 else 1e-5
    for actual, right, terms in zip(found, exact(lambda t: t), exact(torch.abs), strict=True):
        allowed = torch.finfo(dtype).eps / 2 * 1.01 * right.abs() + tf32 * terms
        assert ((actual.cpu().double() - right).abs() <= allowed).all()


def test_auto_takes_float64_elsewhere() -> None:
    x = torch.randn(2, 16, 9, 9, device=DEVICE, dtype=torch.float64)
    assert ops.local_response_norm(x).dtype == torch.float64
    need("local_response_norm", "triton")
    with pytest.raises(TypeError, match="takes float32, bfloat16 and float16"):
        ops.local_response_norm(x, backend="triton")
