"""The record of an op, from which tests, benchmarks, the GPU check and the resource reports are made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""Arguments of an op, by name."""

OVERHEAD = "overhead"
"""The layer whose tensors are so small that call overhead dominates."""


@dataclass(frozen=True)
class Maker:
    """Draws the tensors of samples and layers."""

    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    device: torch.device | str = "cpu"
    on_device: bool = False
    """Draw on the device: faster there, but not the same numbers on every device."""
    initialize: bool = True
    """False leaves floating-point tensors uninitialised: their memory is not touched."""

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal deviates times `scale`; four dimensions are in the memory format."""
        if not self.initialize:
            memory_format = self.memory_format if len(shape) == 4 else torch.contiguous_format
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device, memory_format=memory_format)
        value = torch.randn(shape, device=self.device if self.on_device else "cpu")
        if scale != 1:
            value *= scale
        value = value.to(self.device, dtype or self.dtype)
        return value.contiguous(memory_format=self.memory_format) if value.dim() == 4 else value

    @property
    def wide(self) -> torch.dtype:
        """The dtype that kernels compute in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Sample(NamedTuple):
    """One set of arguments: the first tensor's shape, and what `OpInfo.make` is given besides."""

    shape: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def id(self) -> str:
        words = ["x".join(map(str, self.shape)) or "scalar"]
        for name, value in self.options.items():
            if value is True:
                words.append(name)
            else:
                text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"{name}={text}")
        return "-".join(words)


def sample(*shape: int, **options: Any) -> Sample:
    return Sample(shape, options)


Draw = Callable[[Sequence[Any]], Any]
"""Draws one of the given values."""


def draw_shape(draw: Draw) -> tuple[int, ...]:
    """The shape of small images. Vectors end inside, at and after their channels and their rows."""
    return draw((0, 1, 1, 2, 3)), draw((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 24, 32, 33, 40)), draw(SIDES), draw(SIDES)


SIDES = range(1, 8)


@dataclass(frozen=True)
class Work:
    """The least work of an op, as (forward, forward and backward), for one image; a multiply-add counts as two."""

    nbytes: tuple[float, float]
    """That must be read or written if every tensor is read and written once."""
    operations: tuple[float, float] = (0, 0)
    constant_bytes: tuple[float, float] = (0, 0)
    """Of weights, whatever the batch."""

    def moved(self, batch: int, backward: bool) -> float:
        return self.nbytes[int(backward)] * batch + self.constant_bytes[int(backward)]

    def done(self, batch: int, backward: bool) -> float:
        return self.operations[int(backward)] * batch

    def seconds(self, batch: int, backward: bool, copy_rate: float, gemm_rate: float) -> float:
        """The least time on a device of these rates."""
        return max(self.moved(batch, backward) / copy_rate, self.done(batch, backward) / gemm_rate)


PEER_OUTLIERS = 5e-3
OUTLIERS = 1e-3
"""The share of elements that may differ by more than the tolerance: in bfloat16 and float16 two nearly equal maxima may
change places. They do so more often where PyTorch's operators round before the pool: PEER_OUTLIERS."""


@dataclass(frozen=True)
class Baseline:
    """Another implementation of an op."""

    call: Callable[[Inputs], Tensor]
    differentiable: bool = True
    checked: bool = True
    """False for one that draws its own random numbers."""
    cuda_only: bool = False
    outliers: float = PEER_OUTLIERS
    layers: Collection[str] | None = None
    """The layers that it is timed at, if not all."""


@dataclass(frozen=True)
class Layer:
    """A layer of AlexNet. `inputs` makes the op's arguments for a batch, `work` is for an element size in bytes."""

    name: str
    inputs: Callable[[Maker, int], Inputs]
    work: Callable[[int], Work]
    wrt: tuple[str, ...] = ("input",)
    """The arguments that get a gradient in training."""
    formats: bool = True
    """Whether its first tensor has memory formats, where the op's has."""
    timed: bool = True
    """Whether benchmarks time it; otherwise only its kernels are reported."""


class Setting(NamedTuple):
    """Where and how an op is computed."""

    backend: str | None
    device: str
    dtype: torch.dtype
    memory_format: torch.memory_format

    @property
    def half(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Comparison:
    """How results are compared with the definition in float64; `outputs` and `gradients` name fields of `Tolerance`."""

    outputs: str = "sums"
    gradients: str = "sums"
    exact: bool = False
    """Whether they must be equal."""
    settled: Callable[..., Tensor] | None = None
    """Which outputs get a gradient, from the float64 arguments: those where rounding cannot redirect it."""
    peer: Callable[..., Tensor] | None = None
    """A library's op for the same. A gradient may have up to twice the error of this one's."""
    absolute: float = 0.0
    """An absolute error that is accepted: terms may cancel in a tensor of few elements."""
    dtype: torch.dtype | None = None
    """The dtype whose tolerance applies, if not the result's."""
    skip: str | None = None
    """Why there is nothing to compare."""


@dataclass(frozen=True)
class Tolerance:
    """Relative to the element itself, and, where the terms of a sum cancel, to the tensor's largest."""

    relative: float
    sums: float  # of terms added in float32 (float64 for float64)
    operand: float  # of such terms with a factor that was rounded to the dtype
    library: float  # of terms that torch's own operator adds in the dtype
    transformed: float  # of terms that cuDNN may add in another order and basis (Winograd, FFT)


# With u the unit roundoff (2^-53, 2^-24, 2^-11, 2^-8): the ops round to a half-precision dtype at most twice, hence 2u,
# and u for an operand; torch's sums of some hundred terms stay within 4u. float32 and float64 results have some tens of
# roundings, and pow.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-13, 1e-13, 1e-13, 1e-13),
    torch.float32: Tolerance(1e-5, 1e-6, 1e-6, 1e-6, 1e-5),
    torch.float16: Tolerance(2**-10, 1e-5, 2**-11, 2**-9, 2**-9),
    torch.bfloat16: Tolerance(2**-7, 1e-5, 2**-8, 2**-6, 2**-6),
}


