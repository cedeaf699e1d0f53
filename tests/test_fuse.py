"""fuse and unfuse: modules, tracing, function transforms, and torchvision's networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fused import assert_same_function, conv, doubled_output, image, lrn, pool, record_calls, stats
from torch import Tensor, nn
from torch.autograd import forward_ad

from alexnet_kernels import fuse, unfuse, use_backend
from alexnet_kernels.nn import FusedSequential, LocalResponseNorm, WithinMapResponseNorm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the modules call, in order."""
    return record_calls(monkeypatch)


class TestModules:
    def test_local_response_norm(self) -> None:
        x = image(6)
        norm = LocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0, groups=2)
        halves = [F.local_response_norm(half, 5, 0.5, 0.75, 2.0) for half in x.chunk(2, 1)]
        torch.testing.assert_close(norm(x), torch.cat(halves, 1))
        torch.testing.assert_close(LocalResponseNorm(3, 0.5)(x), nn.LocalResponseNorm(3, 0.5)(x))
        assert isinstance(norm, nn.LocalResponseNorm)
        assert (norm.size, norm.alpha, norm.beta, norm.k, norm.groups) == (5, 0.5, 0.75, 2.0, 2)
        assert repr(norm) == "LocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0, groups=2)"
        assert repr(LocalResponseNorm(5)) == repr(nn.LocalResponseNorm(5))
        with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
            LocalResponseNorm(5, groups=0)

    def test_within_map_response_norm(self) -> None:
        x = 30 * image(4)
        scale = 1.5 + 0.25 * F.avg_pool2d(x * x, 3, 1, 1, count_include_pad=True)
        norm = WithinMapResponseNorm(3, alpha=0.25, beta=0.75, k=1.5)
        torch.testing.assert_close(norm(x), x / scale**0.75)
        assert repr(norm) == "WithinMapResponseNorm(3, alpha=0.25, beta=0.75, k=1.5)"
        defaults = WithinMapResponseNorm(5)
        assert (defaults.alpha, defaults.beta, defaults.k) == (1e-3, 0.75, 1.0)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(conv(), nn.ReLU(True), lrn(), pool(), conv(8), stats(), nn.ReLU(True), pool()),
        nn.Flatten(),
        nn.Sequential(nn.Dropout(), nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 4)),
    )


@pytest.mark.usefixtures("fresh_dynamo")
class TestTracing:
    def test_compile_takes_the_whole_graph(self) -> None:
        fused = fuse(small_net()).eval()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        x = image().float()
        torch.testing.assert_close(compiled(x), fused(x))
        (a,) = torch.autograd.grad(compiled(x).square().sum(), fused[0][0].weight)
        (b,) = torch.autograd.grad(fused(x).square().sum(), fused[0][0].weight)
        torch.testing.assert_close(a, b)

    @torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    def test_compiled_container_notices_hooks_and_replacements(self) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), pool())
        compiled = torch.compile(fused, fullgraph=True, backend="eager")
        x = image().float()
        expected = pool()(fused[0](x).relu())
        torch.testing.assert_close(compiled(x), expected)
        handle = fused[1].register_forward_hook(doubled_output)
        torch.testing.assert_close(compiled(x), 2 * expected)
        handle.remove()
        torch.testing.assert_close(compiled(x), expected)
        fused[1] = nn.Identity()
        torch.testing.assert_close(compiled(x), pool()(fused[0](x)))

    def test_compiled_training_step(self) -> None:
        fused = fuse(small_net())
        for child in fused[2]:
            if isinstance(child, nn.Dropout):
                child.p = 0.0
        other = copy.deepcopy(fused)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        x = image().float()
        torch.testing.assert_close(compiled(x), other(x))
        for a, b in zip(fused.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("strict", [False, True])
    def test_export_keeps_the_fused_ops_of_a_backend_that_is_asked_for(self, strict: bool) -> None:
        fused = fuse(small_net()).eval()
        x = image().float()
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        with use_backend("cpu"):
            program = torch.export.export(fused, (x,), dynamic_shapes=(batch,), strict=strict)
        assert any("alexnet_kernels" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), fused(x))
        x = torch.cat([x, x, x])
        torch.testing.assert_close(program.module()(x), fused(x))

    def test_symbolic_trace_sees_the_children(self) -> None:
        fused = FusedSequential(conv(), nn.ReLU(), LocalResponseNorm(5), pool(), WithinMapResponseNorm(3)).eval()
        traced = torch.fx.symbolic_trace(fused)
        x = image().float()
        torch.testing.assert_close(traced(x), fused(x))


