"""AlexNet: sizes, counts, weights, errors, and the ways people use one."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alexnet_kernels.models.weights as weights_module
from alexnet_kernels import unfuse
from alexnet_kernels.models import (
    PRESETS,
    AlexNet,
    alexnet,
    count_layers,
    count_macs,
    count_parameters,
)
from alexnet_kernels.nn import FusedSequential

TWO_TOWERS = {  # weight shape, output, parameters, multiply-adds
    "conv1": ((96, 3, 11, 11), (96, 55, 55), 34_944, 105_415_200),
    "conv2": ((256, 48, 5, 5), (256, 27, 27), 307_456, 223_948_800),
    "conv3": ((384, 256, 3, 3), (384, 13, 13), 885_120, 149_520_384),
    "conv4": ((384, 192, 3, 3), (384, 13, 13), 663_936, 112_140_288),
    "conv5": ((256, 192, 3, 3), (256, 13, 13), 442_624, 74_760_192),
    "fc6": ((4096, 9216), (4096,), 37_752_832, 37_748_736),
    "fc7": ((4096, 4096), (4096,), 16_781_312, 16_777_216),
    "fc8": ((1000, 4096), (1000,), 4_097_000, 4_096_000),
}


def meta(**kwargs: object) -> AlexNet:
    return AlexNet(**kwargs, device="meta")


def small(**kwargs: object) -> AlexNet:
    return AlexNet(**{"num_classes": 10, "width": 0.1, **kwargs}).eval()


class TestCounts:
    @pytest.mark.parametrize("preset", ["paper", "as_run", "caffe", "caffenet"])
    def test_two_towers(self, preset: str) -> None:
        model = meta(preset=preset)
        assert count_parameters(model) == 60_965_224
        assert count_macs(model) == 724_406_816
        found = [
            (layer.weight_shape, layer.output_shape, layer.parameters, layer.macs) for layer in count_layers(model)
        ]
        assert found == list(TWO_TOWERS.values())

    def test_torchvision(self) -> None:
        model = meta(preset="torchvision")
        assert count_parameters(model) == 61_100_840
        assert count_macs(model) == 714_188_480
        names = [layer.name for layer in count_layers(model)]
        assert names == [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]

    def test_figure_2_of_the_paper_miscounts_layer_1(self) -> None:
        channels, height, width = count_layers(meta())[0].output_shape
        assert channels * height * width == 290_400

    def test_counting_leaves_the_model_alone(self) -> None:
        model = small(preset="batchnorm").train()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        generator = torch.get_rng_state()
        macs = count_macs(model)
        assert macs == count_macs(small(preset="batchnorm", device="meta"))
        assert model.training
        assert torch.equal(torch.get_rng_state(), generator)
        for key, value in model.state_dict().items():
            assert value.device.type == "cpu"
            assert torch.equal(value, state[key])
        assert not any(module._forward_hooks for module in model.modules())

    def test_other_models_and_sizes(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 3 * 5, 2))
        assert count_macs(model, (5, 7)) == 15 * 8 * 2 * 9 + 240
        assert count_parameters(model) == 8 * 2 * 9 + 8 + 240 + 2
        with pytest.raises(ValueError, match="Sequential has no input_size: pass one"):
            count_macs(model)
        with pytest.raises(ValueError, match="Linear has no Conv2d"):
            count_macs(nn.Linear(2, 2), 4)


WAYS = {
    "paper": ({"preset": "paper"}, 224, (55, 27, 13, 13, 13)),
    "as_run": ({"preset": "as_run"}, 224, (55, 27, 13, 13, 13)),
    "caffe": ({"preset": "caffe"}, 227, (55, 27, 13, 13, 13)),
    "caffenet": ({"preset": "caffenet"}, 227, (55, 27, 13, 13, 13)),
    "torchvision": ({"preset": "torchvision"}, 224, (55, 27, 13, 13, 13)),
    "batchnorm": ({"preset": "batchnorm"}, 224, (55, 27, 13, 13, 13)),
    "zoo": ({"preset": "caffe"}, 224, (54, 27, 13, 13, 13)),
    "paper-uneven": ({"preset": "paper", "conv1_padding": (0, 3, 0, 3)}, 224, (55, 27, 13, 13, 13)),
    "paper-227": ({"preset": "paper", "conv1_padding": 0}, 227, (55, 27, 13, 13, 13)),
    "as_run-even": ({"preset": "as_run", "conv1_padding": 2}, 224, (55, 27, 13, 13, 13)),
    "caffe-224": ({"preset": "caffe", "conv1_padding": 2}, 224, (55, 27, 13, 13, 13)),
    "torchvision-one": ({"preset": "torchvision", "conv1_padding": (1, 2, 1, 2)}, 224, (55, 27, 13, 13, 13)),
}


class TestSizes:
    @pytest.mark.parametrize("way", WAYS)
    def test_maps(self, way: str) -> None:
        options, size, maps = WAYS[way]
        model = meta(width=0.1, **options)
        counts = count_layers(model, size)
        assert tuple(layer.output_shape[1] for layer in counts[:5]) == maps
        assert all(layer.output_shape[1] == layer.output_shape[2] for layer in counts[:5])
        assert model.features(torch.empty(1, 3, size, size, device="meta")).shape[2:] == (6, 6)
        if way != "zoo":
            assert model.input_size == size

    def test_uneven_padding_is_at_the_right_and_bottom(self) -> None:
        model = small(conv1_padding=(0, 3, 0, 3))
        assert isinstance(model.features[0], nn.ZeroPad2d)
        x = torch.randn(1, 3, 80, 96)
        conv = model.features[1]
        expected = F.conv2d(F.pad(x, (0, 3, 0, 3)), conv.weight, conv.bias, stride=4)
        torch.testing.assert_close(model.features[:2](x), expected)

    def test_padding_that_differs_by_axis(self) -> None:
        model = small(conv1_padding=(2, 2, 1, 1))
        assert model.features[0].padding == (1, 2)

    @pytest.mark.parametrize("shape", [(3, 63, 63), (3, 64, 300), (3, 224, 224)], ids=["smallest", "wide", "usual"])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    def test_any_size_and_format(self, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
        model = small()
        x = torch.randn(2, *shape)
        expected = model(x)
        assert expected.shape == (2, 10)
        torch.testing.assert_close(model.to(memory_format=memory_format)(x.to(memory_format=memory_format)), expected)
        assert model(x[:0]).shape == (0, 10)

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("axis", [0, 1], ids=["height", "width"])
    def test_smallest_size(self, preset: str, axis: int) -> None:
        model = unfuse(small(preset=preset))
        size = list(model.min_size)
        assert model(torch.randn(1, 3, *size)).shape == (1, 10)
        assert small(preset=preset)(torch.randn(1, 3, *size)).shape == (1, 10)
        size[axis] -= 1
        with pytest.raises(RuntimeError, match=r"too small|Kernel size can't be greater"):
            model.features(torch.randn(1, 3, *size))
        smallest = " x ".join(map(str, model.min_size))
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} are too small .* the smallest size is {smallest}"):
            model(torch.randn(1, 3, *size))

    @pytest.mark.parametrize(
        ("width", "filters", "neurons"),
        [(1, (96, 256, 384, 384, 256), 4096), (0.5, (48, 128, 192, 192, 128), 2048), (0.01, (16,) * 5, 48)],
    )
    def test_width(self, width: float, filters: tuple[int, ...], neurons: int) -> None:
        model = meta(preset="as_run", width=width)
        convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
        assert tuple(conv.out_channels for conv in convs) == filters
        assert [conv.groups for conv in convs] == [1, 2, 1, 2, 2]
        assert [m.out_features for m in model.classifier if isinstance(m, nn.Linear)] == [
            neurons,
            neurons,
            1000,
        ]

    @pytest.mark.parametrize("width", [0.03, 0.3, 0.77, 1.9])
    @pytest.mark.parametrize(("preset", "multiple"), [("paper", 16), ("torchvision", 8)])
    def test_odd_widths_stay_divisible(self, preset: str, multiple: int, width: float) -> None:
        model = meta(preset=preset, width=width)
        assert all(m.out_channels % multiple == 0 for m in model.features if isinstance(m, nn.Conv2d))
        assert model.classifier[-1].in_features % multiple == 0

    def test_in_channels(self) -> None:
        assert small(in_channels=1)(torch.randn(2, 1, 64, 64)).shape == (2, 10)

    def test_device_and_dtype(self) -> None:
        model = small(dtype=torch.float64)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {p.device.type for p in meta().parameters()} == {"meta"}
        with torch.device("meta"):
            assert {p.device.type for p in AlexNet().parameters()} == {"meta"}


class TestConstructorErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                {"preset": "vgg"},
                ValueError,
                r"preset must be one of paper, as_run, .*, or a Preset, got 'vgg'",
            ),
            ({"preset": 3}, ValueError, "preset must be one of .* got 3"),
            ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
            ({"num_classes": 10.0}, TypeError, "num_classes must be an int, got float"),
            ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
            ({"in_channels": True}, TypeError, "in_channels must be an int, got bool"),
            ({"dropout": 1.5}, ValueError, r"dropout must be a probability in \[0, 1\], got 1.5"),
            ({"dropout": float("nan")}, ValueError, "dropout must be a probability"),
            ({"width": 0}, ValueError, "width must be a positive factor, got 0"),
            ({"width": float("inf")}, ValueError, "width must be a positive factor, got inf"),
            (
                {"conv1_padding": -1},
                ValueError,
                r"conv1_padding must be .* \(left, right, top, bottom\), got -1",
            ),
            ({"conv1_padding": (1, 2)}, ValueError, r"conv1_padding must be .* got \(1, 2\)"),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    def test_refusal(self, arguments: dict, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            meta(**arguments)


class TestInputErrors:
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(3, 224, 224), r"expected images \[N, 3, H, W\], got shape \(3, 224, 224\)"),
            (torch.zeros(2, 1, 224, 224), r"expected 3 channels, got shape \(2, 1, 224, 224\)"),
            (torch.zeros(2, 224, 224, 3), r"expected 3 channels, got shape \(2, 224, 224, 3\)"),
            (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), r"floating-point dtype, got torch\.uint8"),
            (torch.zeros(2, 3, 64, 64).half(), r"parameters' dtype torch\.float32, got torch\.float16"),
            (torch.zeros(2, 3, 62, 224), r"62 x 224 are too small .* the smallest size is 63 x 63"),
            (torch.zeros(2, 3, 0, 0), r"0 x 0 are too small"),
        ],
        ids=["rank", "grey", "channels-last-shape", "bytes", "half", "small", "empty"],
    )
    def test_refusal(self, x: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small()(x)

    def test_autocast_takes_other_dtypes(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = small()(torch.randn(2, 3, 64, 64).bfloat16())
        assert out.dtype == torch.bfloat16

    def test_replaced_first_layer_brings_its_own_rules(self) -> None:
        model = small(preset="torchvision")
        model.features[0] = nn.Conv2d(1, model.features[0].out_channels, 3, padding=1)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
        with pytest.raises(ValueError, match="the smallest size is 15 x 15"):
            model(torch.randn(2, 1, 14, 15))
        with pytest.raises(ValueError, match="expected 1 channels"):
            model(torch.randn(2, 3, 32, 32))
        model.features[0] = nn.Sequential(model.features[0])
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)


class TestUse:
    def test_structure(self) -> None:
        model = meta(preset="torchvision")
        assert [name for name, _ in model.named_children()] == ["features", "avgpool", "classifier"]
        assert (len(model.features), len(model.classifier)) == (13, 7)
        assert type(model.features) is type(model.classifier) is FusedSequential
        assert isinstance(model.avgpool, nn.AdaptiveAvgPool2d)
        kinds = [type(child) for child in model.features]
        assert kinds == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2 + [nn.Conv2d, nn.ReLU] * 3 + [nn.MaxPool2d]

    def test_average_of_a_model_that_a_former_version_pickled(self) -> None:
        assert pickle.loads(b"calexnet_kernels.nn.modules\nAdaptiveAvgPool2d\n.") is nn.AdaptiveAvgPool2d

    def test_hook_sees_what_precedes_the_relu(self) -> None:
        model = small()
        seen: list[Tensor] = []
        model.features[0].register_forward_hook(lambda module, args, output: seen.append(output))
        x = torch.randn(2, 3, 64, 64)
        out = model(x)
        assert (seen[0] < 0).any()
        torch.testing.assert_close(out, unfuse(model)(x))

    @pytest.mark.parametrize("head", [lambda n: nn.Linear(n, 4), lambda n: nn.Identity()], ids=["linear", "identity"])
    def test_replaced_head(self, head) -> None:
        model = small()
        model.classifier[-1] = head(model.classifier[-1].in_features)
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x), unfuse(copy.deepcopy(model))(x))

    def test_copies(self) -> None:
        model = small(preset="as_run")
        x = torch.randn(2, 3, 64, 64)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
            other.reset_parameters()
            assert other.preset == "as_run"

    def test_frozen_weights_still_give_the_input_a_gradient(self) -> None:
        model = small(preset="torchvision").requires_grad_(False)
        x = torch.randn(2, 3, 64, 64, requires_grad=True)
        (fused,) = torch.autograd.grad(model.features(x).square().sum(), x)
        (expected,) = torch.autograd.grad(unfuse(model).features(x).square().sum(), x)
        torch.testing.assert_close(fused, expected)

    def test_compile(self, fresh_dynamo: None) -> None:
        model = small(preset="as_run")
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))

    def test_export(self) -> None:
        model = small()
        x = torch.randn(2, 3, 64, 64)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
        x = torch.cat([x, x])
        torch.testing.assert_close(program.module()(x), model(x))

    def test_symbolic_trace(self) -> None:
        model = small(preset="as_run")
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))

    def test_repr_names_the_preset(self) -> None:
        assert "preset='caffe'" in repr(meta(preset="caffe"))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return AlexNet(num_classes=10, preset="torchvision", width=0.1).state_dict()


NARROW = {"width": 0.1}


def assert_holds(model: AlexNet, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


class TestWeights:
    def test_none(self) -> None:
        torch.manual_seed(1)
        model = alexnet(num_classes=10, **NARROW)
        torch.manual_seed(1)
        assert_holds(model, AlexNet(num_classes=10, preset="torchvision", **NARROW).state_dict())
        assert model.preset == "torchvision"
        assert alexnet(None, False, device="meta").classifier[-1].out_features == 1000

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".npz", ".safetensors"])
    def test_files(self, suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
        path = tmp_path / f"weights{suffix}"
        if suffix == ".npz":
            numpy.savez(path, **{key: value.numpy() for key, value in state.items()})
        elif suffix == ".safetensors":
            pytest.importorskip("safetensors.torch").save_file(state, path)
        else:
            torch.save(state, path)
        assert_holds(alexnet(path, **NARROW), state)
        assert_holds(alexnet(weights=str(path), **NARROW), state)

    def test_state_dict(self, state: dict[str, Tensor]) -> None:
        model = alexnet(state, **NARROW)
        assert_holds(model, state)
        assert model.classifier[-1].out_features == 10

    def test_other_preset(self) -> None:
        state = small(preset="caffe").state_dict()
        assert_holds(alexnet(state, preset="caffe", **NARROW), state)

    def test_torchvision_takes_and_gives_state_dicts(self) -> None:
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(7)
        theirs = models.alexnet().eval()
        torch.manual_seed(7)
        ours = alexnet().eval()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert_holds(ours, theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

    def test_without_safetensors(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
        path = tmp_path / "weights.safetensors"
        path.write_bytes(b"\2" + bytes(7) + b"{}")
        with pytest.raises(
            ImportError, match=r"needs safetensors; install it with: pip install 'alexnet_kernels.weights"
        ):
            alexnet(path)

    def test_features_alone(self, state: dict[str, Tensor]) -> None:
        features = {key: value for key, value in state.items() if key.startswith("features.")}
        with pytest.raises(ValueError, match=r"missing classifier.1.weight.* strict=False takes"):
            alexnet(features, num_classes=10, **NARROW)
        with pytest.warns(UserWarning, match="holds only the features: the classifier keeps its untrained"):
            model = alexnet(features, num_classes=10, strict=False, **NARROW)
        assert_holds(model.features, {key.removeprefix("features."): v for key, v in features.items()})

    def test_whole_state_does_not_warn(self, state: dict[str, Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alexnet(state, strict=False, **NARROW)

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: s.pop("features.3.bias"),
                "state dict does not fit preset 'torchvision': missing features.3.bias",
            ),
            (lambda s: s.pop("classifier.1.bias"), "missing classifier.1.bias"),
            (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
            (
                lambda s: s.update({"features.0.weight": torch.zeros(8, 3, 11, 10)}),
                r"of another shape features.0.weight \(8, 3, 11, 10\) for \(8, 3, 11, 11\)",
            ),
            (lambda s: s.update({"features.0.weight": 3}), "its entry 'features.0.weight' is of type int"),
        ],
        ids=["missing", "missing-fc", "unexpected", "shape", "type"],
    )
    def test_states_that_do_not_fit(self, change, message: str, strict: bool, state: dict[str, Tensor]) -> None:
        change(state)
        with pytest.raises(ValueError, match=message):
            alexnet(state, strict=strict, **NARROW)

    @pytest.mark.parametrize("preset", ["paper", "as_run", "batchnorm"])
    def test_weights_of_another_preset(self, preset: str) -> None:
        fits = "paper|caffe|caffenet" if preset == "paper" else preset
        with pytest.raises(ValueError, match=f"does not fit preset 'torchvision': .*; they fit preset='({fits})'"):
            alexnet(small(preset=preset).state_dict(), num_classes=10, **NARROW)

    def test_other_number_of_classes(self, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=r"classifier.6.weight \(10, 408\) for \(1000, 408\)"):
            alexnet(state, num_classes=1000, **NARROW)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no weights file at '.*absent.pt'"):
            alexnet(tmp_path / "absent.pt")
        with pytest.raises(FileNotFoundError, match=r"none of torchvision's names either \(IMAGENET1K_V1, DEFAULT\)"):
            alexnet("IMAGENET1K_V2")
        torch.save([1, 2], tmp_path / "list.pt")
        with pytest.raises(ValueError, match=r"list.pt' holds a list, not a state dict"):
            alexnet(tmp_path / "list.pt")
        with pytest.raises(TypeError, match=r"weights must be None, a state dict, .* got int"):
            alexnet(3)

    def test_files_run_no_code(self, tmp_path: Path) -> None:
        """A pickled model is data: its tensors are found, its classes are not looked up."""
        model = small()
        torch.save(model, tmp_path / "module.pt")
        assert_holds(alexnet(tmp_path / "module.pt", preset=model.preset, **NARROW), model.state_dict())

    def test_names(self) -> None:
        models = pytest.importorskip("torchvision.models")
        assert set(models.AlexNet_Weights.__members__) == set(weights_module._WEIGHT_NAMES)
