"""Caffe's .caffemodel files of AlexNet and CaffeNet, and Caffe's mean files.

The layers, their order and their numbers are those of the file's own layer definitions (LayerParameter, and the old
V1LayerParameter and V0LayerParameter). Field numbers and defaults: Caffe's caffe.proto.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, MissingPackage, require
from alexnet_kernels._files import read_bounded
from alexnet_kernels.models.formats.file_weights import FileWeights, Preprocessing
from alexnet_kernels.models.formats.network import (
    Activation,
    Convolution,
    Dropout,
    Layer,
    Linear,
    MapNorm,
    Norm,
    Pooling,
    assemble,
    decimal,
    decoded,
    read_errors,
    refuse_others,
)
from alexnet_kernels.models.formats.wire import Fields, check_fields, parsed, varint
from alexnet_kernels.models.presets import ResponseNorm

__all__ = ["MEAN", "read", "read_mean", "recognises"]

MEAN = (122.679, 116.669, 104.007)
"""The mean of ImageNet's pixels that Caffe's users know, RGB: the means of imagenet_mean.binaryproto's channels."""

_FORMAT = "Caffe"
_LARGEST = (1 << 31) - 1
"""Bytes of a protobuf message."""
_LARGEST_MEAN = 1 << 26
_HDF5 = b"\x89HDF\r\n\x1a\n"


def recognises(head: bytes, path: Path) -> bool:
    """Whether a file that begins with `head` (4096 bytes) is Caffe's: its name or its first bytes say so."""
    if path.suffix.lower() in (".caffemodel", ".prototxt", ".binaryproto"):
        return True
    return _begins_as_network(head)


def read(
    path: str | os.PathLike[str],
    mean: str | os.PathLike[str] | Tensor | Sequence[float] | None = None,
    *,
    keep_channels: bool = False,
) -> FileWeights:
    """The weights of a .caffemodel file, with the preset that its layers define. Needs the package protobuf.

    Args:
        mean: of the images that the network was trained on: the path of a .binaryproto or .npy file, or a tensor or
            three numbers in Caffe's order, BGR. None: that of the file's data layer, or of a file called
            *mean*.binaryproto (or *mean*.npy) beside it, or else `MEAN`. `notes` says which.
        keep_channels: leave conv1's input channels and the mean in Caffe's order, BGR.

    Returns:
        float32 tensors in torch's layouts, conv1's inputs RGB.

    Raises:
        InputError: not a readable .caffemodel, or not of an AlexNet.
        MissingPackage: protobuf is not installed.
    """
    path = Path(path)
    with read_errors(path, ".caffemodel"):
        content = read_bounded(path, _LARGEST)
        _refuse_other_files(path, content[:4096])
        _require_protobuf(path)
        check_fields(content, _LAYERS)
        network = _parsed(content)
        entries = list(_entries(network))
        refuse_others(*(sum(entry.type == kind for entry in entries) for kind in ("Convolution", "InnerProduct")))
        # Packed floats were read as bytes, which is fast. The slow way reads unpacked ones too.
        if not all(_is_whole(blob) for entry in entries for blob in entry.blobs):
            network = _parsed(content, numbers=True)
            entries = list(_entries(network))
        del content
        notes: list[str] = []
        layers = _chain(entries, network)
        size, transform = _data(entries, network)
        preprocessing = _preprocessing(path, mean, transform, keep_channels, notes)
        return assemble(
            layers,
            size,
            format=_FORMAT,
            channels="BGR",
            keep_channels=keep_channels,
            source=f"the layers of a Caffe model named {decoded(network.name) or 'nothing'}",
            notes=notes,
            preprocessing=preprocessing,
        )


def read_mean(path: str | os.PathLike[str]) -> Tensor:
    """A mean image or mean of channels, [3, H, W] or [3], float32, in the file's order: Caffe's is BGR.

    .binaryproto: a BlobProto, which needs the package protobuf. .npy: an array [3, H, W], [1, 3, H, W] or [3].
    """
    path = Path(path)
    with read_errors(path, "mean file"):
        content = read_bounded(path, _LARGEST_MEAN)
        if content.startswith(b"\x93NUMPY"):
            values = _npy(content)
        else:
            _require_protobuf(path)
            blob = _parsed(content, numbers=True, name="BlobProto")
            values = _values(blob, path.name)
        if values.dim() == 4 and values.shape[0] == 1:
            values = values[0]
        if values.dim() == 3 and tuple(values.shape[1:]) == (1, 1):
            values = values[:, 0, 0]
        if values.dim() not in (1, 3) or values.shape[0] != 3:
            raise InputError(f"its shape is {tuple(values.shape)}; a mean has [3], [3, H, W] or [1, 3, H, W]")
        if not values.isfinite().all():
            raise InputError("it has values that are not finite")
        return values.contiguous()


