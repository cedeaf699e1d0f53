"""ONNX files of AlexNet: the model zoo's, exports of this package's models and of torchvision's; and writing them.

The graph is read without being run. The layers are found by the dataflow from the images on, not by names. Operators
and attributes: ONNX's operator specifications.
"""

from __future__ import annotations

import copy
import io
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from alexnet_kernels._errors import InputError, RunError, first_line, require
from alexnet_kernels._files import atomic_file, output_path, read_bounded, write_errors
from alexnet_kernels.models.formats.caffe import MEAN
from alexnet_kernels.models.formats.file_weights import FileWeights, Preprocessing
from alexnet_kernels.models.formats.network import (
    Activation,
    BatchNorm,
    Convolution,
    Dropout,
    Layer,
    Linear,
    MapNorm,
    Norm,
    Pooling,
    Scale,
    assemble,
    decimal,
    decoded,
    flip_channels,
    pooled,
    read_errors,
    refuse_others,
)
from alexnet_kernels.models.formats.wire import Fields, check_fields, parsed, varint
from alexnet_kernels.models.presets import ResponseNorm

__all__ = ["CHANNELS", "read", "recognises", "write"]

CHANNELS = "alexnet_kernels_channels"
"""The entry of metadata_props with the order of the images' channels, RGB or BGR, in files of `write`."""

_FORMAT = "ONNX"
_LARGEST = (1 << 31) - 1
_OPSET = 17
# ModelProto.graph; its nodes, with their attributes; its initialisers.
_INSIDE: Fields = {(7, 2): {(1, 2): {(5, 2): {}}, (5, 2): {}}}
_SQUEEZE = {"Constant", "Squeeze", "Identity"}
_SMALL = 256
"""Elements of an array that is computed with: a shape, pads or axes."""


def recognises(head: bytes, path: Path) -> bool:
    """Whether a file that begins with `head` (4096 bytes) is an ONNX model: its name or its first bytes say so."""
    if path.suffix.lower() == ".onnx":
        return True
    # ir_version, then opset_import, producer_name, graph or another field of ModelProto.
    if head[:1] != b"\x08":
        return False
    version, at = varint(head, 1)
    if not 1 <= version <= 64:
        return False
    tag, at = varint(head, at)
    if tag == 0x3A:  # the graph: its first field is a node or its name
        _, at = varint(head, at)
        return head[at : at + 1] in (b"\x0a", b"\x12")
    length, at = varint(head, at)
    if tag == 0x42:  # an opset: its domain, which may be empty, or its version
        return 0 < length < 256 and head[at : at + 1] in (b"\x0a", b"\x10")
    name = head[at : at + length]
    return tag == 0x12 and name.isascii() and all(byte >= 32 for byte in name)


def read(path: str | os.PathLike[str], *, channels: str | None = None, keep_channels: bool = False) -> FileWeights:
    """The weights of an ONNX model, with the preset that its graph defines. Needs the package onnx.

    Args:
        channels: RGB or BGR, the order of the images that the graph takes. None: as its metadata says; BGR for a graph
            that was converted from Caffe, RGB for one that PyTorch exported; RGB otherwise, which `notes` then calls
            assumed.
        keep_channels: leave conv1's input channels in the graph's order.

    Returns:
        float32 tensors in torch's layouts, conv1's inputs RGB. A bias that the graph lacks is 0: exporters leave zeros
        out. Batch normalisation that the exporter has folded into a convolution stays there.

    Raises:
        InputError: not a readable ONNX model, or not of an AlexNet.
        MissingPackage: onnx is not installed.
    """
    path = Path(path)
    if channels not in (None, "RGB", "BGR"):
        raise InputError(f"channels must be RGB or BGR, got {channels!r}")
    with read_errors(path, "ONNX model"):
        require(str(path), "onnx", extra="weights")
        content = read_bounded(path, _LARGEST)
        check_fields(content, _INSIDE)
        model = _parsed(content)
        del content
        if not model.graph.node:
            raise InputError("it holds no graph: it is not an ONNX model, or it is cut off")
        metadata = {entry.key[:200]: entry.value for entry in model.metadata_props[:1000]}
        graph = _Graph(model.graph, path.parent)
        layers = graph.chain()
        notes = list(graph.notes)
        order, said, from_caffe = _order(model, metadata, channels)
        notes.append(said)
        preprocessing = None
        if from_caffe:
            shown = MEAN if order == "RGB" or not keep_channels else MEAN[::-1]
            preprocessing = Preprocessing(torch.tensor(shown), None, 256)
            notes.append(
                f"the mean was assumed: ImageNet's of Caffe, {', '.join(f'{v:g}' for v in MEAN)} (RGB); "
                "the graph has none"
            )
        return assemble(
            layers,
            graph.size,
            format=_FORMAT,
            channels=order,
            keep_channels=keep_channels,
            source=f"the graph of an ONNX model by {decoded(model.producer_name) or 'an unnamed program'}",
            notes=notes,
            preprocessing=preprocessing,
            metadata=metadata,
        )


