from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    assert_same,
    every_format,
    forward_backward,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import dropout
from alexnet_kernels.ops.dropout import seed_tensor

KEYED = {"seed": 1234, "offset": 5}


def kept(shape, p=0.5, device="cpu", **options):
    """The elements of a tensor of ones that dropout keeps."""
    return dropout(torch.ones(shape, device=device), p, **options) != 0


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**32 + 3, 2**62])
def test_seed_and_offset_of_64_bits(seed, offset, device, backend):
    expected = reference.dropout_keep((40, 9), 0.5, seed, offset, device=device)
    assert_same(kept((40, 9), seed=seed, offset=offset, device=device, backend=backend), expected)
    if seed < 2**63:
        tensor = torch.tensor(seed, device=device)
        assert_same(kept((40, 9), seed=tensor, offset=offset, device=device, backend=backend), expected)


@every_format
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_mask_hangs_on_neither_format_nor_dtype(p, memory_format, device, backend):
    expected = kept((2, 19, 5, 7), p, device=device, **KEYED, backend=backend)
    wide = [] if backend in ("cuda", "triton") else [torch.float64]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, *wide):
        x = torch.ones(2, 19, 5, 7, dtype=dtype, device=device).contiguous(memory_format=memory_format)
        assert_same(dropout(x, p, **KEYED, backend=backend) != 0, expected)


@every_format
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_a_shard_drops_what_the_whole_drops(dim, memory_format, device, backend):
    whole = random((4, 19, 5, 6), torch.float32, memory_format, device)
    expected = dropout(whole, 0.5, **KEYED, backend=backend)
    size = whole.shape[dim]
    for start, length in ((0, 2), (1, size - 1), (size - 1, 1), (1, 0), (0, size)):
        part = whole.narrow(dim, start, length).contiguous(memory_format=memory_format)
        shard = (dim, start, size)
        actual = dropout(part, 0.5, **KEYED, shard=shard, backend=backend)
        assert_same(actual, expected.narrow(dim, start, length), f"{shard}")
        leaf = part.clone().requires_grad_()
        dropout(leaf, 0.5, **KEYED, shard=shard, backend=backend).sum().backward()
        assert_same(leaf.grad != 0, expected.narrow(dim, start, length) != 0, f"gradient of {shard}")


def test_a_shard_far_into_a_whole_of_many_elements(device, backend):
    shard = (0, 2**33 + 1, 2**34)
    expected = reference.dropout_keep((3, 37), 0.5, 1234, 5, shard, device)
    assert_same(kept((3, 37), **KEYED, shard=shard, device=device, backend=backend), expected)
    assert not torch.equal(expected, reference.dropout_keep((3, 37), 0.5, 1234, 5, None, device))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "given"])
def test_drops_p_of_the_elements(seed, p, device, backend):
    count = 1 << 18
    rate = 1 - kept((count,), p, seed=seed, device=device, backend=backend).double().mean().item()
    assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_streams_rows_and_neighbours_are_independent(device, backend):
    count = 1 << 17

    def mask(seed, offset):
        return kept((count,), seed=seed, offset=offset, device=device, backend=backend)

    base = mask(1, 0)
    others = [
        mask(2, 0),
        mask(1, 1),
        mask(1 + 2**32, 0),
        mask(1, 2**32),
        base.roll(1),
        base.roll(4),
        base.roll(16),
    ]
    for other in others:
        agreement = (base == other).double().mean().item()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_without_a_seed_follows_torchs_generator(device, backend):
    def draw():
        return [kept((1000,), device=device, backend=backend) for _ in range(2)]

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert_same(draw(), first)
    assert not torch.equal(*first)
    torch.manual_seed(4)
    assert not torch.equal(draw()[0], first[0])


