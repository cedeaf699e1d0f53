"""Programs that leave this process: ONNX, TorchScript, torch.export, AOTInductor, quantisation. Tools that look in."""

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_kernels import AlexNet, _library, alexnet, fuse, ops, use_backend
from alexnet_kernels.models import ONNX_ZOO, PRESETS, read_weights
from alexnet_kernels.models import weights as weights_module
from alexnet_kernels.nn import Dropout, FusedSequential, LocalResponseNorm, WithinMapResponseNorm

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
BATCH = ({0: torch.export.Dim.AUTO},)


def small(**kwargs: Any) -> AlexNet:
    torch.manual_seed(0)
    model = AlexNet(**{"num_classes": 10, "width": 0.05, **kwargs}).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # outputs of order one: the presets' are small
            nn.init.kaiming_normal_(layer.weight)
    return model


class Odd(nn.Module):
    """fuse()d layers of every kind, with windows of even sizes and more channels in them than there are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            LocalResponseNorm(4, 0.5, 0.75, 1.5, groups=2),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.Sequential(nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.ReLU(), nn.LocalResponseNorm(7), nn.MaxPool2d(2)),
            WithinMapResponseNorm(2, 0.5),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 6),
            nn.ReLU(),
            Dropout(0.3, scale_at="inference"),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def odd() -> Odd:
    torch.manual_seed(0)
    return fuse(Odd()).eval()


def direct(x: Tensor) -> Tensor:
    """The ops, called by hand."""
    weight, vector = torch.linspace(-1, 1, 8 * 3 * 9).reshape(8, 3, 3, 3), torch.linspace(0.5, 2, 8)
    x = ops.conv2d_relu(x, weight, vector, 2, 1)
    x = ops.batch_norm_relu(x, vector, vector, vector, vector)
    x = ops.lrn_max_pool2d(x, 5, groups=2, bias=vector, relu=True)
    x = ops.max_pool2d(x, 3, 2, 1, True)
    x = ops.local_response_norm(x, 4)
    x = ops.dropout(x, 0.5, False, scale_at="inference").mean((2, 3))
    return ops.linear_relu_dropout(x, torch.linspace(-1, 1, 40).reshape(5, 8), None, 0.5, False)


class Direct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return direct(x)


MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    **{name: lambda name=name: (small(preset=name), PRESETS[name].input_size) for name in PRESETS},
    "fused": lambda: (odd(), 33),
    "ops": lambda: (Direct(), 33),
}
BUILT = [name for name in MODELS if name != "ops"]


def images(n: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(n, 3, height, width or height, generator=torch.Generator().manual_seed(n))


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if "alexnet_kernels" in str(node.target)}


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


class TestOnnx:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
    def test_any_batch(self, name: str, dynamo: bool, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript" if dynamo else "onnx")
        model, size = MODELS[name]()
        path, x = tmp_path / "x.onnx", images(5, size)
        how: dict[str, Any] = {"dynamo": True, "dynamic_shapes": BATCH}
        if not dynamo:
            how = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(model, (images(2, size),), path, verbose=False, **how)
        torch.testing.assert_close(run_onnx(path, x), model(x), rtol=1e-4, atol=1e-4)

    def test_few_nodes_for_a_normalisation(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxscript")
        onnx = pytest.importorskip("onnx")
        norms = nn.Sequential(LocalResponseNorm(5, groups=2), WithinMapResponseNorm(5)).eval()
        torch.onnx.export(norms, (torch.rand(2, 8, 9, 9),), tmp_path / "x.onnx", dynamo=True, verbose=False)
        assert len(onnx.load(tmp_path / "x.onnx").graph.node) <= 9 + 6


class TestTorchScript:
    @pytest.mark.parametrize("name", BUILT)
    def test_script(self, name: str) -> None:
        model, _ = MODELS[name]()
        kinds = [type(module) for module in model.modules()]
        x, file = images(3, 95), io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        file.seek(0)
        scripted = torch.jit.load(file)
        assert [type(module) for module in model.modules()] == kinds
        assert list(scripted.state_dict()) == list(model.state_dict())
        torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", BUILT)
    def test_script_of_a_symbolic_trace(self, name: str) -> None:
        model, _ = MODELS[name]()
        x = images(3, 95)
        torch.testing.assert_close(torch.jit.script(torch.fx.symbolic_trace(model))(x), model(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", MODELS)
    def test_trace(self, name: str) -> None:
        model, _ = MODELS[name]()
        traced = torch.jit.trace(model, images(2, 95), check_trace=False)
        assert "alexnet_kernels::" not in str(traced.inlined_graph)
        assert list(traced.state_dict()) == list(model.state_dict())
        x = images(3, 127, 140)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)

    def test_training(self) -> None:
        """Masks come from torch's stream."""
        scripted = torch.jit.script(FusedSequential(Dropout(0.5, scale_at="inference")))
        torch.manual_seed(3)
        found = scripted(torch.ones(1000))
        torch.manual_seed(3)
        assert torch.equal(found, nn.functional.dropout(torch.ones(1000), 0.5) / 2)


