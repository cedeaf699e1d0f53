"""Convolution, bias and ReLU.

See: schema in csrc/library.cpp, csrc/cpu/conv2d_relu.cpp, csrc/cuda/conv2d_relu.cu, conv2d_relu_sm90a.cu and
conv2d_relu_sm80.cu, alexnet_kernels/triton/conv2d_relu.py and conv2d_relu_backward.py, reference.conv2d_relu,
op_info/conv2d_relu.py, tests/ops/test_conv2d_relu.py and test_conv2d_relu_kernels.py; ops/space_to_depth.py for strided
convolutions of few channels; _dispatch/choices.py for the algorithms of backend "auto".
Autocast: input, weight and bias are cast to the autocast dtype, as for torch's conv2d.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_kernels import _library
from alexnet_kernels._dispatch import checks, choices
from alexnet_kernels._dispatch.layout import empty_like, memory_format_of
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._torch_private import constant_when_compiled
from alexnet_kernels.backends import kernels_of, requested, select
from alexnet_kernels.ops.space_to_depth import space_to_depth

OP = "conv2d_relu"

LIBRARY, OWN, MMA, WGMMA = range(4)
"""The operator's algorithms on CUDA, as in csrc/cuda/conv2d_relu.cuh: torch's convolution; the best of the package's
own that takes the call, else torch's; mma.sync; wgmma. The last two raise where they don't take the call."""
VARIABLE = "ALEXNET_KERNELS_CONV2D_RELU"
"""The environment variable that says what backend "cuda" means if it is asked for by name: "own" or "library"."""
if (_by_name := os.environ.get(VARIABLE, "own")) not in ("own", "library"):
    raise ValueError(f"{VARIABLE}={_by_name!r}: 'own' or 'library' expected")


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`max(0, conv2d(input, weight) + bias)`; backward takes ReLU's mask from the output; nothing else is stored.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16; any memory format, channels_last is
            the fast one.
        weight: [K, C / groups, R, S] in the input's dtype (autocast casts both).
        bias: [K] or None.
        stride, padding: pixels, an int or (rows, columns); zeros are padded on all sides.
        groups: input and output channels are split into `groups` independent towers.
        relu: False leaves ReLU out, for a following op that applies it at no cost (`max_pool2d`, `lrn_max_pool2d`).
        backend: see `alexnet_kernels.backends`.

    Returns:
        [N, K, OH, OW] (or [K, OH, OW]) in the input's memory format, `OH = floor((H + 2 * padding - R) / stride) + 1`.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: another rank, shapes or groups that do not fit, an image smaller than the kernel.
        RuntimeError: tensors on different devices.

    Source: Krizhevsky et al. 2012, sections 3.1 and 3.5.
    """
    return conv2d_relu_by(None, input, weight, bias, stride, padding, groups, relu=relu, backend=backend)


