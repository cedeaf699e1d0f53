"""Calls that a CUDA graph replays: when a graph is captured, what it depends on, and what it can't hold."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from alexnet_kernels._dispatch.checks import PLAIN_TENSORS
from alexnet_kernels._torch_private import end_failed_capture, has_global_module_hooks, module_hooks, tensor_hooks
from alexnet_kernels.backends import get_backend, is_tuned

__all__ = ["CapturedCall", "CudaGraphs", "Graphs", "moved"]

_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype))
_UNSETTLED = 20
"""Calls in a row that are not captured, because something changes at each of them, before a warning says so."""
_WATCHED = 64
"""Kinds of inputs whose calls are counted."""


class Graphs(Protocol):
    """The streams and graphs of a device."""

    def warming(self) -> AbstractContextManager[None]:
        """A block that runs on the stream of the captures."""
        ...

    def forked(self) -> AbstractContextManager[None]:
        """A block that runs on a second stream, after what the current one holds. `join` has to follow."""
        ...

    def join(self) -> None:
        """Lets the current stream wait for the second one."""
        ...

    def watched(self, call: Callable[[], Any]) -> tuple[Any, str | None]:
        """The call's result, and where it waited for the device; None if it did not."""
        ...

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Captures a call. Returns the graph's replay, and the call's result, whose tensors each replay writes.

        An error of the call is raised after the device's state is that of before.
        """
        ...

    def capturing(self) -> bool:
        """Whether the caller itself is being captured."""
        ...


class CudaGraphs:
    """The graphs of a CUDA device. They share one memory pool: one runs at a time, and what lasts is kept elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream, self._second = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextmanager
    def warming(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def forked(self) -> Iterator[None]:
        self._second.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._second):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._second)

    def watched(self, call: Callable[[], Any]) -> tuple[Any, str | None]:
        mode, where = torch.cuda.get_sync_debug_mode(), None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = call()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            text = str(warning.message)
            if "called a synchronizing CUDA operation" in text:
                where = where or f"{warning.filename}:{warning.lineno}"
            elif "debug mode is a prototype feature" not in text:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return result, where

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        generator = torch.cuda.default_generators[self.device.index]
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            graph, spare = torch.cuda.CUDAGraph(), generator.clone_state()
            if not self._alive:
                # Without a graph, a pool of which a tensor is left takes no other: torch's assertion fails.
                self._pool = torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.stream(self._stream):
                    # Other threads, such as those that read images, allocate pinned memory meanwhile.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        result = call()
                    except BaseException:
                        with suppress(RuntimeError):
                            graph.capture_end()
                        raise
                    graph.capture_end()
            except BaseException as error:
                self._recover(generator, spare, error)
                raise
        self._alive.add(graph)
        return graph.replay, result

    def _recover(self, generator: torch.Generator, spare: torch.Generator, error: BaseException) -> None:
        """Makes the device usable after a capture that failed; raises DeviceUnusable if it isn't."""
        end_failed_capture(self.device.index, self._pool)
        if self._usable():
            return
        # A generator that the capture was not ended for refuses to draw.
        generator.graphsafe_set_state(spare)
        if not self._usable():
            raise DeviceUnusable(
                f"a CUDA graph could not be captured, and {self.device} is unusable in this process since: {error}; "
                f"begin again with capture=False"
            ) from error

    def _usable(self) -> bool:
        try:
            torch.cuda.synchronize()
            state = torch.cuda.get_rng_state(self.device)
            torch.rand(1, device=self.device)
            torch.cuda.set_rng_state(state, self.device)
        except RuntimeError:
            return False
        return True

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A copy from the CPU to a GPU goes through pinned memory, which nobody waits for."""
    if tensor.device == device:
        return tensor
    return _staged(tensor, device).to(device, non_blocking=True)


def _staged(tensor: Tensor, device: torch.device) -> Tensor:
    # torch's allocator of pinned memory reuses it after the copy.
    pinned = device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.pin_memory() if pinned else tensor


class DeviceUnusable(RuntimeError):
    """No call can follow on the device in this process."""


class NotCapturable(Exception):
    """Why a call can't be captured."""


