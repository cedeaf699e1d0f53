"""Every preset against its own layer-by-layer definition in plain torch.nn, written from the sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels.models import PRESETS, AlexNet, Initialization, Preset

Parameters = list[tuple[Tensor, Tensor]]


def lrn_sum(x: Tensor, n: int, alpha: float, beta: float, k: float) -> Tensor:
    """The formula as the paper prints it: the sum is not divided by n."""
    channels = x.shape[1]
    squares = F.pad(x * x, (0, 0, 0, 0, n // 2, n // 2))
    total = sum(squares[:, shift : shift + channels] for shift in range(n))
    return x / (k + alpha * total) ** beta


def lrn_mean(x: Tensor, alpha: float, beta: float, k: float) -> Tensor:
    return F.local_response_norm(x, 5, alpha, beta, k)


def by_tower(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(half) for half in x.chunk(2, 1)], 1)


def tower_conv(x: Tensor, parameters: tuple[Tensor, Tensor], padding: int) -> Tensor:
    """Each tower's filters on its own half of the channels."""
    weights, biases = (p.chunk(2) for p in parameters)
    halves = x.chunk(2, 1)
    return torch.cat([F.conv2d(halves[i], weights[i], biases[i], padding=padding) for i in (0, 1)], 1)


def fc_layers(x: Tensor, p: Parameters, test_scale: float = 1.0) -> Tensor:
    x = x.flatten(1)
    for weight, bias in p[5:7]:
        x = F.linear(x, weight, bias).clamp(min=0) * test_scale
    return F.linear(x, *p[7])


def towers_345(x: Tensor, p: Parameters) -> Tensor:
    x = F.relu(F.conv2d(x, *p[2], padding=1))
    x = F.relu(tower_conv(x, p[3], 1))
    return tower_conv(x, p[4], 1)


def paper(x: Tensor, p: Parameters, test_scale: float) -> Tensor:
    for conv in (
        lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2)), *p[0], stride=4),
        lambda x: tower_conv(x, p[1], 2),
    ):
        x = F.max_pool2d(lrn_sum(F.relu(conv(x)), n=5, alpha=1e-4, beta=0.75, k=2), 3, 2)
    return fc_layers(F.max_pool2d(F.relu(towers_345(x, p)), 3, 2), p, test_scale)


def as_run(x: Tensor, p: Parameters, test_scale: float) -> Tensor:
    def tower_norm(x: Tensor) -> Tensor:
        return by_tower(lambda half: lrn_mean(half, 1e-4, 0.75, 2.0), x)

    x = F.conv2d(F.pad(x, (0, 3, 0, 3)), *p[0], stride=4)
    x = F.relu(F.max_pool2d(tower_norm(x), 3, 2))
    x = tower_norm(F.relu(tower_conv(x, p[1], 2)))
    x = x / (1 + 1e-3 * F.avg_pool2d(x * x, 5, 1, 2, count_include_pad=True)) ** 0.75
    x = F.max_pool2d(x, 3, 2)
    return fc_layers(F.relu(F.max_pool2d(towers_345(x, p), 3, 2)), p, test_scale)


def caffe(x: Tensor, p: Parameters, test_scale: float) -> Tensor:
    x = F.relu(F.conv2d(x, *p[0], stride=4))
    x = F.max_pool2d(lrn_mean(x, 1e-4, 0.75, 1.0), 3, 2, ceil_mode=True)
    x = F.relu(tower_conv(x, p[1], 2))
    x = F.max_pool2d(lrn_mean(x, 1e-4, 0.75, 1.0), 3, 2, ceil_mode=True)
    return fc_layers(F.max_pool2d(F.relu(towers_345(x, p)), 3, 2, ceil_mode=True), p)


def caffenet(x: Tensor, p: Parameters, test_scale: float) -> Tensor:
    x = F.relu(F.conv2d(x, *p[0], stride=4))
    x = lrn_mean(F.max_pool2d(x, 3, 2, ceil_mode=True), 1e-4, 0.75, 1.0)
    x = F.relu(tower_conv(x, p[1], 2))
    x = lrn_mean(F.max_pool2d(x, 3, 2, ceil_mode=True), 1e-4, 0.75, 1.0)
    return fc_layers(F.max_pool2d(F.relu(towers_345(x, p)), 3, 2, ceil_mode=True), p)


def torchvision(x: Tensor, p: Parameters, test_scale: float) -> Tensor:
    x = F.max_pool2d(F.relu(F.conv2d(x, *p[0], stride=4, padding=2)), 3, 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, *p[1], padding=2)), 3, 2)
    for layer in p[2:5]:
        x = F.relu(F.conv2d(x, *layer, padding=1))
    return fc_layers(F.max_pool2d(x, 3, 2), p)


