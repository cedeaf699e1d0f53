"""Writes the shards of a prepared set, in one process or several."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet_kernels._errors import RunError
from alexnet_kernels._files import atomic_file
from alexnet_kernels.training import decoding, shards
from alexnet_kernels.training.augmentation import PixelSums
from alexnet_kernels.training.source import Source

__all__ = ["ShardTask", "write_shards"]

_BLOCK = 64
"""Squares that a process holds before it writes them."""
_HEADER = 128
"""Bytes of the .npy header, for any number of images."""


@dataclass
class ShardTask:
    """One file of images to write, and the record that marks it as finished."""

    source: Source
    split: str
    number: int
    files: list[str]
    labels: list[int]
    size: int
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / f"record-{self.number:05d}.npz"

    @property
    def images(self) -> Path:
        return self.folder / shards.shard_name(self.number)

    def is_finished(self) -> bool:
        try:
            with np.load(self.record) as record:
                count = len(record["kept"])
            return self.images.stat().st_size == _HEADER + count * self.size**2 * 3
        except FileNotFoundError:
            return False


def write_shards(tasks: list[ShardTask], workers: int, progress: Callable[[int, int], None]) -> None:
    """Write the shards that are not finished.

    progress: called with the number of images done, those of finished shards included, and the total. Raises RunError
    if a process died.
    """
    total = sum(len(task.files) for task in tasks)
    waiting = [task for task in tasks if not task.is_finished()]
    before = total - sum(len(task.files) for task in waiting)
    progress(before, total)
    if workers <= 1 or len(waiting) <= 1:
        done = before
        for task in waiting:
            for count in _write_shard(task):
                done += count
                progress(done, total)
        return
    # A fork would not copy torch's threads.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(
        min(workers, len(waiting)), mp_context=context, initializer=_start_worker, initargs=(counter, stop)
    ) as pool:
        futures = _submit(pool, waiting)
        try:
            while futures:
                ready, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in ready:
                    future.result()
                progress(before + counter.value, total)
        except BrokenProcessPool as error:
            raise RunError(
                "a process that reads images was killed, perhaps for lack of memory; run the same command to continue, "
                "with fewer --workers if necessary"
            ) from error
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def _submit(pool: ProcessPoolExecutor, tasks: list[ShardTask]) -> set[Future[None]]:
    # The pool starts its processes here, and they inherit the signal mask. A terminal sends Ctrl-C to all processes;
    # only the first one handles it, and stops the others.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_work, task) for task in tasks}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


_counter: Any = None
_stop: Any = None


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _work(task: ShardTask) -> None:
    for count in _write_shard(task):
        with _counter.get_lock():
            _counter.value += count
        if _stop.is_set():
            return


def _write_shard(task: ShardTask) -> Iterator[int]:
    """Write a shard and then its record. Yields the number of images done since the last yield."""
    kept: list[int] = []
    checksums: list[int] = []
    notes: list[tuple[str, str, str]] = []
    size = task.size
    sums = PixelSums.of(torch.empty(0, size, size, 3, dtype=torch.uint8))
    with decoding.pillow_warnings_off(), atomic_file(task.images) as file:
        _write_header(file, len(task.files), size)
        block: list[torch.Tensor] = []
        for place, name in enumerate(task.files):
            try:
                content = task.source.open(name)
                mode = decoding.mode_of(content)
                block.append(decoding.decode(content, size))
            except Exception as error:
                if task.source.at_fault(error):
                    raise
                notes.append((name, "left out", decoding.error_reason(error)))
            else:
                kept.append(place)
                checksums.append(zlib.crc32(block[-1].numpy().data))
                if mode != "RGB":
                    notes.append((name, "converted", mode))
            if len(block) == _BLOCK or (block and place + 1 == len(task.files)):
                squares = torch.stack(block)
                sums += PixelSums.of(squares)
                file.write(squares.numpy().tobytes())
                block = []
            yield 1
        file.seek(0)
        _write_header(file, len(kept), size)
        file.seek(0, os.SEEK_END)
    record = {
        "kept": np.array(kept, dtype=np.int64),
        "checksums": np.array(checksums, dtype=np.uint32),
        "count": np.array(sums.count),
        "places": sums.places.numpy(),
        "products": sums.products.numpy(),
        "notes": np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8),
    }
    with atomic_file(task.record) as file:
        np.savez(file, **record)  # type: ignore[arg-type]


def _write_header(file: Any, count: int, size: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)
