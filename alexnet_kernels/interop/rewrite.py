"""Rewrites a Dynamo graph: runs of its layers become calls of this package's ops, by the rules of `nn.runs`."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from alexnet_kernels import _library
from alexnet_kernels._dispatch.layout import memory_format_of
from alexnet_kernels.backends import select
from alexnet_kernels.interop.calls import LayerCall, layer_of
from alexnet_kernels.interop.effects import Effects, checkpointed, value_of
from alexnet_kernels.nn.report import FusionReport, Layers
from alexnet_kernels.nn.runs import LONGEST, RULES_WITH_BIAS, ops_of, rule_of, run_at, takes

__all__ = ["compute_run", "fuse_graph"]

_OURS = (_library.NAMESPACE, _library.TRITON_NAMESPACE)


def compute_run(run: str, layers: Sequence[dict[str, Any]], input: Tensor) -> Tensor:
    """The result of a run: the target of the nodes that take the place of its layers.

    layers: the attributes of the torch.nn module of each layer.
    """
    return rule_of(run).compute(run, [SimpleNamespace(**layer) for layer in layers], input)


def fuse_graph(module: GraphModule, inductor: bool = False) -> FusionReport:
    """Rewrites the module's graph in place, checkpointed parts included, and says what was fused.

    inductor: whether Inductor compiles what is left.
    """
    graph = module.graph
    report = FusionReport()
    if any(_is_transform(node) for node in graph.nodes):
        names = [name_of(node) for node in graph.nodes if layer_of(node) is not None]
        report.layers = [Layers((name,), None, "the graph holds a torch.func transform") for name in names]
        return report
    effects = Effects(graph)
    _make_out_of_place(list(graph.nodes), effects)
    done: set[Node] = set()
    for node in list(graph.nodes):
        if node in done or not node.op.startswith("call"):
            continue
        if (part := checkpointed(node)) is not None:
            report.layers += fuse_graph(part, inductor).layers
            continue
        call = _supported(node, inductor)
        if call is None:
            report.layers += _other(node)
            continue
        if call.kind == ".":
            report.layers.append(Layers((name_of(node),), None, call.reason))
            continue
        nodes, calls, ended = _chain(node, call, effects, inductor)
        run = _run_of(calls)
        if run == "RNP" and _requires_grad(call.input) and not effects.is_private(call.input):
            run = "R"  # saves its result; the op would save its input, which others may overwrite later
        nodes, calls = nodes[: len(run)], calls[: len(run)]
        reason = _refusal(run, nodes, calls, effects) or _idle(run, calls, ended)
        if reason:
            report.layers.append(Layers((name_of(node),), None, reason))
            continue
        report.layers.append(Layers(tuple(map(name_of, nodes)), ", ".join(ops_of(run))))
        _replace(run, nodes, calls, effects)
        done.update(nodes)
    graph.lint()
    module.recompile()
    return report


def _make_out_of_place(nodes: Sequence[Node], effects: Effects) -> None:
    """Makes each ReLU that overwrites a new tensor, which nothing else reads, one that doesn't: the same values."""
    for node in nodes:
        call = layer_of(node)
        if call is None or not call.inplace or call.input is None:
            continue
        read = call.input
        if len(read.users) > 1 or not effects.is_fresh(read) or effects.shared_before(read, node):
            continue
        # With gradients off, overwriting keeps a tensor's history; a new tensor would have none.
        if not effects.state_changes(read, node):
            node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (read,), {}
            effects.separated(read, node)


def _supported(node: Node, inductor: bool) -> LayerCall | None:
    call = layer_of(node)
    if call is not None and call.inplace:
        return LayerCall(".", reason="it overwrites a tensor that may be used elsewhere")
    if inductor and call is not None and call.kind == "P" and _inductor_pools_faster(call):
        return LayerCall(".", reason="Inductor's is faster: on the CPU, not in channels_last, without gradients")
    return call


def _inductor_pools_faster(pool: LayerCall) -> bool:
    assert pool.input is not None
    x, before = value_of(pool.input), layer_of(pool.input)
    if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != "cpu" or x.requires_grad:
        return False
    # Behind a normalisation the op computes both, faster.
    return memory_format_of(x) == torch.contiguous_format and (before is None or before.kind != "N")


