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

from alexnet_kernels.training.distributed.environment import FAILURE, LAUNCHED, watchdog_prefix
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
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failures = dist.PrefixStore(watchdog_prefix(), store)
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
                    env=_environment(rank, count, store.port),
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


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": LAUNCHED,
        # Rank 0, too, connects to this process's store, which outlives all ranks.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
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
