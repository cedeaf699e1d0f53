"""Readers of weight files: each gives a `FileWeights`, without executing anything that the file holds."""

from alexnet_kernels.models.formats.file_weights import FileWeights, Preprocessing

__all__ = ["FileWeights", "Preprocessing"]
