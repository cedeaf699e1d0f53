"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) for PyTorch on its own fused kernels."""

from importlib.metadata import PackageNotFoundError, version

from alexnet_kernels import backends, nn, ops, optim, reference
from alexnet_kernels.backends import set_backend, use_backend
from alexnet_kernels.models import AlexNet, alexnet
from alexnet_kernels.nn.fusion import fuse, unfuse

try:
    __version__ = version("alexnet_kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AlexNet",
    "__version__",
    "alexnet",
    "backends",
    "fuse",
    "nn",
    "ops",
    "optim",
    "reference",
    "set_backend",
    "unfuse",
    "use_backend",
]
