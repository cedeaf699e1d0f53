"""Runs of layers as one op each: the rules, the container that applies them, and `fuse`, which changes any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from alexnet_kernels._dispatch.checks import LOW_PRECISION
from alexnet_kernels._torch_private import is_transformed
from alexnet_kernels.backends import select
from alexnet_kernels.nn.modules import Dropout, LocalResponseNorm
from alexnet_kernels.ops.batch_norm_relu import batch_norm_relu
from alexnet_kernels.ops.conv2d_relu import conv2d_relu, conv2d_relu_by
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm
from alexnet_kernels.ops.lrn_max_pool2d import lrn_max_pool2d
from alexnet_kernels.ops.max_pool2d import max_pool2d

__all__ = ["FusedSequential", "RunLayer", "fuse", "register_layer", "unfuse"]

M = TypeVar("M", bound=nn.Module)


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential that computes the same, with one op for each of these runs of children:

    | children | op |
    |---|---|
    | Conv2d[, ReLU] | conv2d_relu; where a max-pool follows, the pool takes the ReLU and, on backend "cuda", the bias |
    | ReLU, [LocalResponseNorm,] MaxPool2d | max_pool2d or lrn_max_pool2d with relu=True |
    | LocalResponseNorm, MaxPool2d | lrn_max_pool2d |
    | MaxPool2d, ReLU | max_pool2d with relu=True: the same function |
    | BatchNorm2d, ReLU | batch_norm_relu |
    | Linear, ReLU[, Dropout] | linear_relu_dropout |
    | Linear alone, on the CPU | linear_relu_dropout with relu=False and p=0 |
    | ReLU, LocalResponseNorm, MaxPool2d, Dropout alone | their own |

    Where a run that begins with a Conv2d follows Conv2d, ReLU, on a GPU, the following convolution's backward applies
    the ReLU's mask, to the gradient that it hands back.

    The children are not changed: state_dict keys, slices, replacement, hooks and re-parenting work as in Sequential.
    Runs are found in every call. A child is part of a run only if its type is exactly torch.nn's or this package's, the
    op supports its arguments (no dilation, padding_mode or string padding, no return_indices) and the tensor that
    reaches it, and the user has attached nothing to it: a forward, forward-pre, backward or backward-pre hook, a global
    module hook, a parametrization, a forward of its own, or a compiled call. Every other child is called by itself, and
    so is every child inside torch.func transforms and forward-mode differentiation. Dropout masks are drawn from the
    ops' stream, not from torch.nn.Dropout's.
    """

    def forward(self, input: Tensor, overwritten: bool = False) -> Tensor:
        """The output. `overwritten` says that the caller writes into it before backward, which some ops don't allow."""
        if _has_global_hooks() or is_transformed():
            return super().forward(input)
        children = list(self._modules.values())
        kinds = _kinds(children)
        x, i, masks = input, 0, _NO_MASKS
        while i < len(children):
            run = _run_taken(kinds, children, i, x, overwritten)
            if run:
                end = i + len(run)
                masks = _Masks(run == "CR" and _masks_input(kinds, children, i, end, x, overwritten), masks.grad)
                x = _compute(run, children[i:end], x, masks)
                i = end
            else:
                container = type(children[i]) is FusedSequential
                if container and _overwrites_input(kinds, children, i + 1, overwritten):
                    x = children[i](x, True)
                else:
                    x = children[i](x)
                i += 1
        return x


def fuse(module: M) -> M:
    """Turn every torch.nn.Sequential in `module`, itself included, into a FusedSequential. Returns `module`.

    Only the type of the containers changes: children, parameters, state_dict keys, hooks and references to the
    containers stay. Subclasses of Sequential are left alone, since their forward may differ. Outputs and gradients are
    those of the original module, within rounding; dropout draws different masks from the same seed. Fusing twice has no
    further effect.
    """
    return _change_type(module, nn.Sequential, FusedSequential)


def unfuse(module: M) -> M:
    """Turn every FusedSequential in `module`, itself included, into a torch.nn.Sequential. Returns `module`.

    Undoes `fuse`, and makes an `AlexNet` call child by child.
    """
    return _change_type(module, FusedSequential, nn.Sequential)


def _change_type(module: M, old: type[nn.Sequential], new: type[nn.Sequential]) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module


class RunLayer(Protocol):
    """A layer that computes the runs that contain it itself, such as one whose parameters are split over processes."""

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        """The result of the run's children for x. `run` has a letter for each child, see `register_layer`."""
        ...


# A child's kind, a letter. c is a Conv2d that conv2d_relu does not support, i a ReLU that overwrites a tensor that may
# be used elsewhere, and . any other child that must be called by itself.
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
_RUN_LAYERS: set[type] = set()


