"""The precision of a run: what "auto" stands for, bfloat16 weights with float32 masters, evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alexnet_kernels._errors import InputError
from alexnet_kernels.training.devices import autocast
from alexnet_kernels.training.settings import PURE, Settings

__all__ = [
    "InPrecision",
    "input_dtype",
    "join_masters",
    "resolve",
    "round_weights",
    "rounded_names",
    "split_masters",
    "words",
]

_WORDS = {
    "32": "32 bit",
    "16": "16 bit",
    PURE: f"{PURE}, bfloat16 weights and activations with float32 masters",
}


def resolve(settings: Settings, device: torch.device, parallel: bool = False) -> Settings:
    """The settings with the precision that "auto" stands for; others unchanged.

    It is "bf16-pure" on a CUDA device of compute capability 8.0 or later, "bf16" there in several processes and on CPUs
    with bfloat16 instructions, and "32" elsewhere. InputError for "16" without a CUDA device.
    """
    if settings.precision == "16" and device.type != "cuda":
        raise InputError("--precision 16 needs a CUDA device; --precision bf16 and 32 run everywhere")
    if settings.precision != "auto":
        return settings
    if device.type == "cpu":
        return replace(settings, precision="bf16" if _cpu_has_bfloat16() else "32")
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return replace(settings, precision=("bf16" if parallel else PURE) if fast else "32")


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for it: on others it is slower than float32."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def words(precision: str, auto: bool = False) -> str:
    """A run's precision for people. auto: whether "auto" stood for it."""
    return _WORDS.get(precision, precision) + " (--precision auto)" * auto


def input_dtype(precision: str) -> torch.dtype:
    """The dtype of the images that a training step gives to the network."""
    return torch.bfloat16 if precision == PURE else torch.float32


def rounded_names(model: nn.Module) -> list[str]:
    """Names of the parameters that are bfloat16 in "bf16-pure": all but batch normalisation's.

    Those and the running statistics stay float32: `batch_norm_relu` takes them with bfloat16 images.
    """
    kept = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    return [name for name, _ in model.named_parameters() if not name.startswith(kept)]


def round_weights(model: nn.Module) -> dict[str, Tensor]:
    """Round the parameters of `rounded_names` to bfloat16, in place. Returns their values before, by name."""
    params = dict(model.named_parameters())
    before = {name: params[name].detach() for name in rounded_names(model)}
    for name, value in before.items():
        params[name].data = value.to(torch.bfloat16, memory_format=torch.preserve_format)
    return before


class InPrecision(nn.Module):
    """A float32 network for float32 images, computed in a run's precision.

    In "bf16-pure" the weights are rounded in every call, as the run's masters were for its steps and validation.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        if self.precision != PURE:
            with autocast(self.precision, x.device):
                return self.model(x)
        rounded = {name: self.model.get_parameter(name).to(torch.bfloat16) for name in rounded_names(self.model)}
        return functional_call(self.model, rounded, (x.to(torch.bfloat16),))


def split_masters(content: dict[str, Any], prefix: str, names: Sequence[str]) -> None:
    """Put the masters of a checkpoint's optimizer into its state_dict, in place of the rounded weights.

    A checkpoint of "bf16-pure" then has the form of a float32 run's: whoever reads it gets the exact weights.

    Args:
        content: the checkpoint. The live optimizer's state, to which it refers, is not changed.
        prefix: of the model's keys in the state_dict.
        names: the optimizer's parameters, in its order.
    """
    (optimizer,) = content["optimizer_states"]
    weights, states = dict(content["state_dict"]), {}
    for key, values in optimizer["state"].items():
        states[key] = {name: value for name, value in values.items() if name != "master"}
        if "master" in values:
            weights[prefix + names[key]] = values["master"]
    content["state_dict"], content["optimizer_states"] = weights, [{**optimizer, "state": states}]


def join_masters(content: dict[str, Any], prefix: str, names: Sequence[str], rounded: Sequence[str]) -> None:
    """Undo `split_masters` for the parameters `rounded`: loading the state_dict into the model rounds again."""
    (optimizer,) = content["optimizer_states"]
    masters = {key: content["state_dict"][prefix + name] for key, name in enumerate(names) if name in set(rounded)}
    states = {**{key: {} for key in masters}, **optimizer["state"]}
    for key, master in masters.items():
        states[key] = {**states[key], "master": master}
    content["optimizer_states"] = [{**optimizer, "state": states}]
