"""Operators called through torch.ops with arguments that the public functions refuse: an error, and no access to memory
outside the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import FORMATS
from platforms import BACKENDS, emulation
from torch import Tensor
from torch.utils._pytree import tree_map_only

from alexnet_kernels import _library, backends
from alexnet_kernels.op_info import OP_INFOS, Maker, operator_calls
from alexnet_kernels.op_info._record import copy

pytestmark = pytest.mark.skipif(not _library.LOADED, reason="needs the native library")

HALF, DOUBLE, BYTE, INT = torch.float16, torch.float64, torch.uint8, torch.int64
FAR = 2**62


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (2, 8, 8, 8)).to(dtype)


def last(*shape: int) -> Tensor:
    return x(*shape).contiguous(memory_format=torch.channels_last)


def seed(*shape: int, dtype: torch.dtype = INT) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def winners(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BYTE)


def pixels(*shape: int, dtype: torch.dtype = BYTE) -> Tensor:
    return torch.zeros(shape or (2, 8, 8, 3), dtype=dtype)


def crops(count: int = 2, *, at: int = 0) -> Tensor:
    return torch.full((count, 2), at)


POOL: dict[str, Any] = {"kernel": [3, 3], "stride": [2, 2], "padding": [0, 0]}
LRN = (5, 1.0, 0.75, 1.0, 1)


def pool(
    k: Any,
    input: Tensor | None = None,
    ceil: bool = False,
    relu: bool = False,
    bias: Tensor | None = None,
    **window: Any,
) -> Any:
    return k.max_pool2d(x() if input is None else input, bias, *{**POOL, **window}.values(), ceil, relu)


def pool_backward(
    k: Any,
    grad: Tensor | None = None,
    argmax: Tensor | None = None,
    size: tuple[int, ...] = (1, 1, 5, 5),
    bias: Tensor | None = None,
    **window: Any,
) -> Any:
    grad = x(1, 1, 2, 2) if grad is None else grad
    argmax = winners(*grad.shape) if argmax is None else argmax
    return k.max_pool2d_backward(grad, argmax, bias, size, *{**POOL, **window}.values())


def lrn_pool(k: Any, lrn: tuple = LRN, bias: Tensor | None = None, **window: Any) -> Any:
    return k.lrn_max_pool2d(last(), bias, *lrn, *{**POOL, **window}.values(), False, False)


def lrn_pool_backward(
    k: Any,
    grad: Tensor,
    argmax: Tensor,
    input: Tensor | None = None,
    lrn: tuple = LRN,
    bias: Tensor | None = None,
) -> Any:
    input = x(4, 8, 8, 8) if input is None else input
    return k.lrn_max_pool2d_backward(grad, input, bias, argmax, *lrn, *POOL.values(), False)


def dropout(k: Any, input: Tensor | None = None, p: float = 0.5, key: Tensor | None = None, row: int = 1024) -> Any:
    return k.dropout(x() if input is None else input, p, 2.0, seed() if key is None else key, 0, row, row, 0)


def linear(
    k: Any, shape: tuple = (4, 8), weight: Tensor | None = None, bias: Any = None, row: int = 3, key: Any = None
):
    weight = x(3, 8) if weight is None else weight
    return k.linear_relu_dropout(
        x(*shape), weight, bias, True, 0.5, 2.0, seed() if key is None else key, 0, row, row, 0
    )


def sgd(k: Any, params: list, grads: list | None = None, momentum: list | None = None, masters: list | None = None):
    like = [p.clone() for p in params]
    given = [params, grads if grads is not None else like, momentum if momentum is not None else like, masters or []]
    return k.sgd_step(*given, 0.1, 0.9, 0.0, 0.0, False, True, False)


def augment(k: Any, images: Tensor | None = None, at: Tensor | None = None, size: Any = (4, 4), **options: Any) -> Any:
    given = {"flips": None, "shift": None, "mean": None, "scale": None, "dtype": torch.float32, **options}
    images = pixels() if images is None else images
    return k.augment(images, crops() if at is None else at, size, *given.values(), True)


def batch_norm(k: Any, input: Tensor | None = None, training: bool = True, **values: Any) -> Any:
    given = {"mean": None, "var": None, "weight": None, "bias": None, **values}
    return k.batch_norm_relu(x() if input is None else input, *given.values(), training, 1e-5)


def batch_norm_backward(k: Any, grad: Tensor, input: Tensor, mean: Tensor, **values: Any) -> Any:
    given = {"weight": None, "bias": None, **values}
    return k.batch_norm_relu_backward(grad, input, mean, mean, *given.values(), True, 1e-5)


def conv(k: Any, weight: Tensor | None = None, bias: Any = None, stride=(1, 1), padding=(0, 0), groups: int = 1):
    return k.conv2d_relu(x(), x(4, 8, 3, 3) if weight is None else weight, bias, stride, padding, groups, True)


def conv_backward(k: Any, operator: str, **changes: Any) -> Any:
    """`conv2d_relu_backward_<operator>` of a convolution with one group of 3 x 3 filters."""
    given = {"grad": x(2, 4, 6, 6), "output": None, "input": x(), "weight": x(4, 8, 3, 3)}
    given |= {"stride": [1, 1], "padding": [0, 0], "groups": 1, "mask": False, "algorithm": 1, **changes}
    mask = given.pop("mask")
    algorithm = given.pop("algorithm")
    options = (mask, algorithm) if operator == "input" else (algorithm,)
    return getattr(k, f"conv2d_relu_backward_{operator}")(*given.values(), *options)


# Faults of both backward operators of conv2d_relu.
CONV_BACKWARD: dict[str, Callable[[], dict[str, Any]]] = {
    "small gradient": lambda: {"grad": x(1, 4, 6, 6)},
    "large gradient": lambda: {"grad": x(2, 4, 8, 8)},
    "three dimensions": lambda: {"grad": x(4, 6, 6)},
    "gradient of another dtype": lambda: {"grad": x(2, 4, 6, 6, dtype=HALF)},
    "small output": lambda: {"output": x(2, 4, 1, 1)},
    "output of another dtype": lambda: {"output": x(2, 4, 6, 6, dtype=DOUBLE)},
    "output elsewhere": lambda: {"output": x(2, 4, 6, 6).to("meta")},
    "input of another dtype": lambda: {"input": x(dtype=HALF)},
    "other channels": lambda: {"weight": x(4, 7, 3, 3)},
    "no taps": lambda: {"weight": x(4, 8, 0, 3), "grad": x(2, 4, 9, 6)},
    "larger than the image": lambda: {"weight": x(4, 8, 9, 3)},
    "groups 0": lambda: {"groups": 0},
    "groups 3": lambda: {"groups": 3},
    "groups of 2^62": lambda: {"groups": FAR, "weight": x(0, 8, 3, 3), "grad": x(2, 0, 6, 6)},
    "stride 0": lambda: {"stride": [0, 1]},
    "one stride": lambda: {"stride": [1]},
    "padding negative": lambda: {"padding": [-1, 0]},
    "padding of 2^62": lambda: {"padding": [FAR, FAR]},
    "algorithm 4": lambda: {"algorithm": 4},
    "algorithm -1": lambda: {"algorithm": -1},
}


def _call_conv_backward(k: Any, operator: str, changes: Callable[[], dict[str, Any]]) -> Any:
    return conv_backward(k, operator, **changes())


# By operator and fault.
REFUSED: dict[str, Callable[[Any], Any]] = {
    "max_pool2d: stride 0": lambda k: pool(k, stride=[0, 0]),
    "max_pool2d: stride negative": lambda k: pool(k, stride=[-1, 1]),
    "max_pool2d: kernel 0": lambda k: pool(k, kernel=[0, 0]),
    "max_pool2d: kernel negative": lambda k: pool(k, kernel=[-3, -3]),
    "max_pool2d: one number": lambda k: pool(k, kernel=[3], stride=[2], padding=[0]),
    "max_pool2d: no numbers": lambda k: pool(k, kernel=[], stride=[], padding=[]),
    "max_pool2d: three numbers": lambda k: pool(k, kernel=[3, 3, 3]),
    "max_pool2d: window of 289": lambda k: pool(k, x(1, 1, 20, 20), kernel=[17, 17]),
    "max_pool2d: window of 2^124": lambda k: pool(k, kernel=[FAR, FAR], padding=[FAR // 2, FAR // 2]),
    "max_pool2d: padding": lambda k: pool(k, padding=[100, 100]),
    "max_pool2d: padding, channels_last": lambda k: pool(k, last(), padding=[100, 100]),
    "max_pool2d: padding negative": lambda k: pool(k, padding=[-1, -1]),
    "max_pool2d: padding negative, channels_last": lambda k: pool(k, last(), padding=[-1, -1], ceil=True),
    "max_pool2d: stride of 2^62": lambda k: pool(k, stride=[FAR, FAR]),
    "max_pool2d: three dimensions": lambda k: pool(k, x(4, 8, 8)),
    "max_pool2d: five dimensions": lambda k: pool(k, x(1, 1, 4, 8, 8)),
    "max_pool2d: integers": lambda k: pool(k, torch.ones(1, 1, 8, 8, dtype=torch.int32)),
    "max_pool2d: smaller than the window": lambda k: pool(k, x(1, 1, 2, 2)),
    "max_pool2d: no rows": lambda k: pool(k, x(1, 1, 0, 5), kernel=[2, 2], padding=[1, 1]),
    "max_pool2d: no columns": lambda k: pool(k, x(1, 2, 5, 0), kernel=[2, 2], padding=[1, 1]),
    "max_pool2d: 256 pixels with relu": lambda k: pool(k, x(1, 1, 16, 16), kernel=[16, 16], relu=True),
    "max_pool2d: short bias": lambda k: pool(k, bias=x(7)),
    "max_pool2d: bias of two dimensions": lambda k: pool(k, bias=x(8, 1)),
    "max_pool2d: bias of integers": lambda k: pool(k, bias=torch.ones(8, dtype=INT)),
    "max_pool2d: bias of another dtype": lambda k: pool(k, bias=x(8, dtype=HALF)),
    "max_pool2d: double bias": lambda k: pool(k, bias=x(8, dtype=DOUBLE)),
    "max_pool2d: bias on another device": lambda k: pool(k, bias=x(8).to("meta")),
    "max_pool2d: sparse": lambda k: pool(k, x().to_sparse()),
    "max_pool2d_backward: size of the input": lambda k: pool_backward(k, x(1, 1, 200, 200)),
    "max_pool2d_backward: size of three": lambda k: pool_backward(k, size=(1, 1, 5)),
    "max_pool2d_backward: size negative": lambda k: pool_backward(k, size=(1, 1, -5, 5)),
    "max_pool2d_backward: batch": lambda k: pool_backward(k, size=(1000, 100, 5, 5)),
    "max_pool2d_backward: small argmax": lambda k: pool_backward(
        k, x(1, 1, 50, 50), winners(1, 1, 1, 1), (1, 1, 101, 101)
    ),
    "max_pool2d_backward: small gradient": lambda k: pool_backward(
        k, x(1, 4, 1, 1), winners(1, 4, 50, 50).contiguous(memory_format=torch.channels_last), (1, 4, 101, 101)
    ),
    "max_pool2d_backward: argmax of int64": lambda k: pool_backward(k, argmax=torch.full((1, 1, 2, 2), 4)),
    "max_pool2d_backward: short bias": lambda k: pool_backward(k, bias=x(2)),
    "max_pool2d_backward: bias of another dtype": lambda k: pool_backward(k, bias=x(1, dtype=DOUBLE)),
    "max_pool2d_backward: stride 0": lambda k: pool_backward(k, stride=[0, 0]),
    "local_response_norm: size 0": lambda k: k.local_response_norm(x(), 0, 1.0, 0.75, 1.0, 1),
    "local_response_norm: size negative": lambda k: k.local_response_norm(last(), -100000, 1.0, 0.75, 1.0, 1),
    "local_response_norm: groups 0": lambda k: k.local_response_norm(x(), 5, 1.0, 0.75, 1.0, 0),
    "local_response_norm: groups negative": lambda k: k.local_response_norm(x(), 5, 1.0, 0.75, 1.0, -1),
    "local_response_norm: 3 groups of 8": lambda k: k.local_response_norm(x(), 5, 1.0, 0.75, 1.0, 3),
    "local_response_norm: 100 groups of 8": lambda k: k.local_response_norm(last(), 5, 1.0, 0.75, 1.0, 100),
    "local_response_norm: two dimensions": lambda k: k.local_response_norm(x(4, 8), *LRN),
    "local_response_norm_backward: small gradient": lambda k: k.local_response_norm_backward(x(1, 1, 1, 1), x(), *LRN),
    "local_response_norm_backward: float16": lambda k: k.local_response_norm_backward(x().half(), x(), *LRN),
    "local_response_norm_backward: size 0": lambda k: k.local_response_norm_backward(x(), x(), 0, *LRN[1:]),
    "lrn_max_pool2d: size negative": lambda k: lrn_pool(k, (-100, *LRN[1:])),
    "lrn_max_pool2d: groups 0": lambda k: lrn_pool(k, (*LRN[:4], 0)),
    "lrn_max_pool2d: 100 groups": lambda k: lrn_pool(k, (*LRN[:4], 100)),
    "lrn_max_pool2d: kernel 0": lambda k: lrn_pool(k, kernel=[0, 0]),
    "lrn_max_pool2d: stride 0": lambda k: lrn_pool(k, stride=[0, 0]),
    "lrn_max_pool2d: padding": lambda k: lrn_pool(k, padding=[99, 99]),
    "lrn_max_pool2d: short bias": lambda k: lrn_pool(k, bias=x(1)),
    "lrn_max_pool2d: bias of another dtype": lambda k: lrn_pool(k, bias=x(8, dtype=DOUBLE)),
    "lrn_max_pool2d_backward: short bias": lambda k: lrn_pool_backward(
        k, x(4, 8, 3, 3), winners(4, 8, 3, 3), bias=x(7)
    ),
    "lrn_max_pool2d_backward: bias of another dtype": lambda k: lrn_pool_backward(
        k, x(4, 8, 3, 3), winners(4, 8, 3, 3), bias=x(8, dtype=HALF)
    ),
    "lrn_max_pool2d_backward: large gradient": lambda k: lrn_pool_backward(k, x(4, 8, 300, 300), winners(4, 8, 3, 3)),
    "lrn_max_pool2d_backward: small argmax": lambda k: lrn_pool_backward(k, x(4, 8, 3, 3), winners(4, 8, 1, 1)),
    "lrn_max_pool2d_backward: another dtype": lambda k: lrn_pool_backward(
        k, x(4, 8, 3, 3), winners(4, 8, 3, 3), x(4, 8, 8, 8, dtype=HALF)
    ),
    "lrn_max_pool2d_backward: groups 0": lambda k: lrn_pool_backward(
        k, x(4, 8, 3, 3), winners(4, 8, 3, 3), lrn=(*LRN[:4], 0)
    ),
    "batch_norm_relu: no statistics": lambda k: batch_norm(k, training=False),
    "batch_norm_relu: short weight": lambda k: batch_norm(k, x(1, 100000, 1, 1), weight=x(1), bias=x(1)),
    "batch_norm_relu: short statistics": lambda k: batch_norm(k, mean=x(3), var=x(3), training=False),
    "batch_norm_relu: integers": lambda k: batch_norm(k, weight=torch.ones(8, dtype=INT)),
    "batch_norm_relu_backward: short mean": lambda k: batch_norm_backward(k, x(1, 1000, 1, 1), x(1, 1000, 1, 1), x(1)),
    "batch_norm_relu_backward: small gradient": lambda k: batch_norm_backward(k, x(1, 1, 1, 1), x(), x(8)),
    "batch_norm_relu_backward: float16": lambda k: batch_norm_backward(k, x(dtype=HALF), x(), x(8)),
    "batch_norm_relu_backward: short bias": lambda k: batch_norm_backward(k, x(), x(), x(8), bias=x(1)),
    "dropout: rows of 0": lambda k: dropout(k, row=0),
    "dropout: rows of -1": lambda k: dropout(k, row=-1),
    "dropout: rows of -1, channels_last": lambda k: dropout(k, last(), row=-1),
    "dropout: rows larger than the tensor": lambda k: dropout(k, x(1000), row=1001),
    "dropout: rows that don't divide": lambda k: dropout(k, x(1000), row=999),
    "dropout: no seed": lambda k: dropout(k, key=seed(0)),
    "dropout: seed of uint8": lambda k: dropout(k, key=seed(1, dtype=BYTE)),
    "dropout: seed elsewhere": lambda k: dropout(k, key=seed().to("meta")),
    "dropout: p negative": lambda k: dropout(k, p=-5.0),
    "dropout: p is NaN": lambda k: dropout(k, p=float("nan")),
    "dropout: p of 1e300": lambda k: dropout(k, p=1e300),
    "dropout: integers": lambda k: dropout(k, torch.ones(8, dtype=INT), row=8),
    "linear_relu_dropout: rows of 0": lambda k: linear(k, row=0),
    "linear_relu_dropout: rows of -3": lambda k: linear(k, row=-3),
    "linear_relu_dropout: large rows": lambda k: linear(k, (64, 8), x(30, 8), row=10**6),
    "linear_relu_dropout: short bias": lambda k: linear(k, bias=x(1)),
    "linear_relu_dropout: no seed": lambda k: linear(k, key=seed(0)),
    "linear_relu_dropout: other input": lambda k: linear(k, (4, 7)),
    "linear_relu_dropout: weight of three dimensions": lambda k: linear(k, weight=x(3, 8, 1)),
    "relu_dropout_backward: small gradient": lambda k: k.relu_dropout_backward(x(1), x(1000000), 2.0),
    "relu_dropout_backward: float16": lambda k: k.relu_dropout_backward(x(1000, dtype=HALF), x(1000), 2.0),
    "sgd_step: fewer gradients": lambda k: sgd(k, [x(9), x(9)], [x(9)]),
    "sgd_step: no gradients": lambda k: sgd(k, [x(9)], []),
    "sgd_step: fewer masters": lambda k: sgd(k, [x(9), x(9)], masters=[x(9)]),
    "sgd_step: small gradient": lambda k: sgd(k, [x(100000)], [x(1)]),
    "sgd_step: small momentum": lambda k: sgd(k, [x(100000)], momentum=[x(1)]),
    "sgd_step: masters of float16": lambda k: sgd(k, [x(9, dtype=HALF)], momentum=[x(9)], masters=[x(9, dtype=HALF)]),
    "sgd_step: momentum of another half": lambda k: sgd(k, [x(9, dtype=HALF)], momentum=[x(9).bfloat16()]),
    "sgd_step: gradient of float64": lambda k: sgd(k, [x(9)], [x(9, dtype=DOUBLE)]),
    "sgd_step: integers": lambda k: sgd(k, [torch.ones(9, dtype=INT)], [x(9)], [x(9)]),
    "sgd_step: expanded": lambda k: sgd(k, [torch.ones(1).expand(1000)], [x(1000)], [x(1000)]),
    "sgd_step: other strides": lambda k: sgd(k, [x(4, 8, 3, 3)], [last(4, 8, 3, 3)]),
    "sgd_step: gradient elsewhere": lambda k: sgd(k, [x(9)], [x(9).to("meta")]),
    "augment: fewer crops": lambda k: augment(k, pixels(1000, 8, 8, 3), crops(1)),
    "augment: large crops": lambda k: augment(k, size=(400, 400)),
    "augment: negative crops": lambda k: augment(k, size=(-4, -4)),
    "augment: one size": lambda k: augment(k, size=(4,)),
    "augment: short flips": lambda k: augment(k, pixels(1000, 4, 4, 3), crops(1000), flips=seed(1, dtype=torch.bool)),
    "augment: short mean": lambda k: augment(k, mean=x(3, 1, 1)),
    "augment: mean without dimensions": lambda k: augment(k, mean=torch.zeros(())),
    "augment: short shift": lambda k: augment(k, pixels(1000, 4, 4, 3), crops(1000), shift=x(1)),
    "augment: short scale": lambda k: augment(k, scale=x(1)),
    "augment: images of bool": lambda k: augment(k, pixels(dtype=torch.bool)),
    "augment: images of float": lambda k: augment(k, pixels(dtype=torch.float32)),
    "augment: result of int32": lambda k: augment(k, dtype=torch.int32),
    "augment: three dimensions": lambda k: augment(k, pixels(8, 8, 3)),
    "space_to_depth: blocks of 0": lambda k: k.space_to_depth(x(), 0, [0, 0], [2, 2], torch.float32),
    "space_to_depth: blocks of -2": lambda k: k.space_to_depth(x(), -2, [0, 0], [2, 2], torch.float32),
    "space_to_depth: padding negative": lambda k: k.space_to_depth(last(), 2, [-5, -5], [4, 4], torch.float32),
    "space_to_depth: size negative": lambda k: k.space_to_depth(last(), 2, [0, 0], [-4, -4], torch.float32),
    "space_to_depth: one size": lambda k: k.space_to_depth(last(), 2, [0, 0], [4], torch.float32),
    "space_to_depth: result of int32": lambda k: k.space_to_depth(last(), 2, [0, 0], [4, 4], torch.int32),
    "depth_to_space: blocks of 0": lambda k: k.depth_to_space(x(), 0, [0, 0], [4, 4], torch.float32),
    "depth_to_space: padding negative": lambda k: k.depth_to_space(x(), 2, [-100, -100], [16, 16], torch.float32),
    "depth_to_space: blocks larger than the channels": lambda k: k.depth_to_space(
        x(), 5, [0, 0], [16, 16], torch.float32
    ),
    "conv2d_relu: stride 0": lambda k: conv(k, stride=[0, 0]),
    "conv2d_relu: groups 0": lambda k: conv(k, groups=0),
    "conv2d_relu: other channels": lambda k: conv(k, x(4, 7, 3, 3)),
    "conv2d_relu: padding negative": lambda k: conv(k, padding=[-1, -1]),
    "conv2d_relu: short bias": lambda k: conv(k, bias=x(1)),
    "conv2d_relu: integers": lambda k: conv(k, torch.ones(4, 8, 3, 3, dtype=INT)),
    **{
        f"conv2d_relu_backward_{operator}: {fault}": partial(_call_conv_backward, operator=operator, changes=changes)
        for operator in ("input", "weight")
        for fault, changes in CONV_BACKWARD.items()
    },
}

# Unusual, but defined: the result, or None where any finite one will do.
ACCEPTED: dict[str, Callable[[Any], Any]] = {
    "max_pool2d_backward: positions outside the window": lambda k: pool_backward(
        k, x(64, 64, 2, 2), torch.full((64, 64, 2, 2), 255, dtype=BYTE), (64, 64, 5, 5)
    ),
    "lrn_max_pool2d_backward: positions outside the window": lambda k: lrn_pool_backward(
        k, x(4, 8, 3, 3), torch.full((4, 8, 3, 3), 255, dtype=BYTE)
    ),
    "local_response_norm: any size": lambda k: k.local_response_norm(last(), FAR, 1.0, 0.75, 1.0, 1),
    "local_response_norm_backward: any size": lambda k: k.local_response_norm_backward(
        x(), x(), FAR, 1.0, 0.75, 1.0, 1
    ),
    "lrn_max_pool2d: any size": lambda k: lrn_pool(k, (FAR, *LRN[1:])),
    "max_pool2d: any stride": lambda k: pool(k, x(1, 1, 3, 3), stride=[2**30, 2**30]),
    "max_pool2d: positions beyond the right edge": lambda k: pool_backward(
        k, x(1, 1, 1, 2), torch.tensor([[[[0, 2]]]], dtype=BYTE), (1, 1, 3, 5), stride=[3, 3]
    ),
    "space_to_depth: padding only": lambda k: k.space_to_depth(last(), 2, [1000, 1000], [4, 4], torch.float32),
    "space_to_depth: any padding": lambda k: k.space_to_depth(last(), 2, [0, 2**31 - 1], [4, 4], torch.float32),
    "depth_to_space: any padding": lambda k: k.depth_to_space(last(), 2, [0, 2**31 - 1], [4, 4], torch.float32),
    "depth_to_space: any padding of rows": lambda k: k.depth_to_space(last(), 2, [2**31 - 1, 0], [4, 4], torch.float32),
}


@pytest.fixture(params=[name for name in ("cpu", "cuda") if name in BACKENDS["cpu"]])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The operators of the native library, and those of the CUDA kernels in the emulation."""
    if request.param == "cuda":
        emulation.load()
        return torch.ops.alexnet_kernels_emulated
    return torch.ops.alexnet_kernels


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused(kernels: Any, call: Callable[[Any], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
        call(kernels)


def test_crops_outside_their_images() -> None:
    with pytest.raises(RuntimeError, match=r"crops\[0\]\[0\] is 100; a crop inside the image begins at 0 to 4"):
        augment(torch.ops.alexnet_kernels, at=crops(at=100))
    with pytest.raises(RuntimeError, match=r"crops\[0\]\[0\] is -1"):
        augment(torch.ops.alexnet_kernels, at=crops(at=-1))


@pytest.mark.skipif("cuda" not in BACKENDS["cpu"], reason="needs the emulation")
def test_crops_outside_their_images_on_a_gpu() -> None:
    """The values of crops are in the device's memory: a crop outside is moved inside."""
    emulation.load()
    result = augment(torch.ops.alexnet_kernels_emulated, torch.full((2, 8, 8, 3), 7, dtype=BYTE), crops(at=2**40))
    assert (result == 7).all()


def test_the_error_tells_the_operator_and_what_was_given(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match=r"max_pool2d_backward: argmax is \[1, 1, 1, 1\], not \[1, 1, 2, 2\]"):
        pool_backward(kernels, argmax=winners(1, 1, 1, 1))
    with pytest.raises(RuntimeError, match=r"lrn_max_pool2d: groups is 3, which does not divide 8 channels"):
        lrn_pool(kernels, (*LRN[:4], 3))


@pytest.mark.parametrize("call", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(kernels: Any, call: Callable[[Any], Any]) -> None:
    result = call(kernels)
    for tensor in result if isinstance(result, tuple) else [result]:
        assert tensor.isfinite().all()


@pytest.mark.parametrize(("row_stride", "base"), [(1000, -1), (-1, 0), (2**63 - 1, 5), (1000, -(2**63))])
def test_every_element_of_dropout_is_written(kernels: Any, row_stride: int, base: int) -> None:
    """Whatever its index: indices wrap around."""
    ones = torch.ones(6, 1000)
    for input in (ones, torch.ones(6, 10, 10, 10).contiguous(memory_format=torch.channels_last)):
        out = kernels.dropout(input, 0.5, 2.0, torch.tensor(3), 0, 1000, row_stride, base)
        assert set(out.unique().tolist()) == {0.0, 2.0}
        assert 0.4 < (out == 0).double().mean() < 0.6
    out = kernels.linear_relu_dropout(x(6, 8), x(1000, 8), None, True, 0.5, 2.0, seed(), 0, 1000, row_stride, base)
    assert (out >= 0).all()


def calls(op: str, device: str, backend: str) -> Iterator[tuple[str, list[Any]]]:
    """The operator calls of an op's typical arguments."""
    info = OP_INFOS[op]
    for memory_format in FORMATS.values() if info.images else [torch.contiguous_format]:
        for sample in info.typical:
            for operator, arguments in operator_calls(
                info, info.inputs(sample, Maker(memory_format=memory_format, device=device)), backend
            ):
                yield operator, list(arguments)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an argument with memory, which may be freed."""
    return [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor) and t.numel() > 0]


def changes(value: Any) -> Iterator[Any]:
    """Values in place of an argument: other numbers, and other shapes, dtypes, strides and numbers of tensors."""
    if isinstance(value, Tensor):
        yield None
        yield value.to("meta")
        yield from (value.to(dtype) for dtype in (torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool))
        yield value.new_full(value.shape, 255) if value.dtype == BYTE else value.flatten()
        yield value.unsqueeze(0)
        for d in range(value.dim()):
            yield value.narrow(d, 0, value.shape[d] - 1)
            yield value.narrow(d, 0, 1).expand(value.shape)
            yield torch.cat([value, value], d)
        if value.dim():
            yield value[0]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (-1, 0, 1, 7, 300, FAR, -FAR)
    elif isinstance(value, float):
        yield from (-1.0, 0.0, 1e300, float("nan"), float("inf"))
    elif isinstance(value, list):
        yield from (value[:-1], [], [*value, *value])
        for i, element in enumerate(value[:2]):
            yield from ([*value[:i], change, *value[i + 1 :]] for change in changes(element) if change is not None)


def native(backend: str) -> None:
    """Skips backends that are not the native library's."""
    if backend not in ("cpu", "cuda"):
        pytest.skip("not of the native library")


@pytest.mark.parametrize("op", OP_INFOS)
def test_any_change_of_one_argument_is_refused_or_harmless(op: str, device: str, backend: str) -> None:
    """For a sanitizer to watch."""
    native(backend)
    refused = harmless = 0
    for operator, arguments in calls(op, device, backend):
        call = getattr(getattr(torch.ops, backends.registered(backend).namespace), operator)
        for i, argument in enumerate(arguments):
            for changed in changes(argument):
                try:
                    call(*copies(arguments[:i]), changed, *copies(arguments[i + 1 :]))
                    harmless += 1
                except (RuntimeError, ValueError, TypeError, NotImplementedError, OverflowError):
                    refused += 1
    assert refused > 0
    assert harmless > 0


@pytest.mark.parametrize("op", OP_INFOS)
@pytest.mark.parametrize("left", [0, 4], ids=["freed", "shrunk"])
def test_memory_that_was_freed(op: str, device: str, backend: str, left: int) -> None:
    """As FSDP frees the memory of parameters."""
    native(backend)
    told = set()
    for operator, arguments in calls(op, device, backend):
        call = getattr(getattr(torch.ops, backends.registered(backend).namespace), operator)
        for i, argument in enumerate(arguments):
            for j in range(len(tensors(argument))):
                given = copies(arguments)
                freed = tensors(given[i])[j]
                if freed.untyped_storage().nbytes() <= left:
                    continue
                freed.untyped_storage().resize_(left)
                try:
                    call(*given)
                    told.add((operator, i, ""))
                except RuntimeError as error:
                    told.add((operator, i, "was freed" if "was freed" in str(error) else str(error)))
    assert {message for _, _, message in told} == {"was freed"}, told


def copies(value: Any) -> Any:
    return tree_map_only(Tensor, copy, value)
