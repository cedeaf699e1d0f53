"""Stochastic gradient descent with momentum: the paper's rule and torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import ops
from alexnet_kernels._dispatch.checks import LOW_PRECISION
from alexnet_kernels._dispatch.layout import local


class SGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay, one pass over all parameters a step.

    rule="paper" (the default) is the paper's, `v <- momentum * v - weight_decay * lr * w - lr * g; w <- w + v`: lr is
    inside v, so a change of lr affects only later gradients. rule="torch" is torch.optim.SGD's, in which it also
    rescales the accumulated ones. At a constant lr the two agree.

    Args:
        params: tensors or groups of them, as for every optimizer; groups may override any of the following.
        lr, momentum, weight_decay: the paper trains with 0.01, 0.9 and 0.0005. A step that a CUDA graph captures needs
            lr as a tensor on the parameters' device: `torch.optim.lr_scheduler` changes it in place, and a replay
            follows. The other settings are kept as they were when it was captured.
        dampening, nesterov: of torch's rule only.
        rule: "paper" or "torch".
        master_weights: keep a float32 copy of each bfloat16 or float16 parameter, take the step there and round. True,
            False (the parameters themselves are stepped and rounded), or None: True where there are such parameters.

    Momentum is float32 wherever a parameter has a master, else of the parameter's dtype. DTensors are stepped
    shard by shard, and their momentum is a DTensor. Sparse gradients are refused.

    Source: Krizhevsky et al. 2012, section 5.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        dampening: float = 0.0,
        nesterov: bool = False,
        rule: str = "paper",
        master_weights: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "dampening": dampening,
            "nesterov": nesterov,
            "rule": rule,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            # With empty lists, only the settings are checked.
            ops.sgd_step([], [], [], **self._settings(group))

    @staticmethod
    def _settings(group: dict[str, Any]) -> dict[str, Any]:
        names = ("lr", "momentum", "weight_decay", "dampening", "nesterov", "rule")
        settings = {name: group[name] for name in names}
        if not isinstance(settings["lr"], Tensor):
            settings["lr"] = float(settings["lr"])
        return settings

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes the loss again, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Tensors that need a master and those that don't, started and unstarted, on each device.
            batches: dict[tuple, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError("SGD: sparse gradients are not supported")
                first = self._start(param, group)
                mastered = "master" in self.state[param]
                batches.setdefault((first, mastered, param.device), []).append(param)
            for (first, mastered, _), params in batches.items():
                states = [self.state[param] for param in params]
                ops.sgd_step(
                    [local(param) for param in params],
                    [local(param.grad) for param in params if param.grad is not None],
                    [local(state["momentum_buffer"]) for state in states],
                    [local(state["master"]) for state in states] if mastered else [],
                    first_step=first,
                    **self._settings(group),
                )
        return loss

    def _start(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Creates the state of a parameter that has none; returns whether it did."""
        state = self.state[param]
        if state:
            return False
        if param.dtype in LOW_PRECISION and group["master_weights"] is not False:
            state["master"] = param.detach().to(torch.float32, memory_format=torch.preserve_format)
        state["momentum_buffer"] = torch.zeros_like(state.get("master", param), memory_format=torch.preserve_format)
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; masters and their momentum stay float32: torch would cast them to the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(order, params, strict=True):
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor) and "master" in saved[key]:
                    self.state[param][name] = value.to(device=param.device, dtype=torch.float32, copy=True)
