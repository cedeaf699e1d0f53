"""One step of stochastic gradient descent with momentum over a list of tensors, in one pass.

See: schema in csrc/library.cpp, csrc/cpu/sgd_step.cpp, csrc/cuda/sgd_step.cu, alexnet_kernels/triton/sgd_step.py,
reference.sgd_step, op_info/sgd_step.py, tests/ops/test_sgd_step.py; the optimizer is alexnet_kernels.optim.SGD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alexnet_kernels._dispatch import checks
from alexnet_kernels._dispatch.registration import register_op
from alexnet_kernels._errors import TensorTypeError, TensorValueError
from alexnet_kernels.backends import kernels_of, select

OP = "sgd_step"


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    dampening: float = 0.0,
    nesterov: bool = False,
    rule: str = "paper",
    first_step: bool = False,
    backend: str | None = None,
) -> None:
    """Updates params, momentum_buffers and masters in place; w is the master where there is one, else the parameter.

    rule="paper": `v <- momentum * v - weight_decay * lr * w - lr * g;  w <- w + v`. lr is inside v.
    rule="torch": `g <- g + weight_decay * w;  v <- momentum * v + (1 - dampening) * g` (`v <- g` on the first step);
    `w <- w - lr * (g + momentum * v if nesterov else v)`, as torch.optim.SGD.

    Args:
        params: float32, float64, bfloat16 or float16, any shapes and strides.
        grads: shaped like params, of their dtype or, for params that aren't float64, any other but float64.
        momentum_buffers: shaped like params, of their dtype or float32.
        masters: empty, or float32 copies of bfloat16 and float16 params that the step is taken on and rounded from.
        lr: a number, or a floating-point tensor of one element. On the params' device it is read there, so that a CUDA
            graph that captured the step follows its changes; on the CPU it is read at the call.
        backend: see `alexnet_kernels.backends`.

    Raises:
        TypeError, ValueError, RuntimeError: lists, shapes, dtypes or devices that do not fit; negative settings; a
            CUDA graph captures the step while lr is a number, which the graph would keep.

    Source: Krizhevsky et al. 2012, section 5; torch.optim.SGD.
    """
    _check(params, grads, momentum_buffers, masters)
    lr, lr_tensor = _learning_rate(lr, params)
    for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
        if value < 0:
            raise ValueError(f"{OP}: {name} must not be negative, not {value}")
    if rule not in ("paper", "torch"):
        raise ValueError(f"{OP}: rule must be 'paper' or 'torch', not {rule!r}")
    if rule == "paper" and (nesterov or dampening):
        raise ValueError(f"{OP}: the paper's rule has neither nesterov nor dampening")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"{OP}: nesterov needs a momentum and zero dampening")
    if not params:
        return
    settings = (lr, momentum, weight_decay, dampening, nesterov, rule == "paper", first_step)
    dense = all(map(_alike_and_dense, zip(params, grads, momentum_buffers, masters or params, strict=True)))
    chosen = select(OP, next((p for p in params if p.dtype == torch.float64), params[0]), backend)
    if chosen == "native" or not dense:
        rate = lr if lr_tensor is None else lr_tensor
        _native(params, grads, momentum_buffers, masters, rate, *settings[1:])
    else:
        if lr_tensor is not None and chosen == "cpu":
            settings, lr_tensor = (lr_tensor.item(), *settings[1:]), None
        kernels_of(chosen).sgd_step(params, grads, momentum_buffers, masters, *settings, lr_tensor)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*params, *momentum_buffers, *masters])


def _learning_rate(lr: float | Tensor, params: Sequence[Tensor]) -> tuple[float, Tensor | None]:
    """(value, None), or (0, the tensor on the parameters' device that holds it)."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise TypeError(f"{OP}: lr must be one floating-point number, not {lr.dtype} {list(lr.shape)}")
        if lr.device.type == "cpu" and not torch.compiler.is_compiling() and lr.item() < 0:
            raise ValueError(f"{OP}: lr must not be negative, not {lr.item()}")
        if params and lr.device == params[0].device:
            return 0.0, lr.detach().to(torch.float64 if params[0].dtype == torch.float64 else torch.float32)
        if params and lr.device.type != "cpu":
            raise RuntimeError(f"{OP}: lr is on {lr.device}, but params[0] is on {params[0].device}")
        lr = lr.item()
    if params and params[0].is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: a CUDA graph would keep lr={lr}: give lr as a tensor on {params[0].device}, which the graph reads "
            f"when it is replayed and learning rate schedulers change in place"
        )
    return lr, None


def _alike_and_dense(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the tensors can be processed as flat arrays: equal strides, no gaps."""
    first = tensors[0]
    channels_last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    if not (channels_last or first.is_contiguous()):
        return False
    return all(t.stride() == first.stride() for t in tensors[1:])


def _check(params, grads, momentum_buffers, masters) -> None:
    lists = {"grads": grads, "momentum_buffers": momentum_buffers}
    if masters:
        lists["masters"] = masters
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{OP}: {len(params)} params, but {len(tensors)} {name}")
    for i, param in enumerate(params):
        checks.check_tensor(OP, f"params[{i}]", param)
        checks.check_floating(OP, f"params[{i}]", param)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        for name, tensors in lists.items():
            tensor = tensors[i]
            checks.check_device(OP, f"{name}[{i}]", tensor, params[0])
            checks.check_floating(OP, f"{name}[{i}]", tensor)
            if tensor.shape != param.shape:
                raise TensorValueError(
                    f"{OP}: {name}[{i}] is {list(tensor.shape)}, but params[{i}] is {list(param.shape)}"
                )
            fits = {
                "grads": (tensor.dtype == torch.float64) == (param.dtype == torch.float64),
                "momentum_buffers": tensor.dtype in (param.dtype, wide),
                "masters": tensor.dtype == wide,
            }
            if not fits[name]:
                raise TensorTypeError(
                    f"{OP}: {name}[{i}] is {tensor.dtype}, which does not go with a {param.dtype} param"
                )


def _native(
    params, grads, momentum_buffers, masters, lr, momentum, weight_decay, dampening, nesterov, paper, first_step
) -> None:
    for i, param in enumerate(params):
        weight, buffer = masters[i] if masters else param, momentum_buffers[i]
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        w, g, v = weight.to(wide), grads[i].to(wide), buffer.to(wide)
        lr = lr.to(wide) if isinstance(lr, Tensor) else lr
        if paper:
            v = momentum * v - weight_decay * lr * w - lr * g
            w = w + v
        else:
            g = g + weight_decay * w
            step = g
            if momentum != 0:
                v = g if first_step else momentum * v + (1 - dampening) * g
                step = g + momentum * v if nesterov else v
            w = w - lr * step
        buffer.copy_(v)
        weight.copy_(w)
        if masters:
            param.copy_(w)


def _fake(params, grads, momentum_buffers, masters, *settings, **options) -> None:
    _check(params, grads, momentum_buffers, masters)


register_op(OP, _fake)
