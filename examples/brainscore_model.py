"""An AlexNet in the form of a Brain-Score model (brainscore_vision), whose activations come from fused layers.

    python examples/brainscore_model.py
    ALEXNET_CHECKPOINT=run/best.ckpt python examples/brainscore_model.py

To submit it, this file is model.py of a plugin, with an __init__.py that says

    from brainscore_vision import model_registry
    from brainscore_vision.model_helpers.brain_transformation import ModelCommitment
    from .model import get_layers, get_model

    name = "alexnet_kernels"
    model_registry[name] = lambda: ModelCommitment(
        identifier=name, activations_model=get_model(name), layers=get_layers(name)
    )

brainscore_vision is optional: without it the script prints the activations that its wrapper would hand on. With
brainscore_vision 2.4.2 its extractor took the wrapper's activations, equal to those of its own hooks. A benchmark has
not been run.

The candidate layers are those of Brain-Score's own alexnet: pool1, pool2, relu3, relu4, pool5, relu6 and relu7. The
weights are ImageNet's in what is worth submitting; without ALEXNET_CHECKPOINT they are random.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from alexnet_kernels import AlexNet, features
from alexnet_kernels.training.checkpoint import Network, load_network

IDENTIFIER = "alexnet_kernels"
CANDIDATES = ("pool1", "pool2", "relu3", "relu4", "pool5", "relu6", "relu7")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def load() -> tuple[AlexNet | Network, tuple[float, ...], tuple[float, ...], int]:
    """The network, mean and standard deviation of its pixels 0..1, and the side of its images."""
    path = os.environ.get("ALEXNET_CHECKPOINT")
    if not path:
        model = AlexNet(preset="torchvision").eval()
        return model, MEAN, STD, model.input_size
    network = load_network(path)
    expected = network.header.preprocessing()
    # Brain-Score's preprocessing subtracts a mean of each channel: the mean image's, if the run subtracted that.
    mean = expected.mean if expected.mean.dim() == 1 else expected.mean.mean((1, 2))
    std = torch.ones(3) if expected.std is None else expected.std
    return network, tuple((mean / 255).tolist()), tuple((std / 255).tolist()), network.header.settings.image_size


def activations(images: Sequence[Any], layer_names: Sequence[str]) -> OrderedDict[str, Any]:
    """What Brain-Score asks of a model: arrays [N, ...] of the layers, for normalised images [3, H, W]."""
    x = torch.stack([torch.as_tensor(image) for image in images])
    network = load()[0]
    model = network.model if isinstance(network, Network) else network
    logits = features.layers_of(model)[-1].module
    modules = [logits if name == "logits" else name for name in layer_names]
    found = features.extract(network, x, modules)
    return OrderedDict((name, found[module].numpy()) for name, module in zip(layer_names, modules, strict=True))


def get_model_list() -> list[str]:
    return [IDENTIFIER]


def get_layers(name: str) -> list[str]:
    """The candidate layers by their modules' names, which Brain-Score resolves in the model."""
    assert name == IDENTIFIER
    network = load()[0]
    model = network.model if isinstance(network, Network) else network
    return [layer.module for layer in features.find_layers(model, CANDIDATES)]


def get_model(name: str) -> Any:
    assert name == IDENTIFIER
    from brainscore_vision.model_helpers.activations.pytorch import PytorchWrapper, load_preprocess_images

    class Wrapper(PytorchWrapper):
        """Its forward pass ends at the last layer that is asked for, and no hook keeps the others from being fused."""

        def get_activations(self, images: Sequence[Any], layer_names: Sequence[str]) -> OrderedDict[str, Any]:
            return activations(images, layer_names)

    network, mean, std, size = load()
    preprocessing = functools.partial(load_preprocess_images, image_size=size, normalize_mean=mean, normalize_std=std)
    model = network.model if isinstance(network, Network) else network
    wrapper = Wrapper(identifier=IDENTIFIER, model=model, preprocessing=preprocessing)
    wrapper.image_size = size
    return wrapper


def get_bibtex(name: str) -> str:
    return """@inproceedings{krizhevsky2012imagenet,
  title = {{ImageNet} Classification with Deep Convolutional Neural Networks},
  author = {Krizhevsky, Alex and Sutskever, Ilya and Hinton, Geoffrey E.},
  booktitle = {Advances in Neural Information Processing Systems 25},
  year = {2012}
}"""


def main() -> None:
    from images import load_images

    _, mean, std, size = load()
    pixels, _, _, names = load_images(None, "val", size, 1)
    images = list((pixels / 255 - torch.tensor(mean)).div(torch.tensor(std)).permute(0, 3, 1, 2))
    layers = get_layers(IDENTIFIER)
    print(f"{len(names)} images of {size} x {size}, layers {' '.join(layers)}")
    for name, values in activations(images, [*layers, "logits"]).items():
        print(f"{name}: {' x '.join(map(str, values.shape))}, mean {values.mean():.4f}")
    try:
        wrapper = get_model(IDENTIFIER)
    except ImportError:
        print("brainscore_vision is not installed: these are the activations that the wrapper would hand on")
    else:
        print(f"brainscore_vision's wrapper: {type(wrapper).__mro__[1].__name__} of {wrapper.identifier}")


if __name__ == "__main__":
    main()
