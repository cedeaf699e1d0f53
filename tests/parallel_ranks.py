"""The processes of tests/test_parallel.py. Rank 0 writes the results as JSON."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from alexnet_kernels import AlexNet, parallel
from alexnet_kernels.nn import FusedSequential
from alexnet_kernels.optim import SGD

BATCH, CLASSES, SIZE, STEPS = 8, 7, 79, 10
CASES = [
    (preset, plan, logits, parameters, dtype)
    for preset, plans in {
        "paper": ("towers", "hybrid", "data"),
        "as_run": ("towers", "hybrid"),
        "caffe": ("towers",),
        "caffenet": ("towers",),
        "torchvision": ("hybrid", "data"),
    }.items()
    for plan in plans
    for logits in ("gathered", "apart")
    for parameters in ("replicated", "sharded")
    for dtype in ("float64", "float32")
    if not (plan == "data" and logits == "apart")
    if parameters == "replicated" or (preset == "paper" and logits == "gathered" and dtype == "float64")
]


def network(preset: str, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last) -> AlexNet:
    torch.manual_seed(0)
    model = AlexNet(CLASSES, preset, width=0.125, dtype=dtype).to(memory_format=memory_format)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(std=(2 / param[0].numel()) ** 0.5)
    return model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def count_fully_sharded() -> Iterator[Counter[str]]:
    """Counts the bytes that torch's fully_shard sends inside the block, as "gradients"."""
    counter: Counter[str] = Counter()

    def counted(original: Callable[..., Any], whole: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*arguments: Any, **options: Any) -> Any:
            size = dist.get_world_size(options.get("group"))
            tensor = whole(*arguments, **options)
            counter["gradients"] += (size - 1) * tensor.numel() * tensor.element_size() // size
            return original(*arguments, **options)

        return call

    new = hasattr(dist, "all_gather_single")
    names = (
        ("all_gather_single", "reduce_scatter_single") if new else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )
    originals = [getattr(dist, name) for name in names]
    setattr(dist, names[0], counted(originals[0], lambda output_tensor, *_, **__: output_tensor))
    setattr(dist, names[1], counted(originals[1], lambda *arguments, input, **_: input))
    try:
        yield counter
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(dist, name, original)


def compare(mesh: Any, preset: str, plan: str, logits: str, parameters: str, name: str) -> dict[str, Any]:
    """Ten steps on one device and on all ranks: the largest distances, and the traffic."""
    dtype, gather, sharded = getattr(torch, name), logits == "gathered", parameters == "sharded"
    memory_format = torch.channels_last if name == "float64" or gather else torch.contiguous_format
    one = network(preset, dtype, memory_format)
    many = parallel.parallelize(copy.deepcopy(one), mesh, plan, gather_logits=gather, fully_sharded=sharded)
    x = torch.randn(BATCH, 3, SIZE, SIZE, dtype=dtype).contiguous(memory_format=memory_format)
    y = torch.randint(0, CLASSES, (BATCH,))
    index, parts = many.parallelism.rows
    own_x, own_y = x.chunk(parts)[index], y.chunk(parts)[index]
    found = {"forward": 0.0, "gradient": 0.0, "weight": 0.0}
    optimizers = [SGD(model.parameters(), 0.01) for model in (one, many)]
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizers[0].zero_grad()
        expected = one(x)
        F.cross_entropy(expected, y).backward()
        torch.manual_seed(step)
        optimizers[1].zero_grad()
        with parallel.count_traffic() as traffic, count_fully_sharded() as sharded_traffic:
            actual = many(own_x)
            loss = F.cross_entropy(actual, own_y) if gather else parallel.cross_entropy(many, actual, own_y)
            loss.backward()
        if gather:
            found["forward"] = max(found["forward"], distance(actual, expected.chunk(parts)[index]))
        for a, b in zip(many.parameters(), one.parameters(), strict=True):
            found["gradient"] = max(found["gradient"], distance(a.grad.full_tensor(), b.grad))
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(many.parameters(), one.parameters(), strict=True):
        found["weight"] = max(found["weight"], distance(a.detach().full_tensor(), b.detach()))
    masks = True
    for a, b in zip(many.classifier, one.classifier, strict=True):
        if isinstance(b, torch.nn.Dropout):
            torch.manual_seed(5)
            whole = FusedSequential(b)(torch.ones(BATCH, 48, dtype=dtype))  # as in the network: of the op
            torch.manual_seed(5)
            rows, columns = a.rows, a.columns
            part = whole.chunk(rows[1])[rows[0]].chunk(columns[1], 1)[columns[0]]
            masks &= torch.equal(a(torch.ones_like(part).contiguous()), part)
    sizes = tuple(mesh.shape)
    arithmetic = parallel.step_traffic(
        one, plan, BATCH, *sizes, image_size=SIZE, activation_bytes=x.element_size(), gather_logits=gather
    )
    if sharded:
        traffic += sharded_traffic
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {**found, "masks": masks})
    worst = {key: max(each[key] for each in everyone) for key in found}
    return {**worst, "masks": all(e["masks"] for e in everyone), "traffic": traffic, "arithmetic": arithmetic}


