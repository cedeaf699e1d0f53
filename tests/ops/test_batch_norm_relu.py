from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
    cases,
    check,
    check_gradients,
    check_repeatable,
    every_dtype,
    every_format,
    forward_backward,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import batch_norm_relu

every_mode = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


def definition(*args, **kwargs):
    return reference.batch_norm_relu(*args, **kwargs)[0]


def settled(**given):
    """Where the pre-activation is too far from zero for a rounding to change its sign."""
    given = {**given, "input": given["input"].detach()}
    channels = given["input"].shape[1]
    lift = 1e3 + torch.zeros(channels, dtype=torch.float64, device=given["input"].device)
    bias = given.pop("bias", None)
    before = definition(**given, bias=lift if bias is None else bias.detach() + lift) - 1e3
    return before.abs() > 1e-4


def statistics(channels, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = (
        random((channels,), wide, device=device),
        random((channels,), wide, device=device).square() + 0.5,
    )
    return mean, var


def tensors(shape, dtype, memory_format, device, affine=True):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "input": random(shape, dtype, memory_format, device),
        "weight": random(shape[1:2], wide, device=device) if affine else None,
        "bias": random(shape[1:2], wide, device=device) if affine else None,
    }


@every_mode
@every_format
@every_dtype
@cases(
    ((1, 96, 13, 14), {}),
    ((2, 64, 7, 13), {"affine": False}),
    ((4, 17, 5, 3), {}),
    ((3, 37, 1, 7), {"eps": 1e-2}),
    ((2, 1, 4, 4), {}),
    ((7, 33, 1, 1), {"affine": False}),
)
def test_equals_the_definition(shape, options, dtype, memory_format, training, device, backend):
    options = dict(options)
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cuda" and backend == "native" and half and memory_format == torch.contiguous_format:
        pytest.skip("torch adds the weight's gradient in half precision")
    values = tensors(shape, dtype, memory_format, device, options.pop("affine", True))
    mean, var = statistics(shape[1], dtype, device)
    expected_mean, expected_var = mean.double(), var.double()
    if training:
        _, expected_mean, expected_var = reference.batch_norm_relu(
            values["input"].double(), mean.double(), var.double(), training=True, momentum=0.3
        )

    def op(**given):
        return batch_norm_relu(running_mean=mean, running_var=var, training=training, momentum=0.3, **given)

    before = mean.double(), var.double()

    def exact(**given):
        return definition(running_mean=before[0], running_var=before[1], training=training, **given)

    def clear(**given):
        return settled(running_mean=before[0], running_var=before[1], training=training, **given)

    check(
        op,
        exact,
        values,
        options,
        backend=backend,
        settled=clear,
        slack="operand" if backend == "native" else "sums",
    )
    assert_close(mean, expected_mean, what="running mean")
    assert_close(var, expected_var, what="running variance")


@every_format
def test_training_without_running_statistics(memory_format, device, backend):
    values = tensors((4, 18, 5, 3), torch.float32, memory_format, device)
    options = {"running_mean": None, "running_var": None, "training": True}
    check(batch_norm_relu, definition, values, options, backend=backend, settled=settled)


@every_format
def test_large_mean_does_not_cancel(memory_format, device, backend, request):
    if backend == "native":
        # On one thread PyTorch's own kernel adds up the values of a channel one after the other, and loses more.
        request.getfixturevalue("threads")(2)
    values = tensors((4, 18, 9, 7), torch.float32, memory_format, device)
    values["input"] += 300.0
    options = {"running_mean": None, "running_var": None, "training": True}
    out = batch_norm_relu(**values, **options, backend=backend)
    expected = definition(**{k: v.double() for k, v in values.items()}, **options)
    # The rounding of the mean itself: 300 * 2^-24 against a deviation of 1.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-4)


@every_mode
@every_format
def test_of_no_images(training, memory_format, device, backend):
    x = random((0, 18, 5, 3), torch.float32, memory_format, device).requires_grad_()
    mean, var = statistics(18, torch.float32, device)
    before = mean.clone(), var.clone()
    out = batch_norm_relu(x, mean, var, training=training, backend=backend)
    assert out.shape == x.shape
    assert_same((mean, var), before)
    out.sum().backward()
    assert x.grad.shape == x.shape


@every_mode
@every_format
def test_nan_stays_in_its_channel(training, memory_format, device, backend):
    values = tensors((4, 18, 5, 3), torch.float32, memory_format, device)
    values["input"][1, 17, 2, 1] = torch.nan
    mean, var = statistics(18, torch.float32, device)
    exact = {k: v.double() for k, v in values.items()}
    expected = definition(running_mean=mean.double(), running_var=var.double(), training=training, **exact)
    out = batch_norm_relu(running_mean=mean, running_var=var, training=training, **values, backend=backend)
    assert_close(out, expected)
    assert out.isnan().sum() == (60 if training else 1)


@every_mode
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_input_of_any_strides(layout, training, device, backend):
    values = tensors((2, 20, 7, 6), torch.float32, torch.contiguous_format, device)
    values["input"] = {
        "sliced": lambda: random((4, 20, 7, 12), device=device)[::2, :, :, ::2],
        "transposed": lambda: random((2, 7, 20, 6), device=device).permute(0, 2, 3, 1).transpose(2, 3).mT,
        "expanded": lambda: random((2, 20, 7, 1), device=device).expand(2, 20, 7, 6),
    }[layout]()
    channels = values["input"].shape[1]
    values.update({k: random((channels,), device=device) for k in ("weight", "bias")})
    mean, var = statistics(channels, torch.float32, device)
    options = {
        "running_mean": mean.double().float(),
        "running_var": var,
        "training": training,
        "momentum": 0.0,
    }
    check(batch_norm_relu, definition, values, options, backend=backend, settled=settled)


