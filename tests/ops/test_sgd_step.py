from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCES, assert_close, assert_same, raises, random
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_kernels import reference
from alexnet_kernels.ops import sgd_step
from alexnet_kernels.ops.sgd_step import _learning_rate

SHAPES = [(24, 3, 11, 11), (7,), (64, 50), (1,), (0,), (), (5, 3, 3, 3)]

# The dtypes of parameter, gradient, momentum buffer and master.
MIXTURES = {
    "fp32": (torch.float32, torch.float32, torch.float32, None),
    "fp64": (torch.float64, torch.float64, torch.float64, None),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, torch.float16, None),
    "fp32_bf16_gradient": (torch.float32, torch.bfloat16, torch.float32, None),
    "bf16_fp32_momentum": (torch.bfloat16, torch.bfloat16, torch.float32, None),
    "bf16_master": (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    "fp16_master": (torch.float16, torch.float16, torch.float32, torch.float32),
    "bf16_master_fp32_gradient": (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    "bf16_master_bf16_momentum": (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32),
}
every_mixture = pytest.mark.parametrize(
    "mixture",
    [pytest.param(v, id=k, marks=[pytest.mark.float64] if k == "fp64" else []) for k, v in MIXTURES.items()],
)

SETTINGS = {
    "paper": {"rule": "paper"},
    "paper-first": {"rule": "paper", "first_step": True},
    "paper-plain": {"rule": "paper", "momentum": 0.0, "weight_decay": 0.0},
    "torch": {"rule": "torch"},
    "torch-first": {"rule": "torch", "first_step": True},
    "torch-plain": {"rule": "torch", "momentum": 0.0, "weight_decay": 0.0},
    "torch-dampened": {"rule": "torch", "dampening": 0.4},
    "torch-dampened-first": {"rule": "torch", "dampening": 0.4, "first_step": True},
    "torch-nesterov": {"rule": "torch", "nesterov": True, "weight_decay": 0.1},
    "torch-nesterov-first": {"rule": "torch", "nesterov": True, "first_step": True},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def state(mixture, device, shapes=SHAPES):
    param, grad, buffer, master = mixture
    masters = [random(shape, master or param, device=device) for shape in shapes]
    return (
        [m.to(param, copy=True) for m in masters],
        [random(shape, grad, device=device) for shape in shapes],
        [random(shape, buffer, device=device, scale=0.1) for shape in shapes],
        masters if master else [],
    )


def check_step(given, settings, backend):
    before = [[t.clone() for t in tensors] for tensors in given]
    expected = reference.sgd_step(*before, lr=0.03, **settings)
    assert sgd_step(*given, lr=0.03, **settings, backend=backend) is None
    params, grads, buffers, masters = given
    assert_same(grads, before[1], "gradients")
    for name, actual, wanted in zip(("param", "buffer", "master"), (params, buffers, masters), expected, strict=True):
        assert len(actual) == len(wanted)
        for a, w in zip(actual, wanted, strict=True):
            assert_close(a, w.double(), what=name)
    for param, master in zip(params, masters, strict=False):
        assert_same(param, master.to(param.dtype), "the rounded master")


@every_setting
@pytest.mark.parametrize("layout", ["channels_last", "mixed", "sliced", "transposed"])
def test_tensors_of_any_strides(layout, settings, device, backend):
    shape = (6, 5, 3, 3)
    given = state(MIXTURES["bf16_master"], device, [shape])
    for i, tensors in enumerate(given):
        if layout == "channels_last" or (layout == "mixed" and i % 2):
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        elif layout == "sliced":
            tensors[0] = torch.cat([tensors[0], tensors[0]], 1)[:, ::2]
        elif layout == "transposed":
            tensors[0] = tensors[0].transpose(0, 1)
    strides = [t[0].stride() for t in given]
    check_step(given, settings, backend)
    assert [t[0].stride() for t in given] == strides


def test_expanded_gradient(device, backend):
    params, _, buffers, masters = state(MIXTURES["fp32"], device, [(6, 5)])
    grads = [torch.tensor(0.7, device=device).expand(6, 5)]
    check_step((params, grads, buffers, masters), {}, backend)


@pytest.mark.parametrize("foreign", [{}, {"dampening": 0.2}, {"nesterov": True}], ids=["plain", "dampened", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_torchs_rule_follows_torchs_optimizer(dtype, foreign, device, backend):
    weights = [random(shape, dtype, device=device) for shape in SHAPES]
    buffers = [torch.zeros_like(w) for w in weights]
    peers = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.SGD(peers, lr=0.1, momentum=0.9, weight_decay=5e-3, **foreign)
    for step, lr in enumerate((0.1, 0.1, 0.02, 0.02)):
        grads = [random(shape, dtype, device=device) for shape in SHAPES]
        for peer, grad in zip(peers, grads, strict=True):
            peer.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        settings = {"lr": lr, "weight_decay": 5e-3, "rule": "torch", "first_step": step == 0, **foreign}
        sgd_step(weights, grads, buffers, **settings, backend=backend)
        for weight, peer in zip(weights, peers, strict=True):
            torch.testing.assert_close(weight, peer.detach(), rtol=10 * TOLERANCES[dtype].relative, atol=1e-6)


def test_the_rules_part_when_lr_changes(device, backend):
    weights = {rule: [torch.ones(3, device=device)] for rule in ("paper", "torch")}
    for rule, w in weights.items():
        v, g = [torch.zeros(3, device=device)], [torch.ones(3, device=device)]
        for step, lr in enumerate((0.1, 0.01)):
            settings = {"lr": lr, "weight_decay": 0.0, "rule": rule, "first_step": step == 0}
            sgd_step(w, g, v, **settings, backend=backend)
    # Both take 0.1 first; then 0.9 * 0.1 + 0.01 against 0.01 * (0.9 + 1).
    torch.testing.assert_close(weights["paper"][0], torch.full((3,), 0.8, device=device))
    torch.testing.assert_close(weights["torch"][0], torch.full((3,), 0.881, device=device))


def test_masters_keep_what_bfloat16_would_lose(device, backend):
    master = torch.ones(10, device=device)
    params, buffers = [master.bfloat16()], [torch.zeros(10, device=device)]
    grads = [torch.ones(10, dtype=torch.bfloat16, device=device)]
    for _ in range(16):
        sgd_step(params, grads, buffers, [master], lr=1e-3, momentum=0.0, weight_decay=0.0, backend=backend)
    torch.testing.assert_close(master, torch.full((10,), 0.984, device=device))
    assert_same(params[0], master.bfloat16())


def test_nan_and_infinity(device, backend):
    params, grads, buffers, masters = state(MIXTURES["fp32"], device, [(40,)])
    grads[0][3], grads[0][20], params[0][30] = torch.nan, torch.inf, torch.nan
    check_step((params, grads, buffers, masters), {}, backend)
    assert params[0].isnan().sum() == 2


def test_parameters_that_require_gradients(device, backend):
    params, grads, buffers, masters = state(MIXTURES["fp32"], device)
    params = [p.requires_grad_() for p in params]
    sgd_step(params, grads, buffers, masters, lr=0.1, backend=backend)
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in params)


def test_of_nothing(device, backend):
    assert sgd_step([], [], [], lr=0.1, backend=backend) is None


@pytest.mark.parametrize("settings", [SETTINGS["paper"], SETTINGS["torch-nesterov"]], ids=["paper", "nesterov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["rate in fp32", "rate in fp64"])
@every_mixture
def test_a_learning_rate_in_a_tensor(mixture, dtype, settings, device, backend):
    given = state(mixture, device)
    copies = [[t.clone() for t in tensors] for tensors in given]
    lr = torch.tensor(0.03, dtype=dtype, device=device)
    for rate in (0.03, 0.01):
        lr.fill_(rate)
        sgd_step(*given, lr=lr, **settings, backend=backend)
        sgd_step(*copies, lr=lr.item(), **settings, backend=backend)
    for actual, expected in zip(given, copies, strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e.double(), what="after two steps")
    assert lr.item() == pytest.approx(0.01)


@pytest.mark.parametrize("which", ["params", "grads", "momentum", "masters"])
@pytest.mark.parametrize("mixture", ["fp32", "bf16_master"])
def test_arrays_that_are_not_aligned(mixture, which, device, backend):
    """Views into a bucket: one array is not aligned to 16 bytes, the others are."""
    given = state(MIXTURES[mixture], device, [(10,), (64, 50), (1003,)])
    index = ("params", "grads", "momentum", "masters").index(which)
    if not given[index]:
        pytest.skip("no masters")
    bucket = torch.cat([given[index][0].new_zeros(3), *[t.flatten() for t in given[index]]])
    views, start = [], 3
    for tensor in given[index]:
        views.append(bucket[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
    assert views[1].data_ptr() % 16
    arrays = list(given)
    arrays[index] = views
    check_step(tuple(arrays), {}, backend)
    assert_same(bucket[:3], torch.zeros_like(bucket[:3]))


def test_autograd_sees_the_change(device, backend):
    """A later backward pass may not use a saved tensor that the step changed."""
    w = random((4,), device=device).requires_grad_()
    loss = (w * w).sum()
    sgd_step([w], [torch.ones(4, device=device)], [torch.zeros(4, device=device)], lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_errors(choice):
    w, g, v = torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4)

    def call(w=w, g=g, v=v, masters=(), lr=0.1, **settings):
        return lambda: sgd_step([w], [g], [v], masters, lr=lr, **settings, backend=choice)

    raises(ValueError, r"2 params, but 1 grads", lambda: sgd_step([w, w], [g], [v, v], lr=0.1, backend=choice))
    raises(
        ValueError,
        r"1 params, but 0 momentum_buffers",
        lambda: sgd_step([w], [g], [], lr=0.1, backend=choice),
    )
    raises(ValueError, r"1 params, but 2 masters", call(masters=[w, w]))
    raises(TypeError, r"params\[0\] must be a Tensor, not float", call(w=0.0))
    raises(TypeError, r"grads\[0\] must be a Tensor, not NoneType", call(g=None))
    raises(TypeError, r"params\[0\] must be float32.* not torch.int64", call(w=w.long()))
    raises(ValueError, r"grads\[0\] is \[4, 3\], but params\[0\] is \[3, 4\]", call(g=g.t()))
    raises(ValueError, r"momentum_buffers\[0\] is \[12\], but params\[0\] is \[3, 4\]", call(v=v.flatten()))
    raises(TypeError, r"grads\[0\] is torch.float64, which does not go with a torch.float32", call(g=g.double()))
    raises(TypeError, r"momentum_buffers\[0\] is torch.bfloat16, which does not", call(v=v.bfloat16()))
    raises(TypeError, r"masters\[0\] is torch.float16, which does not go", call(masters=[w.half()]))
    raises(RuntimeError, r"grads\[0\] is on meta, but .* on cpu", call(g=g.to("meta")))
    raises(ValueError, r"lr must not be negative, not -0.1", call(lr=-0.1))
    raises(ValueError, r"lr must not be negative, not -0.1", call(lr=torch.tensor(-0.1, dtype=torch.float64)))
    raises(TypeError, r"lr must be one floating-point number, not torch.int64 \[\]", call(lr=torch.tensor(1)))
    raises(TypeError, r"lr must be one floating-point number, not .* \[2\]", call(lr=torch.zeros(2)))
    raises(RuntimeError, r"lr is on meta, but params\[0\] is on cpu", call(lr=torch.zeros((), device="meta")))
    raises(ValueError, r"momentum must not be negative, not -1", call(momentum=-1))
    raises(ValueError, r"weight_decay must not be negative, not -2", call(weight_decay=-2))
    raises(ValueError, r"rule must be 'paper' or 'torch', not 'adam'", call(rule="adam"))
    raises(ValueError, r"neither nesterov nor dampening", call(nesterov=True))
    raises(ValueError, r"neither nesterov nor dampening", call(dampening=0.1))
    raises(
        ValueError,
        r"nesterov needs a momentum and zero dampening",
        call(rule="torch", nesterov=True, momentum=0.0),
    )
    raises(ValueError, r"nesterov needs a momentum", call(rule="torch", nesterov=True, dampening=0.1))
    assert_same([w, g, v], [torch.zeros(3, 4), torch.ones(3, 4), torch.zeros(3, 4)], "after the refusals")


@pytest.mark.parametrize("capturing", [False, True], ids=["eager", "capturing"])
def test_a_captured_step_does_not_keep_a_number_for_lr(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with FakeTensorMode():
        on_gpu = torch.empty(3, device="cuda")
        assert _learning_rate(torch.empty((), device="cuda"), [on_gpu])[1].device == on_gpu.device
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        if capturing:
            raises(
                RuntimeError, r"a CUDA graph would keep lr=0.1: give lr as", lambda lr=lr: _learning_rate(lr, [on_gpu])
            )
        else:
            assert _learning_rate(lr, [on_gpu]) == (0.1, None)
    assert _learning_rate(0.1, [torch.empty(3)]) == (0.1, None)
