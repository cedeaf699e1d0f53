"""Modules over the ops. They subclass torch.nn's where it has them, and keep its attribute names."""

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels.backends import leaves_as_torch
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm, plain_local_response_norm
from alexnet_kernels.ops.within_map_response_norm import plain_within_map_response_norm, within_map_response_norm

__all__ = ["Dropout", "LocalResponseNorm", "WithinMapResponseNorm"]

# torch.fx records a call of these instead of tracing into it. TorchScript compiles the first branch of each.
for _name in ("_dropout", "_local_response_norm", "_within_map_response_norm"):
    torch.fx.wrap(_name)

AdaptiveAvgPool2d = nn.AdaptiveAvgPool2d
"""The name that it has in models of former versions that were pickled whole."""


def _local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    if torch.jit.is_scripting():
        return _plain_local_response_norm(input, size, alpha, beta, k, groups)
    else:  # noqa: RET505
        if leaves_as_torch():
            return _plain_local_response_norm(input, size, alpha, beta, k, groups)
        return local_response_norm(input, size, alpha, beta, k, groups)


def _plain_local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    if input.dim() == 4:
        return plain_local_response_norm(input, size, alpha, beta, k, groups)
    images = input.flatten(2).unsqueeze(-1)
    return plain_local_response_norm(images, size, alpha, beta, k, groups).reshape(input.shape)


def _within_map_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    if torch.jit.is_scripting():
        return plain_within_map_response_norm(input, size, alpha, beta, k)
    else:  # noqa: RET505
        if leaves_as_torch():
            return plain_within_map_response_norm(input, size, alpha, beta, k)
        return within_map_response_norm(input, size, alpha, beta, k)


def _dropout(input: Tensor, p: float, training: bool, scale_at: str) -> Tensor:
    if torch.jit.is_scripting():
        return _plain_dropout(input, p, training, scale_at)
    else:  # noqa: RET505
        if leaves_as_torch():
            return _plain_dropout(input, p, training, scale_at)
        return dropout(input, p, training, scale_at=scale_at)


def _plain_dropout(input: Tensor, p: float, training: bool, scale_at: str) -> Tensor:
    """With a mask from torch's own stream."""
    output = F.dropout(input, p, training)
    return output * (1.0 - p) if scale_at == "inference" else output


class LocalResponseNorm(nn.LocalResponseNorm):
    """Normalisation across channels, `b[i] = a[i] / (k + alpha / size * sum_j a[j]^2)^beta`.

    j runs over the `size` channels nearest i, cut at the edges of i's own tower: the channels form `groups`
    towers of equal size, and with groups=1 there is one. alpha is divided by size, torch's convention:
    Krizhevsky et al. 2012, section 3.3, prints the sum undivided, so its alpha = 1e-4 is alpha = 5e-4 here.

    Input and output [N, C, *], float32, bfloat16, float16 or float64, in the input's memory format.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1) -> None:
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        return _local_response_norm(input, self.size, self.alpha, self.beta, self.k, self.groups)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", groups={self.groups}" if self.groups != 1 else "")


class WithinMapResponseNorm(nn.Module):
    """Normalisation inside each map, `b = a / (k + alpha / size^2 * sum a'^2)^beta`.

    The window of size x size is centred on the element and cut at the map's edges; the divisor stays size^2
    there. It is the second normalisation of layer 2 in the 2012 code (layers-145.cfg), which Krizhevsky et
    al. 2012 leave out.

    Input and output [N, C, H, W], float32, bfloat16, float16 or float64, in the input's memory format.
    """

    def __init__(self, size: int, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        return _within_map_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class Dropout(nn.Dropout):
    """Sets each element to zero with probability p in training; any shape.

    scale_at="training" is inverted dropout: kept elements times 1 / (1 - p) in training, the input itself in
    evaluation. scale_at="inference" is the paper's: kept elements as they are in training, the input times
    1 - p in evaluation (Krizhevsky et al. 2012, section 4.2). The mask comes from torch's generator through
    the op's own stream: the same seed gives a different mask than torch.nn.Dropout.
    """

    def __init__(self, p: float = 0.5, *, scale_at: str = "training") -> None:
        if scale_at not in ("training", "inference"):
            raise ValueError(f'scale_at must be "training" or "inference", got {scale_at!r}')
        super().__init__(p)
        self.scale_at = scale_at

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.scale_at == "training":
            return input
        return _dropout(input, self.p, self.training, self.scale_at)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_at={self.scale_at!r}"
