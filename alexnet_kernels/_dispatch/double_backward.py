"""Second derivatives of the ops, through their definitions in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alexnet_kernels._dispatch.checks import LOW_PRECISION


def double_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, grad_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, with respect to `grad` and `inputs`, of the gradients that `function` gives its inputs for `grad`.

    `function` is an op's definition in plain PyTorch. bfloat16 and float16 are computed in float32. The result is
    differentiable again.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():

        def leaf(t: Tensor) -> Tensor:
            # An alias: `grad` may be a function of the inputs, and each has its own derivative.
            return t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()

        def wide(t: Tensor) -> Tensor:
            return t.float() if t.dtype in LOW_PRECISION else t

        xs, g = [leaf(x) for x in inputs], leaf(grad)
        wanted = [i for i, gg in enumerate(grad_grads) if gg is not None]
        out = function(*map(wide, xs)).to(g.dtype)
        first = torch.autograd.grad(out, [xs[i] for i in wanted], g, create_graph=True)
        return torch.autograd.grad(
            first,
            [g, *xs],
            [grad_grads[i] for i in wanted],
            create_graph=create_graph,
            allow_unused=True,
        )
