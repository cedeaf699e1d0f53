"""AlexNet (Krizhevsky, Sutskever, Hinton 2012) for PyTorch on its own fused kernels."""

import warnings

# _interrupt comes first.
from alexnet_kernels import _interrupt, _library, backends, interop, nn, ops, optim, reference  # noqa: F401
from alexnet_kernels._version import __version__
from alexnet_kernels.backends import set_backend, use_backend
from alexnet_kernels.lpips import LPIPS
from alexnet_kernels.models import AlexNet, alexnet
from alexnet_kernels.nn.fusion import fuse, unfuse

if not _library.LOADED:
    warnings.warn(f"PyTorch's operators compute all ops, slowly: {_library.REASON}", RuntimeWarning, stacklevel=2)

__all__ = [
    "LPIPS",
    "AlexNet",
    "__version__",
    "alexnet",
    "backends",
    "fuse",
    "interop",
    "nn",
    "ops",
    "optim",
    "reference",
    "set_backend",
    "unfuse",
    "use_backend",
]
