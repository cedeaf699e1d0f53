"""Readers of Caffe's, ONNX's and cuda-convnet's files, against networks computed in each format's own layout."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import AlexNet
from alexnet_kernels._errors import InputError, MissingPackage
from alexnet_kernels.models import ONNX_ZOO, PRESETS
from alexnet_kernels.models.formats import FileWeights, caffe, convnet, onnx

MADE = "made-by-the-file"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (MADE,)


def built(weights: FileWeights) -> AlexNet:
    """The network of a file, in evaluation mode."""
    assert weights.preset is not None
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in weights.tensors.values())
    model = AlexNet(len(weights.tensors["fc8.bias"]), weights.preset, **weights.arguments)
    names = iter(("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"))
    keys: dict[str, str] = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = next(names)
            keys[layer] = key
        elif isinstance(module, nn.BatchNorm2d):
            keys[layer.replace("conv", "bn")] = key
    parts = {name: name.split(".") for name in weights.tensors}
    state = {f"{keys[layer]}.{part}": weights.tensors[name] for name, (layer, part) in parts.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([key for key in missing if "num_batches" in key], [])
    return model.eval()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * scale)
    assert scale > 0


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


# Caffe. The messages are written byte by byte from caffe.proto's numbers.


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    written = b""
    while value > 127:
        written += bytes([value & 127 | 128])
        value >>= 7
    return written + bytes([value])


def put(number: int, *values: object) -> bytes:
    """A field of a message, once for each value: bytes and strings by their length, floats in 4 bytes, or a number."""
    written = b""
    for value in values:
        if isinstance(value, str | bytes):
            data = value.encode() if isinstance(value, str) else value
            written += varint(number << 3 | 2) + varint(len(data)) + data
        elif isinstance(value, float):
            written += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            assert isinstance(value, int)
            written += varint(number << 3) + varint(value)
    return written


FILTERS = (16, 32, 16, 32, 16)
KERNELS = (11, 5, 3, 3, 3)
GROUPS = (1, 2, 1, 2, 2)
NEURONS, CLASSES = 32, 5


def numbers(seed: int = 0) -> dict[str, Tensor]:
    """Weights of a small network of Caffe's, by layer; conv1's inputs are BGR."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    channels = 3
    for i, (filters, kernel, groups) in enumerate(zip(FILTERS, KERNELS, GROUPS, strict=True), 1):
        shape = (filters, channels // groups, kernel, kernel)
        made[f"conv{i}.weight"] = torch.randn(shape, generator=generator) / (shape[1] * kernel * kernel) ** 0.5
        made[f"conv{i}.bias"] = torch.randn(filters, generator=generator) / 10
        channels = filters
    for i, (inputs, outputs) in enumerate(((channels * 36, NEURONS), (NEURONS, NEURONS), (NEURONS, CLASSES)), 6):
        made[f"fc{i}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        made[f"fc{i}.bias"] = torch.randn(outputs, generator=generator) / 10
    return made


def forward(w: Mapping[str, Tensor], x: Tensor, pool_first: bool, k: float = 1.0) -> Tensor:
    """Caffe's network in plain PyTorch, for BGR images."""

    def norm(x: Tensor) -> Tensor:
        return F.local_response_norm(x, 5, 2e-4, 0.75, k)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    for i in range(1, 6):
        padding = (0, 2, 1, 1, 1)[i - 1]
        x = F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], 4 if i == 1 else 1, padding, 1, GROUPS[i - 1]).relu()
        if i < 3:
            x = norm(pool(x)) if pool_first else pool(norm(x))
    x = pool(x).flatten(1)
    for i in (6, 7):
        x = F.linear(x, w[f"fc{i}.weight"], w[f"fc{i}.bias"]).relu()
    return F.linear(x, w["fc8.weight"], w["fc8.bias"])


def blob(value: Tensor, kind: str) -> bytes:
    """A BlobProto: its sizes in field 7 or, in old ones, 1-4; its data packed, one by one, or as doubles."""
    array = value.numpy()
    sizes = put(7, put(1, b"".join(map(varint, array.shape))))
    if kind == "old":
        shape = (1,) * (4 - array.ndim) + array.shape
        sizes = b"".join(put(i, size) for i, size in enumerate(shape, 1))
    if kind == "double":
        return sizes + put(8, array.astype("<f8").tobytes())
    if kind == "unpacked":
        return sizes + b"".join(put(5, float(number)) for number in array.flat)
    if kind == "parts":
        data = array.astype("<f4").tobytes()
        return put(5, data[:8]) + sizes + put(5, data[8:])
    return sizes + put(5, array.astype("<f4").tobytes())


def layer_v2(
    name: str, kind: str, bottom: str, top: str, number: int = 0, body: bytes = b"", blobs: bytes = b""
) -> bytes:
    written = put(1, name) + put(2, kind) + put(3, bottom) + put(4, top) + blobs
    return put(100, written + (put(number, body) if number else b""))


V1_TYPES = {
    "Convolution": 4,
    "InnerProduct": 14,
    "ReLU": 18,
    "LRN": 15,
    "Pooling": 17,
    "Dropout": 6,
    "SoftmaxWithLoss": 21,
}
V1_FIELDS = {106: 10, 117: 17, 118: 18, 121: 19, 108: 12, 0: 0}


def layer_v1(
    name: str, kind: str, bottom: str, top: str, number: int = 0, body: bytes = b"", blobs: bytes = b""
) -> bytes:
    written = put(2, bottom) + put(3, top) + put(4, name) + put(5, V1_TYPES[kind]) + blobs
    return put(2, written + (put(V1_FIELDS[number], body) if number else b""))