def message(call: Any) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals(mesh: Any) -> dict[str, str]:
    rank = dist.get_rank()

    def parallelize(preset: str, plan: str = "towers", seed: int = 0, **options: Any) -> AlexNet:
        model = network(preset, torch.float32)
        torch.manual_seed(seed)
        return parallel.parallelize(model, mesh, plan, **options)

    def uneven() -> None:
        parallelize("paper")(torch.randn(2 + rank, 3, SIZE, SIZE))

    return {
        "plan": message(lambda: parallelize("paper", "rows")),
        "one tower": message(lambda: parallelize("torchvision")),
        "batch norm": message(lambda: parallelize("batchnorm", "data")),
        "presets": message(lambda: parallelize("paper" if rank else "caffe")),
        "seeds": message(lambda: parallelize("paper", seed=rank)),
        "traffic": message(lambda: parallelize("paper", traffic=torch.int8)),
        "traffic of one rank": message(lambda: parallelize("paper", traffic=torch.bfloat16 if rank else None)),
        "uneven": message(uneven),
        "not parallel": message(lambda: parallel.cross_entropy(network("paper", torch.float32), torch.zeros(1, 1), 0)),
    }


def rounded_traffic(mesh: Any) -> dict[str, Any]:
    one = network("paper", torch.float32).eval()
    many = parallel.parallelize(copy.deepcopy(one), mesh, "towers", traffic=torch.bfloat16).eval()
    x = torch.randn(4, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), parallel.count_traffic() as traffic:
        result = many(x)
    return {"distance": distance(result, one(x)), "sent": sum(traffic.values())}


def accumulated(mesh: Any, sharded: bool) -> float:
    """The distance between gradients of a batch and of its two halves under no_sync."""
    one = network("paper", torch.float64).eval()
    many = parallel.parallelize(copy.deepcopy(one), mesh, "hybrid", fully_sharded=sharded).eval()
    x = torch.randn(8, 3, SIZE, SIZE, dtype=torch.float64)
    index, parts = many.parallelism.rows
    one(x).square().mean().backward()
    first, second = x.chunk(parts)[index].chunk(2)
    with many.parallelism.no_sync():
        (many(first).square().mean() / 2).backward()
    (many(second).square().mean() / 2).backward()
    pairs = zip(many.parameters(), one.parameters(), strict=True)
    return max(distance(a.grad.full_tensor(), b.grad) for a, b in pairs)


def save_one(path: Path) -> None:
    """Writes one process's checkpoint after a step, and its content as a plain file."""
    model = network("paper", torch.float32)
    optimizer = SGD(model.parameters(), 0.01)
    torch.manual_seed(2)
    model(torch.randn(4, 3, SIZE, SIZE)).sum().backward()
    optimizer.step()
    parallel.save(model, optimizer, path)
    momentum = [optimizer.state[param]["momentum_buffer"] for param in model.parameters()]
    torch.save({"model": model.state_dict(), "momentum": momentum}, path.with_suffix(".pt"))


def reads_one(mesh: Any, folder: Path) -> bool:
    """Whether the ranks read the weights that one process wrote, and the momentum, by one more step."""
    many = parallel.parallelize(network("paper", torch.float32), mesh, "towers")
    optimizer = SGD(many.parameters(), 0.01)
    parallel.load(many, optimizer, folder / "one")
    written = torch.load(folder / "one.pt", weights_only=True)
    same = all(torch.equal(value, written["model"][key]) for key, value in parallel.full_state_dict(many).items())
    for param, expected in zip(many.parameters(), written["momentum"], strict=True):
        same &= torch.equal(optimizer.state[param]["momentum_buffer"].full_tensor(), expected)
    return same


def checkpoints(mesh: Any, folder: Path) -> dict[str, Any]:
    """2 ranks read "one" and write "two"; 4 ranks read that, write "four" and export."""
    two = dist.get_world_size() == 2
    plan = "towers" if two else "hybrid"
    model = parallel.parallelize(network("paper", torch.float32), mesh, plan, fully_sharded=not two)
    optimizer = SGD(model.parameters(), 0.01)
    if two:
        torch.manual_seed(1)
        model(torch.randn(4, 3, SIZE, SIZE)).sum().backward()
        optimizer.step()
        parallel.save(model, optimizer, folder / "two")
        parallel.export(model, folder / "two.safetensors")
        again = message(lambda: parallel.save(model, optimizer, folder / "two"))
        return {"again": again, "of one process": reads_one(mesh, folder)}
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    parallel.load(model, optimizer, folder / "two")
    parallel.save(model, optimizer, folder / "four")
    parallel.export(model, folder / "four.safetensors")
    return {"missing": message(lambda: parallel.load(model, optimizer, folder / "three"))}


def run(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # A file instead of a port, which another process might take first.
    dist.init_process_group("gloo", f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tower"))
    found: dict[str, Any] = {"cases": {}}
    for case in CASES:
        if world == 2 or case[-1] == "float64":
            found["cases"]["-".join(case)] = compare(mesh, *case)
    if world == 2:
        found["refusals"] = refusals(mesh)
        found["rounded"] = rounded_traffic(mesh)
    found["accumulated"] = {kind: accumulated(mesh, kind == "sharded") for kind in ("replicated", "sharded")}
    found["checkpoints"] = checkpoints(mesh, Path(folder))
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found.get("refusals"))
    found["everyone's refusals"] = everyone
    if rank == 0:
        (Path(folder) / f"{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    # gloo's threads may still free tensors while Python shuts down, which sometimes aborts the process.
    os._exit(0)