def register_layer(kind: str, layer: type[RunLayer]) -> None:
    """Registers a type of layers as one of a kind.

    The kinds are C Conv2d, R ReLU, N LocalResponseNorm, P MaxPool2d, B BatchNorm2d, L Linear, D Dropout.
    """
    _KINDS[layer] = kind  # type: ignore[index]
    _RUN_LAYERS.add(layer)


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
        # A new tensor that only this ReLU reads need not be overwritten: the result is the same.
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


_NEW = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.Linear,
    nn.LocalResponseNorm,
)
"""Layers whose output is a new tensor, also with hooks. Others may return their input or a view of it."""


def _overwrites_input(kinds: str, children: Sequence[nn.Module], i: int, otherwise: bool | None = False) -> bool | None:
    """Whether the children from i on write into their input, which the op before it may have saved for its backward.

    They may do so through views of it. otherwise: the result where the last of them may return the input or a view.
    """
    for kind, child in zip(kinds[i:], children[i:], strict=True):
        if type(child) in (nn.Sequential, FusedSequential):
            inner = list(child._modules.values())
            if (found := _overwrites_input(_kinds(inner), inner, 0, None)) is not None:  # type: ignore[arg-type]
                return found
        elif kind in ".i" and getattr(child, "inplace", False):
            return True
        elif kind in "CcRNPBL" or isinstance(child, _NEW) or (kind == "D" and child.training and child.p):
            return False
    return otherwise


class _Masks(NamedTuple):
    """conv2d_relu's masked_grad and mask_input: of the run's ReLU, and of the one before the run."""

    grad: bool
    input: bool


_NO_MASKS = _Masks(False, False)


class Rule(NamedTuple):
    """How a run of children is computed: `compute(run, children, x)`, and for convolutions with their masks."""

    compute: Callable[..., Tensor]
    images: bool = True  # of [N, C, H, W] only
    cpu: bool = False  # on the CPU only