def model(
    w: Mapping[str, Tensor],
    *,
    old: bool = False,
    kind: str = "new",
    pool_first: bool = False,
    lrn: bytes = put(1, 5) + put(2, 2e-4) + put(3, 0.75),
    data: bytes | None = None,
    names: Mapping[str, str] | None = None,
    without: int = 0,
    weight: bytes | None = None,
) -> bytes:
    """A .caffemodel. without: number of a parameter field that is left out; weight: a BlobProto for conv1."""
    names = names or {}
    entry = layer_v1 if old else layer_v2
    blobs_field = 6 if old else 7

    def add(name: str, type_: str, bottom: str, top: str, number: int = 0, body: bytes = b"") -> bytes:
        held = b""
        if f"{name}.weight" in w:
            held = b"".join(put(blobs_field, blob(w[f"{name}.{part}"], kind)) for part in ("weight", "bias"))
        if weight is not None and name == "conv1":
            held = put(7, weight, blob(w["conv1.bias"], kind))
        label = names.get(name, name)
        return entry(label, type_, bottom, top, 0 if number == without else number, body, held)

    if data is None:
        data = put(3, "data") + b"".join(put(4, size) for size in (10, 3, 227, 227))
    written = put(1, "AlexNet") + data
    top = "data"
    for i in range(1, 6):
        body = put(1, FILTERS[i - 1]) + put(3, (0, 2, 1, 1, 1)[i - 1]) + put(4, KERNELS[i - 1]) + put(5, GROUPS[i - 1])
        written += add(f"conv{i}", "Convolution", top, f"conv{i}", 106, body + put(6, 4 if i == 1 else 1))
        top = f"conv{i}"
        written += add(f"relu{i}", "ReLU", top, top)
        steps = [("norm", "LRN", 118, lrn)] if i < 3 else []
        if i in (1, 2, 5):
            steps.insert(0 if pool_first else 1, ("pool", "Pooling", 121, put(1, 0) + put(2, 3) + put(3, 2)))
        for step, type_, number, body in steps:
            written += add(f"{step}{i}", type_, top, f"{step}{i}", number, body)
            top = f"{step}{i}"
    for i, outputs in zip((6, 7, 8), (NEURONS, NEURONS, CLASSES), strict=True):
        written += add(f"fc{i}", "InnerProduct", top, f"fc{i}", 117, put(1, outputs))
        top = f"fc{i}"
        if i < 8:
            written += add(f"relu{i}", "ReLU", top, top)
            written += add(f"drop{i}", "Dropout", top, top, 108, put(1, 0.4))
    return written + add("loss", "SoftmaxWithLoss", top, "loss")


def model_v0(w: Mapping[str, Tensor]) -> bytes:
    """A .caffemodel of the oldest version: padding is a layer, parameters are the layer's own."""

    def add(bottom: str, top: str, name: str, kind: str, body: bytes = b"") -> bytes:
        held = b""
        if f"{name}.weight" in w:
            held = b"".join(put(50, blob(w[f"{name}.{part}"], "old")) for part in ("weight", "bias"))
        return put(2, put(1, put(1, name) + put(2, kind) + body + held) + put(2, bottom) + put(3, top))

    written = put(1, "CaffeNet") + put(2, put(1, put(1, "data") + put(2, "data") + put(20, 227)) + put(3, "data"))
    top = "data"
    for i in range(1, 6):
        if i > 1:
            written += add(top, f"pad{i}", f"pad{i}", "padding", put(7, (0, 2, 1, 1, 1)[i - 1]))
            top = f"pad{i}"
        body = put(3, FILTERS[i - 1]) + put(8, KERNELS[i - 1]) + put(9, GROUPS[i - 1]) + put(10, 4 if i == 1 else 1)
        written += add(top, f"conv{i}", f"conv{i}", "conv", body) + add(f"conv{i}", f"conv{i}", f"relu{i}", "relu")
        top = f"conv{i}"
        if i in (1, 2, 5):
            written += add(top, f"pool{i}", f"pool{i}", "pool", put(8, 3) + put(10, 2) + put(11, 0))
            top = f"pool{i}"
        if i < 3:
            written += add(top, f"norm{i}", f"norm{i}", "lrn", put(13, 5) + put(14, 2e-4) + put(15, 0.75))
            top = f"norm{i}"
    for i, outputs in zip((6, 7, 8), (NEURONS, NEURONS, CLASSES), strict=True):
        written += add(top, f"fc{i}", f"fc{i}", "innerproduct", put(3, outputs))
        top = f"fc{i}"
        if i < 8:
            written += add(top, top, f"relu{i}", "relu") + add(top, top, f"drop{i}", "dropout", put(12, 0.4))
    return written