def copy(tensor: Tensor) -> Tensor:
    """A copy of the same strides; a contiguous one of an expanded tensor."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.clone()
    strides = tensor.stride()
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def make_images(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    """The arguments of an op on images alone."""
    return {"input": make(*shape), **options}


def make_distinct(make: Maker, shape: tuple[int, ...], options: Inputs, step: float = 0.01) -> Inputs:
    """Images for ops with corners, such as maxima: a shuffled arithmetic sequence around zero.

    No two elements are closer than step, none is near zero.
    """
    count = torch.Size(shape).numel()
    values = (torch.arange(count, dtype=torch.float64) - count // 2 + 0.5) * step
    x = values[torch.randperm(count)].reshape(shape).to(make.device, make.dtype)
    return {"input": x.contiguous(memory_format=make.memory_format), **options}


def _default_comparison(setting: Setting) -> Comparison:
    return Comparison()


@dataclass(frozen=True)
class OpInfo:
    """The record of an op."""

    name: str
    op: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any]
    """Its definition in `alexnet_kernels.reference`, with the results of `call`."""
    samples: Sequence[Sample]
    """Small arguments that cover the op's options and edge cases."""
    typical: Sequence[Sample]
    """Ordinary arguments, one sample for each mode of the op."""
    large: Sample
    """Arguments with enough elements for several threads or programs."""
    domain: Callable[[Draw], Sample]
    """Any small arguments that the op takes, or refuses with a ValueError, for random tests."""
    ones: Sequence[Sample]
    """Arguments and sizes of one, which compilers specialise on."""
    make: Callable[[Maker, tuple[int, ...], Inputs], Inputs] = make_images
    """The arguments of a sample."""
    takes: Callable[[Sample, torch.dtype], bool] = lambda sample, dtype: True
    """Whether a sample is one of this dtype."""
    modifies: tuple[str, ...] = ()
    """The arguments that the op modifies."""
    functional: Callable[..., Any] | None = None
    """For an op that modifies arguments: calls it on copies and returns the modified ones."""
    wrt: tuple[str, ...] = ("input",)
    """The arguments that get a gradient; none for an op that is not differentiable."""
    comparison: Callable[[Setting], Comparison] = _default_comparison
    derivatives: Sequence[Sample] = ()
    """Tiny samples for numerical derivatives in float64; an op with gradients has some."""
    make_derivative: Callable[[Maker, tuple[int, ...], Inputs], Inputs] | None = None
    """The arguments of `derivatives`, if not those of `make`: away from points where the op has no derivative."""
    native_compiles: bool = True
    """Whether torch.compile can trace backend "native" as one graph."""
    images: bool = True
    """Whether the first tensor has memory formats."""
    casts: bool = False
    """Whether autocast casts the tensors; otherwise the result has the input's dtype."""
    repeats_across_threads: Callable[[str | None], bool] = lambda backend: True
    """Whether a backend's results are bitwise identical for every number of threads."""
    on_images: Callable[[Tensor], Inputs] | None = None
    """The arguments for given images [N, C, H, W] of any size; required of an op on one tensor."""

    layers: Sequence[Layer] = ()
    """For benchmarks and resource reports; an op that AlexNet does not use takes the maps of one of its layers."""
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    paths: Callable[[torch.dtype, bool, torch.device], Mapping[str, Baseline]] = lambda *_: {}
    """For (dtype, channels_last, device): the ways in which backend "cuda" can compute the op there, by name."""
    half_baselines_on_cuda_only: bool = False
    """Whether PyTorch has the baselines in bfloat16 and float16 on CUDA only."""
    eager: bool = True
    """Whether backend "native" is what PyTorch's users run; otherwise a baseline is."""
    tolerance: Callable[[torch.dtype], float | None] = lambda dtype: None
    """Of the largest element, at AlexNet's layers, if not the dtype's usual one."""
    preactivation: Callable[..., Tensor] | None = None
    """The input of ReLU: where rounding may change its sign, no gradient is compared."""
    timed: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    core: Callable[[torch.dtype, bool], bool] = lambda dtype, channels_last: channels_last
    """Whether a (dtype, channels_last) is one of AlexNet's fast configurations."""
    order: int = 0
    """Its place in tables, from 0: what matters most to AlexNet comes first."""

    def __post_init__(self) -> None:
        if self.wrt and not self.derivatives:
            raise ValueError(f"{self.name}: an op with gradients needs samples for numerical derivatives")
        if self.wrt == ("input",) and self.on_images is None:
            raise ValueError(f"{self.name}: an op on one tensor needs on_images")

    def call(self, **arguments: Any) -> Any:
        """The op's result; for an op that modifies its arguments, what `functional` returns."""
        return (self.functional or self.op)(**arguments)

    def inputs(self, sample: Sample, make: Maker) -> Inputs:
        return self.make(make, sample.shape, dict(sample.options))

    def derivative_inputs(self, sample: Sample, make: Maker) -> Inputs:
        return (self.make_derivative or self.make)(make, sample.shape, dict(sample.options))
