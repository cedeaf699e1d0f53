from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    TOLERANCES,
    assert_close,
    assert_same,
    cases,
    check,
    check_compiled,
    check_gradients,
    check_repeatable,
    every_dtype,
    every_format,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import conv2d_relu


def settled(input, weight, bias=None, margin=1e-4, **options):
    """Where the pre-activation is too far from zero for a rounding to change its sign."""
    before = F.conv2d(input, weight, bias, **options)
    return before.abs() > margin * before.abs().amax() if before.numel() else before > 0


def tensors(shape, weight_shape, dtype, memory_format, device, bias=True):
    fan_in = weight_shape[1:].numel() if isinstance(weight_shape, torch.Size) else 1
    for extent in weight_shape[1:]:
        fan_in *= extent
    return {
        "input": random(shape, dtype, memory_format, device),
        "weight": random(weight_shape, dtype, memory_format, device, scale=fan_in**-0.5),
        "bias": random(weight_shape[:1], dtype, device=device, scale=0.5) if bias else None,
    }


def torch_conv2d_relu(input, weight, bias=None, **options):
    return F.conv2d(input, weight, bias, **options).relu()


def check_conv2d_relu(values, options, backend=None, **more):
    input = values["input"]
    if input.dtype in (torch.bfloat16, torch.float16) and (
        backend == "cuda" or (input.is_cuda and backend == "native")
    ):
        # cuDNN's convolution, and the emulation's, has been rounded when the bias is added.
        margin = TOLERANCES[input.dtype].library
        more |= {"settled": functools.partial(settled, margin=margin), "slack": "library", "output_slack": "library"}
    elif input.is_cuda and backend != "triton":
        # cuDNN's gradient of conv2's filters in NCHW, float32 without TF32, is off by 2e-3 of the largest.
        more |= {"slack": "transformed", "output_slack": "transformed", "peer": torch_conv2d_relu}
    elif input.dtype == torch.float16:
        more["slack"] = "library"  # torch's convolutions in float16 on a CPU add in float16 in backward
    check(
        conv2d_relu,
        reference.conv2d_relu,
        values,
        options,
        backend=backend,
        **({"settled": settled} | more),
    )


@every_format
@every_dtype
@cases(
    ((1, 3, 83, 75), {"weight": (96, 3, 11, 11), "stride": 4, "padding": 2}),
    ((1, 96, 13, 13), {"weight": (64, 48, 5, 5), "padding": 2, "groups": 2}),
    ((1, 64, 13, 13), {"weight": (48, 64, 3, 3), "padding": 1}),
    ((2, 7, 9, 11), {"weight": (5, 7, 3, 3)}),
    ((2, 12, 8, 5), {"weight": (9, 4, 3, 2), "stride": (2, 1), "padding": (1, 0), "groups": 3}),
    ((2, 16, 6, 6), {"weight": (16, 16, 1, 1)}),
    ((2, 6, 6, 6), {"weight": (6, 1, 3, 3), "padding": 1, "groups": 6}),
    ((1, 4, 3, 3), {"weight": (2, 4, 3, 3)}),
    ((1, 17, 9, 9), {"weight": (33, 17, 2, 2), "stride": 2}),
)
def test_equals_the_definition(shape, options, dtype, memory_format, device, backend):
    options = dict(options)
    values = tensors(shape, options.pop("weight"), dtype, memory_format, device)
    check_conv2d_relu(values, options, backend)


@every_format
@pytest.mark.parametrize(
    ("shape", "weight", "options"),
    [
        ((1, 3, 224, 224), (96, 3, 11, 11), {"stride": 4, "padding": 2}),
        ((1, 96, 27, 27), (256, 48, 5, 5), {"padding": 2, "groups": 2}),
        ((1, 256, 13, 13), (384, 256, 3, 3), {"padding": 1}),
        ((1, 384, 13, 13), (256, 192, 3, 3), {"padding": 1, "groups": 2}),
    ],
    ids=["conv1", "conv2", "conv3", "conv5"],
)
def test_alexnets_layers(shape, weight, options, memory_format, device):
    check_conv2d_relu(tensors(shape, weight, torch.float32, memory_format, device), options)


@every_format
@every_dtype
def test_without_bias(dtype, memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), dtype, memory_format, device, bias=False)
    check_conv2d_relu(values, {"padding": 1}, backend)


@every_format
def test_without_relu(memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, memory_format, device)
    check(
        lambda **given: conv2d_relu(**given, relu=False),
        F.conv2d,
        values,
        {"padding": 1},
        backend=backend,
    )


@every_format
def test_of_no_images(memory_format, device, backend):
    values = tensors((0, 8, 7, 7), (16, 8, 3, 3), torch.float32, memory_format, device)
    check_conv2d_relu(values, {}, backend)


def test_of_one_image_without_a_batch(device, backend):
    values = tensors((8, 7, 7), (16, 8, 3, 3), torch.float32, torch.contiguous_format, device)
    check_conv2d_relu(values, {"groups": 1}, backend)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "mixed"])
