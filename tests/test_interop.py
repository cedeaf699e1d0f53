"""The torch.compile backend: what it fuses, what it leaves, and that results are PyTorch's."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_nets import RandomNet, inputs_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alexnet_kernels import AlexNet, use_backend
from alexnet_kernels.interop import dynamo_backend, explain
from alexnet_kernels.interop.rewrite import fuse_graph
from alexnet_kernels.nn.report import FusionReport

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROOT = Path(__file__).parents[1]
EAGERLY = {"inductor": False}
WEIGHT, BIAS, MATRIX = torch.randn(4, 4, 3, 3), torch.randn(4), torch.randn(5, 4)
STATISTICS = torch.zeros(4), torch.ones(4)
IMAGES, ROWS = torch.randn(2, 4, 9, 9), torch.randn(3, 4)


def compiled(function: Any, reports: list[FusionReport] | None = None, **options: Any) -> Any:
    """The function, compiled without Inductor; `reports` receives each graph's."""

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        report = fuse_graph(module)
        if reports is not None:
            reports.append(report)
        return module.forward

    return torch.compile(function, backend=backend, **options)


def report_of(function: Callable[..., Any], *args: Any) -> FusionReport:
    """The report of one graph, after a check of its result."""
    reports: list[FusionReport] = []
    expected = function(*(arg.clone() for arg in args))
    actual = compiled(function, reports, fullgraph=True)(*(arg.clone() for arg in args))
    torch.testing.assert_close(actual, expected)
    return reports[0]


def fused(function: Callable[..., Any], *args: Any) -> list[tuple[str | None, int]]:
    """The ops of one graph, each with how many layers it computes."""
    return [(layers.op, len(layers.names)) for layers in report_of(function, *args).fused]


