"""AlexNet in what wraps a model: each client finds the same with torchvision's model that holds the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from alexnet_kernels import AlexNet, alexnet
from alexnet_kernels.nn import FusedSequential

models = pytest.importorskip("torchvision.models")
pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = 5


class Pair(NamedTuple):
    ours: AlexNet
    theirs: nn.Module


def shrunk(ours: AlexNet) -> nn.Module:
    """torchvision's model with the layers' sizes, and the weights, of ours."""
    with torch.device("meta"):
        theirs = models.alexnet(num_classes=CLASSES)
    for path, layer in ours.named_modules():
        if isinstance(layer, nn.Conv2d):
            plain: nn.Module = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            )
        elif isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features)
        else:
            continue
        theirs.set_submodule(path, plain)
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.fixture
def pair() -> Pair:
    """In evaluation mode; dropout does nothing in training either."""
    ours = alexnet(width=0.05, num_classes=CLASSES, dropout=0.0)
    theirs = shrunk(ours)
    for layer in theirs.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return Pair(ours.eval(), theirs.eval())


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 64, 64)


def assert_same(pair: Pair, client: Callable[[nn.Module], Any], **tolerances: float) -> None:
    """`client` gives the same for both models, from the same seed."""
    found = []
    for model in pair:
        torch.manual_seed(0)
        found.append(client(model))
    assert_close(*found, **tolerances)


def assert_close(a: Any, b: Any, **tolerances: float) -> None:
    torch.testing.assert_close(a, b, **(tolerances or {"rtol": 1e-4, "atol": 1e-5}))


def not_in_place(model: nn.Module) -> nn.Module:
    """The model with ReLUs as clients with hooks need them, torchvision's model too."""
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *parameters])]


def change_layers(change: Callable[[nn.Module], Any], model: nn.Module) -> nn.Module:
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            change(layer)
    return model


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
}


