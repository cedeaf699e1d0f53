"""The state of a split model: its process groups, and the reduction of its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from alexnet_kernels._dispatch.layout import local
from alexnet_kernels.parallel.collectives import Group, all_reduce
from alexnet_kernels.parallel.plan import batch_shard

__all__ = ["Parallelism", "parallelism_of"]


class Parallelism:
    """How a model is split: `model.parallelism`."""

    name: str
    """The plan."""
    mesh: DeviceMesh
    """With dimensions "data" and "tower", or one of them."""
    tower: Group
    """The ranks that share the neurons."""
    rows: tuple[int, int]
    """(index, count): which of `count` equal shards of a batch this rank passes to the model."""
    first_class: int
    """The first class whose logit this rank computes."""

    def __init__(self, name: str, mesh: DeviceMesh, ranks: Any) -> None:
        self.name, self.mesh = name, mesh
        names = mesh.mesh_dim_names or ()
        groups = {
            dim: Group(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(names.index(dim)))
            if dim in names
            else Group(None, 0, 1)
            for dim in ("data", "tower")
        }
        self.data = groups["data"]
        self.all = Group(ranks, groups["data"].rank * groups["tower"].size + groups["tower"].rank, mesh.size())
        self.tower = Group(None, 0, 1) if name == "data" else groups["tower"]
        self.rows = batch_shard(name, self.all.rank, self.all.size, groups["tower"].size)
        self.first_class = 0
        self._shape: tuple[Any, ...] | None = None
        self._sync = True
        self._pending: list[tuple[Any, Tensor, int]] = []
        self._fully_sharded: list[FSDPModule] = []

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside the block accumulate gradients on each rank. The first one after it sums them over the
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
        """Forward pre-hook: ValueError on every rank if the inputs' shapes differ. Checked when the shape changes."""
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or not module.training:
            return
        shape = (*x.shape, str(x.dtype))
        if shape == self._shape:
            return
        shapes: list[Any] = [None] * self.all.size
        dist.all_gather_object(shapes, shape, self.all.handle)
        if len(set(shapes)) > 1:
            listed = ", ".join(f"rank {rank} {list(given[:-1])} {given[-1]}" for rank, given in enumerate(shapes))
            raise ValueError(f"every rank needs the same number of images, of one size and dtype: {listed}")
        self._shape = shape

    def reduce_gradient(self, parameter: nn.Parameter, group: Group, divisor: int) -> None:
        """Sum the parameter's gradient over the group, divided by `divisor`, as soon as it is computed."""

        def reduce(param: Tensor) -> None:
            if not self._sync or param.grad is None:
                return
            if not self._pending:
                torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
            grad = local(param.grad)
            self._pending.append((all_reduce("gradients", grad, group, wait=False), grad, divisor))

        parameter.register_post_accumulate_grad_hook(reduce)

    def fully_shard(self, model: nn.Module, container: nn.Module, group: Group, divisor: int) -> None:
        """Shard the container's parameters over the group, over which gradients are summed, divided by `divisor`."""
        if group is self.data and len(self.mesh.mesh_dim_names or ()) == 2:
            mesh = self.mesh["data"]
        else:
            mesh = DeviceMesh.from_group(group.handle, self.mesh.device_type, mesh_dim_names=("rank",))
        # The parameters stay gathered from forward to backward: the traffic is that of an all-reduce.
        module = fully_shard(container, mesh=mesh, reshard_after_forward=False)
        module.set_gradient_divide_factor(divisor)
        # gloo has no average.
        module.set_force_sum_reduction_for_comms(self.mesh.device_type == "cpu")
        self._fully_sharded.append(module)

        def unshard(*_: Any) -> None:
            # Gathers the classifier's parameters while the convolutions run.
            module.unshard(async_op=True)

        def reshard(*_: Any) -> None:
            if not torch.is_grad_enabled():
                module.reshard()

        model.register_forward_pre_hook(unshard)
        model.register_forward_hook(reshard)

    def _finish(self) -> None:
        for work, grad, divisor in self._pending:
            work.wait()
            if divisor != 1:
                grad.div_(divisor)
        self._pending.clear()


def parallelism_of(model: nn.Module) -> Parallelism:
    """`model.parallelism`. ValueError for a model that `parallelize` has not split."""
    plan = getattr(model, "parallelism", None)
    if not isinstance(plan, Parallelism):
        raise ValueError("the model is not parallel: call parallelize first")
    return plan