class TestTransforms:
    """The ops do not support torch.func and forward-mode differentiation: the children run one by one."""

    @pytest.fixture
    def nets(self) -> tuple[nn.Module, nn.Module]:
        model = small_net().double().eval()
        return fuse(copy.deepcopy(model)), model

    def test_gradient_per_sample(self, nets: tuple[nn.Module, nn.Module], calls: list[str]) -> None:
        def gradients(model: nn.Module) -> dict[str, Tensor]:
            def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
                return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

            parameters = {name: p.detach() for name, p in model.named_parameters()}
            return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

        x = image()
        fused, expected = map(gradients, nets)
        for name, value in expected.items():
            torch.testing.assert_close(fused[name], value)
        assert calls == []

    def test_jvp(self, nets: tuple[nn.Module, nn.Module]) -> None:
        x, tangent = image(), image()
        (_, fused), (_, expected) = (torch.func.jvp(model, (x,), (tangent,)) for model in nets)
        assert expected.abs().max() > 0
        torch.testing.assert_close(fused, expected)

    def test_dual_numbers(self, nets: tuple[nn.Module, nn.Module]) -> None:
        x, tangent = image(), image()
        with forward_ad.dual_level():
            duals = [forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))) for model in nets]
        torch.testing.assert_close(duals[0].tangent, duals[1].tangent)


class TestFuse:
    def test_undone_exactly(self) -> None:
        model = small_net().eval()
        before = [(name, id(part), type(part)) for name, part in model.named_modules()]
        keys, text = list(model.state_dict()), repr(model)
        x = image().float()
        expected = model(x)
        assert fuse(model) is model
        assert [type(part) for part in model.modules() if isinstance(part, nn.Sequential)] == [FusedSequential] * 3
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(x), expected)
        assert fuse(fuse(model)) is model
        assert unfuse(model) is model
        assert [(name, id(part), type(part)) for name, part in model.named_modules()] == before
        assert repr(model) == text
        assert torch.equal(model(x), expected)

    def test_runs_the_ops(self, calls: list[str]) -> None:
        fuse(small_net()).eval()(image().float())
        assert calls == [
            "conv2d",
            "lrn_max_pool2d+relu",
            "conv2d",
            "batch_norm_relu",
            "max_pool2d",
            "linear_relu_dropout",
            "linear",
        ]

    def test_hooks_and_references_stay(self) -> None:
        model = small_net().eval()
        inner, seen = model[0], []
        inner.register_forward_hook(lambda module, args, output: seen.append(type(module)))
        fuse(model)(image().float())
        assert model[0] is inner
        assert seen == [FusedSequential]

    def test_subclasses_stay(self) -> None:
        class Residual(nn.Sequential):
            def forward(self, input: Tensor) -> Tensor:
                return input + super().forward(input)

        model = fuse(nn.Sequential(Residual(conv(3, 3), nn.ReLU())))
        assert type(model[0]) is Residual
        assert type(model) is FusedSequential

    def test_model_without_containers(self) -> None:
        layer = nn.Linear(2, 2)
        assert fuse(layer) is layer
        assert type(layer) is nn.Linear

    @pytest.mark.parametrize("function", [fuse, unfuse])
    def test_refuses_what_is_no_module(self, function: Callable) -> None:
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
            function([nn.ReLU()])

    def test_same_training_step(self) -> None:
        model = small_net()
        for child in model.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
        assert_same_function(fuse(copy.deepcopy(model)), model, image())


class LPIPSFeatures(nn.Module):
    """AlexNet's features as the package lpips regroups them."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        slices = [(0, 2), (2, 5), (5, 8), (8, 10), (10, 12)]
        for i, (start, stop) in enumerate(slices, 1):
            part = nn.Sequential()
            for j in range(start, stop):
                part.add_module(str(j), features[j])
            setattr(self, f"slice{i}", part)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i in range(1, 6):
            x = getattr(self, f"slice{i}")(x)
            outputs.append(F.normalize(x, dim=1).mean((2, 3)))
        return torch.cat(outputs, 1)


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


class TestTorchvision:
    @pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg11_bn"])
    def test_same_outputs_and_gradients(self, name: str, calls: list[str]) -> None:
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):
            model = getattr(models, name)(num_classes=5)
        if name == "alexnet":
            model.classifier[1] = nn.Linear(256 * 36, 64)
            model.classifier[4] = nn.Linear(64, 64)
            model.classifier[6] = nn.Linear(64, 5)
        else:
            model = model.features
        model = model.to_empty(device="cpu").double().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                layer.reset_parameters()
        x = torch.randn(2, 3, *((95, 64) if name == "alexnet" else (32, 32)), dtype=torch.float64).requires_grad_()
        expected = results(model, x)
        assert calls == []
        fused = results(fuse(model), x)
        again = results(unfuse(model), x)
        assert (
            set(calls)
            == {
                "alexnet": {"conv2d", "conv2d_relu", "max_pool2d+relu", "linear_relu_dropout", "linear"},
                "vgg11": {"conv2d", "conv2d_relu", "max_pool2d+relu"},
                "vgg11_bn": {"conv2d", "batch_norm_relu", "max_pool2d"},
            }[name]
        )
        for a, b, c in zip(expected, fused, again, strict=True):
            largest = a.abs().max().item()
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9 * largest)
            assert torch.equal(c, a)

    def test_lpips(self, calls: list[str]) -> None:
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):
            features = models.alexnet().features
        features.to_empty(device="cpu")
        for layer in features:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        model = LPIPSFeatures(features).double()
        other = fuse(copy.deepcopy(model))
        assert_same_function(other, model, torch.randn(1, 3, 80, 64, dtype=torch.float64))
        assert calls == ["conv2d_relu", *["max_pool2d", "conv2d_relu"] * 2, "conv2d_relu", "conv2d_relu"]
