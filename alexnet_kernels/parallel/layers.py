"""The layers of a split AlexNet. `parallelize` changes a model's layers to these classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import nn as modules
from alexnet_kernels._dispatch.layout import local, memory_format_of
from alexnet_kernels.nn.layers import register_layer
from alexnet_kernels.ops.conv2d_relu import conv2d_relu
from alexnet_kernels.ops.dropout import dropout
from alexnet_kernels.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_kernels.ops.local_response_norm import local_response_norm
from alexnet_kernels.ops.lrn_max_pool2d import lrn_max_pool2d
from alexnet_kernels.parallel.collectives import Exchange, Group, exchanged, shard_slice

__all__ = ["Conv2d", "Dropout", "Linear", "LocalResponseNorm"]


class Conv2d(nn.Conv2d):
    """A tower's filters, applied to its own channels or, if `all_towers`, to the channels of every tower."""

    name: str
    tower: Group
    all_towers: bool
    local_groups: int
    traffic: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        return self.compute_run("C", [self], input)

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        relu = "R" in run
        weight, bias = local(self.weight), local(self.bias)
        stride, padding = self.stride, cast(Any, self.padding)
        if not self.all_towers or self.tower.size == 1:
            return conv2d_relu(x, weight, bias, stride, padding, self.local_groups, relu=relu)
        channels_last = memory_format_of(x) == torch.channels_last
        exchange = Exchange(self.name, self.tower, self.traffic)
        unfinished, finish = exchanged(x.permute(0, 2, 3, 1) if channels_last else x, exchange)
        filters = weight.split(x.shape[1], 1)
        output = conv2d_relu(x, filters[self.tower.rank], bias, stride, padding, relu=False)
        parts = finish(unfinished)
        for rank in range(self.tower.size):
            if rank != self.tower.rank:
                part = parts[rank].permute(0, 3, 1, 2) if channels_last else parts[rank]
                output = output + conv2d_relu(part, filters[rank], None, stride, padding, relu=False)
        return F.relu(output) if relu else output