def _chain(node: Node, call: LayerCall, effects: Effects, inductor: bool) -> tuple[list[Node], list[LayerCall], str]:
    """The layers from `node` on, each of which alone reads the one before, and why there are no more."""
    nodes, calls = [node], [call]
    while len(nodes) < LONGEST:
        last = nodes[-1]
        readers = list(last.users)
        if len(readers) != 1:
            return nodes, calls, f"{len(readers)} nodes read its result"
        reader = readers[0]
        if reader.op == "output":
            return nodes, calls, "its result leaves the graph"
        following = _supported(reader, inductor)
        if following is None or following.kind == "." or following.input is not last or _reads(reader, last) > 1:
            return nodes, calls, f"{name_of(reader)} follows"
        if between := effects.barrier(node, reader):
            return nodes, calls, f"{between.name}, before {name_of(reader)}, writes to memory or changes a mode"
        nodes.append(reader)
        calls.append(following)
    return nodes, calls, ""


def _reads(reader: Node, node: Node) -> int:
    """How many arguments of `reader` are `node`."""
    found = 0

    def count(argument: Node) -> Node:
        nonlocal found
        found += argument is node
        return argument

    torch.fx.node.map_arg((reader.args, reader.kwargs), count)
    return found


def _run_of(calls: Sequence[LayerCall]) -> str:
    """The run that begins with the first layer; its own kind where no rule takes it."""
    kinds = "".join(call.kind for call in calls)
    if kinds[0] == "C":
        bias, weight, x = calls[0].settings["bias"], calls[0].settings["weight"], value_of(calls[0].input)
        run = next((run for run in RULES_WITH_BIAS if kinds.startswith(run)), "")
        same = run and bias is not None and value_of(bias).dtype == value_of(weight).dtype
        if same and takes(rule_of(run), x) and select("conv2d_relu", x, None) == "cuda":
            return run
    return run_at(kinds, 0) or kinds[0]


def _idle(run: str, calls: Sequence[LayerCall], ended: str) -> str | None:
    """Why there is nothing to do for a run that an op could compute."""
    if run in ("B", "R"):
        beside = "with a ReLU behind it" if run == "B" else "with a layer beside it"
        return f"an op takes it only {beside}" + (f"; {ended}" if ended else "")
    if run == "D" and not (calls[0].settings["training"] and calls[0].settings["p"]):
        return "it drops nothing"
    return None


def _refusal(run: str, nodes: Sequence[Node], calls: Sequence[LayerCall], effects: Effects) -> str | None:
    """Why no op takes the run."""
    if run == "B":
        return None
    first, last = nodes[0], nodes[-1]
    read = calls[0].input
    tensors = [read, *(v for call in calls for v in call.settings.values() if isinstance(v, Node)), last]
    for node in tensors:
        if reason := _not_plain(value_of(node)):
            return f"{node.name} is {reason}"
    x, result = value_of(read), value_of(last)
    rule = rule_of(run)
    if not takes(rule, x):
        if rule.images and x.dim() != 4:
            return f"its input has {x.dim()} dimensions, not 4"
        return f"no op takes {x.dtype} on {x.device.type} here"
    if reason := _wrong_parameters(run[0], calls[0].settings, x):
        return reason
    for op in ops_of(run):
        if select(op, x, None) == "native":
            return f'backend "native" computes {op} of {x.dtype} on {x.device.type}'
    for node, what in ((read, "input"), (last, "result")):
        if writer := effects.overwritten_after(node, first):
            return f"{writer.name} may overwrite its {what}"
    if (x.dim() == 4 or run == "D") and _conversion(run, x, result) is None:
        return "PyTorch's result is in another memory format"
    return None


def _requires_grad(node: Node) -> bool:
    return bool(getattr(value_of(node), "requires_grad", True))