class TestExport:
    @pytest.mark.skipif(TORCH < (2, 14), reason="max-pools of torch 2.11 tie dynamic sizes to their stride")
    @pytest.mark.parametrize("strict", [False, True])
    def test_any_size(self, strict: bool) -> None:
        auto = torch.export.Dim.AUTO
        shapes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=128, max=400), 3: auto},)
        model = small()
        program = torch.export.export(model, (images(2, 224),), dynamic_shapes=shapes, strict=strict)
        assert not targets(program)
        x = images(3, 300, 260)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)

    def test_a_backend_that_is_asked_for_stays(self) -> None:
        model, x = small(preset="as_run"), images(2, 224)
        with use_backend("cpu"):
            program = torch.export.export(model, (x,), dynamic_shapes=BATCH)
            norm = torch.export.export(LocalResponseNorm(5), (x,))
        names = ("conv2d_relu", "lrn_max_pool2d", "local_response_norm", "linear_relu_dropout")
        assert {f"alexnet_kernels.{name}.default" for name in names} <= targets(program)
        assert targets(norm) == {"alexnet_kernels.local_response_norm.default"}
        x = images(3, 224)
        torch.testing.assert_close(program.module()(x), model(x))

    def test_ops_called_by_hand_stay(self) -> None:
        x = images(2, 33)
        program = torch.export.export(Direct(), (x,), dynamic_shapes=BATCH)
        assert len(targets(program)) == 7
        torch.testing.assert_close(program.module()(x), direct(x))

    def test_compiling_still_fuses(self, fresh_dynamo: None) -> None:
        found: set[str] = set()

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            found.update(str(node.target) for node in graph.graph.nodes)
            return graph

        torch.compile(small(), backend=backend, fullgraph=True)(images(2, 224))
        assert any("lrn_max_pool2d" in name for name in found)
        assert not any("adaptive" in name for name in found)


PROGRAM_ALONE = """
import sys, torch
program, values, library = sys.argv[1:]
x, expected = torch.load(values)
if library:
    try:
        torch.export.load(program)
    except Exception:
        pass
    else:
        raise AssertionError("loaded")
    torch.ops.load_library(library)
    model = torch.export.load(program).module()
else:
    model = torch._inductor.aoti_load_package(program)
torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("alexnet_kernels") for name in sys.modules)
"""


class TestOtherProcesses:
    """Which never import the package."""

    def run(self, folder: Path, library: str) -> None:
        files = (folder / "program.pt2", folder / "values.pt")
        command = [sys.executable, "-c", PROGRAM_ALONE, *map(str, files), library]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stderr
        assert bool(library) == ("alexnet_kernels.conv2d_relu" in done.stderr)  # that torch misses

    @pytest.mark.slow
    def test_aot_inductor(self, tmp_path: Path, fresh_dynamo: None) -> None:
        model, x = small(), images(2, 95)
        program = torch.export.export(model, (x,))
        torch.save((x, model(x).detach()), tmp_path / "values.pt")
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
        self.run(tmp_path, "")

    def test_ops_need_the_library(self, tmp_path: Path) -> None:
        model, x = small(), images(2, 95)
        with use_backend("cpu"):
            program = torch.export.export(model, (x,))
        torch.save((x, model(x).detach()), tmp_path / "values.pt")
        torch.export.save(program, tmp_path / "program.pt2")
        self.run(tmp_path, str(_library.PATH))


