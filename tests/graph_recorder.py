"""A stand-in for CUDA graphs on the CPU: records the operators of a call, and runs them again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """The arguments that an operator writes."""
    if function is torch.ops.aten.native_batch_norm.default:  # whose schema doesn't tell
        yield from tensors_in(args[3:5])
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            yield from tensors_in([value])


class Recording(TorchDispatchMode):
    """Keeps every operator with its arguments: tensors by address, numbers by value, as a graph does."""

    sees_fused_ops = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # On a GPU, SGD doesn't read the rate to check it.
        if function is torch.ops.aten._local_scalar_dense.default and storage(args[0]) in self.made:
            raise RuntimeError("operation not permitted when stream is capturing")
        with torch.no_grad():
            for tensor in written(function, args, kwargs):
                if storage(tensor) not in self.made:
                    self.before.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        given = {storage(tensor) for tensor in tensors_in([args, kwargs])}
        result = function(*args, **kwargs)
        new = [tensor for tensor in tensors_in([result]) if storage(tensor) not in given]
        self.made.update(map(storage, new))
        self.calls.append((function, args, kwargs, new))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, value in self.before.values():
            tensor.detach().copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, new in self.calls:
            results = tensors_in([function(*args, **kwargs)])
            if new:
                for kept, result in zip(new, results, strict=True):
                    kept.copy_(result)


class RecordedGraphs:
    """Graphs of the CPU. A capture has no effects, reading a value that it computes is an error."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.waits: str | None = None

    @contextmanager
    def warming(self) -> Iterator[None]:
        self.events.append("warm")
        yield

    @contextmanager
    def forked(self) -> Iterator[None]:
        self.events.append("fork")
        yield

    def join(self) -> None:
        self.events.append("join")

    def watched(self, call: Callable[[], Any]) -> tuple[Any, str | None]:
        return call(), self.waits

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording, generator = Recording(), torch.get_rng_state()
        try:
            with recording:
                result = call()
        finally:
            recording.undo()
            torch.set_rng_state(generator)
        self.events.append("capture")

        def replay() -> None:
            self.events.append("replay")
            recording.replay()

        return replay, result

    def capturing(self) -> bool:
        return False
