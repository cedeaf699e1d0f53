"""The settings that a training run's result depends on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from alexnet_kernels.models import PRESETS
from alexnet_kernels.training.errors import InputError

__all__ = ["PRECISIONS", "Settings", "defaults"]

PRECISIONS = ("32", "bf16", "16")


@dataclass(frozen=True)
class Settings:
    """See `alexnet-kernels train --help`. Raises InputError for a value out of range."""

    preset: str
    epochs: int
    batch_size: int
    lr: float
    """The largest: the rate rises linearly over the first tenth of the steps and falls to 0 along a
    cosine."""
    momentum: float
    weight_decay: float
    image_size: int
    """Side of the network's input, in pixels."""
    width: float
    dropout: float
    precision: str
    seed: int

    def __post_init__(self) -> None:
        def check(name: str, allowed: str, ok: bool) -> None:
            if not ok:
                option = "--" + name.replace("_", "-")
                raise InputError(f"{option} must be {allowed}, got {getattr(self, name)}")

        check("preset", f"one of {', '.join(PRESETS)}", self.preset in PRESETS)
        check("epochs", "at least 1", self.epochs >= 1)
        check("batch_size", "at least 1", self.batch_size >= 1)
        check("lr", "a positive number", 0 < self.lr < math.inf)
        check("momentum", "in [0, 1)", 0 <= self.momentum < 1)
        check("weight_decay", "a number that is not negative", 0 <= self.weight_decay < math.inf)
        check("image_size", "from 1 to 4096", 1 <= self.image_size <= 4096)
        check("width", "a factor above 0 and up to 16", 0 < self.width <= 16)
        check("dropout", "in [0, 1)", 0 <= self.dropout < 1)
        check("precision", f"one of {', '.join(PRECISIONS)}", self.precision in PRECISIONS)
        check("seed", "from 0 to 2^31 - 1", 0 <= self.seed < 2**31)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Raises InputError unless the keys are the settings' names."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise InputError(f"settings {', '.join(sorted(names ^ set(values)))} are missing or unknown")
        return cls(**values)

    def lr_at(self, step: int, steps: int) -> float:
        """The rate of a step, counted from 0, of a run of so many."""
        warm = steps // 10
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


_SHIPPED: dict[str, Any] = {
    "preset": "batchnorm",
    "epochs": 20,
    "batch_size": 64,
    "image_size": 96,
}
"""For the shipped images: minutes on two CPU cores."""

_PAPER: dict[str, Any] = {"preset": "paper", "epochs": 90, "batch_size": 128}
"""For --data: the paper's, section 5."""

_LR = {"batchnorm": 0.02}


def _fast_precision() -> str:
    """bf16 on CUDA and on CPUs with instructions for it; without them it is slower than 32 bits."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if native or torch.cuda.is_available() else "32"


def defaults(shipped: bool, preset: str | None = None) -> dict[str, Any]:
    """The settings where none are given, for the shipped images or for others; preset None is theirs."""
    values = dict(_SHIPPED if shipped else _PAPER)
    values["preset"] = preset or values["preset"]
    if values["preset"] not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {preset}")
    values.setdefault("image_size", PRESETS[values["preset"]].input_size)
    values |= {"lr": _LR.get(values["preset"], 0.01), "momentum": 0.9, "weight_decay": 5e-4}
    values |= {"width": 1.0, "dropout": 0.5, "seed": 0, "precision": _fast_precision()}
    return values