DEFINITIONS = {
    "paper": paper,
    "as_run": as_run,
    "caffe": caffe,
    "caffenet": caffenet,
    "torchvision": torchvision,
}


def spread(model: AlexNet) -> AlexNet:
    """Weights that keep activations near 100, where every normalisation's alpha matters."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                layer.bias.normal_(std=10)
    return model


def layers(model: AlexNet) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def values(out: Tensor, x: Tensor, model: nn.Module) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *model.parameters()])]


def images(size: int) -> Tensor:
    return (100 * torch.randn(2, 3, size, size, dtype=torch.float64)).requires_grad_()


def assert_all_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    # Batch statistics make the gradient of a convolution's bias zero up to rounding.
    largest = max(value.abs().max().item() for value in expected[1:])
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11 * largest, msg=lambda text, i=i: f"value {i}: {text}")


class TestDefinition:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", DEFINITIONS)
    def test_forward_and_gradients(self, name: str, training: bool) -> None:
        model = spread(AlexNet(num_classes=10, preset=name, width=0.1, dropout=0.0)).double().train(training)
        x = images(PRESETS[name].input_size)
        parameters = [(layer.weight, layer.bias) for layer in layers(model)]
        assert_all_close(values(model(x), x, model), values(DEFINITIONS[name](x, parameters, 1.0), x, model))

    @pytest.mark.parametrize("name", DEFINITIONS)
    def test_evaluation_with_dropout(self, name: str) -> None:
        """Only the paper's dropout touches evaluation: fc6 and fc7 outputs times 0.5."""
        model = spread(AlexNet(num_classes=10, preset=name, width=0.1)).double().eval()
        x = images(PRESETS[name].input_size)
        parameters = [(layer.weight, layer.bias) for layer in layers(model)]
        torch.testing.assert_close(model(x), DEFINITIONS[name](x, parameters, 0.5))

    @pytest.mark.parametrize("name", ["caffe", "caffenet"])
    def test_caffe_fed_with_224(self, name: str) -> None:
        """The ONNX zoo's bvlc_alexnet: 54, 27, 13, 6, with the pools rounded up."""
        model = spread(AlexNet(num_classes=10, preset=name, width=0.1)).double().eval()
        x = images(224)
        parameters = [(layer.weight, layer.bias) for layer in layers(model)]
        torch.testing.assert_close(model(x), DEFINITIONS[name](x, parameters, 1.0))

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_batchnorm(self, training: bool) -> None:
        model = AlexNet(num_classes=10, preset="batchnorm", width=0.1, dropout=0.0)
        model = spread(model).double().train(training)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 2
        for norm in norms:
            for value in (norm.running_mean, norm.weight.data, norm.bias.data):
                value.normal_()
            norm.running_var.uniform_(0.5, 2)
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        p = [(layer.weight, layer.bias) for layer in layers(model)]

        x = images(224)
        h = x
        for i, (stride, padding) in enumerate(((4, 2), (1, 2))):
            h = F.conv2d(h, *p[i], stride=stride, padding=padding)
            h = F.batch_norm(h, *before[i], norms[i].weight, norms[i].bias, training)
            h = F.max_pool2d(F.relu(h), 2, 2)
        for layer in p[2:5]:
            h = F.relu(F.conv2d(h, *layer, padding=1))
        expected = fc_layers(F.max_pool2d(h, 3, 2), p)

        assert_all_close(values(model(x), x, model), values(expected, x, model))
        for norm, (mean, var) in zip(norms, before, strict=True):
            torch.testing.assert_close(norm.running_mean, mean)
            torch.testing.assert_close(norm.running_var, var)
            assert norm.num_batches_tracked == int(training)

    @pytest.mark.parametrize("name", PRESETS)
    def test_fusing_changes_nothing(self, name: str) -> None:
        from alexnet_kernels import fuse, unfuse

        model = spread(AlexNet(num_classes=10, preset=name, width=0.1, dropout=0.0)).double().eval()
        x = images(PRESETS[name].input_size)
        assert_all_close(values(fuse(model)(x), x, model), values(unfuse(model)(x), x, model))


