"""FusedSequential: the values and gradients of torch.nn.Sequential, computed by one op for each run of children."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fused import assert_same_function, conv, doubled_output, image, lrn, outcome, plain, pool, record_calls, stats
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from alexnet_kernels import fuse
from alexnet_kernels.nn import Dropout, FusedSequential, LocalResponseNorm, WithinMapResponseNorm


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the modules call, in order."""
    return record_calls(monkeypatch)


RUNS = {
    "conv-relu-lrn-pool": (lambda: [conv(), nn.ReLU(), lrn(), pool()], ["conv2d", "lrn_max_pool2d+relu"]),
    "conv-relu-pool": (lambda: [conv(), nn.ReLU(True), pool()], ["conv2d", "max_pool2d+relu"]),
    "conv-relu": (lambda: [conv(), nn.ReLU(True), conv(8), nn.ReLU()], ["conv2d_relu"] * 2),
    "conv-relu-lrn": (lambda: [conv(), nn.ReLU(), lrn()], ["conv2d_relu", "local_response_norm"]),
    "conv-lrn-pool-relu": (lambda: [conv(), lrn(), pool(), nn.ReLU(True)], ["conv2d", "lrn_max_pool2d"]),
    "conv-pool-relu": (lambda: [conv(), pool(), nn.ReLU(True)], ["conv2d", "max_pool2d+relu"]),
    "conv-relu-pool-lrn": (
        lambda: [conv(), nn.ReLU(), pool(), lrn()],
        ["conv2d", "max_pool2d+relu", "local_response_norm"],
    ),
    "conv-bn-relu-pool": (
        lambda: [conv(), stats(), nn.ReLU(True), pool()],
        ["conv2d", "batch_norm_relu", "max_pool2d"],
    ),
    "towers": (lambda: [LocalResponseNorm(3, 0.5, groups=3), pool()], ["lrn_max_pool2d"]),
    "pool-options": (
        lambda: [nn.MaxPool2d((3, 2), (2, 1), padding=1, ceil_mode=True)],
        ["max_pool2d"],
    ),
    "conv-options": (
        lambda: [
            nn.Conv2d(3, 8, (3, 5), (2, 1), (1, 0), bias=False),
            nn.ReLU(),
            conv(8, 8, groups=4),
            nn.ReLU(),
        ],
        ["conv2d_relu"] * 2,
    ),
    "linear-relu-dropout": (
        lambda: [nn.Flatten(), nn.Linear(507, 8), nn.ReLU(True), nn.Dropout(0.0), nn.Linear(8, 4), nn.ReLU()],
        ["linear_relu_dropout"] * 2,
    ),
    "linear": (
        lambda: [nn.Flatten(), nn.Linear(507, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 4)],
        ["linear"] * 2,
    ),
    "within-map": (
        lambda: [conv(), WithinMapResponseNorm(3), pool()],
        ["conv2d", "within_map_response_norm", "max_pool2d"],
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", RUNS)
def test_run_of_children_is_one_op(case: str, training: bool, calls: list[str]) -> None:
    children, ops = RUNS[case]
    fused = FusedSequential(*children()).double().train(training)
    assert_same_function(fused, plain(fused), image())
    calls.clear()
    fused(image())
    assert calls == ops


@pytest.mark.parametrize(
    "children",
    [
        lambda: [conv(dilation=2), nn.ReLU()],
        lambda: [conv(padding_mode="reflect"), nn.ReLU()],
        lambda: [conv(padding="same"), nn.ReLU()],
        lambda: [nn.MaxPool2d(3, 2, dilation=2)],
        lambda: [nn.MaxPool2d(17, 1, padding=8)],
        lambda: [nn.ConvTranspose2d(3, 4, 3), nn.SELU()],
        lambda: [nn.InstanceNorm2d(3), nn.AvgPool2d(3)],
        lambda: [nn.Dropout(0.0, inplace=True)],
    ],
    ids=[
        "dilation",
        "padding_mode",
        "same-padding",
        "pool-dilation",
        "large-pool",
        "transposed",
        "instance-norm",
        "inplace",
    ],
)
def test_what_the_ops_do_not_cover_runs_by_itself(children: Callable[[], list], calls: list[str]) -> None:
    fused = FusedSequential(*children()).double()
    assert_same_function(fused, plain(fused), image())
    assert calls == []


def test_pool_behind_an_uncovered_conv_still_takes_the_relu(calls: list[str]) -> None:
    fused = FusedSequential(conv(dilation=2), nn.ReLU(True), pool())
    assert_same_function(fused, plain(fused), image())
    assert calls == ["max_pool2d+relu"]


def test_lone_linear_elsewhere_than_on_the_cpu(calls: list[str]) -> None:
    assert FusedSequential(nn.Linear(3, 5)).to("meta")(torch.empty(2, 3, device="meta")).shape == (2, 5)
    assert calls == []


def test_return_indices() -> None:
    fused = FusedSequential(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, return_indices=True)).double()
    x = image()
    for a, b in zip(fused(x), plain(fused)(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("shape", "children"),
    [
        ((3, 13, 13), lambda: [conv(), nn.ReLU(True), pool(), conv(8), nn.ReLU()]),
        ((3, 13, 13), lambda: [nn.ReLU(), lrn(), pool()]),
        ((2, 3, 13), lambda: [nn.ReLU(), lrn()]),
        ((2, 3, 5, 5, 5), lambda: [lrn(), nn.ReLU()]),
        ((2, 4, 3), lambda: [nn.Linear(3, 5), nn.ReLU(True), nn.Dropout(0.0)]),
        ((2, 4, 3), lambda: [nn.Linear(3, 5)]),
        ((3,), lambda: [nn.Linear(3, 5)]),
    ],
    ids=["image", "image-lrn", "sequence", "volume", "tokens", "tokens-linear", "vector"],
)
def test_inputs_of_other_ranks(shape: tuple[int, ...], children: Callable[[], list]) -> None:
    fused = FusedSequential(*children())
    assert_same_function(fused, plain(fused), torch.randn(shape, dtype=torch.float64))


def test_integer_input(calls: list[str]) -> None:
    x = torch.arange(-49, 49).reshape(1, 2, 7, 7)
    assert torch.equal(FusedSequential(nn.ReLU(), pool())(x), F.max_pool2d(x.relu(), 3, 2))
    assert calls == []


class Doubled(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclass_of_a_known_type_runs_by_itself(calls: list[str]) -> None:
    fused = FusedSequential(conv(), Doubled(), pool())
    assert_same_function(fused, plain(fused), image())
    assert calls == ["conv2d", "max_pool2d"]


def negated_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (-args[0],)


def tripled_gradient(module: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple:
    return tuple(None if g is None else 3 * g for g in grad_input)


def tripled_output_gradient(module: nn.Module, grad_output: tuple) -> tuple:
    return tuple(3 * g for g in grad_output)


HOOKS = {
    "forward": lambda child: child.register_forward_hook(doubled_output),
    "forward-pre": lambda child: child.register_forward_pre_hook(negated_input),
    "backward": lambda child: child.register_full_backward_hook(tripled_gradient),
    "backward-pre": lambda child: child.register_full_backward_pre_hook(tripled_output_gradient),
}


@pytest.mark.parametrize("position", range(6), ids=["conv", "relu", "lrn", "pool", "conv2", "relu2"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_a_child_acts_as_in_sequential(kind: str, position: int) -> None:
    bare = FusedSequential(conv(), nn.ReLU(), lrn(), pool(), conv(8), nn.ReLU()).double()
    fused = copy.deepcopy(bare)
    x = image()
    handle = HOOKS[kind](fused[position])
    hooked = outcome(fused, x)
    assert_same_function(fused, plain(fused), x)
    assert any(not torch.allclose(a, b) for a, b in zip(hooked, outcome(bare, x), strict=True))
    handle.remove()
    assert_same_function(fused, bare, x)


@pytest.mark.parametrize("position", range(6), ids=["bn", "relu", "flatten", "linear", "relu2", "dropout"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_batch_norm_and_linear_children(kind: str, position: int) -> None:
    fused = FusedSequential(
        stats(), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 169, 6), nn.ReLU(), nn.Dropout(0.0)
    ).double()
    HOOKS[kind](fused[position])
    assert_same_function(fused, plain(fused), image(8))


def test_hook_counts_and_order() -> None:
    fused = FusedSequential(conv(), nn.ReLU(), lrn(), pool(), conv(8), nn.ReLU())
    seen: list[str] = []
    for name, child in fused.named_children():
        child.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    fused(image().float())
    assert seen == list("012345")


def test_hook_on_a_conv_sees_what_precedes_the_relu() -> None:
    fused = FusedSequential(conv(), nn.ReLU(), conv(8), nn.ReLU())
    seen: list[Tensor] = []
    fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = image().float()
    fused(x)
    torch.testing.assert_close(seen[0], fused[0](x))
    assert (seen[0] < 0).any()


def test_inplace_relu_shows_in_what_a_hook_kept() -> None:
    fused = FusedSequential(conv(), nn.ReLU(inplace=True), pool())
    seen: list[Tensor] = []
    fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        fused(image().float())
    assert (seen[0] >= 0).all()


def test_inplace_relu_at_the_start_overwrites_the_input(calls: list[str]) -> None:
    x = image()
    expected = F.max_pool2d(x.relu(), 3, 2)
    torch.testing.assert_close(FusedSequential(nn.ReLU(inplace=True), pool())(x), expected)
    assert (x >= 0).all()
    assert calls == ["max_pool2d"]


@pytest.mark.parametrize(
    "after", [lambda: nn.ReLU(True), lambda: nn.LeakyReLU(0.2, True), lambda: nn.Hardtanh(-0.5, 0.5, True)]
)
@pytest.mark.parametrize("before", [pool, lrn, lambda: nn.Sequential(lrn(), pool())], ids=["pool", "lrn", "both"])
def test_inplace_activation_after_an_op(before: Callable, after: Callable) -> None:
    first = before()
    fused = FusedSequential(*(first if isinstance(first, nn.Sequential) else [first]), after())
    assert_same_function(fused, plain(fused), image())


VIEWS: dict[str, Callable[[], list[nn.Module]]] = {
    "nothing": lambda: [],
    "identity": lambda: [nn.Identity()],
    "flatten": lambda: [nn.Flatten()],
    "two": lambda: [nn.Flatten(), nn.Unflatten(1, (-1, 1))],
    "nested": lambda: [nn.Sequential(nn.Identity(), nn.Flatten())],
    "evaluated": lambda: [nn.Dropout(0.5).eval()],
    "hooked": lambda: [viewing(nn.ReLU())],
}
HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv-relu-pool": lambda: [conv(), nn.ReLU(), pool()],
    "conv-relu-lrn-pool": lambda: [conv(), nn.ReLU(), lrn(), pool()],
    "conv": lambda: [conv()],
    "lrn": lambda: [conv(), lrn()],
    "bn": lambda: [conv(), stats()],
    "linear": lambda: [nn.Flatten(), nn.Linear(507, 8)],
    "linear-relu-dropout": lambda: [nn.Flatten(), nn.Linear(507, 8), nn.ReLU(), Dropout(0.0)],
}
WRITERS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.2, inplace=True),
    "dropout": lambda: nn.Dropout(0.0, inplace=True),
    "nested": lambda: nn.Sequential(nn.Identity(), nn.LeakyReLU(0.2, inplace=True)),
}


def viewing(module: nn.Module) -> nn.Module:
    """The module with a hook that makes it return its input."""
    module.register_forward_hook(lambda module, args, output: args[0].view_as(args[0]))
    return module


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("writer", WRITERS)
def test_child_that_writes_into_a_view_of_its_input(head: str, writer: str) -> None:
    """Where torch.nn.Sequential computes gradients, so does the fused one, the same; however they are nested."""
    for view in VIEWS.values():
        for wrap in (False, True):
            start = HEADS[head]()
            children = [nn.Sequential(*start) if wrap else start, *view(), WRITERS[writer]()]
            flat = [child for part in children for child in (part if isinstance(part, list) else [part])]
            module = nn.Sequential(*flat).double()
            try:
                outcome(module, image())
            except RuntimeError:
                continue
            assert_same_function(fuse(copy.deepcopy(module)), module, image())


@pytest.mark.parametrize("head", ["conv-relu-pool", "conv-relu-lrn-pool"])
def test_the_caller_may_write_into_the_result(head: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(*HEADS[head]())

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            y += 1
            y /= 2
            return y

    module = Residual().double()
    assert_same_function(fuse(copy.deepcopy(module)), module, image())


@pytest.fixture
def global_hook() -> Iterator[list[str]]:
    seen: list[str] = []

    def record(module: nn.Module, args: object, output: object) -> None:
        seen.append(type(module).__name__)

    handle = nn.modules.module.register_module_forward_hook(record)
    yield seen
    handle.remove()


def test_global_forward_hook_sees_every_child(global_hook: list[str], calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool())
    fused(image().float())
    assert global_hook == ["Conv2d", "ReLU", "MaxPool2d", "FusedSequential"]
    assert calls == []


@pytest.mark.parametrize(
    "register",
    [
        lambda seen: nn.modules.module.register_module_forward_pre_hook(lambda m, a: seen.append(m)),
        lambda seen: nn.modules.module.register_module_full_backward_hook(lambda m, i, o: seen.append(m)),
        lambda seen: nn.modules.module.register_module_full_backward_pre_hook(lambda m, o: seen.append(m)),
    ],
    ids=["forward-pre", "backward", "backward-pre"],
)
def test_other_global_hooks_see_every_child(register: Callable, calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool())
    seen: list[nn.Module] = []
    handle = register(seen)
    try:
        fused(image().float().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {type(module).__name__ for module in seen} == {"Conv2d", "ReLU", "MaxPool2d", "FusedSequential"}
    assert calls == []
    fused(image().float())
    assert calls == ["conv2d", "max_pool2d+relu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        pytest.param(lambda layer: weight_norm(layer), marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*")),
    ],
    ids=["weight_norm", "spectral_norm", "prune", "old-weight_norm"],
)
def test_reparametrized_child(change: Callable[[nn.Module], None], calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), conv(8), nn.ReLU()).eval()
    change(fused[0])
    x = image().float()
    torch.testing.assert_close(fused(x), plain(fused)(x))
    assert calls == ["conv2d_relu"]


def test_patched_forward(calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool())
    fused[1].forward = torch.tanh
    x = image().float()
    torch.testing.assert_close(fused(x), pool()(fused[0](x).tanh()))
    assert calls == ["conv2d", "max_pool2d"]
    del fused[1].forward
    calls.clear()
    torch.testing.assert_close(fused(x), pool()(fused[0](x).relu()))
    assert calls == ["conv2d", "max_pool2d+relu"]


def test_compiled_child_runs_by_itself(calls: list[str], fresh_dynamo: None) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool())
    fused[1].compile(backend="eager")
    x = image().float()
    torch.testing.assert_close(fused(x), pool()(fused[0](x).relu()))
    assert calls == ["conv2d", "max_pool2d"]


def test_replaced_children_count_at_once(calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool()).double()
    x = image()
    fused(x)
    for i, child in ((1, nn.Identity()), (1, nn.ReLU()), (2, nn.AvgPool2d(3, 2)), (0, conv()), (2, lrn())):
        fused[i] = child.double()
        assert_same_function(fused, plain(fused), x)
    fused.append(pool())
    fused.insert(0, nn.ReLU())
    assert_same_function(fused, plain(fused), x)
    del fused[2]
    assert_same_function(fused, plain(fused), x)
    fused[1].padding = (0, 0)
    fused[1].stride = (2, 2)
    assert_same_function(fused, plain(fused), x)


def test_container_operations() -> None:
    fused = FusedSequential(conv(), nn.ReLU(), pool(), conv(8), nn.ReLU())
    assert type(fused[:3]) is FusedSequential
    assert [type(child) for child in fused[1:3]] == [nn.ReLU, nn.MaxPool2d]
    assert list(FusedSequential(OrderedDict(a=conv(), b=nn.ReLU())).state_dict()) == ["a.weight", "a.bias"]
    assert FusedSequential()(7) == 7
    x = image().float()
    torch.testing.assert_close(fused[3:](fused[:3](x)), fused(x))
    pieces = nn.Sequential(nn.Sequential(*fused[:2]), nn.Sequential(*fused[2:]))
    torch.testing.assert_close(pieces(x), fused(x))


def test_missing_child_is_an_error_as_in_sequential() -> None:
    fused = FusedSequential(nn.ReLU())
    fused.add_module("1", None)
    with pytest.raises(TypeError, match="not callable"):
        fused(image())


def test_copies(calls: list[str]) -> None:
    fused = FusedSequential(conv(), nn.ReLU(), lrn(), pool(), Dropout(0.3, scale_at="inference")).eval()
    x = image().float()
    expected = fused(x)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(buffer, weights_only=False),
    ):
        calls.clear()
        assert torch.equal(other(x), expected)
        assert calls == ["conv2d", "lrn_max_pool2d+relu", "dropout"]


