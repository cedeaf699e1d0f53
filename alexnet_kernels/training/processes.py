"""A run's processes: starting them, sums over them, and noticing the one that died or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alexnet_kernels._errors import InputError, RunError, first_line
from alexnet_kernels.models import AlexNet
from alexnet_kernels.parallel.plan import PLANS, problem, rows_of
from alexnet_kernels.training.settings import Settings

__all__ = ["TIMEOUT", "Parallel", "Team", "join", "launch"]

TIMEOUT = 600.0
"""Seconds without progress after which a run is taken to hang."""
BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without one after which a process is taken for dead; half the time without progress if that is less, so that
it is found first."""
_GRACE = 2.0
"""Seconds that a process has to end by itself once the run has failed; its children's, to the one that started
them, five times as many."""
_FAILURE = "failure"
_LAUNCHED = "alexnet-kernels"
"""The run id of processes that `launch` started."""


@dataclass(frozen=True)
class Parallel:
    """How a run is split over processes; InputError for values out of range."""

    plan: str = "towers"
    towers: int = 2
    traffic: str | None = None
    """bf16 or 16: bits of the activations on their way between processes; None: as they are."""
    fully_sharded: bool = False
    """Whether a process holds only a part of what the data-parallel ones have in common."""
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise InputError(f"--parallel must be one of {', '.join(PLANS)}, got {self.plan}")
        if self.towers < 1:
            raise InputError(f"--towers must be at least 1, got {self.towers}")
        if self.traffic not in (None, "bf16", "16"):
            raise InputError(f"--traffic must be bf16 or 16, got {self.traffic}")
        if self.timeout <= 0:
            raise InputError(f"--timeout must be positive, got {self.timeout}")

    def check(self, processes: int, settings: Settings | None = None) -> None:
        """InputError for a number of processes, a network or a batch that the plan doesn't split."""
        if processes % self.towers:
            raise InputError(
                f"--parallel {self.plan} of {self.towers} towers needs a multiple of {self.towers} processes, "
                f"got {processes}"
            )
        if settings is None:
            return
        model = AlexNet(2, settings.network(), width=settings.width, device="meta")
        if reason := problem(model, self.plan, self.towers):
            raise InputError(f"--parallel {self.plan}: {reason}")
        if settings.precision == "16":
            raise InputError("--precision 16 can't be used with --parallel; bf16, which needs no loss scaling, can")
        parts = rows_of(self.plan, 0, processes, self.towers)[1]
        if settings.batch_size % (parts * settings.accumulate):
            accumulated = f" x --accumulate {settings.accumulate}" if settings.accumulate > 1 else ""
            raise InputError(
                f"--batch-size {settings.batch_size} doesn't split evenly over the {parts} parts that "
                f"--parallel {self.plan} on {processes} processes makes of a batch{accumulated}"
            )

    def option(self) -> str:
        """What a command that goes on with the run ends with."""
        words = f" --parallel {self.plan}"
        if os.environ.get("TORCHELASTIC_RUN_ID") == _LAUNCHED:
            words += f" --processes {os.environ['WORLD_SIZE']}"
        if self.towers != 2:
            words += f" --towers {self.towers}"
        if self.traffic is not None:
            words += f" --traffic {self.traffic}"
        return words + " --fully-sharded" * self.fully_sharded