class LocalResponseNorm(modules.LocalResponseNorm):
    """Normalisation whose window crosses the border of two towers.

    Each tower normalises its channels, then recomputes those next to the border with a halo of the other tower's.
    """

    name: str
    tower: Group
    traffic: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        return self.compute_run("N", [self], input)

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        norm = self.size, self.alpha, self.beta, self.k

        def compute(part: Tensor) -> Tensor:
            if "P" not in run:
                return local_response_norm(part, *norm)
            pool = children[run.index("P")]
            window = pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode
            return lrn_max_pool2d(part, *norm, 1, *window, relu="R" in run)

        if self.tower.size == 1 or self.size == 1:
            return compute(x)
        memory_format = memory_format_of(x)
        channels, first = x.shape[1], self.tower.rank == 0
        # The window of channel i is i - left ... i + right.
        left, right = self.size // 2, (self.size - 1) // 2
        edge = x[:, channels - left :] if first else x[:, :left]
        exchange = Exchange(self.name, self.tower, self.traffic)
        unfinished, finish = exchanged(edge.contiguous(), exchange)
        output = compute(x)
        theirs = finish(unfinished)[1 if first else 0]
        # Kernels need a multiple of eight channels.
        halo = right if first else left
        if not halo:
            return output
        own = min(channels, -(-(left + right + halo) // 8) * 8 - halo)
        if first:
            strip = torch.cat([x[:, channels - own :], theirs[:, :halo]], 1)
            border = compute(strip.contiguous(memory_format=memory_format))[:, own - halo : own]
            parts = [output[:, : channels - halo], border]
        else:
            strip = torch.cat([theirs, x[:, :own]], 1)
            border = compute(strip.contiguous(memory_format=memory_format))[:, halo : 2 * halo]
            parts = [border, output[:, halo:]]
        return torch.cat(parts, 1).contiguous(memory_format=memory_format)


class Dropout(modules.Dropout):
    """Uses the mask that dropout on one device would have for these images and neurons."""

    rows: tuple[int, int]
    """(index, count): the shard of the images."""
    columns: tuple[int, int]
    """(index, count): the shard of the neurons."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, scale_at=self.scale_at, shard=self.shard(input.shape))

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        return self(x)

    def shard(self, shape: torch.Size) -> list[tuple[int, int, int]]:
        places = enumerate((self.rows, self.columns))
        return [(dim, index * shape[dim], count * shape[dim]) for dim, (index, count) in places]


class Linear(nn.Linear):
    """A tower's neurons. It gathers the inputs of every tower or, if `gathers_images`, of every rank's images."""

    name: str
    tower: Group
    gathers_images: bool
    logits: str
    """How outputs are gathered: "" not at all; "classes" every class of the tower's images; "images" every class of
    this rank's images."""
    traffic: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        output = self._gathered(input)
        return _gathered_logits(output, self) if self.logits and self.tower.size > 1 else output

    def compute_run(self, run: str, children: Sequence[Any], x: Tensor) -> Tensor:
        if run == "L":
            return self.forward(x)
        drop = children[2] if run == "LRD" else None
        if self.tower.size > 1:
            output = F.relu(self._gathered(x))
            return output if drop is None else drop(output)
        weight, bias = local(self.weight), local(self.bias)
        if drop is None:
            return linear_relu_dropout(x, weight, bias, 0.0, False)
        shard = drop.shard(torch.Size([x.shape[0], weight.shape[0]]))
        return linear_relu_dropout(x, weight, bias, drop.p, drop.training, scale_at=drop.scale_at, shard=shard)

    def _gathered(self, x: Tensor) -> Tensor:
        weight, bias = local(self.weight), local(self.bias)
        if self.tower.size == 1:
            return F.linear(x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        function = _GatheredImagesLinear if self.gathers_images else _GatheredInputsLinear
        with torch.autocast(x.device.type, enabled=False):
            return function.apply(x, weight, bias, Exchange(self.name, self.tower, self.traffic))


class _GatheredInputsLinear(torch.autograd.Function):
    """Linear over the inputs of every tower. The product of its own inputs overlaps the exchange in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.bias = exchange, bias is not None
        received = exchange.start(x)
        columns = weight.split(x.shape[1], 1)
        rank = exchange.group.rank
        output = F.linear(x, columns[rank], bias)
        exchange.wait()
        for other in range(exchange.group.size):
            if other != rank:
                output.addmm_(received[other].to(x.dtype), columns[other].t())
        ctx.save_for_backward(x, received, weight)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, received, weight = ctx.saved_tensors
        rank, size, inputs = ctx.exchange.group.rank, ctx.exchange.group.size, x.shape[1]
        columns = weight.split(inputs, 1)
        parts = grad.new_zeros(size, *x.shape)
        for other in range(size):
            if other != rank:
                torch.mm(grad, columns[other], out=parts[other])
        ctx.exchange.send(parts)
        grad_input = grad @ columns[rank]
        grad_weight = torch.empty_like(weight)
        for other in range(size):
            part = x if other == rank else received[other].to(x.dtype)
            grad_weight[:, other * inputs : (other + 1) * inputs] = grad.t() @ part
        grad_bias = grad.sum(0) if ctx.bias else None
        back = ctx.exchange.receive()
        for other in range(size):
            if other != rank:
                grad_input += back[other]
        return grad_input, grad_weight, grad_bias, None


class _GatheredImagesLinear(torch.autograd.Function):
    """Linear over the images of every rank. The product of its own images overlaps the exchange, the weight's gradient
    overlaps the exchange of gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.bias = exchange, bias is not None
        received = exchange.start(x)
        rank, size = exchange.group.rank, exchange.group.size
        output = x.new_empty(size, x.shape[0], weight.shape[0])
        output[rank] = F.linear(x, weight, bias)
        exchange.wait()
        rows = received.to(x.dtype)
        for other in range(size):
            if other != rank:
                output[other] = F.linear(rows[other], weight, bias)
        # The exchange rounded this rank's own images to the dtype of the traffic.
        rows[rank] = x
        ctx.save_for_backward(rows, weight)
        return output.flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        rank, size = ctx.exchange.group.rank, ctx.exchange.group.size
        grads = grad.unflatten(0, (size, -1))
        parts = torch.zeros_like(rows)
        for other in range(size):
            if other != rank:
                torch.mm(grads[other], weight, out=parts[other])
        ctx.exchange.send(parts)
        grad_weight = grad.t() @ rows.flatten(0, 1)
        grad_bias = grad.sum(0) if ctx.bias else None
        grad_input = grads[rank] @ weight
        back = ctx.exchange.receive()
        for other in range(size):
            if other != rank:
                grad_input += back[other]
        return grad_input, grad_weight, grad_bias, None


def _gathered_logits(logits: Tensor, layer: Linear) -> Tensor:
    parts = [shard_slice(layer.out_features, rank, layer.tower.size) for rank in range(layer.tower.size)]
    padded = F.pad(logits, (0, parts[0].stop - logits.shape[1]))
    whole = _Logits.apply(padded, Exchange("logits", layer.tower, layer.traffic), layer.logits == "images")
    return torch.cat([whole[rank, :, : part.stop - part.start] for rank, part in enumerate(parts)], 1)


class _Logits(torch.autograd.Function):
    """[n, C] of each rank to [T, n, C] or, with `by_images`, to [T, n / T, C] of this rank's images.

    The loss of every rank is the same or, with `by_images`, the mean over its own images. No gradients are summed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, exchange: Exchange, by_images: bool) -> Tensor:
        ctx.exchange, ctx.by_images = exchange, by_images
        if by_images:
            exchange.send(logits.unflatten(0, (exchange.group.size, -1)))
            return exchange.receive().to(logits.dtype)
        received = exchange.start(logits)
        exchange.wait()
        return received.to(logits.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.by_images:
            return grad[ctx.exchange.group.rank], None, None
        ctx.exchange.send(grad / ctx.exchange.group.size)
        return ctx.exchange.receive().to(grad.dtype).flatten(0, 1), None, None


for _kind, _layer in (("C", Conv2d), ("N", LocalResponseNorm), ("L", Linear), ("D", Dropout)):
    register_layer(_kind, _layer)