class TestBatchNorm:
    @pytest.mark.parametrize("momentum", [0.1, 0.7, None])
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    @pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
    def test_bookkeeping(self, momentum: float | None, affine: bool, tracked: bool, calls: list[str]) -> None:
        norm = nn.BatchNorm2d(8, momentum=momentum, affine=affine, track_running_stats=tracked).double()
        fused = FusedSequential(norm, nn.ReLU())
        other = plain(copy.deepcopy(fused))
        for training in (True, True, True, False, True, False):
            x = 3 * image(8) + 1
            fused.train(training)
            other.train(training)
            torch.testing.assert_close(fused(x), other(x))
            for (name, a), b in zip(fused.named_buffers(), other.buffers(), strict=True):
                torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
        assert calls == ["batch_norm_relu"] * 6

    def test_tracking_switched_off_later(self) -> None:
        fused = FusedSequential(stats(), nn.ReLU()).double()
        fused[0].track_running_stats = False
        assert_same_function(fused, plain(fused), image(8))
        assert_same_function(fused.eval(), plain(fused), image(8))

    def test_frozen_norm_in_a_training_container(self) -> None:
        fused = FusedSequential(conv(), stats(), nn.ReLU(), pool()).double()
        fused[1].eval()
        assert_same_function(fused, plain(fused), image())


