"""AlexNet's convolutions with frozen weights: features forward, gradients of the images backward.

The scaling of the images is part of conv1's weights, the gradients of weights are left out, and both images of a pair
may be in one batch, of which backward takes the part that needs a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels.backends import kernels_of, select
from alexnet_kernels.ops.conv2d_relu import conv2d_relu
from alexnet_kernels.ops.space_to_depth import weight_by_depth

__all__ = ["Convolution", "Pool", "Trunk", "trunk_of"]


@dataclass(frozen=True)
class Pool:
    """A max-pool without padding."""

    window: tuple[list[int], list[int], list[int]]  # kernel, stride, padding

    def forward(self, x: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """The maxima, and where they are if backward follows."""
        chosen = select("max_pool2d", x, None)
        if chosen != "native":
            output, argmax = kernels_of(chosen).max_pool2d(x, None, *self.window, False, False)
            return output, argmax
        if not keep:
            return F.max_pool2d(x, *self.window), None
        return torch.ops.aten.max_pool2d_with_indices(x, *self.window)

    def backward(self, grad: Tensor, argmax: Tensor, x: Tensor) -> Tensor:
        """The gradient of x [N, C, h, w], whose values are not read where a kernel of this package runs."""
        if argmax.dtype == torch.uint8:
            kernels = kernels_of(select("max_pool2d", grad, None))
            return kernels.max_pool2d_backward(grad, argmax, None, list(x.shape), *self.window)[0]
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *self.window, [1, 1], False, argmax)


@dataclass(frozen=True)
class Convolution:
    """A convolution and ReLU.

    by_depth: of a convolution of few channels with a stride, the weight that computes the images' gradient, in blocks
    of stride x stride pixels as channels, from the outputs': a convolution with stride 1. oneDNN's own takes five times
    as long as its forward.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    by_depth: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        output = conv2d_relu(x, self.weight, self.bias, self.stride, self.padding)
        return output.contiguous(memory_format=torch.channels_last)

    def backward(self, grad: Tensor, size: Sequence[int]) -> Tensor:
        """The gradient of the input, of that (height, width), for that of what ReLU has taken."""
        chosen = select("conv2d_relu", grad, None)
        if self.by_depth is not None and chosen != "native":
            taps = [tap - 1 for tap in self.by_depth.shape[2:]]
            blocks = F.conv2d(grad, self.by_depth, None, 1, taps).contiguous(memory_format=torch.channels_last)
            args = self.stride[0], [*self.padding], [*size], grad.dtype
            return kernels_of(chosen).depth_to_space(blocks, *args)
        shape = (len(grad), self.weight.shape[1], *size)
        # Of which the convolution's gradient needs the shape alone.
        like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        rest = [*self.stride], [*self.padding], [1, 1], False, [0, 0], 1, [True, False, False]
        found = torch.ops.aten.convolution_backward(grad, like, self.weight, None, *rest)[0]
        return found.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Trunk:
    """The five convolutions, the pool before each or None, and what is subtracted from the images, [1, 3, 1, 1]."""

    convolutions: tuple[Convolution, ...]
    pools: tuple[Pool | None, ...]
    shift: Tensor

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """The images in one batch, shifted, in the dtype of the weights, channels_last: one pass."""
        weight = self.convolutions[0].weight
        shape = (sum(map(len, images)), *images[0].shape[1:])
        found = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)
        first = 0
        for part in images:
            torch.sub(part, self.shift, out=found[first : first + len(part)])
            first += len(part)
        return found


def trunk_of(slices: Sequence[Sequence[nn.Module]], shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Trunk:
    """The trunk of slices of [pool,] convolution, ReLU for images `scale * (x - shift)`, [1, 3, 1, 1] in float64."""
    convolutions, pools = [], []
    for i, layers in enumerate(slices):
        conv: Any = layers[-2]
        weight = conv.weight.detach().double()
        weight = weight * scale if i == 0 else weight
        convolutions.append(
            Convolution(
                weight.to(dtype).contiguous(memory_format=torch.channels_last),
                conv.bias.detach().to(dtype),
                tuple(conv.stride),
                tuple(conv.padding),
                _by_depth(weight.to(dtype), conv.stride[0]) if conv.stride[0] > 1 else None,
            )
        )
        pools.append(_pool(layers[0]) if len(layers) == 3 else None)
    return Trunk(tuple(convolutions), tuple(pools), shift.to(torch.promote_types(dtype, torch.float32)))


def _by_depth(weight: Tensor, stride: int) -> Tensor:
    whole = weight_by_depth(weight, stride)
    return whole.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _pool(pool: Any) -> Pool:
    pairs = (
        [size, size] if isinstance(size, int) else [*size] for size in (pool.kernel_size, pool.stride, pool.padding)
    )
    kernel, stride, padding = pairs
    return Pool((kernel, stride, padding))
