"""From a file's layers, in their order, to the tensors and the preset of an AlexNet."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, MissingPackage, first_line, shortened
from alexnet_kernels.models.formats.file_weights import FileWeights
from alexnet_kernels.models.presets import ONNX_ZOO, PRESETS, Pool, Preset, ResponseNorm

__all__ = [
    "Activation",
    "BatchNorm",
    "Convolution",
    "Dropout",
    "Layer",
    "Linear",
    "MapNorm",
    "Norm",
    "Pooling",
    "Scale",
    "assemble",
    "decimal",
    "decoded",
    "flip_channels",
    "pooled",
    "read_errors",
    "refuse_others",
]

_SHAPES = ((11, 4), (5, 1), (3, 1), (3, 1), (3, 1))
"""Kernel size and stride of conv1-conv5."""
_PADDING = (None, 2, 1, 1, 1)
_EPSILON = 1e-5
"""Of nn.BatchNorm2d."""


@dataclass(frozen=True)
class Convolution:
    name: str
    weight: Tensor
    """[out, in / groups, kernel, kernel], inputs as they are in the file."""
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Left, right, top, bottom."""
    groups: int = 1


@dataclass(frozen=True)
class Linear:
    name: str
    weight: Tensor
    """[out, in]."""
    bias: Tensor | None


@dataclass(frozen=True)
class Activation:
    kind: str
    """relu or tanh."""


@dataclass(frozen=True)
class Norm:
    norm: ResponseNorm


@dataclass(frozen=True)
class MapNorm:
    norm: ResponseNorm


@dataclass(frozen=True)
class BatchNorm:
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    epsilon: float


@dataclass(frozen=True)
class Pooling:
    kernel_size: int
    stride: int
    ceil_mode: bool = False
    after: int = 0
    """Rows and columns of padding at the bottom and at the right."""


@dataclass(frozen=True)
class Dropout:
    p: float
    scale_at: str = "training"


@dataclass(frozen=True)
class Scale:
    """Activations times a factor: dropout that scales at inference, as it is in evaluation."""

    factor: float


Layer = Convolution | Linear | Activation | Norm | MapNorm | BatchNorm | Pooling | Dropout | Scale


def decimal(value: float) -> float:
    """A float32 as the shortest decimal number that means it: 1e-4, not 9.999999747378752e-05."""
    return float(str(numpy.float32(value)))


def decoded(value: object) -> str:
    """A file's name or text, for messages."""
    text = value.decode("latin-1") if isinstance(value, bytes) else shortened(value)
    return "".join(c if c.isprintable() else "?" for c in text[:60])


def pooled(size: int, kernel: int, stride: int, ceil_mode: bool) -> int:
    """Rows of output of a max-pool, as torch counts them."""
    if size < kernel and not ceil_mode:
        return 0
    rows = (size - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return rows - 1 if ceil_mode and (rows - 1) * stride >= size else rows


@contextlib.contextmanager
def read_errors(path: Path, what: str) -> Iterator[None]:
    """Errors of a reader as InputError in one line that begins with the path. `what` is the format's name."""
    try:
        yield
    except MissingPackage:
        raise
    except InputError as error:
        raise InputError(f"{path}: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or first_line(error)}") from error
    except (
        *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError),
        *(TypeError, ValueError, struct.error),
    ) as error:
        raise InputError(
            f"{path} is not a readable {what} (truncated, damaged or of another kind): {first_line(error)[:200]}"
        ) from error


def flip_channels(weight: Tensor) -> Tensor:
    """conv1's weight with its input channels in the opposite order: BGR to RGB, and back."""
    return weight.flip(1).contiguous()


