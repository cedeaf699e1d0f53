"""How a run is split over processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from alexnet_kernels._errors import InputError
from alexnet_kernels.models import AlexNet
from alexnet_kernels.parallel.plan import PLANS, batch_shard, split_problem
from alexnet_kernels.training.distributed.environment import is_launched
from alexnet_kernels.training.settings import PURE, Settings

__all__ = ["TIMEOUT", "ParallelConfig"]

TIMEOUT = 600.0
"""Default seconds without a finished step after which a run counts as hung."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is split over processes. Raises InputError for a value out of range."""

    plan: str = "towers"
    """A name in `parallel.PLANS`."""
    towers: int = 2
    """Processes that share one network."""
    traffic: str | None = None
    """bf16 or 16: dtype of the activations sent between processes. None: as computed."""
    fully_sharded: bool = False
    """Whether the data-parallel processes hold only a shard of the parameters that they share."""
    timeout: float = TIMEOUT
    """Seconds without a finished step after which the run counts as hung."""

    def __post_init__(self) -> None:
        if self.plan not in PLANS:
            raise InputError(f"--parallel must be one of {', '.join(PLANS)}, got {self.plan}")
        if self.towers < 1:
            raise InputError(f"--towers must be at least 1, got {self.towers}")
        if self.traffic not in (None, "bf16", "16"):
            raise InputError(f"--traffic must be bf16 or 16, got {self.traffic}")
        if self.timeout <= 0:
            raise InputError(f"--timeout must be positive, got {self.timeout}")

    def check(self, processes: int, settings: Settings | None = None) -> None:
        """Raise InputError if the plan can't split over so many processes, or can't split the network or the batch."""
        if processes % self.towers:
            raise InputError(
                f"--parallel {self.plan} of {self.towers} towers needs a multiple of {self.towers} processes, "
                f"got {processes}"
            )
        if settings is None:
            return
        model = AlexNet(2, settings.network(), width=settings.width, device="meta")
        if reason := split_problem(model, self.plan, self.towers):
            raise InputError(f"--parallel {self.plan}: {reason}")
        if settings.precision == "16":
            raise InputError("--precision 16 can't be used with --parallel; bf16, which needs no loss scaling, can")
        if settings.precision == PURE:
            raise InputError(
                f"--precision {PURE} can't be used with --parallel, which would add up the processes' gradients in "
                "bfloat16; bf16 and 32 can"
            )
        shards = batch_shard(self.plan, 0, processes, self.towers)[1]
        if settings.batch_size % (shards * settings.accumulate):
            accumulated = f" x --accumulate {settings.accumulate}" if settings.accumulate > 1 else ""
            raise InputError(
                f"--batch-size {settings.batch_size} doesn't split evenly into the {shards} batch shards of "
                f"--parallel {self.plan} on {processes} processes{accumulated}"
            )

    def resume_options(self) -> str:
        """The options, after a space, of a command that resumes the run with the same split."""
        words = f" --parallel {self.plan}"
        if is_launched():
            words += f" --processes {os.environ['WORLD_SIZE']}"
        if self.towers != 2:
            words += f" --towers {self.towers}"
        if self.traffic is not None:
            words += f" --traffic {self.traffic}"
        return words + " --fully-sharded" * self.fully_sharded
