"""What FusedSequential does not compute by an op: children, tensors and surroundings that are not torch's own."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused import conv, image, lrn, plain, pool, record_calls, stats
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels import AlexNet, fuse, ops
from alexnet_kernels.models import PRESETS
from alexnet_kernels.nn import FusedSequential, fusion_report


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the modules call, in order."""
    return record_calls(monkeypatch)


def layers() -> list[nn.Module]:
    """One of each kind, the first of its run."""
    return [conv(), nn.ReLU(), lrn(), pool(), stats(), nn.Flatten(), nn.Linear(288, 4), nn.Dropout(0.5)]


NAMES = ("Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d", "BatchNorm2d", "Linear", "Dropout")
FUNCTIONS = ("conv2d", "relu", "local_response_norm", "max_pool2d", "batch_norm", "linear", "dropout")


def assert_plain(fused: nn.Sequential, x: Tensor) -> Tensor:
    """The fused module computes what its children do."""
    found = fused(x)
    torch.testing.assert_close(found, plain(fused)(x))
    return found


class TestReplaced:
    """Methods and functions that a program has replaced are called, as torch.nn.Sequential calls them."""

    @pytest.mark.parametrize("name", ["_conv_forward", "forward", "_call_impl"])
    def test_method_of_one_layer(self, name: str) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool()).double()
        x = image()
        before = fused(x)
        original = getattr(fused[0], name)
        setattr(fused[0], name, types.MethodType(lambda self, *args: 2 * original(*args), fused[0]))
        found = assert_plain(fused, x)
        assert not torch.allclose(found, before)
        assert fusion_report(fused).left[0].reason == f"{name} of its own"
        delattr(fused[0], name)
        assert torch.equal(fused(x), before)

    @pytest.mark.parametrize("method", ["forward", "__call__"])
    @pytest.mark.parametrize("name", NAMES)
    def test_method_of_a_class(self, name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = getattr(nn, name)
        original = getattr(layer, method)
        fused = FusedSequential(*layers()).double().eval()
        x = image()
        before = fused(x)
        monkeypatch.setattr(layer, method, lambda self, *args: 2 * original(self, *args))
        found = assert_plain(fused, x)
        assert not torch.allclose(found, before)
        reasons = [left.reason for left in fusion_report(fused).left]
        assert f"{name}.{method} was replaced" in reasons
        monkeypatch.undo()
        assert torch.equal(fused(x), before)

    @pytest.mark.parametrize(("name", "function"), list(zip(NAMES, FUNCTIONS, strict=True)))
    def test_function(self, name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(F, function)
        fused = FusedSequential(*layers()).double().eval()
        x = image()
        before = fused(x)
        monkeypatch.setattr(F, function, lambda *args, **kwargs: 2 * original(*args, **kwargs))
        found = assert_plain(fused, x)
        assert not torch.allclose(found, before)
        reasons = [left.reason for left in fusion_report(fused).left]
        assert f"torch.nn.functional.{function} was replaced" in reasons

    def test_function_by_another_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, x = FusedSequential(conv(), nn.ReLU(), pool()).double(), image()
        before = fused(x)
        monkeypatch.setattr(torch, "relu", torch.tanh)
        assert not torch.allclose(assert_plain(fused, x), before)
        monkeypatch.undo()
        monkeypatch.setattr(F, "relu", F.elu)
        assert not torch.allclose(assert_plain(fused, x), before)

    def test_module_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[str] = []
        original = nn.Module.__call__

        def call(self: nn.Module, *args: Any) -> Any:
            seen.append(type(self).__name__)
            return original(self, *args)

        monkeypatch.setattr(nn.Module, "__call__", call)
        FusedSequential(conv(), nn.ReLU(), pool())(image().float())
        assert seen == ["FusedSequential", "Conv2d", "ReLU", "MaxPool2d"]

    def test_forward_of_sequential(self, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
        monkeypatch.setattr(nn.Sequential, "forward", lambda self, input: -input)
        x = image()
        assert torch.equal(FusedSequential(nn.ReLU(), pool())(x), -x)
        assert calls == []


class Doubling(Tensor):
    """A weight that brings its own F.linear and F.conv2d."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (F.linear, F.conv2d):
            args = args[0], args[1].as_subclass(Tensor) * 2, *args[2:]
        return super().__torch_function__(function, types, args, kwargs or {})


class TestTensors:
    @pytest.mark.parametrize("make", [conv, lambda: nn.Linear(13, 4)], ids=["conv", "linear"])
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_parameter_of_a_subclass(self, make: Callable[[], nn.Module], name: str, calls: list[str]) -> None:
        fused = FusedSequential(make(), nn.ReLU()).double()
        setattr(fused[0], name, nn.Parameter(getattr(fused[0], name).detach().as_subclass(Doubling)))
        assert_plain(fused, image())
        assert calls == []
        assert fusion_report(fused).left[0].reason == f"{name} is a Doubling"

    def test_input_of_a_subclass(self, calls: list[str]) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool()).double()
        found = fused(image().as_subclass(Doubling))
        assert type(found) is Doubling
        assert calls == []

    def test_buffer_of_a_subclass(self, calls: list[str]) -> None:
        fused = FusedSequential(stats(), nn.ReLU()).double().eval()
        fused[0].running_mean = fused[0].running_mean.as_subclass(Doubling)
        assert_plain(fused, image(8))
        assert calls == []

    @pytest.mark.parametrize("layout", ["jagged", "nested", "sparse", "csr"])
    def test_input_of_another_layout(self, layout: str) -> None:
        rows, parts = torch.randn(4, 8), [torch.randn(2, 8), torch.randn(3, 8)]
        x = {
            "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
            "nested": lambda: torch.nested.nested_tensor(parts),
            "sparse": rows.to_sparse,
            "csr": rows.to_sparse_csr,
        }[layout]()
        fused = FusedSequential(nn.Linear(8, 8))
        found, expected = fused(x), plain(fused)(x)
        assert found.layout == expected.layout
        if x.is_nested:
            found, expected = torch.cat(found.unbind()), torch.cat(expected.unbind())
        assert torch.equal(found, expected)

    def test_weight_of_another_layout(self) -> None:
        fused = FusedSequential(nn.Linear(8, 8))
        fused[0].weight = nn.Parameter(fused[0].weight.detach().to_sparse_csr(), requires_grad=False)
        assert_plain(fused, torch.randn(4, 8))
        assert fusion_report(fused).left[0].reason == "weight has the layout torch.sparse_csr"

    def test_expanded_weights(self) -> None:
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        fused = FusedSequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        other = copy.deepcopy(plain(fused))
        x = torch.randn(3, 8)
        for module in (fused, other):
            call_for_per_sample_grads(module, batch_size=3)(x).square().sum().backward()
        for a, b in zip(fused.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad_sample, b.grad_sample)

    def test_weights_beside_the_parameters(self, calls: list[str]) -> None:
        """nn.DataParallel's replicas have them so."""
        fused = FusedSequential(conv(), nn.ReLU())._replicate_for_data_parallel()
        child = fused[0]._replicate_for_data_parallel()
        child.weight, child.bias = fused[0].weight.detach() * 2, fused[0].bias.detach()
        fused._modules = {"0": child, "1": fused[1]}
        x = image().float()
        torch.testing.assert_close(fused(x), child(x).relu())
        assert calls == ["conv2d_relu"]


NO_STRIDES = {
    "nested": lambda: torch.nested.nested_tensor([torch.randn(4, 5, 5), torch.randn(4, 6, 5)]),
    "sparse": lambda: torch.randn(2, 4, 5, 5).to_sparse(),
    "mkldnn": lambda: torch.randn(2, 4, 5, 5).to_mkldnn(),
}


@pytest.mark.parametrize("layout", NO_STRIDES)
@pytest.mark.parametrize("op", sorted(set(ops.__all__) - {"sgd_step", "augment"}))
def test_ops_refuse_tensors_without_strides(op: str, layout: str) -> None:
    more = {
        "conv2d_relu": [torch.randn(4, 4, 3, 3)],
        "linear_relu_dropout": [torch.randn(3, 5)],
        "batch_norm_relu": [torch.zeros(4), torch.ones(4)],
    }.get(op, [])
    function = getattr(ops, op)
    function(torch.randn(2, 4, 5, 5), *more)  # the check of a tensor of the same shape has passed
    given = "a nested tensor" if layout == "nested" else "of layout torch"
    with pytest.raises(TypeError, match=rf"{op}: input must be a tensor with strides \(torch.strided\), not {given}"):
        function(NO_STRIDES[layout](), *more)


class Foreign(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


class SeenOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class SeenFusedOperators(SeenOperators):
    sees_fused_ops = True


class TestModes:
    @pytest.mark.parametrize("mode", [Seen, SeenOperators])
    def test_mode_sees_what_the_children_do(self, mode: Callable[[], Any]) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool(), nn.Flatten(), nn.Linear(288, 4), nn.ReLU())
        x = image().float()
        with mode() as found:
            fused(x)
            reason = fusion_report(fused).left[0].reason
        with mode() as expected:
            plain(fused)(x)
        assert [name for name in found.names if "get" not in name] == expected.names
        assert reason == f"the mode {mode.__name__}"

    def test_mode_that_asks_for_the_ops(self) -> None:
        fused, x = FusedSequential(conv(), nn.ReLU(), pool()), image().float()
        with torch.no_grad(), SeenFusedOperators() as found:
            fused(x)
        assert found.names == ["alexnet_kernels::conv2d_relu", "alexnet_kernels::max_pool2d"]

    @pytest.mark.parametrize(
        "context",
        [lambda: torch.device("cpu"), lambda: FakeTensorMode(allow_non_fake_inputs=True)],
        ids=["device", "fake"],
    )
    def test_modes_of_torch_keep_the_ops(self, context: Callable[[], Any], calls: list[str]) -> None:
        with context():
            FusedSequential(conv(), nn.ReLU(), pool())(image().float())
        assert calls == ["conv2d", "max_pool2d+relu"]

    def test_traced_tensors_keep_the_ops(self) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool())
        graph = make_fx(fused, tracing_mode="fake", _allow_non_fake_inputs=True)(image().float()).graph
        called = [str(node.target) for node in graph.nodes if "alexnet" in str(node.target)]
        assert called == ["alexnet_kernels.conv2d_relu.default", "alexnet_kernels.max_pool2d.default"]


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompiled:
    """The checks are traced whole and make no graph of their own."""

    def graph(self, fused: nn.Module, context: AbstractContextManager) -> list[str]:
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(fused, fullgraph=True, backend=keep)
        x = image().float()
        with context:
            for _ in range(2):
                torch.testing.assert_close(compiled(x), fused(x))
        assert len(graphs) == 1
        graph = graphs[0]
        return [str(node.target) for node in graph.graph.nodes if "alexnet" in str(node.target)]

    @pytest.mark.parametrize("context", [nullcontext, lambda: torch.device("cpu")], ids=["plain", "device"])
    def test_fuses(self, context: Callable[[], Any]) -> None:
        found = self.graph(FusedSequential(conv(), nn.ReLU(), pool()), context())
        assert found == ["alexnet_kernels.conv2d_relu", "alexnet_kernels.max_pool2d"]

    def test_mode(self) -> None:
        assert self.graph(FusedSequential(conv(), nn.ReLU(), pool()), Foreign()) == []

    def test_own_method(self) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool())
        fused[0]._conv_forward = types.MethodType(lambda self, x, w, b: 2 * F.conv2d(x, w, b), fused[0])
        assert self.graph(fused, nullcontext()) == ["alexnet_kernels.max_pool2d"]

    def test_ensemble(self) -> None:
        nets = [FusedSequential(conv(), nn.ReLU(), lrn(), pool()) for _ in range(2)]
        state = stack_module_state(nets)
        x = image().float()

        def call(state: Any, x: Tensor) -> Tensor:
            return vmap(lambda state: functional_call(nets[0], state, (x,)))(state)

        found = torch.compile(call, fullgraph=True, backend="eager")(state, x)
        torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))