def _refuse_other_files(path: Path, head: bytes) -> None:
    if path.suffix.lower() == ".prototxt" or re.match(
        rb'\s*(#[^\n]*\n\s*)*(name\s*:\s*"|layers?\s*\{|input\s*:)', head
    ):
        raise InputError("it defines a network in text and holds no weights: give its .caffemodel file")
    if path.suffix.lower() == ".binaryproto":
        raise InputError("it is a mean file and holds no weights: give the .caffemodel file, and this one as mean=")
    if head.startswith(_HDF5):
        raise InputError("it is an HDF5 snapshot: save the network with snapshot_format: BINARYPROTO")


# Protocol buffers: name:number:type, with * for repeated and =default.
_MESSAGES = {
    "BlobShape": "dim:1:int64*",
    "BlobProto": (
        "num:1:int64=0 channels:2:int64=0 height:3:int64=0 width:4:int64=0 "
        "data:5:VALUES* shape:7:BlobShape double_data:8:DOUBLES*"
    ),
    "NetStateRule": "phase:1:int32",
    "Transformation": (
        "scale:1:float=1 mirror:2:bool=false crop_size:3:uint32=0 mean_file:4:string mean_value:5:float*"
    ),
    "Convolution": (
        "num_output:1:uint32 bias_term:2:bool=true pad:3:uint32* kernel_size:4:uint32* group:5:uint32=1 "
        "stride:6:uint32* pad_h:9:uint32=0 pad_w:10:uint32=0 kernel_h:11:uint32 kernel_w:12:uint32 "
        "stride_h:13:uint32 stride_w:14:uint32 axis:16:int32=1 dilation:18:uint32*"
    ),
    "InnerProduct": "num_output:1:uint32 bias_term:2:bool=true axis:5:int32=1 transpose:6:bool=false",
    "LRN": "local_size:1:uint32=5 alpha:2:float=1 beta:3:float=0.75 norm_region:4:int32=0 k:5:float=1",
    "Pooling": (
        "pool:1:int32=0 kernel_size:2:uint32 stride:3:uint32=1 pad:4:uint32=0 kernel_h:5:uint32 kernel_w:6:uint32 "
        "stride_h:7:uint32 stride_w:8:uint32 pad_h:9:uint32=0 pad_w:10:uint32=0 global_pooling:12:bool=false "
        "round_mode:13:int32=0"
    ),
    "ReLU": "negative_slope:1:float=0",
    "Dropout": "dropout_ratio:1:float=0.5",
    "Data": "scale:2:float=1 mean_file:3:string crop_size:5:uint32=0 mirror:6:bool=false",
    "Input": "shape:1:BlobShape*",
    "Layer": (
        "name:1:string type:2:string bottom:3:string* top:4:string* blobs:7:BlobProto* include:8:NetStateRule* "
        "transform_param:100:Transformation convolution_param:106:Convolution data_param:107:Data "
        "dropout_param:108:Dropout inner_product_param:117:InnerProduct lrn_param:118:LRN pooling_param:121:Pooling "
        "relu_param:123:ReLU input_param:143:Input"
    ),
    "V0Layer": (
        "name:1:string type:2:string num_output:3:uint32 biasterm:4:bool=true pad:7:uint32=0 kernelsize:8:uint32 "
        "group:9:uint32=1 stride:10:uint32=1 pool:11:int32=0 dropout_ratio:12:float=0.5 local_size:13:uint32=5 "
        "alpha:14:float=1 beta:15:float=0.75 scale:17:float=1 meanfile:18:string cropsize:20:uint32=0 "
        "mirror:21:bool=false k:22:float=1 blobs:50:BlobProto*"
    ),
    "V1Layer": (
        "layer:1:V0Layer bottom:2:string* top:3:string* name:4:string type:5:int32 blobs:6:BlobProto* "
        "convolution_param:10:Convolution data_param:11:Data dropout_param:12:Dropout "
        "inner_product_param:17:InnerProduct lrn_param:18:LRN pooling_param:19:Pooling relu_param:30:ReLU "
        "include:32:NetStateRule* transform_param:36:Transformation"
    ),
    "NetParameter": (
        "name:1:string layers:2:V1Layer* input:3:string* input_dim:4:int64* input_shape:8:BlobShape* layer:100:Layer*"
    ),
}
_SCALARS = {
    **{"double": 1, "float": 2, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13},
}
_MESSAGE = 11
# A field's text may be of any encoding, which protobuf's type string refuses.
_ALIASES = {"string": "bytes"}