def conv2d_relu_by(
    algorithm: int | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`conv2d_relu` by an algorithm of the CUDA operator; None chooses one."""
    stride, padding = checks.pair(OP, "stride", stride, 1), checks.pair(OP, "padding", padding, 0)
    images = input.unsqueeze(0) if isinstance(input, Tensor) and input.dim() == 3 else input
    _check(images, weight, bias, stride, padding, groups)
    if images.device.type == "cpu" and images.dtype in (torch.float64, torch.float16) and 1 in images.shape:
        # torch's gradient of grouped weights in channels_last depends on the strides of dimensions of one element.
        # A copy has the usual ones.
        images = images.clone(memory_format=memory_format_of(images))
    chosen = select(OP, images, backend)
    dtype = _compute_dtype(images)
    to_depth = chosen != "native" and _gains_by_space_to_depth(chosen, images, weight, dtype, stride, groups)
    if chosen in ("cpu", "native") and not to_depth and _is_wrong_in_torch(images, weight, dtype, stride, padding):
        with torch.autocast("cpu", enabled=False):
            wide = (images.float(), weight.float(), None if bias is None else bias.float())
            output = conv2d_relu(*wide, stride, padding, groups, relu=relu, backend=chosen).to(dtype)
    elif chosen == "native":
        # cuDNN returns float64 in NCHW.
        memory_format = memory_format_of(images)
        output = F.conv2d(images, weight, bias, stride, padding, 1, groups).contiguous(memory_format=memory_format)
        output = F.relu(output) if relu else output
    else:
        kernels = kernels_of(chosen)
        if to_depth:
            images, weight = space_to_depth(kernels, images, weight, dtype, stride[0], padding)
            stride, padding = [1, 1], [0, 0]
        if algorithm is None:
            geometry = images, dtype, weight, stride, padding, groups
            algorithm = _algorithm(requested(backend), *geometry) if chosen == "cuda" else LIBRARY
        # The library's algorithm may fuse ReLU into cuDNN's kernel, whose algorithms torch does not restrict.
        fusible = relu and chosen == "cuda" and algorithm == LIBRARY and groups == 1 and dtype in checks.LOW_PRECISION
        apart = fusible and _must_repeat()
        output = kernels.conv2d_relu(images, weight, bias, stride, padding, groups, relu and not apart, algorithm)
        output = F.relu(output) if apart else output
    return output.squeeze(0) if input.dim() == 3 else output


def _compute_dtype(input: Tensor) -> torch.dtype:
    device = input.device.type
    if input.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


def _algorithm(
    backend: str, input: Tensor, dtype: torch.dtype, weight: Tensor, stride: list[int], padding: list[int], groups: int
) -> int:
    """The algorithm of the CUDA operator for a call that was asked to run on `backend`, "auto" or "cuda"."""
    if backend == "auto":
        geometry = {"weight": weight, "stride": stride, "padding": padding, "groups": groups}
        return choices.choose(OP, "forward", input, dtype, **geometry)
    if _by_name == "library":
        return LIBRARY
    return OWN if dtype in checks.LOW_PRECISION or (dtype == torch.float32 and _allows_tf32()) else LIBRARY


@constant_when_compiled
def _allows_tf32() -> bool:
    """Whether float32 convolutions may use TF32. torch.compile's graphs keep what held when they were traced."""
    # torch.backends.cudnn.allow_tf32 raises where a program has set fp32_precision.
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(conv.fp32_precision == "tf32")


def _must_repeat() -> bool:
    """Whether the user asked for algorithms of cuDNN that give the same bits in every run."""
    return torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic


def _is_wrong_in_torch(
    input: Tensor, weight: Tensor, dtype: torch.dtype, stride: list[int], padding: list[int]
) -> bool:
    """Whether oneDNN's convolution on the CPU, or its weight's gradient, reads memory that nobody wrote.

    With torch 2.14.1 and AVX512-BF16, of 139,015 random bfloat16 convolutions 2,064 were wrong, all of these: a row has
    one output, or the image fewer columns than the stride. None of AlexNet's layers is among them. float32 is right.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and stride[1] > 1
        and input.device.type == "cpu"
        and (input.shape[3] < stride[1] or input.shape[3] + 2 * padding[1] - weight.shape[3] < stride[1])
    )


def _gains_by_space_to_depth(
    backend: str, input: Tensor, weight: Tensor, dtype: torch.dtype, stride: list[int], groups: int
) -> bool:
    """Whether a strided convolution of few channels, AlexNet's first, is faster with its blocks of pixels as channels.

    Measured on two AVX512-BF16 cores with torch 2.14, 11x11 kernels, stride 4, on [N, 3, 224, 224], channels last,
    bfloat16: forward 13.0 -> 10.8 ms at N = 16, forward and backward 26.2 -> 23.5; below 6 images rearranging the
    weight costs more than it saves. In float32 the weight gradient loses more than the rest gains. A GPU's tensor
    cores need runs of 16 channels or more, in any dtype, and the input's gradient needs stride 1.
    """
    # A compiled graph serves any batch size.
    many = torch.compiler.is_compiling() or input.shape[0] >= 6
    return (
        (backend in ("cuda", "triton") or (backend == "cpu" and dtype == torch.bfloat16 and many))
        and groups == 1
        and stride[0] == stride[1] > 1
        and stride[0] < min(weight.shape[2:])
        and input.shape[1] <= 4
        and memory_format_of(input) == torch.channels_last
    )


@checks.cache_validation
def _check(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int) -> list:
    """Checks the arguments; returns the output's shape."""
    checks.check_images(OP, input)
    checks.check_device(OP, "weight", weight, input)
    checks.check_floating(OP, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{OP}: weight must be [K, C / groups, R, S], not of shape {list(weight.shape)}")
    checks.check_groups(OP, groups, weight.shape[0], "output channels")
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{OP}: the input has {input.shape[1]} channels, but weight {list(weight.shape)} with groups={groups} "
            f"takes {weight.shape[1] * groups}"
        )
    checks.check_same_dtype(OP, "weight", weight, input)
    if bias is not None:
        checks.check_device(OP, "bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{OP}: bias must be [{weight.shape[0]}], not of shape {list(bias.shape)}")
        checks.check_same_dtype(OP, "bias", bias, input)
    shape = [input.shape[0], weight.shape[0]]
    for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True):
        if size + 2 * pad < kernel:
            raise ValueError(
                f"{OP}: an image of {input.shape[2]} x {input.shape[3]} (padding {padding}) is smaller than the "
                f"kernel {weight.shape[2]} x {weight.shape[3]}"
            )
        shape.append((size + 2 * pad - kernel) // step + 1)
    return shape


def _eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    groups: int,
    relu: bool,
    algorithm: int = 0,
) -> Tensor:
    if algorithm not in (LIBRARY, OWN):
        raise RuntimeError(
            f"{OP}: algorithm {algorithm} needs a CUDA device; the CPU has {LIBRARY} and {OWN}, the same"
        )
    memory_format = memory_format_of(input)
    images = input.contiguous(memory_format=memory_format)
    output = torch.conv2d(images, weight, bias, stride, padding, 1, groups).contiguous(memory_format=memory_format)
    return output.relu_() if relu else output


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    groups: int,
    relu: bool,
    algorithm: int = 0,
) -> Tensor:
    return empty_like(input, _check(input, weight, bias, stride, padding, groups))


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, ctx.stride, ctx.padding, ctx.groups, ctx.relu, *_ = inputs
    ctx.bias_size = None if bias is None else [weight.shape[0]]
    ctx.save_for_backward(input, weight, output if ctx.relu else None)