def assemble(
    layers: Sequence[Layer],
    size: int | None,
    *,
    format: str,
    channels: str,
    keep_channels: bool,
    source: str,
    notes: Sequence[str] = (),
    **facts: Any,
) -> FileWeights:
    """The file's weights, its preset made of the layers.

    Args:
        layers: from the images to the logits.
        size: height and width of the file's images; None if it doesn't say.
        channels: order of conv1's inputs in the file. BGR becomes RGB, unless keep_channels.
        **facts: other fields of `FileWeights`.

    Raises:
        InputError: the layers are not an AlexNet's, or not one that `AlexNet` can be.
    """
    notes = list(notes)
    convolutions, blocks, tail = _split(layers)
    tensors = _tensors(convolutions, blocks, tail, notes)
    size, notes = _input_size(convolutions[0], size, notes)
    preset, dropout = _preset(convolutions, blocks, tail, size, source, format, notes)
    _check_widths(preset)
    arguments: dict[str, Any] = {"in_channels": tensors["conv1.weight"].shape[1]}
    if dropout is not None:
        arguments["dropout"] = dropout
    if channels == "BGR":
        if tensors["conv1.weight"].shape[1] != 3:
            raise InputError(f"conv1 has {tensors['conv1.weight'].shape[1]} input channels: BGR has 3")
        if keep_channels:
            notes.append("conv1's input channels are BGR, as in the file: the model takes BGR images")
        else:
            tensors["conv1.weight"] = flip_channels(tensors["conv1.weight"])
            notes.append("conv1's input channels were BGR and are now RGB: the model takes RGB images")
    return FileWeights(
        format=format,
        tensors=tensors,
        preset=preset,
        channels=channels,
        arguments=arguments,
        notes=tuple(notes),
        **facts,
    )


Block = list[Any]


def _split(layers: Sequence[Layer]) -> tuple[list[Convolution], list[Block], list[Any]]:
    """The convolutions, the layers after each of them, and the classifier, from the layers before fc6 on."""
    convolutions = [layer for layer in layers if isinstance(layer, Convolution)]
    linears = [layer for layer in layers if isinstance(layer, Linear)]
    refuse_others(len(convolutions), len(linears))
    order = [layer for layer in layers if isinstance(layer, Convolution | Linear)]
    if order != [*convolutions, *linears]:
        raise InputError("a convolution follows a fully-connected layer; AlexNet has its convolutions first")
    if not isinstance(layers[0], Convolution):
        raise InputError(f"the network begins with {type(layers[0]).__name__}; AlexNet begins with conv1")
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, Convolution)]
    end = next(i for i, layer in enumerate(layers) if isinstance(layer, Linear))
    while isinstance(layers[end - 1], Dropout | Scale):
        end -= 1
    bounds = [*starts[1:], end]
    return convolutions, [list(layers[i + 1 : j]) for i, j in zip(starts, bounds, strict=True)], list(layers[end:])


_OTHERS = {
    (8, 3): "VGG-11",
    (13, 3): "VGG-16",
    (16, 3): "VGG-19",
    (57, 1): "GoogLeNet",
    (59, 5): "GoogLeNet in training",
    (20, 1): "ResNet-18",
    (53, 1): "ResNet-50",
    (26, 0): "SqueezeNet",
    (12, 0): "Network in Network",
}


