"""Devices, copies to them, and autocast."""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_kernels._errors import InputError

__all__ = ["autocast", "pick_device", "send"]


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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A copy from the CPU to a CUDA device goes through pinned memory and is not waited for.

    The pinned memory is torch's, which reuses it after the copy.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a run's precision: none for 32 and bf16-pure. On the CPU, float16 is replaced by bfloat16."""
    low = {"bf16": torch.bfloat16, "16": torch.float16 if device.type == "cuda" else torch.bfloat16}
    return torch.autocast(device.type, low.get(precision), enabled=precision in low)
