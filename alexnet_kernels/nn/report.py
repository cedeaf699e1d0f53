"""What was fused in a model and what was not, and why: of `fuse` and of the torch.compile backend."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["FusionReport", "Layers"]


@dataclass(frozen=True)
class Layers:
    """Consecutive layers of a model that are computed together.

    names: of the layers, as in the model or its graph.
    op: the op of `alexnet_kernels.ops` that computes them; None if PyTorch computes them as they are.
    reason: why they are not part of a run; None if they are.
    """

    names: tuple[str, ...]
    op: str | None = None
    reason: str | None = None


@dataclass
class FusionReport:
    """The layers of a model, in the order in which they run. str() has a line for each."""

    layers: list[Layers] = field(default_factory=list)

    @property
    def fused(self) -> list[Layers]:
        return [layers for layers in self.layers if layers.op is not None]

    @property
    def left(self) -> list[Layers]:
        return [layers for layers in self.layers if layers.op is None]

    def __str__(self) -> str:
        lines = []
        for layers in self.layers:
            what = layers.op if layers.op is not None else "as it is" + (f": {layers.reason}" if layers.reason else "")
            lines.append(f"{', '.join(layers.names)}: {what}")
        return "\n".join(lines)