@dataclass
class Found:
    """What a graph keeps of a call's surroundings as it is at the capture. NotCapturable for what it can't keep."""

    device: torch.device
    tensors: list[Tensor] = field(default_factory=list)
    """Whose addresses it keeps."""
    values: list[tuple[str, str, Any]] = field(default_factory=list)
    """(owner, name, value) of settings that Python reads."""

    def add_model(self, model: nn.Module) -> None:
        """Parameters, buffers, and the modules' numbers, flags and names."""
        for name, module in model.named_modules():
            members = module.__dict__
            if module_hooks(module):
                raise NotCapturable(f"{_named(name)} has hooks, whose Python would run at the capture only")
            kind: Any = type(module)
            if _splits(kind) or members.get("parallelism") is not None:
                raise NotCapturable(f"{_named(name)} is split over processes or devices")
            self.values.append((name, "the class", kind))
            for key, value in members.items():
                if type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value)):
                    self.values.append((name, key, value))
            for key, tensor in members["_parameters"].items():
                if tensor is not None:
                    self.add_tensor(tensor, name, key)
            for key, tensor in members["_buffers"].items():
                if tensor is not None:
                    self.add_tensor(tensor, name, key)
        if has_global_module_hooks():
            raise NotCapturable("torch.nn has global module hooks, whose Python would run at the capture only")

    def add_tensor(self, tensor: Tensor, owner: str, name: str) -> None:
        if type(tensor) not in PLAIN_TENSORS:
            raise NotCapturable(f"{name} of {_named(owner)} is a {type(tensor).__name__}")
        if tensor.requires_grad and tensor_hooks(tensor):
            raise NotCapturable(f"{name} of {_named(owner)} has hooks, whose Python would run at the capture only")
        if tensor.device != self.device:
            raise NotCapturable(f"{name} of {_named(owner)} is on {tensor.device}, not on {self.device}")
        self.tensors.append(tensor)

    def add_settings(self) -> None:
        """The settings of torch and of this package that choose kernels."""
        kind = self.device.type
        cudnn: Any = torch.backends.cudnn
        products: Any = torch.backends.cuda.matmul
        found = {
            "backend": get_backend(),
            "the user's table of choices": is_tuned(),
            "autocast": torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            "the cache of autocast": torch.is_autocast_cache_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            # torch.get_float32_matmul_precision raises where a precision was set by torch.backends.
            "matmul's fp32_precision": products.fp32_precision,
            "matmul's reductions": (
                products.allow_bf16_reduced_precision_reduction,
                products.allow_fp16_reduced_precision_reduction,
                products.allow_fp16_accumulation,
            ),
            "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
            "cudnn's fp32_precision": cudnn.conv.fp32_precision,
            "the default dtype": torch.get_default_dtype(),
            # The graph's copies of the inputs can be written in the mode that they were made in.
            "inference mode": torch.is_inference_mode_enabled(),
        }
        self.values += [("torch", name, value) for name, value in found.items()]

    def signature(self) -> tuple[Any, ...]:
        return [(id(t), t.data_ptr(), t.requires_grad) for t in self.tensors], self.values


@functools.cache
def _splits(kind: Any) -> bool:
    return issubclass(kind, (DistributedDataParallel, DataParallel))


def _named(module: str) -> str:
    return module or "the model"


@dataclass
class _Slot:
    """The calls with inputs of one kind."""

    left: int
    """Calls to come before the capture."""
    signature: Any = None
    kept: Sequence[Tensor] = ()
    """Held, so that no other tensor takes their addresses."""
    captures: int = 0
    replay: Callable[[], None] | None = None
    inputs: Sequence[Tensor] = ()
    result: Any = None

    def forget(self, left: int) -> None:
        self.left, self.signature, self.kept = left, None, ()
        self.replay, self.inputs, self.result = None, (), None