class Team:
    """The processes of a run, as one of them sees it; by itself, unless `join` made it."""

    def __init__(self, parallel: Parallel | None = None) -> None:
        self.parallel = parallel
        self.rank, self.size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.rows = (0, 1)
        """(index, count): which of equal parts of a batch is this process's."""
        self.folder: Path | None = None
        """The run's, for messages."""
        self.watch: Watch | None = None

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started the same command anew, after a failure."""
        return self.parallel is not None and _restarts() > 0

    @property
    def duplicates(self) -> int:
        """Processes that are given the same images."""
        return self.size // self.rows[1]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def highest(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.size == 1:
            return value
        most = torch.tensor(value)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns to rank 0, which alone calls it; where it raises InputError, all do."""
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
        """InputError on every process unless all give the same facts."""
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

    def moved(self) -> None:
        """Says that this process has made progress."""
        if self.watch is not None:
            self.watch.moves += 1

    def leave(self) -> None:
        """Ends the common part of the run, once all have come here; what follows is each process's own."""
        if self.watch is not None:
            self.moved()
            dist.barrier()
            self.watch.stop()

    def kept(self) -> str:
        """What is left of the run, as the end of a message."""
        if self.folder is None or not (self.folder / "last.ckpt").exists():
            return ""
        last = self.folder / "last.ckpt"
        how = "" if self.parallel is None else self.parallel.option()
        return f"; {last} is intact, go on from it with --resume {self.folder}{how}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def join(parallel: Parallel, device: str = "auto") -> Iterator[Team]:
    """Meets the run's other processes; an error that leaves the block ends all of them.

    The environment is torchrun's: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. The group
    sums tensors in main memory by gloo, on CUDA devices by NCCL. Raises InputError where it can't be set up, RunError
    where another process ends the run.
    """
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
    team.rows = rows_of(parallel.plan, team.rank, team.size, parallel.towers)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if team.local_size > torch.cuda.device_count():
            raise InputError(f"{team.local_size} processes need as many GPUs, there are {torch.cuda.device_count()}")
        torch.cuda.set_device(team.local_rank)
    watch = team.watch = Watch(team)
    try:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        try:
            # After the watch, whose message is the better one, has had its time.
            timeout = timedelta(seconds=parallel.timeout + 60)
            dist.init_process_group(
                backend, store=_store(team, timeout), rank=team.rank, world_size=team.size, timeout=timeout
            )
            watch.began.wait(watch.silence)
        except RuntimeError as error:
            raise RunError(f"the {team.size} processes of the run did not meet: {first_line(error)}") from error
        yield team
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        failure = watch.fail(error)
        if failure is None:
            raise
        watch.ended.set()
        raise RunError(failure["reason"] + team.kept()) from error
    finally:
        watch.stop()


def _store(team: Team, timeout: timedelta) -> Any:
    """Where the processes meet: torchrun's or `launch`'s, or else rank 0's."""
    hosts = team.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(*_address(), team.size, hosts, timeout, multi_tenant=True)
    # Of processes started anew: torch's own would find the addresses of those that are gone.
    return dist.PrefixStore(f"attempt/{_restarts()}", store)