def _require_protobuf(path: Path) -> None:
    require(str(path), "google.protobuf", extra="weights")
    try:
        from google.protobuf.message_factory import GetMessageClass  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            f"{path} needs protobuf 4.22 or later; install it with: pip install 'alexnet_kernels[weights]'"
        ) from error


@lru_cache(maxsize=2)
def _messages(numbers: bool = False) -> dict[str, Any]:
    """The classes of the messages. numbers: blobs' data as numbers, not as the bytes of packed ones."""
    from google.protobuf import descriptor_pb2, descriptor_pool
    from google.protobuf.message_factory import GetMessageClass

    types = {**_ALIASES, "VALUES": "float" if numbers else "bytes", "DOUBLES": "double" if numbers else "bytes"}
    package = "alexnet_kernels_caffe"
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package=package, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields.split():
            label, number, kind = text.split(":")
            kind, _, default = kind.partition("=")
            added = message.field.add(name=label, number=int(number), label=3 if kind.endswith("*") else 1)
            kind = types.get(kind.rstrip("*"), kind.rstrip("*"))
            if kind in _SCALARS:
                added.type = _SCALARS[kind]
            else:
                added.type, added.type_name = _MESSAGE, f".{package}.{kind}"
            if default:
                added.default_value = default
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in _MESSAGES}


def _parsed(content: bytes, numbers: bool = False, name: str = "NetParameter") -> Any:
    return parsed(_messages(numbers)[name](), content)


_LAYERS: Fields = {(2, 2): {(1, 2): {}}, (100, 2): {}}
"""The fields of a NetParameter that hold layers, and of those the one that holds a layer of the oldest version."""


@dataclass
class _Entry:
    """A layer's definition, whatever its version."""

    name: str
    type: str
    bottom: list[str]
    top: list[str]
    blobs: Any
    message: Any
    phases: list[int] = field(default_factory=list)

    def parameter(self, name: str) -> Any:
        """A parameter message. InputError if the file lacks it."""
        if isinstance(self.message, dict):
            return self.message[name]
        if not self.message.HasField(name):
            raise InputError(
                f"layer {self.name} of type {self.type} has no {name}: the file holds weights without the layers' "
                "numbers, which are not guessed"
            )
        return getattr(self.message, name)

    def optional(self, name: str) -> Any:
        """A parameter message, or None."""
        if isinstance(self.message, dict):
            return self.message.get(name)
        return getattr(self.message, name) if self.message.HasField(name) else None


_V1_TYPES = {
    **{1: "Accuracy", 4: "Convolution", 5: "Data", 6: "Dropout", 8: "Flatten", 9: "HDF5Data", 12: "ImageData"},
    **{14: "InnerProduct", 15: "LRN", 17: "Pooling", 18: "ReLU", 20: "Softmax", 21: "SoftmaxWithLoss", 22: "Split"},
    **{23: "TanH", 24: "WindowData", 29: "MemoryData", 30: "ArgMax", 32: "DummyData", 36: "Silence"},
    **{3: "Concat", 25: "Eltwise", 33: "Slice", 39: "Deconvolution"},
}
_V0_TYPES = {
    **{"accuracy": "Accuracy", "conv": "Convolution", "data": "Data", "dropout": "Dropout", "flatten": "Flatten"},
    **{"images": "ImageData", "innerproduct": "InnerProduct", "lrn": "LRN", "pool": "Pooling", "relu": "ReLU"},
    **{"softmax": "Softmax", "softmax_loss": "SoftmaxWithLoss", "split": "Split", "tanh": "TanH"},
    **{"window_data": "WindowData", "padding": "Padding", "concat": "Concat"},
}
_SOURCES = ("Data", "ImageData", "WindowData", "MemoryData", "HDF5Data", "DummyData", "Input", "Python")
_SINKS = ("Softmax", "SoftmaxWithLoss", "Accuracy", "ArgMax", "Silence", "SigmoidCrossEntropyLoss", "EuclideanLoss")