class TestTorch:
    @pytest.mark.parametrize("change", CHANGES)
    def test_reparametrisation(self, pair: Pair, x: Tensor, change: str) -> None:
        assert_same(pair, lambda model: gradients(change_layers(CHANGES[change], model), x))

    def test_data_parallel(self, pair: Pair, x: Tensor) -> None:
        assert_same(pair, lambda model: gradients(nn.DataParallel(model), x))

    def test_averaged_model(self, pair: Pair, x: Tensor) -> None:
        def average(model: nn.Module) -> list[Tensor]:
            averaged = torch.optim.swa_utils.AveragedModel(model)
            averaged.update_parameters(model)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)
            averaged.update_parameters(model)
            return gradients(averaged, x)

        assert_same(pair, average)

    def test_grad_scaler(self, pair: Pair, x: Tensor) -> None:
        def step(model: nn.Module) -> list[Tensor]:
            optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
            for _ in range(2):
                optimizer.zero_grad()
                scaler.scale(model.train()(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            return [*model.parameters(), torch.tensor(scaler.get_scale())]

        assert_same(pair, step)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpoint(self, pair: Pair, x: Tensor, reentrant: bool) -> None:
        def call(model: nn.Module) -> list[Tensor]:
            whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
            checkpoint(model, whole, use_reentrant=reentrant).square().sum().backward()
            features = checkpoint_sequential(not_in_place(model).features, 3, parts, use_reentrant=reentrant)
            features.square().sum().backward()
            return [whole.grad, parts.grad, *(p.grad for p in model.parameters())]

        assert_same(pair, call)

    def test_quantised_graph(self, pair: Pair, x: Tensor) -> None:
        quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
        mapping = torch.ao.quantization.get_default_qconfig_mapping("x86")

        def quantise(model: nn.Module) -> Tensor:
            not_in_place(model)
            prepared = quantize_fx.prepare_fx(model, mapping, (x,))
            prepared(x)
            return quantize_fx.convert_fx(prepared)(x)

        assert_same(pair, quantise, rtol=0, atol=0)

    def test_per_sample_gradients(self, pair: Pair, x: Tensor) -> None:
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        def call(model: nn.Module) -> list[Tensor]:
            call_for_per_sample_grads(model, batch_size=len(x))(x).square().sum().backward()
            return [p.grad_sample for p in model.parameters()]

        assert_same(pair, call)

    def test_mkldnn(self, pair: Pair) -> None:
        from torch.utils import mkldnn

        x = torch.rand(1, 3, 224, 224).to_mkldnn()  # mkldnn's average pool takes no maps below its output
        with torch.no_grad():
            assert_same(pair, lambda model: mkldnn.to_mkldnn(model)(x).to_dense())

    def test_jacobian_of_a_batch(self, pair: Pair, x: Tensor) -> None:
        jacobian = torch.autograd.functional.jacobian
        assert_same(pair, lambda model: jacobian(model, x[:1], vectorize=True))


ATTRIBUTIONS = (
    "Saliency",
    "InputXGradient",
    "IntegratedGradients",
    "GuidedBackprop",
    "Deconvolution",
    "DeepLift",
    "GradientShap",
    "Occlusion",
    "LRP",
)
LAYER_ATTRIBUTIONS = ("LayerGradCam", "LayerActivation", "LayerConductance", "LayerDeepLift", "GuidedGradCam")


class TestExplanations:
    @pytest.mark.parametrize("name", ATTRIBUTIONS)
    def test_captum(self, pair: Pair, x: Tensor, name: str) -> None:
        attr = pytest.importorskip("captum.attr")
        more: dict[str, Any] = {
            "IntegratedGradients": {"n_steps": 4},
            "GradientShap": {"baselines": torch.zeros_like(x), "n_samples": 2},
            "Occlusion": {"sliding_window_shapes": (3, 32, 32), "strides": (3, 32, 32)},
        }.get(name, {})

        def explain(model: nn.Module) -> Tensor:
            not_in_place(model)
            return getattr(attr, name)(model).attribute(x.clone().requires_grad_(), target=1, **more)

        assert_same(pair, explain, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("name", LAYER_ATTRIBUTIONS)
    def test_captum_of_a_layer(self, pair: Pair, x: Tensor, name: str) -> None:
        attr = pytest.importorskip("captum.attr")

        def explain(model: nn.Module) -> Tensor:
            not_in_place(model)
            arguments = {} if name == "LayerActivation" else {"target": 1}
            if name == "LayerConductance":
                arguments["n_steps"] = 3
            return getattr(attr, name)(model, model.features[6]).attribute(x.clone().requires_grad_(), **arguments)

        assert_same(pair, explain)

    def test_grad_cam(self, pair: Pair, x: Tensor) -> None:
        cam = pytest.importorskip("pytorch_grad_cam")
        targets = [cam.utils.model_targets.ClassifierOutputTarget(1)] * len(x)

        def explain(model: nn.Module) -> Tensor:
            with cam.GradCAM(model=model, target_layers=[model.features[-1]]) as found:
                return torch.from_numpy(found(input_tensor=x, targets=targets))

        assert_same(pair, explain, rtol=1e-3, atol=1e-3)


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if not layer._modules]


class TestAttacks:
    @pytest.mark.parametrize("name", ["FGSM", "PGD", "DeepFool"])
    def test_torchattacks(self, pair: Pair, x: Tensor, name: str) -> None:
        attacks = pytest.importorskip("torchattacks")
        more = {"FGSM": {}, "PGD": {"steps": 2, "random_start": False}, "DeepFool": {"steps": 3}}[name]
        labels = pair.theirs(x).argmax(1)
        assert_same(pair, lambda model: getattr(attacks, name)(model, **more)(x, labels), rtol=1e-3, atol=1e-3)

    def test_foolbox(self, pair: Pair, x: Tensor) -> None:
        foolbox = pytest.importorskip("foolbox")
        labels = pair.theirs(x).argmax(1)

        def attack(model: nn.Module) -> Tensor:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
            return foolbox.attacks.LinfFastGradientAttack(random_start=False)(wrapped, x, labels, epsilons=0.03)[0]

        assert_same(pair, attack)


class TestTrainers:
    @pytest.mark.parametrize("mode", ["hooks", "ew", "functorch"])
    def test_opacus(self, pair: Pair, x: Tensor, mode: str) -> None:
        pytest.importorskip("opacus")
        from opacus.grad_sample import wrap_model

        def call(model: nn.Module) -> list[Tensor]:
            wrapped = wrap_model(not_in_place(model).train(), mode)
            wrapped(x).square().sum().backward()
            return [p.grad_sample for p in wrapped.parameters()]

        assert_same(pair, call)

    def test_accelerate(self, pair: Pair, x: Tensor) -> None:
        accelerate = pytest.importorskip("accelerate")

        def step(model: nn.Module) -> list[Tensor]:
            accelerator = accelerate.Accelerator(cpu=True)
            prepared, optimizer = accelerator.prepare(model.train(), torch.optim.SGD(model.parameters(), 0.1))
            accelerator.backward(prepared(x).square().mean())
            optimizer.step()
            return list(model.parameters())

        assert_same(pair, step)

    def test_accelerate_offloads(self, pair: Pair, x: Tensor) -> None:
        accelerate = pytest.importorskip("accelerate")
        with torch.no_grad():
            assert_same(pair, lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu"))(x))

    def test_timm(self, pair: Pair, x: Tensor) -> None:
        timm = pytest.importorskip("timm.utils")

        def step(model: nn.Module) -> list[Tensor]:
            timm.freeze(model, "features.0")
            ema = timm.ModelEmaV3(model, decay=0.5)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
            model.train()(x).square().mean().backward()
            optimizer.step()
            ema.update(model)
            return [*gradients(model, x), ema.module(x), *ema.module.parameters()]

        assert_same(pair, step)

    @pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
    def test_torchao(self, pair: Pair, x: Tensor, kind: str) -> None:
        quantization = pytest.importorskip("torchao.quantization")

        def quantise(model: nn.Module) -> Tensor:
            quantization.quantize_(model, getattr(quantization, kind)())
            with torch.no_grad():
                return model(x)

        assert_same(pair, quantise)

    def test_tensordict(self, pair: Pair, x: Tensor) -> None:
        tensordict = pytest.importorskip("tensordict")

        def call(model: nn.Module) -> list[Tensor]:
            parameters = tensordict.from_module(model)
            doubled = (parameters.data * 2).clone()
            with doubled.to_module(model):
                first = model(x)
            held = tensordict.TensorDictParams(parameters.data.clone())
            with held.to_module(model):
                second = model(x)
                second.square().sum().backward()
            stacked = torch.stack([parameters.data, doubled])

            def functional(parameters: Any) -> Tensor:
                with parameters.to_module(model):
                    return model(x)

            return [first, second, *(p.grad for p in held.parameters()), torch.vmap(functional)(stacked)]

        assert_same(pair, call)


class TestTorchvision:
    def test_feature_extractor(self, pair: Pair, x: Tensor) -> None:
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        nodes = ["features.2", "features.9", "classifier.4", "classifier.6"]
        assert_same(pair, lambda model: extraction.create_feature_extractor(model, nodes)(x))

    def test_backbone_of_a_detector(self, pair: Pair) -> None:
        detection = pytest.importorskip("torchvision.models.detection")
        assert type(pair.ours.features) is FusedSequential

        def detect(model: nn.Module) -> list[Tensor]:
            backbone = model.features
            backbone.out_channels = model.features[10].out_channels
            anchors = detection.anchor_utils.AnchorGenerator(((32, 64),), ((1.0,),))
            detector = detection.FasterRCNN(
                backbone,
                num_classes=2,
                min_size=96,
                max_size=96,
                rpn_anchor_generator=anchors,
                box_roi_pool=models.detection.faster_rcnn.MultiScaleRoIAlign(["0"], 2, 1),
                rpn_post_nms_top_n_train=8,
            )
            torch.manual_seed(1)
            boxes = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
            target = {"boxes": boxes, "labels": torch.tensor([1])}
            losses = detector.train()([torch.rand(3, 96, 96)], [target])
            sum(losses.values()).backward()
            return [*losses.values(), *(p.grad for p in backbone.parameters())]

        assert_same(pair, detect)
