from __future__ import annotations

import pytest
import torch
from helpers import FORMATS, assert_close, assert_format, assert_same, every_format, raises

from alexnet_kernels import reference
from alexnet_kernels.backends import kernels_of
from alexnet_kernels.ops import augment


def batch(count, height, width, size, device):
    """Images, crops that touch every edge, and flips."""
    images = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    top = torch.randint(0, height - size[0] + 1, (count,))
    left = torch.randint(0, width - size[1] + 1, (count,))
    if count > 1:
        top[0], left[0], top[1], left[1] = 0, width - size[1], height - size[0], 0
    return (
        images.to(device),
        torch.stack([top, left], 1).to(device),
        (torch.arange(count) % 3 != 1).to(device),
    )


def check_augment(backend, images, crops, size, dtype=torch.float32, memory_format=torch.channels_last, **options):
    given = {
        "images": images,
        "crops": crops,
        **{k: v for k, v in options.items() if isinstance(v, torch.Tensor)},
    }
    copies = {k: v.clone() for k, v in given.items()}
    formats = {"memory_format": memory_format}
    out = augment(images, crops, size, **options, dtype=dtype, **formats, backend=backend)
    expected = reference.augment(images, crops, size, **options, dtype=torch.float64)
    assert out.dtype == dtype
    assert_format(out, memory_format, "output")
    # Computed in float32 for every dtype of the result.
    assert_close(out.float() if dtype == torch.float64 else out, expected)
    for name, copy in copies.items():
        assert_same(given[name], copy, f"{name} after the call")
    return out


@every_format
def test_the_papers_crop(memory_format, device, backend):
    images, crops, flips = batch(2, 256, 256, (224, 224), device)
    mean = (torch.rand(3, 256, 256) * 255).to(device)
    out = check_augment(backend, images, crops, 224, memory_format=memory_format, flips=flips, mean=mean)
    assert out.shape == (2, 3, 224, 224)


@every_format
def test_no_option_is_the_crop_itself(memory_format, device, backend):
    images, crops, _ = batch(4, 9, 11, (5, 4), device)
    out = augment(images, crops, (5, 4), memory_format=memory_format, backend=backend)
    for i, (top, left) in enumerate(crops.tolist()):
        assert_same(out[i], images[i, top : top + 5, left : left + 4].permute(2, 0, 1).float())


@every_format
def test_a_mean_of_the_whole_image_is_subtracted_before_the_flip(memory_format, device, backend):
    images, _, _ = batch(2, 6, 7, (6, 7), device)
    crops, flips = (
        torch.zeros(2, 2, dtype=torch.int64, device=device),
        torch.tensor([True, False], device=device),
    )
    mean = images[0].permute(2, 0, 1).float()
    out = augment(images, crops, (6, 7), flips, mean=mean, memory_format=memory_format, backend=backend)
    assert_same(out[0], torch.zeros(3, 6, 7, device=device))


def test_float64_and_bfloat16_settings(device, backend):
    images, crops, _ = batch(4, 12, 20, (8, 16), device)
    for dtype in (torch.float64, torch.bfloat16):
        settings = {"mean": torch.tensor([100.0, 110.0, 120.0]), "color_shift": torch.randn(4, 3)}
        settings["scale"] = torch.tensor([0.5, 0.25, 2.0])
        settings = {k: v.to(device, dtype) for k, v in settings.items()}
        check_augment(backend, images, crops, (8, 16), **settings)