def refuse_others(convolutions: int, linears: int) -> None:
    """Raise InputError unless a network has as many layers as AlexNet; the message says which network it is."""
    if (convolutions, linears) != (5, 3):
        name = _OTHERS.get((convolutions, linears))
        raise InputError(
            f"this network{f', as {name},' if name else ''} has {_count(convolutions, 'convolution')} and "
            f"{_count(linears, 'fully-connected layer')}; AlexNet has 5 and 3"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _tensors(
    convolutions: Sequence[Convolution], blocks: Sequence[Block], tail: Sequence[Any], notes: list[str]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    without_bias = []

    def add(name: str, layer: Convolution | Linear) -> None:
        outputs = layer.weight.shape[0]
        tensors[f"{name}.weight"] = layer.weight.contiguous()
        if layer.bias is None:
            without_bias.append(name)
        elif tuple(layer.bias.shape) != (outputs,):
            raise InputError(f"{layer.name} has {outputs} outputs and a bias of shape {tuple(layer.bias.shape)}")
        tensors[f"{name}.bias"] = torch.zeros(outputs) if layer.bias is None else layer.bias.contiguous()

    channels = None
    for i, (conv, block) in enumerate(zip(convolutions, blocks, strict=True)):
        kernel, stride = _SHAPES[i]
        if conv.weight.dim() != 4 or tuple(conv.weight.shape[2:]) != (kernel, kernel):
            raise InputError(
                f"{conv.name} has a weight of shape {tuple(conv.weight.shape)}; AlexNet's conv{i + 1} has a kernel of "
                f"{kernel} x {kernel}"
            )
        if conv.stride != (stride, stride):
            raise InputError(f"{conv.name} has stride {conv.stride}; AlexNet's conv{i + 1} has {stride}")
        if i and conv.padding != (_PADDING[i],) * 4:
            raise InputError(f"{conv.name} has padding {conv.padding}; AlexNet's conv{i + 1} has {_PADDING[i]}")
        if channels is not None and conv.weight.shape[1] * conv.groups != channels:
            raise InputError(
                f"{conv.name} takes {conv.weight.shape[1] * conv.groups} channels where the layer before it "
                f"has {channels}"
            )
        channels = conv.weight.shape[0]
        add(f"conv{i + 1}", conv)
        for layer in block:
            if isinstance(layer, BatchNorm):
                if f"bn{i + 1}.weight" in tensors:
                    raise InputError(f"{conv.name} is followed by two batch normalisations")
                var = layer.var
                if decimal(layer.epsilon) != _EPSILON:
                    var = (var.double() + layer.epsilon - _EPSILON).float()
                    notes.append(
                        f"bn{i + 1} has epsilon {decimal(layer.epsilon):g}; running_var was changed to mean the same "
                        f"with {_EPSILON:g}"
                    )
                parts = {"weight": layer.weight, "bias": layer.bias, "running_mean": layer.mean, "running_var": var}
                for part, value in parts.items():
                    if tuple(value.shape) != (channels,):
                        raise InputError(f"bn{i + 1}.{part} has shape {tuple(value.shape)} for {channels} channels")
                    tensors[f"bn{i + 1}.{part}"] = value.contiguous()
    features = None
    for number, layer in enumerate((layer for layer in tail if isinstance(layer, Linear)), 6):
        if layer.weight.dim() != 2:
            raise InputError(f"{layer.name} has a weight of shape {tuple(layer.weight.shape)}; it should have 2 sizes")
        if number == 6 and layer.weight.shape[1] != 36 * (channels or 0):
            raise InputError(
                f"{layer.name} takes {layer.weight.shape[1]} values; AlexNet's fc6 takes the {channels} channels of "
                f"conv5 times 6 x 6"
            )
        if features is not None and layer.weight.shape[1] != features:
            raise InputError(
                f"{layer.name} takes {layer.weight.shape[1]} values where the layer before it has {features}"
            )
        features = layer.weight.shape[0]
        add(f"fc{number}", layer)
    if tensors["fc6.weight"].shape[0] != tensors["fc7.weight"].shape[0]:
        raise InputError(
            f"fc6 has {tensors['fc6.weight'].shape[0]} outputs and fc7 {tensors['fc7.weight'].shape[0]}; "
            "AlexNet's have as many"
        )
    if without_bias:
        notes.append(f"{', '.join(without_bias)}: the file has no bias, which is 0")
    return tensors


def _input_size(conv1: Convolution, size: int | None, notes: list[str]) -> tuple[int, list[str]]:
    left, right, top, bottom = conv1.padding
    if size is None:
        size = 224 if all(0 <= pad - 3 < 4 for pad in (left + right, top + bottom)) else 227 - left - right
        notes = [*notes, f"the file doesn't say the images' size: {size}, for which conv1 gives 55 x 55, is assumed"]
    if size < 1 or size > 1 << 16:
        raise InputError(f"the images have {size} rows")
    return size, notes


def _preset(
    convolutions: Sequence[Convolution],
    blocks: Sequence[Block],
    tail: Sequence[Any],
    size: int,
    source: str,
    format: str,
    notes: list[str],
) -> tuple[Preset, float | None]:
    groups = {i: conv.groups for i, conv in enumerate(convolutions, 1)}
    if groups[1] != 1 or groups[3] != 1 or len({groups[2], groups[4], groups[5]}) != 1:
        raise InputError(
            f"conv1-conv5 have {', '.join(str(count) for count in groups.values())} groups; AlexNet has as many in "
            "conv2, conv4 and conv5, and 1 in conv1 and conv3"
        )
    words, pools, norms, activations = _blocks(convolutions, blocks, size)
    dropout_on, scale_at, p = _classifier(tail, activations, notes)
    if len(set(activations)) != 1:
        raise InputError(f"the layers have the activations {', '.join(sorted(set(activations)))}; AlexNet has one kind")
    left, right, top, bottom = convolutions[0].padding
    preset = Preset(
        name=f"{format.lower().replace(' ', '_')}_file",
        source=source,
        input_size=size,
        conv1_padding=left if left == right == top == bottom else (left, right, top, bottom),
        filters=tuple(conv.weight.shape[0] for conv in convolutions),  # type: ignore[arg-type]
        groups=groups[2],
        layers=words,  # type: ignore[arg-type]
        pools=pools,
        norm=norms.get("norm"),
        map_norm=norms.get("map_norm"),
        dropout_on=dropout_on or "outputs",
        dropout_scale_at=scale_at or "training",
        initialization=None,
        activation=activations[0],
        neurons=next(layer for layer in tail if isinstance(layer, Linear)).weight.shape[0],
    )
    known = _known(preset, dropout_on)
    if known is not None:
        preset = known
    if dropout_on is None:
        notes.append(f"the file has no dropout, which evaluation leaves out: that of preset {preset.name} is assumed")
    return preset, p


def _blocks(
    convolutions: Sequence[Convolution], blocks: Sequence[Block], size: int
) -> tuple[tuple[str, ...], tuple[Pool | None, ...], dict[str, ResponseNorm], list[str]]:
    left, right, top, bottom = convolutions[0].padding
    # Rows and columns differ where conv1's padding does.
    maps = [(size + total - 11) // 4 + 1 for total in (top + bottom, left + right)]
    norms: dict[str, ResponseNorm] = {}
    words, pools, activations = [], [], []
    for i, block in enumerate(blocks, 1):
        kinds = []
        pool = None
        for layer in block:
            kind = _WORDS.get(type(layer))
            if kind is None:
                raise InputError(f"{type(layer).__name__} follows conv{i}; AlexNet has it among the last layers only")
            kinds.append(kind)
            if isinstance(layer, Activation):
                activations.append(layer.kind)
            elif isinstance(layer, Norm | MapNorm):
                if norms.setdefault(kind, layer.norm) != layer.norm:
                    raise InputError(f"the normalisations of kind {kind} differ: {norms[kind]} and {layer.norm}")
            elif isinstance(layer, Pooling):
                if pool is not None:
                    raise InputError(f"two pools follow conv{i}; AlexNet has one at most")
                pool = _pool(layer, maps, i)
                maps = [pooled(rows, pool.kernel_size, pool.stride, pool.ceil_mode) for rows in maps]
        if kinds.count("relu") != 1:
            raise InputError(f"{_count(kinds.count('relu'), 'activation')} follow conv{i}; AlexNet has one")
        words.append(" ".join(kinds))
        pools.append(pool)
    if min(maps) < 1:
        raise InputError(f"images of {size} x {size} are too small for the layers' windows")
    return tuple(words), tuple(pools), norms, activations


_WORDS: Mapping[type, str] = {
    Activation: "relu",
    Norm: "norm",
    MapNorm: "map_norm",
    BatchNorm: "batch_norm",
    Pooling: "pool",
}


def _pool(layer: Pooling, maps: Sequence[int], i: int) -> Pool:
    """The pool without padding that gives the same maps."""
    if not 1 <= layer.stride <= layer.kernel_size:
        raise InputError(f"the pool after conv{i} has kernel size {layer.kernel_size} and stride {layer.stride}")
    if layer.after == 0:
        return Pool(layer.kernel_size, layer.stride, layer.ceil_mode)
    wanted = [pooled(rows + layer.after, layer.kernel_size, layer.stride, layer.ceil_mode) for rows in maps]
    for ceil_mode in (False, True):
        if [pooled(rows, layer.kernel_size, layer.stride, ceil_mode) for rows in maps] == wanted:
            return Pool(layer.kernel_size, layer.stride, ceil_mode)
    raise InputError(f"the pool after conv{i} has padding of {layer.after} that adds rows; AlexNet's have none")


def _classifier(
    tail: Sequence[Any], activations: list[str], notes: list[str]
) -> tuple[str | None, str | None, float | None]:
    """Where dropout is, where it scales and its probability. Appends the activations of fc6 and fc7."""
    sections: list[list[Any]] = [[]]
    for layer in tail:
        if isinstance(layer, Linear):
            sections.append([])
        else:
            sections[-1].append(layer)
    drops: list[int] = []
    values: list[float] = []
    kinds: set[str] = set()
    for number, section in zip((5, 6, 7, 8), sections, strict=True):
        found = [layer for layer in section if isinstance(layer, Dropout | Scale)]
        others = [layer for layer in section if not isinstance(layer, Dropout | Scale)]
        wanted = number in (6, 7)
        if [type(layer) for layer in others] != [Activation] * wanted:
            names = " and ".join(type(layer).__name__ for layer in others) or "nothing"
            raise InputError(
                f"{names} follows fc{number}; AlexNet has {'one activation' if wanted else 'nothing'} there"
            )
        if wanted and section[0] not in others:
            raise InputError(f"dropout stands between fc{number} and its activation; AlexNet has it after that")
        activations += [layer.kind for layer in others]
        if len(found) > 1:
            raise InputError(f"{len(found)} dropouts follow each other after layer {number}")
        for layer in found:
            drops.append(number)
            values.append(1 - layer.factor if isinstance(layer, Scale) else layer.p)
            kinds.add("inference" if isinstance(layer, Scale) else layer.scale_at)
    if not drops:
        return None, None, None
    places: dict[tuple[int, ...], str] = {(5, 6): "inputs", (6, 7): "outputs"}
    usual = tuple(drops) in places and len(set(values)) == 1
    if not all(0 <= value < 1 for value in values) or (kinds != {"training"} and not (usual and len(kinds) == 1)):
        raise InputError(f"{_dropouts(drops, values)}; AlexNet's is the same after fc6 and fc7, or before them")
    on = places.get(tuple(drops), "inputs" if drops[0] == 5 else "outputs")
    if not usual:
        notes.append(
            f"{_dropouts(drops, values)}: the preset's is {values[0]:g} on the {on} of fc6 and fc7, which differs in "
            "training alone"
        )
    return on, kinds.pop(), decimal(values[0])


def _dropouts(drops: Sequence[int], values: Sequence[float]) -> str:
    return f"dropout of {', '.join(f'{p:g}' for p in values)} follows layers {', '.join(map(str, drops))}"


def _known(preset: Preset, dropout_on: str | None) -> Preset | None:
    """A published preset that defines the same network, with the file's filters, neurons and size; None if none does.

    dropout_on: None if the file doesn't say.
    """
    candidates = []
    for known in (*PRESETS.values(), ONNX_ZOO):
        changed: dict[str, Any] = {
            field: getattr(known, field) for field in ("name", "source", "initialization", "inplace_relu")
        }
        if dropout_on is None:
            changed |= {"dropout_on": known.dropout_on, "dropout_scale_at": known.dropout_scale_at}
        same = replace(preset, **changed)
        if same == replace(known, filters=preset.filters, neurons=preset.neurons, input_size=preset.input_size):
            candidates.append(same)
    return next((same for same in candidates if same in (*PRESETS.values(), ONNX_ZOO)), next(iter(candidates), None))


def _check_widths(preset: Preset) -> None:
    multiple = 8 * preset.groups
    wrong = [count for count in (*preset.filters, preset.neurons) if count % multiple]
    if wrong:
        raise InputError(f"a layer has {wrong[0]} outputs; AlexNet builds multiples of {multiple}")