class TestDropout:
    def test_merged_with_its_linear(self, calls: list[str]) -> None:
        fused = FusedSequential(nn.Linear(6, 4000), nn.ReLU(), nn.Dropout(0.25))
        x = torch.randn(3, 6)
        hidden = F.relu(fused[0](x))
        out = fused(x)
        assert calls == ["linear_relu_dropout"]
        kept = out != 0
        torch.testing.assert_close(out[kept], (hidden / 0.75)[kept])
        assert 0.70 < (kept.sum() / (hidden > 0).sum()).item() < 0.80
        assert not torch.equal(fused(x), out)
        torch.testing.assert_close(fused.eval()(x), hidden)

    @pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
    def test_scaling_at_inference(self, merged: bool) -> None:
        first = [nn.Linear(6, 4000), nn.ReLU()] if merged else [nn.Linear(6, 4000), nn.Hardtanh(0, 100)]
        fused = FusedSequential(*first, Dropout(0.25, scale_at="inference"))
        x = torch.randn(3, 6)
        hidden = F.relu(fused[0](x))
        out = fused(x)
        kept = out != 0
        torch.testing.assert_close(out[kept], hidden[kept])
        assert 0.70 < (kept.sum() / (hidden > 0).sum()).item() < 0.80
        torch.testing.assert_close(fused.eval()(x), 0.75 * hidden)

    def test_its_own_mode_counts(self) -> None:
        fused = FusedSequential(nn.Linear(6, 4000), nn.ReLU(), nn.Dropout(0.5)).eval()
        fused[2].train()
        assert (fused(torch.randn(3, 6)) == 0).float().mean() > 0.6

    def test_alone_in_evaluation_passes_its_input_on(self) -> None:
        x = torch.randn(3, 6)
        assert FusedSequential(nn.Dropout()).eval()(x) is x
        assert Dropout().eval()(x) is x

    def test_repeats_with_torch_seed(self) -> None:
        fused = FusedSequential(nn.Linear(6, 100), nn.ReLU(), nn.Dropout(), nn.Dropout())
        x = torch.randn(3, 6)
        torch.manual_seed(5)
        first = fused(x)
        torch.manual_seed(5)
        assert torch.equal(fused(x), first)

    def test_hook_splits_it_off(self, calls: list[str]) -> None:
        fused = FusedSequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.0))
        fused[2].register_forward_hook(doubled_output)
        x = torch.randn(3, 6)
        torch.testing.assert_close(fused(x), 2 * F.relu(fused[0](x)))
        assert len(calls) == 1

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r'scale_at must be "training" or "inference", got "?\'?test'):
            Dropout(0.5, scale_at="test")
        with pytest.raises(ValueError, match="probability"):
            Dropout(1.5)