def _entries(network: Any) -> Iterator[_Entry]:
    if not network.layer and not network.layers:
        raise InputError("it holds no layers: it is not a .caffemodel, or it is cut off")
    for layer in network.layer:
        yield _Entry(
            decoded(layer.name),
            decoded(layer.type),
            [decoded(name) for name in layer.bottom],
            [decoded(name) for name in layer.top],
            layer.blobs,
            layer,
            [rule.phase for rule in layer.include if rule.HasField("phase")],
        )
    for layer in network.layers:
        old = layer.layer
        bottom, top = [decoded(name) for name in layer.bottom], [decoded(name) for name in layer.top]
        phases = [rule.phase for rule in layer.include if rule.HasField("phase")]
        if layer.HasField("layer"):
            kind = _V0_TYPES.get(decoded(old.type), decoded(old.type))
            yield _Entry(decoded(old.name), kind, bottom, top, old.blobs or layer.blobs, _of_v0(old), phases)
        else:
            kind = _V1_TYPES.get(layer.type, f"number {layer.type}")
            yield _Entry(decoded(layer.name), kind, bottom, top, layer.blobs, layer, phases)


def _of_v0(layer: Any) -> dict[str, Any]:
    """The parameters of a V0LayerParameter, as messages of the later kinds."""
    messages = _messages()
    square = {"kernel_size": layer.kernelsize, "stride": layer.stride, "pad": layer.pad}
    lists = {key: [value] for key, value in square.items()}
    transform = {"scale": layer.scale, "mirror": layer.mirror, "crop_size": layer.cropsize}
    return {
        "convolution_param": messages["Convolution"](
            num_output=layer.num_output, bias_term=layer.biasterm, group=layer.group, **lists
        ),
        "inner_product_param": messages["InnerProduct"](num_output=layer.num_output, bias_term=layer.biasterm),
        "lrn_param": messages["LRN"](local_size=layer.local_size, alpha=layer.alpha, beta=layer.beta, k=layer.k),
        "pooling_param": messages["Pooling"](pool=layer.pool, **square),
        "relu_param": messages["ReLU"](),
        "dropout_param": messages["Dropout"](dropout_ratio=layer.dropout_ratio),
        "transform_param": messages["Transformation"](**transform, mean_file=layer.meanfile),
        "padding": layer.pad,
    }


def _chain(entries: Sequence[_Entry], network: Any) -> list[Layer]:
    """The layers from the images to the logits, by the blobs that connect them."""
    images = {entry.top[0] for entry in entries if entry.type in _SOURCES and entry.top}
    images |= {decoded(name) for name in network.input[:1]}
    layers: list[Layer] = []
    current = images or {entry.bottom[0] for entry in entries[:1] if entry.bottom}
    padding = 0
    for entry in entries:
        takes = bool(entry.bottom) and entry.bottom[0] in current
        if entry.type in (*_SOURCES, *_SINKS):
            continue
        if entry.type == "Split" and takes:
            current |= set(entry.top)
            continue
        if not takes and entry.blobs:
            raise InputError(
                f"layer {entry.name} of type {entry.type} does not follow the layer before it: the network branches, "
                "which AlexNet does not"
            )
        if not takes or not entry.top:
            continue
        if entry.type == "Flatten":
            current = {entry.top[0]}
            continue
        if entry.type == "Padding":
            padding, current = entry.message["padding"], {entry.top[0]}
            continue
        layers.append(_layer(entry, padding))
        padding, current = 0, {entry.top[0]}
    return layers


def _layer(entry: _Entry, padding: int) -> Layer:
    if entry.type == "Convolution":
        return _convolution(entry, padding)
    if entry.type == "InnerProduct":
        return _linear(entry)
    if entry.type == "ReLU":
        parameter = entry.optional("relu_param")
        if parameter is not None and parameter.negative_slope:
            raise InputError(f"layer {entry.name} has a negative slope; AlexNet's ReLU has none")
        return Activation("relu")
    if entry.type == "TanH":
        return Activation("tanh")
    if entry.type == "Dropout":
        parameter = entry.optional("dropout_param")
        return Dropout(0.5 if parameter is None else decimal(parameter.dropout_ratio))
    if entry.type == "LRN":
        return _norm(entry)
    if entry.type == "Pooling":
        return _pooling(entry)
    raise InputError(f"layer {entry.name} is of type {entry.type}, which AlexNet does not have")


