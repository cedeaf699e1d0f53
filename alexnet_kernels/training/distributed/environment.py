"""What the processes of a run share: torchrun's environment variables, and the store in which they meet."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["FAILURE", "LAUNCHED", "attempt", "group_store", "is_launched", "master_address", "watchdog_prefix"]

LAUNCHED = "alexnet-kernels"
"""The run id of processes that `launch` started."""
FAILURE = "failure"
"""The store's key for the failure that ended the run: JSON of status, rank and reason."""


def master_address() -> tuple[str, int]:
    """Host and port of the store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def attempt() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_launched() -> bool:
    """Whether `launch` started this process, and not torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == LAUNCHED


def watchdog_prefix() -> str:
    """Prefix of the watchdogs' keys in the store."""
    return f"alexnet_kernels/{attempt()}"


def group_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store of the process group. torchrun or `launch` hosts it, otherwise rank 0."""
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*master_address(), size, hosts, timeout, multi_tenant=True)
    # With torch's own prefix, restarted processes would read the addresses of the processes before them.
    return dist.PrefixStore(f"attempt/{attempt()}", store)
