"""One step of stochastic gradient descent with momentum over a list of tensors, in one launch.

See: alexnet_kernels/ops/sgd_step.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_kernels import _library
from alexnet_kernels.triton import _config
from alexnet_kernels.triton._common import on_its_device


@triton.jit
def step(
    param_ptr, grad_ptr, buffer_ptr, master_ptr, at, mask, lr, momentum, keep, weight_decay, decay_lr,
    MASTER: tl.constexpr, PAPER: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    if MASTER:
        w = tl.load(master_ptr + at, mask=mask, other=0)
    else:
        w = tl.load(param_ptr + at, mask=mask, other=0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=mask, other=0).to(tl.float32)
    if PAPER:
        v = tl.load(buffer_ptr + at, mask=mask, other=0).to(tl.float32)
        v = momentum * v - decay_lr * w - lr * g
        w = w + v
        tl.store(buffer_ptr + at, v.to(buffer_ptr.dtype.element_ty), mask=mask)
    else:
        g = g + weight_decay * w
        if MOMENTUM:
            v = g
            if not FIRST:
                v = momentum * tl.load(buffer_ptr + at, mask=mask, other=0).to(tl.float32) + keep * g
            tl.store(buffer_ptr + at, v.to(buffer_ptr.dtype.element_ty), mask=mask)
            if NESTEROV:
                v = g + momentum * v
            w = w - lr * v
        else:
            w = w - lr * g
    if MASTER:
        tl.store(master_ptr + at, w, mask=mask)
    tl.store(param_ptr + at, w.to(param_ptr.dtype.element_ty), mask=mask)


# A program updates BLOCK elements of one tensor; the programs of each tensor follow those of the tensor before it. The
# tuples have one length; tensors i have counts[i] elements without gaps. *lr_ptr replaces lr unless lr_ptr is None.
@triton.jit
def sgd_step_kernel(
    param_ptrs, grad_ptrs, buffer_ptrs, master_ptrs, counts, lr_ptr, lr, momentum, keep, weight_decay, decay_lr,
    MASTER: tl.constexpr, PAPER: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
        decay_lr = weight_decay * lr
    first = 0
    for i in tl.static_range(len(counts)):
        programs = tl.cdiv(counts[i], BLOCK)
        if (program >= first) & (program < first + programs):
            at = (program - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            step(
                param_ptrs[i], grad_ptrs[i], buffer_ptrs[i], master_ptrs[i], at, at < counts[i],
                lr, momentum, keep, weight_decay, decay_lr, MASTER, PAPER, MOMENTUM, NESTEROV, FIRST,
            )  # fmt: skip
        first += programs


# Not a triton_op: torch.compile cannot trace a launch with tuples of tensors.
@torch.library.custom_op(
    f"{_library.TRITON_NAMESPACE}::sgd_step", mutates_args=("params", "momentum_buffers", "masters")
)
@on_its_device
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    paper_rule: bool,
    first_step: bool,
    lr_tensor: Tensor | None = None,
) -> None:
    wanted = [i for i, param in enumerate(params) if param.numel() > 0]
    for start in range(0, len(wanted), _config.SGD_TENSORS):
        chosen = wanted[start : start + _config.SGD_TENSORS]
        lists = [tuple(tensors[i] for i in chosen) for tensors in (params, grads, momentum_buffers, masters or params)]
        counts = tuple(params[i].numel() for i in chosen)
        programs = sum(triton.cdiv(count, _config.ELEMENTS.block) for count in counts)
        sgd_step_kernel[(programs,)](
            *lists, counts, lr_tensor, lr, momentum, 1 - dampening, weight_decay, weight_decay * lr,
            MASTER=bool(masters), PAPER=paper_rule, MOMENTUM=momentum != 0, NESTEROV=nesterov, FIRST=first_step,
            BLOCK=_config.ELEMENTS.block, num_warps=_config.ELEMENTS.num_warps,
        )  # fmt: skip
