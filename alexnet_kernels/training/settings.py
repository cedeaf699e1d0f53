"""The settings that a training run's result depends on, the recipes that fill them in, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels._files import write_atomically
from alexnet_kernels.models import PRESETS, Preset
from alexnet_kernels.models.presets import variant

__all__ = [
    "PRECISIONS",
    "PURE",
    "RECIPES",
    "SCHEDULES",
    "Settings",
    "default_recipe",
    "load_recipe",
    "recipe_names",
    "save_recipe",
    "settings_of",
]

PURE = "bf16-pure"
PRECISIONS = ("auto", "32", "bf16", "16", PURE)
SCHEDULES = ("plateau", "step", "dexp", "linear", "cosine", "constant")
RECIPES = Path(__file__).parent.parent / "recipes"
"""The folder of the recipes that come with the package."""


def _setting(help: str, choices: Sequence[str] | None = None, default: Any = MISSING) -> Any:
    """A field with its help and choices. `default` is for recipes that do not set it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run's result depends on; each field is an option of `train`. InputError for a value out of range."""

    preset: str = _setting("the network", tuple(PRESETS))
    activation: str = _setting("the nonlinearity; with tanh, biases start at 0", ("relu", "tanh"), default="relu")
    pooling: str = _setting(
        "max-pooling windows: the preset's, 3 x 3 (overlapping) or 2 x 2 (plain), with stride 2",
        ("preset", "overlapping", "plain"),
        default="preset",
    )
    norm: str = _setting("the preset's normalisation layers, or none", ("preset", "none"), default="preset")
    width: float = _setting("factor on the number of filters and neurons", default=1.0)
    dropout: float = _setting("dropout probability of fc6 and fc7", default=0.5)
    init: str = _setting(
        "initial weights: the preset's, or normal ones of variance 2 / fan-in", ("preset", "he"), default="preset"
    )
    image_size: int = _setting("side of the network's input, in pixels")
    mean: str = _setting(
        "what is subtracted from images: the mean image, or each channel's mean", ("image", "channel"), default="image"
    )
    color_shift: float = _setting(
        "standard deviation of the colour components' random multiples; 0 disables them", default=0.1
    )
    epochs: int = _setting("passes over the training images")
    batch_size: int = _setting("images per step")
    accumulate: int = _setting("parts that a batch is processed in, to save memory", default=1)
    lr: float = _setting("maximum learning rate")
    schedule: str = _setting("schedule of the learning rate, see docs/training.md", SCHEDULES)
    warmup: float = _setting("fraction of the run in which the rate rises from near 0", default=0.0)
    lr_factor: float = _setting("factor on the rate at each drop (plateau, step, dexp)", default=0.1)
    lr_drops: int = _setting("number of drops (plateau, dexp)", default=3)
    lr_epochs: tuple[int, ...] = _setting("epochs after which the rate drops (step), such as 30,60,80", default=())
    patience: int = _setting("epochs without a new best validation error before a drop (plateau)", default=5)
    rule: str = _setting(
        "update rule of SGD: the paper's, with lr inside the momentum, or torch's", ("paper", "torch"), default="paper"
    )
    momentum: float = _setting("momentum of SGD", default=0.9)
    weight_decay: float = _setting("weight decay of SGD", default=5e-4)
    bias_lr: float = _setting("factor on the biases' learning rate", default=1.0)
    bias_decay: float = _setting("factor on the biases' weight decay", default=1.0)
    precision: str = _setting(
        "32; bf16 or 16: activations of 16 bits, weights of float32; bf16-pure: both bfloat16, with float32 masters in "
        "the optimizer; auto (the default): bf16-pure on GPUs that have bfloat16, bf16 on CPUs that do, else 32",
        PRECISIONS,
        default="auto",
    )
    seed: int = _setting("seed of initial weights, order, crops and dropout", default=0)

    def __post_init__(self) -> None:
        if isinstance(self.lr_epochs, list):
            object.__setattr__(self, "lr_epochs", tuple(self.lr_epochs))
        for setting in fields(self):
            self._check_type(setting.name, str(setting.type))
            if choices := setting.metadata["choices"]:
                self._check(setting.name, f"one of {', '.join(choices)}", getattr(self, setting.name) in choices)
        check = self._check
        check("width", "a factor above 0 and up to 16", 0 < self.width <= 16)
        check("dropout", "in [0, 1)", 0 <= self.dropout < 1)
        check("image_size", "from 1 to 4096", 1 <= self.image_size <= 4096)
        check("color_shift", "from 0 to 10", 0 <= self.color_shift <= 10)
        check("epochs", "at least 1 and at most a million", 1 <= self.epochs <= 10**6)
        check("batch_size", "at least 1 and at most a million", 1 <= self.batch_size <= 10**6)
        check("accumulate", "from 1 to the batch size", 1 <= self.accumulate <= self.batch_size)
        check("lr", "a positive number", 0 < self.lr < math.inf)
        check("warmup", "in [0, 1)", 0 <= self.warmup < 1)
        check("lr_factor", "in (0, 1]", 0 < self.lr_factor <= 1)
        check("lr_drops", "not negative and at most a million", 0 <= self.lr_drops <= 10**6)
        rising = list(self.lr_epochs) == sorted(set(self.lr_epochs)) and min(self.lr_epochs, default=1) >= 1
        check("lr_epochs", "rising numbers from 1 on", rising)
        check("patience", "at least 1 and at most a million", 1 <= self.patience <= 10**6)
        check("momentum", "in [0, 1)", 0 <= self.momentum < 1)
        check("weight_decay", "a number that is not negative", 0 <= self.weight_decay < math.inf)
        check("bias_lr", "a number that is not negative", 0 <= self.bias_lr < math.inf)
        check("bias_decay", "a number that is not negative", 0 <= self.bias_decay < math.inf)
        check("seed", "from 0 to 2^31 - 1", 0 <= self.seed < 2**31)

    def _check(self, name: str, allowed: str, ok: bool) -> None:
        if not ok:
            given = shortened(getattr(self, name))
            raise InputError(f"--{name.replace('_', '-')} must be {allowed}, got {given}")

    def _check_type(self, name: str, expected: str) -> None:
        value = getattr(self, name)
        kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "tuple[int, ...]": tuple}
        words = {"str": "a word", "int": "a whole number", "float": "a number", "tuple[int, ...]": "whole numbers"}
        right = isinstance(value, kinds[expected]) and not isinstance(value, bool)
        if isinstance(value, tuple):
            right = right and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        if isinstance(value, int) and expected == "float":
            right = right and abs(value) < 2**53
        self._check(name, words[expected], right)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Raises InputError unless the keys are the settings' names."""
        names = {setting.name for setting in fields(cls)}
        if set(values) != names:
            raise InputError(f"settings {', '.join(sorted(names ^ set(values)))} are missing or unknown")
        return cls(**values)

    def network(self) -> Preset:
        """The preset with the activation, pooling, normalisation and initial values of these settings."""
        return variant(self.preset, activation=self.activation, pooling=self.pooling, norm=self.norm, init=self.init)

    def lr_at(self, step: int, steps_per_epoch: int, errors: Sequence[float]) -> float:
        """The learning rate of a step, counted from 0. errors: validation error after each epoch so far."""
        steps = self.epochs * steps_per_epoch
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        if self.schedule == "constant":
            return self.lr
        # Without warm-up the rate starts at its maximum and ends one step above 0.
        past = (step - warm) / max(1, steps - warm)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * past))
        if self.schedule == "linear":
            return self.lr * (1 - past)
        if self.schedule == "dexp":
            drops = min(self.lr_drops, int((self.lr_drops + 1) * step / steps))
        elif self.schedule == "step":
            drops = sum(step >= epoch * steps_per_epoch for epoch in self.lr_epochs)
        else:
            drops = min(self.lr_drops, stalls(errors, self.patience))
        return self.lr * self.lr_factor**drops


