"""The plans, and what turns a model into one rank's part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from alexnet_kernels._dispatch.layout import local
from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import Dropout, LocalResponseNorm
from alexnet_kernels.parallel import layers
from alexnet_kernels.parallel.collectives import Side, all_reduce, part_of

__all__ = ["PLANS", "Parallelism", "parallelism_of", "parallelize", "problem", "rows_of"]

PLANS = ("towers", "hybrid", "data")


def rows_of(plan: str, rank: int, ranks: int, towers: int) -> tuple[int, int]:
    """(index, count): which of equal parts of a batch the rank is given; towers are neighbouring ranks."""
    return (rank // towers, ranks // towers) if plan == "towers" else (rank, ranks)


class Parallelism:
    """How a model is split, as `model.parallelism`."""

    name: str
    """The plan."""
    mesh: DeviceMesh
    """Of dimensions "data" and "tower"."""
    tower: Side
    """This rank among those that share the neurons."""
    rows: tuple[int, int]
    """(index, count): which of equal parts of a batch this rank gives to the model."""
    first_class: int
    """The number of the first class whose logit is this rank's."""

    def __init__(self, name: str, mesh: DeviceMesh, ranks: Any) -> None:
        self.name, self.mesh = name, mesh
        names = mesh.mesh_dim_names or ()
        sides = {
            dim: Side(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(names.index(dim)))
            if dim in names
            else Side(None, 0, 1)
            for dim in ("data", "tower")
        }
        self.data = sides["data"]
        self.all = Side(ranks, sides["data"].rank * sides["tower"].size + sides["tower"].rank, mesh.size())
        self.tower = Side(None, 0, 1) if name == "data" else sides["tower"]
        self.rows = rows_of(name, self.all.rank, self.all.size, sides["tower"].size)
        self.first_class = 0
        self._shape: tuple[Any, ...] | None = None
        self._sync = True
        self._pending: list[tuple[Any, Tensor, float]] = []
        self._fully_sharded: list[FSDPModule] = []

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside the block add up gradients on each rank; the first one after it sums them over the
        data-parallel ranks."""
        before = self._sync
        self._synchronize(False)
        try:
            yield
        finally:
            self._synchronize(before)

    def _synchronize(self, sync: bool) -> None:
        self._sync = sync
        for module in self._fully_sharded:
            module.set_requires_gradient_sync(sync)
            module.set_reshard_after_backward(sync)

    def check_batch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """ValueError on every rank unless all gave images of one shape; looks when the shape changes."""
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not module.training:
            return
        shape = (*x.shape, str(x.dtype))
        if shape == self._shape:
            return
        shapes: list[Any] = [None] * self.all.size
        dist.all_gather_object(shapes, shape, self.all.group)
        if len(set(shapes)) > 1:
            listed = ", ".join(f"rank {rank} {list(given[:-1])} {given[-1]}" for rank, given in enumerate(shapes))
            raise ValueError(f"every rank must be given as many images, of one size and dtype: {listed}")
        self._shape = shape

    def reduce_gradient(self, parameter: nn.Parameter, side: Side, parts: int) -> None:
        """Sums the parameter's gradient over a side, divided by `parts`, as soon as backward has it."""

        def reduce(param: Tensor) -> None:
            if not self._sync or param.grad is None:
                return
            if not self._pending:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
            grad = local(param.grad)
            self._pending.append((all_reduce("gradients", grad, side, wait=False), grad, parts))

        parameter.register_post_accumulate_grad_hook(reduce)

    def fully_shard(self, model: nn.Module, container: nn.Module, side: Side, parts: int) -> None:
        """Leaves each rank of a side with a part of the container's parameters. Gradients are summed over the side,
        divided by `parts`."""
        if side is self.data and len(self.mesh.mesh_dim_names or ()) == 2:
            mesh = self.mesh["data"]
        else:
            mesh = DeviceMesh.from_group(side.group, self.mesh.device_type, mesh_dim_names=("rank",))
        # Whole again for one forward and backward pass: what is sent is as much as an all-reduce sends.
        module = fully_shard(container, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(parts)
        # gloo only sums.
        module.set_force_sum_reduction_for_comms(self.mesh.device_type == "cpu")
        self._fully_sharded.append(module)

        def unshard(*_: Any) -> None:
            # The classifier's, too, as the convolutions begin.
            module.unshard(async_op=True)

        def reshard(*_: Any) -> None:
            if not torch.is_grad_enabled():
                module.reshard()

        model.register_forward_pre_hook(unshard)
        model.register_forward_hook(reshard)

    def _finish(self) -> None:
        for work, grad, parts in self._pending:
            work.wait()
            if parts != 1:
                grad.div_(parts)
        self._pending.clear()


def parallelism_of(model: nn.Module) -> Parallelism:
    """`model.parallelism`; ValueError for a model that `parallelize` hasn't made."""
    plan = getattr(model, "parallelism", None)
    if not isinstance(plan, Parallelism):
        raise ValueError("the model is not parallel: call parallelize first")
    return plan


def parallelize(
    model: AlexNet,
    mesh: DeviceMesh,
    plan: str = "towers",
    *,
    traffic: torch.dtype | None = None,
    gather_logits: bool = True,
    fully_sharded: bool = False,
) -> AlexNet:
    """Makes the model this rank's part of it, in place; every rank of the mesh calls it.

    | plan | filters | neurons of fc6 to fc8 | a rank is given |
    |---|---|---|---|
    | "towers" (the paper's) | split over "tower" | split over "tower" | the images of its "data" part |
    | "hybrid" (Krizhevsky 2014) | on every rank | split over "tower" | its own part of the batch |
    | "data" | on every rank | on every rank | its own part of the batch |

    The whole then computes what the model of one device computes of the whole batch, dropout's masks included, which
    needs the same state of torch's generators on every rank, equal parts of the batch and a loss that is the mean
    over a rank's images. Parameters are DTensors on the mesh with rank 0's values; gradients are complete when
    backward returns. state_dict keys stay. Build optimizers afterwards: `optim.SGD` steps the shards.

    Args:
        model: an `AlexNet` on the mesh's device.
        mesh: of dimensions "data" and "tower", or one of them. "towers" needs as many towers as the preset has: two.
        plan: in `PLANS`.
        traffic: torch.bfloat16 or torch.float16 rounds activations, and gradients with respect to them, for their way
            between ranks; gradients of parameters stay as they are.
        gather_logits: True: the model returns [images given, classes], as on one device. False: [images seen, classes
            of this tower], for `parallel.cross_entropy`.
        fully_sharded: True: of each parameter, its gradient and the optimizer's state, a rank also holds only a part
            among the data-parallel ranks, by torch's `fully_shard` (FSDP2).

    Returns:
        The model.

    Raises:
        TypeError: not an AlexNet or a DeviceMesh.
        ValueError: a plan that the preset or the mesh doesn't have; layers that don't split; batch normalisation,
            whose statistics would be of a part of the batch; ranks that differ in model, arguments or random state.

    Source: Krizhevsky et al. 2012, section 3.2; Krizhevsky 2014, One weird trick for parallelizing CNNs.
    """
    if not isinstance(model, AlexNet):
        raise TypeError(f"parallelize: model must be an AlexNet, not {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"parallelize: mesh must be a DeviceMesh, not {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= {"data", "tower"}:
        raise ValueError(f"parallelize: the mesh's dimensions must be 'data' and 'tower', or one of them, not {names}")
    if plan not in PLANS:
        raise ValueError(f"parallelize: plan must be one of {', '.join(PLANS)}, not {plan!r}")
    if traffic not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"parallelize: traffic must be None, torch.bfloat16 or torch.float16, not {traffic}")
    if hasattr(model, "parallelism"):
        raise ValueError("parallelize: the model is parallel already")
    whole = mesh.size() == dist.get_world_size()
    ranks = dist.group.WORLD if whole else dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    split = Parallelism(plan, mesh, ranks)
    device = next(model.parameters()).device.type
    reason = problem(model, plan, split.tower.size)
    if device != mesh.device_type:
        reason = f"the model is on {device}, the mesh on {mesh.device_type}"
    _agree(model, split, (plan, str(traffic), gather_logits, fully_sharded, tuple(mesh.shape), reason))
    if reason:
        raise ValueError(f"parallelize: {reason}")

    model.register_forward_pre_hook(split.check_batch)
    for part, container in (("features", model.features), ("classifier", model.classifier)):
        shard = plan == "towers" or (plan == "hybrid" and part == "classifier")
        _layers(container, split, part, traffic, gather_logits)
        # Ranks with the same parameters, and the number of means that their gradients are a sum of.
        side, parts = split.data, split.data.size
        if plan == "data":
            side, parts = split.all, split.all.size
        elif not shard:
            side = split.all
        fully = fully_sharded and side.size > 1
        for module in container.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                new = _distributed(param, split, shard, fully)
                setattr(module, name, new)
                if side.size > 1 and not fully:
                    split.reduce_gradient(new, side, parts)
        if fully:
            split.fully_shard(model, container, side, parts)
    last = [layer for layer in model.classifier.children() if isinstance(layer, nn.Linear)][-1]
    split.first_class = part_of(last.out_features, split.tower.rank, split.tower.size).start
    setattr(model, "parallelism", split)  # noqa: B010 (which nn.Module types as a Tensor or Module)
    return model


def problem(model: AlexNet, plan: str, towers: int) -> str:
    """Why the model can't be split so, or an empty string."""
    spec = model._spec
    towers = 1 if plan == "data" else towers
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch normalisation's statistics would be those of a part of the batch"
    if plan == "towers" and towers not in (1, spec.groups):
        other = "" if spec.groups > 1 else "; plans 'hybrid' and 'data' take it"
        return f"preset {model.preset!r} has {spec.groups} tower{'s' * (spec.groups > 1)}, the mesh {towers}{other}"
    known = (nn.Conv2d, nn.Linear, nn.LocalResponseNorm, nn.Dropout)
    allowed = (nn.Conv2d, nn.Linear, LocalResponseNorm, Dropout)
    for module in (*model.features.children(), *model.classifier.children()):
        if isinstance(module, known) and type(module) not in allowed:
            return f"{type(module).__name__} in place of one of AlexNet's layers"
    linears = [layer for layer in model.classifier.children() if isinstance(layer, nn.Linear)]
    if any(layer.out_features % towers for layer in linears[:-1]):
        return f"{linears[0].out_features} neurons don't split into {towers} towers"
    if plan == "towers":
        for module in model.features.children():
            if isinstance(module, nn.Conv2d) and module.out_channels % towers:
                return f"{module.out_channels} filters don't split into {towers} towers"
    return ""


def _agree(model: AlexNet, split: Parallelism, arguments: tuple[Any, ...]) -> None:
    """ValueError on every rank unless all have the same model, arguments and generators."""
    states = [torch.get_rng_state().numpy().tobytes()]
    if split.mesh.device_type == "cuda":
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    own = {
        "networks": repr(model),
        "arguments": arguments,
        "versions of torch": torch.__version__.split("+")[0],
        "random states (call torch.manual_seed with one seed on every rank)": [
            hashlib.sha256(state).hexdigest() for state in states
        ],
    }
    everyone: list[Any] = [None] * split.all.size
    dist.all_gather_object(everyone, own, split.all.group)
    for key in own:
        differing = [rank for rank, theirs in enumerate(everyone) if theirs[key] != everyone[0][key]]
        if differing:
            raise ValueError(f"parallelize: ranks 0 and {', '.join(map(str, differing))} have different {key}")


def _distributed(param: nn.Parameter, split: Parallelism, shard: bool, fully: bool) -> nn.Parameter:
    """Rank 0's values, or this rank's part of them, as a DTensor; as `fully_shard` expects them, which makes DTensors
    of the rest."""
    last = param.dim() == 4 and not fully
    value = param.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    dense = value.permute(0, 2, 3, 1) if last else value
    dist.broadcast(dense, dist.get_global_rank(split.all.group, 0), group=split.all.group)
    mesh, names = split.mesh, split.mesh.mesh_dim_names or ()
    placements: list[Any] = [Replicate()] * mesh.ndim
    part = value
    if shard and split.tower.size > 1:
        placements[names.index("tower")] = Shard(0)
        part = value[part_of(len(value), split.tower.rank, split.tower.size)].clone()
        if fully:
            mesh, placements = mesh["tower"], [Shard(0)]
    elif fully:
        return nn.Parameter(value, param.requires_grad)
    tensor = DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return nn.Parameter(tensor, param.requires_grad)


def _layers(container: nn.Sequential, split: Parallelism, part: str, traffic: torch.dtype | None, gather: bool) -> None:
    """Gives the container's layers this package's classes: children, keys and hooks stay."""
    hybrid, towers = split.name == "hybrid", split.name == "towers"
    rows, columns = split.rows, (split.tower.rank, split.tower.size) if towers else (0, 1)
    number = 1 if part == "features" else 6
    linears = [layer for layer in container.children() if isinstance(layer, nn.Linear)]
    for child in container.children():
        layer: Any = child
        if isinstance(child, nn.Conv2d):
            layer.__class__, layer.tower = layers.Conv2d, split.tower if towers else Side(None, 0, 1)
            layer.name, layer.traffic = f"conv{number}", traffic
            layer.both = towers and child.groups == 1 and number > 1
            layer.local_groups = child.groups // layer.tower.size or 1
            number += 1
        elif isinstance(child, nn.Linear):
            layer.__class__, layer.tower = layers.Linear, split.tower
            layer.name, layer.traffic = f"fc{number}", traffic
            layer.gathers_rows = hybrid and child is linears[0]
            layer.logits = ""
            if child is linears[-1] and gather:
                layer.logits = "rows" if hybrid else "columns"
            number += 1
            # What follows is this tower's neurons, in the hybrid plan of all images of the group.
            rows, columns = (split.data.rank, split.data.size), (split.tower.rank, split.tower.size)
            if split.name == "data":
                rows = split.rows
        elif isinstance(child, LocalResponseNorm) and towers:
            if child.groups == 1:
                layer.__class__, layer.tower = layers.LocalResponseNorm, split.tower
                layer.name, layer.traffic = f"norm{number - 1}", traffic
            else:
                child.groups //= split.tower.size
        elif isinstance(child, Dropout):
            layer.__class__, layer.rows, layer.columns = layers.Dropout, rows, columns