class TestCaffe:
    @pytest.fixture(autouse=True)
    def _needs_protobuf(self) -> None:
        pytest.importorskip("google.protobuf")

    @pytest.mark.parametrize(
        ("old", "kind", "pool_first"),
        [(False, "new", False), (False, "double", True), (True, "old", True), (True, "parts", False)],
        ids=str,
    )
    def test_network(self, tmp_path: Path, old: bool, kind: str, pool_first: bool) -> None:
        w = numbers()
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(w, old=old, kind=kind, pool_first=pool_first))
        found = caffe.read(path)
        x = images(227)
        assert_close(built(found)(x), forward(w, x.flip(1), pool_first))
        assert found.channels == "BGR"
        assert found.arguments == {"in_channels": 3, "dropout": pytest.approx(0.4)}
        base = PRESETS["caffenet" if pool_first else "caffe"]
        assert found.preset is not None
        assert found.preset.norm == replace(base.norm, alpha=2e-4)  # type: ignore[type-var]
        assert (found.preset.layers, found.preset.pools) == (base.layers, base.pools)
        assert any("RGB" in note for note in found.notes)
        for name, value in w.items():
            read = found.tensors[name]
            assert torch.equal(read.flip(1) if name == "conv1.weight" else read, value), name

    def test_oldest_version_and_values_one_by_one(self, tmp_path: Path) -> None:
        w = numbers(1)
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model_v0(w))
        found = caffe.read(path)
        x = images(227)
        expected = forward(w, x.flip(1), pool_first=True)
        assert_close(built(found)(x), expected)
        path.write_bytes(model(w, kind="unpacked", pool_first=True))
        assert_close(built(caffe.read(path))(x), expected)

    def test_published_presets(self, tmp_path: Path) -> None:
        path = tmp_path / "x.caffemodel"
        for pool_first, name in ((False, "caffe"), (True, "caffenet")):
            path.write_bytes(model(numbers(), pool_first=pool_first, lrn=put(2, 1e-4)))
            found = caffe.read(path).preset
            assert found == replace(PRESETS[name], filters=FILTERS, neurons=NEURONS)

    def test_k_and_other_names(self, tmp_path: Path) -> None:
        w = numbers(2)
        path = tmp_path / "x.caffemodel"
        lrn = put(1, 5) + put(2, 2e-4) + put(3, 0.75) + put(5, 2.0)
        path.write_bytes(model(w, lrn=lrn, names={"fc8": "fc8_flickr", "fc6": "ip1", "conv3": "fc9"}))
        x = images(227)
        assert_close(built(caffe.read(path))(x), forward(w, x.flip(1), pool_first=False, k=2.0))

    def test_dropout_that_the_preset_has_not(self, tmp_path: Path) -> None:
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(numbers(), names={"drop7": "other"}).replace(put(1, 0.4), put(1, 0.3), 1))
        found = caffe.read(path)
        assert found.arguments["dropout"] == pytest.approx(0.3)
        assert any("dropout of 0.3, 0.4 follows layers 6, 7" in note for note in found.notes)

    def test_channels_can_be_kept(self, tmp_path: Path) -> None:
        w = numbers()
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(w))
        found = caffe.read(path, keep_channels=True)
        assert torch.equal(found.tensors["conv1.weight"], w["conv1.weight"])
        assert found.preprocessing is not None
        torch.testing.assert_close(found.preprocessing.mean, torch.tensor([104.007, 116.669, 122.679]))

    def test_means(self, tmp_path: Path) -> None:
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(numbers()))
        assumed = caffe.read(path)
        assert assumed.preprocessing is not None
        torch.testing.assert_close(assumed.preprocessing.mean, torch.tensor([122.679, 116.669, 104.007]))
        assert any("assumed" in note for note in assumed.notes)

        image = torch.rand(3, 4, 4) * 255
        (tmp_path / "other").mkdir()
        given = tmp_path / "other" / "mean.npy"
        np.save(given, image.double().numpy())
        beside = tmp_path / "imagenet_mean.binaryproto"
        beside.write_bytes(blob(image[None], "old"))
        for found, name in ((caffe.read(path, given), "mean.npy"), (caffe.read(path), beside.name)):
            assert found.preprocessing is not None
            assert torch.equal(found.preprocessing.mean, image.flip(0))
            assert any(name in note for note in found.notes)

        (tmp_path / "mean2.binaryproto").write_bytes(beside.read_bytes())
        several = caffe.read(path)
        assert any("assumed" in note and "none was chosen" in note for note in several.notes)
        assert several.preprocessing is not None
        assert several.preprocessing.mean.shape == (3,)

        transform = put(1, 0.5) + put(3, 227) + b"".join(put(5, v) for v in (104.0, 117.0, 123.0))
        data = put(100, put(1, "data") + put(2, "Data") + put(4, "data") + put(100, transform))
        path.write_bytes(model(numbers(), data=data))
        stated = caffe.read(path)
        assert stated.preprocessing is not None
        assert stated.preprocessing.mean.tolist() == [123, 117, 104]
        assert stated.preprocessing.std is not None
        assert stated.preprocessing.std.tolist() == [2, 2, 2]
        assert stated.preset is not None
        assert stated.preset.input_size == 227

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"without": 118}, "norm1 of type LRN has no lrn_param"),
            ({"without": 106}, "conv1 of type Convolution has no convolution_param"),
            ({"lrn": put(1, 4)}, "local_size 4"),
            ({"w": {**numbers(), "conv2.weight": torch.zeros(32, 16, 5, 5)}}, "takes 32 channels"),
            ({"w": {**numbers(), "fc6.weight": torch.zeros(32, 16 * 25)}}, "6 x 6"),
            ({"w": {**numbers(), "fc7.weight": torch.zeros(32, 33)}}, "takes 33 values"),
            ({"w": {**numbers(), "fc7.weight": torch.zeros(31, 32)}}, "definition has 32 outputs"),
        ],
        ids=["no lrn_param", "no convolution_param", "even LRN", "channels", "fc6", "fc7", "outputs"],
    )
    def test_other_networks(self, tmp_path: Path, change: dict[str, Any], words: str) -> None:
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(**{"w": numbers(), **change}))
        refused(lambda: caffe.read(path), words)

    def test_other_files(self, tmp_path: Path) -> None:
        vgg = b"".join(layer_v2(f"c{i}", "Convolution", "a", "b") for i in range(13))
        vgg += b"".join(layer_v2(f"f{i}", "InnerProduct", "a", "b") for i in range(3))
        huge = put(7, put(1, varint(1 << 14) * 3)) + put(5, bytes(12))
        negative = put(7, put(1, varint(-1) * 2)) + put(5, bytes(4))
        deep = b""
        for _ in range(3000):
            deep = put(2, put(1, deep))
        contents: dict[str, tuple[bytes, str]] = {
            "vgg.caffemodel": (put(1, "VGG") + vgg, "as VGG-16, has 13 convolutions"),
            "deploy.prototxt": (b'name: "AlexNet"\nlayer {}', "holds no weights: give its .caffemodel"),
            "text.caffemodel": (b'name: "AlexNet"\nlayer {}', "holds no weights: give its .caffemodel"),
            "mean.binaryproto": (blob(torch.zeros(1, 3, 2, 2), "old"), "it is a mean file"),
            "x.caffemodel": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
            "empty.caffemodel": (b"", "holds no layers"),
            "cut.caffemodel": (model(numbers())[:-1000], "is not a readable .caffemodel"),
            "deep.caffemodel": (deep, "has 0 convolutions"),
            "groups.caffemodel": (put(100, put(7, b"\x53" * 3000)), "is not a readable .caffemodel"),
            "many.caffemodel": (put(100, b"") * 200_000, "more than 100,000 fields"),
            "negative.caffemodel": (model(numbers(), weight=negative), "has the shape (-1, -1)"),
            "claim.caffemodel": (model(numbers(), weight=huge), "(16384, 16384, 16384) and 3 values"),
            "noise.caffemodel": (bytes(range(256)) * 20, "is not a readable .caffemodel"),
        }
        for name, (content, words) in contents.items():
            path = tmp_path / name
            path.write_bytes(content)
            refused(lambda path=path: caffe.read(path), words)  # type: ignore[misc]
        os.mkfifo(tmp_path / "pipe.caffemodel")
        refused(lambda: caffe.read(tmp_path / "pipe.caffemodel"), "not a regular file")
        refused(lambda: caffe.read(tmp_path / "no.caffemodel"), "No such file")

    def test_other_means(self, tmp_path: Path) -> None:
        path = tmp_path / "x.npy"
        contents = []
        for array in (np.zeros((2, 4, 4)), np.array([Evil()], dtype=object), np.full((3,), np.nan)):
            file = io.BytesIO()
            np.save(file, array, allow_pickle=True)
            contents.append(file.getvalue())
        contents.append(contents[0].replace(b"(2, 4, 4)", b"(3, 9**9)"))
        for content in contents:
            path.write_bytes(content)
            refused(lambda: caffe.read_mean(path), "")

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "x.caffemodel"
        path.write_bytes(model(numbers()))
        monkeypatch.setitem(sys.modules, "google.protobuf", None)
        with pytest.raises(MissingPackage, match=r"needs protobuf; .*alexnet_kernels\[weights\]"):
            caffe.read(path)