@every_mode
@every_format
@every_dtype
def test_expanded_output_gradient(dtype, memory_format, training, device, backend):
    values = tensors((2, 20, 5, 4), dtype, memory_format, device)
    mean, var = statistics(20, dtype, device)
    options = {"running_mean": mean, "running_var": var, "training": training, "momentum": 0.0}
    grad = torch.tensor(1.5, dtype=dtype, device=device).expand(2, 20, 5, 4)
    leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
    copies = {k: v.clone().requires_grad_() for k, v in values.items()}
    batch_norm_relu(**leaves, **options, backend=backend).backward(grad)
    batch_norm_relu(**copies, **options, backend=backend).backward(grad.contiguous(memory_format=memory_format))
    for name in leaves:
        assert_close(leaves[name].grad, copies[name].grad.double(), slack="operand", what=name)


@pytest.mark.float64
@every_mode
@every_format
def test_first_and_second_derivatives(training, memory_format, device, backend):
    values = tensors((2, 2, 2, 1), torch.float64, memory_format, device)
    values["bias"] = torch.tensor([6.0, -6.0], dtype=torch.float64, device=device)  # away from ReLU's corner
    mean, var = statistics(2, torch.float64, device)

    def run(x, w, b):
        return batch_norm_relu(x, mean.clone(), var.clone(), w, b, training, backend=backend)

    check_gradients(run, values.values())


@every_mode
@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, training, device, backend, threads):
    values = tensors((4, 48, 13, 13), dtype, memory_format, device)
    mean, var = statistics(48, dtype, device)

    def run(x, w, b):
        return batch_norm_relu(x, mean.clone(), var.clone(), w, b, training, backend=backend)

    # torch's batch_norm splits its sums by the number of threads: its bits repeat for one number of them.
    check_repeatable(run, list(values.values()), threads, across=backend != "native")


@every_mode
@every_format
def test_registration(training, memory_format, device):
    values = tensors((2, 12, 5, 3), torch.float32, memory_format, device)
    x, weight, bias = (v.requires_grad_() for v in values.values())
    operator = torch.ops.alexnet_kernels.batch_norm_relu.default
    torch.library.opcheck(operator, (x, *statistics(12, torch.float32, device), weight, bias, training, 1e-5))
    torch.library.opcheck(operator, (x, None, None, None, None, True, 1e-5))


@every_mode
@every_format
def test_compiles(memory_format, training, device, backend, fresh_dynamo):
    values = tensors((2, 12, 5, 3), torch.float32, memory_format, device)
    mean, var = statistics(12, torch.float32, device)
    compiled_mean, compiled_var = mean.clone(), var.clone()

    def run(x, w, b):
        return batch_norm_relu(x, mean, var, w, b, training, backend=backend)

    def fresh(x, w, b):
        return batch_norm_relu(x, compiled_mean, compiled_var, w, b, training, backend=backend)

    inputs = list(values.values())
    expected = forward_backward(run, *inputs)
    actual = forward_backward(torch.compile(fresh, fullgraph=True, backend="aot_eager"), *inputs)
    if backend == "native" and device == "cuda":  # where cuDNN's kernel becomes a composition of plain ones
        torch.testing.assert_close(actual, expected)
    else:
        assert_same(actual, expected)
    # torch 2.11 rounds the update once more where it is compiled.
    torch.testing.assert_close((compiled_mean, compiled_var), (mean, var))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_keeps_the_inputs_dtype(dtype, device):
    values = tensors((2, 12, 5, 3), dtype, torch.contiguous_format, device)
    mean, var = statistics(12, torch.float32, device)

    def run(x, w, b):
        return batch_norm_relu(x, mean, var, w, b)

    expected = forward_backward(run, *values.values())
    with torch.autocast(device, torch.bfloat16):
        actual = forward_backward(run, *values.values())
    assert actual[0].dtype == dtype
    assert_same(actual, expected)


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    x, c = torch.zeros(2, 6, 3, 3), torch.ones(6)

    def call(x=x, mean=c, var=c, weight=c, bias=c, training=False):
        return lambda: batch_norm_relu(x, mean, var, weight, bias, training, backend=choice)

    raises(TypeError, r"input must be a Tensor, not int", call(x=3))
    raises(TypeError, r"input must be float32.* not torch.uint8", call(x=x.byte()))
    raises(ValueError, r"input must be \[N, C, H, W\], not of shape \[2, 6\]", call(x=x[:, :, 0, 0]))
    raises(ValueError, r"running_mean must be \[6\], not of shape \[5\]", call(mean=c[1:]))
    raises(ValueError, r"running_var must be \[6\], not of shape \[1\]", call(var=c[:1]))
    raises(ValueError, r"weight must be \[6\], not of shape \[3, 2\]", call(weight=c.reshape(3, 2)))
    raises(ValueError, r"bias must be \[6\], not of shape \[\]", call(bias=c[0]))
    raises(ValueError, r"inference needs running_mean and running_var", call(mean=None))
    raises(ValueError, r"inference needs running_mean and running_var", call(var=None))
    raises(TypeError, r"weight must be float32.* not torch.int64", call(weight=c.long()))
    raises(RuntimeError, r"bias is on meta, but the input is on cpu", call(bias=c.to("meta")))
    lone = torch.zeros(1, 6, 1, 1)
    raises(ValueError, r"more than one value a channel, input is \[1, 6, 1, 1\]", call(x=lone, training=True))
