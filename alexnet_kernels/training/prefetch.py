"""Batches copied to a CUDA device ahead of time: a thread that reads, pinned staging buffers, a copy stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from alexnet_kernels.training.image_set import Batch

__all__ = ["Copies", "CudaCopies", "Prefetcher"]

_BUFFERS = 2
"""Staging buffers: one is filled while the other is copied."""


class Copies(Protocol):
    """What `Prefetcher` asks of a device."""

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        """New pinned memory of so many elements."""
        ...

    def start(self, staged: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Begin to copy pinned tensors to the device. Returns the copies and the event at which they are complete."""
        ...

    def finish(self, event: Any) -> None:
        """Wait until the event: then the staging memory may be overwritten."""
        ...

    def take(self, copies: Sequence[Tensor], event: Any) -> None:
        """Make the caller's stream wait for the event, and keep the copies' memory for the work enqueued there."""
        ...


class CudaCopies:
    """Copies to a CUDA device on a stream of their own. **No GPU has run this yet.**"""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        with torch.cuda.device(self.device):
            return torch.empty(count, dtype=dtype, pin_memory=True)

    def start(self, staged: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in staged]
            return copies, self.stream.record_event(torch.cuda.Event(blocking=True))

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def take(self, copies: Sequence[Tensor], event: torch.cuda.Event) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in copies:
            # They were allocated on the copy stream, which could overwrite them as soon as they are freed.
            tensor.record_stream(stream)


class Prefetcher:
    """Copies the images and labels of batches to a device while the batches before them are in use.

    A thread reads the batches, fills staging buffers, which it reuses, and starts their copies. Indices and names stay
    on the CPU. While the thread runs, a CUDA graph can be captured in another with capture_error_mode="thread_local"
    only: the thread allocates memory and waits for events.

    Args:
        copies: the device.
        ahead: batches that are read ahead of the one in use.
    """

    def __init__(self, copies: Copies, ahead: int = 2) -> None:
        self.copies, self.ahead = copies, ahead
        self._buffers: list[dict[str, Tensor]] = [{} for _ in range(_BUFFERS)]
        self._copied: list[Any] = [None] * _BUFFERS
        self._next = 0

    def iterate(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """The batches, on the device, in order. An error of the reader is raised after the batches before it.

        One iteration runs at a time. Closing it ends the thread, after the batch that is being read.
        """
        ready: queue.SimpleQueue[tuple[Batch, list[Tensor], Any] | BaseException | None] = queue.SimpleQueue()
        free, closed = threading.Semaphore(self.ahead), threading.Event()

        def read() -> None:
            try:
                for batch in batches:
                    free.acquire()
                    if closed.is_set():
                        return
                    ready.put(self._send(batch))
                ready.put(None)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=read, name="alexnet-kernels-prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                free.release()
                batch, moved, event = item
                self.copies.take(moved, event)
                yield batch
        finally:
            closed.set()
            free.release()
            thread.join()

    def _send(self, batch: Batch) -> tuple[Batch, list[Tensor], Any]:
        number, self._next = self._next, (self._next + 1) % _BUFFERS
        if self._copied[number] is not None:
            self.copies.finish(self._copied[number])
        staged = [self._stage(number, name, batch[name]) for name in ("images", "labels")]  # type: ignore[literal-required]
        moved, self._copied[number] = self.copies.start(staged)
        images, labels = moved
        result: Batch = {"images": images, "labels": labels, "indices": batch["indices"], "bad": batch["bad"]}
        return result, moved, self._copied[number]

    def _stage(self, number: int, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the staging buffer, which grows to the largest."""
        buffers = self._buffers[number]
        if name not in buffers or buffers[name].numel() < tensor.numel():
            buffers[name] = self.copies.staging(tensor.numel(), tensor.dtype)
        return buffers[name][: tensor.numel()].view(tensor.shape).copy_(tensor)
