"""Modules over the ops, and a `Sequential` that runs its children fused.

The modules subclass torch.nn's where torch.nn has them and keep its attribute names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from alexnet_kernels.backends import is_transformed
from alexnet_kernels.ops.batch_norm_relu import batch_norm_relu
from alexnet_kernels.ops.conv2d_relu import conv2d_relu
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm
from alexnet_kernels.ops.lrn_max_pool2d import lrn_max_pool2d
from alexnet_kernels.ops.max_pool2d import max_pool2d
from alexnet_kernels.ops.within_map_response_norm import within_map_response_norm

__all__ = ["AdaptiveAvgPool2d", "Dropout", "FusedSequential", "LocalResponseNorm", "WithinMapResponseNorm"]

# torch.fx records a call of these instead of tracing into it.
for _name in ("_average", "dropout", "local_response_norm", "within_map_response_norm"):
    torch.fx.wrap(_name)


class LocalResponseNorm(nn.LocalResponseNorm):
    """Normalisation across channels, `b[i] = a[i] / (k + alpha / size * sum_j a[j]^2)^beta`.

    j runs over the `size` channels nearest i, cut at the edges of i's own tower: the channels form `groups`
    towers of equal size, and with groups=1 there is one. alpha is divided by size, torch's convention:
    Krizhevsky et al. 2012, section 3.3, prints the sum undivided, so its alpha = 1e-4 is alpha = 5e-4 here.

    Input and output [N, C, *], float32, bfloat16, float16 or float64, in the input's memory format.
    """

    groups: int

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1) -> None:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, self.groups)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", groups={self.groups}" if self.groups != 1 else "")


class WithinMapResponseNorm(nn.Module):
    """Normalisation inside each map, `b = a / (k + alpha / size^2 * sum a'^2)^beta`.

    The window of size x size is centred on the element and cut at the map's edges; the divisor stays size^2
    there. It is the second normalisation of layer 2 in the 2012 code (layers-145.cfg), which Krizhevsky et
    al. 2012 leave out.

    Input and output [N, C, H, W], float32, bfloat16, float16 or float64, in the input's memory format.
    """

    size: int
    alpha: float
    beta: float
    k: float

    def __init__(self, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        return within_map_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch's, which hands its input on where that has the output's size already."""

    def forward(self, input: Tensor) -> Tensor:
        return _average(input, self.output_size)


def _average(input: Tensor, size: Any) -> Tensor:
    return input if tuple(input.shape[-2:]) == size else F.adaptive_avg_pool2d(input, size)


class Dropout(nn.Dropout):
    """Sets each element to zero with probability p in training; any shape.

    scale_at="training" is inverted dropout: kept elements times 1 / (1 - p) in training, the input itself in
    evaluation. scale_at="inference" is the paper's: kept elements as they are in training, the input times
    1 - p in evaluation (Krizhevsky et al. 2012, section 4.2). The mask is drawn from torch's generator, by
    the op's own stream: the same seed gives another mask than torch.nn.Dropout's.
    """

    scale_at: str

    def __init__(self, p: float = 0.5, *, scale_at: str = "training") -> None:
        if scale_at not in ("training", "inference"):
            raise ValueError(f'scale_at must be "training" or "inference", got {scale_at!r}')
        super().__init__(p)
        self.scale_at = scale_at

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.scale_at == "training":
            return input
        return dropout(input, self.p, self.training, scale_at=self.scale_at)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_at={self.scale_at!r}"


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential that computes the same, running these runs of children by one op each:

    | children | op |
    |---|---|
    | Conv2d[, ReLU] | conv2d_relu; where a max-pool follows, the pool takes the ReLU |
    | ReLU, [LocalResponseNorm,] MaxPool2d | max_pool2d or lrn_max_pool2d with relu=True |
    | LocalResponseNorm, MaxPool2d | lrn_max_pool2d |
    | MaxPool2d, ReLU | max_pool2d with relu=True: the same function |
    | BatchNorm2d, ReLU | batch_norm_relu |
    | Linear, ReLU[, Dropout] | linear_relu_dropout |
    | Linear alone, on the CPU | linear_relu_dropout with relu=False and p=0 |
    | ReLU, LocalResponseNorm, MaxPool2d, Dropout alone | their own |

    The children stay what they are: state_dict keys, slices, replacement, hooks and re-parenting work as in
    Sequential, and the runs are found anew in every call. A child takes part only if its type is exactly
    torch.nn's or this module's, the op covers its arguments (no dilation, padding_mode or string padding, no
    return_indices), the tensor that reaches it is one the op takes, and nothing of the user's sits on it: a
    forward, forward-pre, backward or backward-pre hook, a global module hook, a parametrization, a forward
    of its own, or a compiled call. Every other child is called by itself, and every child inside torch.func
    transforms and forward-mode differentiation. Dropout's masks come from the ops' stream, not from
    torch.nn.Dropout's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if _has_global_hooks() or is_transformed():
            return super().forward(input)
        children = list(self._modules.values())
        kinds = _kinds(children)
        x, i = input, 0
        while i < len(children):
            length = _run_length(kinds, i)
            run = kinds[i : i + length]
            if length and _takes(run, x) and not _overwrites(kinds, children, i + length):
                x = _compute(run, children[i : i + length], x)
                i += length
            else:
                x = children[i](x)
                i += 1
        return x


