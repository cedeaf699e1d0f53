"""Collectives between towers, in two halves each so that work fits between, and a count of what they send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "Side", "all_reduce", "count_traffic", "exchanged", "part_of"]

_counters: list[Counter[str]] = []
# Its name from torch 2.14 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Counts the bytes that this rank sends inside the block, by what they are for: "conv3", "gradients"...

    An all-gather or all-to-all over T ranks sends what a rank has to T - 1 others; an all-reduce counts as a ring's,
    2 (T - 1) / T of its tensor. What `fully_sharded` parameters send is not counted: as much as their gradients'
    all-reduce.
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def _count(name: str, sent: int) -> None:
    for counter in _counters:
        counter[name] += sent


@dataclass(frozen=True)
class Side:
    """This rank's place in a process group."""

    group: Any
    rank: int
    size: int


def part_of(count: int, rank: int, size: int) -> slice:
    """A rank's part of `count` things, as DTensor's Shard cuts them: the last ones may have fewer, or none."""
    each = -(-count // size)
    return slice(min(rank * each, count), min((rank + 1) * each, count))


def all_reduce(name: str, tensor: Tensor, side: Side, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> Any:
    """In place; with wait=False, the work to wait for."""
    _count(name, 2 * (side.size - 1) * tensor.numel() * tensor.element_size() // side.size)
    return dist.all_reduce(tensor, op, side.group, async_op=not wait)


class Exchange:
    """Each rank's tensor to all ranks of a side, and each one's gradient with respect to it back to its owner.

    Args:
        name: what `count_traffic` calls it.
        dtype: floating-point type of what travels; None for the tensor's own.
    """

    def __init__(self, name: str, side: Side, dtype: torch.dtype | None = None) -> None:
        self.name, self.side, self.dtype = name, side, dtype
        self._work: Any = None
        self._sent = self._received = torch.empty(0)

    def start(self, x: Tensor) -> Tensor:
        """Begins sending x; [T, *x.shape], rank r's at r, to be read after `wait`."""
        self._sent = x.to(self.dtype or x.dtype).contiguous()
        received = self._sent.new_empty(self.side.size, *x.shape)
        self._work = _all_gather(_bytes(received), _bytes(self._sent), self.side.group, async_op=True)
        _count(self.name, (self.side.size - 1) * self._sent.numel() * self._sent.element_size())
        return received

    def wait(self) -> None:
        self._work.wait()
        self._work, self._sent = None, torch.empty(0)

    def send(self, parts: Tensor) -> Tensor:
        """Begins sending parts[r] to rank r; what was sent."""
        self._sent = parts.to(self.dtype or parts.dtype).contiguous()
        self._received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(
            _bytes(self._received), _bytes(self._sent), group=self.side.group, async_op=True
        )
        _count(self.name, (self.side.size - 1) * self._sent[0].numel() * self._sent.element_size())
        return self._sent

    def receive(self) -> Tensor:
        """[T, *shape]: from rank r at r."""
        self.wait()
        received, self._received = self._received, torch.empty(0)
        return received


def _bytes(x: Tensor) -> Tensor:
    # Not every backend knows every dtype.
    return x.view(-1).view(torch.uint8)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.dtype, ctx.rank = exchange, x.dtype, exchange.side.rank
        return exchange.start(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, unfinished: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.receive().sum(0, dtype=ctx.dtype), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, exchange: Exchange, dtype: torch.dtype) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return received.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Autograd goes on with what was computed between the halves, and `_Start` takes what came back.
        return ctx.exchange.send(grad), None, None


def exchanged(x: Tensor, exchange: Exchange) -> tuple[Tensor, Any]:
    """Begins an exchange that autograd knows; (unfinished, finish): finish(unfinished) is [T, *x.shape] in x's dtype.

    What is computed of x before finish overlaps the exchange, and its backward the gradient's way back.
    """
    unfinished = _Start.apply(x, exchange)
    return unfinished, lambda received: _Wait.apply(received, exchange, x.dtype)
