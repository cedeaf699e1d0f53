"""Starts the processes of a run on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from alexnet_kernels.training.distributed.environment import (
    FAILURE,
    LOOPBACK,
    STORE,
    file_store,
    watchdog_prefix,
)
from alexnet_kernels.training.distributed.watchdog import GRACE

__all__ = ["launch"]

_GRACE = 5 * GRACE
"""Seconds that the processes have to end by themselves once the run has failed."""
_INTERRUPTED = 130


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `alexnet-kernels` with the arguments in `count` processes. Returns the exit status of the first that failed.

    The processes get torchrun's environment variables. SIGINT and SIGTERM are forwarded to each of them. If a signal
    ends a process, the others end too.
    """
    file = os.memfd_create("alexnet-kernels store")
    # The pipe's other end, which nobody writes to, is closed when this process ends.
    starter, alive = os.pipe()
    failures = dist.PrefixStore(watchdog_prefix(), file_store(file))
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "alexnet_kernels", *arguments],
                    env=_environment(rank, count, f"{file},{starter}"),
                    pass_fds=(file, starter),
                    stdin=subprocess.DEVNULL,
                    # A terminal's Ctrl-C reaches this process alone.
                    start_new_session=True,
                )
            )
        return _wait(children, failures)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        for descriptor in (file, starter, alive):
            os.close(descriptor)


def _environment(rank: int, count: int, store: str) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        # Lightning wants to see an address. The processes meet in the store.
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": "0",
        STORE: store,
        "TORCHELASTIC_RUN_ID": "alexnet-kernels",
    }


def _wait(children: list[subprocess.Popen[bytes]], failures: Any) -> int:
    status, deadline = 0, None
    waiting = dict(enumerate(children))
    while waiting:
        for rank, child in list(waiting.items()):
            code = child.poll()
            if code is None:
                continue
            del waiting[rank]
            if code < 0 and deadline is None:
                reason = f"rank {rank} was ended by signal {-code} ({_signal_name(-code)})"
                failures.compare_set(FAILURE, "", json.dumps({"status": 1, "rank": rank, "reason": reason}))
                if not waiting:
                    print(f"alexnet-kernels: error: {reason}", file=sys.stderr)
            if code not in (0, _INTERRUPTED):
                status = status if status not in (0, _INTERRUPTED) else (code if code > 0 else 1)
                deadline = deadline or time.monotonic() + _GRACE
            elif not status:
                status = code
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return status


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in list(signal.Signals) else "unknown"
