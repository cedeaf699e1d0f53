"""The runs of layers that one op computes: the rules, and how each is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels._dispatch.checks import LOW_PRECISION, is_plain
from alexnet_kernels.nn.layers import RUN_LAYERS
from alexnet_kernels.ops.batch_norm_relu import batch_norm_relu
from alexnet_kernels.ops.conv2d_relu import conv2d_relu, conv2d_relu_by
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm
from alexnet_kernels.ops.lrn_max_pool2d import lrn_max_pool2d
from alexnet_kernels.ops.max_pool2d import max_pool2d

__all__ = [
    "LONGEST",
    "NO_MASKS",
    "RULES",
    "RULES_WITH_BIAS",
    "Masks",
    "Rule",
    "compute",
    "ops_of",
    "rule_of",
    "run_at",
    "takes",
]


class Masks(NamedTuple):
    """conv2d_relu's masked_grad and mask_input: of the run's ReLU, and of the one before the run."""

    grad: bool
    input: bool


NO_MASKS = Masks(False, False)


class Rule(NamedTuple):
    """How a run of children is computed: `compute(run, children, x)`, and for convolutions with their masks."""

    compute: Callable[..., Tensor]
    images: bool = True  # of [N, C, H, W] only
    cpu: bool = False  # on the CPU only


def _relu(run: str, children: Sequence[Any], x: Tensor) -> Tensor:
    return F.relu(x)


def _convolve(conv: Any, x: Tensor, bias: Tensor | None, relu: bool, masks: Masks) -> Tensor:
    arguments = x, conv.weight, bias, conv.stride, conv.padding, conv.groups
    if masks == NO_MASKS:
        return conv2d_relu(*arguments, relu=relu)
    return conv2d_relu_by(None, *arguments, relu=relu, masked_grad=masks.grad, mask_input=masks.input)


def _conv2d_relu(run: str, children: Sequence[Any], x: Tensor, masks: Masks = NO_MASKS) -> Tensor:
    return _convolve(children[0], x, children[0].bias, run == "CR", masks)


def _conv_pool(run: str, children: Sequence[Any], x: Tensor, masks: Masks = NO_MASKS) -> Tensor:
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


RULES_WITH_BIAS: dict[str, Rule] = {run: Rule(_conv_pool) for run in ("CRNP", "CRP", "CNP", "CPR", "CP")}
"""By run, the longer ones first: those whose pool may take the bias of the convolution."""
RULES: dict[str, Rule] = {
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
_MATCHES = (("CRP", "C"), ("CRNP", "C"), *((run, run) for run in RULES))
LONGEST = max(len(following) for following, _ in _MATCHES)
"""The most layers that decide about a run."""
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_DEVICES = frozenset(("cpu", "cuda", "meta"))


def rule_of(run: str) -> Rule:
    return RULES_WITH_BIAS.get(run) or RULES[run]


def ops_of(run: str) -> tuple[str, ...]:
    """The names of the ops that compute a run, in order; none where torch's own function does."""
    function = rule_of(run).compute
    if function is _relu:
        return ()
    if function is _conv_pool:
        return "conv2d_relu", "lrn_max_pool2d" if "N" in run else "max_pool2d"
    return (function.__name__.lstrip("_"),)


def run_at(kinds: str, i: int) -> str:
    """The run that starts at child i; "" if the child is called by itself."""
    for following, run in _MATCHES:
        if kinds.startswith(following, i):
            return run
    return ""


def takes(rule: Rule, x: object) -> bool:
    return (
        isinstance(x, Tensor)
        and is_plain(x)
        and x.dtype in _DTYPES
        and x.device.type in _DEVICES
        and (x.dim() == 4 or not rule.images)
        and (x.device.type == "cpu" or not rule.cpu)
    )


def compute(run: str, children: Sequence[Any], x: Tensor, masks: Masks) -> Tensor:
    for child in children:
        if type(child) in RUN_LAYERS:
            return child.compute_run(run, children, x)
    function = rule_of(run).compute
    return function(run, children, x) if masks == NO_MASKS else function(run, children, x, masks)
