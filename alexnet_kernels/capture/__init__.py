"""The training step and the forward pass of any model as one CUDA graph.

`step` has the two, `graphs` what they share: when a graph is captured, what it depends on, and what it can't hold.
"""

from alexnet_kernels.capture.step import CapturedForward, CapturedStep, set_rate

__all__ = ["CapturedForward", "CapturedStep", "set_rate"]