def _norm(entry: _Entry) -> Layer:
    parameter = entry.parameter("lrn_param")
    size = parameter.local_size
    if size % 2 != 1:
        raise InputError(f"layer {entry.name} has local_size {size}; Caffe's is odd")
    norm = ResponseNorm(size, decimal(parameter.alpha), decimal(parameter.beta), decimal(parameter.k))
    if parameter.norm_region == 0:
        return Norm(norm)
    # Caffe ignores k here.
    return MapNorm(ResponseNorm(size, norm.alpha, norm.beta, 1.0))


def _pooling(entry: _Entry) -> Pooling:
    parameter = entry.parameter("pooling_param")
    if parameter.pool != 0:
        kind = {1: "average", 2: "stochastic"}.get(parameter.pool, "unknown")
        raise InputError(f"layer {entry.name} is an {kind} pool; AlexNet's are max-pools")
    kernel = (parameter.kernel_h or parameter.kernel_size, parameter.kernel_w or parameter.kernel_size)
    stride = (parameter.stride_h or parameter.stride, parameter.stride_w or parameter.stride)
    if kernel[0] != kernel[1] or stride[0] != stride[1] or parameter.global_pooling:
        raise InputError(f"layer {entry.name} pools with windows that are not square")
    if parameter.pad or parameter.pad_h or parameter.pad_w:
        raise InputError(f"layer {entry.name} pools with padding; AlexNet's pools have none")
    return Pooling(kernel[0], stride[0], ceil_mode=parameter.round_mode == 0)


def _pair(entry: _Entry, name: str, values: Sequence[int], height: int, width: int, default: int) -> tuple[int, int]:
    if height or width:
        return height, width
    if len(values) > 2:
        raise InputError(f"layer {entry.name} has {len(values)} values of {name}; images have 2")
    return (values[0], values[-1]) if values else (default, default)


def _convolution(entry: _Entry, padding: int) -> Convolution:
    parameter = entry.parameter("convolution_param")
    kernel = _pair(entry, "kernel_size", parameter.kernel_size, parameter.kernel_h, parameter.kernel_w, 0)
    stride = _pair(entry, "stride", parameter.stride, parameter.stride_h, parameter.stride_w, 1)
    pad = _pair(entry, "pad", parameter.pad, parameter.pad_h, parameter.pad_w, 0)
    if any(value != 1 for value in parameter.dilation) or parameter.axis != 1:
        raise InputError(f"layer {entry.name} is dilated or has another axis; AlexNet's convolutions have neither")
    weight, bias = _weights(entry, parameter.bias_term)
    outputs = parameter.num_output
    if weight.dim() != 4 or weight.shape[0] != outputs or tuple(weight.shape[2:]) != kernel:
        raise InputError(
            f"layer {entry.name} has weights of shape {tuple(weight.shape)}; its definition has {outputs} outputs and "
            f"a kernel of {kernel[0]} x {kernel[1]}"
        )
    if parameter.group < 1 or outputs % parameter.group:
        raise InputError(f"layer {entry.name} has {outputs} outputs in {parameter.group} groups")
    rows, columns = (side + padding for side in pad)
    return Convolution(entry.name, weight, bias, stride, (columns, columns, rows, rows), parameter.group)


def _linear(entry: _Entry) -> Linear:
    parameter = entry.parameter("inner_product_param")
    weight, bias = _weights(entry, parameter.bias_term)
    # Old blobs have 4 sizes: [1, 1, out, in].
    if weight.dim() > 2 and math.prod(weight.shape[:-2]) == 1:
        weight = weight.reshape(weight.shape[-2:])
    if weight.dim() == 2 and parameter.transpose:
        weight = weight.t().contiguous()
    if weight.dim() != 2 or weight.shape[0] != parameter.num_output or parameter.axis != 1:
        raise InputError(
            f"layer {entry.name} has weights of shape {tuple(weight.shape)}; its definition has {parameter.num_output} "
            "outputs"
        )
    return Linear(entry.name, weight, bias)


