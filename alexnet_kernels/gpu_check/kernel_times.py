"""Times of the kernels in a network's step, measured by torch.profiler."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels.bench.network_row import NetRow
from alexnet_kernels.bench.network_variant import NetVariant

STEPS = 3
MARK = "alexnet_kernels.gpu_check call "


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Operators(TorchDispatchMode):
    """Numbers a step's operators, and counts the bytes of their arguments and results, each tensor once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.calls)
        self.calls.append((str(func), 0))
        with torch.profiler.record_function(f"{MARK}{number}"):
            out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = {id(t): t for t in _tensors([args, kwargs or {}, out])}
            nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
            self.calls[number] = (str(func), nbytes)
        return out


def table(row: NetRow, variant: str, device: torch.device) -> dict[str, Any]:
    """{"step_us", "kernels": [...], "operators": [...]} of one step, longest first, times in microseconds.

    A kernel is {"name", "calls", "us", "share", "bytes"?}, an operator {"name", "bytes", "calls", "us", "share",
    "kernels"}. Bytes are those of an operator's arguments and results; a kernel has "bytes" if its operator launches
    only this kernel. On a CPU, operators stand in for kernels.
    """
    step = NetVariant(row, variant, device)
    for _ in range(2):
        step.call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    modes = [_Operators() for _ in range(STEPS)]
    with torch.profiler.profile(activities=activities) as profiler:
        for mode in modes:
            with mode:
                step.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    steps = [mode.calls for mode in modes]
    return summary(list(_launched(profiler.events(), steps, device.type == "cuda")))


def _launched(
    events: Any, steps: list[list[tuple[str, int]]], cuda: bool
) -> Iterator[tuple[str, int, list[tuple[str, float]]]]:
    """(operator, bytes, [(kernel, us)]) for every operator call of the steps."""
    seen: Counter[int] = Counter()  # by call number: the steps seen so far
    for event in sorted(events, key=lambda e: e.time_range.start):
        if not event.name.startswith(MARK) or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        number = int(event.name.removeprefix(MARK))
        name, nbytes = steps[seen[number]][number]
        seen[number] += 1
        kernels = list(_kernels(event)) if cuda else [(name, event.time_range.elapsed_us())]
        if kernels:
            yield name, nbytes, kernels


def _kernels(event: FunctionEvent) -> Iterator[tuple[str, float]]:
    for kernel in event.kernels:
        yield kernel.name, kernel.duration
    for child in event.cpu_children:
        if not child.name.startswith(MARK):
            yield from _kernels(child)


def _demangled(names: Iterable[str]) -> dict[str, str]:
    """Demangled C++ names by mangled name; empty without c++filt."""
    mangled = sorted({name for name in names if name.startswith("_Z")})
    tool = shutil.which("c++filt")
    if not mangled or tool is None:
        return {}
    done = subprocess.run([tool], input="\n".join(mangled), capture_output=True, text=True)
    readable = done.stdout.splitlines()
    return dict(zip(mangled, readable, strict=True)) if len(readable) == len(mangled) else {}


def summary(launched: list[tuple[str, int, list[tuple[str, float]]]]) -> dict[str, Any]:
    """Means over the STEPS steps of the calls that `_launched` yields."""
    kernels: dict[tuple[str, int | None], list[float]] = {}
    operators: dict[tuple[str, int], list[tuple[float, tuple[str, ...]]]] = {}
    readable = _demangled(kernel for _, _, inside in launched for kernel, _ in inside)
    for name, nbytes, launches in launched:
        inside = [(readable.get(kernel, kernel), us) for kernel, us in launches]
        operators.setdefault((name, nbytes), []).append((sum(us for _, us in inside), tuple(k for k, _ in inside)))
        for kernel, us in inside:
            kernels.setdefault((kernel, nbytes if len(inside) == 1 else None), []).append(us)
    total = sum(us for _, _, inside in launched for _, us in inside) / STEPS or 1.0

    def line(times: list[float]) -> dict[str, Any]:
        us = sum(times) / STEPS
        return {"calls": round(len(times) / STEPS, 2), "us": round(us, 2), "share": round(us / total, 4)}

    def longest_first(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(entries, key=lambda entry: -entry["us"])

    return {
        "step_us": round(total, 1),
        "kernels": longest_first(
            {"name": name, **line(times), **({} if nbytes is None else {"bytes": nbytes})}
            for (name, nbytes), times in kernels.items()
        ),
        "operators": longest_first(
            {
                "name": name,
                "bytes": nbytes,
                **line([us for us, _ in seen]),
                "kernels": sorted({kernel for _, names in seen for kernel in names}),
            }
            for (name, nbytes), seen in operators.items()
        ),
    }
