"""What the processes of a run share: torchrun's environment variables, and the store in which they meet."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = [
    "FAILURE",
    "LOOPBACK",
    "STORE",
    "StoreAddress",
    "attempt",
    "file_store",
    "group_store",
    "is_launched",
    "on_one_machine",
    "watchdog_prefix",
]

LOOPBACK = "127.0.0.1"
STORE = "ALEXNET_KERNELS_STORE"
"""The variable by which `launch` tells its processes two descriptors, see `StoreAddress`."""
FAILURE = "failure"
"""The store's key for the failure that ended the run: JSON of status, rank and reason."""


def attempt() -> int:
    """How often torchrun has restarted the processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_launched() -> bool:
    """Whether `launch` started this process, and not torchrun."""
    return STORE in os.environ


def watchdog_prefix() -> str:
    """Prefix of the watchdogs' keys in the store."""
    return f"alexnet_kernels/{attempt()}"


def on_one_machine() -> bool:
    """Whether all processes of the run are on this machine."""
    host = os.environ["MASTER_ADDR"]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback or _all_are_local()
    return host == "localhost" or _all_are_local()


def _all_are_local() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


class StoreAddress(NamedTuple):
    """Where the processes of a run meet.

    Those that `launch` started inherit a file without a name, which no other process can open. Otherwise it is a port:
    torchrun's, or one that rank 0 hosts, on one machine for its own processes only.
    """

    file: int | None
    """Descriptor of the inherited file."""
    starter: int | None
    """Descriptor of a pipe that ends when the process of `launch` does."""
    host: str
    port: int

    @classmethod
    def of_environment(cls) -> StoreAddress:
        if is_launched():
            file, starter = map(int, os.environ[STORE].split(","))
            return cls(file, starter, "", 0)
        host = LOOPBACK if on_one_machine() and not _torchrun_hosts() else os.environ["MASTER_ADDR"]
        return cls(None, None, host, int(os.environ["MASTER_PORT"]))

    def connect(self, timeout: timedelta, **options: Any) -> Any:
        """The store. options: those of TCPStore."""
        if self.file is None:
            return dist.TCPStore(self.host, self.port, timeout=timeout, **options)
        store = file_store(self.file)
        store.set_timeout(timeout)
        return store

    def starter_is_gone(self) -> bool:
        """Whether the process of `launch` has ended."""
        return self.starter is not None and bool(select.select([self.starter], [], [], 0)[0])


def file_store(file: int) -> Any:
    """The store in an open file of this process."""
    return dist.FileStore(f"/proc/self/fd/{file}")


def _torchrun_hosts() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def group_store(rank: int, size: int, timeout: timedelta) -> Any:
    """The store of the process group. torchrun or `launch` hosts it, otherwise rank 0."""
    address = StoreAddress.of_environment()
    options: dict[str, Any] = {}
    if address.file is None:
        hosts = rank == 0 and not _torchrun_hosts()
        options = {"world_size": size, "is_master": hosts, "multi_tenant": True}
        if hosts and address.host == LOOPBACK:
            # By itself, the store would listen on every interface.
            listener = socket.create_server((address.host, address.port))
            options["master_listen_fd"] = listener.detach()
    # With torch's own prefix, restarted processes would read the addresses of the processes before them.
    return dist.PrefixStore(f"attempt/{attempt()}", address.connect(timeout, **options))