def _backward(kernels, ctx, grad: Tensor):
    input, weight, output = ctx.saved_tensors
    needed = [*ctx.needs_input_grad[:2], ctx.bias_size is not None and ctx.needs_input_grad[2]]
    if kernels.name == _library.TRITON_NAMESPACE and not torch.is_grad_enabled():
        args = (grad, output, input, weight, ctx.stride, ctx.padding, ctx.groups)
        grad_input = kernels.conv2d_relu_backward_input(*args) if needed[0] else None
        grad_weight, grad_bias = kernels.conv2d_relu_backward_weight(*args) if any(needed[1:]) else (None, None)
        grads = [grad_input, grad_weight if needed[1] else None, grad_bias if needed[2] else None]
        return *grads, None, None, None, None, None
    if ctx.relu:
        grad = kernels.relu_dropout_backward(grad, output, 1.0)
    grads = torch.ops.aten.convolution_backward(
        grad, input, weight, ctx.bias_size, ctx.stride, ctx.padding, [1, 1], False, [0, 0], ctx.groups, needed
    )
    return *grads, None, None, None, None, None


def _fake_backward_input(grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, *args) -> Tensor:
    return empty_like(input)


def _fake_backward_weight(grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, *args):
    return empty_like(weight), weight.new_empty(weight.shape[0])


register_op(OP, _fake, _backward, _setup_context, autocast=True, eager=_eager, auto_triton=False)
register_operator(f"{OP}_backward_input", _fake_backward_input, native=False)
register_operator(f"{OP}_backward_weight", _fake_backward_weight, native=False)
