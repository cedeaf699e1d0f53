"""Batches of stored images: their order, their shards, and the data loaders of a run."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels.training.image_set import Batch, StoredImages
from alexnet_kernels.training.prefetch import CudaCopies, Prefetcher
from alexnet_kernels.training.settings import Settings

__all__ = ["ImageDataModule", "ImageLoader", "ShardedBatchSampler", "ShuffledSampler"]


class ShuffledSampler(Sampler[int]):
    """The indices 0 ... length - 1 in an order that is a function of (seed, epoch).

    The next iteration starts at position `start` of that order.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 32) + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        start, self.start = self.start, 0
        return iter(order[start:])


class ShardedBatchSampler(BatchSampler):
    """One process's shard of each batch.

    With accumulation, the batch is first cut into its accumulated parts, and each part into shards. A part that doesn't
    split evenly is padded with its last index.

    Args:
        sampler, batch_size, drop_last: as for BatchSampler.
        shard: (index, count), which of `count` equal shards.
        accumulate: parts that a batch is processed in.
    """

    def __init__(
        self, sampler: Any, batch_size: int, drop_last: bool, shard: tuple[int, int] = (0, 1), accumulate: int = 1
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.shard, self.accumulate = shard, accumulate

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self.shard
        for indices in super().__iter__():
            if count == 1:
                yield indices
                continue
            length = -(-len(indices) // self.accumulate)
            own: list[int] = []
            for start in range(0, len(indices), length):
                part = indices[start : start + length]
                size = -(-len(part) // count)
                taken = part[index * size : (index + 1) * size]
                own += taken + [part[-1]] * (size - len(taken))
            yield own


class ImageLoader(DataLoader):
    """Batches of an image set, or a process's shards of them. Can resume between two batches of an epoch.

    Args:
        dataset: the images.
        batch_size: images per batch, over all shards.
        workers: processes that read images; threads of this one for a prepared set, which is not decoded, so that its
            images go without a copy between processes; none if the set is in memory.
        seed: seed of the order; None for the set's own order. Shuffled, an incomplete last batch is dropped.
        shard, accumulate: as for `ShardedBatchSampler`.
        device: where images and labels are wanted. To a CUDA device they are copied ahead of time, see `Prefetcher`.
            None or the CPU leaves them as they are read.
    """

    def __init__(
        self,
        dataset: StoredImages,
        batch_size: int,
        workers: int,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        accumulate: int = 1,
        device: torch.device | None = None,
    ) -> None:
        sampler = ShuffledSampler(len(dataset), seed) if seed is not None else SequentialSampler(dataset)
        drop_last = seed is not None and len(dataset) >= batch_size
        super().__init__(
            dataset,
            batch_sampler=ShardedBatchSampler(sampler, batch_size, drop_last, shard, accumulate),
            num_workers=0 if dataset.pixels is not None or dataset.use_threads(workers) else workers,
            collate_fn=_unchanged,
            worker_init_fn=_ignore_signals,
        )
        cuda = device is not None and device.type == "cuda"
        self.prefetcher = Prefetcher(CudaCopies(device)) if cuda else None  # type: ignore[arg-type]
        self.done = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        sampler = self.batch_sampler.sampler  # type: ignore[union-attr]
        self.done = getattr(sampler, "start", 0) // self.batch_sampler.batch_size  # type: ignore[union-attr]
        failure: InputError | RunError | None = None
        try:
            # Made in this thread: torch draws a seed for the processes from its generator.
            with closing(self._on_device(super().__iter__())) as batches:
                for batch in batches:
                    self.done += 1
                    yield batch
        except (InputError, RunError) as error:
            # From a process that reads images, the message holds a traceback, whose last line is the error's.
            line = str(error).strip().splitlines()[-1]
            failure = type(error)(line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: "))
        # Outside of the handler: the error refers to the iterator, whose processes end when it is freed.
        if failure is not None:
            raise failure

    def _on_device(self, batches: Iterator[Batch]) -> Generator[Batch]:
        yield from batches if self.prefetcher is None else self.prefetcher.iterate(batches)

    def without_padding(self, batch: int) -> int:
        """How many images of the process's shard of a batch are not padding. Padding comes last."""
        sampler: Any = self.batch_sampler
        index, shards = sampler.shard
        count = min(sampler.batch_size, len(self.dataset) - batch * sampler.batch_size)  # type: ignore[arg-type]
        size = -(-count // shards)
        return min(max(count - index * size, 0), size)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.sampler.start = (  # type: ignore[union-attr]
            state["batches"] % len(self) * self.batch_sampler.batch_size  # type: ignore[union-attr]
        )


def _unchanged(batch: Any) -> Any:
    # `StoredImages.__getitems__` returns whole batches.
    return batch


def _ignore_signals(worker: int) -> None:
    # Terminals and schedulers signal all processes. The readers must stay until the run has saved its step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class ImageDataModule(pl.LightningDataModule):
    """The training and validation sets of a run.

    shard: (index, count), this process's shard of each batch. device: as for `ImageLoader`.
    """

    def __init__(
        self,
        train: StoredImages,
        val: StoredImages,
        settings: Settings,
        workers: int,
        shard: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.settings, self.workers, self.shard, self.device = settings, workers, shard, device

    def train_dataloader(self) -> ImageLoader:
        settings = self.settings
        return ImageLoader(
            self.train, settings.batch_size, self.workers, settings.seed, self.shard, settings.accumulate, self.device
        )

    def val_dataloader(self) -> ImageLoader:
        return ImageLoader(
            self.val, max(self.settings.batch_size, 100), self.workers, shard=self.shard, device=self.device
        )
