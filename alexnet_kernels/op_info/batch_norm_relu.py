"""The record of batch_norm_relu."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from alexnet_kernels import ops, reference
from alexnet_kernels.op_info._layers import MAP_DTYPES, MAPS, elements, map_inputs
from alexnet_kernels.op_info._record import (
    Comparison,
    Draw,
    Inputs,
    Layer,
    Maker,
    OpInfo,
    Sample,
    Setting,
    Work,
    copy,
    draw_shape,
    sample,
)


def work(elements: int, e: int) -> Work:
    """Of maps of so many elements, of e bytes each. The sums come before the first result: inputs are read twice."""
    return Work((3 * elements * e, 8 * elements * e))


def statistics(make: Maker, channels: int) -> tuple[Tensor, Tensor]:
    """A running mean and variance."""
    return make(channels, dtype=make.wide), make(channels, dtype=make.wide).square() + 0.5


def _make(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    channels = shape[1]
    x = make(*shape)
    vectors: Inputs = {"weight": None, "bias": None}
    if options.pop("affine", True):
        vectors = {name: make(channels, dtype=make.wide) for name in vectors}
    mean = var = None
    if options.pop("running", True):
        mean, var = statistics(make, channels)
    return {"input": x, **vectors, "running_mean": mean, "running_var": var, **options}


def _make_derivative(make: Maker, shape: tuple[int, ...], options: Inputs) -> Inputs:
    # A bias that keeps pre-activations away from zero, where ReLU has no derivative.
    bias = torch.tensor([6.0, -6.0], dtype=make.dtype, device=make.device)
    return {**_make(make, shape, options), "bias": bias}


_MODIFIED = ("running_mean", "running_var")


def _functional(**arguments: Any) -> tuple[Tensor, ...]:
    """The output, and the running statistics that the call updated."""
    copies = {name: None if arguments[name] is None else copy(arguments[name]) for name in _MODIFIED}
    output = ops.batch_norm_relu(**{**arguments, **copies})
    return (output, *(value for value in copies.values() if value is not None))


def _reference(**arguments: Any) -> tuple[Tensor, ...]:
    return tuple(value for value in reference.batch_norm_relu(**arguments) if value is not None)


def _settled(**given: Any) -> Tensor:
    """Where the pre-activation is too far from zero for a rounding to change its sign."""
    lift = 1e3 + torch.zeros_like(given["input"][0, :, 0, 0] if len(given["input"]) else given["input"].sum((0, 2, 3)))
    bias = given.pop("bias", None)
    before = reference.batch_norm_relu(**given, bias=lift if bias is None else bias + lift)[0] - 1e3
    return before.abs() > 1e-4


def _comparison(setting: Setting) -> Comparison:
    skip = None
    native = setting.backend == "native"
    if setting.gpu and native and setting.half and setting.memory_format == torch.contiguous_format:
        skip = "torch adds the weight's gradient in half precision"
    return Comparison(gradients="operand" if native else "sums", settled=_settled, skip=skip)


_SHAPES: tuple[tuple[tuple[int, ...], Inputs], ...] = (
    ((1, 96, 13, 14), {}),
    ((2, 64, 7, 13), {"affine": False}),
    ((4, 17, 5, 3), {}),
    ((3, 37, 1, 7), {"eps": 1e-2}),
    ((2, 1, 4, 4), {}),
    ((7, 33, 1, 1), {"affine": False}),
)

_WRT = ("input", "weight", "bias")


def _affine(training: bool, make: Maker, batch: int) -> Inputs:
    return _make(make, (batch, *MAPS["layer 1"]), {"training": training})


def _domain(draw: Draw) -> Sample:
    options = {"training": draw((False, True)), "affine": draw((False, True)), "momentum": draw((0.1, 1.0))}
    # The gradients of few elements with a small variance are ill-conditioned.
    batch, *image = draw_shape(draw)
    return sample(
        max(batch, int(options["training"])),
        *image,
        **options,
        running=not options["training"] or draw((False, True)),
        eps=1.0,
    )


INFO = OpInfo(
    name="batch_norm_relu",
    op=ops.batch_norm_relu,
    reference=_reference,
    samples=(
        *(
            sample(*shape, **options, training=training, momentum=0.3)
            for training in (False, True)
            for shape, options in _SHAPES
        ),
        sample(4, 18, 5, 3, running=False, training=True),
    ),
    typical=(sample(2, 20, 7, 6, training=True), sample(2, 20, 7, 6, training=False)),
    large=sample(4, 48, 13, 13, training=True),
    domain=_domain,
    ones=(
        sample(1, 1, 1, 1, affine=False, eps=1.0),
        sample(3, 5, 2, 3, affine=False, running=False, training=True, eps=1.0),
        sample(3, 5, 2, 3, eps=1.0),
    ),
    make=_make,
    modifies=_MODIFIED,
    functional=_functional,
    wrt=_WRT,
    comparison=_comparison,
    derivatives=(sample(2, 2, 2, 1, training=False), sample(2, 2, 2, 1, training=True)),
    make_derivative=_make_derivative,
    # torch's batch_norm splits its sums by the number of threads.
    repeats_across_threads=lambda backend: backend != "native",
    on_images=lambda x: {"input": x, "running_mean": None, "running_var": None, "training": True},
    layers=tuple(
        Layer(
            layer,
            partial(map_inputs, layer, running_mean=None, running_var=None, training=True),
            partial(work, elements(layer)),
        )
        for layer in MAPS
        if layer != "layer 5"
    )
    + tuple(
        Layer(f"layer 1, {name}", partial(_affine, training), partial(work, elements("layer 1")), _WRT, timed=False)
        for name, training in (("affine", True), ("inference", False))
    ),
    timed=MAP_DTYPES,
    order=3,
)