class Watch(threading.Thread):
    """Ends this process where the run can't go on, with the reason.

    Each process puts a sign of life into the run's store every second and looks for that of the next rank. The first
    that finds a failure, its own or another's, leaves the reason in the store, where all find it within a second.
    """

    def __init__(self, team: Team) -> None:
        super().__init__(name="watch", daemon=True)
        self.team = team
        self.moves = 0
        self.began = threading.Event()
        """The first sign of life is there."""
        self.ended = threading.Event()
        """The main thread is on its way out."""
        assert team.parallel is not None
        self.timeout = team.parallel.timeout
        self.silence = min(SILENCE, self.timeout / 2)
        self.main = threading.main_thread().ident
        self._prefix = f"alexnet_kernels/{_restarts()}"
        self._address = _address()
        self._store: Any = None
        self._stopped = threading.Event()
        self.start()

    def stop(self) -> None:
        self._stopped.set()
        if threading.current_thread() is not self:
            self.join(5 * BEAT)

    def fail(self, error: BaseException) -> dict[str, Any] | None:
        """Tells all that this process fails; None if it is the first to, else what failed before it."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if not isinstance(error, InputError | RunError | KeyboardInterrupt | SystemExit):
                # An exchange that broke off is what another's end looks like from here; who it was is soon known.
                until = time.monotonic() + (self.silence + 3 * BEAT if _of_an_exchange(error) else 0)
                while (found := self._found()) is None and time.monotonic() < until:
                    time.sleep(BEAT / 4)
                if found is not None:
                    return found
            text = first_line(error)
            if not isinstance(error, InputError | RunError):
                text = f"{type(error).__name__}: {text}"
            if isinstance(error, KeyboardInterrupt):
                text = "interrupted"
            status = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            own = {"status": status, "rank": self.team.rank, "reason": f"rank {self.team.rank}: {text}"}
            self.ended.set()
            first = self._post(own)
            if first["rank"] != self.team.rank and first["reason"].split(": ", 1)[-1] == text:
                # All found the same, which one of them says.
                raise SystemExit(status)
        return None

    def run(self) -> None:
        try:
            self._store = dist.PrefixStore(
                self._prefix, dist.TCPStore(*self._address, timeout=timedelta(seconds=self.timeout))
            )
            self._watch()
        except RuntimeError:
            if not self._stopped.is_set():
                self._end(
                    {"status": 1, "reason": "the process that started the run, or its machine, is gone"},
                )

    def _watch(self) -> None:
        team, store = self.team, self._store
        following = (team.rank + 1) % team.size
        beats, heard, heard_at = 0, None, time.monotonic()
        moves, moved_at = self.moves, time.monotonic()
        store.set(f"beat/{team.rank}", str(beats))
        self.began.set()
        while not self._stopped.wait(BEAT):
            beats += 1
            store.set(f"beat/{team.rank}", str(beats))
            if (failure := self._found()) is not None:
                self._end(failure)
                return
            now = time.monotonic()
            if team.size > 1 and store.check([f"beat/{following}"]):
                last = store.get(f"beat/{following}")
                if last != heard:
                    heard, heard_at = last, now
                elif now - heard_at > self.silence:
                    reason = f"rank {following} gave no sign of life for {self.silence:g} s"
                    self._post({"status": 1, "rank": following, "reason": reason})
            if self.moves != moves:
                moves, moved_at = self.moves, now
            elif now - moved_at > self.timeout:
                self._hang(moves)
                moved_at = now

    def _hang(self, moves: int) -> None:
        """Finds which process it is that the others wait for."""
        place, exchanging = _place(self.main)
        self._store.set(f"place/{self.team.rank}", json.dumps([place, exchanging]))
        # The others' patience ends within a beat or two of this one's.
        time.sleep(4 * BEAT)
        if self.moves != moves:
            return
        places = {}
        for rank in range(self.team.size):
            if self._store.check([f"place/{rank}"]):
                places[rank] = json.loads(self._store.get(f"place/{rank}"))
        stuck = {rank: place for rank, (place, exchanging) in places.items() if not exchanging} or {
            rank: place for rank, (place, _) in places.items()
        }
        listed = ", ".join(f"rank {rank} in {place}" for rank, place in stuck.items())
        reason = f"no step ended for {self.timeout:g} s: {listed}"
        self._post({"status": 1, "rank": min(stuck), "reason": reason})

    def _found(self) -> dict[str, Any] | None:
        return json.loads(self._store.get(_FAILURE)) if self._store.check([_FAILURE]) else None

    def _post(self, failure: dict[str, Any]) -> dict[str, Any]:
        """The failure that holds: this, if it is the first."""
        return json.loads(self._store.compare_set(_FAILURE, "", json.dumps(failure)))

    def _end(self, failure: dict[str, Any]) -> None:
        """Ends the process unless its main thread does."""
        if self.ended.wait(_GRACE) or self._stopped.is_set():
            return
        # One write, so that the processes' lines stay whole.
        text = f"alexnet-kernels: error: rank {self.team.rank} ends: {failure['reason']}{self.team.kept()}\n"
        os.write(2, text.encode())
        os._exit(failure["status"])


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _of_an_exchange(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = f"{error}".lower()
    words = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "broken pipe")
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in words)


def _place(thread: int | None) -> tuple[str, bool]:
    """Where a thread is, as "function (file:line)", and whether it exchanges data with other processes there."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "no Python code", False
    stack = traceback.extract_stack(frame)
    files = [Path(entry.filename).as_posix() for entry in stack[-6:]]
    exchanging = any("torch/distributed/" in name or name.endswith("parallel/collectives.py") for name in files)
    last = stack[-1]
    # In backward the exchange is called by the engine, from below the main thread's last frame.
    exchanging = exchanging or files[-1].endswith("autograd/graph.py")
    return f"{last.name} ({Path(last.filename).name}:{last.lineno})", exchanging


def launch(count: int, arguments: Sequence[str]) -> int:
    """Runs `alexnet-kernels` with these arguments in `count` processes of this machine; the exit status of the first
    that failed.

    The processes' environment is torchrun's. SIGINT and SIGTERM are passed on once each. A process that a signal has
    ended takes the others with it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run = dist.PrefixStore("alexnet_kernels/0", store)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": _LAUNCHED,
        # Rank 0, too, finds the store instead of making it: it outlives all of them.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: Any) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "alexnet_kernels", *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    # A terminal's Ctrl-C comes here alone.
                    start_new_session=True,
                )
            )
        return _wait(children, run)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], run: Any) -> int:
    interrupted = 130
    status, deadline = 0, None
    waiting = dict(enumerate(children))
    while waiting:
        for rank, child in list(waiting.items()):
            code = child.poll()
            if code is None:
                continue
            del waiting[rank]
            if code < 0 and deadline is None:
                name = signal.Signals(-code).name if -code in list(signal.Signals) else "unknown"
                reason = f"rank {rank} was ended by signal {-code} ({name})"
                run.compare_set(_FAILURE, "", json.dumps({"status": 1, "rank": rank, "reason": reason}))
                if not waiting:
                    print(f"alexnet-kernels: error: {reason}", file=sys.stderr)
            if code not in (0, interrupted):
                status = status if status not in (0, interrupted) else (code if code > 0 else 1)
                deadline = deadline or time.monotonic() + 5 * _GRACE
            elif not status:
                status = code
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return status
