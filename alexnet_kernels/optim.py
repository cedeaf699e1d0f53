"""Stochastic gradient descent with momentum: the paper's rule and torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import ops
from alexnet_kernels._dispatch.checks import LOW_PRECISION
from alexnet_kernels._dispatch.layout import local

_NEWER: dict[str, Any] = {"dampening": 0.0, "nesterov": False, "rule": "paper", "master_weights": None}
"""Values of options that a pickled optimizer may lack."""


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
            `set_masters` gives the copies other values than the parameters'.

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

    @torch.no_grad()
    def set_masters(self, masters: Mapping[Tensor, Tensor]) -> None:
        """Start from masters of these values, which the parameters are roundings of.

        Without it, a master starts as its parameter, which has lost the bits below bfloat16's or float16's. The values
        are copied; the parameters are first written by the next step.

        Args:
            masters: by parameter, float32 of its shape, on any device.

        Raises:
            TypeError, ValueError: a parameter of another optimizer, one that has no master, or another dtype or shape.
        """
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param, master in masters.items():
            if param not in groups:
                raise ValueError("set_masters: a parameter is none of this optimizer's")
            if param.dtype not in LOW_PRECISION or groups[param]["master_weights"] is False:
                options = f"master_weights={groups[param]['master_weights']}"
                raise ValueError(f"set_masters: a {param.dtype} parameter with {options} has no master")
            if not isinstance(master, Tensor) or master.dtype != torch.float32:
                given = master.dtype if isinstance(master, Tensor) else type(master).__name__
                raise TypeError(f"set_masters: a master must be a float32 tensor, not {given}")
            if master.shape != param.shape:
                raise ValueError(f"set_masters: a master is {list(master.shape)}, its parameter {list(param.shape)}")
        for param, master in masters.items():
            copy = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
            self.state[param]["master"] = copy.copy_(master)

    def _start(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Creates the state that a parameter lacks; returns whether this is its first step."""
        state, momentum = self.state[param], self.state[param].get("momentum_buffer")
        if "master" not in state and param.dtype in LOW_PRECISION and group["master_weights"] is not False:
            state["master"] = param.detach().to(torch.float32, memory_format=torch.preserve_format)
            if momentum is not None:  # loaded from an optimizer without masters
                state["momentum_buffer"] = momentum.to(torch.float32, memory_format=torch.preserve_format)
        if momentum is None:
            state["momentum_buffer"] = torch.zeros_like(state.get("master", param), memory_format=torch.preserve_format)
        return momentum is None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for options in (self.defaults, *self.param_groups):
            for name, value in _NEWER.items():  # pickled before there was this option
                options.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, this optimizer's or torch.optim.SGD's.

        Options that a saved group lacks keep the value that they have here; others that it has are kept. Masters and
        their momentum stay float32: torch would cast them to the parameter's dtype. torch.optim.SGD loads a state with
        rule="torch", but not that of parameters with masters.

        Raises:
            ValueError: other groups or parameters; momentum of torch.optim.SGD for rule="paper", which scales it by the
                learning rate; maximize or differentiable.
        """
        saved = state_dict["state"]
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)
        groups = [{**{name: own[name] for name in own if name != "params"}, **group} for own, group in pairs]
        if len(self.param_groups) == len(state_dict["param_groups"]):  # torch refuses others
            for group, given in zip(groups, state_dict["param_groups"], strict=True):
                self._check_loaded(group, "rule" in given, [saved.get(key, {}) for key in group["params"]])
            state_dict = {**state_dict, "param_groups": groups}
        super().load_state_dict(state_dict)
        order = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(order, params, strict=True):
            if param in self.state and self.state[param].get("momentum_buffer", param) is None:
                del self.state[param]["momentum_buffer"]  # torch's name for none yet
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor) and "master" in saved[key]:
                    self.state[param][name] = value.to(device=param.device, dtype=torch.float32, copy=True)

    def _check_loaded(self, group: dict[str, Any], has_rule: bool, states: list[dict[str, Any]]) -> None:
        for name in ("maximize", "differentiable"):
            if group.get(name):
                raise ValueError(f"SGD: the state has {name}=True, which this optimizer does not support")
        moving = any(state.get("momentum_buffer") is not None for state in states)
        if not has_rule and group["rule"] == "paper" and moving:
            raise ValueError(
                "SGD: the state is torch.optim.SGD's, whose momentum is that of rule='torch': this optimizer has "
                "rule='paper'"
            )
        ops.sgd_step([], [], [], **self._settings(group))
