"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("alexnet_kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