RELU_FIRST: dict[str, Callable[[], list[nn.Module]]] = {
    "first": lambda: [nn.ReLU(), lrn(), pool()],
    "behind-identity": lambda: [nn.Identity(), nn.ReLU(), lrn(), pool()],
    "behind-dropout": lambda: [nn.Dropout(0.5).eval(), nn.ReLU(), lrn(), pool()],
    "behind-container": lambda: [nn.Sequential(nn.Identity()), nn.ReLU(), lrn(), pool()],
}


@pytest.mark.parametrize("case", RELU_FIRST)
def test_caller_overwrites_what_relu_read(case: str, calls: list[str]) -> None:
    fused = FusedSequential(*RELU_FIRST[case]())
    found = []
    for module in (fused, plain(fused)):
        leaf = torch.linspace(-1, 1, 2 * 8 * 49, dtype=torch.float64).reshape(2, 8, 7, 7).requires_grad_()
        x = leaf * 1
        out = module(x)
        x.zero_()
        found += [out, torch.autograd.grad(out.square().sum(), leaf)[0]]
    torch.testing.assert_close(found[:2], found[2:])
    calls.clear()
    with torch.no_grad():
        fused(leaf)
    assert calls[-1] == "lrn_max_pool2d+relu"


def test_hook_keeps_what_relu_reads() -> None:
    fused = FusedSequential(conv(), nn.ReLU(), lrn(), pool())
    kept: list[Tensor] = []
    fused[0].register_forward_hook(lambda module, args, output: kept.append(output))
    out = fused(image().float())
    with torch.no_grad():
        kept[0].zero_()
    out.sum().backward()
    assert fused[0].weight.grad.abs().max() > 0