class CapturedCall:
    """A call on tensors that is captured after `warmup` plain calls with inputs of the same kind.

    A subclass gives `_call`, and `_find` for what its graph depends on. Without graphs every call is plain.

    Args:
        what: names the call in messages.
        device: of the call.
        capture: True, False, or None: where possible.
        warmup: plain calls before a capture.
        most: graphs that are kept, each for another kind of inputs.
        notify: takes messages; None for warnings.
        graphs: of the device; None for CUDA's.
    """

    def __init__(
        self,
        what: str,
        device: torch.device,
        capture: bool | None,
        warmup: int,
        most: int,
        notify: Callable[[str], None] | None,
        graphs: Graphs | None,
    ) -> None:
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, not {warmup}: the first call creates what a graph needs")
        if most < 1:
            raise ValueError(f"most must be at least 1, not {most}")
        if capture and graphs is None and device.type != "cuda":
            raise ValueError(f"capture=True needs a CUDA device, the parameters are on {device}")
        self.what, self.device, self.strict = what, device, capture is True
        self._warmup, self._most, self._notify = warmup, most, notify
        wanted = capture is not False and (graphs is not None or device.type == "cuda")
        self._graphs = (graphs or CudaGraphs(device)) if wanted else None
        self._slots: OrderedDict[Any, _Slot] = OrderedDict()
        self._said: set[str] = set()
        self._failure: str | None = None
        self._plain_calls = 0
        self._changed = "the inputs' kind"

    @property
    def captured(self) -> int:
        """Graphs that are held."""
        return sum(slot.replay is not None for slot in self._slots.values())

    def reset(self) -> None:
        """Drops all graphs and their memory. The next calls are plain, and one is captured again."""
        self._slots.clear()
        self._failure = None

    def _call(self, graphs: Graphs | None, inputs: Sequence[Tensor]) -> Any:
        """The call. graphs: of a capture or its warm-up; None in a plain call."""
        raise NotImplementedError

    def _find(self) -> Found:
        """What the call depends on. Raises NotCapturable."""
        raise NotImplementedError

    @contextmanager
    def _undone_after_error(self) -> Iterator[None]:
        """A block whose error leaves Python's state as it was before."""
        yield

    def _replayed(self, result: Any) -> Any:
        """What a replay returns: copies, since the next replay overwrites the graph's tensors."""
        raise NotImplementedError

    def _run(self, inputs: Iterable[Tensor]) -> Any:
        inputs, graphs = tuple(inputs), self._graphs
        if graphs is None or graphs.capturing():
            return self._call(None, [moved(tensor, self.device) for tensor in inputs])
        try:
            if self._failure is not None:
                raise NotCapturable(self._failure)
            found = self._find()
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
                raise NotCapturable("an input requires a gradient, which a graph's copy of it would get")
        except NotCapturable as reason:
            self._slots.clear()
            return self._fall_back(str(reason), inputs)
        slot = self._slot(inputs, found)
        if slot.left > 0:
            return self._warm_up(graphs, slot, inputs)
        if slot.replay is None:
            try:
                self._capture(graphs, slot, inputs)
            except Exception as error:
                if self.strict or isinstance(error, DeviceUnusable):
                    raise
                known = isinstance(error, NotCapturable)
                self._failure = str(error) if known else f"{type(error).__name__}: {error}"
                self._slots.clear()
            if self._failure is not None:
                # After the error, whose traceback holds the activations of the capture.
                return self._fall_back(self._failure, inputs)
        self._plain_calls = 0
        for kept, tensor in zip(slot.inputs, inputs, strict=True):
            kept.copy_(_staged(tensor, self.device), non_blocking=True)
        assert slot.replay is not None
        slot.replay()
        return self._replayed(slot.result)

    def _fall_back(self, reason: str, inputs: Sequence[Tensor]) -> Any:
        if self.strict:
            raise RuntimeError(f"{self.what} can't be captured: {reason}")
        self._say(f"{self.what} is not captured as a CUDA graph, each call launches its kernels: {reason}")
        return self._call(None, [moved(tensor, self.device) for tensor in inputs])

    def _slot(self, inputs: Sequence[Tensor], found: Found) -> _Slot:
        key = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in inputs)
        slot = self._slots.pop(key, None)
        if slot is None:
            slot = _Slot(self._warmup)
            while len(self._slots) >= _WATCHED:
                self._slots.popitem(last=False)
        self._slots[key] = slot  # the last one
        signature = found.signature()
        if slot.signature is not None and slot.signature != signature:
            self._changed = _difference(slot.signature, signature)
            # One call, which may create state of the optimizer anew.
            slot.forget(max(slot.left, 1))
        if slot.signature is None:
            slot.signature, slot.kept = signature, found.tensors
        return slot

    def _warm_up(self, graphs: Graphs, slot: _Slot, inputs: Sequence[Tensor]) -> Any:
        self._plain_calls += 1
        if self._plain_calls == _UNSETTLED:
            self._say(
                f"{self.what} has run {_UNSETTLED} times without a CUDA graph: {self._changed} changes between calls"
            )
        own = [moved(tensor, self.device) for tensor in inputs]
        with graphs.warming():
            if slot.left > 1:
                result = self._call(graphs, own)
            else:
                result, where = graphs.watched(lambda: self._call(graphs, own))
                if where is not None:
                    self._failure = f"it waits for the device, at {where}"
        slot.left -= 1  # by a call that has raised nothing
        # The first call creates what the next ones depend on.
        with suppress(NotCapturable):
            found = self._find()
            slot.signature, slot.kept = found.signature(), found.tensors
        return result

    def _capture(self, graphs: Graphs, slot: _Slot, inputs: Sequence[Tensor]) -> None:
        held = [other for other in self._slots.values() if other.replay is not None]
        if len(held) >= self._most:
            self._say(
                f"{self.what} keeps {self._most} CUDA graphs: inputs of more kinds replace the one not used for longest"
            )
            held[0].forget(1)
        # Not of the graphs' pool: their values last from before a replay to its end.
        slot.inputs = [torch.empty_like(tensor, device=self.device) for tensor in inputs]
        for kept, tensor in zip(slot.inputs, inputs, strict=True):
            kept.copy_(_staged(tensor, self.device), non_blocking=True)
        with self._undone_after_error():
            replay, result = graphs.capture(lambda: self._call(graphs, slot.inputs))
            changed = _difference(slot.signature, self._find().signature())
            if changed:
                raise NotCapturable(f"{changed} changes in the call, which a replay would not repeat")
        slot.replay, slot.result = replay, result
        slot.captures += 1

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            if self._notify is None:
                warnings.warn(message, RuntimeWarning, stacklevel=5)
            else:
                self._notify(message)


def _difference(before: Any, after: Any) -> str:
    """What differs between two signatures; "" if they are equal."""
    if before[0] != after[0]:
        return "a parameter, buffer or tensor of the optimizer, or its address or requires_grad,"
    if before[1] == after[1]:  # also where a value is NaN, or of several parameters
        return ""
    values = {(owner, name): value for owner, name, value in before[1]}
    for owner, name, value in after[1]:
        if values.pop((owner, name), _PLAIN) != value:
            return f"{name} of {_named(owner)}"
    return f"{next(iter(values))[1]} of {_named(next(iter(values))[0])}" if values else ""