def test_backward_drops_what_forward_dropped_without_a_seed(device, backend):
    x = random((50, 41), device=device).requires_grad_()
    out = dropout(x, 0.5, backend=backend)
    out.sum().backward()
    assert_same(x.grad, torch.where(out != 0, 2.0, 0.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_dropped_values_are_zero_whatever_they_were(value, device, backend):
    x = torch.full((50, 41), value, device=device)
    expected = torch.where(kept((50, 41), **KEYED, device=device, backend=backend), x, 0)
    assert_same(dropout(x, 0.5, **KEYED, backend=backend), expected)


def test_compiles_without_a_seed(device, backend, fresh_dynamo):
    x = torch.ones(1000, device=device)
    compiled = torch.compile(lambda x: dropout(x, 0.5, backend=backend), fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert 300 < (first != 0).sum() < 700
    assert not torch.equal(first, second)
    out, gradient = forward_backward(lambda x: compiled(x) * 1, torch.ones(1000, device=device))
    assert_same(gradient.abs() > 0, (out != 0) & (torch.linspace(-1, 1, 1000, device=device) != 0))


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    x = torch.zeros(4, 6)

    def call(x=x, p=0.5, seed=0, **options):
        return lambda: dropout(x, p, True, seed, backend=choice, **options)

    raises(TypeError, r"input must be a Tensor, not NoneType", call(x=None))
    raises(TypeError, r"input must be float32.* not torch.int64", call(x=x.long()))
    raises(ValueError, r"p must be in \[0, 1\], not 1.5", call(p=1.5))
    raises(ValueError, r"p must be in \[0, 1\], not -0.1", call(p=-0.1))
    raises(ValueError, r"p must be in \[0, 1\], not nan", call(p=math.nan))
    raises(ValueError, r"scale_at must be 'training' or 'inference', not 'test'", call(scale_at="test"))
    raises(TypeError, r"seed must be an int, an int64 tensor or None, not float", call(seed=0.5))
    raises(TypeError, r"seed must be an int, an int64 tensor or None, not bool", call(seed=True))  # torch's inplace
    raises(
        TypeError,
        r"seed must be int64 with one element, not torch.int32",
        call(seed=torch.zeros((), dtype=torch.int32)),
    )
    raises(
        TypeError,
        r"seed must be int64 with one element, not torch.int64 \[2\]",
        call(seed=torch.zeros(2).long()),
    )
    raises(ValueError, r"seed must fit 64 bits, not 18446744073709551616", call(seed=2**64))
    raises(ValueError, r"\[3, 7\) is not inside \[0, 6\)", call(shard=(0, 3, 6)))
    raises(ValueError, r"is not inside \[0, 8\)", call(shard=(0, -1, 8)))
    raises(ValueError, r"dimensions 0 to 1", call(shard=(2, 0, 6)))
    raises(ValueError, r"without dimensions has no shards", call(x=torch.zeros(()), shard=(0, 0, 1)))


def test_a_seed_on_the_cpu_is_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying the seed to a GPU would wait for the device, and is not allowed during the capture of a CUDA graph."""
    monkeypatch.setattr(torch.Tensor, "to", lambda *_: pytest.fail("copied"), raising=False)
    seed = seed_tensor("dropout", torch.tensor(-(2**63)), torch.device("meta"))
    assert seed.device.type == "meta"
    assert seed.dtype == torch.int64
    assert seed.shape == ()


def test_indices_up_to_the_last(device, backend):
    """A shard of a tensor of almost 2^63 elements; a whole of more has elements without an index."""
    rows, size = 4, 2**60
    x = torch.ones(rows, 1000, device=device)
    out = dropout(x, 0.5, seed=1, shard=(1, size - 1000, size), backend=backend)
    keep = reference.dropout_keep(x.shape, 0.5, 1, 0, (1, size - 1000, size))
    assert torch.equal(out.cpu() != 0, keep)
    with pytest.raises(ValueError, match=r"the whole tensor has 2\^63 elements or more"):
        dropout(x, 0.5, seed=1, shard=(1, 2**62 - 1000, 2**62), backend=backend)
