"""Convolution, bias and ReLU.

See: schema in csrc/library.cpp, csrc/cpu/conv2d_relu.cpp, csrc/cuda/conv2d_relu*.cu, triton/conv2d_relu.py and
triton/conv2d_relu_backward.py, reference.conv2d_relu, op_info/conv2d_relu.py, tests/ops/test_conv2d_relu.py,
test_conv2d_relu_kernels.py and test_conv2d_relu_backward.py; ops/space_to_depth.py for strided convolutions of few
channels; ops/conv2d_by_name.py and _dispatch/choices.py for what backend "auto" runs.
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
from alexnet_kernels._dispatch.kinds import GRADIENTS
from alexnet_kernels._dispatch.layout import empty_like, in_format_of, memory_format_of
from alexnet_kernels._dispatch.registration import register_op, register_operator
from alexnet_kernels._errors import TensorValueError
from alexnet_kernels._torch_private import constant_when_compiled, is_mapped
from alexnet_kernels.backends import kernels_of, requested, select, serves
from alexnet_kernels.ops.conv2d_by_name import gradient_of_input, gradient_of_weight, split_forward
from alexnet_kernels.ops.space_to_depth import space_to_depth

OP = "conv2d_relu"

LIBRARY, OWN, MMA, WGMMA = range(4)
"""The operators' algorithms on CUDA, as in csrc/cuda/conv2d_relu.cuh: torch's convolution; the best of the package's
own that takes the call, else torch's; mma.sync; wgmma. The last two raise where they don't take the call."""
ALGORITHMS = {name: GRADIENTS.index(name) for name in ("library", "own", "mma", "wgmma")}
"""By name, as in the table of choices, which also names "split", "space_to_depth" and "triton"."""
_OWN = frozenset(("own", "mma", "wgmma"))
FORWARD_ONLY = -1
"""The Triton operator's algorithm whose backward is that of backend "cuda". 0: Triton's both ways."""
VARIABLE = "ALEXNET_KERNELS_CONV2D_RELU"
"""The environment variable that says what backend "cuda" means if it is asked for by name: "own" or "library"."""
if (_by_name := os.environ.get(VARIABLE, "own")) not in ("own", "library"):
    raise ValueError(f"{VARIABLE}={_by_name!r}: 'own' or 'library' expected")


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
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
        stride, padding: pixels, an int or (rows, columns); zeros are padded on all sides. Or the padding "valid", which
            is 0, or "same", with which stride 1 keeps the images' size.
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
    name: str | int | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    groups: int = 1,
    *,
    relu: bool = True,
    backend: str | None = None,
    masked_grad: bool = False,
    mask_input: bool = False,
) -> Tensor:
    """`conv2d_relu` by one implementation, forward and backward; None chooses one for each direction.

    Args:
        name: as in the table of choices (`_dispatch/choices.py`); "space_to_depth" rearranges the call and chooses an
            implementation of what results. Or an algorithm of the CUDA operators, for the call as backend "cuda" has
            it: rearranged where that is faster.
        masked_grad: the output's gradient will be 0 where the output is, so that backward leaves ReLU's mask out.
        mask_input: the input is a ReLU's output, whose mask backward applies to the input's gradient.
    """
    stride = checks.pair(OP, "stride", stride, 1)
    images = input.unsqueeze(0) if checks.is_image(input) else input
    if isinstance(padding, str):
        images, padding = _padded(images, weight, stride, padding)
    padding = checks.pair(OP, "padding", padding, 0)
    _check(images, weight, bias, stride, padding, groups)
    if (
        images.device.type == "cpu"
        and images.dtype in (torch.float64, torch.float16)
        and 1 in images.shape
        and not is_mapped()
    ):
        # torch's gradient of grouped weights in channels_last depends on the strides of dimensions of one element.
        # A copy has the usual ones.
        images = images.clone(memory_format=memory_format_of(images))
    chosen = select(OP, images, backend)
    dtype = _compute_dtype(images)
    if mask_input and chosen in ("cpu", "native"):
        images, mask_input = F.relu(images), False
    if type(name) is str:
        _check_name(name, chosen, images, weight, stride, groups)
    context = backend, chosen, dtype, relu or bias is not None
    names = _names(*context, images, weight, stride, padding, groups)
    to_depth = chosen != "native" and (name if type(name) is str else names[0]) == "space_to_depth"
    if chosen in ("cpu", "native") and not to_depth and _is_wrong_in_torch(images, weight, dtype, stride, padding):
        with torch.autocast("cpu", enabled=False):
            wide = (images.float(), weight.float(), None if bias is None else bias.float())
            output = conv2d_relu(*wide, stride, padding, groups, relu=relu, backend=chosen).to(dtype)
    elif chosen == "native":
        # cuDNN returns float64 in NCHW.
        output = in_format_of(F.conv2d(images, weight, bias, stride, padding, 1, groups), images)
        output = F.relu(output) if relu else output
    else:
        kernels = kernels_of(chosen)
        if to_depth:
            images, weight = space_to_depth(kernels, images, weight, dtype, stride[0], padding)
            stride, padding = [1, 1], [0, 0]
            names = _names(*context, images, weight, stride, padding, groups)
            name = None if name == "space_to_depth" else name
        gradients = (LIBRARY, LIBRARY)
        if chosen == "cuda" and torch.is_grad_enabled():
            gradients = _gradients(names[1:] if name is None else name, dtype)
        operands = images, weight, bias, stride, padding, groups
        forward = names[0] if name is None else name
        output = _run(forward, gradients, chosen, dtype, *operands, relu, masked_grad, mask_input)
    return output.squeeze(0) if input.dim() == 3 else output


def _padded(images: Tensor, weight: Tensor, stride: list[int], padding: str) -> tuple[Tensor, list[int]]:
    """The images and the padding on all sides for torch's padding "valid" or "same"."""
    if padding not in ("valid", "same"):
        raise ValueError(f"{OP}: padding must be integers, 'valid' or 'same', not {padding!r}")
    if padding == "valid":
        return images, [0, 0]
    if stride != [1, 1]:
        raise ValueError(f"{OP}: padding 'same' needs stride 1, not {stride}")
    checks.check_images(OP, images)
    checks.check_tensor(OP, "weight", weight)
    height, width = (size - 1 for size in weight.shape[-2:])
    if height % 2 or width % 2:  # an even kernel: one pixel more at the bottom and on the right
        images = F.pad(images, (0, width % 2, 0, height % 2)).contiguous(memory_format=memory_format_of(images))
    return images, [height // 2, width // 2]


def _check_name(name: str, chosen: str, input: Tensor, weight: Tensor, stride: list[int], groups: int) -> None:
    names = *ALGORITHMS, "split", "space_to_depth", "triton"
    if name not in names:
        raise ValueError(f"{OP}: there is no implementation {name!r}: one of {', '.join(map(repr, names))} expected")
    if chosen == "native" and name != "library":
        raise ValueError(f"{OP}: backend 'native' has the implementation 'library' only, not {name!r}")
    if name == "triton":
        select(OP, input, name)
    if name == "space_to_depth" and not _takes_space_to_depth(input, weight, stride, groups):
        raise ValueError(
            f"{OP}: space_to_depth takes at most 4 channels in channels_last, one group and a square stride above 1 "
            f"and below the kernel's extents, not input {list(input.shape)}, weight {list(weight.shape)}, "
            f"stride={stride}, groups={groups}"
        )


def _takes_space_to_depth(input: Tensor, weight: Tensor, stride: list[int], groups: int) -> bool:
    channels_last = memory_format_of(input) == torch.channels_last
    return choices.takes_space_to_depth(channels_last, input.shape[1], weight.shape[2:], stride, groups)


def _compute_dtype(input: Tensor) -> torch.dtype:
    device = input.device.type
    if input.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype


_LIBRARIES = ("library", "library", "library")
_CHOSEN: dict[tuple, tuple[str, str, str]] = {}
"""What "auto" runs, by all that it depends on."""
choices.CACHES.append(_CHOSEN)


def _names(
    backend: str | None,
    chosen: str,
    dtype: torch.dtype,
    epilogue: bool,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    groups: int,
) -> tuple[str, str, str]:
    """What computes the output and the gradients of input and weight, for a call that asks for `backend`.

    chosen: the backend that `select` chose.
    """
    if chosen == "native" or (chosen != "cuda" and stride[0] == 1):
        return _LIBRARIES
    if requested(backend) == "auto":
        call = dtype, weight, stride, padding, groups, epilogue
        if torch.compiler.is_compiling() or type(input) not in checks.PLAIN_TENSORS:
            return _by_table(chosen, input, *call)
        key = (
            chosen,
            dtype,
            input.device,
            input.shape,
            input.stride(),
            weight.shape,
            *stride,
            *padding,
            groups,
            epilogue,
        )
        found = _CHOSEN.get(key)
        if found is None:
            if len(_CHOSEN) >= choices.MOST_CACHED:
                _CHOSEN.clear()
            found = _CHOSEN[key] = _by_table(chosen, input, *call)
        return found
    tensor_cores = dtype in checks.LOW_PRECISION or (dtype == torch.float32 and _allows_tf32())
    own = chosen == "cuda" and _by_name == "own" and tensor_cores
    forward = "own" if own else "library"
    images = None if torch.compiler.is_compiling() else input.shape[0]
    takes = _takes_space_to_depth(input, weight, stride, groups)
    if takes and choices.gains_by_space_to_depth(chosen != "cpu", choices.dtype_name(dtype), images):
        forward = "space_to_depth"
    # The weight's gradient has no kernel for float32.
    wide = dtype not in checks.LOW_PRECISION
    return forward, "own" if own else "library", "own" if own and not wide else "library"


def _by_table(
    chosen: str,
    input: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    groups: int,
    epilogue: bool,
) -> tuple[str, str, str]:
    """The tables' choices, "library" in place of those that do not run here."""
    names = choices.choose_directions(chosen != "cpu", input, dtype, weight, stride, padding, groups, epilogue)
    wide = dtype not in checks.LOW_PRECISION  # TF32 is the user's decision
    triton = "triton" in names and serves("triton", OP, input)
    forward, by_input, by_weight = (
        "library" if (name in _OWN and wide) or (name == "triton" and not triton) else name for name in names
    )
    if by_input == "mma" and not _covers(weight, padding):
        by_input = "own"  # mma alone raises where it does not take a call
    return forward, by_input, by_weight


def _gradients(chosen: int | str | tuple[str, str], dtype: torch.dtype) -> tuple[int, int]:
    """The numbers, in GRADIENTS, of what computes the gradients of input and weight, by both their names or by one."""
    if isinstance(chosen, tuple):
        return GRADIENTS.index(chosen[0]), GRADIENTS.index(chosen[1])
    number = ALGORITHMS.get(chosen, LIBRARY) if isinstance(chosen, str) else chosen
    # The weight's gradient has no kernel for float32.
    return number, number if dtype in checks.LOW_PRECISION else LIBRARY


def _run(
    name: str | int,
    gradients: tuple[int, int],
    chosen: str,
    dtype: torch.dtype,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    groups: int,
    relu: bool,
    masked_grad: bool,
    mask_input: bool,
) -> Tensor:
    """The output by an implementation, or an algorithm of the operator of backend `chosen`."""
    if name == "split":
        return split_forward(F.relu(input) if mask_input else input, weight, bias, stride, padding, groups, relu)
    operands = input, weight, bias, stride, padding, groups
    rest = *gradients, masked_grad, mask_input
    if name == "triton":
        algorithm = LIBRARY if chosen == "triton" else FORWARD_ONLY
        return kernels_of("triton").conv2d_relu(*operands, relu, algorithm, *rest)
    algorithm = ALGORITHMS[name] if isinstance(name, str) else name
    # The library's algorithm may fuse ReLU into cuDNN's kernel, whose algorithms torch does not restrict.
    fusible = relu and chosen == "cuda" and algorithm == LIBRARY and groups == 1 and dtype in checks.LOW_PRECISION
    apart = fusible and _must_repeat()
    output = kernels_of(chosen).conv2d_relu(*operands, relu and not apart, algorithm, *rest)
    return F.relu(output) if apart else output


def _covers(weight: Tensor, padding: list[int]) -> bool:
    """Whether every window of the kernel has a pixel of the image."""
    return padding[0] < weight.shape[2] and padding[1] < weight.shape[3]


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


@checks.cache_validation
def _check(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int) -> list:
    """Checks the arguments; returns the output's shape."""
    checks.check_images(OP, input)
    checks.check_device(OP, "weight", weight, input)
    checks.check_floating(OP, "weight", weight)
    if weight.dim() != 4:
        raise TensorValueError(f"{OP}: weight must be [K, C / groups, R, S], not of shape {list(weight.shape)}")
    checks.check_groups(OP, groups, weight.shape[0], "output channels")
    if input.shape[1] != weight.shape[1] * groups:
        raise TensorValueError(
            f"{OP}: the input has {input.shape[1]} channels, but weight {list(weight.shape)} with groups={groups} "
            f"takes {weight.shape[1] * groups}"
        )
    checks.check_same_dtype(OP, "weight", weight, input)
    if bias is not None:
        checks.check_device(OP, "bias", bias, input)
        if bias.shape != weight.shape[:1]:
            raise TensorValueError(f"{OP}: bias must be [{weight.shape[0]}], not of shape {list(bias.shape)}")
        checks.check_same_dtype(OP, "bias", bias, input)
    shape = [input.shape[0], weight.shape[0]]
    for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True):
        if size + 2 * pad < kernel:
            raise TensorValueError(
                f"{OP}: an image of {input.shape[2]} x {input.shape[3]} (padding {padding}) is smaller than the "
                f"kernel {weight.shape[2]} x {weight.shape[3]}"
            )
        shape.append((size + 2 * pad - kernel) // step + 1)
    return shape


_conv2d = torch.conv2d
"""Held as torch.nn.functional holds it: a program that replaces torch.conv2d changes no convolution of nn.Conv2d."""
_DEFAULTS = (LIBRARY, LIBRARY, LIBRARY, False, False)
"""Of the operator's arguments after `relu`."""


def _eager(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride,
    padding,
    groups: int,
    relu: bool,
    algorithm: int = LIBRARY,
    backward_input: int = LIBRARY,
    backward_weight: int = LIBRARY,
    masked_grad: bool = False,
    mask_input: bool = False,
) -> Tensor:
    if algorithm not in (LIBRARY, OWN):
        raise RuntimeError(
            f"{OP}: algorithm {algorithm} needs a CUDA device; the CPU has {LIBRARY} and {OWN}, the same"
        )
    memory_format = memory_format_of(input)
    images = input.contiguous(memory_format=memory_format)
    images = F.relu(images) if mask_input else images
    output = _conv2d(images, weight, bias, stride, padding, 1, groups).contiguous(memory_format=memory_format)
    return output.relu_() if relu else output


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, groups: int, *args) -> Tensor:
    return empty_like(input, _check(input, weight, bias, stride, padding, groups))


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, ctx.stride, ctx.padding, ctx.groups, relu = inputs[:7]
    algorithm, by_input, by_weight, masked_grad, ctx.mask_input = inputs[7:] + _DEFAULTS[len(inputs) - 7 :]
    ctx.forward_only = algorithm == FORWARD_ONLY
    ctx.by_input, ctx.by_weight = GRADIENTS[by_input], GRADIENTS[by_weight]
    ctx.bias_size = None if bias is None else [weight.shape[0]]
    ctx.save_for_backward(input, weight, output if relu and not masked_grad else None)


