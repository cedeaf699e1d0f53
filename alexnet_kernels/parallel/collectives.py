"""Collectives between towers, split into start and wait so that computation overlaps them, and a byte count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Exchange", "Group", "all_reduce", "count_traffic", "exchanged", "shard_slice"]

_counters: list[Counter[str]] = []
# torch 2.14 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@contextmanager
def count_traffic() -> Iterator[Counter[str]]:
    """Count the bytes that this rank sends inside the block, by layer or purpose: "conv3", "gradients" and so on.

    In an all-gather or all-to-all over T ranks, each rank sends to T - 1 others. An all-reduce counts as a ring's,
    2 (T - 1) / T of its tensor. The traffic of `fully_sharded` parameters, as much as an all-reduce of their gradients,
    is not counted.
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
class Group:
    """A process group and this rank's place in it."""

    handle: Any
    """torch.distributed's group; None for a group of one rank."""
    rank: int
    size: int


def shard_slice(count: int, rank: int, size: int) -> slice:
    """A rank's shard of `count` elements, as DTensor's Shard cuts them: the last shards may be smaller or empty."""
    each = -(-count // size)
    return slice(min(rank * each, count), min((rank + 1) * each, count))


def all_reduce(name: str, tensor: Tensor, group: Group, op: Any = dist.ReduceOp.SUM, wait: bool = True) -> Any:
    """All-reduce in place. With wait=False, returns the work to wait for."""
    _count(name, 2 * (group.size - 1) * tensor.numel() * tensor.element_size() // group.size)
    return dist.all_reduce(tensor, op, group.handle, async_op=not wait)


class Exchange:
    """Sends each rank's tensor to all ranks of a group, and their gradients of it back.

    Args:
        name: the name in `count_traffic`.
        group: the group of T ranks.
        dtype: floating-point dtype in which tensors are sent; None for their own.
    """

    def __init__(self, name: str, group: Group, dtype: torch.dtype | None = None) -> None:
        self.name, self.group, self.dtype = name, group, dtype
        self._work: Any = None
        self._sent = self._received = torch.empty(0)

    def start(self, x: Tensor) -> Tensor:
        """Start an all-gather of x. Returns [T, *x.shape], rank r's tensor at index r, valid after `wait`."""
        self._sent = x.to(self.dtype or x.dtype).contiguous()
        received = self._sent.new_empty(self.group.size, *x.shape)
        self._work = _all_gather(_bytes(received), _bytes(self._sent), self.group.handle, async_op=True)
        _count(self.name, (self.group.size - 1) * self._sent.numel() * self._sent.element_size())
        return received

    def wait(self) -> None:
        self._work.wait()
        self._work, self._sent = None, torch.empty(0)

    def send(self, parts: Tensor) -> Tensor:
        """Start an all-to-all: parts[r] to rank r. Returns the tensor that is sent."""
        self._sent = parts.to(self.dtype or parts.dtype).contiguous()
        self._received = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(
            _bytes(self._received), _bytes(self._sent), group=self.group.handle, async_op=True
        )
        _count(self.name, (self.group.size - 1) * self._sent[0].numel() * self._sent.element_size())
        return self._sent

    def receive(self) -> Tensor:
        """Wait for `send`. Returns [T, *shape], the tensor from rank r at index r."""
        self.wait()
        received, self._received = self._received, torch.empty(0)
        return received


def _bytes(x: Tensor) -> Tensor:
    # Some backends lack some dtypes.
    return x.view(-1).view(torch.uint8)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.dtype, ctx.rank = exchange, x.dtype, exchange.group.rank
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
        # While the gradients are sent, autograd computes the backward of what ran between start and wait. `_Start`
        # receives them.
        return ctx.exchange.send(grad), None, None


def exchanged(x: Tensor, exchange: Exchange) -> tuple[Tensor, Any]:
    """Start a differentiable all-gather of x. Returns (unfinished, finish); finish(unfinished) is [T, *x.shape].

    What is computed from x before `finish` overlaps the all-gather; its backward overlaps the exchange of gradients.
    """
    unfinished = _Start.apply(x, exchange)
    return unfinished, lambda received: _Wait.apply(received, exchange, x.dtype)
