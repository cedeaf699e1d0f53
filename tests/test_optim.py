"""optim.SGD's state: what it loads and what loads it. tests/ops/test_sgd_step.py tests the steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same, raises
from torch import Tensor, nn

from alexnet_kernels.optim import SGD

OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "plain": {"momentum": 0.0, "weight_decay": 0.01},
    "dampened": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.0},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
}
MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ours": lambda params, **options: SGD(params, 0.1, rule="torch", **options),
    "torch": lambda params, **options: torch.optim.SGD(params, 0.1, **options),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((3, 4), (4,))]


def steps(optimizer: torch.optim.Optimizer, count: int) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for i in range(count):
        for param in params:
            param.grad = torch.sin(param.detach() + i)
        optimizer.step()
    return [param.detach().clone() for param in params]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr": 0.2}, {"params": params[1:], "name": "bias"}]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("before", [0, 2], ids=["unstarted", "started"])
@pytest.mark.parametrize(("maker", "taker"), [("torch", "ours"), ("ours", "torch"), ("ours", "ours")])
def test_torchs_state_and_ours(maker: str, taker: str, before: int, options: dict[str, Any]) -> None:
    params = parameters()
    first = MAKERS[maker](groups(params), **options)
    steps(first, before)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    others = copy.deepcopy(params)
    second = MAKERS[taker]([others[0]])  # its settings are those of the state
    second.add_param_group({"params": others[1:]})
    second.load_state_dict(state)
    torch.testing.assert_close(steps(second, 2), steps(first, 2))
    assert second.param_groups[0]["lr"] == 0.2
    assert second.param_groups[1]["name"] == "bias"


def test_options_that_a_state_lacks_keep_their_values_and_unknown_ones_are_kept() -> None:
    params = parameters()
    optimizer = SGD([{"params": params[:1], "lr_scale": 2.0}, {"params": params[1:], "momentum": 0.5}], rule="torch")
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in ("momentum", "nesterov", "master_weights", "rule", "lr_scale"):
            group.pop(name, None)
        group["newer"] = 3
    optimizer.load_state_dict(state)
    first, second = optimizer.param_groups
    assert (first["lr_scale"], first["momentum"], second["momentum"], first["rule"]) == (2.0, 0.9, 0.5, "torch")
    assert [group["newer"] for group in optimizer.state_dict()["param_groups"]] == [3, 3]
    steps(optimizer, 1)


def test_an_older_pickle() -> None:
    optimizer = SGD(parameters(), rule="torch")
    steps(optimizer, 1)
    for options in (optimizer.defaults, *optimizer.param_groups):
        del options["master_weights"], options["dampening"]
    loaded = pickle.loads(pickle.dumps(optimizer))
    loaded.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert all(group["dampening"] == 0.0 and group["master_weights"] is None for group in loaded.param_groups)
    steps(loaded, 1)


def test_masters_start_from_torchs_bfloat16() -> None:
    params = parameters(torch.bfloat16)
    theirs = torch.optim.SGD(params, 0.1, momentum=0.9)
    steps(theirs, 1)
    ours = SGD(params, rule="torch")
    ours.load_state_dict(theirs.state_dict())
    steps(ours, 1)
    for values in ours.state.values():
        assert {name: value.dtype for name, value in values.items()} == {
            "master": torch.float32,
            "momentum_buffer": torch.float32,
        }


def test_what_it_would_compute_otherwise_is_refused() -> None:
    params = parameters()
    theirs = torch.optim.SGD(params, 0.1, momentum=0.9, maximize=True)
    steps(theirs, 1)
    ours = SGD(params, rule="torch")
    before = copy.deepcopy(ours.state_dict())
    raises(ValueError, "maximize=True, which", lambda: ours.load_state_dict(theirs.state_dict()))
    theirs.param_groups[0]["maximize"] = False
    message = r"momentum is that of rule='torch': this optimizer has rule='paper'"
    raises(ValueError, message, lambda: SGD(params).load_state_dict(theirs.state_dict()))
    theirs.param_groups[0]["nesterov"] = True
    theirs.param_groups[0]["dampening"] = 0.5
    raises(ValueError, "nesterov needs a momentum", lambda: ours.load_state_dict(theirs.state_dict()))
    raises(
        ValueError, "different number of parameter groups", lambda: ours.load_state_dict({**before, "param_groups": []})
    )
    assert ours.state_dict() == before
    # Without momentum there is nothing that the rules have differently.
    plain = torch.optim.SGD(params, 0.1)
    paper = SGD(params)
    paper.load_state_dict(plain.state_dict())
    assert_same(steps(paper, 1), [param.detach() for param in params])
