"""The processes of a run: joining them, sums over them, and checks that they agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alexnet_kernels._errors import InputError, RunError, first_line
from alexnet_kernels.parallel.plan import batch_shard
from alexnet_kernels.training.distributed.config import ParallelConfig
from alexnet_kernels.training.distributed.environment import attempt, group_store, on_one_machine
from alexnet_kernels.training.distributed.watchdog import Watchdog

__all__ = ["Team", "join"]


class Team:
    """The processes of a run, seen from one of them. Without `join`, a team of one process.

    Attributes:
        rank, size: this process's rank, and the number of processes.
        local_rank, local_size: the same among the processes of this machine.
        batch_shard: (index, count), which of `count` equal shards of a batch is this process's.
        folder: the run's folder, for messages.
    """

    def __init__(self, parallel: ParallelConfig | None = None) -> None:
        self.parallel = parallel
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.batch_shard = (0, 1)
        self.folder: Path | None = None
        self.watchdog: Watchdog | None = None

    @property
    def restarted(self) -> bool:
        """Whether torchrun has restarted the command after a failure."""
        return self.parallel is not None and attempt() > 0

    @property
    def duplicates(self) -> int:
        """Number of processes that have the same batch shard."""
        return self.size // self.batch_shard[1]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: int) -> int:
        """The maximum over all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The result of `make`, which only rank 0 calls. If it raises InputError, every process does."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        error: InputError | None = None
        if self.rank == 0:
            try:
                made = [make(), None]
            except InputError as raised:
                made, error = [None, str(raised)], raised
        dist.broadcast_object_list(made, 0)
        if made[1] is not None:
            raise error or InputError(made[1])
        return made[0]

    def check_same(self, **facts: Any) -> None:
        """Raise InputError on every process unless the facts are the same on all."""
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, facts)
        for name in facts:
            differing = [rank for rank, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]]
            if differing:
                rank = differing[0]
                raise InputError(
                    f"the processes differ in {name.replace('_', ' ')}: rank 0 has {_short(everyone[0][name])}, "
                    f"rank {rank} {_short(everyone[rank][name])}"
                )

    def report_progress(self) -> None:
        """Tell the watchdog that this process has made progress."""
        if self.watchdog is not None:
            self.watchdog.progress += 1

    def finish(self) -> None:
        """Wait until all processes get here, then stop the watchdog: what follows needs no other process."""
        if self.watchdog is not None:
            self.report_progress()
            dist.barrier()
            self.watchdog.stop()

    def resume_hint(self) -> str:
        """The end of an error message: how to resume the run, if it has a checkpoint; otherwise empty."""
        if self.folder is None or not (self.folder / "last.ckpt").exists():
            return ""
        options = "" if self.parallel is None else self.parallel.resume_options()
        return f"; {self.folder / 'last.ckpt'} is intact, resume from it with --resume {self.folder}{options}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def join(parallel: ParallelConfig, device: str = "auto") -> Iterator[Team]:
    """Join the other processes of the run. An error that leaves the block ends all of them.

    The environment is torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Collectives
    on CPU tensors use gloo, those on CUDA tensors NCCL.

    Raises:
        InputError: missing variables, or a number of processes that the plan or the machine doesn't allow.
        RunError: the processes did not meet, or another process ended the run.
    """
    team = _team(parallel, device)
    watchdog = team.watchdog = Watchdog(team.rank, team.size, parallel.timeout, team.resume_hint)
    try:
        _initialize(team, parallel, device)
        watchdog.started.wait(watchdog.silence)
        yield team
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        failure = watchdog.fail(error)
        if failure is None:
            raise
        watchdog.ending.set()
        raise RunError(failure["reason"] + team.resume_hint()) from error
    finally:
        watchdog.stop()


def _team(parallel: ParallelConfig, device: str) -> Team:
    """The team that the environment describes."""
    team = Team(parallel)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(f"{', '.join(missing)} are not set: start the processes with torchrun or --processes")
    team.rank, team.size, team.local_rank = (int(os.environ[name]) for name in names[:3])
    team.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", team.size))
    parallel.check(team.size)
    if team.size % team.local_size:
        raise InputError(f"{team.size} processes in all are no multiple of the {team.local_size} on this machine")
    team.batch_shard = batch_shard(parallel.plan, team.rank, team.size, parallel.towers)
    if _uses_cuda(device):
        if team.local_size > torch.cuda.device_count():
            raise InputError(f"{team.local_size} processes need as many GPUs, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(team.local_rank)
    return team


def _uses_cuda(device: str) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _initialize(team: Team, parallel: ParallelConfig, device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if _uses_cuda(device) else "gloo"
    try:
        # Longer than the watchdog's timeout, whose message says more.
        timeout = timedelta(seconds=parallel.timeout + 60)
        if on_one_machine():
            # By itself, gloo would listen on the address of the machine's name.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = group_store(team.rank, team.size, timeout)
        dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size, timeout=timeout)
    except RuntimeError as error:
        raise RunError(f"the {team.size} processes of the run did not meet: {first_line(error)}") from error
