"""Checkpoints of a split model, readable on any number of ranks."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, Replicate

from alexnet_kernels._checksum import serialize_safetensors
from alexnet_kernels._errors import first_line, require
from alexnet_kernels._files import atomic_file
from alexnet_kernels.parallel.checkpoint_folder import DataPlanner, DataReader, problem_of, write_checksums
from alexnet_kernels.parallel.collectives import shard_slice

__all__ = ["export", "full_state_dict", "load", "save"]


def save(model: nn.Module, optimizer: torch.optim.Optimizer | None, path: str | Path) -> None:
    """Write a distributed checkpoint, a new folder, to which each rank writes its shards.

    The folder gets its name when it is complete. Every rank calls it, with the same path on a file system that all of
    them see. Raises ValueError if the path exists.
    """
    path = Path(path)
    _raise_on_all(f"{path} exists: name another folder" if path.exists() else "")
    temporary = path.with_name(f".{path.name}.tmp")
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    _barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=str(temporary))
    _barrier()
    if _rank() == 0:
        write_checksums(temporary)
        os.replace(temporary, path)
    _barrier()


def load(model: nn.Module, optimizer: torch.optim.Optimizer | None, path: str | Path) -> None:
    """Read what `save` wrote, with any number of ranks and any plan, into the model and the optimizer.

    Every rank calls it. Nothing that the folder holds is executed. Raises ValueError if there is no such checkpoint, or
    a file of it is damaged.
    """
    path = Path(path)
    _raise_on_all(problem_of(path) if _rank() == 0 else "")
    state = _state(model, optimizer)
    try:
        dcp.load(state, storage_reader=DataReader(path), planner=DataPlanner())
    except dcp.CheckpointException as error:
        failure = next(iter(error.failures.values()))[0]
        # torch's message recommends to execute the content.
        code = isinstance(failure, pickle.UnpicklingError)
        reason = "it holds more than tensors and plain values" if code else first_line(failure)
        raise ValueError(f"{path} can't be loaded into this model and optimizer: {reason}") from error
    optimizers = [] if optimizer is None else [optimizer]
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    values, states = get_state_dict(model, [] if optimizer is None else [optimizer])
    return {"model": values, "optimizer": states}


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the model before the split, on the CPU of every rank. Every rank calls it."""
    return {name: full_tensor(value).contiguous() for name, value in model.state_dict().items()}


def full_tensor(value: Tensor) -> Tensor:
    """The full value of a DTensor, or of any tensor, on the CPU of every rank, in its shards' memory format."""
    value = value.detach()
    if isinstance(value, DTensor):
        shard = value.to_local()
        channels_last = shard.dim() == 4 and shard.is_contiguous(memory_format=torch.channels_last)
        placements = list(value.placements)
        # First gather a tower's shard from the data-parallel ranks.
        for dim in range(len(placements)):
            placements[dim] = Replicate()
            value = value.redistribute(placements=placements)
        value = value.to_local().contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
    return value.cpu()


def shard_like(value: Tensor, like: DTensor) -> DTensor:
    """A full tensor of the shape of `like`, with its placements and memory format."""
    mesh, shard, local_like = like.device_mesh, value, like.to_local()
    # First cut a tower's shard; the data-parallel ranks cut their shards from it.
    for dim, placement in reversed(list(enumerate(like.placements))):
        if not placement.is_replicate():
            shard = shard[shard_slice(len(shard), mesh.get_local_rank(dim), mesh.size(dim))]
    local = torch.empty_like(local_like, dtype=value.dtype, memory_format=torch.preserve_format).copy_(shard)
    return DTensor.from_local(local, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def export(model: nn.Module, path: str | Path) -> None:
    """Write the full state_dict as one safetensors file, which `alexnet(weights=path)` reads.

    Every rank calls it, rank 0 writes. Raises ValueError if the path exists, MissingPackage without safetensors.
    """
    require("a safetensors file", "safetensors")
    path = Path(path)
    _raise_on_all(f"{path} exists: name another file" if path.exists() else "")
    state = full_state_dict(model)
    if _rank() == 0:
        with atomic_file(path) as file:
            file.write(serialize_safetensors(state, {"format": "pt"}))
    _barrier()


def _raise_on_all(problem: str) -> None:
    """Raise ValueError on every rank if rank 0 has a problem."""
    problems = [problem]
    if dist.is_initialized():
        dist.broadcast_object_list(problems, 0)
    if problems[0]:
        raise ValueError(problems[0])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
