"""Names of AlexNet's layers, and the forward pass that ends at the last wanted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import WithinMapResponseNorm

__all__ = ["POOLS", "Layer", "Stages", "find_layers", "layers_of"]

POOLS = ("none", "mean", "max")
"""What is kept of a layer's maps: all of them, or the mean or the maximum over their pixels."""

_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Conv2d, "conv"),
    (nn.Linear, "fc"),
    (nn.ReLU, "relu"),
    (nn.Tanh, "tanh"),
    (nn.LocalResponseNorm, "norm"),
    (WithinMapResponseNorm, "map_norm"),
    (nn.BatchNorm2d, "batch_norm"),
    (nn.MaxPool2d, "pool"),
)


@dataclass(frozen=True)
class Layer:
    """A layer of a network, of which the output can be taken."""

    name: str
    """Such as conv1, relu1, norm1, pool1, fc6, relu6, drop6; the module's name for a layer of another kind."""
    module: str
    """The module's name in the model, such as features.0."""
    place: int
    """Among all layers, in the order in which an image passes them."""


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of an AlexNet, this package's or torchvision's, in the order in which an image passes them.

    A layer is named by its kind and the number of the last convolution or fully-connected layer up to it: conv1 is the
    convolution with its bias, before ReLU, and relu1 the output of that ReLU. A dropout layer's output is drop6, say:
    presets that scale at inference differ there from relu6. InputError for a model of another structure.
    """
    layers: list[Layer] = []
    number = 0
    names: set[str] = set()
    for path, module in _steps(model):
        number += isinstance(module, nn.Conv2d | nn.Linear)
        kind = next((kind for known, kind in _KINDS if isinstance(module, known)), "")
        if "Dropout" in type(module).__name__:
            kind = "drop"
        name = f"{kind}{number}" if kind and f"{kind}{number}" not in names else path
        names.add(name)
        layers.append(Layer(name, path, len(layers)))
    return layers


def _steps(model: Any) -> list[tuple[str, nn.Module]]:
    features, classifier = getattr(model, "features", None), getattr(model, "classifier", None)
    pool = getattr(model, "avgpool", None)
    if not (isinstance(features, nn.Sequential) and isinstance(classifier, nn.Sequential)) or pool is None:
        raise InputError(
            f"{type(model).__name__} is no AlexNet: the children features, avgpool and classifier are expected"
        )
    own = "forward" in model.__dict__ or type(model).forward is not AlexNet.forward
    if own and not type(model).__module__.startswith("torchvision.models."):
        raise InputError(f"{type(model).__name__} has a forward pass of its own: which layers it calls is not known")
    return [
        *((f"features.{name}", child) for name, child in features.named_children()),
        ("avgpool", pool),
        *((f"classifier.{name}", child) for name, child in classifier.named_children()),
    ]


def find_layers(model: nn.Module, wanted: Sequence[str]) -> list[Layer]:
    """The layers by their names, or their modules' names, in the order given; `name` is as given.

    InputError for an unknown name, or a layer that is named twice.
    """
    known = layers_of(model)
    by_name = {layer.module: layer for layer in known} | {layer.name: layer for layer in known}
    if isinstance(wanted, str) or not wanted:
        raise InputError(f"a list of layers is expected, got {wanted!r}")
    found: dict[int, Layer] = {}
    for name in wanted:
        if name not in by_name:
            names = ", ".join(layer.name for layer in known)
            raise InputError(f"there is no layer {shortened(name)}; there are {names}, or names such as features.0")
        layer = by_name[name]
        if layer.place in found:
            raise InputError(f"{found[layer.place].name} and {name} are one layer: name it once")
        found[layer.place] = Layer(name, layer.module, layer.place)
    return list(found.values())


class Stages(nn.Module):
    """The forward pass of an AlexNet up to the last wanted layer. Returns the wanted layers' outputs.

    What lies between two wanted layers runs fused, where the model's containers are FusedSequential. No hook is used.

    Args:
        model: the network, in evaluation mode. Its modules are shared.
        layers: of `find_layers`.
        pool: of `POOLS`. Means and maxima are float32.

    Input: images as of `model`. Output: a list in the order of `layers`, [N, C, H, W] or [N, F]; pooled [N, C].
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], pool: str = "none") -> None:
        super().__init__()
        if pool not in POOLS:
            raise InputError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.model, self.pool = model, pool
        steps = _steps(model)
        features = len(list(model.get_submodule("features").children()))
        order = sorted(range(len(layers)), key=lambda i: layers[i].place)
        parts: list[tuple[str, int, int, int]] = []  # container, its children from, to, and the layer that ends
        at = 0
        for i in order:
            end = layers[i].place + 1
            for name, first, last in (
                ("features", 0, features),
                ("avgpool", features, features + 1),
                ("classifier", features + 1, len(steps)),
            ):
                begin, stop = max(at, first), min(end, last)
                if begin < stop:
                    parts.append((name, begin - first, stop - first, i if stop == end else -1))
            at = end
        # Not registered: the modules are the model's.
        self.parts = [(name, _part(model, name, begin, stop), i) for name, begin, stop, i in parts]
        self.kept = [not _overwritten(steps, layer.place) for layer in layers]

    def forward(self, x: Tensor) -> list[Tensor]:
        check = getattr(self.model, "_check_input", None)
        if check is not None:
            check(x)
        outputs: dict[int, Tensor] = {}
        for name, part, i in self.parts:
            if name == "classifier" and x.dim() == 4:
                x = torch.flatten(x, 1)
            x = part(x)
            if i >= 0:
                found = self._output(x)
                outputs[i] = found.clone() if found is x and not self.kept[i] else found
        return [outputs[i] for i in range(len(outputs))]

    def _output(self, x: Tensor) -> Tensor:
        if self.pool == "none" or x.dim() != 4:
            return x
        return x.float().mean((2, 3)) if self.pool == "mean" else x.float().amax((2, 3))


def _part(model: Any, name: str, begin: int, stop: int) -> nn.Module:
    container = getattr(model, name)
    return container if name == "avgpool" else container[begin:stop]


def _overwritten(steps: Sequence[tuple[str, nn.Module]], place: int) -> bool:
    """Whether a later layer may work in place on the output of the layer."""
    for _, module in steps[place + 1 :]:
        if getattr(module, "inplace", False):
            return True
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MaxPool2d | nn.LocalResponseNorm | nn.BatchNorm2d):
            return False
    return False
