"""What the nodes of a Dynamo graph write, and which of its values share memory."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

__all__ = ["Effects", "checkpointed", "value_of"]


def value_of(node: Node) -> Any:
    """The fake value that Dynamo recorded for a node; None for one that returns nothing."""
    return node.meta.get("example_value", node.meta.get("val"))


def checkpointed(node: Node) -> GraphModule | None:
    """The part of the graph that torch.utils.checkpoint runs here, and again in backward; None for other nodes."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint or not node.args:
        return None
    read = node.args[0]
    owner = node.graph.owning_module
    if not isinstance(read, Node) or read.op != "get_attr" or owner is None:
        return None
    found = getattr(owner, str(read.target), None)
    return found if isinstance(found, GraphModule) else None


class Effects:
    """The memory that each node's value is in, and the nodes that write to memory or change the state of torch.

    Values that share memory have fakes that share a storage.
    """

    def __init__(self, graph: Graph) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._storages = {node: frozenset(_storages(value_of(node))) for node in graph.nodes}
        self._sharing: dict[int, list[Node]] = {}
        for node, storages in self._storages.items():
            for storage in storages:
                self._sharing.setdefault(storage, []).append(node)
        self._written: dict[int, list[Node]] = {}
        """By storage."""
        self.writers: set[Node] = set()
        for node in graph.nodes:
            for target in written_by(node):
                self.writers.add(node)
                for storage in self._storages[target]:
                    self._written.setdefault(storage, []).append(node)

    def separated(self, read: Node, node: Node) -> None:
        """Says that a node, which overwrote a new value that it alone reads, now makes another instead."""
        self.writers.discard(node)
        for nodes in self._written.values():
            if node in nodes:
                nodes.remove(node)
        for storage in self._storages[read]:
            self._sharing[storage].remove(read)
        own = -1 - self.order[read]  # no address
        self._storages[read] = frozenset([own])
        self._sharing[own] = [read]

    def replaced(self, nodes: Sequence[Node], new: Node) -> None:
        """Says that one node took the place of a run's first, and computes what its last one did."""
        self.order[new] = self.order[nodes[0]]
        self._storages[new] = self._storages[nodes[-1]]
        for storage in self._storages[new]:
            self._sharing[storage] = [new if node is nodes[-1] else node for node in self._sharing[storage]]
        if any(node in self.writers for node in nodes):
            self.writers.add(new)

    def overwritten_after(self, node: Node, start: Node) -> Node | None:
        """The first node after `start` that writes to memory of the node's value."""
        first = self.order[start]
        found = [w for s in self._storages[node] for w in self._written.get(s, ()) if self.order[w] > first]
        return min(found, key=self.order.__getitem__, default=None)

    def writes_inputs(self) -> bool:
        """Whether a node writes to memory that came from outside the graph."""
        return any(node.op == "placeholder" for storage in self._written for node in self._sharing[storage])

    def is_fresh(self, node: Node) -> bool:
        """Whether a call made this value, and no earlier node has a value in the same memory."""
        storages = self._storages[node]
        earlier = (other for s in storages for other in self._sharing[s] if self.order[other] < self.order[node])
        return node.op.startswith("call") and bool(storages) and next(earlier, None) is None

    def shared_before(self, node: Node, reader: Node) -> bool:
        """Whether another node before `reader` has a value in this node's memory."""
        sharing = {other for s in self._storages[node] for other in self._sharing[s]}
        return any(other is not node and self.order[other] < self.order[reader] for other in sharing)

    def is_private(self, node: Node) -> bool:
        """Whether a call made this value, no other node has a value in the same memory, and it stays in the graph."""
        alone = all(self._sharing[storage] == [node] for storage in self._storages[node])
        return self.is_fresh(node) and alone and all(reader.op != "output" for reader in node.users)

    def state_changes(self, first: Node, last: Node) -> bool:
        """Whether a node between the two changes the state of torch."""
        return any(map(changes_state, _between(first, last)))

    def barrier(self, first: Node, last: Node) -> Node | None:
        """A node between the two that writes to memory or changes the state of torch."""
        return next((node for node in _between(first, last) if node in self.writers or changes_state(node)), None)


def _between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes after `first` and before `last`, in the order of the graph."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _storages(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        try:
            yield value.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):  # sparse, or a subclass without one
            yield id(value)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _storages(part)


def changes_state(node: Node) -> bool:
    """Whether a node sets a mode, such as autocast or grad mode: it is a call that returns no value."""
    return node.op.startswith("call") and value_of(node) is None


_IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub")
) | {operator.itruediv, operator.ixor, operator.setitem, operator.delitem}
_IN_PLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS)


def written_by(node: Node) -> list[Node]:
    """The arguments that a node writes to, or may: all of them where nothing is known about its target."""
    if node.op == "call_method":
        name = str(node.target)
        writes = name in _IN_PLACE_METHODS or _is_in_place(name)
        return [*(_nodes(node.args[0]) if writes else []), *_nodes(node.kwargs.get("out"))]
    if node.op == "call_module":
        return list(node.all_input_nodes)
    if node.op != "call_function":
        return []
    target: Any = node.target
    if (part := checkpointed(node)) is not None:
        return list(node.all_input_nodes) if Effects(part.graph).writes_inputs() else []
    if isinstance(target, torch._ops.OpOverload):
        return _written_by_schema(node, target._schema)
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads()]
        return list(node.all_input_nodes) if any(schema.is_mutable for schema in schemas) else []
    module, name = _module_of(target), getattr(target, "__name__", "")
    if target in (F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm):
        training = next((node.kwargs[key] for key in ("training", "use_input_stats") if key in node.kwargs), None)
        if training is False or _positional(node, 5) is False:
            return []
        positions = (1, 2) if target in (F.batch_norm, F.instance_norm) else (3, 4)
        named = [node.kwargs.get(key) for key in ("running_mean", "running_var")]
        return _nodes([*(node.args[i] for i in positions if i < len(node.args)), *named])
    if target in _IN_PLACE_OPERATORS or (module.startswith("torch") and _is_in_place(name)):
        return _nodes(node.args[0] if node.args else list(node.kwargs.values()))
    if not _is_known(target, module):
        return list(node.all_input_nodes)
    first = node.args[0] if node.args else node.kwargs.get("input")
    inplace = node.kwargs.get("inplace", _positional(node, _position_of_inplace(target)))
    return [*(_nodes(first) if inplace else []), *_nodes(node.kwargs.get("out"))]


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _module_of(target: Any) -> str:
    module = getattr(target, "__module__", None)
    # Built-in functions of torch, such as torch.conv2d, have no module.
    return module or type(getattr(target, "__self__", None)).__module__ or ""


def _is_known(target: Any, module: str) -> bool:
    """Whether the target is a function of torch or Python whose name or arguments say what it writes."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    public = ("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._tensor", "torch.special")
    return module in (*public, "torch.fft", "torch.linalg", "torch._C", "_operator", "builtins", "math")


@lru_cache
def _position_of_inplace(target: Callable[..., Any]) -> int | None:
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # built-in functions have neither signature nor `inplace`
        return None
    return names.index("inplace") if "inplace" in names else None


def _positional(node: Node, position: int | None) -> Any:
    return node.args[position] if position is not None and position < len(node.args) else None


def _written_by_schema(node: Node, schema: Any) -> list[Node]:
    found: list[Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _nodes(node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None))
    return found


def _nodes(value: Any) -> list[Node]:
    if isinstance(value, Node):
        return [value]
    if isinstance(value, tuple | list):
        return [node for part in value for node in _nodes(part)]
    return []