def refused(call: Callable[[], object], words: str) -> None:
    """The call raises InputError in one short line with the words, and nothing of a file is executed."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert words in text
    assert text.count("\n") == 0
    assert len(text) < 600
    assert not Path(MADE).exists()


# ONNX.


def small(preset: Any, width: float = 0.1, classes: int = 7) -> AlexNet:
    """A network whose layers all matter, with values of every kind of layer that are not their initial ones."""
    torch.manual_seed(1)
    made = AlexNet(classes, preset, width=width).eval()
    for module in made.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.running_var):
                nn.init.uniform_(value, 0.5, 2)
            for value in (module.bias, module.running_mean):
                nn.init.normal_(value)
    return made


def evaluated(path: Path, x: Tensor) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def assert_same_state(weights: FileWeights, model: nn.Module) -> None:
    found = built(weights).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(found[key], value), key


@pytest.fixture(scope="module")
def zoo() -> Any:
    """The zoo's graph, with weights of a small network in BGR; and that network, which takes RGB."""
    module = pytest.importorskip("onnx")
    path = Path(module.__file__).parent / "backend/test/data/light/light_bvlc_alexnet.onnx"
    if not path.exists():
        pytest.skip("this version of onnx does not have the graph")
    graph = module.load(path)
    model = small(ONNX_ZOO)
    fill(graph, model)
    return graph, model