def _parsed(content: bytes) -> Any:
    import onnx

    return parsed(onnx.ModelProto(), content)


def _order(model: Any, metadata: Mapping[str, str], channels: str | None) -> tuple[str, str, bool]:
    """The order of the images' channels, a note on why, and whether the graph was converted from Caffe."""
    producer, name = model.producer_name.lower(), model.graph.name.lower()
    from_caffe = "caffe" in producer or "caffe" in name or name.startswith("bvlc_")
    if channels is not None:
        return channels, f"the images' channels are {channels}, as the caller says", from_caffe
    if metadata.get(CHANNELS) in ("RGB", "BGR"):
        order = metadata[CHANNELS]
        return order, f"the images' channels are {order}, as the file's metadata says", from_caffe
    if from_caffe:
        by = f"producer {decoded(model.producer_name)}" if "caffe" in producer else f"graph {decoded(model.graph.name)}"
        return "BGR", f"the images' channels are BGR: the graph was converted from Caffe ({by})", True
    if producer.startswith("pytorch"):
        return "RGB", "the images' channels are RGB, as in PyTorch, which exported the graph", False
    return "RGB", "the file doesn't say its images' channels: RGB is assumed; channels='BGR' reads them as BGR", False


class _Graph:
    """A graph's layers, from its images on."""

    def __init__(self, graph: Any, folder: Path) -> None:
        self.folder = folder
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        kinds = [node.op_type for node in graph.node]
        quantised = [kind for kind in kinds if "Quantize" in kind or kind.startswith("QLinear") or "Integer" in kind]
        if quantised:
            raise InputError(f"it is quantised ({decoded(quantised[0])}): give the file that it was made of")
        refuse_others(kinds.count("Conv"), kinds.count("Gemm") + kinds.count("MatMul"))
        self.makers: dict[str, Any] = {}
        self.takers: dict[str, list[Any]] = {}
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise InputError(
                    f"node {decoded(node.op_type)} is of the domain {decoded(node.domain)}, not ONNX's own"
                )
            for name in node.output:
                self.makers[name] = node
            for name in {*node.input, *(name for inner in _branches(node) for name in inner.input)}:
                self.takers.setdefault(name, []).append(node)
        self.results = {value.name for value in graph.output}
        images = [value for value in graph.input if value.name not in self.stored]
        if len(images) != 1:
            raise InputError(f"its graph has {len(images)} inputs; AlexNet takes images alone")
        self.images = images[0].name
        dims = images[0].type.tensor_type.shape.dim
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in dims]
        if sizes and len(sizes) != 4:
            raise InputError(f"its graph takes {len(sizes)}-dimensional input; images have 4 dimensions")
        height, width = sizes[2:] if sizes else (0, 0)
        if height != width:
            raise InputError(f"its graph takes images of {height} x {width}; a preset's are square")
        self.size: int | None = height or None
        self.notes: list[str] = []
        self.maps = [height, width]
        self.channels = 0
        self.shapes: dict[str, list[Any]] = {}
        self._known: dict[str, Any] = {}
        self._external_left = _LARGEST

    # Values that don't depend on the images.

    def constant(self, name: str, depth: int = 0) -> Any:
        """The array of that name, or None if it depends on the images. In a shape, None stands for the batch."""
        if name in self._known:
            return self._known[name]
        value = self._constant(name, depth)
        # Copies of weights aren't kept: a chain of operators may make many.
        if value is None or value.size <= _SMALL:
            self._known[name] = value
        return value

    def _constant(self, name: str, depth: int) -> Any:
        if name in self.stored:
            return self._array(self.stored[name])
        node = self.makers.get(name)
        if node is None or depth > 50:
            return None
        kind, given = node.op_type, _attributes(node)
        if kind == "Constant":
            return self._constant_node(given)
        if kind == "Shape":
            shape = self.shapes.get(node.input[0])
            if shape is not None:
                return numpy.array(shape, dtype=object)
            value = self.constant(node.input[0], depth + 1)
            return None if value is None else numpy.array(value.shape, dtype=numpy.int64)
        if not node.input:
            return None
        values = [self.constant(other, depth + 1) if other else None for other in node.input]
        if values[0] is None:
            return None
        if kind in ("Identity", "Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            return _rearranged(kind, values, given)
        if any(value is not None and value.size > _SMALL for value in values):
            if kind == "ConstantOfShape":
                return None
            raise InputError(f"{decoded(name)} is computed by {decoded(kind)} from large arrays, which is not read")
        return _computed(kind, values, given)

    def _constant_node(self, given: Mapping[str, Any]) -> Any:
        if "value" in given:
            return self._array(given["value"].t)
        for key, field in (
            ("value_float", "f"),
            ("value_int", "i"),
            ("value_floats", "floats"),
            ("value_ints", "ints"),
        ):
            if key in given:
                value = getattr(given[key], field)
                return numpy.array(list(value) if field.endswith("s") else value)
        return None

    def _array(self, tensor: Any) -> Any:
        from onnx import TensorProto

        name = decoded(tensor.name) or "a constant"
        shape = list(tensor.dims)
        known = {
            TensorProto.FLOAT: ("<f4", "float_data"),
            TensorProto.DOUBLE: ("<f8", "double_data"),
            TensorProto.FLOAT16: ("<f2", "int32_data"),
            TensorProto.BFLOAT16: ("<u2", "int32_data"),
            TensorProto.INT64: ("<i8", "int64_data"),
            TensorProto.INT32: ("<i4", "int32_data"),
            TensorProto.BOOL: ("?", "int32_data"),
        }
        if tensor.data_type not in known:
            raise InputError(
                f"{name} has ONNX's data type {tensor.data_type}; numbers that are not quantised are expected"
            )
        code, field = known[tensor.data_type]
        dtype = numpy.dtype(code)
        if len(shape) > 8 or any(size < 0 for size in shape):
            raise InputError(f"{name} has the shape {tuple(shape[:8])}")
        count = math.prod(shape)
        if tensor.data_location == TensorProto.EXTERNAL:
            data: Any = self._external(tensor, name, count * dtype.itemsize)
        elif tensor.HasField("raw_data"):
            data = tensor.raw_data
        else:
            numbers = getattr(tensor, field)
            if len(numbers) != count:
                raise InputError(f"{name} has the shape {tuple(shape)} and {len(numbers):,} values")
            whole = numpy.dtype("<u2") if tensor.data_type == TensorProto.FLOAT16 else dtype
            data = numpy.fromiter(numbers, whole, count).tobytes()
        if len(data) != count * dtype.itemsize:
            raise InputError(f"{name} has the shape {tuple(shape)} and {len(data):,} bytes")
        array = numpy.frombuffer(data, dtype).reshape(shape)
        if tensor.data_type == TensorProto.BFLOAT16:
            return (array.astype(numpy.uint32) << 16).view(numpy.float32)
        return array

    def _external(self, tensor: Any, name: str, size: int) -> bytes:
        """The tensor's bytes in a file beside the model."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        folder = self.folder.resolve()
        file = (folder / location).resolve()
        if not location or os.path.isabs(location) or not file.is_relative_to(folder) or not file.is_file():
            raise InputError(
                f"{name} is in {decoded(location) or 'no file'}, which is not a file of the model's folder"
            )
        offset, length = (int(entries.get(key) or default) for key, default in (("offset", 0), ("length", size)))
        if offset < 0 or length != size or offset + size > file.stat().st_size:
            raise InputError(f"{name} has {size:,} bytes from {offset:,} on, which {file.name} does not have")
        self._external_left -= size
        if self._external_left < 0:
            raise InputError(f"its files beside the model have more than {_LARGEST:,} bytes of weights")
        with file.open("rb") as data:
            data.seek(offset)
            return data.read(size)

    # Layers.

    def chain(self) -> list[Layer]:
        """The layers from the images to the logits."""
        layers: list[Layer] = []
        current = self.images
        padding = (0, 0, 0, 0)
        self.shapes[current] = [None, 0, *self.maps]
        for _ in range(1000):
            takers = [node for node in self.takers.get(current, []) if node.op_type != "Shape"]
            if not takers:
                break
            if len(takers) > 1:
                norm, current = self._decomposed_norm(current, takers)
                layers.append(norm)
            else:
                node = takers[0]
                if node.op_type == "Pad" and not layers:
                    padding = self._pads(node)
                    self.maps = [self.maps[0] + padding[2] + padding[3], self.maps[1] + padding[0] + padding[1]]
                else:
                    layers += self._layer(node, current, padding, layers)
                    padding = (0, 0, 0, 0)
                current = node.output[0]
                if node.op_type == "MatMul":
                    current = self._biased(layers, current)
            self.shapes[current] = [None, self.channels, *self.maps]
        if current not in self.results:
            raise InputError("its last layer is not the graph's output")
        return layers

    def _layer(self, node: Any, current: str, padding: tuple[int, int, int, int], before: list[Layer]) -> list[Layer]:
        kind, given = node.op_type, _attributes(node)
        if node.input[0] != current and kind not in ("Mul",):
            raise InputError(f"node {decoded(kind)} takes the layer before it as another input than its first")
        if kind == "Conv":
            return [self._convolution(node, given, padding)]
        if kind == "Gemm":
            return [self._gemm(node, given)]
        if kind == "MatMul":
            weight = self._weight(node, 1)
            return [Linear(_label(node), _tensor(weight.T), None)]
        if kind in ("Relu", "Tanh"):
            return [Activation(kind.lower())]
        if kind == "LRN":
            size = _int(given, "size", 0)
            if size % 2 != 1:
                raise InputError(f"node LRN has size {size}; ONNX and torch centre windows of even size differently")
            values = [_float(given, key, default) for key, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))]
            alpha, beta, k = map(decimal, values)
            return [Norm(ResponseNorm(size, alpha, beta, k))]
        if kind == "BatchNormalization":
            if _int(given, "training_mode", 0) or len(node.output) > 1:
                raise InputError("its batch normalisation is in training mode: export the model in evaluation mode")
            weight, bias, mean, var = (_tensor(self._weight(node, i)) for i in (1, 2, 3, 4))
            return [BatchNorm(weight, bias, mean, var, _float(given, "epsilon", 1e-5))]
        if kind == "MaxPool":
            return [self._max_pool(given)]
        if kind == "Dropout":
            ratio = self.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            p = _float(given, "ratio", 0.5) if ratio is None else float(ratio.reshape(-1)[0])
            return [Dropout(decimal(p))]
        if kind == "Mul" and before:
            factor = self.constant(node.input[1] if node.input[0] == current else node.input[0])
            if factor is not None and factor.size == 1:
                return [Scale(decimal(factor.reshape(-1)[0]))]
        if kind == "AveragePool":
            self._average(given)
            return []
        if kind in ("Softmax", "LogSoftmax"):
            self.notes.append(f"the graph's {kind} was left out: the model gives logits")
            return []
        if kind in ("Identity", "Cast") or (kind in ("Reshape", "Flatten", "Squeeze", "Unsqueeze") and before):
            return []
        place = (
            "before conv1"
            if not before
            else f"after {sum(isinstance(layer, Convolution | Linear) for layer in before)} layers"
        )
        raise InputError(f"its graph has the node {decoded(kind)} {place}, where AlexNet has none")

    def _weight(self, node: Any, index: int) -> Any:
        if len(node.input) <= index or not node.input[index]:
            raise InputError(f"node {decoded(node.op_type)} lacks its input {index}")
        value = self.constant(node.input[index])
        if value is None or value.dtype.kind != "f":
            raise InputError(
                f"input {index} of a node {decoded(node.op_type)}, {decoded(node.input[index])}, is not stored in "
                "the file"
            )
        return value

    def _bias(self, node: Any) -> Tensor | None:
        if len(node.input) < 3 or not node.input[2]:
            return None
        return _tensor(self._weight(node, 2)).flatten()

    def _convolution(self, node: Any, given: Mapping[str, Any], before: tuple[int, int, int, int]) -> Convolution:
        weight = self._weight(node, 1)
        if weight.ndim != 4:
            raise InputError(f"node Conv has a weight of shape {weight.shape}; that of images has 4 sizes")
        kernel = _ints(given, "kernel_shape", list(weight.shape[2:]))
        strides = _ints(given, "strides", [1, 1])
        groups = _int(given, "group", 1)
        if kernel != list(weight.shape[2:]) or len(strides) != 2 or min(strides) < 1 or groups < 1:
            raise InputError(f"node Conv has kernel_shape {kernel} and strides {strides} for a weight {weight.shape}")
        if _ints(given, "dilations", [1, 1]) != [1, 1]:
            raise InputError("node Conv is dilated; AlexNet's are not")
        top, left, bottom, right = _padding(given, kernel, strides, "Conv")
        padding = (left + before[0], right + before[1], top + before[2], bottom + before[3])
        if min(padding) < 0:
            raise InputError(f"node Conv has padding {padding}")
        if not self.maps[0]:  # the size for which conv1 gives 55 x 55
            self.maps = [227 - top - bottom, 227 - left - right]
        rows, columns = self.maps
        self.maps = [
            (rows + top + bottom - kernel[0]) // strides[0] + 1,
            (columns + left + right - kernel[1]) // strides[1] + 1,
        ]
        self.channels = weight.shape[0]
        return Convolution(_label(node), _tensor(weight), self._bias(node), (strides[0], strides[1]), padding, groups)

    def _gemm(self, node: Any, given: Mapping[str, Any]) -> Linear:
        if _int(given, "transA", 0) or _float(given, "alpha", 1.0) != 1 or _float(given, "beta", 1.0) != 1:
            raise InputError("node Gemm has transA, alpha or beta; a layer has none")
        weight = self._weight(node, 1)
        return Linear(_label(node), _tensor(weight if _int(given, "transB", 0) else weight.T), self._bias(node))

    def _biased(self, layers: list[Layer], current: str) -> str:
        """Adds the bias of an Add to the layer of a MatMul. The name of what it gives."""
        takers = self.takers.get(current, [])
        if len(takers) != 1 or takers[0].op_type != "Add":
            return current
        add = takers[0]
        bias = self.constant(add.input[1] if add.input[0] == current else add.input[0])
        layer = layers[-1]
        if bias is None or not isinstance(layer, Linear) or bias.size != layer.weight.shape[0]:
            raise InputError("node Add after a MatMul does not add a bias")
        layers[-1] = Linear(layer.name, layer.weight, _tensor(bias).flatten())
        return add.output[0]

    def _max_pool(self, given: Mapping[str, Any]) -> Pooling:
        kernel, strides = _ints(given, "kernel_shape", []), _ints(given, "strides", [1, 1])
        top, left, bottom, right = _padding(given, kernel, strides, "MaxPool")
        ceil_mode = bool(_int(given, "ceil_mode", 0))
        if len(kernel) != 2 or kernel[0] != kernel[1] or strides[0] != strides[-1] or min(*kernel, *strides) < 1:
            raise InputError(f"node MaxPool has the window {kernel} and strides {strides}; AlexNet's are square")
        if top or left or bottom != right or bottom < 0 or _ints(given, "dilations", [1, 1]) != [1, 1]:
            raise InputError(f"node MaxPool has pads {[top, left, bottom, right]}; AlexNet's pools have none before")
        self.maps = [pooled(rows + bottom, kernel[0], strides[0], ceil_mode) for rows in self.maps]
        return Pooling(kernel[0], strides[0], ceil_mode, bottom)

    def _average(self, given: Mapping[str, Any]) -> None:
        """Checks that an average pool is AlexNet's, which gives maps of 6 x 6."""
        kernel, strides = _ints(given, "kernel_shape", []), _ints(given, "strides", [1, 1])
        if kernel != strides or [rows // 6 if rows % 6 == 0 else 0 for rows in self.maps] != kernel:
            raise InputError(f"node AveragePool has the window {kernel} for maps of {self.maps}; AlexNet's gives 6 x 6")
        self.maps = [6, 6]

    def _pads(self, node: Any) -> tuple[int, int, int, int]:
        """Left, right, top, bottom of a Pad of images with zeros."""
        pads, value = self._pad_values(node)
        if len(pads) != 8 or any(pads[i] for i in (0, 1, 4, 5)) or value != 0 or min(pads) < 0:
            raise InputError(f"node Pad has pads {pads[:16]}; AlexNet pads images with zeros")
        return pads[3], pads[7], pads[2], pads[6]

    def _pad_values(self, node: Any) -> tuple[list[int], float]:
        given = _attributes(node)
        mode = given["mode"].s if "mode" in given else b"constant"
        if mode != b"constant" or len(node.input) > 3:
            raise InputError(f"node Pad is of mode {decoded(mode)}; zeros are expected")
        if "pads" in given:
            return list(given["pads"].ints), _float(given, "value", 0.0)
        pads = self.constant(node.input[1]) if len(node.input) > 1 else None
        filled = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if pads is None or pads.size > 16:
            raise InputError("node Pad has pads that are not stored in the file")
        return [int(value) for value in pads.reshape(-1)], 0.0 if filled is None else float(filled.reshape(-1)[0])

    # Normalisation as a graph of several nodes, a / (k + alpha * average of squares)^beta.

    def _decomposed_norm(self, current: str, takers: list[Any]) -> tuple[Layer, str]:
        squares = [n for n in takers if self._is_square(n, current)]
        ends = [n for n in takers if n not in squares]
        if len(takers) != 2 or len(squares) != 1 or ends[0].op_type not in ("Div", "Mul"):
            kinds = ", ".join(sorted(decoded(node.op_type) for node in takers))
            raise InputError(f"its graph branches to {kinds}, where AlexNet does not")
        end = ends[0]
        name = squares[0].output[0]
        self.shapes[name] = self.shapes[current]
        rank, towers, before = 4, 1, [0] * 8
        window: list[int] = []
        alpha, k, beta = 1.0, 0.0, None
        for _ in range(20):
            takers = [node for node in self.takers.get(name, []) if node.op_type != "Shape"]
            if len(takers) != 1:
                raise InputError("its graph has a normalisation that branches, which is not read")
            node = takers[0]
            if node is end:
                break
            kind, given = node.op_type, _attributes(node)
            if kind in ("Reshape", "Unsqueeze", "Squeeze"):
                if not window:
                    rank, towers = 5, self._towers(node, kind, given)
            elif kind == "Pad" and not window:
                pads, value = self._pad_values(node)
                if value != 0 or len(pads) != 2 * rank:
                    raise InputError(f"its graph has a normalisation with pads {pads[:16]}, which is not read")
                before = pads
            elif kind == "AveragePool" and not window:
                window = self._window(given, rank, before)
            elif kind in ("Mul", "Add", "Pow") and window:
                number = self.constant(node.input[1] if node.input[0] == name else node.input[0])
                if number is None or number.size != 1 or (kind == "Pow" and node.input[0] != name):
                    raise InputError(f"its graph has a normalisation with a {kind} that is not read")
                value = float(number.reshape(-1)[0])
                if kind == "Pow":
                    beta = value
                elif beta is not None:
                    raise InputError(f"its graph has a normalisation with a {kind} after its power, which is not read")
                elif kind == "Mul":
                    alpha, k = alpha * value, k * value
                else:
                    k += value
            elif kind == "If" and window and {inner.op_type for inner in _branches(node)} <= _SQUEEZE:
                # torch's squeeze(1), in a graph that looks whether the dimension has size 1.
                pass
            elif kind != "Cast":
                raise InputError(f"its graph has a normalisation with the node {decoded(kind)}, which is not read")
            name = node.output[0]
            self.shapes.setdefault(name, [None] * rank)
        else:
            raise InputError("its graph has a normalisation of more than 20 nodes")
        if end.op_type == "Mul" and beta is not None:
            beta = -beta
        if beta is None or not window or (end.op_type == "Div" and list(end.input) != [current, name]):
            raise InputError("its graph has a normalisation that is not AlexNet's")
        size = window[-1] if rank == 4 else window[0]
        norm = ResponseNorm(size, decimal(alpha), decimal(beta), decimal(k), towers)
        return MapNorm(norm) if rank == 4 else Norm(norm), end.output[0]

    def _is_square(self, node: Any, current: str) -> bool:
        if node.op_type == "Mul":
            return list(node.input) == [current, current]
        if node.op_type != "Pow" or node.input[0] != current:
            return False
        exponent = self.constant(node.input[1])
        return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2

    def _towers(self, node: Any, kind: str, given: Mapping[str, Any]) -> int:
        """The towers that a normalisation's channels are split into: the second of the five sizes."""
        if kind == "Unsqueeze":
            axes = self._axes(node, given)
            if axes != [1]:
                raise InputError(f"its graph has a normalisation that adds the dimensions {axes}, which is not read")
            return 1
        shape = self.constant(node.input[1]) if len(node.input) > 1 else None
        sizes = [] if shape is None else list(shape.reshape(-1))
        channels, towers = self.channels, sizes[1] if len(sizes) == 5 else None
        if type(towers) is not int and not isinstance(towers, numpy.integer):
            raise InputError("its graph has a normalisation with a shape that is not stored in the file")
        if towers < 1 or channels % towers or sizes[2] not in (-1, channels // towers):
            raise InputError(f"its graph has a normalisation of {channels} channels in {towers} towers")
        return int(towers)

    def _axes(self, node: Any, given: Mapping[str, Any]) -> list[int]:
        if "axes" in given:
            return list(given["axes"].ints)
        axes = self.constant(node.input[1]) if len(node.input) > 1 else None
        return [] if axes is None else [int(axis) for axis in axes.reshape(-1)]

    def _window(self, given: Mapping[str, Any], rank: int, before: list[int]) -> list[int]:
        """The window of a normalisation's average, checked: size x 1 x 1 over channels, or size x size in a map."""
        window = _ints(given, "kernel_shape", [])
        dims = rank - 2
        if len(window) != dims or min(window) < 1 or _ints(given, "strides", [1] * dims) != [1] * dims:
            raise InputError(f"its graph has a normalisation over {window}, which is not read")
        own = _ints(given, "pads", [0] * (2 * dims))
        if any(own) and not _int(given, "count_include_pad", 0):
            raise InputError("its graph has a normalisation that counts fewer elements at the edges, which is not read")
        starts = [before[2 + i] + own[i] for i in range(dims)]
        ends = [before[rank + 2 + i] + own[dims + i] for i in range(dims)]
        size = window[0]
        wanted = window in ([size, 1, 1], [size, size])
        if not wanted or starts != [n // 2 for n in window] or ends != [(n - 1) // 2 for n in window]:
            raise InputError(
                f"its graph has a normalisation over {window} with pads {starts}, {ends}, which is not read"
            )
        if len(window) == 2 and size % 2 == 0:
            raise InputError(f"its graph has a normalisation over {window}; an odd size is expected")
        return window


def _branches(node: Any) -> list[Any]:
    """The nodes of an If's two branches."""
    if node.op_type != "If":
        return []
    return [inner for attribute in node.attribute for inner in attribute.g.node]


def _attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: attribute for attribute in node.attribute}


def _int(given: Mapping[str, Any], key: str, default: int) -> int:
    return given[key].i if key in given else default


def _float(given: Mapping[str, Any], key: str, default: float) -> float:
    return given[key].f if key in given else default


def _ints(given: Mapping[str, Any], key: str, default: list[int]) -> list[int]:
    found = list(given[key].ints) if key in given else default
    if any(abs(value) > 1 << 20 for value in found) or len(found) > 16:
        raise InputError(f"a node has {key} {found[:8]}")
    return found


def _padding(given: Mapping[str, Any], kernel: list[int], strides: list[int], kind: str) -> list[int]:
    """pads of a node: top, left, bottom, right."""
    mode = given["auto_pad"].s if "auto_pad" in given else b"NOTSET"
    pads = _ints(given, "pads", [0] * 4)
    if mode in (b"SAME_UPPER", b"SAME_LOWER") and kind == "Conv" and strides == [1, 1] and all(n % 2 for n in kernel):
        pads = [n // 2 for n in kernel] * 2
    elif mode not in (b"NOTSET", b"VALID", b""):
        raise InputError(f"node {kind} has auto_pad {decoded(mode)}; pads are expected")
    if len(pads) != 4:
        raise InputError(f"node {kind} has pads {pads}; images have 4")
    return pads


def _label(node: Any) -> str:
    return f"{decoded(node.op_type)} {decoded(node.name or node.output[0])}"


def _tensor(array: Any) -> Tensor:
    """float32, contiguous, of its own memory."""
    return torch.from_numpy(numpy.array(array, dtype=numpy.float32, order="C"))


def _rearranged(kind: str, values: list[Any], given: Mapping[str, Any]) -> Any:
    """A constant after an operator that changes no number, except by rounding."""
    value = values[0]
    if kind == "Transpose":
        axes = _ints(given, "perm", list(range(value.ndim))[::-1])
        return value.transpose(axes)
    if kind == "Flatten":
        axis = _int(given, "axis", 1)
        return value.reshape(math.prod(value.shape[:axis]), -1)
    if kind == "Reshape":
        shape = list(given["shape"].ints) if "shape" in given else [int(n) for n in values[1].reshape(-1)]
        kept = [value.shape[i] if n == 0 and not _int(given, "allowzero", 0) else n for i, n in enumerate(shape)]
        return value.reshape(kept)
    if kind in ("Squeeze", "Unsqueeze"):
        found = list(given["axes"].ints) if "axes" in given else None
        if found is None and len(values) > 1 and values[1] is not None:
            found = [int(n) for n in values[1].reshape(-1)]
        if kind == "Squeeze":
            return value.squeeze() if found is None else value.squeeze(tuple(found))
        return numpy.expand_dims(value, tuple(found or ()))
    return value


def _computed(kind: str, values: list[Any], given: Mapping[str, Any]) -> Any:
    """A small constant after an operator on shapes, or None for an operator that is not known."""
    if kind == "ConstantOfShape":
        count = math.prod(int(size) for size in values[0].reshape(-1))
        if not 0 <= count <= _SMALL or ("value" in given and any(given["value"].t.raw_data)):
            return None
        return numpy.zeros([int(size) for size in values[0].reshape(-1)], dtype=numpy.int64)
    if any(value is None for value in values):
        return None
    if kind == "Concat":
        return numpy.concatenate(values, _int(given, "axis", 0))
    if kind == "Slice":
        if len(values) < 3:
            starts, ends = (list(given[key].ints) for key in ("starts", "ends"))
            axes = _ints(given, "axes", list(range(len(starts))))
            steps = [1] * len(starts)
        else:
            lists = [[int(n) for n in value.reshape(-1)] for value in values[1:]]
            starts, ends = lists[:2]
            axes = lists[2] if len(lists) > 2 else list(range(len(starts)))
            steps = lists[3] if len(lists) > 3 else [1] * len(starts)
        index: list[slice] = [slice(None)] * values[0].ndim
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            # The end before the first element has no index in Python.
            index[axis] = slice(start, None if step < 0 and end < -(1 << 31) else end, step)
        return values[0][tuple(index)]
    if kind == "Gather":
        # numpy gives an element itself for an index alone.
        return numpy.asarray(values[0].take(values[1].astype(numpy.int64), _int(given, "axis", 0)))
    if kind in ("Add", "Sub", "Mul", "Mod") and all(value.dtype.kind in "if" for value in values):
        function = {"Add": numpy.add, "Sub": numpy.subtract, "Mul": numpy.multiply, "Mod": numpy.mod}[kind]
        return numpy.asarray(function(*values))
    return None


def write(
    model: nn.Module,
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    channels: str = "RGB",
    overwrite: bool = False,
) -> None:
    """Write a model as an ONNX file of opset 17, with an input `images` and an output `logits` of any batch.

    The file has the model's weights in every bit, so that `read` gives them back, and images of the model's input_size.
    torch's TorchScript-based exporter writes it, which needs the package onnx and no other. The model stays as it is.

    Args:
        model: an `AlexNet`, or another module that takes images; it is written as in evaluation.
        path: a .onnx file. It is written completely or not at all.
        metadata: entries for the file's metadata_props, such as the header of a run as JSON.
        channels: BGR for a file that takes images in Caffe's order, from a model that takes RGB.
        overwrite: whether a file at `path` is replaced.

    Raises:
        InputError: the path is not that of a new .onnx file.
        MissingPackage: onnx is not installed.
        RunError: the model can't be exported, or the file can't be written.
    """
    path = output_path(Path(path), ".onnx")
    if channels not in ("RGB", "BGR"):
        raise InputError(f"channels must be RGB or BGR, got {channels!r}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: name another file")
    require(f"writing {path}", "onnx", extra="weights")
    copied = copy.deepcopy(model).cpu().eval()
    first = next((module for module in copied.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise InputError("the model has no convolution: it takes no images")
    if channels == "BGR":
        if first.in_channels != 3:
            raise InputError(f"the model takes {first.in_channels} channels: BGR has 3")
        first.weight.data = flip_channels(first.weight.data)
    size = getattr(model, "input_size", 224)
    images = torch.zeros(2, first.in_channels, size, size, dtype=first.weight.dtype)
    exported = _parsed(_exported(copied, images))
    for key, value in {CHANNELS: channels, **(metadata or {})}.items():
        exported.metadata_props.add(key=key, value=value)
    try:
        content = exported.SerializeToString()
    except Exception as error:
        # protobuf's errors have no common type; they mean more than 2 GB.
        raise RunError(f"{path} could not be written: {first_line(error)}") from error
    with write_errors(path), atomic_file(path) as file:
        file.write(content)


def _exported(model: nn.Module, images: Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter is deprecated in favour of one that drops zeros, folds batch normalisation and needs onnxscript.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model,
                (images,),
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                # PRESERVE keeps batch normalisation apart from convolutions.
                training=torch.onnx.TrainingMode.PRESERVE,
                opset_version=_OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            )
        except Exception as error:
            raise RunError(f"the model can't be exported to ONNX: {first_line(error)}") from error
    return buffer.getvalue()
