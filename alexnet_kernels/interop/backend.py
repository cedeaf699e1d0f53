"""A backend of torch.compile that runs layers of hand-written networks by this package's ops."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch.fx import GraphModule

from alexnet_kernels._torch_private import inductor
from alexnet_kernels.interop.rewrite import fuse_graph
from alexnet_kernels.nn.report import FusionReport

__all__ = ["Explanation", "dynamo_backend", "explain"]

LOGGER = logging.getLogger("alexnet_kernels.fusion")


def dynamo_backend(
    module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend "alexnet_kernels" of torch.compile: `torch.compile(model, backend="alexnet_kernels")`.

    It finds the runs of layers that `FusedSequential` computes by one op each, in any forward: modules and functional
    calls, in attributes, branches and loops. Inductor compiles the rest of the graph, and calls the ops. Results,
    gradients and buffers are PyTorch's within rounding; dropout draws its masks from the ops' stream. A run is fused
    only where nothing else reads or overwrites what it computes on the way. Each graph's report goes to the logger
    "alexnet_kernels.fusion", level INFO.

    The ops' backend is chosen when a graph is compiled, and so is what Inductor's graph calls: `set_backend` or
    `use_backend` afterwards don't change it.

    Args:
        module, example_inputs: what Dynamo hands to a backend.
        mode: Inductor's, such as "max-autotune".
        options: {"inductor": False} runs the rewritten graph without Inductor, as it is. All others are Inductor's.

    Raises:
        ValueError: an option that neither this backend nor Inductor has; options or a mode for Inductor without it.
    """
    chosen = dict(options or {})
    with_inductor = chosen.pop("inductor", True)
    _check(with_inductor, mode, chosen)
    report = fuse_graph(module, with_inductor)
    LOGGER.info("%s", _Heading(report))
    return inductor(mode, chosen)(module, example_inputs) if with_inductor else module.forward


def _check(with_inductor: Any, mode: str | None, options: Mapping[str, Any]) -> None:
    if not isinstance(with_inductor, bool):
        raise ValueError(f'option "inductor" must be True or False, not {with_inductor!r}')
    if not with_inductor and (options or mode not in (None, "default")):
        given = [f"mode={mode!r}"] if mode not in (None, "default") else [repr(name) for name in options]
        raise ValueError(f'{", ".join(given)}: with {{"inductor": False}} no other option is allowed')
    known = torch._inductor.list_options() if options else []
    for name in options:
        if name.replace("-", "_") not in known:
            near = get_close_matches(name, [*known, "inductor"])
            raise ValueError(
                f'there is no option {name!r}: "inductor" and those of torch._inductor.list_options() are allowed'
                + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
            )


@dataclass(frozen=True)
class _Heading:
    """The report as a message of the log, made only where it is written."""

    report: FusionReport

    def __str__(self) -> str:
        fused = sum(len(layers.names) for layers in self.report.fused)
        total = sum(len(layers.names) for layers in self.report.layers)
        return f"{fused} of {total} layers of a graph are computed by this package's ops\n{self.report}"


@dataclass
class Explanation:
    """What `dynamo_backend` does with a model. str() shows all of it.

    reports: of each graph that Dynamo captured, in order.
    graph_breaks: why it could not capture one graph only.
    """

    reports: list[FusionReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"graph {i}: {_Heading(report)}" for i, report in enumerate(self.reports)]
        return "\n\n".join([*parts, *(f"graph break: {reason}" for reason in self.graph_breaks)])


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """What `torch.compile(model, backend="alexnet_kernels")` fuses in a call `model(*args, **kwargs)`, and why no more.

    A copy of the model is called once, without Inductor. Resets torch._dynamo, as torch._dynamo.explain does: what it
    compiled before is compiled again when it is next called.
    """
    import torch._dynamo
    from torch._dynamo.utils import counters

    found = Explanation()

    def collect(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.reports.append(fuse_graph(module, inductor=True))
        return module.forward

    torch._dynamo.reset()
    before = dict(counters["graph_break"])
    called = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model
    try:
        with torch.random.fork_rng():
            torch.compile(called, backend=collect)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    for reason, count in counters["graph_break"].items():
        found.graph_breaks += [reason] * (count - before.get(reason, 0))
    return found