def _weights(entry: _Entry, biased: bool) -> tuple[Tensor, Tensor | None]:
    wanted = 2 if biased else 1
    if len(entry.blobs) != wanted:
        raise InputError(f"layer {entry.name} has {len(entry.blobs)} blobs; its definition asks for {wanted}")
    weight = _values(entry.blobs[0], f"layer {entry.name}'s weight")
    return weight, _values(entry.blobs[1], f"layer {entry.name}'s bias").flatten() if biased else None


def _shape(blob: Any) -> list[int]:
    if blob.HasField("shape"):
        return list(blob.shape.dim)
    return [blob.num, blob.channels, blob.height, blob.width]


def _held(blob: Any) -> tuple[Any, Any]:
    """The blob's numbers, or the bytes of packed ones, and their dtype."""
    if blob.double_data:
        return blob.double_data, numpy.dtype("<f8")
    return blob.data, numpy.dtype("<f4")


def _number(blob: Any) -> int:
    values, dtype = _held(blob)
    if values and isinstance(values[0], bytes):
        return sum(len(part) for part in values) // dtype.itemsize
    return len(values)


def _is_whole(blob: Any) -> bool:
    return _number(blob) == math.prod(_shape(blob))


def _values(blob: Any, what: str) -> Tensor:
    shape, number = _shape(blob), _number(blob)
    if any(size < 1 for size in shape) or len(shape) > 8 or math.prod(shape) != number:
        raise InputError(f"{what} has the shape {tuple(shape)[:8]} and {number:,} values")
    values, dtype = _held(blob)
    if isinstance(values[0], bytes):
        array = numpy.frombuffer(b"".join(values), dtype)
    else:
        array = numpy.fromiter(values, dtype, number)
    return torch.from_numpy(array.astype(numpy.float32).reshape(shape))


def _data(entries: Sequence[_Entry], network: Any) -> tuple[int | None, Any]:
    """Height and width of the images, if the file says them, and the transformation of its data layer, or None."""
    # phase 1: TEST. What is trained with random crops is tested with the centre.
    sources = sorted((entry for entry in entries if entry.type in _SOURCES), key=lambda entry: 1 not in entry.phases)
    shapes = [list(shape.dim) for shape in network.input_shape] + [list(network.input_dim[:4])]
    transform = None
    sizes: list[tuple[int, ...]] = []
    for entry in sources:
        found = entry.optional("transform_param") if entry.type not in ("Input", "Python") else None
        if found is None and entry.type == "Data" and not isinstance(entry.message, dict):
            found = entry.optional("data_param")
        if found is not None and transform is None:
            transform = found
        if entry.type == "Input" and not isinstance(entry.message, dict) and entry.message.HasField("input_param"):
            shapes += [list(shape.dim) for shape in entry.message.input_param.shape]
    sizes += [tuple(shape[2:]) for shape in shapes if len(shape) == 4]
    if transform is not None and transform.crop_size:
        sizes.append((transform.crop_size,) * 2)
    if not sizes:
        return None, transform
    if sizes[0][0] != sizes[0][1]:
        raise InputError(f"its images are {sizes[0][0]} x {sizes[0][1]}; a preset's are square")
    return sizes[0][0], transform


def _preprocessing(path: Path, mean: Any, transform: Any, keep_channels: bool, notes: list[str]) -> Preprocessing:
    """The preprocessing, RGB unless channels are kept, with a note on where the mean is from."""
    values, resize = _mean(path, mean, transform, notes)
    std = None
    if transform is not None and decimal(transform.scale) != 1:
        scale = decimal(transform.scale)
        if not scale > 0:
            raise InputError(f"its data layer scales by {scale:g}")
        std = torch.full((3,), 1 / scale)
        notes.append(
            f"its data layer multiplies pixels by {scale:g} after the mean is subtracted: std is {1 / scale:g}"
        )
    if transform is not None and transform.mirror:
        notes.append("it was trained with mirrored images")
    return Preprocessing(values if keep_channels else values.flip(0).contiguous(), std, resize)