# Kinds of children, a letter each. c is a Conv2d that conv2d_relu does not cover, i a ReLU that overwrites a
# tensor somebody else may hold, and . every child that must be called by itself.
_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "C",
    nn.ReLU: "R",
    nn.LocalResponseNorm: "N",
    LocalResponseNorm: "N",
    nn.MaxPool2d: "P",
    nn.BatchNorm2d: "B",
    nn.Linear: "L",
    nn.Dropout: "D",
    Dropout: "D",
}

_RUNS = ("RNP", "RP", "NP", "PR", "CR", "BR", "LRD", "LR", "R", "N", "P", "C", "L", "D")

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_DEVICES = frozenset(("cpu", "cuda", "meta"))


def _has_global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _kinds(children: Sequence[nn.Module]) -> str:
    kinds = ""
    for child in children:
        kind = _kind(child)
        # A fresh tensor that nobody else holds may be left as it was: the ReLU's result is the same.
        if kind == "R" and child.inplace and not kinds.endswith(("C", "c", "B", "L", "N", "P")):
            kind = "i"
        kinds += kind
    return kinds


def _kind(child: Any) -> str:
    kind = _KINDS.get(type(child), ".")
    if (
        kind == "."
        or child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or child._compiled_call_impl is not None
        or "forward" in child.__dict__
    ):
        return "."
    if kind == "C" and (
        isinstance(child.padding, str) or child.padding_mode != "zeros" or tuple(child.dilation) != (1, 1)
    ):
        return "c"
    if kind == "P" and not (
        not child.return_indices and _pair(child.dilation) == (1, 1) and _area(child.kernel_size) <= 256
    ):
        return "."
    if kind == "D" and child.inplace:
        return "."
    return kind


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _area(kernel_size: int | tuple[int, ...]) -> int:
    height, width = _pair(kernel_size)
    return height * width


def _run_length(kinds: str, i: int) -> int:
    """Children of the run that starts at i; 0 where child i is called by itself."""
    if kinds.startswith(("CRP", "CRNP"), i):
        return 1
    for run in _RUNS:
        if kinds.startswith(run, i):
            return len(run)
    return 0


def _overwrites(kinds: str, children: Sequence[nn.Module], i: int) -> bool:
    """Whether child i writes into its input, which the op before it may have saved for its backward."""
    return i < len(children) and kinds[i] in ".i" and bool(getattr(children[i], "inplace", False))


def _takes(run: str, x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype in _DTYPES
        and x.device.type in _DEVICES
        and (x.dim() == 4 or run in ("LRD", "LR", "L", "R", "D"))
        and (run != "L" or x.device.type == "cpu")
    )


def _compute(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    for child in children:
        # A layer of several processes knows what the run is on one of them.
        if hasattr(type(child), "compute_run"):
            return child.compute_run(run, children, x)
    if run == "R":
        return F.relu(x)
    if run in ("CR", "C"):
        conv = children[0]
        return conv2d_relu(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.groups, relu=run == "CR")
    if run == "BR":
        return _batch_norm_relu(children[0], x)
    if run == "D":
        return _dropout(children[0], x)
    if run in ("LRD", "LR", "L"):
        linear = children[0]
        if run != "LRD":
            return linear_relu_dropout(x, linear.weight, linear.bias, 0.0, False, relu=run == "LR")
        drop = children[2]
        return linear_relu_dropout(
            x,
            linear.weight,
            linear.bias,
            drop.p,
            drop.training,
            scale_at=getattr(drop, "scale_at", "training"),
        )
    relu = "R" in run
    if run == "N":
        return local_response_norm(x, *_norm_arguments(children[0]))
    pool = _pool_arguments(children[run.index("P")])
    if "N" in run:
        return lrn_max_pool2d(x, *_norm_arguments(children[run.index("N")]), *pool, relu=relu)
    return max_pool2d(x, *pool, relu=relu)


def _norm_arguments(norm: nn.LocalResponseNorm) -> tuple[int, float, float, float, int]:
    return norm.size, norm.alpha, norm.beta, norm.k, getattr(norm, "groups", 1)


def _pool_arguments(pool: nn.MaxPool2d) -> tuple[Any, Any, Any, bool]:
    return pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode


def _dropout(drop: nn.Dropout, x: Tensor) -> Tensor:
    scale_at = getattr(drop, "scale_at", "training")
    if not drop.training and scale_at == "training":
        return x
    return dropout(x, drop.p, drop.training, scale_at=scale_at)


def _batch_norm_relu(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """relu(norm(x)), with nn.BatchNorm2d's bookkeeping of its buffers."""
    mean, var = norm.running_mean, norm.running_var
    from_batch = norm.training or (mean is None and var is None)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                momentum = 1.0 / float(norm.num_batches_tracked)
    elif norm.training:
        mean = var = None
    if mean is None or var is None:
        # The op needs statistics to update; nobody reads these.
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        var = torch.ones(x.shape[1], dtype=dtype, device=x.device)
    return batch_norm_relu(x, mean, var, norm.weight, norm.bias, from_batch, momentum, norm.eps)
