"""The definitions themselves, against torch's functions, published test vectors and explicit formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from alexnet_kernels import reference


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Random123's kat_vectors: philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    def numbers(text: str) -> list[torch.Tensor]:
        return [torch.tensor(int(word, 16)) for word in text.split()]

    assert [int(w) for w in reference.philox4x32(numbers(counter), numbers(key))] == numbers(words)


def test_philox_splits_seed_offset_and_index_low_word_first() -> None:
    seed, offset, quad = (0xA4093822 | 0x299F31D0 << 32), (0x13198A2E | 0x03707344 << 32), 0x1_0000_0007
    expected = reference.philox4x32(
        [torch.tensor(v) for v in (7, 1, 0x13198A2E, 0x03707344)],
        [torch.tensor(v) for v in (0xA4093822, 0x299F31D0)],
    )
    index = 4 * quad + torch.arange(4)
    assert reference.philox(seed, offset, index).tolist() == [int(word) for word in expected]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_philox_takes_the_seed_as_a_number_or_a_tensor(seed: int) -> None:
    index = torch.arange(16)
    words = reference.philox(seed, 3, index)
    assert torch.equal(reference.philox(torch.tensor(seed), 3, index), words)
    assert torch.equal(reference.philox(torch.tensor([seed]), 3, index), words)
    assert torch.equal(reference.philox(seed % 2**64, 3, index), words)


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("shape", [(2, 10, 3, 5), (2, 7, 4), (1, 2, 2, 2, 2)])
def test_local_response_norm_is_torchs(shape: tuple[int, ...], size: int) -> None:
    x = double(*shape)
    expected = F.local_response_norm(x, size, 0.3, 0.6, 2.0)
    torch.testing.assert_close(reference.local_response_norm(x, size, 0.3, 0.6, 2.0), expected)


def test_local_response_norm_by_the_papers_formula() -> None:
    x, n, alpha, beta, k = double(1, 7, 1, 1), 5, 0.4, 0.75, 2.0
    a = x.flatten().tolist()
    expected = [
        a[i] / (k + alpha * sum(a[j] ** 2 for j in range(max(0, i - 2), min(7, i + 3)))) ** beta for i in range(7)
    ]
    b = reference.local_response_norm(x, n, alpha * n, beta, k)
    torch.testing.assert_close(b.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_local_response_norm_keeps_to_its_group() -> None:
    x = double(2, 12, 3, 3)
    towers = [reference.local_response_norm(half, 5, 1.0) for half in x.chunk(3, 1)]
    assert torch.equal(reference.local_response_norm(x, 5, 1.0, groups=3), torch.cat(towers, 1))


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("padding", [0, 1, (0, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, (3, 2), 5])
def test_max_pool2d_is_torchs(kernel_size: object, stride: object, padding: object, ceil_mode: bool) -> None:
    if kernel_size == 1 and padding != 0:
        pytest.skip("padding is at most half the window")
    for height, width in itertools.product((5, 6, 7), (5, 8)):
        x = double(2, 3, height, width).mul(2).round()
        x[0, 0, 1:3, 1:4] = torch.nan
        x[0, 1, :4] = -torch.inf
        x.requires_grad_()
        expected = F.max_pool2d(x, kernel_size, stride, padding, 1, ceil_mode)
        actual = reference.max_pool2d(x, kernel_size, stride, padding, ceil_mode)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        grad = torch.randint(1, 100, expected.shape).double()
        assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (actual, expected)))


def test_conv2d_relu_by_its_formula() -> None:
    x, w, b = double(2, 4, 6, 5), double(6, 2, 3, 2), double(6)
    expected = torch.zeros(2, 6, 3, 3, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 1, 1))
    for n, k, p, q in itertools.product(range(2), range(6), range(3), range(3)):
        if 2 * p + 3 <= 8 and q + q + 2 <= 5:
            group = slice(0, 2) if k < 3 else slice(2, 4)
            patch = padded[n, group, 2 * p : 2 * p + 3, 2 * q : 2 * q + 2]
            expected[n, k, p, q] = max(0.0, float((patch * w[k]).sum() + b[k]))
    actual = reference.conv2d_relu(x, w, b, stride=2, padding=(1, 0), groups=2)
    torch.testing.assert_close(actual, expected[:, :, :3, :2])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_batch_norm_relu_is_torchs(training: bool) -> None:
    x, mean, var, weight, bias = double(3, 5, 4, 2), double(5), double(5).square() + 0.1, double(5), double(5)
    before = mean.clone(), var.clone()
    out, new_mean, new_var = reference.batch_norm_relu(x, mean, var, weight, bias, training, 0.3, 1e-3)
    torch.testing.assert_close((mean, var), before, rtol=0, atol=0)
    expected = F.batch_norm(x, mean, var, weight, bias, training, 0.3, 1e-3).relu()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close((new_mean, new_var), (mean, var))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_dropout_keeps_words_at_or_above_the_threshold(p: float) -> None:
    words = reference.philox(11, 5, torch.arange(4096)).reshape(64, 64)
    keep = words >= p * 2**32
    x = double(64, 64)
    inverted = reference.dropout(x, p, True, 11, 5)
    torch.testing.assert_close(inverted, torch.where(keep, x / (1 - p) if p < 1 else x * 0, 0))
    plain = reference.dropout(x, p, True, 11, 5, scale_at="inference")
    torch.testing.assert_close(plain, torch.where(keep, x, 0))
    assert torch.equal(reference.dropout(x, p, False, 11, 5), x)
    torch.testing.assert_close(reference.dropout(x, p, False, 11, 5, scale_at="inference"), x * (1 - p))
    assert abs(keep.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / 4096) + 1e-9


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_dropout_of_a_shard_is_the_wholes(dim: int) -> None:
    whole = reference.dropout_keep((6, 5, 7), 0.5, 3, 1)
    for start in range(whole.shape[dim] - 2):
        part = whole.narrow(dim, start, 3)
        keep = reference.dropout_keep(part.shape, 0.5, 3, 1, shard=(dim, start, whole.shape[dim]))
        assert torch.equal(keep, part)


def test_linear_relu_dropout_is_its_parts() -> None:
    x, w, b = double(3, 2, 8), double(5, 8), double(5)
    expected = reference.dropout((x @ w.T + b).clamp(min=0), 0.5, True, 7, 2)
    torch.testing.assert_close(reference.linear_relu_dropout(x, w, b, 0.5, True, 7, 2), expected)
    signed = reference.linear_relu_dropout(x, w, b, 0.5, True, 7, 2, relu=False)
    torch.testing.assert_close(signed, reference.dropout(x @ w.T + b, 0.5, True, 7, 2))


def test_sgd_step_by_the_papers_formula() -> None:
    w, g, v = (torch.tensor([value], dtype=torch.float64) for value in (2.0, 3.0, 0.5))
    params, buffers, masters = reference.sgd_step([w], [g], [v], lr=0.1, momentum=0.9, weight_decay=0.01)
    velocity = 0.9 * 0.5 - 0.01 * 0.1 * 2.0 - 0.1 * 3.0
    assert buffers[0].item() == pytest.approx(velocity, rel=1e-14)
    assert params[0].item() == pytest.approx(2.0 + velocity, rel=1e-14)
    assert masters == []
    assert (w.item(), g.item(), v.item()) == (2.0, 3.0, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_sgd_step_by_torchs_rule_is_torchs(options: dict[str, float]) -> None:
    w = [double(4, 3), double(5)]
    buffers = [torch.zeros_like(x) for x in w]
    peers = [torch.nn.Parameter(x.clone()) for x in w]
    peer = torch.optim.SGD(peers, lr=0.1, **options)
    for step in range(3):
        grads = [double(*x.shape) for x in w]
        for p, g in zip(peers, grads, strict=True):
            p.grad = g.clone()
        peer.step()
        options = {"weight_decay": 0.0, **options}
        w, buffers, _ = reference.sgd_step(w, grads, buffers, lr=0.1, rule="torch", first_step=step == 0, **options)
        torch.testing.assert_close(w, [p.detach() for p in peers])


def test_sgd_step_updates_the_master_and_rounds_it() -> None:
    master = torch.randn(50)
    param, grad = master.bfloat16(), torch.randn(50).bfloat16()
    params, _, masters = reference.sgd_step([param], [grad], [torch.zeros(50)], [master], lr=0.01)
    expected, _, _ = reference.sgd_step([master], [grad], [torch.zeros(50)], lr=0.01)
    assert torch.equal(masters[0], expected[0])
    assert torch.equal(params[0], expected[0].bfloat16())


@pytest.mark.parametrize("where", ["colour", "image", "output"])
def test_augment_by_its_formula(where: str) -> None:
    images = torch.randint(0, 256, (3, 7, 9, 3), dtype=torch.uint8)
    crops, flips = torch.tensor([[0, 0], [3, 4], [1, 2]]), torch.tensor([False, True, True])
    shift, scale = double(3, 3), double(3)
    mean = {"colour": double(3), "image": double(3, 7, 9), "output": double(3, 4, 5)}[where]
    out = reference.augment(images, crops, (4, 5), flips, shift, mean, scale, dtype=torch.float64)
    for n, c, y, x in itertools.product(range(3), range(3), range(4), range(5)):
        row, column = int(crops[n, 0]) + y, int(crops[n, 1]) + (4 - x if flips[n] else x)
        place = {"colour": (c,), "image": (c, row, column), "output": (c, y, x)}[where]
        expected = (float(images[n, row, column, c]) + shift[n, c] - mean[place]) * scale[c]
        assert out[n, c, y, x].item() == pytest.approx(float(expected), rel=1e-12, abs=1e-9)
    assert out.is_contiguous(memory_format=torch.channels_last)
