"""AlexNet in its published variants."""

from alexnet_kernels.models.alexnet import AlexNet, model_of
from alexnet_kernels.models.config import config_of
from alexnet_kernels.models.constructor import alexnet
from alexnet_kernels.models.count import LayerCount, count_layers, count_macs, count_parameters
from alexnet_kernels.models.formats import FileWeights, Preprocessing
from alexnet_kernels.models.presets import ONNX_ZOO, PRESETS, Initialization, Pool, Preset, ResponseNorm
from alexnet_kernels.models.untrained import untrained_layers
from alexnet_kernels.models.weights import read_weights

__all__ = [
    "ONNX_ZOO",
    "PRESETS",
    "AlexNet",
    "FileWeights",
    "Initialization",
    "LayerCount",
    "Pool",
    "Preprocessing",
    "Preset",
    "ResponseNorm",
    "alexnet",
    "config_of",
    "count_layers",
    "count_macs",
    "count_parameters",
    "model_of",
    "read_weights",
    "untrained_layers",
]