class TestQuantisation:
    def test_pt2e_sees_what_it_sees_in_torchvision(self) -> None:
        pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
        x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        theirs = pytest.importorskip("torchvision").models.alexnet(num_classes=10).eval()
        for i, layer in ((1, nn.Linear(9216, 8)), (4, nn.Linear(8, 8)), (6, nn.Linear(8, 10))):
            theirs.classifier[i] = layer

        def inserted(model: nn.Module) -> list[str]:
            x = images(1, 95)
            quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
            prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
            prepared(x)
            return [str(node.target) for node in pt2e.convert_pt2e(prepared).graph.nodes if node.op != "get_attr"]

        expected = inserted(theirs)
        assert any("quantize" in name for name in expected)
        assert inserted(alexnet(width=0.05, num_classes=10).eval()) == expected
        assert inserted(fuse(theirs)) == expected

    def test_eager(self) -> None:
        quantization = torch.ao.quantization
        model = small(preset="torchvision")
        for layer in model.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        x = images(2, 95)
        expected = model(x)
        wrapped = quantization.QuantWrapper(model).eval()
        wrapped.qconfig = quantization.get_default_qconfig("x86")
        quantization.prepare(wrapped, inplace=True)
        wrapped(x)
        quantization.convert(wrapped, inplace=True)
        error = (wrapped(x) - expected).abs().max() / expected.abs().max()
        assert 0 < error < 0.2