def _backward(kernels, ctx, grad: Tensor):
    input, weight, output = ctx.saved_tensors
    needed = [*ctx.needs_input_grad[:2], ctx.bias_size is not None and ctx.needs_input_grad[2]]
    differentiable = torch.is_grad_enabled()  # the gradients' operators are not
    if ctx.mask_input and differentiable:
        # The mask is for all of the input's gradients, those of the weight's gradient included.
        input = F.relu(input)
    rest = input, weight, ctx.stride, ctx.padding, ctx.groups
    by_input, by_weight = ctx.by_input, ctx.by_weight
    triton = kernels.name == _library.TRITON_NAMESPACE and not ctx.forward_only
    if triton:
        by_input = by_weight = "triton"
    elif ctx.forward_only:
        kernels = kernels_of("cuda")
    if differentiable:
        by_input = by_weight = "library"
    if output is not None and (by_input, by_weight) != ("triton", "triton"):
        # Triton's kernels apply the mask as they load the gradient.
        grad, output = kernels.relu_dropout_backward(grad, output, 1.0), None
    found: list[Tensor | None] = [None] * 3
    if needed[0] and by_input != "library":
        found[0] = gradient_of_input(by_input, grad, output, *rest, mask_input=ctx.mask_input, kernels=kernels)
    if by_weight != "library" and (needed[1] or (needed[2] and by_weight == "triton")):
        grad_weight, grad_bias = gradient_of_weight(by_weight, grad, output, *rest, needed[2], kernels=kernels)
        found[1:] = [grad_weight if needed[1] else None, grad_bias]
    left = [need and value is None for need, value in zip(needed, found, strict=True)]
    if any(left):
        by_torch: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(
            grad, input, weight, ctx.bias_size, ctx.stride, ctx.padding, [1, 1], False, [0, 0], ctx.groups, left
        )
        if left[0] and ctx.mask_input:
            by_torch = (kernels.relu_dropout_backward(by_torch[0], input, 1.0), *by_torch[1:])
        found = [theirs if wanted else ours for wanted, theirs, ours in zip(left, by_torch, found, strict=True)]
    return *found, *[None] * 9


def _fake_backward_input(grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, *args) -> Tensor:
    return empty_like(input)


def _fake_backward_weight(grad: Tensor, output: Tensor | None, input: Tensor, weight: Tensor, *args):
    return empty_like(weight), weight.new_empty(weight.shape[0])


register_op(OP, _fake, _backward, _setup_context, autocast=True, eager=_eager, auto_triton=False)
register_operator(f"{OP}_backward_input", _fake_backward_input)
register_operator(f"{OP}_backward_weight", _fake_backward_weight)
