"""This package inside others: a backend of torch.compile."""

from alexnet_kernels.interop.backend import Explanation, dynamo_backend, explain

__all__ = ["Explanation", "dynamo_backend", "explain"]
