"""`alexnet_kernels.parallel` as a strategy of PyTorch Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from alexnet_kernels.models import AlexNet
from alexnet_kernels.parallel import PLANS, parallelize
from alexnet_kernels.parallel.checkpoint import full_tensor, shard_like
from alexnet_kernels.parallel.plan import batch_shard

__all__ = ["AlexNetStrategy"]


class AlexNetStrategy(DDPStrategy):
    """Splits the AlexNet in a LightningModule over the trainer's devices; see `parallelize`.

        Trainer(strategy=AlexNetStrategy("towers"), accelerator="gpu", devices=2)

    Every process needs the same seed, as set by `seed_everything(0)`, and a batch shard of equal size, as the samplers
    that Lightning adds provide. Checkpoints are those of a run on one device, for every plan, and can be resumed on any
    number of devices.

    Args:
        plan: "towers", "hybrid" or "data".
        towers: number of neighbouring ranks that share the network. It divides the number of ranks.
        traffic: torch.bfloat16 or torch.float16: dtype of the activations sent between ranks. None: as computed.
        fully_sharded: whether the data-parallel ranks hold only a shard of the parameters that they share.
        options: options of Lightning's DDPStrategy, such as timeout and process_group_backend.

    Raises:
        ValueError: another plan or a number of towers below 1; when training starts, a module without exactly one
            AlexNet, a number of ranks that is no multiple of towers, and whatever `parallelize` refuses.
    """

    def __init__(
        self,
        plan: str = "towers",
        towers: int = 2,
        traffic: torch.dtype | None = None,
        fully_sharded: bool = False,
        **options: Any,
    ) -> None:
        if plan not in PLANS:
            raise ValueError(f"AlexNetStrategy: plan must be one of {', '.join(PLANS)}, not {plan!r}")
        if towers < 1:
            raise ValueError(f"AlexNetStrategy: towers must be at least 1, not {towers}")
        super().__init__(**options)
        self.plan, self.towers, self.traffic, self.fully_sharded = plan, towers, traffic, fully_sharded
        self._network: AlexNet | None = None

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The shard of the images that is this rank's."""
        index, count = batch_shard(self.plan, self.global_rank, self.world_size, self.towers)
        return {"num_replicas": count, "rank": index}

    def setup_distributed(self) -> None:
        # Lightning would seed the generators again, which it does not on one device. Dropout's masks would differ.
        seed = os.environ.pop("PL_GLOBAL_SEED", None) if self._start_method == "popen" else None
        try:
            super().setup_distributed()
        finally:
            if seed is not None:
                os.environ["PL_GLOBAL_SEED"] = seed

    def configure_ddp(self) -> None:
        assert self.model is not None
        found = [module for module in self.model.modules() if isinstance(module, AlexNet)]
        if len(found) != 1:
            raise ValueError(f"AlexNetStrategy: a module with one AlexNet is expected, this one has {len(found)}")
        if self.world_size % self.towers:
            raise ValueError(f"AlexNetStrategy: {self.world_size} ranks are no multiple of {self.towers} towers")
        shape = (self.world_size // self.towers, self.towers)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("data", "tower"))
        self._network = parallelize(found[0], mesh, self.plan, traffic=self.traffic, fully_sharded=self.fully_sharded)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:  # type: ignore[override]
        assert self._network is not None
        with self._network.parallelism.no_sync():  # type: ignore[operator,union-attr]
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state_dict of the unsplit module, on the CPU."""
        return {name: _full(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer state of the unsplit parameters, on the CPU."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        content = optimizer.state_dict()
        state = {
            key: {name: _full(value) for name, value in values.items()} for key, values in content["state"].items()
        }
        return {**content, "state": state}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, content in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            order = [key for group in content["param_groups"] for key in group["params"]]
            params = [param for group in optimizer.param_groups for param in group["params"]]
            state = {}
            for key, param in zip(order, params, strict=True):
                if key in content["state"]:
                    values = content["state"][key].items()
                    state[key] = {name: _shard(value, param) for name, value in values}
            optimizer.load_state_dict({**content, "state": state})

    def teardown(self) -> None:
        # DDPStrategy would move the module to the CPU. The shards belong on the mesh's device.
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _full(value: Any) -> Any:
    return full_tensor(value) if isinstance(value, Tensor) else value


def _shard(value: Any, param: Tensor) -> Any:
    """This rank's shard of a value with the parameter's shape; other values unchanged."""
    if isinstance(value, Tensor) and isinstance(param, DTensor) and value.shape == param.shape:
        return shard_like(value, param)
    return value
