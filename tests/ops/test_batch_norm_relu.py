from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_close,
    assert_same,
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


@every_format
def test_large_mean_does_not_cancel(memory_format, device, backend, request):
    if backend == "native":
        # On one thread PyTorch's own kernel sums a channel sequentially, which loses more precision.
        request.getfixturevalue("threads")(2)
    values = tensors((4, 18, 9, 7), torch.float32, memory_format, device)
    values["input"] += 300.0
    options = {"running_mean": None, "running_var": None, "training": True}
    out = batch_norm_relu(**values, **options, backend=backend)
    expected = definition(**{k: v.double() for k, v in values.items()}, **options)
    # The rounding error of the mean itself: 300 * 2^-24, for a deviation of 1.
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=2e-4)


# Whole planes, and channels that are few or large. Triton's interpreter takes milliseconds a block.
LARGE = {"cpu": [(1, 2, 2048, 1024), (2, 3, 257, 300)], "cuda": [(1, 2, 256, 256)], "triton": [(1, 2, 64, 64)]}


@every_format
@pytest.mark.parametrize("large", [0, 1])
def test_large_planes_with_a_mean_of_a_thousand_deviations(large, memory_format, device, backend):
    """Sums of floats lose the variance of such planes, and the sum of their gradients."""
    shapes = LARGE["cpu" if device == "cuda" else backend] if backend != "native" else []
    if large >= len(shapes):
        pytest.skip("PyTorch's own kernel" if backend == "native" else "the smaller shape suffices")
    x = (random(shapes[large], torch.float32, memory_format, device) + 1000.0).requires_grad_()
    mean, var = torch.zeros(x.shape[1], device=device), torch.ones(x.shape[1], device=device)
    bias = torch.full_like(mean, 3.0, requires_grad=True)
    weight = torch.full_like(mean, 0.5, requires_grad=True)
    out = batch_norm_relu(x, mean, var, weight, bias, training=True, momentum=1.0, backend=backend)

    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    wide_mean, wide_var = mean.double(), var.double()
    expected, wide_mean, wide_var = reference.batch_norm_relu(
        exact[0], wide_mean, wide_var, *exact[1:], training=True, momentum=1.0
    )
    # The mean is rounded to 1000 * 2^-24; so is the input itself.
    torch.testing.assert_close(mean.double(), wide_mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(var.double(), wide_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)

    grad = torch.randint(1, 5, out.shape, device=device).to(out).contiguous(memory_format=memory_format)
    grad = grad * (expected > 1e-3)
    actual = torch.autograd.grad(out, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    # The terms of the weight's gradient cancel; the error of the mean, which all share, does not.
    terms = grad.double().sum().item()
    for a, b, atol in zip(actual, wanted, (3e-4, 1e-4 * terms, 1e-4), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol)


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
    if backend == "native" and device == "cuda":  # cuDNN's kernel is decomposed into others
        torch.testing.assert_close(actual, expected)
    else:
        assert_same(actual, expected)
    # torch 2.11 rounds the update once more when compiled.
    torch.testing.assert_close((compiled_mean, compiled_var), (mean, var))


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
