"""Devices, and the precision to compute in."""

from __future__ import annotations

import torch

from alexnet_kernels._errors import InputError

__all__ = ["autocast", "pick_device"]


def pick_device(name: str) -> torch.device:
    """The device called auto (CUDA if available, otherwise cpu), cpu, cuda or cuda:<n>.

    Raises InputError for another name and for a device that does not exist.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, colon, number = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (number.isascii() and number.isdigit() if colon else True)):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:<n>, got {name}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise InputError(f"--device {name}: torch {torch.__version__} finds {count} CUDA devices")
        return torch.device("cuda", int(number or 0))
    return torch.device("cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a run's precision. On the CPU, float16 is replaced by bfloat16."""
    low = {"bf16": torch.bfloat16, "16": torch.float16 if device.type == "cuda" else torch.bfloat16}
    return torch.autocast(device.type, low.get(precision), enabled=precision in low)
