"""Run any model's torch.nn.Sequential containers fused, in place, and undo it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from alexnet_kernels.nn import FusedSequential

__all__ = ["fuse", "unfuse"]

M = TypeVar("M", bound=nn.Module)


def fuse(module: M) -> M:
    """Turn every torch.nn.Sequential in `module`, itself included, into a FusedSequential. Returns `module`.

    Only the containers' type changes: children, parameters, state_dict keys, hooks and references to the
    containers stay. Subclasses of Sequential are left alone, since their forward may differ. Outputs and
    gradients are those of the module as it was, within rounding; dropout draws other masks from the same
    seed. Fusing twice changes nothing more.
    """
    return _swap(module, nn.Sequential, FusedSequential)


def unfuse(module: M) -> M:
    """Turn every FusedSequential in `module`, itself included, into a torch.nn.Sequential. Returns `module`.

    Undoes `fuse`, and runs an `AlexNet` child by child.
    """
    return _swap(module, FusedSequential, nn.Sequential)


def _swap(module: M, old: type[nn.Sequential], new: type[nn.Sequential]) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module