def _relu(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    return F.relu(x)


def _convolve(conv: Any, x: Tensor, bias: Tensor | None, relu: bool, masks: _Masks) -> Tensor:
    arguments = x, conv.weight, bias, conv.stride, conv.padding, conv.groups
    if masks == _NO_MASKS:
        return conv2d_relu(*arguments, relu=relu)
    return conv2d_relu_by(None, *arguments, relu=relu, masked_grad=masks.grad, mask_input=masks.input)


def _conv2d_relu(run: str, children: Sequence[Any], x: Tensor, masks: _Masks = _NO_MASKS) -> Tensor:
    return _convolve(children[0], x, children[0].bias, run == "CR", masks)


def _conv_pool(run: str, children: Sequence[Any], x: Tensor, masks: _Masks = _NO_MASKS) -> Tensor:
    """The convolution alone; the pool adds its bias."""
    conv = children[0]
    x = _convolve(conv, x, None, False, masks)
    bias = conv.bias
    # Autocast keeps the parameter, which is float32 as a rule: the sum is rounded once.
    if bias.dtype != x.dtype and not (bias.dtype == torch.float32 and x.dtype in LOW_PRECISION):
        bias = bias.to(x.dtype)
    return (_lrn_max_pool2d if "N" in run else _max_pool2d)(run, children, x, bias)


def _local_response_norm(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    return local_response_norm(x, *_norm_arguments(children[0]))


def _max_pool2d(run: str, children: Sequence[Any], x: Tensor, bias: Tensor | None = None) -> Tensor:
    return max_pool2d(x, *_pool_arguments(children[run.index("P")]), bias=bias, relu="R" in run)


def _lrn_max_pool2d(run: str, children: Sequence[Any], x: Tensor, bias: Tensor | None = None) -> Tensor:
    norm, pool = children[run.index("N")], children[run.index("P")]
    return lrn_max_pool2d(x, *_norm_arguments(norm), *_pool_arguments(pool), bias=bias, relu="R" in run)


def _norm_arguments(norm: nn.LocalResponseNorm) -> tuple[int, float, float, float, int]:
    return norm.size, norm.alpha, norm.beta, norm.k, getattr(norm, "groups", 1)


def _pool_arguments(pool: nn.MaxPool2d) -> tuple[Any, Any, Any, bool]:
    return pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode


def _linear_relu_dropout(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    linear = children[0]
    if run != "LRD":
        return linear_relu_dropout(x, linear.weight, linear.bias, 0.0, False, relu=run == "LR")
    drop = children[2]
    scale_at = getattr(drop, "scale_at", "training")
    return linear_relu_dropout(x, linear.weight, linear.bias, drop.p, drop.training, scale_at=scale_at)


def _dropout(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    drop = children[0]
    scale_at = getattr(drop, "scale_at", "training")
    if not drop.training and scale_at == "training":
        return x
    return dropout(x, drop.p, drop.training, scale_at=scale_at)


def _batch_norm_relu(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    """relu(norm(x)), with nn.BatchNorm2d's updates of its buffers."""
    norm = children[0]
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


_RULES_WITH_BIAS: dict[str, Rule] = {run: Rule(_conv_pool) for run in ("CRNP", "CRP", "CNP", "CPR", "CP")}
"""By run, the longer ones first: those whose pool may take the bias of the convolution."""
_RULES: dict[str, Rule] = {
    "RNP": Rule(_lrn_max_pool2d),
    "RP": Rule(_max_pool2d),
    "NP": Rule(_lrn_max_pool2d),
    "PR": Rule(_max_pool2d),
    "CR": Rule(_conv2d_relu),
    "BR": Rule(_batch_norm_relu),
    "LRD": Rule(_linear_relu_dropout, images=False),
    "LR": Rule(_linear_relu_dropout, images=False),
    "R": Rule(_relu, images=False),
    "N": Rule(_local_response_norm),
    "P": Rule(_max_pool2d),
    "C": Rule(_conv2d_relu),
    "L": Rule(_linear_relu_dropout, images=False, cpu=True),
    "D": Rule(_dropout, images=False),
}
"""By run, the longer ones first."""
# (the kinds that follow, the run that is computed): a convolution leaves its ReLU to a max-pool behind it.
_MATCHES = (("CRP", "C"), ("CRNP", "C"), *((run, run) for run in _RULES))
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_DEVICES = frozenset(("cpu", "cuda", "meta"))


def _rule(run: str) -> Rule:
    return _RULES_WITH_BIAS.get(run) or _RULES[run]


def _run_at(kinds: str, i: int) -> str:
    """The run that starts at child i; "" if the child is called by itself."""
    for following, run in _MATCHES:
        if kinds.startswith(following, i):
            return run
    return ""


def _run_with_bias_at(kinds: str, children: Sequence[Any], i: int, x: Any, overwritten: bool) -> str:
    """The run that starts at child i, if its pool should take the bias of its convolution; otherwise "".

    On backend "cuda" the convolution may be cuDNN's, after which bias and ReLU are a pass over its output. Backward,
    their gradients are two passes. The pool computes them in its own. oneDNN and Triton's kernel add the bias for free.
    Layers that compute their runs themselves keep their bias.
    """
    run = next((run for run in _RULES_WITH_BIAS if kinds.startswith(run, i)), "") if kinds[i] == "C" else ""
    if not run:
        return ""
    conv, end = children[i], i + len(run)
    taken = (
        _takes(_rule(run), x)
        and conv.bias is not None
        and conv.bias.dtype == conv.weight.dtype
        and not any(type(child) in _RUN_LAYERS for child in children[i:end])
        and not _overwrites_input(kinds, children, end, overwritten)
        and select("conv2d_relu", x, None) == "cuda"
    )
    return run if taken else ""


def _run_taken(kinds: str, children: Sequence[Any], i: int, x: Any, overwritten: bool) -> str:
    """The run to compute at child i; "" if the child is called by itself."""
    run = _run_with_bias_at(kinds, children, i, x, overwritten)
    if run:
        return run
    run = _run_at(kinds, i)
    taken = run and _takes(_rule(run), x) and not _overwrites_input(kinds, children, i + len(run), overwritten)
    return run if taken else ""


def _masks_input(kinds: str, children: Sequence[Any], i: int, end: int, x: Tensor, overwritten: bool) -> bool:
    """Whether the run at child `end` is a convolution whose backward applies the mask of the ReLU of run i.

    Nobody but that convolution reads the ReLU's output, and no hook sees its gradient. On the CPU, where torch's own
    convolutions run, nothing is gained.
    """
    if not torch.is_grad_enabled() or end == len(children) or select("conv2d_relu", x, None) in ("cpu", "native"):
        return False
    following = _run_taken(kinds, children, end, x, overwritten)  # run i hands on a tensor like x
    taken = children[i:end], children[end : end + len(following)]
    return following.startswith("C") and not any(type(child) in _RUN_LAYERS for run in taken for child in run)


def _takes(rule: Rule, x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dtype in _DTYPES
        and x.device.type in _DEVICES
        and (x.dim() == 4 or not rule.images)
        and (x.device.type == "cpu" or not rule.cpu)
    )


def _compute(run: str, children: Sequence[Any], x: Tensor, masks: _Masks) -> Tensor:
    for child in children:
        if type(child) in _RUN_LAYERS:
            return child.compute_run(run, children, x)
    compute = _rule(run).compute
    return compute(run, children, x) if masks == _NO_MASKS else compute(run, children, x, masks)
