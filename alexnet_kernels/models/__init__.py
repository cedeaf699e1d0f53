"""AlexNet in its published variants."""

from alexnet_kernels.models.alexnet import AlexNet, alexnet
from alexnet_kernels.models.count import LayerCount, count_layers, count_macs, count_parameters
from alexnet_kernels.models.presets import ONNX_ZOO, PRESETS, Initialization, Pool, Preset, ResponseNorm

__all__ = [
    "ONNX_ZOO",
    "PRESETS",
    "AlexNet",
    "Initialization",
    "LayerCount",
    "Pool",
    "Preset",
    "ResponseNorm",
    "alexnet",
    "count_layers",
    "count_macs",
    "count_parameters",
]