def test_tensors_of_any_strides(layout, device, backend):
    values = tensors((2, 8, 7, 6), (16, 8, 3, 3), torch.float32, torch.contiguous_format, device)
    if layout == "sliced":
        values["input"] = random((4, 8, 7, 12), device=device)[::2, :, :, ::2]
        values["weight"] = random((16, 16, 3, 3), device=device, scale=0.1)[:, ::2]
        values["bias"] = random((32,), device=device)[::2]
    elif layout == "transposed":
        values["input"] = random((2, 7, 8, 6), device=device).permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3)
        values["weight"] = random((8, 16, 3, 3), device=device, scale=0.1).transpose(0, 1)
        values["input"] = random((2, 7, 8, 6), device=device).transpose(1, 2)
    elif layout == "expanded":
        values["input"] = random((1, 8, 1, 6), device=device).expand(2, 8, 7, 6)
        values["bias"] = random((1,), device=device).expand(16)
    else:
        values["weight"] = values["weight"].contiguous(memory_format=torch.channels_last)
    # torch takes the weight's format where it is channels_last.
    check_conv2d_relu(values, {"padding": 1}, backend, formats=layout != "mixed")


@every_format
@every_dtype
def test_expanded_output_gradient(dtype, memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), dtype, memory_format, device)
    leaves = {k: v.requires_grad_() for k, v in values.items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in values.items()}
    assert settled(**{k: v.detach() for k, v in exact.items()}).float().mean() > 0.99
    # A bias that keeps most pre-activations away from zero, so that no gradient is masked out by hand.
    with torch.no_grad():
        for t in (leaves["bias"], exact["bias"]):
            t.copy_(torch.tensor([8.0, -8.0]).repeat(8))
    conv2d_relu(**leaves, backend=backend).sum().backward()
    reference.conv2d_relu(**exact).sum().backward()
    for name in leaves:
        slack = "library" if dtype == torch.float16 else "sums"
        assert_close(leaves[name].grad, exact[name].grad, slack=slack, what=name)


@pytest.mark.float64
@every_format
@pytest.mark.parametrize("groups", [1, 2])
def test_first_and_second_derivatives(groups, memory_format, device, backend):
    x = random((1, 4, 3, 2), torch.float64, memory_format, device)
    w = random((2, 4 // groups, 2, 2), torch.float64, memory_format, device)
    b = random((2,), torch.float64, device=device)
    check_gradients(lambda x, w, b: conv2d_relu(x, w, b, 1, 1, groups, backend=backend), [x, w, b])


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_gradients_only_where_wanted(frozen, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, torch.contiguous_format, device)
    leaves = {k: v.clone().requires_grad_(k != frozen) for k, v in values.items()}
    full = {k: v.clone().requires_grad_() for k, v in values.items()}
    conv2d_relu(**leaves, backend=backend).square().sum().backward()
    conv2d_relu(**full, backend=backend).square().sum().backward()
    for name, leaf in leaves.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, full[name].grad.double(), what=name)


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nan_and_infinity(value, memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, memory_format, device)
    values["input"][1, 3, 2, 2] = value
    out = conv2d_relu(**values, backend=backend)
    expected = reference.conv2d_relu(**{k: v.double() for k, v in values.items()})
    assert_same(out.isnan(), expected.isnan())
    assert_same(out.isinf(), expected.isinf())
    assert not out.isfinite().all()


@every_format
@every_dtype
def test_repeats_bitwise(dtype, memory_format, device, backend, threads):
    values = tensors((4, 16, 13, 13), (32, 8, 3, 3), dtype, memory_format, device)

    def run(x, w, b):
        return conv2d_relu(x, w, b, 1, 1, 2, backend=backend)

    # torch's convolution splits its sums by the number of threads: its bits repeat for one number of them.
    check_repeatable(run, list(values.values()), threads, across=False)


@every_format
def test_registration(memory_format, device):
    values = tensors((2, 8, 7, 7), (16, 4, 3, 3), torch.float32, memory_format, device)
    leaves = [v.requires_grad_() for v in values.values()]
    operator = torch.ops.alexnet_kernels.conv2d_relu.default
    torch.library.opcheck(operator, (*leaves, [1, 1], [1, 1], 2, True))
    torch.library.opcheck(operator, (*leaves[:2], None, [2, 1], [0, 1], 2, False))


@every_format
def test_compiles(memory_format, device, backend, fresh_dynamo):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, memory_format, device)
    check_compiled(
        lambda x, w, b: conv2d_relu(x, w, b, 2, 1, backend=backend),
        list(values.values()),
        dynamic=backend != "native",
    )


