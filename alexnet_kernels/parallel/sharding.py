"""Turns a model into one rank's shard of it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from alexnet_kernels.models import AlexNet
from alexnet_kernels.nn import LocalResponseNorm
from alexnet_kernels.parallel import layers
from alexnet_kernels.parallel.collectives import Group, shard_slice
from alexnet_kernels.parallel.parallelism import Parallelism
from alexnet_kernels.parallel.plan import PLANS, split_problem

__all__ = ["parallelize"]


def parallelize(
    model: AlexNet,
    mesh: DeviceMesh,
    plan: str = "towers",
    *,
    traffic: torch.dtype | None = None,
    gather_logits: bool = True,
    fully_sharded: bool = False,
) -> AlexNet:
    """Turn the model into this rank's shard of it, in place. Every rank of the mesh calls it.

    | plan | filters | neurons of fc6 to fc8 | input of a rank |
    |---|---|---|---|
    | "towers" (the paper's) | split over "tower" | split over "tower" | the batch shard of its "data" index |
    | "hybrid" (Krizhevsky 2014) | on every rank | split over "tower" | its own batch shard |
    | "data" | on every rank | on every rank | its own batch shard |

    Together the ranks compute what the model computes on one device for the whole batch, dropout's masks included.
    This needs the same state of torch's generators on every rank, batch shards of equal size, and a loss that is the
    mean over a rank's images. Parameters become DTensors on the mesh with rank 0's values. Gradients are complete when
    backward returns. state_dict keys do not change. Create optimizers afterwards: `optim.SGD` steps the shards.

    Args:
        model: an `AlexNet` on the mesh's device.
        mesh: with dimensions "data" and "tower", or one of them. Plan "towers" needs as many towers as the preset has.
        plan: in `PLANS`.
        traffic: torch.bfloat16 or torch.float16: dtype in which activations and their gradients are sent between ranks.
            None: as computed. Gradients of parameters are always sent as they are.
        gather_logits: True: the model returns [images of this rank, classes], as on one device. False: [images of the
            tower, classes of this tower], for `parallel.cross_entropy`.
        fully_sharded: whether parameters, gradients and optimizer state are also sharded over the data-parallel ranks,
            by torch's `fully_shard` (FSDP2).

    Returns:
        The model.

    Raises:
        TypeError: not an AlexNet or a DeviceMesh.
        ValueError: a plan that does not fit the preset or the mesh; layers that don't split evenly; batch
            normalisation, whose statistics would be those of a batch shard; ranks that differ in model, arguments or
            random state.

    Source: Krizhevsky et al. 2012, section 3.2; Krizhevsky 2014, One weird trick for parallelizing CNNs.
    """
    _check_arguments(model, mesh, plan, traffic)
    whole = mesh.size() == dist.get_world_size()
    ranks = dist.group.WORLD if whole else dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    split = Parallelism(plan, mesh, ranks)
    device = next(model.parameters()).device.type
    reason = split_problem(model, plan, split.tower.size)
    if device != mesh.device_type:
        reason = f"the model is on {device}, the mesh on {mesh.device_type}"
    _check_ranks_agree(model, split, (plan, str(traffic), gather_logits, fully_sharded, tuple(mesh.shape), reason))
    if reason:
        raise ValueError(f"parallelize: {reason}")

    model.register_forward_pre_hook(split.check_batch)
    for part, container in (("features", model.features), ("classifier", model.classifier)):
        _convert_layers(container, split, part, traffic, gather_logits)
        _shard_parameters(model, container, split, part, fully_sharded)
    last = [layer for layer in model.classifier.children() if isinstance(layer, nn.Linear)][-1]
    split.first_class = shard_slice(last.out_features, split.tower.rank, split.tower.size).start
    setattr(model, "parallelism", split)  # noqa: B010 (which nn.Module types as a Tensor or Module)
    return model


def _check_arguments(model: Any, mesh: Any, plan: str, traffic: torch.dtype | None) -> None:
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
        raise ValueError("parallelize: the model is already split")


def _check_ranks_agree(model: AlexNet, split: Parallelism, arguments: tuple[Any, ...]) -> None:
    """ValueError on every rank unless all have the same model, arguments and generator states."""
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
    dist.all_gather_object(everyone, own, split.all.handle)
    for key in own:
        differing = [rank for rank, theirs in enumerate(everyone) if theirs[key] != everyone[0][key]]
        if differing:
            raise ValueError(f"parallelize: ranks 0 and {', '.join(map(str, differing))} have different {key}")


def _shard_parameters(
    model: AlexNet, container: nn.Sequential, split: Parallelism, part: str, fully_sharded: bool
) -> None:
    """Replace the container's parameters by this rank's shards, and set up the reduction of their gradients."""
    shard = split.name == "towers" or (split.name == "hybrid" and part == "classifier")
    # The group with the same parameters. Its gradients are a sum of `divisor` means over images.
    group, divisor = split.data, split.data.size
    if split.name == "data":
        group, divisor = split.all, split.all.size
    elif not shard:
        group = split.all
    fully = fully_sharded and group.size > 1
    for module in container.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            new = _sharded(param, split, shard, fully)
            setattr(module, name, new)
            if group.size > 1 and not fully:
                split.reduce_gradient(new, group, divisor)
    if fully:
        split.fully_shard(model, container, group, divisor)


def _sharded(param: nn.Parameter, split: Parallelism, shard: bool, fully: bool) -> nn.Parameter:
    """Rank 0's values, or this rank's shard of them, as a DTensor.

    If `fully`, in the form that `fully_shard` expects: it makes DTensors of the parameters that are not yet.
    """
    channels_last = param.dim() == 4 and not fully
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    value = param.detach().contiguous(memory_format=memory_format)
    dense = value.permute(0, 2, 3, 1) if channels_last else value
    dist.broadcast(dense, dist.get_global_rank(split.all.handle, 0), group=split.all.handle)
    mesh, names = split.mesh, split.mesh.mesh_dim_names or ()
    placements: list[Any] = [Replicate()] * mesh.ndim
    part = value
    if shard and split.tower.size > 1:
        placements[names.index("tower")] = Shard(0)
        part = value[shard_slice(len(value), split.tower.rank, split.tower.size)].clone()
        if fully:
            mesh, placements = mesh["tower"], [Shard(0)]
    elif fully:
        return nn.Parameter(value, param.requires_grad)
    tensor = DTensor.from_local(part, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())
    return nn.Parameter(tensor, param.requires_grad)


def _convert_layers(
    container: nn.Sequential, split: Parallelism, part: str, traffic: torch.dtype | None, gather: bool
) -> None:
    """Change the classes of the container's layers to those of `parallel.layers`. Children, keys and hooks stay."""
    hybrid, towers = split.name == "hybrid", split.name == "towers"
    rows, columns = split.rows, (split.tower.rank, split.tower.size) if towers else (0, 1)
    number = 1 if part == "features" else 6
    linears = [layer for layer in container.children() if isinstance(layer, nn.Linear)]
    for child in container.children():
        layer: Any = child
        if isinstance(child, nn.Conv2d):
            layer.__class__, layer.tower = layers.Conv2d, split.tower if towers else Group(None, 0, 1)
            layer.name, layer.traffic = f"conv{number}", traffic
            layer.all_towers = towers and child.groups == 1 and number > 1
            layer.local_groups = child.groups // layer.tower.size or 1
            number += 1
        elif isinstance(child, nn.Linear):
            layer.__class__, layer.tower = layers.Linear, split.tower
            layer.name, layer.traffic = f"fc{number}", traffic
            layer.gathers_images = hybrid and child is linears[0]
            layer.logits = ""
            if child is linears[-1] and gather:
                layer.logits = "images" if hybrid else "classes"
            number += 1
            # The next layers see this tower's neurons; in the hybrid plan, of all images of the tower group.
            rows, columns = (split.data.rank, split.data.size), (split.tower.rank, split.tower.size)
            if split.name == "data":
                rows = split.rows
        elif isinstance(child, LocalResponseNorm) and towers:
            if child.groups == 1:
                layer.__class__, layer.tower = layers.LocalResponseNorm, split.tower
                layer.name, layer.traffic = f"norm{number - 1}", traffic
            else:
                child.groups //= split.tower.size
        elif isinstance(child, nn.Dropout):
            layer.scale_at = getattr(child, "scale_at", "training")
            layer.__class__, layer.rows, layer.columns = layers.Dropout, rows, columns