def _not_plain(value: Any) -> str | None:
    """What a value is if it is no ordinary dense tensor."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value) not in (FakeTensor, Tensor, nn.Parameter):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized:
        return f"a tensor of layout {value.layout}"
    return None


def _wrong_parameters(kind: str, settings: dict[str, Any], x: Tensor) -> str | None:
    named = {name: value_of(node) for name, node in settings.items() if isinstance(node, Node)}
    if kind == "L" and named["weight"].dim() != 2:
        return f"its weight has {named['weight'].dim()} dimensions, not 2"
    if kind in "CL" and "bias" in named and named["bias"].dim() != 1:
        return f"its bias has {named['bias'].dim()} dimensions, not 1"
    if kind in "CL" and "bias" in named and named["bias"].shape != named["weight"].shape[:1]:
        return f"its bias is {list(named['bias'].shape)}"
    if kind == "B":
        if settings["training"] and all(x.shape[i] == 1 for i in (0, 2, 3)):
            return "its input has one value a channel"
        for name, value in named.items():
            if value.dtype not in (x.dtype, torch.float32):
                return f"its {name} is {value.dtype}"
    return None


def _conversion(run: str, x: Tensor, result: Tensor) -> torch.memory_format | None:
    """The memory format that the run's input must have for a result in that of PyTorch's; None if there is none."""
    own = memory_format_of(x)
    if result.is_contiguous(memory_format=own):
        return own
    # PyTorch's convolution follows its weight too, and copies the input to that format.
    if run[0] == "C" and result.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _replace(run: str, nodes: Sequence[Node], calls: Sequence[LayerCall], effects: Effects) -> None:
    """Puts one node in the place of the first: what the others read is the result of those before them."""
    first, last = nodes[0], nodes[-1]
    read: Any = calls[0].input
    x, result = value_of(read), value_of(last)
    graph = first.graph
    with graph.inserting_before(first):
        if x.dim() == 4 and (wanted := _conversion(run, x, result)) != memory_format_of(x):
            read = graph.call_method("contiguous", (read,), {"memory_format": wanted})
        new = graph.create_node(
            "call_function",
            compute_run,
            (run, tuple(dict(call.settings) for call in calls), read),
            name="_".join(ops_of(run)),
        )
        new.meta = dict(last.meta)
        # Autocast has a convolution or linear layer compute in its dtype. The other ops keep the input's, where
        # PyTorch's operators may return float32.
        computed = value_of(first).dtype if run[0] in "CL" else x.dtype
        if computed != result.dtype:
            new = graph.call_method("to", (new, result.dtype))
            new.meta = dict(last.meta)
    effects.replaced(nodes, new)
    last.replace_all_uses_with(new)
    for node in reversed(nodes):
        graph.erase_node(node)


def _is_transform(node: Node) -> bool:
    """Whether the node is part of vmap, grad or another transform of torch.func."""
    module, name = str(getattr(node.target, "__module__", "")), str(getattr(node.target, "__name__", ""))
    return node.op == "call_function" and ("functorch" in module or "functorch" in name or "_vmap_" in name)


def _other(node: Node) -> list[Layers]:
    """The report of a node that is no layer: none for sizes, counters and the like."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        if namespace in _OURS:
            return [Layers((_path(node) or node.name,), name)]
    if node.op == "call_module":
        return [Layers((name_of(node),), None, "Dynamo hands it over as a module: it does not inline modules here")]
    value = value_of(node)
    if target is not operator.getitem and isinstance(value, Tensor) and value.is_floating_point():
        return [Layers((name_of(node),), None, "no op of this package computes it")]
    return []


def name_of(node: Node) -> str:
    """The layer's name in the model, such as "features.0", where a torch.nn module made the call; else the node's."""
    kind = _module(node)[1]
    if not (isinstance(kind, type) and kind.__module__.startswith(("torch.nn.modules", "alexnet_kernels.nn"))):
        return node.name
    if issubclass(kind, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return node.name
    return _path(node) or node.name


def _module(node: Node) -> tuple[str, Any]:
    """The innermost module whose forward makes the call: an expression for it, and its type."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1] if stack else ("", None)


def _path(node: Node) -> str:
    """The innermost module's path, as in named_modules()."""
    path = re.sub(r"^L\['\w+'\]", "", _module(node)[0])
    path = re.sub(r"_modules\['([^']*)'\]", r"\1", path)
    return re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path).lstrip(".")
