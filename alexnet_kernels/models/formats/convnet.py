"""Checkpoints of the 2012 code (Krizhevsky's cuda-convnet for two GPUs), of cuda-convnet and of cuda-convnet2.

A checkpoint is a pickle of Python 2 with the layers' definitions and weights in `model_state`. In the 2012 code a layer
of AlexNet is two, one on each GPU: conv1a and conv1b. Their channels are put side by side here, tower a's first. Field
names and conventions: layer.py and layer.cu of the three programs.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels.models.formats.array_pickles import Array, read_arrays
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
    pooled,
    read_errors,
    refuse_others,
)
from alexnet_kernels.models.presets import ResponseNorm

__all__ = ["checkpoints_in", "read", "recognises"]

_FORMAT = "convnet"
_META = "batches.meta"
_MOST_LAYERS = 1000
_WORDS = (b"model_state", b"OptionsParser", b"cmrnorm", b"sharedBiases", b"weightsInc")


def recognises(head: bytes, path: Path) -> bool:
    """Whether a file that begins with `head` (4096 bytes) is a pickle with cuda-convnet's names, or packs one."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(head, 4096)
        except zlib.error:
            return False
    elif head[:4] == b"PK\x03\x04":
        # A zip of cuda-convnet has the one member "data", which is deflated; torch's have folders.
        if int.from_bytes(head[26:28], "little") != 4 or head[30:34] != b"data":
            return False
        start = 34 + int.from_bytes(head[28:30], "little")
        try:
            deflated = int.from_bytes(head[8:10], "little") == 8
            head = zlib.decompressobj(-15).decompress(head[start:], 4096) if deflated else head[start:]
        except zlib.error:
            return False
    pickled = (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5") or head[:2] in (b"(d", b"}q")
    return pickled and any(word in head for word in _WORDS)


def read(
    path: str | os.PathLike[str], mean: str | os.PathLike[str] | Tensor | Sequence[float] | None = None
) -> FileWeights:
    """The weights of a checkpoint of the 2012 code, cuda-convnet or cuda-convnet2, with the preset of its layers.

    Args:
        path: the file, or the folder of checkpoints ConvNet__date, of which the last one is read.
        mean: of the training images: the path of a batches.meta, or a tensor [3], [3, H, W] or numbers, RGB. None: that
            of the checkpoint, or of a file batches.meta beside it or beside its folder; `notes` says which.

    Returns:
        float32 tensors in torch's layouts, conv1's inputs RGB, as in the file.

    Raises:
        InputError: not a readable checkpoint, or not of an AlexNet. Nothing in it is executed.
    """
    path = Path(path)
    with read_errors(path, "cuda-convnet checkpoint"):
        notes: list[str] = []
        if path.is_dir():
            path = _last(path)
            notes.append(f"the folder's last checkpoint, {path.name}, was read")
        content = read_arrays(path)
        state = content.get("model_state", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or "layers" not in state:
            held = (
                f"a dictionary of {', '.join(map(decoded, list(content)[:5]))}"
                if content and state
                else shortened(content)
            )
            raise InputError(f"it holds {held[:200]}; a checkpoint has model_state with its layers")
        layers = _by_name(state["layers"])
        notes += _progress(state)
        preprocessing = _preprocessing(path, mean, state, notes)
        size, chain = _Towers(layers, notes).chain()
        return assemble(
            chain,
            size,
            format=_FORMAT,
            channels="RGB",
            keep_channels=False,
            source="the layers of a cuda-convnet checkpoint",
            notes=notes,
            preprocessing=preprocessing,
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """The folder's checkpoints, files called epoch.batch."""
    return [path for path in folder.iterdir() if re.fullmatch(r"\d{1,9}\.\d{1,9}", path.name) and path.is_file()]


def _last(folder: Path) -> Path:
    """The folder's last checkpoint, as the program chooses it."""
    found = checkpoints_in(folder)
    if not found:
        raise InputError("the folder holds no checkpoint, which is a file called <epoch>.<batch>")
    return max(found, key=lambda path: tuple(int(part) for part in path.name.split(".")))


def _by_name(layers: Any) -> dict[str, dict[str, Any]]:
    """The layers by name, with their inputs as names. Old checkpoints have a list, and inputs by its indices."""
    if isinstance(layers, dict):
        layers = list(layers.values())
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise InputError("its layers are neither a list nor a dictionary of layers")
    if len(layers) > _MOST_LAYERS:
        raise InputError(f"it has {len(layers):,} layers")
    names = [_text(layer, "name") for layer in layers]
    if len(set(names)) != len(names):
        raise InputError("two of its layers have the same name")
    found = {}
    for name, layer in zip(names, layers, strict=True):
        inputs = layer.get("inputs", [])
        if not isinstance(inputs, list):
            inputs = [inputs]
        resolved = []
        for other in inputs:
            if type(other) is int and 0 <= other < len(names):
                other = names[other]
            if other not in names:
                raise InputError(f"layer {decoded(name)} takes layer {decoded(other)}, which is not there")
            resolved.append(other)
        found[name] = {**layer, "inputs": resolved}
    return found


def _text(layer: Mapping[str, Any], key: str) -> str:
    value = layer.get(key)
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(value, str):
        raise InputError(f"a layer has no {key}")
    return value


def _number(layer: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of the layer; of several that are equal, one for each input, the first."""
    value = layer.get(key, default)
    if isinstance(value, list) and value and all(type(v) in (int, float) and v == value[0] for v in value):
        value = value[0]
    if type(value) not in (int, float):
        raise InputError(f"layer {decoded(layer['name'])} has {key} = {decoded(value)}; a number is expected")
    return value  # type: ignore[return-value]


def _whole(layer: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _number(layer, key, default)
    if value != int(value) or abs(value) > 1 << 20:
        raise InputError(f"layer {decoded(layer['name'])} has {key} = {value}; a small whole number is expected")
    return int(value)


@dataclass(frozen=True)
class _Unit:
    """The outputs of one convolution or fully-connected layer, or the images, after the layers that have no weights."""

    base: str
    """The layer's name; empty for the images."""
    steps: tuple[Layer, ...] = ()


class _Towers:
    """The layers of a checkpoint by what they take, tower by tower."""

    def __init__(self, layers: Mapping[str, dict[str, Any]], notes: list[str]) -> None:
        self.layers = layers
        self.notes = notes
        sources = [layer.get("src_layer") for layer in layers.values() if layer.get("type") == "neuron"]
        self.detached = {source for source in sources if isinstance(source, str)}
        self.outputs: dict[str, tuple[_Unit, ...]] = {}

    def chain(self) -> tuple[int, list[Layer]]:
        """The images' size, and the layers from the images to the logits."""
        weighted = [name for name, layer in self.layers.items() if _text(layer, "type") in ("conv", "fc")]
        bad = [n for n, layer in self.layers.items() if _text(layer, "type") in ("local", "treefc")]
        if bad:
            raise InputError(f"layer {decoded(bad[0])} is of type {self.layers[bad[0]]['type']}, which AlexNet has not")
        stages: dict[int, list[str]] = {}
        depth: dict[str, int] = {"": 0}
        for name in self._ordered(weighted):
            units = [unit for other in self.layers[name]["inputs"] for unit in self.outputs[other]]
            depth[name] = 1 + max(depth[unit.base] for unit in units)
            stages.setdefault(depth[name], []).append(name)
        kinds = [{self.layers[name]["type"] for name in names} for _, names in sorted(stages.items())]
        refuse_others(sum("conv" in kind for kind in kinds), sum(kind == {"fc"} for kind in kinds))
        size = 0
        result: list[Layer] = []
        previous = [""]
        for _, names in sorted(stages.items()):
            names, grouped = self._arranged(names, previous)
            if len({self.layers[name]["type"] for name in names}) != 1:
                raise InputError(f"layers {', '.join(map(decoded, names))} stand side by side and are of several types")
            result += self._steps(names, previous)
            if self.layers[names[0]]["type"] == "conv":
                made, rows = self._convolution(names, previous, grouped)
                size = size or rows
                result.append(made)
            else:
                result.append(self._linear(names, previous, grouped))
            previous = names
        result += self._last_steps(previous)
        return size, result

    def _ordered(self, weighted: Sequence[str]) -> list[str]:
        """The layers with weights, inputs before what takes them. Fills `outputs`."""
        left = dict(self.layers)
        order = []
        while left:
            ready = [n for n, layer in left.items() if all(other in self.outputs for other in layer["inputs"])]
            if not ready:
                raise InputError("its layers take each other in a circle")
            for name in ready:
                self.outputs[name] = self._output(name, left.pop(name))
                if name in weighted:
                    if not self.layers[name]["inputs"]:
                        raise InputError(f"layer {decoded(name)} takes nothing")
                    order.append(name)
        return order

    def _output(self, name: str, layer: Mapping[str, Any]) -> tuple[_Unit, ...]:
        kind = _text(layer, "type")
        inputs = [unit for other in layer["inputs"] for unit in self.outputs[other]]
        if len(inputs) > 64:
            raise InputError(f"layer {decoded(name)} takes {len(inputs)} layers")
        if kind == "data":
            return (_Unit(""),)
        if kind in ("conv", "fc", "local", "treefc"):
            return (_Unit(name, self._activation(name, layer)),)
        if kind in ("concat", "pass"):
            return tuple(inputs)
        if kind == "softmax" or kind.startswith("cost."):
            return ()
        if len(layer["inputs"]) != 1:
            raise InputError(f"layer {decoded(name)} of type {decoded(kind)} takes {len(layer['inputs'])} layers")
        steps = self._step(name, kind, layer, len(inputs))
        steps += self._activation(name, layer) if kind != "neuron" else ()
        return tuple(_Unit(unit.base, (*unit.steps, *steps)) for unit in inputs)

    def _activation(self, name: str, layer: Mapping[str, Any]) -> tuple[Layer, ...]:
        """The activation that a layer applies itself; later programs make it a layer of its own."""
        neuron = layer.get("neuron")
        if not neuron or name in self.detached:
            return ()
        return self._neuron(name, neuron)

    def _neuron(self, name: str, neuron: Any) -> tuple[Layer, ...]:
        kind = neuron.get("type") if isinstance(neuron, dict) else neuron
        values = neuron.get("params", {}) if isinstance(neuron, dict) else {}
        if kind == "ident":
            return ()
        if kind == "relu" or (kind == "tanh" and all(v == 1 for v in values.values())):
            return (Activation(kind),)
        raise InputError(f"layer {decoded(name)} has the neurons {decoded(kind)}; relu and tanh[1,1] are known")

    def _step(self, name: str, kind: str, layer: Mapping[str, Any], units: int) -> tuple[Layer, ...]:
        if kind == "neuron":
            return self._neuron(name, layer.get("neuron"))
        if kind == "pool":
            return (self._pool(name, layer),)
        if kind in ("cmrnorm", "rnorm"):
            if layer.get("blocked"):
                raise InputError(f"layer {decoded(name)} normalises in blocks of channels, which AlexNet does not")
            size = _whole(layer, "size")
            if size < 1 or (kind == "rnorm" and size % 2 == 0):
                raise InputError(f"layer {decoded(name)} normalises over {size}")
            # The program divides the configuration's scale by the window's size before it stores it.
            window = size if kind == "cmrnorm" else size**2
            alpha = decimal(_number(layer, "scale") * window)
            norm = ResponseNorm(
                size, alpha, decimal(_number(layer, "pow")), decimal(_number(layer, "minDiv", 1.0)), units
            )
            return (Norm(norm),) if kind == "cmrnorm" else (MapNorm(ResponseNorm(size, norm.alpha, norm.beta, norm.k)),)
        if kind in ("hs", "dropout2"):
            return (Dropout(decimal(1 - _number(layer, "keep", 0.5)), "inference"),)
        if kind == "dropout":
            self.notes.append(
                f"layer {decoded(name)} drops without scaling in training or evaluation, as the file says"
            )
            return (Dropout(decimal(1 - _number(layer, "keep", 0.5)), "training"),)
        raise InputError(f"layer {decoded(name)} is of type {decoded(kind)}, which AlexNet does not have")

    def _pool(self, name: str, layer: Mapping[str, Any]) -> Pooling:
        if layer.get("pool") != "max":
            raise InputError(f"layer {decoded(name)} is a {decoded(layer.get('pool'))}-pool; AlexNet's are max-pools")
        if _whole(layer, "start", 0) != 0:
            raise InputError(f"layer {decoded(name)} pools from {layer['start']} on; AlexNet's pools begin at 0")
        kernel, stride = _whole(layer, "sizeX"), _whole(layer, "stride")
        rows, outputs = _whole(layer, "imgSize"), _whole(layer, "outputsX")
        if not 1 <= stride <= kernel <= rows:
            raise InputError(f"layer {decoded(name)} pools {rows} rows by {kernel} with stride {stride}")
        for ceil_mode in (False, True):
            if pooled(rows, kernel, stride, ceil_mode) == outputs:
                return Pooling(kernel, stride, ceil_mode)
        raise InputError(f"layer {decoded(name)} pools {rows} rows by {kernel} with stride {stride} to {outputs}")

    def _taken(self, name: str) -> list[list[_Unit]]:
        return [list(self.outputs[other]) for other in self.layers[name]["inputs"]]

    def _arranged(self, names: list[str], previous: list[str]) -> tuple[list[str], bool]:
        """The layers of one depth in the order of their towers, and whether each takes its own tower alone."""
        bases = {name: [unit.base for units in self._taken(name) for unit in units] for name in names}
        names = sorted(names, key=lambda name: (_gpu(self.layers[name]), name))
        whole = [name for name in names if sorted(bases[name]) == sorted(previous)]
        if len(whole) == len(names):
            return names, False
        if sorted(base for name in names for base in bases[name]) == sorted(previous) and not whole:
            return sorted(names, key=lambda name: previous.index(bases[name][0])), True
        raise InputError(
            f"layers {', '.join(map(decoded, names))} take neither all of the layers before them nor a tower each"
        )

    def _steps(self, names: Sequence[str], previous: Sequence[str]) -> list[Layer]:
        """The layers without weights before these, which are the same in every tower."""
        found = [unit.steps for name in names for units in self._taken(name) for unit in units]
        return self._same(found, len(previous))

    def _last_steps(self, previous: Sequence[str]) -> list[Layer]:
        ends = [
            unit.steps
            for name, layer in self.layers.items()
            if _text(layer, "type") == "softmax"
            for other in layer["inputs"]
            for unit in self.outputs[other]
            if unit.base in previous
        ]
        return self._same(ends, len(previous)) if ends else []

    def _same(self, found: Sequence[tuple[Layer, ...]], towers: int) -> list[Layer]:
        if any(steps != found[0] for steps in found):
            raise InputError("its towers have different layers")
        made: list[Layer] = []
        for step in found[0]:
            if isinstance(step, Norm):
                # The number of units that one layer normalises was in towers: 1, or all of them.
                if step.norm.towers not in (1, towers):
                    raise InputError("a layer normalises over some of the towers")
                across = towers if step.norm.towers == 1 else 1
                norm = step.norm
                step = Norm(ResponseNorm(norm.size, norm.alpha, norm.beta, norm.k, across))
            made.append(step)
        return made

    def _parts(self, name: str, previous: Sequence[str]) -> dict[str, numpy.ndarray[Any, Any]]:
        """The rows of the layer's weights by the layer of `previous` that they take."""
        weights = self.layers[name].get("weights")
        taken = self._taken(name)
        if isinstance(weights, Array):
            weights = [weights]
        if (
            not isinstance(weights, list)
            or len(weights) != len(taken)
            or not all(isinstance(w, Array) for w in weights)
        ):
            raise InputError(f"layer {decoded(name)} takes {len(taken)} layers and has not as many arrays of weights")
        parts = {}
        for array, units in zip(weights, taken, strict=True):
            values = array.numbers()
            if values.ndim != 2:
                raise InputError(f"layer {decoded(name)} has weights of shape {values.shape}; matrices are expected")
            shares = [self._features(unit.base) for unit in units]
            rows = values.shape[0]
            if rows % sum(shares):
                raise InputError(
                    f"layer {decoded(name)} has weights of shape {values.shape} for {sum(shares)} channels"
                )
            start = 0
            for unit, share in zip(units, shares, strict=True):
                end = start + rows // sum(shares) * share
                parts[unit.base] = values[start:end]
                start = end
        return parts

    def _features(self, base: str) -> int:
        """Output channels of a layer; 1 for the images, which have no share."""
        if not base:
            return 1
        layer = self.layers[base]
        return max(1, _whole(layer, "filters" if layer["type"] == "conv" else "outputs"))

    def _biases(self, name: str, outputs: int) -> Tensor:
        array = self.layers[name].get("biases")
        if not isinstance(array, Array):
            raise InputError(f"layer {decoded(name)} has no biases")
        values = array.numbers()
        if values.size != outputs:
            raise InputError(
                f"layer {decoded(name)} has {values.size} biases for {outputs} outputs; AlexNet shares one over a map"
            )
        return torch.from_numpy(values.flatten().astype(numpy.float32))

    def _convolution(self, names: Sequence[str], previous: Sequence[str], grouped: bool) -> tuple[Convolution, int]:
        settings = {self._settings(name) for name in names}
        if len(settings) != 1:
            raise InputError(f"layers {', '.join(map(decoded, names))} have different sizes")
        kernel, stride, before, after, own_groups, rows = settings.pop()
        if not grouped and own_groups > 1 and len(previous) > 1:
            raise InputError(f"layer {decoded(names[0])} has groups over several towers")
        weights, biases = [], []
        for name in names:
            filters = _whole(self.layers[name], "filters")
            parts = self._parts(name, previous)
            made = []
            for base in (base for base in previous if base in parts):
                matrix = parts[base]
                channels, rest = divmod(matrix.shape[0], kernel * kernel)
                if rest or matrix.shape[1] != filters or not channels:
                    raise InputError(
                        f"layer {decoded(name)} has weights of shape {matrix.shape}; it has {filters} filters of "
                        f"{kernel} x {kernel}"
                    )
                cube = matrix.reshape(channels, kernel, kernel, filters).transpose(3, 0, 1, 2)
                made.append(torch.from_numpy(cube.astype(numpy.float32)))
            weights.append(torch.cat(made, 1))
            biases.append(self._biases(name, filters))
        if len({weight.shape for weight in weights}) != 1:
            raise InputError(f"layers {', '.join(map(decoded, names))} have different sizes")
        groups = own_groups * (len(names) if grouped else 1)
        label = decoded(names[0])
        padding = (before, after, before, after)
        made_of = Convolution(label, torch.cat(weights), torch.cat(biases), (stride, stride), padding, groups)
        return made_of, rows

    def _settings(self, name: str) -> tuple[int, int, int, int, int, int]:
        """Kernel size, stride, padding before and after, groups and rows of input of a convolution."""
        layer = self.layers[name]
        sparse = layer.get("randSparse")
        if any(sparse) if isinstance(sparse, list) else sparse:
            raise InputError(f"layer {decoded(name)} has random sparse connections, which AlexNet has not")
        kernel, stride = _whole(layer, "filterSize"), _whole(layer, "stride", 1)
        # The program stores padding as the position of the first window: 0 or less.
        padding = abs(_whole(layer, "padding", 0))
        rows, outputs, groups = _whole(layer, "imgSize"), _whole(layer, "modulesX"), _whole(layer, "groups", 1)
        if kernel < 1 or stride < 1 or groups < 1 or outputs < 1:
            raise InputError(f"layer {decoded(name)} has a window of {kernel} with stride {stride}")
        # Windows that reach beyond the image see zeros there.
        after = (outputs - 1) * stride + kernel - rows - padding
        if (rows + 2 * padding - kernel) // stride + 1 == outputs:
            after = padding
        if not 0 <= after <= 64:
            raise InputError(f"layer {decoded(name)} has {outputs} rows of output for {rows} of input")
        return kernel, stride, padding, after, groups, rows

    def _linear(self, names: Sequence[str], previous: Sequence[str], grouped: bool) -> Linear:
        if grouped and len(names) > 1:
            raise InputError(f"layers {', '.join(map(decoded, names))} take a tower each; AlexNet's fc layers take all")
        weights, biases = [], []
        for name in names:
            outputs = _whole(self.layers[name], "outputs")
            parts = self._parts(name, previous)
            if any(part.shape[1] != outputs for part in parts.values()):
                raise InputError(f"layer {decoded(name)} has weights for another number of outputs than {outputs}")
            # One copy: fc6 is two thirds of the file.
            matrix = numpy.empty((outputs, sum(part.shape[0] for part in parts.values())), numpy.float32)
            numpy.concatenate([parts[base].T for base in previous], 1, out=matrix, casting="same_kind")
            weights.append(torch.from_numpy(matrix))
            biases.append(self._biases(name, outputs))
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        return Linear(decoded(names[0]), weight, torch.cat(biases))


def _gpu(layer: Mapping[str, Any]) -> int:
    gpu = layer.get("gpu", -1)
    if isinstance(gpu, list):
        gpu = gpu[0] if gpu else -1
    return gpu if type(gpu) is int else -1


def _progress(state: Mapping[str, Any]) -> list[str]:
    """The epoch and the last test's results, for the user."""
    notes = []
    epoch, batch = state.get("epoch"), state.get("batchnum")
    if type(epoch) is int:
        notes.append(f"saved in epoch {epoch}" + (f", batch {batch}" if type(batch) is int else ""))
    tests = state.get("test_outputs")
    last = tests[-1] if isinstance(tests, list) and tests else None
    if isinstance(last, tuple | list) and len(last) == 2 and isinstance(last[0], dict) and type(last[1]) is int:
        for name, values in list(last[0].items())[:4]:
            numbers = [value for value in values if type(value) in (int, float)] if isinstance(values, list) else []
            # One program divides the sums over the images before it saves them, the other does not.
            divided = not any(value > 1 for value in numbers[1:])
            shown = [value if divided else value / max(1, last[1]) for value in numbers[:4]]
            if shown:
                notes.append(f"last test, {decoded(name)}: {', '.join(f'{value:.6g}' for value in shown)}")
    return notes


def _preprocessing(path: Path, mean: Any, state: Mapping[str, Any], notes: list[str]) -> Preprocessing | None:
    if isinstance(mean, str | os.PathLike):
        values, said = _meta_mean(Path(mean)), Path(mean).name
    elif mean is not None:
        values, said = torch.as_tensor(mean, dtype=torch.float32), ""
    elif isinstance(state.get("data_mean"), Array):
        values, said = _image(state["data_mean"]), "the checkpoint"
    else:
        beside = [folder / _META for folder in (path.parent, path.parent.parent) if (folder / _META).is_file()]
        if not beside:
            notes.append(f"the checkpoint has no mean of the images, and there is no {_META} beside it: give mean=")
            return None
        values, said = _meta_mean(beside[0]), f"{_META} in {beside[0].parent.name or 'the same folder'}"
    if values.dim() not in (1, 3) or values.shape[0] != 3 or not values.isfinite().all():
        raise InputError(f"the mean has the shape {tuple(values.shape)}; finite [3] or [3, H, W] is expected")
    if said:
        notes.append(f"the mean is that of {said}")
    return Preprocessing(values.contiguous(), None, values.shape[1] if values.dim() == 3 else None)


def _meta_mean(path: Path) -> Tensor:
    content = read_arrays(path)
    if not isinstance(content, dict) or not isinstance(content.get("data_mean"), Array):
        raise InputError(f"{path.name} has no data_mean")
    return _image(content["data_mean"])


def _image(array: Array) -> Tensor:
    """A mean image, stored as channels, rows and columns in one: [3, H, W]."""
    values = array.numbers()
    side = round((values.size / 3) ** 0.5)
    if values.size == 3:
        return torch.from_numpy(values.flatten().astype(numpy.float32))
    if 3 * side * side != values.size:
        raise InputError(f"data_mean has {values.size} values; a square image of 3 channels is expected")
    return torch.from_numpy(values.reshape(3, side, side).astype(numpy.float32))