def outcome(call: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Everything that a call computes, with strides; gradients of what requires them."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = call(x)
    found = {"output": y.detach(), "strides": torch.tensor(y.stride()), "input": x.detach()}
    leaves = [leaf for leaf in (x, *net.parameters()) if leaf.requires_grad]
    if y.requires_grad and leaves:
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        gradients = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
        found |= {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}
    return found | {name: buffer.clone() for name, buffer in net.named_buffers()}


def assert_same(net: nn.Module, x: Tensor, compile: Callable[[nn.Module], Any]) -> None:
    """That the compiled network computes what the network does; under autocast, as exactly as that."""
    one, other = copy.deepcopy(net), copy.deepcopy(net)
    expected = outcome(one, one, x)
    actual = outcome(compile(other), other, x)
    assert actual.keys() == expected.keys()
    exact = expected
    if half := getattr(net, "autocast", False):
        wide = copy.deepcopy(net)
        wide.exact = True
        exact = outcome(wide, wide, x)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        elif half:
            assert actual[name].dtype == value.dtype
            ours, eager = ((found[name].double() - exact[name].double()).norm() for found in (actual, expected))
            assert ours <= 2 * eager + 0.02 * exact[name].double().norm() + 1e-3, name
        else:
            torch.testing.assert_close(actual[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


class TestRuns:
    @pytest.mark.parametrize(
        ("function", "ops"),
        [
            (lambda x: F.relu(torch.conv2d(x, WEIGHT, BIAS)), [("conv2d_relu", 2)]),
            (lambda x: F.conv2d(x, bias=None, weight=WEIGHT, padding=1).relu_(), [("conv2d_relu", 2)]),
            (
                lambda x: F.max_pool2d(F.relu_(F.conv2d(x, WEIGHT, BIAS, (1, 2))), 2),
                [("conv2d_relu", 1), ("max_pool2d", 2)],
            ),
            (
                lambda x: F.max_pool2d(F.local_response_norm(F.relu(F.conv2d(x, WEIGHT), True), 3), 3, 2),
                [("conv2d_relu", 1), ("lrn_max_pool2d", 3)],
            ),
            (lambda x: torch.max_pool2d(F.local_response_norm(x, size=3, k=2), [2]), [("lrn_max_pool2d", 2)]),
            (
                lambda x: torch.relu(F.max_pool2d(F.conv2d(x, WEIGHT), 2, stride=[], ceil_mode=True)),
                [("conv2d_relu", 1), ("max_pool2d", 2)],
            ),
            (lambda x: F.batch_norm(x, *STATISTICS, BIAS).relu(), [("batch_norm_relu", 2)]),
            (
                lambda x: torch.relu(torch.batch_norm(x, BIAS, BIAS, None, None, True, 0.1, 1e-5, True)),
                [("batch_norm_relu", 2)],
            ),
            (lambda x: F.local_response_norm(x, 3), [("local_response_norm", 1)]),
            (lambda x: F.max_pool2d(input=x, kernel_size=2), [("max_pool2d", 1)]),
            # The addition's result is new: that ReLU overwrites it makes no difference.
            (lambda x: F.max_pool2d((x + 1).relu_(), 2), [("max_pool2d", 2)]),
            # Another branch's layers lie between.
            (
                lambda x: (lambda a, b: F.relu(a) + F.relu(b))(F.conv2d(x, WEIGHT), F.conv2d(x, WEIGHT, BIAS)),
                [("conv2d_relu", 2), ("conv2d_relu", 2)],
            ),
        ],
    )
    def test_of_images(self, function: Callable[..., Any], ops: list[tuple[str, int]]) -> None:
        assert fused(function, IMAGES) == ops

    @pytest.mark.parametrize(
        ("function", "layers"),
        [
            (lambda x: F.dropout(F.linear(x, MATRIX).relu(), 0.0), 3),
            (lambda x: F.dropout(F.relu(F.linear(x, MATRIX, bias=MATRIX[:, 0])), 0.5, False), 3),
            (lambda x: torch.dropout(torch.relu(F.linear(x, MATRIX)), p=0.5, train=False), 3),
            (lambda x: F.linear(x[:, None], MATRIX).relu(), 2),
        ],
    )
    def test_of_rows(self, function: Callable[..., Any], layers: int) -> None:
        assert fused(function, ROWS) == [("linear_relu_dropout", layers)]

    @pytest.mark.parametrize(
        ("function", "reason"),
        [
            (lambda x: F.conv2d(x, WEIGHT, padding="same"), "padding='same'"),
            (lambda x: F.conv2d(x, WEIGHT, dilation=2), r"dilation=2"),
            (lambda x: F.conv2d(x[0], WEIGHT), "its input has 3 dimensions, not 4"),
            (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "return_indices=True"),
            (lambda x: F.max_pool2d(F.pad(x, [9, 9, 9, 9]), 17), "a window of 17 x 17 pixels, more than 256"),
            (lambda x: F.dropout(x * 1, 0.0, inplace=True), "inplace=True"),
            (lambda x: F.dropout(x, 0.5, False), "it drops nothing"),
            (lambda x: F.batch_norm(x, *STATISTICS), "a ReLU behind it; its result leaves the graph"),
            (lambda x: x.relu_(), "it overwrites a tensor that may be used elsewhere"),
            (lambda x: F.max_pool2d((x > 0).to(torch.int32), 2), r"no op takes torch.int32 on cpu"),
            (lambda x: F.conv2d(x, WEIGHT).add_(1), "add_ may overwrite its result"),
            (lambda x: (F.max_pool2d(y := x * 1, 2).sum(), y.add_(1))[0], "add_ may overwrite its input"),
            (lambda x: F.linear(x, MATRIX, MATRIX[:1, :1].expand(1, 5))[0] if x.dim() == 2 else x.softmax(1), "no op"),
        ],
    )
    def test_left(self, function: Callable[..., Any], reason: str) -> None:
        report = report_of(function, IMAGES)
        assert re.search(reason, str(report))
        assert report.fused == []

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: (lambda y: F.relu(y) + y)(F.conv2d(x, WEIGHT)),
            lambda x: (lambda y: (F.relu(y), y))(F.conv2d(x, WEIGHT)),
            lambda x: (lambda y: F.relu(y[:, :2]))(F.conv2d(x, WEIGHT)),
        ],
    )
    def test_what_two_read_is_computed(self, function: Callable[..., Any]) -> None:
        assert fused(function, IMAGES) == [("conv2d_relu", 1)]

    def test_a_relu_that_overwrites_what_another_reads(self) -> None:
        def views(x: Tensor) -> Tensor:
            y = F.conv2d(x, WEIGHT)
            part = y[:, :2]
            F.max_pool2d(y.relu_(), 2)
            return part

        def reads(x: Tensor) -> Tensor:
            y = F.conv2d(x, WEIGHT)
            F.relu_(y)
            return F.max_pool2d(y, 2)

        for function in (views, reads):
            assert "max_pool2d" not in {
                layers.op for layers in report_of(function, IMAGES).fused if len(layers.names) > 1
            }

    def test_a_relu_that_overwrites_without_gradients_keeps_the_history(self) -> None:
        weight = WEIGHT.clone().requires_grad_()

        def net(x: Tensor) -> Tensor:
            y = F.conv2d(x, weight)
            with torch.no_grad():
                y = y.relu_()
            return F.max_pool2d(y, 2)

        ours, theirs = (torch.autograd.grad(call(IMAGES).sum(), weight)[0] for call in (compiled(net), net))
        torch.testing.assert_close(ours, theirs)

    def test_a_relu_keeps_its_result_where_others_may_overwrite_its_input(self) -> None:
        weight = WEIGHT.clone().requires_grad_()

        def norm_and_pool(x: Tensor) -> Tensor:
            return F.max_pool2d(F.local_response_norm(F.relu(x), 3, 0.5), 3, 2)

        def hands_out(x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.conv2d(x, weight)
            return norm_and_pool(y), y

        def gradients(call: Callable[..., Any], handing: Callable[..., Any]) -> list[Tensor]:
            x = F.conv2d(IMAGES, weight)
            one = call(x)
            x.data.mul_(-3)
            other, x = handing(IMAGES)
            x.data.mul_(-3)
            return [torch.autograd.grad(y.sum(), weight)[0] for y in (one, other)]

        expected = gradients(norm_and_pool, hands_out)
        torch.testing.assert_close(gradients(compiled(norm_and_pool), compiled(hands_out)), expected)
        report = report_of(lambda x: norm_and_pool(F.conv2d(x, weight).relu_()), IMAGES)
        assert [layers.op for layers in report.fused] == ["conv2d_relu", "lrn_max_pool2d"]

    def test_no_run_goes_across_a_change_of_mode_or_a_write(self) -> None:
        def autocast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = F.conv2d(x, WEIGHT)
            return F.relu(y)

        def write(x: Tensor) -> tuple[Tensor, Tensor]:
            y, z = F.conv2d(x, WEIGHT), x * 1
            z.add_(1)
            return F.relu(y), z

        def gradients_off(x: Tensor) -> Tensor:
            y = F.conv2d(x, WEIGHT)
            with torch.no_grad():
                return F.relu(y)

        assert fused(autocast, IMAGES) == [("conv2d_relu", 1)]
        assert fused(gradients_off, IMAGES) == [("conv2d_relu", 1)]
        assert fused(write, IMAGES) == [("conv2d_relu", 1)]

    def test_one_value_a_channel_is_left(self) -> None:
        def net(x: Tensor) -> Tensor:
            return torch.batch_norm(x[:1, :, :1, :1], BIAS, BIAS, None, None, True, 0.1, 1e-5, True).relu()

        assert fused(net, IMAGES) == []

    def test_float64_is_left_where_pytorch_would_compute_it(self) -> None:
        with use_backend("native"):
            report = report_of(lambda x: F.conv2d(x, WEIGHT).relu(), IMAGES)
        assert report.left[0].reason == 'backend "native" computes conv2d_relu of torch.float32 on cpu'

    def test_an_argument_that_varies_is_left(self) -> None:
        def net(x: Tensor, momentum: float) -> Tensor:
            return F.batch_norm(x, *STATISTICS, None, None, True, momentum).relu()

        reports: list[FusionReport] = []
        call = compiled(net, reports, dynamic=True)
        for momentum in (0.1, 0.2):
            call(IMAGES, momentum)
        assert "momentum is no constant of the graph" in str(reports[-1])


class TestResults:
    def test_of_random_networks(self) -> None:
        """Outputs, gradients and buffers, against eager calls. Networks that PyTorch itself refuses are left out."""
        computed, start = 0, time.monotonic()
        for seed in range(60):
            if computed > 20 and time.monotonic() - start > 20:
                break
            net = RandomNet(seed)
            x = inputs_of(seed, net)
            try:
                outcome(one := copy.deepcopy(net), one, x)
            except RuntimeError:
                continue
            torch._dynamo.reset()
            assert_same(net, x, compiled)
            computed += 1
        assert computed > 20

    @pytest.mark.parametrize("training", [True, False])
    def test_of_batch_norm(self, training: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norms = nn.ModuleList(
                    nn.BatchNorm2d(4, **options)
                    for options in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5})
                )
                self.averaged = nn.BatchNorm2d(4, momentum=None)

            def forward(self, x: Tensor) -> Tensor:
                for norm in self.norms:
                    x = F.relu(norm(x) + 0, inplace=True) if norm.affine else norm(x).relu()
                return self.averaged(x).relu()

        assert_same(Net().double().train(training), IMAGES.double().requires_grad_(), compiled)

    @pytest.mark.parametrize("around", [True, False])
    def test_of_autocast(self, around: bool) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(72, 5)

            def forward(self, x: Tensor) -> tuple[Tensor, ...]:
                with torch.autocast("cpu", torch.bfloat16, enabled=not around):
                    return self.layers(x)

            def layers(self, x: Tensor) -> tuple[Tensor, ...]:
                a = F.local_response_norm(F.relu(self.conv(x)), 5)
                b = F.relu(self.norm(a))
                c = F.max_pool2d(F.local_response_norm(F.relu(b + 0), 5), 3, 2)
                return a, b, c, F.relu(self.fc(c.flatten(1)))

        net = Net()
        call = compiled(copy.deepcopy(net).layers if around else copy.deepcopy(net))
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            expected, actual = (net.layers if around else net)(IMAGES), call(IMAGES)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)  # dtypes too

    def test_of_dropout(self) -> None:
        def net(x: Tensor) -> Tensor:
            return F.dropout(F.linear(x, torch.eye(64)).relu(), 0.25)

        x = torch.ones(200, 64, requires_grad=True)
        reports: list[FusionReport] = []
        call = compiled(net, reports)
        torch.manual_seed(1)
        one, other = call(x), call(x)
        torch.manual_seed(1)
        assert torch.equal(call(x), one)
        assert not torch.equal(one, other)
        torch.testing.assert_close(one.unique(), torch.tensor([0, 4 / 3]))
        assert 0.23 < (one == 0).float().mean() < 0.27
        (gradient,) = torch.autograd.grad(one.sum(), x)
        torch.testing.assert_close(gradient, one)
        assert [len(layers.names) for layers in reports[0].fused] == [3]

    def test_dropout_of_a_transposed_tensor_keeps_its_strides(self) -> None:
        call = compiled(lambda x: F.dropout(x.transpose(1, 2), 0.25).transpose(1, 2).view(-1))
        torch.testing.assert_close(call(torch.ones(3, 4, 5)).unique(), torch.tensor([0, 4 / 3]))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode: Callable[[], Any]) -> None:
        conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        call = compiled(lambda x: F.max_pool2d(F.relu(conv(x)), 2))
        with mode():
            actual, expected = call(IMAGES), F.max_pool2d(F.relu(conv(IMAGES)), 2)
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()  # channels_last, as the weight

    def test_of_bfloat16(self) -> None:
        conv = nn.Conv2d(4, 8, 3, dtype=torch.bfloat16)
        x = IMAGES.bfloat16()
        torch.testing.assert_close(compiled(lambda x: F.relu(conv(x)))(x), F.relu(conv(x)), rtol=0.02, atol=0.02)

    def test_a_variable_batch_needs_one_graph(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.norm, self.fc = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(72, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = F.max_pool2d(F.local_response_norm(F.relu(self.norm(F.relu(self.conv(x)))), 5), 3, 2)
                return F.dropout(F.relu(self.fc(x.flatten(1))), 0.0)

        reports: list[FusionReport] = []

        def backend(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            reports.append(fuse_graph(module))
            return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

        net = Net()
        call = torch.compile(net, backend=backend)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 4, 9, 9)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(call(x), copy.deepcopy(net)(x), rtol=1e-4, atol=1e-4)
        assert len(reports) == 1
        assert [layers.op for layers in reports[0].fused] == [
            "conv2d_relu",
            "batch_norm_relu",
            "lrn_max_pool2d",
            "linear_relu_dropout",
        ]

    def test_with_inductor(self) -> None:
        net = RandomNet(7)
        assert_same(net, inputs_of(7, net), lambda model: torch.compile(model, backend=dynamo_backend))

    def test_of_a_checkpointed_part(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return checkpoint(self.part, F.relu(self.first(x)), use_reentrant=False)

            def part(self, x: Tensor) -> Tensor:
                return F.max_pool2d(F.relu(self.second(x)), 2)

        reports: list[FusionReport] = []
        assert_same(Net().double(), IMAGES.double().requires_grad_(), lambda net: compiled(net, reports))
        assert [layers.op for layers in reports[0].layers] == ["conv2d_relu", "conv2d_relu", "max_pool2d"]


class TestBackend:
    def test_options(self) -> None:
        function = F.relu
        for options, message in (
            ({"inductor": 1}, 'option "inductor" must be True or False, not 1'),
            ({"indutcor": False}, "there is no option 'indutcor': .*did you mean 'inductor'"),
            ({"inductor": False, "max_autotune": True}, "'max_autotune': .* no other option is allowed"),
        ):
            with pytest.raises(Exception, match=message):
                torch.compile(function, backend=dynamo_backend, options=options)(IMAGES)
            torch._dynamo.reset()
        call = torch.compile(function, backend=dynamo_backend, options=EAGERLY)
        torch.testing.assert_close(call(IMAGES), F.relu(IMAGES))

    def test_inductor_gets_mode_and_options(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[Any] = []

        def compile_fx(module: Any, inputs: Any, config_patches: Any = None, **others: Any) -> Any:
            given.append(config_patches)
            return module.forward

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        for keywords in ({"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True, "inductor": True}}):
            torch._dynamo.reset()
            torch.compile(F.relu, backend=dynamo_backend, **keywords)(IMAGES)
        assert [patches["max_autotune"] for patches in given] == [True, True]

    def test_a_model_of_this_package_keeps_its_ops(self) -> None:
        explanation = explain(AlexNet(preset="caffe", width=0.02, num_classes=3), torch.randn(1, 3, 227, 227))
        ops = [layers.op for layers in explanation.reports[0].fused]
        assert ops[0] == "conv2d_relu"
        assert "linear_relu_dropout" in ops
        assert len(explanation.reports) == 1
        assert explanation.graph_breaks == []

    def test_a_function_that_was_replaced_before_the_import(self, tmp_path: Path) -> None:
        program = f"""
import torch, torch.nn.functional as F
F.relu = F.elu
from alexnet_kernels import fuse
from alexnet_kernels.interop import dynamo_backend
net, x = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU()), torch.randn(2, 4, 9, 9)
call = torch.compile(net, backend=dynamo_backend, options={EAGERLY})
expected = net(x)
torch.testing.assert_close(call(x), expected)
torch.testing.assert_close(fuse(net)(x), expected)
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr

    def test_explain(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True))

            def forward(self, x: Tensor) -> Tensor:
                x = self.features(x)
                torch._dynamo.graph_break()
                return F.max_pool2d(x, 2) + 1

        net = Net()
        before = copy.deepcopy(net.state_dict())
        explanation = explain(net, IMAGES)
        assert len(explanation.reports) == 2
        assert len(explanation.graph_breaks) == 1
        first, second = explanation.reports
        assert [(layers.names, layers.op) for layers in first.layers] == [
            (("features.0",), "conv2d_relu"),
            (("features.1", "features.2"), "batch_norm_relu"),
        ]
        assert [layers.op for layers in second.layers] == ["max_pool2d", None]
        assert "features.1, features.2: batch_norm_relu" in str(explanation)
        assert "graph break" in str(explanation)
        torch.testing.assert_close(net.state_dict(), before)

    def test_a_pool_alone_is_inductors_where_that_is_faster(self) -> None:
        def pool(x: Tensor) -> Tensor:
            return F.max_pool2d(x.relu(), 2)

        def after_lrn(x: Tensor) -> Tensor:
            return F.max_pool2d(F.local_response_norm(x, 3), 2)

        def ops_of(function: Callable[..., Any], x: Tensor) -> list[str | None]:
            return [layers.op for report in explain(function, x).reports for layers in report.layers]

        assert ops_of(pool, IMAGES) == [None, None]
        assert ops_of(after_lrn, IMAGES) == ["lrn_max_pool2d"]
        assert ops_of(pool, IMAGES.to(memory_format=torch.channels_last)) == ["max_pool2d"]
        assert ops_of(pool, IMAGES.clone().requires_grad_()) == ["max_pool2d"]

    def test_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        call = torch.compile(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), backend=dynamo_backend, options=EAGERLY)
        with caplog.at_level(logging.INFO, "alexnet_kernels.fusion"):
            call(IMAGES)
        assert "2 of 2 layers of a graph are computed by this package's ops\n0, 1: conv2d_relu" in caplog.text

    def test_the_name_of_an_installed_package(self, tmp_path: Path) -> None:
        """By the entry point of pyproject.toml; importing the package leaves torch._dynamo out."""
        section = (ROOT / "pyproject.toml").read_text().partition("[project.entry-points.torch_dynamo_backends]\n")[2]
        name, target = section.partition("\n")[0].split(" = ")
        info = tmp_path / "some_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{name} = {target[1:-1]}\n")
        program = """
import sys, torch, alexnet_kernels
assert "torch._dynamo" not in sys.modules
call = torch.compile(torch.nn.Conv2d(1, 1, 1), backend="alexnet_kernels", options={"inductor": False})
call(torch.ones(1, 1, 2, 2))
"""
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path, "TORCH_LOGS": "alexnet_kernels"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert "1 of 1 layers" in done.stderr