class TestTools:
    def test_lrp(self) -> None:
        lrp = pytest.importorskip("captum.attr").LRP
        model = small(preset="torchvision")
        for layer in model.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        x = images(1, 95)
        assert lrp(model).attribute(x, target=1).shape == x.shape

    def test_average_that_changes_nothing_is_left_out_unless_it_is_looked_at(self) -> None:
        model, x = small(), images(1, 224)
        pooled: list[str] = []

        def calls() -> int:
            with torch.profiler.profile() as profile:
                model(x)
            return sum("adaptive" in event.key for event in profile.key_averages())

        assert type(model.avgpool) is nn.AdaptiveAvgPool2d
        assert not calls()
        model.avgpool.register_forward_hook(lambda *_: pooled.append("hook"))
        model(x)
        assert pooled == ["hook"]

    @pytest.mark.parametrize("place", ["class", "function", "mode", "subclass"])
    def test_average_that_changes_nothing_is_not_left_out_of_what_others_see(
        self, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[str] = []

        class Record(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(function.__name__)
                return function(*args, **(kwargs or {}))

        class Tagged(Tensor):
            @classmethod
            def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.append(function.__name__)
                return super().__torch_function__(function, types, args, kwargs or {})

        def pool(x: Tensor, size: Any) -> Tensor:
            seen.append("adaptive_avg_pool2d")
            return x

        called = nn.Module.__call__

        def call(module: nn.Module, *args: Any) -> Any:
            seen.append("adaptive_avg_pool2d" if isinstance(module, nn.AdaptiveAvgPool2d) else "")
            return called(module, *args)

        model, x = small().eval(), images(1, 224)
        if place == "class":  # as torchview does
            monkeypatch.setattr(nn.Module, "__call__", call)
        elif place == "function":
            monkeypatch.setattr(nn.functional, "adaptive_avg_pool2d", pool)
        with torch.no_grad(), Record() if place == "mode" else nullcontext():
            model(x.as_subclass(Tagged) if place == "subclass" else x)
        assert "adaptive_avg_pool2d" in seen

    def test_flops(self) -> None:
        """As docs/export.md has it."""
        theirs = pytest.importorskip("torchvision").models.alexnet(num_classes=10).eval()
        model, x = alexnet(theirs.state_dict()).eval(), images(1, 224)

        def flops(model: nn.Module) -> tuple[int, int]:
            """Of convolutions and linear layers."""
            with torch.profiler.profile(with_flops=True) as profile:
                model(x)
            counts = [(event.key, event.flops or 0) for event in profile.key_averages()]
            return sum(n for key, n in counts if "conv" in key), sum(n for key, n in counts if "mm" in key)

        expected = flops(theirs)
        assert min(expected) > 1e8
        with use_backend("native"):
            assert flops(model) == expected
        assert flops(model)[0] == expected[0]
        with FlopCounterMode(display=False) as counter:
            model(x)
        with FlopCounterMode(display=False) as other:
            theirs(x)
        assert counter.get_total_flops() == other.get_total_flops()

    def test_ptflops(self) -> None:
        count = pytest.importorskip("ptflops").get_model_complexity_info
        options = {"as_strings": False, "print_per_layer_stat": False, "backend": "aten", "verbose": False}
        theirs = pytest.importorskip("torchvision").models.alexnet().eval()
        expected = count(theirs, (3, 224, 224), **options)[0]
        with use_backend("native"):
            assert count(alexnet().eval(), (3, 224, 224), **options)[0] == expected

    def test_lightning(self, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning")
        pytest.importorskip("onnxruntime")

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = small()
                self.example_input_array = images(2, 224)

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

        module, x = Module(), images(2, 224)
        expected = module.eval()(x)
        torch.testing.assert_close(module.to_torchscript()(x), expected, rtol=1e-4, atol=1e-5)
        module.to_onnx(tmp_path / "x.onnx", dynamo=False)
        torch.testing.assert_close(run_onnx(tmp_path / "x.onnx", x), expected, rtol=1e-4, atol=1e-4)
        assert type(module.net.features) is FusedSequential

    def test_openvino(self) -> None:
        openvino = pytest.importorskip("openvino")
        model, x = small(), images(2, 95)
        compiled = openvino.compile_model(openvino.convert_model(model, example_input=x), "CPU")
        torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x), rtol=1e-2, atol=1e-2)

    def test_torchview(self) -> None:
        torchview = pytest.importorskip("torchview")
        model = small()
        graph = torchview.draw_graph(model, input_data=images(1, 95), graph_dir="LR")
        drawn = {node.name for edge in graph.edge_list for node in edge}
        assert {"AdaptiveAvgPool2d", "output-tensor"} <= drawn


class TestOnnxZoo:
    """The graph of the zoo's bvlc_alexnet that the package onnx has, with random weights in place of constants."""

    @pytest.fixture(scope="class")
    def zoo(self) -> Any:
        onnx = pytest.importorskip("onnx")
        path = Path(onnx.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"
        if not path.exists():
            pytest.skip("this version of onnx does not have the graph")
        return onnx.load(path)

    def test_attributes(self, zoo: Any) -> None:
        from onnx import helper

        def of(kind: str, name: str, default: object = None) -> list[Any]:
            nodes = [node for node in zoo.graph.node if node.op_type == kind]
            found = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
            return [attributes.get(name, default) for attributes in found]

        model = AlexNet(preset=ONNX_ZOO, device="meta")
        convs, pools, norms = (
            [m for m in model.features if isinstance(m, kind)] for kind in (nn.Conv2d, nn.MaxPool2d, LocalResponseNorm)
        )
        assert of("Conv", "kernel_shape") == [list(conv.kernel_size) for conv in convs]
        assert of("Conv", "strides") == [list(conv.stride) for conv in convs]
        assert of("Conv", "pads") == [list(conv.padding) * 2 for conv in convs]
        assert of("Conv", "group", 1) == [conv.groups for conv in convs]
        assert of("MaxPool", "kernel_shape") == [[pool.kernel_size] * 2 for pool in pools]
        assert of("MaxPool", "strides") == [[pool.stride] * 2 for pool in pools]
        assert of("MaxPool", "pads") == [[0, 0, int(pool.ceil_mode), int(pool.ceil_mode)] for pool in pools]
        for name, of_norm in (("size", "size"), ("alpha", "alpha"), ("beta", "beta"), ("bias", "k")):
            assert of("LRN", name) == pytest.approx([getattr(norm, of_norm) for norm in norms])
        assert [d.dim_value for d in zoo.graph.input[0].type.tensor_type.shape.dim[2:]] == [model.input_size] * 2
        assert [node.op_type for node in zoo.graph.node if node.op_type != "ConstantOfShape"] == [
            *(["Conv", "Relu", "LRN", "MaxPool"] * 2),
            *(["Conv", "Relu"] * 3),
            *("MaxPool", "Reshape"),
            *(["Gemm", "Relu", "Dropout"] * 2),
            *("Gemm", "Softmax"),
        ]

    def test_outputs(self, zoo: Any, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        torch.manual_seed(0)
        model = AlexNet(preset=ONNX_ZOO, width=0.1).eval()
        constants = [node for node in zoo.graph.node if node.op_type == "ConstantOfShape"]
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        names = [f"{kind}{i}" for kind, i in zip(["conv"] * 5 + ["fc"] * 3, range(1, 9), strict=True)]
        changed = onnx.ModelProto()
        changed.CopyFrom(zoo)
        for node in constants:
            changed.graph.node.remove(node)
        (features,) = (node.input[1] for node in zoo.graph.node if node.op_type == "Reshape")
        for stored in changed.graph.initializer:
            if stored.name == features:
                shape = numpy.array([1, model.classifier[0].in_features])
                stored.CopyFrom(onnx.numpy_helper.from_array(shape, features))
        for name, layer in zip(names, layers, strict=True):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
            for part, value in (("w", layer.weight), ("b", layer.bias)):
                array = value.detach().numpy()
                changed.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}_{part}_0"))
        onnx.save(changed, tmp_path / "x.onnx")
        x = images(1, 224)
        with torch.no_grad():
            maps = [m.shape[2] for m in _after_pools(model, x)]
            expected = model(x).softmax(1)
        assert maps == [26, 12, 6]
        torch.testing.assert_close(run_onnx(tmp_path / "x.onnx", x), expected, rtol=1e-3, atol=1e-6)


def _after_pools(model: AlexNet, x: Tensor) -> list[Tensor]:
    found = []
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            found.append(x)
    return found


class TestSignatures:
    def test_pretrained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        state = alexnet(width=0.05).state_dict()
        found = read_weights(state)[0]
        monkeypatch.setattr(weights_module, "_torchvision", lambda url, name, progress: found)
        for arguments in ({"pretrained": True}, {"weights": True}):
            with pytest.warns(UserWarning, match="deprecated, as in torchvision: write weights='IMAGENET1K_V1'"):
                model = alexnet(width=0.05, **arguments)
            assert torch.equal(model.classifier[6].weight, state["classifier.6.weight"])
        for arguments in ((False,), ()):
            with pytest.warns(UserWarning, match="write weights=None"):
                alexnet(*arguments, device="meta", **({} if arguments else {"pretrained": False}))
        with pytest.raises(ValueError, match="not both"):
            alexnet("DEFAULT", pretrained=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            alexnet(None, False, device="meta")

    def test_dropout_as_the_second_argument(self) -> None:
        with pytest.raises(
            ValueError, match=r"write AlexNet\(dropout=0\.3\); torchvision's AlexNet is alexnet\(dropout"
        ):
            AlexNet(10, 0.3)

    @pytest.mark.parametrize("shape", [(2, 1, 95, 95), (3, 95, 95), (2, 3, 20, 20)], ids=["channels", "rank", "small"])
    def test_images_that_torchvision_refuses(self, shape: tuple[int, ...]) -> None:
        for error in (ValueError, RuntimeError):
            with pytest.raises(error):
                small()(torch.zeros(shape))

    def test_tensors_that_torch_refuses(self) -> None:
        x, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 2, 3, 3)
        calls: list[tuple[type[Exception], Callable[[], Tensor]]] = [
            (ValueError, lambda: ops.conv2d_relu(x, weight)),
            (ValueError, lambda: ops.conv2d_relu(x, torch.zeros(4, 3, 9, 9))),
            (TypeError, lambda: ops.conv2d_relu(x, torch.zeros(4, 3, 3, 3).double())),
            (ValueError, lambda: ops.max_pool2d(x, 9)),
            (ValueError, lambda: ops.linear_relu_dropout(x, torch.zeros(2, 3))),
            (TypeError, lambda: ops.max_pool2d(x.int())),
        ]
        for error, call in calls:
            with pytest.raises(error) as caught:
                call()
            assert isinstance(caught.value, RuntimeError)

    def test_first_layers_that_take_other_tensors(self) -> None:
        class Bytes(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x.float() / 255)

        model = small()
        conv = model.features[0]
        model.features[0] = Bytes(3, conv.out_channels, 11, 4, 2)
        x = torch.randint(0, 256, (2, 3, 95, 95), dtype=torch.uint8)
        assert model(x).shape == (2, 10)
        model.features[0] = copy.deepcopy(conv)
        model.features[0].register_forward_pre_hook(lambda _, args: (args[0].float(),))
        assert model(x).shape == (2, 10)