def d(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


MAPPED: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "conv2d_relu": (lambda x, w, b: ops.conv2d_relu(x, w, b, 1, 1, 2), lambda: (d(1, 4, 3, 3), d(4, 2, 3, 3), d(4))),
    "max_pool2d": (lambda x, b: ops.max_pool2d(x, 3, 2, bias=b, relu=True), lambda: (d(1, 4, 5, 5), d(4))),
    "lrn_max_pool2d": (
        lambda x, b: ops.lrn_max_pool2d(x, 3, 0.5, bias=b, relu=True),
        lambda: (d(1, 4, 5, 5), d(4)),
    ),
    "local_response_norm": (lambda x: ops.local_response_norm(x, 3, 0.5), lambda: (d(1, 4, 3, 3),)),
    "within_map_response_norm": (lambda x: ops.within_map_response_norm(x, 3, 0.5), lambda: (d(1, 2, 3, 3),)),
    "batch_norm_relu": (
        lambda x, w, b: ops.batch_norm_relu(x, None, None, w, b, True),
        lambda: (d(2, 3, 2, 2), d(3), d(3)),
    ),
    "linear_relu_dropout": (
        lambda x, w, b: ops.linear_relu_dropout(x, w, b, 0.5, True, seed=3),
        lambda: (d(2, 4), d(3, 4), d(3)),
    ),
    "dropout": (lambda x: ops.dropout(x, 0.5, True, seed=3), lambda: (d(2, 6),)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", MAPPED)
class TestMapped:
    """The ops inside vmap, forward and backward."""

    def test_gradients_of_a_batch_of_gradients(self, op: str) -> None:
        function, make = MAPPED[op]
        inputs = tuple(x.requires_grad_() for x in make())
        expected = jacobian(function, inputs)
        torch.testing.assert_close(jacobian(function, inputs, vectorize=True), expected)
        out = function(*inputs)
        basis = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
        found = vmap(lambda v: torch.autograd.grad(out, inputs, v, retain_graph=True))(basis)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b)

    def test_batch_of_inputs(self, op: str) -> None:
        function, make = MAPPED[op]
        inputs = make()
        scales = d(2)
        if inputs[0].dim() == 4:
            inputs = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
        found = vmap(lambda s: function(*(s * x for x in inputs)))(scales)
        torch.testing.assert_close(found, torch.stack([function(*(s * x for x in inputs)) for s in scales]))


@pytest.mark.parametrize("preset", PRESETS)
def test_ensemble_of_networks(preset: str) -> None:
    nets = [AlexNet(3, preset, width=0.02).eval() for _ in range(2)]
    state = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    found = vmap(lambda state: functional_call(base, state, (x,)))(state)
    torch.testing.assert_close(found, torch.stack([net(x) for net in nets]))

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,)).square().sum()

    gradients = vmap(grad(loss))(*state)
    nets[1](x).square().sum().backward()
    for name, parameter in nets[1].named_parameters():
        torch.testing.assert_close(gradients[name][1], parameter.grad, rtol=1e-3, atol=1e-6)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = nn.Sequential(nn.GELU(), conv(8, dilation=(2, 2)), nn.ReLU(True), pool(), nn.Sequential(lrn()))


class TestReport:
    def test_layers_and_reasons(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = Head()
        model.body[3].register_forward_hook(lambda *args: None)
        assert fuse(model) is model
        assert capsys.readouterr().out == ""
        assert fuse(model, verbose=True) is model
        assert capsys.readouterr().out.splitlines() == [
            "stem: as it is: in Head, not a Sequential",
            "body.0: as it is: GELU has no op",
            "body.1: as it is: dilation (2, 2)",
            "body.2: as it is: ReLU alone",
            "body.3: as it is: a forward hook",
            "body.4.0: local_response_norm",
        ]

    def test_agrees_with_what_runs(self, calls: list[str]) -> None:
        model = AlexNet(width=0.1).eval()
        report = fusion_report(model)
        model(torch.randn(1, 3, 63, 63))
        assert [layers.op for layers in report.fused] == [
            {"conv2d": "conv2d_relu", "linear": "linear_relu_dropout"}.get(name, name).removesuffix("+relu")
            for name in calls
        ]
        assert [layers.names for layers in report.left] == [("avgpool",)]

    def test_refuses_what_is_no_module(self) -> None:
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
            fusion_report([])