class TestDropout:
    @pytest.mark.parametrize(
        ("name", "factor"),
        [("paper", 1.0), ("as_run", 1.0), ("caffe", 2.0), ("caffenet", 2.0), ("batchnorm", 2.0)],
    )
    def test_on_outputs(self, name: str, factor: float) -> None:
        model = AlexNet(num_classes=10, preset=name, width=0.25, device="cpu")
        spread(model)
        fc6, fc7, fc8 = layers(model)[5:]
        received: dict[nn.Module, Tensor] = {}
        for layer in (fc6, fc7, fc8):
            layer.register_forward_pre_hook(lambda module, args: received.__setitem__(module, args[0].detach()))
        flat = torch.rand(8, fc6.in_features)
        model.classifier(flat)
        assert torch.equal(received[fc6], flat)
        for layer, below in ((fc7, fc6), (fc8, fc7)):
            whole = F.relu(below(received[below]))
            kept = received[layer] != 0
            torch.testing.assert_close(received[layer][kept], factor * whole[kept])
            assert 0.45 < (kept.sum() / (whole > 0).sum()).item() < 0.55

    def test_on_inputs_in_torchvision(self) -> None:
        model = spread(AlexNet(num_classes=10, preset="torchvision", width=0.25))
        fc6, fc7, fc8 = layers(model)[5:]
        received: dict[nn.Module, Tensor] = {}
        for layer in (fc6, fc7, fc8):
            layer.register_forward_pre_hook(lambda module, args: received.__setitem__(module, args[0].detach()))
        flat = torch.rand(8, fc6.in_features) + 0.1
        model.classifier(flat)
        for layer, whole in ((fc6, flat), (fc7, F.relu(fc6(received[fc6])))):
            kept = received[layer] != 0
            torch.testing.assert_close(received[layer][kept], 2 * whole[kept])
            assert 0.45 < (kept.sum() / (whole > 0).sum()).item() < 0.55
        torch.testing.assert_close(received[fc8], F.relu(fc7(received[fc7])))


# (weight std, bias) of conv1-conv5, fc6-fc8
INITIAL = {
    "paper": ([0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),
    "as_run": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
    "caffe": ([0.01] * 5 + [0.005] * 2 + [0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
    "caffenet": ([0.01] * 5 + [0.005] * 2 + [0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
}


class TestInitialValues:
    @pytest.mark.parametrize("name", INITIAL)
    def test_statistics(self, name: str) -> None:
        model = AlexNet(preset=name, width=0.5)
        for layer, std, bias in zip(layers(model), *INITIAL[name], strict=True):
            count = layer.weight.numel()
            assert layer.weight.std().item() == pytest.approx(std, rel=5 / (2 * count) ** 0.5)
            assert abs(layer.weight.mean().item()) < 5 * std / count**0.5
            assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))

    @pytest.mark.parametrize("name", ["torchvision", "batchnorm"])
    def test_torch_defaults(self, name: str) -> None:
        torch.manual_seed(3)
        model = AlexNet(num_classes=10, preset=name, width=0.1)
        torch.manual_seed(3)
        for layer in layers(model):
            options = {k: getattr(layer, k) for k in ("kernel_size", "groups") if hasattr(layer, k)}
            outputs, inputs = layer.weight.shape[:2]
            other = type(layer)(inputs, outputs, **options)
            assert torch.equal(layer.weight, other.weight)
            assert torch.equal(layer.bias, other.bias)

    @pytest.mark.parametrize("name", PRESETS)
    def test_reset_parameters(self, name: str) -> None:
        torch.manual_seed(3)
        model = AlexNet(num_classes=10, preset=name, width=0.1)
        first = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            for value in model.state_dict().values():
                value.fill_(7)
        torch.manual_seed(3)
        model.reset_parameters()
        for key, value in model.state_dict().items():
            assert torch.equal(value, first[key]), key

    def test_reset_parameters_of_a_changed_network(self) -> None:
        model = AlexNet(num_classes=10, width=0.1)
        model.classifier[-1] = nn.Identity()
        with pytest.raises(RuntimeError, match="knows the 8 layers of preset 'paper', but the model now has 7"):
            model.reset_parameters()


class TestPresets:
    def test_names(self) -> None:
        assert list(PRESETS) == ["paper", "as_run", "caffe", "caffenet", "torchvision", "batchnorm"]
        assert all(preset.name == name for name, preset in PRESETS.items())

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            PRESETS["paper"].groups = 1

    def test_own_preset(self) -> None:
        own = dataclasses.replace(
            PRESETS["paper"], name="small", neurons=64, initialization=Initialization((0.5,) * 8, (3.0,) * 8)
        )
        model = AlexNet(num_classes=10, preset=own)
        assert model.preset == "small"
        assert model.classifier[0].out_features == 64
        assert all((layer.bias == 3).all() for layer in layers(model))

    @pytest.mark.parametrize("missing", ["norm", "map_norm"])
    def test_undefined_layer(self, missing: str) -> None:
        broken: Preset = dataclasses.replace(PRESETS["as_run"], **{missing: None})
        with pytest.raises(ValueError, match=f"names '{missing}' in layer [12] and does not define it"):
            AlexNet(preset=broken, device="meta")
