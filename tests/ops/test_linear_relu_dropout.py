from __future__ import annotations

import pytest
import torch
from contract import check_op
from helpers import (
    assert_close,
    assert_same,
    check_compiled,
    every_dtype,
    raises,
    random,
)

from alexnet_kernels import reference
from alexnet_kernels.ops import dropout, linear_relu_dropout

KEYED = {"seed": 99, "offset": 2}


def tensors(shape, outputs, dtype, device, bias=True):
    return {
        "input": random(shape, dtype, device=device),
        "weight": random((outputs, shape[-1]), dtype, device=device, scale=shape[-1] ** -0.5),
        "bias": random((outputs,), dtype, device=device) if bias else None,
    }


@every_dtype
@pytest.mark.parametrize("shape", [(5, 17), (3, 2, 17)], ids=["2d", "3d"])
@pytest.mark.parametrize("options", [{}, {"shard": (-1, 33, 99)}, {"relu": False}], ids=["relu", "shard", "plain"])
def test_drops_what_dropout_drops(options, shape, dtype, device, backend):
    values = tensors(shape, 33, dtype, device)
    out = linear_relu_dropout(**values, p=0.5, **KEYED, **options, backend=backend)
    before = linear_relu_dropout(**values, p=0.0, relu=False, backend=backend)
    relu = options.get("relu", True)
    shard = options.get("shard")
    parts = dropout(before.relu() if relu else before, 0.5, **KEYED, shard=shard, backend=backend)
    assert_same(out, parts)


def test_nan_and_infinity(device, backend):
    values = tensors((6, 16), 32, torch.float32, device)
    values["input"][1, 3], values["input"][4, 0] = torch.nan, torch.inf
    out = linear_relu_dropout(**values, **KEYED, backend=backend)
    expected = reference.linear_relu_dropout(**{k: v.double() for k, v in values.items()}, **KEYED)
    assert_close(out, expected)
    assert out[1].isnan().any()
    assert out[4].isinf().any()


# The largest batch sizes that csrc/cpu/linear_relu_dropout.cpp computes without a library.
LIMITS = {torch.float32: 16, torch.float64: 16, torch.bfloat16: 4, torch.float16: 64}


@every_dtype
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, "limit", "beyond"])
def test_small_batches(batch, dtype, device, backend):
    if isinstance(batch, str):
        batch = LIMITS[dtype] + (batch == "beyond")
    for inputs, outputs in ((1, 1), (37, 29), (643, 13)):
        values = tensors((batch, inputs), outputs, dtype, device)
        check_op("linear_relu_dropout", {**values, "p": 0.3, **KEYED}, backend)


@every_dtype
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_small_batches_drop_what_dropout_drops(batch, dtype, device, backend):
    values = tensors((batch, 64), 1001, dtype, device)
    values["weight"].abs_()
    values["input"].abs_().add_(0.1)
    values["bias"].abs_()
    for options in ({}, {"shard": (-1, 1001, 3003)}, {"shard": (0, 2, 70)}):
        out = linear_relu_dropout(**values, p=0.5, **KEYED, **options, backend=backend)
        assert torch.equal(out != 0, reference.dropout_keep(out.shape, 0.5, **KEYED, **options, device=device))


@every_dtype
def test_nan_and_infinity_of_one_image(dtype, device, backend):
    for name, value in (("input", torch.nan), ("input", torch.inf), ("weight", torch.nan), ("weight", -torch.inf)):
        values = tensors((1, 37), 29, dtype, device)
        values[name][0, 36] = value
        out = linear_relu_dropout(**values, p=0.0, backend=backend)
        expected = reference.linear_relu_dropout(**{k: v.double() for k, v in values.items()}, p=0.0)
        assert_close(out, expected)


@every_dtype
@pytest.mark.parametrize("batch", [1, 2, "limit"])
def test_small_batches_are_the_same_by_any_number_of_threads(batch, dtype, threads):
    values = tensors((LIMITS[dtype] if batch == "limit" else batch, 515), 803, dtype, "cpu")
    outputs = []
    for count in (1, 2, 3):
        threads(count)
        outputs.append(linear_relu_dropout(**values, **KEYED))
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])


def test_without_a_seed_follows_torchs_generator(device, backend):
    values = tensors((32, 16), 64, torch.float32, device)

    def draw():
        return [linear_relu_dropout(**values, backend=backend) for _ in range(2)]

    torch.manual_seed(3)
    first = draw()
    torch.manual_seed(3)
    assert_same(draw(), first)
    assert not torch.equal(*first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, dtype, device, backend, fresh_dynamo):
    values = tensors((5, 16), 12, dtype, device)
    check_compiled(
        lambda x, w, b: linear_relu_dropout(x, w, b, **KEYED, backend=backend),
        list(values.values()),
        compiler,
        dynamic=backend != "native",
    )


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    x, w, b = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(8)

    def call(x=x, w=w, b=b, p=0.5, **options):
        return lambda: linear_relu_dropout(x, w, b, p, backend=choice, **options)

    raises(TypeError, r"input must be a Tensor, not str", call(x="x"))
    raises(TypeError, r"input must be float32.* not torch.int64", call(x=x.long()))
    raises(ValueError, r"weight must be \[O, I\], not of shape \[8\]", call(w=w[:, 0]))
    raises(ValueError, r"input must be \[\*, 6\] for weight \[8, 6\], not \[4, 5\]", call(x=x[:, 1:]))
    raises(ValueError, r"input must be \[\*, 6\]", call(x=x[0, 0]))
    raises(ValueError, r"bias must be \[8\], not of shape \[7\]", call(b=b[1:]))
    raises(TypeError, r"weight is torch.bfloat16, but the input is torch.float32", call(w=w.bfloat16()))
    raises(TypeError, r"bias is torch.float64, but the input is torch.float32", call(b=b.double()))
    raises(ValueError, r"p must be in \[0, 1\], not 2", call(p=2))
    raises(ValueError, r"scale_at must be 'training' or 'inference', not 'never'", call(scale_at="never"))
    raises(ValueError, r"\[4, 12\) is not inside \[0, 10\)", call(shard=(1, 4, 10)))
    raises(TypeError, r"seed must be an int.* not str", call(seed="0"))
    raises(RuntimeError, r"weight is on meta, but the input is on cpu", call(w=w.to("meta")))
