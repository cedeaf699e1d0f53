"""Finds AlexNet's tensors in what people save: state dicts inside checkpoints, with the prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from alexnet_kernels._errors import InputError, shortened
from alexnet_kernels.models.formats.pickles import Made
from alexnet_kernels.models.formats.torch_file import MOST_READ, NoTensor, Planned

__all__ = ["LAYERS", "State", "find_state"]

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
_NORMS = ("bn1", "bn2", "bn3", "bn4", "bn5")
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that DataParallel, DistributedDataParallel, EMA, torch.compile and others insert into keys."""
_BESIDE = {"n_averaged"}
"""Entries of wrappers that are no weights."""
_DEPTH = 6
_ENTRIES = 100_000
_OVERLAPPING = 1 << 30
"""Bytes that a tensor may have whose storage has fewer."""


@dataclass
class State:
    """The tensors of one model."""

    tensors: dict[str, Tensor]
    where: str
    """The path of the model in what was given, such as state_dict.module; empty for a state dict itself."""
    left_out: list[str] = field(default_factory=list)
    """Keys beside the model in its state dict."""


@dataclass
class _Model:
    prefix: str
    dicts: set[str] = field(default_factory=set)
    """Paths of the dicts that hold it."""
    entries: dict[str, Any] = field(default_factory=dict)


def find_state(content: Any, name: str, part: str | None = None) -> State:
    """The one AlexNet in a state dict, a checkpoint or a module.

    content: nested mappings of tensors, arrays, `Planned` tensors and other values. name: for messages. part: the path
    of the model meant, or of a dict that holds it, such as state_dict_ema, where there are several. Raises InputError
    if there is no model, several different ones, or something else than dense tensors of numbers in one.
    """
    if not isinstance(content, (Mapping, nn.Module)) and not _is_module(content):
        kind = content.name if isinstance(content, Made) else type(content).__name__
        raise InputError(f"{name} holds a {shortened(kind)}, not a state dict")
    models: dict[str, _Model] = {}
    others: dict[str, list[tuple[str, Any]]] = {}
    for path, key, value in _entries(content):
        prefix, rest = _split(f"{path}.{key}" if path else key)
        if rest and part is not None and not f"{prefix}.".startswith(f"{part}."):
            continue
        if rest:
            model = models.setdefault(prefix, _Model(prefix))
            model.dicts.add(path)
            model.entries[rest] = value
        elif _is_value(value):
            others.setdefault(path, []).append((key, value))
    whole = [model for model in models.values() if any(key in model.entries for key in _FIRST)]
    whole = whole or list(models.values())
    planned = {value for model in whole for value in model.entries.values() if isinstance(value, Planned)}
    if (size := sum(value.nbytes for value in planned)) > MOST_READ:
        raise InputError(f"{name} holds {size:,} bytes of weights, more than the {MOST_READ:,} that are read of a file")
    made = [
        (model, {key: _tensor(value, name, model.prefix, key) for key, value in model.entries.items()})
        for model in whole
    ]
    kept = made[:1] + [other for other in made[1:] if not _equal(other[1], made[0][1])]
    if len(kept) > 1:
        found = ", ".join(f"{model.prefix or 'at the top'} ({len(model.entries)} tensors)" for model, _ in kept[:6])
        raise InputError(
            f"{name} holds several models: {found}; pass the one meant as a state dict, or to "
            "convert its name with --part"
        )
    if not kept:
        keys = ", ".join(shortened(str(key)) for key, _ in _items(content)[:6]) or "nothing"
        raise InputError(
            f"{name} holds no weights of AlexNet (features.0.weight or conv1.weight, ...)"
            f"{f' in {shortened(part)}' if part else ''}: it has {keys}"
        )
    model, tensors = kept[0]
    left_out = []
    for path in sorted(model.dicts):
        for key, value in others.get(path, []):
            full = f"{path}.{key}" if path else key
            inside = model.prefix in ("", path) or full.startswith(f"{model.prefix}.")
            if key.rsplit(".", 1)[-1] in _BESIDE:
                continue
            if inside:
                tensors[full.removeprefix(f"{model.prefix}." if model.prefix else "")] = _tensor(value, name, path, key)
            else:
                left_out.append(full)
    return State(tensors, model.prefix, left_out)


_FIRST = ("features.0.weight", "features.1.weight", "conv1.weight")