def fill(file: Any, model: AlexNet) -> None:
    from onnx import helper, numpy_helper

    constants = [node for node in file.graph.node if node.op_type == "ConstantOfShape"]
    for node in constants:
        file.graph.node.remove(node)
    (features,) = (node.input[1] for node in file.graph.node if node.op_type == "Reshape")
    kept = [stored for stored in file.graph.initializer if stored.name == features]
    del file.graph.initializer[:]
    for value in [v for v in file.graph.input if v.name != "data_0"]:
        file.graph.input.remove(value)
    kept[0].CopyFrom(numpy_helper.from_array(np.array([-1, model.classifier[0].in_features]), features))
    file.graph.initializer.extend(kept)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name, layer in zip([f"conv{i}" for i in range(1, 6)] + ["fc6", "fc7", "fc8"], layers, strict=True):
        weight = layer.weight.flip(1) if name == "conv1" else layer.weight
        for part, value in (("w", weight), ("b", layer.bias)):
            array = numpy_helper.from_array(value.detach().numpy(), f"{name}_{part}_0")
            file.graph.initializer.append(array)
            # Old versions list weights among the inputs.
            file.graph.input.append(helper.make_tensor_value_info(array.name, array.data_type, list(value.shape)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs_onnx(self) -> None:
        pytest.importorskip("onnx")

    @pytest.mark.parametrize("preset", ["as_run", "batchnorm", "caffe"])
    def test_written_files_read_the_same(self, tmp_path: Path, preset: str) -> None:
        model, path = small(preset), tmp_path / "x.onnx"
        onnx.write(model, path, {"alexnet_kernels": "the header"})
        found = onnx.read(path)
        assert_same_state(found, model)
        assert found.channels == "RGB"
        assert found.metadata["alexnet_kernels"] == "the header"
        assert found.preset is not None
        known = PRESETS[preset]
        filters = tuple(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        assert found.preset == replace(known, filters=filters, neurons=model.classifier[-1].in_features)
        x = images(model.input_size, 3)
        assert_close(evaluated(path, x), model(x).detach())
        assert os.listdir(tmp_path) == ["x.onnx"]
        assert model.training is False

    def test_writing(self, tmp_path: Path) -> None:
        model, path = small("torchvision").train(), tmp_path / "x.onnx"
        onnx.write(model, path, channels="BGR")
        assert model.training
        assert_same_state(onnx.read(path), model)
        kept = onnx.read(path, keep_channels=True)
        assert torch.equal(kept.tensors["conv1.weight"], model.features[0].weight.flip(1))
        x = images(224, 1)
        assert_close(evaluated(path, x.flip(1).contiguous()), model.eval()(x).detach())
        before = path.read_bytes()
        refused(lambda: onnx.write(model, path), "x.onnx exists")
        refused(lambda: onnx.write(model, tmp_path / "x.pt"), "a .onnx file is expected")
        assert path.read_bytes() == before
        onnx.write(model.half(), path, overwrite=True)
        assert torch.equal(onnx.read(path).tensors["fc8.bias"], model.classifier[-1].bias.float())

    def test_torchscript_export_with_defaults(self, tmp_path: Path) -> None:
        """Batch normalisation inside the convolutions; constants folded, or computed by many nodes."""
        x = images(224)
        for preset, name, folded in (
            ("paper", "paper", True),
            ("batchnorm", "onnx_file", True),
            ("as_run",) * 2 + (False,),
        ):
            model, path = small(preset), tmp_path / "x.onnx"
            torch.onnx.export(model, (x,), path, dynamo=False, do_constant_folding=folded)
            found = onnx.read(path)
            assert found.preset is not None
            assert found.preset.name == name
            assert_close(built(found)(x), model(x).detach())

    @pytest.mark.parametrize("preset", ["as_run", "batchnorm"])
    def test_dynamo_export(self, tmp_path: Path, preset: str) -> None:
        pytest.importorskip("onnxscript")
        model, path = small(preset), tmp_path / "x.onnx"
        with torch.no_grad():
            model.features[1 if preset == "as_run" else 4].bias.zero_()  # the exporter leaves zeros out
        x = images(224)
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=True, verbose=False)
        assert_close(built(onnx.read(path))(x), model(x).detach())
        if preset == "as_run":
            assert_same_state(onnx.read(path), model)

    def test_torchs_normalisation(self, tmp_path: Path) -> None:
        """nn.LocalResponseNorm, whose export has other nodes than this package's."""
        ours, path = small(replace(PRESETS["paper"], name="mine")), tmp_path / "x.onnx"
        norms = [i for i, module in enumerate(ours.features) if isinstance(module, nn.LocalResponseNorm)]
        model = nn.Sequential(*ours.features, nn.Flatten(), *ours.classifier).eval()
        for i in norms:
            model[i] = nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)
        x = images(224)
        torch.onnx.export(model, (x,), path, dynamo=False)
        found = onnx.read(path)
        assert_same_state(found, ours)
        assert found.preset is not None
        assert found.preset.norm == PRESETS["paper"].norm
        assert_close(built(found)(x), model(x).detach())

    def test_torchvision(self, tmp_path: Path) -> None:
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        model, path = models.AlexNet(5).eval(), tmp_path / "x.onnx"
        model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(9216, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16))
        model.classifier.extend([nn.ReLU(), nn.Linear(16, 5)])
        x = images(224, 1)
        torch.onnx.export(model, (x,), path, dynamo=False)
        found = onnx.read(path)
        assert found.preset == replace(PRESETS["torchvision"], neurons=16)
        assert_same_state(found, model)

    def test_zoo(self, zoo: Any, tmp_path: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        graph, model = zoo
        path = tmp_path / "x.onnx"
        path.write_bytes(graph.SerializeToString())
        found = onnx.read(path)
        assert_same_state(found, model)
        filters = tuple(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        assert found.preset == replace(ONNX_ZOO, filters=filters, neurons=model.classifier[-1].in_features)
        assert found.channels == "BGR"
        assert found.arguments["dropout"] == 0.5
        assert any("BGR: the graph was converted from Caffe (producer onnx-caffe2)" in note for note in found.notes)
        assert any("Softmax was left out" in note for note in found.notes)
        x = images(224, 1)
        (expected,) = ReferenceEvaluator(graph).run(None, {"data_0": x.flip(1).numpy()})
        assert_close(built(found)(x).softmax(1).detach(), torch.from_numpy(expected))

    def test_constants_products_and_unknown_producers(self, zoo: Any, tmp_path: Path) -> None:
        from onnx import ModelProto, helper, numpy_helper

        graph, model = zoo
        file = ModelProto()
        file.CopyFrom(graph)
        file.producer_name, file.graph.name = "someone", "network"
        # fc8 as MatMul and Add, conv2's weight in a node.
        gemm = next(n for n in file.graph.node if n.op_type == "Gemm" and n.input[1] == "fc8_w_0")
        at = list(file.graph.node).index(gemm)
        file.graph.node.remove(gemm)
        file.graph.node.insert(at, helper.make_node("Add", ["fc8_b_0", "product"], list(gemm.output)))
        file.graph.node.insert(at, helper.make_node("MatMul", [gemm.input[0], "turned"], ["product"]))
        file.graph.node.insert(0, helper.make_node("Transpose", ["fc8_w_0"], ["turned"], perm=[1, 0]))
        stored = next(s for s in file.graph.initializer if s.name == "conv2_w_0")
        file.graph.node.insert(0, helper.make_node("Constant", [], ["conv2_w_0"], value=stored))
        file.graph.initializer.remove(stored)
        file.graph.input.remove(next(value for value in file.graph.input if value.name == "conv2_w_0"))
        # conv3's bias is stored as numbers in place of bytes.
        bias = next(s for s in file.graph.initializer if s.name == "conv3_b_0")
        values = numpy_helper.to_array(bias)
        bias.CopyFrom(helper.make_tensor("conv3_b_0", 1, list(values.shape), values))
        path = tmp_path / "x"
        path.write_bytes(file.SerializeToString())
        assert_same_state(onnx.read(path, channels="BGR"), model)
        unknown = onnx.read(path)
        assert unknown.channels == "RGB"
        assert any("RGB is assumed" in note for note in unknown.notes)

    def test_other_files(self, zoo: Any, tmp_path: Path) -> None:
        from onnx import ModelProto, TensorProto, helper

        graph, _ = zoo

        def changed(change: Callable[[Any], object]) -> bytes:
            file = ModelProto()
            file.CopyFrom(graph)
            change(file.graph)
            return file.SerializeToString()

        def stored(g: Any, name: str) -> Any:
            return next(tensor for tensor in g.initializer if tensor.name == name)

        def external(location: str, **entries: str) -> Callable[[Any], object]:
            def change(g: Any) -> None:
                tensor = stored(g, "fc6_w_0")
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in {"location": location, **entries}.items():
                    tensor.external_data.add(key=key, value=value)

            return change

        def set_op(old: str, new: str) -> Callable[[Any], object]:
            return lambda g: setattr(next(n for n in g.node if n.op_type == old), "op_type", new)

        (tmp_path.parent / "outside.bin").write_bytes(bytes(100))
        (tmp_path / "short.bin").write_bytes(bytes(100))
        (tmp_path / "sparse.bin").touch()
        os.truncate(tmp_path / "sparse.bin", 1 << 40)

        def absent(g: Any) -> None:
            g.initializer.remove(stored(g, "fc6_w_0"))
            g.input.remove(next(value for value in g.input if value.name == "fc6_w_0"))

        def enormous(g: Any) -> None:
            external("sparse.bin")(g)
            stored(g, "fc6_w_0").dims[:] = [1 << 19, 1 << 19]

        conv = [helper.make_node("Conv", ["x", "w"], ["y"]) for _ in range(53)]
        resnet = helper.make_graph([*conv, helper.make_node("Gemm", ["y", "w"], ["z"])], "r", [], [])
        resnet.input.extend(graph.graph.input)
        contents: list[tuple[bytes, str]] = [
            (b"", "it holds no graph"),
            (graph.SerializeToString()[:-100], "is not a readable ONNX model"),
            (bytes(range(256)) * 20, "is not a readable ONNX model"),
            (put(7, put(1, b"") * 200_000), "more than 100,000 fields"),
            (helper.make_model(resnet).SerializeToString(), "as ResNet-50, has 53 convolutions"),
            (changed(lambda g: stored(g, "fc6_w_0").dims.__setitem__(0, -1)), "has the shape (-1,"),
            (changed(lambda g: stored(g, "fc6_w_0").dims.__setitem__(0, 1 << 30)), "bytes"),
            (changed(lambda g: g.initializer.remove(stored(g, "fc6_w_0"))), "its graph has 2 inputs"),
            (changed(absent), "fc6_w_0, is not stored in the file"),
            (changed(external("../outside.bin")), "which is not a file of the model's folder"),
            (changed(external("/etc/passwd")), "which is not a file of the model's folder"),
            (changed(external("short.bin")), "which short.bin does not have"),
            (changed(external("short.bin", offset="-5")), "which short.bin does not have"),
            (changed(enormous), "more than 2,147,483,647 bytes"),
            (changed(set_op("LRN", "Sigmoid")), "has the node Sigmoid"),
            (changed(set_op("Relu", "QuantizeLinear")), "it is quantised"),
            (changed(lambda g: g.node.add(op_type="Relu", input=["r0"], output=["q"])), "branches"),
        ]
        path = tmp_path / "x.onnx"
        for content, words in contents:
            path.write_bytes(content)
            refused(lambda: onnx.read(path), words)

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        (tmp_path / "x.onnx").write_bytes(b"")
        for call in (
            lambda: onnx.read(tmp_path / "x.onnx"),
            lambda: onnx.write(small("caffe"), tmp_path / "y.onnx"),
        ):
            with pytest.raises(MissingPackage, match=r"needs onnx; .*alexnet_kernels\[weights\]"):
                call()


# cuda-convnet. Checkpoints are written as Python 2 wrote them, and computed tower by tower in their own layout.


class OptionsParser:
    """Stands for the program's own class, which every checkpoint has."""

    def __init__(self) -> None:
        self.options = {"epochs": 90}


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes and strings as Python 2's str, and numpy's functions by their names in numpy 1."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: Any) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin-1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core").replace("test_formats", "options")
        self.write(f"c{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text
    dispatch[type] = dispatch[types.FunctionType] = dispatch[types.BuiltinFunctionType] = save_global


def dumped(value: object) -> bytes:
    file = io.BytesIO()
    Python2(file, 2).dump(value)
    return file.getvalue()


class Net:
    """Layers of a checkpoint, as layer.py stores them: padding negative, scale divided by the window, neurons apart."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.layers: dict[str, dict[str, Any]] = {}
        self.size = {"data": (3, 224)}
        self.add("data", "data", [], dataIdx=0, outputs=3 * 224 * 224)
        self.add("labels", "data", [], dataIdx=1, outputs=1)

    def add(self, name: str, kind: str, inputs: list[str], **values: Any) -> None:
        self.layers[name] = {
            "name": name,
            "type": kind,
            "inputs": inputs,
            "inputLayers": [self.layers[other] for other in inputs],
            **values,
        }

    def neuron(self, name: str) -> str:
        self.layers[name]["neuron"] = "relu"
        neuron = {"type": "relu", "params": {}, "usesActs": True, "usesInputs": False}
        self.add(f"{name}_neuron", "neuron", [name], neuron=neuron, src_layer=name)
        self.size[f"{name}_neuron"] = self.size[name]
        return f"{name}_neuron"

    def conv(self, name: str, inputs: list[str], filters: int, k: int, stride: int, pad: int, gpu: Any) -> str:
        channels, size = [self.size[other][0] for other in inputs], self.size[inputs[0]][1]
        modules = 1 + -(-(2 * pad + size - k) // stride)
        each = len(inputs)
        weights = [self.weights((n * k * k, filters), each * n * k * k, "C") for n in channels]
        self.add(
            *(name, "conv", inputs),
            **{"channels": channels, "filters": filters, "filterSize": [k] * each, "stride": [stride] * each},
            **{"padding": [-pad] * each, "groups": [1] * each, "imgSize": [size] * each, "modulesX": modules},
            **{"randSparse": [False] * each, "sharedBiases": True, "weights": weights, "gpu": gpu},
            weightsInc=[np.zeros_like(w) for w in weights],
            biases=self.weights((filters, 1), 100, "C"),
        )
        self.size[name] = (filters, modules)
        return name

    def fc(self, name: str, inputs: list[str], outputs: int, gpu: Any) -> str:
        counts = [self.size[other][0] * self.size[other][1] ** 2 for other in inputs]
        weights = [self.weights((n, outputs), sum(counts), "F") for n in counts]
        self.add(
            name, "fc", inputs, outputs=outputs, weights=weights, biases=self.weights((1, outputs), 100, "F"), gpu=gpu
        )
        self.size[name] = (outputs, 1)
        return name

    def norm(self, name: str, kind: str, taken: str, scale: float, **values: float) -> str:
        window = 5 if kind == "cmrnorm" else 25
        self.add(name, kind, [taken], size=5, scale=scale / window, pow=0.75, blocked=False, **values)
        self.size[name] = self.size[taken]
        return name

    def pool(self, name: str, taken: str) -> str:
        channels, size = self.size[taken]
        outputs = 1 + -(-(size - 3) // 2)
        self.add(name, "pool", [taken], pool="max", start=0, sizeX=3, stride=2, imgSize=size, outputsX=outputs)
        self.size[name] = (channels, outputs)
        return name

    def drop(self, name: str, kind: str, taken: str) -> str:
        self.add(name, kind, [taken], keep=0.5, enable=True)
        self.size[name] = self.size[taken]
        return name

    def weights(self, shape: tuple[int, int], inputs: int, order: Any) -> Any:
        return np.array(self.random.standard_normal(shape) / inputs**0.5, np.float32, order=order)

    def run(self, x: Tensor) -> Tensor:
        """The output of the layer before the softmax, by the definitions of layer.cu."""
        acts: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            kind = layer["type"]
            given = [acts[other] for other in layer["inputs"] if other in acts]
            if kind == "data":
                acts[name] = x
            elif kind == "conv":
                total: Any = 0
                for i, value in enumerate(given):
                    k, stride, pad, n = (
                        layer["filterSize"][i],
                        layer["stride"][i],
                        -layer["padding"][i],
                        layer["modulesX"],
                    )
                    after = (n - 1) * stride + k - layer["imgSize"][i] - pad
                    rows = F.unfold(F.pad(value, (pad, after, pad, after)), k, stride=stride)
                    total = total + torch.from_numpy(np.ascontiguousarray(layer["weights"][i].T)) @ rows
                total = total + torch.from_numpy(layer["biases"])
                acts[name] = total.unflatten(2, (n, n))
            elif kind == "fc":
                products = [v.flatten(1) @ torch.from_numpy(w) for v, w in zip(given, layer["weights"], strict=True)]
                acts[name] = sum(products, torch.from_numpy(layer["biases"]))
            elif kind == "neuron":
                acts[name] = given[0].clamp(min=0)
            elif kind == "pool":
                acts[name] = F.max_pool2d(given[0], 3, 2, ceil_mode=True)
            elif kind in ("cmrnorm", "rnorm"):
                square = given[0] ** 2
                if kind == "rnorm":
                    sums = F.avg_pool2d(square, 5, 1, 2, divisor_override=1)
                else:
                    padded = F.pad(square, (0, 0, 0, 0, 2, 2))
                    sums = sum(padded[:, i : i + square.shape[1]] for i in range(5))  # type: ignore[assignment]
                acts[name] = given[0] / (layer.get("minDiv", 1) + layer["scale"] * sums) ** layer["pow"]
            elif kind in ("hs", "dropout2"):
                acts[name] = given[0] * layer["keep"]
            elif kind == "softmax":
                return given[0]
        raise AssertionError

    def checkpoint(self, **state: Any) -> dict[str, Any]:
        epoch = {"epoch": 90, "batchnum": 240, "test_outputs": [({"logprob": [1.74, 0.40664, 0.1821]}, 50000)]}
        return {"model_state": {"layers": self.layers, **epoch, **state}, "op": OptionsParser()}


def two_towers() -> Net:
    """layers-145.cfg, narrow. The layers' names put tower b first in the dictionary."""
    net = Net()
    previous = {"a": ["data"], "b": ["data"]}
    for i, (filters, k, stride, pad) in enumerate(
        ((16, 11, 4, 0), (32, 5, 1, 2), (16, 3, 1, 1), (32, 3, 1, 1), (16, 3, 1, 1)), 1
    ):
        made = {}
        for gpu, tower in reversed(list(enumerate("ab"))):
            inputs = [previous[t][0] for t in "ab"] if i == 3 else previous[tower]
            name = net.conv(f"conv{i}{tower}", inputs, filters // 2, k, stride, pad, gpu)
            if i in (2, 3, 4):
                name = net.neuron(name)
            if i < 3:
                name = net.norm(f"rnorm{i}{tower}", "cmrnorm", name, 1e-4, minDiv=2.0)
            if i == 2:
                name = net.norm(f"cnorm{i}{tower}", "rnorm", name, 1e-3)
            if i in (1, 2, 5):
                name = net.pool(f"pool{i}{tower}", name)
            if i in (1, 5):
                name = net.neuron(name)
            made[tower] = [name]
        previous = made
    a, b = previous["a"][0], previous["b"][0]
    for stage, names in ((1, ("fc2048a", "fc2048b")), (2, ("fc2048ba", "fc2048bb"))):
        # The second tower's layer of stage 2 lists its own tower first.
        orders = ([a, b], [b, a] if stage == 2 else [a, b])
        ends = []
        for gpu in (0, 1):
            name = net.neuron(net.fc(names[gpu], orders[gpu], 16, gpu))
            ends.append(net.drop(f"hs{stage}{'ab'[gpu]}", "hs", name))
        a, b = ends
    net.add("probs", "softmax", [net.fc("fc1000", [a, b], 5, 0)])
    return net


def one_tower() -> Net:
    """cuda-convnet2's layers-imagenet-1gpu.cfg, narrow."""
    net = Net(1)
    name = "data"
    for i, (filters, k, stride, pad) in enumerate(
        ((8, 11, 4, 0), (16, 5, 1, 2), (24, 3, 1, 1), (16, 3, 1, 1), (8, 3, 1, 1)), 1
    ):
        name = net.conv(f"conv{i}", [name], filters, k, stride, pad, [0])
        if i in (2, 3, 4):
            name = net.neuron(name)
        if i < 3:
            name = net.norm(f"rnorm{i}", "cmrnorm", name, 1e-4, minDiv=2.0)
        if i in (1, 2, 5):
            name = net.pool(f"pool{i}", name)
        if i in (1, 5):
            name = net.neuron(name)
    for i, label in ((1, "fc4096a"), (2, "fc4096b")):
        name = net.drop(f"dropout{i}", "dropout2", net.neuron(net.fc(label, [name], 16, [0])))
    net.add("probs", "softmax", [net.fc("fc1000", [name], 5, [0])])
    return net


class TestConvnet:
    def test_two_towers(self, tmp_path: Path) -> None:
        net, path = two_towers(), tmp_path / "90.240"
        content = dumped(net.checkpoint())
        assert content.startswith(b"\x80\x02")
        assert b"numpy.core.multiarray\n_reconstruct" in content
        assert b"coptions\nOptionsParser" in content
        path.write_bytes(content)
        found = convnet.read(path)
        x = images(224)
        assert_close(built(found)(x), net.run(x))
        assert found.preset == replace(PRESETS["as_run"], filters=(16, 32, 16, 32, 16), neurons=32)
        assert found.arguments["dropout"] == 0.5
        assert found.channels == "RGB"
        assert {"saved in epoch 90, batch 240", "last test, logprob: 1.74, 0.40664, 0.1821"} < set(found.notes)

    def test_one_tower_and_wrappers(self, tmp_path: Path) -> None:
        net = one_tower()
        content = dumped(net.checkpoint(test_outputs=[({"logprob": [1740.0, 406.0, 182.0]}, 1000)]))
        with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data", content)
        (tmp_path / "gz").write_bytes(gzip.compress(content))
        (tmp_path / "python3").write_bytes(pickle.dumps({"model_state": {"layers": net.layers}}))
        x = images(224)
        expected = net.run(x)
        for name in ("zip", "gz", "python3"):
            path = tmp_path / name
            assert convnet.recognises(path.read_bytes()[:4096], path)
            found = convnet.read(path)
            assert_close(built(found)(x), expected)
            assert found.preset is not None
            assert found.preset.groups == 1
            assert found.preset.norm == replace(PRESETS["as_run"].norm, towers=1)  # type: ignore[type-var]
            assert name == "python3" or "last test, logprob: 1.74, 0.406, 0.182" in found.notes

    def test_old_programs_lists(self, tmp_path: Path) -> None:
        """Inputs by index, single numbers, and neurons in the layers that they follow."""
        net, path = one_tower(), tmp_path / "1.1"
        old: list[dict[str, Any]] = []
        names: list[str] = []
        renamed: dict[str, str] = {}
        for name, layer in net.layers.items():
            if layer["type"] == "neuron":
                source = layer["src_layer"]
                old[names.index(source)]["neuron"] = layer["neuron"]
                renamed[name] = source
                continue
            values = {key: v for key, v in layer.items() if key not in ("inputLayers", "inputs", "neuron", "gpu")}
            values = {key: v[0] if isinstance(v, list) else v for key, v in values.items()}
            old.append({**values, "inputs": [names.index(renamed.get(other, other)) for other in layer["inputs"]]})
            names.append(name)
        path.write_bytes(dumped({"model_state": {"layers": old}, "op": None}))
        x = images(224)
        assert_close(built(convnet.read(path))(x), net.run(x))

    def test_folders_and_means(self, tmp_path: Path) -> None:
        net = one_tower()
        folder = tmp_path / "ConvNet__2012-09-13_03.43.56"
        folder.mkdir()
        for name, epoch in (("9.240", 9), ("90.24", 90), ("9.3", 9)):
            (folder / name).write_bytes(dumped(net.checkpoint(epoch=epoch)))
        found = convnet.read(folder)
        assert found.preprocessing is None
        assert any("has no mean" in note for note in found.notes)
        assert "the folder's last checkpoint, 90.24, was read" in found.notes
        mean = np.arange(3 * 16, dtype=np.float64).reshape(1, 48)
        (tmp_path / "batches.meta").write_bytes(dumped({"data_mean": mean, "label_names": ["a", "b"]}))
        for found in (convnet.read(folder), convnet.read(folder / "9.3", mean=tmp_path / "batches.meta")):
            assert found.preprocessing is not None
            assert torch.equal(found.preprocessing.mean, torch.arange(48.0).reshape(3, 4, 4))
        given = convnet.read(folder, mean=[1.0, 2.0, 3.0]).preprocessing
        assert given is not None
        assert given.mean.tolist() == [1, 2, 3]

    def test_nothing_is_executed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        net, path = one_tower(), tmp_path / "1.1"
        values = pickle.dumps({"model_state": {"layers": net.layers, "more": Evil()}})
        pickle.loads(values)
        os.rmdir(MADE)
        path.write_bytes(values)
        convnet.read(path)
        assert not Path(MADE).exists()
        path.write_bytes(pickle.dumps(Evil(), 2))
        refused(lambda: convnet.read(path), "<posix.mkdir>")

    def test_other_files(self, tmp_path: Path) -> None:
        net = one_tower()

        def changed(name: str, **values: Any) -> bytes:
            layers = {**net.layers, name: {**net.layers[name], **values}}
            return pickle.dumps({"model_state": {"layers": layers}})

        def array_of(shape: tuple[int, ...], code: str = "f4") -> Any:
            """An array that claims a shape for 16 bytes."""

            class Claim:
                def __reduce__(self) -> Any:
                    function, arguments = np.zeros(4, np.float32).__reduce__()[:2]
                    return function, arguments, (1, shape, np.dtype(code), False, bytes(16))

            return [Claim()]

        laughs: Any = ("ha",) * 10
        for _ in range(40):
            laughs = (laughs,) * 10
        nested: Any = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
        contents: list[tuple[bytes, str]] = [
            (b"", "is not a readable cuda-convnet checkpoint"),
            (dumped(net.checkpoint())[:-5000], "is not a readable cuda-convnet checkpoint"),
            (bytes(range(256)) * 20, "is not a readable cuda-convnet checkpoint"),
            (nested, "it holds"),
            (b"\x80\x02}(" + pickle.dumps(laughs, 2)[2:-1] + b"K\x01u.", "it holds"),
            (pickle.dumps(laughs), "it holds"),
            (b"\x80\x04" + pickle.dumps(laughs, 2)[2:-1] + b"\x94h\x00\x93.", "it holds"),
            (changed("conv1", stride=laughs), "a number is expected"),
            (changed("conv2_neuron", src_layer=laughs, neuron=laughs), "has the neurons"),
            (b"\x80\x02T\xff\xff\xff\x7fabc.", "is not a readable cuda-convnet checkpoint"),
            (pickle.dumps({"model_state": {"layers": {}}}), "0 convolutions"),
            (pickle.dumps({"data": 1}), "it holds a dictionary of data"),
            (gzip.compress(dumped(net.checkpoint()))[:-5000], "is not a readable cuda-convnet checkpoint"),
            (b"PK\x03\x04" + bytes(100), "it is a zip without a readable member data"),
            (changed("conv1", weights=array_of((1 << 30, 1 << 20))), "has 16 bytes"),
            (changed("conv1", weights=array_of((-4,))), "a shape that is not numbers"),
            (changed("conv1", weights=[np.array([Evil()], dtype=object)]), "an array holds objects"),
            (changed("conv1", inputs=["conv5"]), "in a circle"),
            (changed("conv1", inputs=["nothing"]), "takes layer nothing, which is not there"),
            (changed("conv2", randSparse=[True]), "random sparse"),
            (changed("conv2", type="local"), "type local"),
            (changed("pool1", pool="avg"), "avg-pool"),
            (changed("pool1", start=-1), "pools from -1 on"),
            (changed("rnorm1", blocked=True), "in blocks"),
            (changed("conv3", biases=np.zeros((169 * 24, 1), np.float32)), "4056 biases for 24 outputs"),
        ]
        path = tmp_path / "1.1"
        for content, words in contents:
            path.write_bytes(content)
            refused(lambda: convnet.read(path), words)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("alexnet_kernels.models.formats.array_pickles._MOST_UNPACKED", 1 << 16)
            path.write_bytes(gzip.compress(dumped(net.checkpoint())))
            refused(lambda: convnet.read(path), "more than 65,536 bytes")


def test_each_file_is_recognised_by_its_own_reader(tmp_path: Path) -> None:
    contents = {
        "caffe": [model(numbers()), model(numbers(), old=True), model_v0(numbers())],
        "convnet": [dumped(two_towers().checkpoint()), pickle.dumps({"model_state": {"layers": {}}})],
        "onnx": [put(1, 8) + put(2, "pytorch") + put(7, put(1, put(1, "x"))), put(1, 3) + put(8, put(2, 9))],
    }
    others = io.BytesIO()
    torch.save({"model_state": torch.zeros(2)}, others)
    legacy = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    arrays = io.BytesIO()
    np.savez(arrays, data=np.zeros(2))
    safe = struct.pack("<Q", 40) + b'{"x":{"dtype":"F32","shape":[1]}}'
    foreign = [others.getvalue(), legacy.getvalue(), arrays.getvalue(), safe, b"\x89PNG\r\n\x1a\n" + bytes(99), b""]
    foreign += [
        b"\x89HDF\r\n\x1a\n" + bytes(99),
        b"GIF89a" + bytes(99),
        bytes(4096),
        b"\n" * 4096,
        b"hello, world\n" * 9,
    ]
    readers = {"caffe": caffe, "convnet": convnet, "onnx": onnx}
    for kind, files in {**contents, "": foreign}.items():
        for content in files:
            found = [name for name, reader in readers.items() if reader.recognises(content[:4096], tmp_path / "x.bin")]
            assert found == ([kind] if kind else []), (kind, content[:20])
    assert caffe.recognises(b"", tmp_path / "x.caffemodel")
    assert onnx.recognises(b"", tmp_path / "X.ONNX")
