"""The ops of AlexNet, one file each. Every op takes `backend=`: see `alexnet_kernels.backends`."""

from typing import Any

from alexnet_kernels.backends import load_with
from alexnet_kernels.ops.augment import augment
from alexnet_kernels.ops.batch_norm_relu import batch_norm_relu
from alexnet_kernels.ops.conv2d_relu import conv2d_relu
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm
from alexnet_kernels.ops.lrn_max_pool2d import lrn_max_pool2d
from alexnet_kernels.ops.max_pool2d import max_pool2d
from alexnet_kernels.ops.sgd_step import sgd_step
from alexnet_kernels.ops.within_map_response_norm import within_map_response_norm

__all__ = [
    "augment",
    "batch_norm_relu",
    "conv2d_relu",
    "dropout",
    "linear_relu_dropout",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
    "sgd_step",
    "within_map_response_norm",
]


def _load_triton() -> Any:
    """Registers the Triton kernels. Triton is an optional package."""
    import alexnet_kernels.triton

    return alexnet_kernels.triton


load_with("triton", _load_triton)