@every_format
def test_autocast_casts_to_its_dtype(memory_format, device, backend):
    values = tensors((2, 8, 7, 7), (16, 8, 3, 3), torch.float32, memory_format, device)
    leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
    with torch.autocast(device, torch.bfloat16):
        out = conv2d_relu(**leaves, backend=backend)
    assert out.dtype == torch.bfloat16
    assert_same(out, conv2d_relu(**{k: v.bfloat16() for k, v in values.items()}, backend=backend))
    out.float().square().sum().backward()
    assert {v.grad.dtype for v in leaves.values()} == {torch.float32}


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    x, w, b = torch.zeros(2, 8, 7, 7), torch.zeros(16, 4, 3, 3), torch.zeros(16)

    def call(x=x, w=w, b=b, stride=1, padding=0, groups=2):
        return lambda: conv2d_relu(x, w, b, stride, padding, groups, backend=choice)

    raises(TypeError, r"input must be a Tensor, not list", call(x=[1.0]))
    raises(TypeError, r"input must be float32.* not torch.int64", call(x=x.long()))
    raises(ValueError, r"input must be \[N, C, H, W\], not of shape \[8, 7\]", call(x=x[0, :, :, 0]))
    raises(ValueError, r"weight must be .* not of shape \[16, 4\]", call(w=w[:, :, 0, 0]))
    raises(ValueError, r"bias must be \[16\], not of shape \[15\]", call(b=b[1:]))
    raises(TypeError, r"weight is torch.float64, but the input is torch.float32", call(w=w.double()))
    raises(TypeError, r"bias is torch.bfloat16, but the input is torch.float32", call(b=b.bfloat16()))
    raises(ValueError, r"groups=3 does not divide the 16 output channels", call(groups=3))
    raises(ValueError, r"groups must be a positive int, not 0", call(groups=0))
    raises(ValueError, r"input has 8 channels, but weight \[16, 4, 3, 3\] with groups=1", call(groups=1))
    raises(ValueError, r"stride must be at least 1, not 0", call(stride=0))
    raises(ValueError, r"padding must be at least 0, not -1", call(padding=-1))
    raises(TypeError, r"stride must be an int or two ints, not 1.5", call(stride=1.5))
    raises(TypeError, r"padding must be an int or two ints, not 'same'", call(padding="same"))
    raises(ValueError, r"an image of 2 x 7 .* is smaller than the kernel 3 x 3", call(x=x[:, :, :2]))
    raises(RuntimeError, r"weight is on meta, but the input is on cpu", call(w=w.to("meta")))


class TestSpaceToDepth:
    """The bfloat16, channels_last path of strided convolutions of six images or more with few channels."""

    def test_fewer_images_go_the_plain_way(self):
        image = torch.randn(5, 3, 39, 39).bfloat16().contiguous(memory_format=torch.channels_last)
        with torch.profiler.profile() as profile:
            conv2d_relu(image, torch.randn(16, 3, 11, 11).bfloat16(), None, 4, 2)
        assert "alexnet_kernels::space_to_depth" not in {event.key for event in profile.key_averages()}

    @pytest.mark.parametrize(
        ("size", "kernel", "stride", "padding"),
        [((39, 39), 11, 4, 2), ((37, 29), 7, 3, 0), ((20, 20), 5, 2, 1), ((23, 31), 4, 3, 1), ((11, 11), 11, 4, 0)],
    )
    def test_equals_the_plain_convolution(self, size, kernel, stride, padding):
        image = torch.randn(6, 3, *size).bfloat16().contiguous(memory_format=torch.channels_last)
        weight = torch.randn(16, 3, kernel, kernel).bfloat16()
        ours = [image.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()]
        exact = [image.double().requires_grad_(), weight.double().requires_grad_()]
        with torch.profiler.profile() as profile:
            out = conv2d_relu(*ours, None, stride, padding, relu=False, backend="cpu")
        assert "alexnet_kernels::space_to_depth" in {event.key for event in profile.key_averages()}
        expected = torch.nn.functional.conv2d(*exact, None, stride, padding)
        assert out.shape == expected.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8 * expected.abs().max().item())
        grad = torch.randint(-4, 5, out.shape).bfloat16()
        for actual, wanted in zip(
            torch.autograd.grad(out, ours, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
        ):
            atol = 2**-7 * wanted.abs().max().item()
            torch.testing.assert_close(actual.double(), wanted, rtol=2**-7, atol=atol)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_there_and_back(self, memory_format):
        image = torch.randn(2, 3, 8, 12).contiguous(memory_format=memory_format)
        args = (4, [0, 0], [2, 3], torch.float32)
        blocks = torch.ops.alexnet_kernels.space_to_depth(image, *args)
        assert torch.equal(blocks[:, (1 * 4 + 2) * 3 + 1], image[:, 1, 1::4, 2::4])
        assert torch.equal(torch.ops.alexnet_kernels.depth_to_space(blocks, 4, [0, 0], [8, 12], torch.float32), image)

    def test_opcheck_and_gradients(self):
        image = torch.randn(1, 3, 9, 7, dtype=torch.float64, requires_grad=True)
        args = (4, [2, 2], [3, 2], torch.float64)
        torch.library.opcheck(torch.ops.alexnet_kernels.space_to_depth.default, (image, *args))
        assert torch.autograd.gradcheck(lambda x: torch.ops.alexnet_kernels.space_to_depth(x, *args), image)
        assert torch.autograd.gradgradcheck(lambda x: torch.ops.alexnet_kernels.space_to_depth(x, *args), image)