def _mean(path: Path, mean: Any, transform: Any, notes: list[str]) -> tuple[Tensor, int | None]:
    """The mean, BGR, and the side of the images that it is of."""
    if isinstance(mean, str | os.PathLike):
        values = read_mean(mean)
        notes.append(f"the mean is that of {Path(mean).name}")
        return values, _side(values)
    if mean is not None:
        values = torch.as_tensor(mean, dtype=torch.float32)
        if values.dim() not in (1, 3) or values.shape[0] != 3:
            raise InputError(f"mean has the shape {tuple(values.shape)}; [3] or [3, H, W] is expected")
        return values, _side(values)
    stated = list(getattr(transform, "mean_value", ()))
    if stated:
        if len(stated) not in (1, 3):
            raise InputError(f"its data layer has {len(stated)} mean values; 1 or 3 are expected")
        notes.append(f"the mean is that of its data layer: {', '.join(f'{decimal(v):g}' for v in stated)} (BGR)")
        return torch.tensor([decimal(value) for value in stated] * (3 // len(stated))), None
    named = Path(decoded(transform.mean_file)).name if transform is not None and transform.mean_file else ""
    beside = _beside(path, named)
    if len(beside) == 1:
        (beside_it,) = beside
        values = read_mean(beside_it)
        notes.append(f"the mean is that of {beside_it.name}, which is in the same folder")
        return values, _side(values)
    asked = f" (its data layer names {decoded(named)}, which is not in the same folder)" if named else ""
    if beside:
        asked = f" ({', '.join(found.name for found in beside[:3])} are in the same folder, and none was chosen)"
    notes.append(
        f"the mean was assumed: ImageNet's of Caffe, {', '.join(f'{value:g}' for value in MEAN[::-1])} (BGR){asked}; "
        "give the mean file as mean="
    )
    return torch.tensor(MEAN[::-1]), 256


def _side(values: Tensor) -> int | None:
    return values.shape[1] if values.dim() == 3 else None


def _beside(path: Path, named: str) -> list[Path]:
    """The mean files in the model's folder: the one that the file names, or all."""
    if named and (path.parent / named).is_file():
        return [path.parent / named]
    for pattern in ("*mean*.binaryproto", "*mean*.npy"):
        if found := sorted(other for other in path.parent.glob(pattern) if other.is_file()):
            return found
    return []


def _npy(content: bytes) -> Tensor:
    file = io.BytesIO(content)
    version = numpy.lib.format.read_magic(file)
    read_header = {
        (1, 0): numpy.lib.format.read_array_header_1_0,
        (2, 0): numpy.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise InputError(f"its .npy version is {version}")
    shape, fortran, dtype = read_header(file)
    data = content[file.tell() :]
    if dtype.kind not in "fiu" or len(shape) > 4 or math.prod(shape) * dtype.itemsize != len(data):
        raise InputError(f"it holds {len(data):,} bytes for the shape {shape[:4]} of {dtype.str}")
    array = numpy.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(numpy.ascontiguousarray(array, dtype=numpy.float32))


def _begins_as_network(head: bytes) -> bool:
    """Whether the bytes are the beginning of a NetParameter: known fields, the first layer among them."""
    at = 0
    for _ in range(64):
        tag, at = varint(head, at)
        number, wire = tag >> 3, tag & 7
        if (number, wire) in ((4, 0), (5, 0), (7, 0)):
            _, at = varint(head, at)
            continue
        if wire != 2 or number not in (1, 2, 3, 4, 6, 8, 100):
            return False
        length, at = varint(head, at)
        if at < 0:
            return False
        if number in (2, 100):
            return _begins_as_layer(head[at : at + length], number == 100)
        if number in (1, 3) and not head[at : at + length].isascii():
            return False
        if number in (1, 3) and any(byte < 32 for byte in head[at : at + length]):
            return False
        at += length
    return False


def _begins_as_layer(head: bytes, new: bool) -> bool:
    known = {1: "name", 2: "type"} if new else {1: "layer", 2: "bottom", 3: "top", 4: "name"}
    tag, at = varint(head, 0)
    length, at = varint(head, at)
    if at < 0 or tag & 7 != 2 or tag >> 3 not in known:
        return False
    text = head[at : at + length]
    if not new and tag >> 3 == 1:
        # V0: the nested layer's name comes first.
        inner, start = varint(text, 0)
        return inner == 0x0A and start == 1
    if not text or not text.isascii() or any(byte < 32 for byte in text):
        return False
    if not new:
        return True
    tag, at = varint(head, at + length)
    length, at = varint(head, at)
    return at >= 0 and tag == 0x12 and head[at : at + length].isalnum()