@every_format
@pytest.mark.parametrize("kind", ["colour", "crop", "image"])
@pytest.mark.parametrize(
    "size",
    [(9, 24), (8, 16), (13, 17), (7, 9), (5, 4), (1, 1)],  # rows of whole vectors, rows that end inside one, less
    ids=str,
)
def test_every_alignment(size, kind, memory_format, device, backend):
    (height, width), count = (size[0] + 2, size[1] + 3), 5
    images, crops, flips = batch(count, height, width, size, device)
    shape = {"colour": (3,), "crop": (3, *size), "image": (3, height, width)}[kind]
    options = {
        "flips": flips,
        "mean": (torch.rand(shape) * 255).to(device),
        "color_shift": torch.randn(count, 3).to(device),
        "scale": torch.tensor([0.5, 0.25, 2.0]).to(device),
    }
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for offset in range(4):
            memory = images.new_empty(images.numel() + offset)[offset:]
            placed = memory.view(images.shape).copy_(images)
            check_augment(backend, placed, crops, size, dtype, memory_format, **options)
        # The last crop ends with the last image: nothing behind it may be read.
        whole = images[:, : size[0], : size[1]].contiguous()
        if kind != "image":
            check_augment(backend, whole, torch.zeros_like(crops), size, dtype, memory_format, **options)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_other_channels(channels, channels_last, device, backend):
    """The native library's operators take any number of channels."""
    if backend not in ("cpu", "cuda"):
        pytest.skip("the kernels take three channels")
    images, crops, flips = batch(3, 7, 11, (5, 8), device)
    images = images[..., :1].repeat(1, 1, 1, channels) // torch.arange(1, channels + 1, device=device)
    images = images.to(torch.uint8)
    mean, scale = torch.rand(channels, 7, 11).to(device), torch.rand(channels).to(device)
    given = (flips, None, mean, scale, torch.float32, channels_last)
    out = kernels_of(backend).augment(images, crops, (5, 8), *given)
    values = (images.permute(0, 3, 1, 2).double() - mean.double()) * scale.double()[:, None, None]
    for result, value, (top, left), flip in zip(out, values, crops.tolist(), flips.tolist(), strict=True):
        crop = value[:, top : top + 5, left : left + 8]
        assert_close(result, crop.flip(2) if flip else crop)


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    images, crops = torch.zeros(2, 8, 9, 3, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)

    def call(images=images, crops=crops, size=(4, 5), **options):
        return lambda: augment(images, crops, size, **options, backend=choice)

    raises(TypeError, r"images must be a Tensor, not list", call(images=[1]))
    raises(TypeError, r"images must be uint8, not torch.float32", call(images=images.float()))
    raises(
        ValueError,
        r"images must be \[N, H, W, 3\], not of shape \[2, 3, 8, 9\]",
        call(images=images.permute(0, 3, 1, 2)),
    )
    raises(ValueError, r"crops of \[9, 9\] do not fit images of \[8, 9\]", call(size=(9, 9)))
    raises(ValueError, r"size must be at least 1, not \(0, 5\)", call(size=(0, 5)))
    raises(TypeError, r"size must be an int or two ints, not \(1, 2, 3\)", call(size=(1, 2, 3)))
    raises(TypeError, r"crops must be a Tensor, not NoneType", call(crops=None))
    raises(ValueError, r"crops must be \[2, 2\], not \[2, 4\]", call(crops=torch.zeros(2, 4, dtype=torch.int64)))
    raises(TypeError, r"crops must be int64, not torch.int32", call(crops=crops.int()))
    for outside, axis in (([5, 0], 0), ([-1, 0], 0), ([0, 5], 1), ([0, -1], 1)):
        bad = crops.clone()
        bad[1] = torch.tensor(outside)
        raises(ValueError, rf"crops\[:, {axis}\] goes from .* 0 to 4 only", call(crops=bad))
    raises(ValueError, r"flips must be \[2\], not \[3\]", call(flips=torch.zeros(3, dtype=torch.bool)))
    raises(TypeError, r"flips must be bool, not torch.uint8", call(flips=torch.zeros(2, dtype=torch.uint8)))
    raises(ValueError, r"color_shift must be \[2, 3\], not \[3\]", call(color_shift=torch.zeros(3)))
    raises(
        ValueError,
        r"mean must be \[3\] or \[3, 4, 5\] or \[3, 8, 9\], not \[3, 9, 8\]",
        call(mean=torch.zeros(3, 9, 8)),
    )
    raises(ValueError, r"scale must be \[3\], not \[1\]", call(scale=torch.ones(1)))
    raises(TypeError, r"dtype must be float32.* not torch.uint8", call(dtype=torch.uint8))
    raises(ValueError, r"memory_format must be", call(memory_format=torch.preserve_format))
    raises(RuntimeError, r"mean is on meta, but the input is on cpu", call(mean=torch.zeros(3, device="meta")))
    assert set(FORMATS.values()) == {torch.channels_last, torch.contiguous_format}