def stalls(errors: Sequence[float], patience: int) -> int:
    """How often `patience` consecutive epochs passed without a new lowest error."""
    count, since, best = 0, 0, math.inf
    for error in errors:
        since += 1
        if error < best:
            best, since = error, 0
        elif since == patience:
            count, since = count + 1, 0
    return count


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The settings in a YAML file or in the package's recipe of that name. Raises InputError if it is not valid."""
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise InputError(f"--recipe {name}: there is no such recipe; give one of {known}, or the path of a .yaml file")
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"--recipe {name} can't be read: {error.strerror or error}") from error
    except Exception as error:
        # PyYAML's constructors raise errors of many types.
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(f"--recipe {name} is not readable YAML: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"--recipe {name} must map names of settings to values")
    names = [setting.name for setting in fields(Settings)]
    unknown = [shortened(key) for key in content if key not in names]
    if unknown:
        raise InputError(f"--recipe {name} sets {', '.join(unknown)}, which is none of {', '.join(names)}")
    for key, value in content.items():
        # YAML reads 1e-4 as a string.
        if isinstance(value, str) and str(Settings.__dataclass_fields__[key].type) == "float":
            try:
                content[key] = float(value)
            except ValueError:
                raise InputError(f"--recipe {name}: {key} must be a number, got {shortened(value)}") from None
        if key == "precision":
            content[key] = shortened(value)
    return content


def settings_of(recipe: str, **values: Any) -> Settings:
    """A recipe's settings, overridden by `values`."""
    merged = {**load_recipe(recipe), **values}
    merged.setdefault("preset", "paper")
    if not isinstance(merged["preset"], str) or merged["preset"] not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {shortened(merged['preset'])}")
    merged.setdefault("image_size", PRESETS[merged["preset"]].input_size)
    missing = [s.name for s in fields(Settings) if s.default is MISSING and s.name not in merged]
    if missing:
        raise InputError(f"--recipe {recipe} must set {', '.join(missing)}")
    return Settings(**merged)


def save_recipe(settings: Settings, path: Path) -> None:
    """Write all settings as a recipe."""
    import yaml

    content = {**settings.to_dict(), "lr_epochs": list(settings.lr_epochs)}
    write_atomically(path, "# Every setting of this run.\n" + yaml.safe_dump(content, sort_keys=False))


def default_recipe(shipped: bool, preset: str | None, parallel: bool = False) -> str:
    """The recipe for the package's images (one with towers if the run is parallel), or the preset's for others."""
    if shipped:
        return "cifar" if parallel else "quick"
    return preset or "paper"