def _split(key: str) -> tuple[str, str]:
    """(prefix, key in the model) of a key, ("", "") if it is none of AlexNet's. Wrappers inside the model are dropped.

    A wrapper around the model is part of the prefix.
    """
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("features", "classifier"):
            inner = [p for p in parts[i + 1 :] if p not in _WRAPPERS]
            if len(inner) == 2 and inner[0].isdecimal():
                return ".".join(parts[:i]), ".".join((part, *inner))
        if part in LAYERS or part in _NORMS:
            inner = [p for p in parts[i + 1 :] if p not in _WRAPPERS]
            if len(inner) == 1:
                return ".".join(parts[:i]), f"{part}.{inner[0]}"
    return "", ""


def _entries(content: Any) -> Iterator[tuple[str, str, Any]]:
    """(path of the dict, key, value) of all dicts in `content`, but an optimizer's."""
    waiting: list[tuple[str, int, Any]] = [("", 0, content)]
    count = 0
    while waiting:
        path, depth, holder = waiting.pop(0)
        for key, value in _items(holder):
            count += 1
            if count > _ENTRIES:
                return
            if not isinstance(key, str) or (key.startswith("optim") and not _is_value(value)):
                continue
            if (
                isinstance(value, (Mapping, nn.Module))
                or _is_module(value)
                or (isinstance(value, Made) and value.entries)
            ):
                if depth < _DEPTH:
                    waiting.append((f"{path}.{key}" if path else key, depth + 1, value))
                continue
            yield path, key, value


def _items(holder: Any) -> list[tuple[Any, Any]]:
    if isinstance(holder, nn.Module):
        return list(holder.state_dict().items())
    if isinstance(holder, Mapping):
        return list(holder.items())
    if not _is_module(holder):
        return list(holder.entries.items())
    parts = [holder.state.get(part) for part in ("_parameters", "_buffers", "_modules")]
    return [
        (key, value) for part in parts if isinstance(part, dict) for key, value in part.items() if value is not None
    ]


def _is_module(value: Any) -> bool:
    """Whether it is a pickled nn.Module, which was read as data."""
    return isinstance(value, Made) and isinstance(value.state, dict) and isinstance(value.state.get("_modules"), dict)


def _is_value(value: Any) -> bool:
    return isinstance(value, (Tensor, Planned, NoTensor, numpy.ndarray))


def _tensor(value: Any, name: str, where: str, key: str) -> Tensor:
    full = f"{where}.{key}" if where else key
    if not _is_value(value):
        kind = "a pickled object" if isinstance(value, Made) else f"of type {type(value).__name__}"
        raise InputError(f"{name} is not a state dict of tensors: its entry {shortened(full)!r} is {kind}")
    if isinstance(value, numpy.ndarray):
        try:
            value = torch.from_numpy(numpy.ascontiguousarray(value))
        except TypeError as error:
            raise InputError(f"{name} holds {shortened(full)} as an array of {value.dtype}") from error
    kind = ""
    if isinstance(value, NoTensor):
        kind = value.kind
    elif isinstance(value, Tensor):
        if value.is_meta:
            kind = "a tensor without values (on the meta device)"
        elif value.is_quantized:
            kind = "a quantised tensor"
        elif value.layout != torch.strided:
            kind = "a sparse tensor"
        elif value.is_nested:
            kind = "a nested tensor"
        elif value.numel() * value.element_size() > max(_OVERLAPPING, value.untyped_storage().nbytes()):
            # An expanded tensor takes no memory before it is compared or copied.
            kind = f"{shortened(list(value.shape))} in {value.untyped_storage().nbytes():,} bytes"
    if kind:
        raise InputError(f"{name} holds {shortened(full)} as something else than a dense tensor: {kind}")
    if isinstance(value, Planned):
        try:
            return value.made
        except RuntimeError as error:
            raise InputError(f"{name} holds {shortened(full)} in {value.dtype}, which can't be read") from error
    return value.detach()


def _equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        value is others[key]
        or (value.shape == others[key].shape and value.dtype == others[key].dtype and _same(value, others[key]))
        for key, value in tensors.items()
    )


def _same(value: Tensor, other: Tensor) -> bool:
    """Whether the bits are equal, of any dtype."""
    a, b = (x.cpu().contiguous().reshape(-1).view(torch.uint8) for x in (value, other))
    return torch.equal(a, b)
