"""Reading ahead and copying to a device: with a device that copies as late as it may."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")

from runs import assert_same, shipped_images, train

from alexnet_kernels._errors import InputError
from alexnet_kernels.training import datasets
from alexnet_kernels.training.image_set import Batch
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.prefetch import Prefetcher
from alexnet_kernels.training.settings import settings_of


class Late:
    """A device whose copies read their source when somebody waits for them, and no earlier."""

    def __init__(self, fails_at: int = -1) -> None:
        self.lock, self.fails_at = threading.Lock(), fails_at
        self.log: list[tuple[str, int]] = []
        self.pending: dict[int, tuple[Sequence[Tensor], list[Tensor]]] = {}
        self.buffers = 0

    def staging(self, count: int, dtype: torch.dtype) -> Tensor:
        self.buffers += 1
        return torch.empty(count, dtype=dtype)

    def start(self, staged: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        with self.lock:
            event = sum(what == "start" for what, _ in self.log)
            if event == self.fails_at:
                raise RuntimeError("out of memory")
            copies = [torch.empty_like(tensor) for tensor in staged]
            self.pending[event] = (staged, copies)
            self.log.append(("start", event))
        return copies, event

    def finish(self, event: int) -> None:
        self._wait("finish", event)

    def take(self, copies: Sequence[Tensor], event: int) -> None:
        self._wait("take", event)

    def _wait(self, what: str, event: int) -> None:
        with self.lock:
            for source, copy in zip(*self.pending.pop(event, ((), ())), strict=True):
                copy.copy_(source)
            self.log.append((what, event))


def batches(sizes: Sequence[int]) -> Iterator[Batch]:
    for i, size in enumerate(sizes):
        images = torch.full((size, 4, 4, 3), i + 1, dtype=torch.uint8)
        indices = torch.arange(size)
        yield {"images": images, "labels": torch.full((size,), i), "indices": indices, "bad": [f"bad {i}"]}


def alone() -> bool:
    return not any(thread.name == "alexnet-kernels-prefetch" for thread in threading.enumerate())


def check(found: Sequence[Batch], sizes: Sequence[int]) -> None:
    for batch, expected in zip(found, batches(sizes), strict=True):
        for name in ("images", "labels", "indices"):
            assert torch.equal(batch[name], expected[name])
        assert batch["bad"] == expected["bad"]


def test_batches_arrive_in_order_through_two_buffers() -> None:
    device, sizes = Late(), [3, 5, 5, 5, 2, 5, 0, 1]
    prefetcher = Prefetcher(device)
    for _ in range(2):
        check(list(prefetcher.iterate(batches(sizes))), sizes)
        assert alone()
    # Two buffers of images and labels each, of which one grew from three images to five.
    assert device.buffers == 6
    started = [event for what, event in device.log if what == "start"]
    for event in started[2:]:
        assert device.log.index(("finish", event - 2)) < device.log.index(("start", event))
    assert [event for what, event in device.log if what == "take"] == started


def test_reads_a_few_batches_ahead() -> None:
    read: list[int] = []

    def counted() -> Iterator[Batch]:
        for batch in batches([2] * 50):
            read.append(1)
            yield batch

    iteration = Prefetcher(Late(), ahead=3).iterate(counted())
    check([next(iteration), next(iteration)], [2, 2])
    iteration.close()
    assert alone()
    # Two in use, three ahead, and one that waits for its turn.
    assert 2 <= len(read) <= 6


def test_an_error_of_the_reader_comes_after_the_batches_before_it() -> None:
    def failing() -> Iterator[Batch]:
        yield from batches([2, 2])
        raise InputError("damaged")

    found: list[Batch] = []
    with pytest.raises(InputError, match="damaged"):
        found.extend(Prefetcher(Late()).iterate(failing()))  # extend keeps what came before the error
    check(found, [2, 2])
    assert alone()


def test_an_error_of_the_device_is_raised() -> None:
    prefetcher = Prefetcher(Late(fails_at=2))
    found: list[Batch] = []
    with pytest.raises(RuntimeError, match="out of memory"):
        found.extend(prefetcher.iterate(batches([2] * 9)))
    check(found, [2, 2])
    assert alone()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("airplane", "ship"), train=12, val=3)


class TestLoader:
    def loader(self, data: Path) -> ImageLoader:
        loader = ImageLoader(datasets.open_data(data, 73)[0], 4, 0, seed=0)
        loader.prefetcher = Prefetcher(Late())
        return loader

    def test_its_state_counts_what_was_used(self, data: Path) -> None:
        whole, loader = list(self.loader(data)), self.loader(data)
        iteration = iter(loader)
        used = [next(iteration), next(iteration)]
        state = loader.state_dict()
        assert state == {"batches": 2}
        iteration.close()
        assert alone()
        resumed = self.loader(data)
        resumed.load_state_dict(state)
        indices = [batch["indices"].tolist() for batch in [*used, *resumed]]
        assert indices == [batch["indices"].tolist() for batch in whole]
        assert resumed.state_dict() == {"batches": 6}

    def test_a_run_has_the_same_bits(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = settings_of("quick", epochs=2, batch_size=8, image_size=64, width=0.04, precision="32")
        plain = train(settings, data, out=tmp_path / "plain").folder
        original = ImageLoader.__init__
        used: list[Late] = []

        def late(self: ImageLoader, *arguments: Any, **options: Any) -> None:
            original(self, *arguments, **options)
            used.append(Late())
            self.prefetcher = Prefetcher(used[-1])

        monkeypatch.setattr(ImageLoader, "__init__", late)
        train(settings, data, out=tmp_path / "run", max_seconds=1e-9)
        assert alone()
        train(settings, resume=tmp_path / "run")
        assert alone()
        assert_same(plain / "last.ckpt", tmp_path / "run" / "last.ckpt")
        assert all(device.log for device in used[2:])
