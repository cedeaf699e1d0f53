"""The captured training step against a loop by hand, bit for bit: plain, and by recorded operators run again."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_recorder import RecordedGraphs
from helpers import assert_same
from torch import Tensor, nn

from alexnet_kernels import AlexNet, optim, use_backend
from alexnet_kernels.backends import is_tuned, set_tuned
from alexnet_kernels.capture.graphs import CudaGraphs, DeviceUnusable
from alexnet_kernels.capture.step import _weights_of_linear_layers
from alexnet_kernels.training import CapturedForward, CapturedStep

Change = Callable[["Training"], object]


@pytest.fixture(autouse=True)
def native(threads: Callable[[int], None]) -> Iterator[None]:
    """On the CPU, the package's kernel of SGD reads the rate, which a GPU's does not. The tensors are small."""
    threads(1)
    with use_backend("native"):
        yield


class Training:
    """A small network, its optimizer, and steps on the same batches every time."""

    def __init__(self, by_hand: bool = False, make: Callable[[], nn.Module] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = make() if make else self.network()
        groups = [
            {"params": [p for p in self.model.parameters() if (p.dim() > 1) == weights], "lr": torch.tensor(0.1)}
            for weights in (True, False)
        ]
        kind = options.pop("optimizer", optim.SGD)
        self.optimizer = kind(groups, **options.pop("settings", {}))
        self.graphs = options.get("graphs")
        self.options = options
        self.by_hand = by_hand
        if not by_hand:
            self.step = CapturedStep(self.model, self.optimizer, **options)
        self.steps = 0
        self.results: list[Tensor] = []

    @staticmethod
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.Dropout(),
            nn.ReLU(), nn.Linear(16, 5),
        )  # fmt: skip

    def run(self, count: int, size: int = 6) -> Training:
        for _ in range(count):
            torch.manual_seed(100 + self.steps)
            images = torch.randint(256, (size, 6, 6, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            given = [images.float() / 255, torch.randint(5, (size,)), torch.rand(size, 3)]
            for group in self.optimizer.param_groups:
                group["lr"].fill_(0.1 / (1 + self.steps))
            torch.manual_seed(self.steps)
            self.results += self._loop(*given) if self.by_hand else self.step(*given)
            self.results += [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
            self.steps += 1
        return self

    def _loop(self, images: Tensor, labels: Tensor, shift: Tensor) -> list[Tensor]:
        self.optimizer.zero_grad()
        x = shifted(images, shift)
        parts = self.options.get("accumulate", 1)
        losses, logits = [], []
        for pixels, wanted in zip(x.chunk(parts), labels.chunk(parts), strict=True):
            logits.append(self.model(pixels))
            loss = F.cross_entropy(logits[-1], wanted) * (len(wanted) / len(labels))
            loss.backward()
            losses.append(loss.detach())
        if max_norm := self.options.get("max_norm"):
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        return [torch.stack(losses).sum() if parts > 1 else losses[0], torch.cat(logits).detach()]

    def state(self) -> list[Tensor]:
        state = [self.optimizer.state.get(param, {}) for param in self.model.parameters()]
        momentum = [values["momentum_buffer"] for values in state if values]
        return [*self.results, *self.model.state_dict().values(), *momentum]


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    return images + shift[:, :, None, None]


def linear_weights(training: Training) -> list[Tensor]:
    return [module.weight for module in training.model.modules() if isinstance(module, nn.Linear)]


def pair(**options: Any) -> tuple[Training, Training]:
    """The same training by hand and captured, with every Linear's weight updated early."""
    options = {"augment": shifted, "graphs": RecordedGraphs(), **options}
    captured = Training(**options)
    if captured.step.max_norm is None:
        captured.step = CapturedStep(
            captured.model, captured.optimizer, **captured.options, early=linear_weights(captured)
        )
    return Training(by_hand=True, **options), captured


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 4},
    "clipped": {"max_norm": 0.5},
    "accumulated and clipped": {"accumulate": 2, "max_norm": 0.5},
    "the paper's rule": {"settings": {"rule": "paper", "weight_decay": 0.1}},
    "torch's rule": {"settings": {"rule": "torch", "dampening": 0.1}},
    "torch's SGD": {"optimizer": torch.optim.SGD, "settings": {"momentum": 0.9, "foreach": False, "nesterov": True}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("recorded", [False, True], ids=["not captured", "captured"])
def test_equals_a_loop_by_hand(options: dict[str, Any], recorded: bool) -> None:
    if recorded and options.get("optimizer"):
        options = {**options, "graphs": None}  # reads its rate, as on a GPU it does not when fused
    elif not recorded:
        options = {**options, "graphs": None}
    hand, captured = pair(**options)
    for training in (hand, captured):
        training.run(6).run(1, size=4).run(3)
    assert_same(captured.state(), hand.state())
    if captured.graphs is not None:
        assert captured.graphs.events.count("capture") == 1
        assert captured.graphs.events.count("replay") == 6
        assert captured.step.captured == 1


def test_the_network_equals_a_loop_by_hand() -> None:
    def run(graphs: RecordedGraphs | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = AlexNet(10, "paper", width=0.04).to(memory_format=torch.channels_last)
        optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.01))
        step, results = CapturedStep(model, optimizer, graphs=graphs, dtype=torch.bfloat16), []
        for i in range(5):
            x = torch.randn(4, 3, 67, 67, generator=torch.Generator().manual_seed(i))
            results += step(x.contiguous(memory_format=torch.channels_last), torch.arange(4))
        return [*results, *model.state_dict().values(), *(v["momentum_buffer"] for v in optimizer.state.values())]

    graphs = RecordedGraphs()
    assert_same(run(graphs), run(None))
    assert graphs.events.count("replay") == 2


def test_linear_weights_are_updated_beside_the_rest_of_the_backward_pass() -> None:
    _, captured = pair(accumulate=3, warmup=1)
    captured.run(3)
    assert captured.graphs.events == [
        "warm",
        "fork",
        "fork",
        "join",
        "fork",
        "fork",
        "join",
        "capture",
        *["replay"] * 2,
    ]
    _, clipped = pair(max_norm=1.0, warmup=1)
    assert "fork" not in clipped.run(3).graphs.events


def add_group(training: Training) -> None:
    extra = nn.Parameter(torch.ones(2))
    training.optimizer.add_param_group({"params": [extra], "lr": torch.tensor(0.1)})


def reload(training: Training) -> None:
    training.model.load_state_dict(copy.deepcopy(training.model.state_dict()))
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def set_group(name: str, value: Any) -> Change:
    return lambda training: training.optimizer.param_groups[0].__setitem__(name, value)


def set_module(index: int, name: str, value: Any) -> Change:
    return lambda training: setattr(training.model[index], name, value)


class Doubled(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


CHANGES: dict[str, Change] = {
    "momentum": set_group("momentum", 0.5),
    "weight decay": set_group("weight_decay", 0.2),
    "a new tensor for the rate": set_group("lr", torch.tensor(0.3)),
    "a group": add_group,
    "dropout's p": set_module(5, "p", 0.9),
    "training mode of a layer": lambda training: training.model[1].eval(),
    "a layer": lambda training: training.model.__setitem__(6, nn.Sigmoid()),
    "a layer of the same attributes": lambda training: training.model.__setitem__(6, Doubled()),
    "a frozen weight": lambda training: training.model[0].weight.requires_grad_(False),
    "a weight at another address": set_module(0, "bias", nn.Parameter(torch.full((4,), 0.3), requires_grad=False)),
    "a weight's data": lambda training: setattr(training.model[4].weight, "data", training.model[4].weight.data * 2),
    "both states loaded": reload,
    "the precision of matrix products": lambda training: torch.set_float32_matmul_precision("high"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_is_captured_anew_after_a_change(change: Change) -> None:
    trainings = pair(warmup=2)
    precision = torch.get_float32_matmul_precision()
    try:
        for training in trainings:
            training.run(4)
            change(training)
            training.run(4)
            torch.set_float32_matmul_precision(precision)
    finally:
        torch.set_float32_matmul_precision(precision)
    hand, captured = trainings
    assert_same(captured.state(), hand.state())
    assert captured.graphs.events.count("capture") == 2
    assert captured.graphs.events.count("warm") < 5


def test_follows_the_precision_of_matrix_products_as_torch_recommends_to_set_it() -> None:
    """torch.get_float32_matmul_precision raises after that."""
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    hand, captured = pair(warmup=2)
    hand.run(8)
    try:
        captured.run(4)
        products.fp32_precision = "tf32"
        captured.run(4)
    finally:
        products.fp32_precision = before
    assert_same(captured.state(), hand.state())
    assert captured.graphs.events.count("capture") == 2


def test_follows_whether_the_table_of_choices_counts() -> None:
    hand, captured = pair(warmup=2)
    hand.run(8)
    before = is_tuned()
    try:
        captured.run(4)
        set_tuned(not before)
        captured.run(4)
    finally:
        set_tuned(before)
    assert_same(captured.state(), hand.state())
    assert captured.graphs.events.count("capture") == 2


def test_what_lasts_is_not_captured_anew() -> None:
    trainings = pair()
    for training in trainings:
        training.run(5)
        training.model.eval()
        training.model(torch.ones(2, 3, 6, 6)).sum().backward()
        training.model.train()
        saved = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(saved)
        training.run(3)
    hand, captured = trainings
    assert_same(captured.state(), hand.state())
    assert captured.graphs.events.count("capture") == 1


def test_results_are_new_tensors() -> None:
    captured = pair()[1].run(7)
    pointers = {tensor.data_ptr() for tensor in captured.results}
    assert len(pointers) == len(captured.results)


def hook_module(training: Training, calls: list[int]) -> Any:
    return training.model[4].register_forward_hook(lambda *arguments: calls.append(1))


def hook_backward(training: Training, calls: list[int]) -> Any:
    return training.model[4].register_full_backward_hook(lambda *arguments: calls.append(1))


def hook_weight(training: Training, calls: list[int]) -> Any:
    return training.model[4].weight.register_hook(lambda grad: calls.append(1))


def hook_accumulated(training: Training, calls: list[int]) -> Any:
    return training.model[4].weight.register_post_accumulate_grad_hook(lambda param: calls.append(1))


def hook_optimizer(training: Training, calls: list[int]) -> Any:
    return training.optimizer.register_step_post_hook(lambda *arguments: calls.append(1))


def hook_every_module(training: Training, calls: list[int]) -> Any:
    def called(module: nn.Module, *arguments: object) -> None:
        if module is training.model:
            calls.append(1)

    return nn.modules.module.register_module_forward_hook(called)


HOOKS = [hook_module, hook_backward, hook_weight, hook_accumulated, hook_optimizer, hook_every_module]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_run_in_every_step(register: Callable[[Training, list[int]], Any]) -> None:
    said: list[str] = []
    hand, captured = pair(notify=said.append)
    calls: list[int] = []
    captured.run(5)
    hook = register(captured, calls)
    captured.run(6)
    hook.remove()
    captured.run(5)
    assert len(calls) == 6
    assert len(said) == 1
    assert "hooks" in said[0]
    assert captured.graphs.events.count("capture") == 2
    hand.run(16)
    assert_same(captured.state(), hand.state())


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum().item() > 1e9 else x


def reading_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 5), Reading())


def test_a_capture_that_fails_leaves_the_plain_loop() -> None:
    said: list[str] = []
    hand, captured = pair(make=reading_network, notify=said.append)
    for training in (hand, captured):
        training.run(8)
    assert_same(captured.state(), hand.state())
    assert said == [
        "the training step is not captured as a CUDA graph, each call launches its kernels: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]
    assert captured.graphs.events.count("warm") == 3
    strict = pair(make=reading_network, capture=True)[1].run(3)
    before = [tensor.clone() for tensor in strict.state()]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        strict.run(1)
    assert_same(strict.state(), before)
    assert all(param.grad is None for param in strict.model.parameters())


def test_a_step_that_waits_for_the_device_is_not_captured() -> None:
    hand, captured = pair()
    captured.graphs.waits = "net.py:7"
    hand.run(5)
    with pytest.warns(RuntimeWarning, match=r"not captured as a CUDA graph.* waits for the device, at net\.py:7"):
        captured.run(5)
    assert_same(captured.state(), hand.state())
    assert "capture" not in captured.graphs.events


class Counting(optim.SGD):
    """Keeps a number in its state, as a graph can't."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for values in self.state.values():
            values["steps"] = values.get("steps", 0) + 1


def test_a_state_that_python_counts_is_not_captured() -> None:
    said: list[str] = []
    hand, captured = pair(optimizer=Counting, max_norm=9.0, notify=said.append)
    assert_same(captured.run(8).state(), hand.run(8).state())
    assert {values["steps"] for values in captured.optimizer.state.values()} == {8}
    assert [text.partition("kernels: ")[2] for text in said] == [
        "steps of the optimizer's state changes in the call, which a replay would not repeat"
    ]


def test_what_changes_between_all_calls_is_said_once() -> None:
    said: list[str] = []
    hand, captured = pair(notify=said.append)
    for training in (hand, captured):
        for i in range(22):
            training.model[5].p = 0.01 * i
            training.run(1)
    assert_same(captured.state(), hand.state())
    assert said == ["the training step has run 20 times without a CUDA graph: p of 5 changes between calls"]


def test_a_rate_that_is_a_number_is_not_captured() -> None:
    model = nn.Linear(4, 3)
    step = CapturedStep(model, optim.SGD(model.parameters(), lr=0.5), graphs=RecordedGraphs())
    with pytest.warns(RuntimeWarning, match=r"the lr of the optimizer's group 0 is on the CPU.*torch\.tensor\(0\.5"):
        step(torch.ones(2, 4), torch.tensor([0, 1]))
    strict = CapturedStep(model, optim.SGD(model.parameters(), lr=0.5), graphs=RecordedGraphs(), capture=True)
    with pytest.raises(RuntimeError, match="the training step can't be captured: the lr of"):
        strict(torch.ones(2, 4), torch.tensor([0, 1]))


def test_a_call_that_raises_does_not_count_as_a_plain_one() -> None:
    """What it left undone, such as the optimizer's state, would be done in the capture."""
    calls: list[int] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("in the loss")
        return F.cross_entropy(logits, labels)

    model = nn.Linear(4, 3)
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    step = CapturedStep(model, optimizer, loss, graphs=RecordedGraphs(), warmup=1, capture=True)
    with pytest.raises(ValueError, match="in the loss"):
        step(torch.ones(2, 4), torch.tensor([0, 1]))
    for _ in range(3):
        step(torch.ones(2, 4), torch.tensor([0, 1]))
    assert step.captured == 1


def test_a_device_that_a_capture_made_unusable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: RecordedGraphs, call: object) -> None:
        raise DeviceUnusable("unusable in this process")

    monkeypatch.setattr(RecordedGraphs, "capture", capture)
    captured = pair()[1].run(3)
    with pytest.raises(DeviceUnusable, match="unusable in this process"):
        captured.run(1)


def test_an_input_that_requires_a_gradient_is_not_captured() -> None:
    _, captured = pair()
    images, labels, shift = torch.ones(2, 3, 6, 6, requires_grad=True), torch.tensor([0, 1]), torch.ones(2, 3)
    with pytest.warns(RuntimeWarning, match="an input requires a gradient"):
        captured.step(images, labels, shift)
    assert images.grad is not None


def test_keeps_a_small_number_of_graphs() -> None:
    said: list[str] = []
    hand, captured = pair(warmup=1, most=2, notify=said.append)
    for training in (hand, captured):
        for size in (6, 4, 5, 6, 4, 5, 6, 6):
            training.run(3, size)
    assert_same(captured.state(), hand.state())
    assert captured.step.captured == 2
    assert len(said) == 1
    assert "keeps 2 CUDA graphs" in said[0]
    captured.step.reset()
    assert captured.step.captured == 0


def test_a_model_that_is_split_is_not_captured() -> None:
    model = nn.Linear(4, 3)
    step = CapturedStep(
        nn.DataParallel(model), optim.SGD(model.parameters(), lr=torch.tensor(0.1)), graphs=RecordedGraphs()
    )
    with pytest.warns(RuntimeWarning, match="the model is split over processes or devices"):
        step(torch.ones(2, 4), torch.tensor([0, 1]))


def test_arguments() -> None:
    model = nn.Linear(4, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    refused: dict[str, dict[str, Any]] = {
        "capture=True needs a CUDA device, the parameters are on cpu": {"capture": True},
        "accumulate must be at least 1, not 0": {"accumulate": 0},
        "max_norm must be positive, not -1": {"max_norm": -1.0},
        "torch.bfloat16 or None, not torch.float16: float16 needs torch.amp.GradScaler": {"dtype": torch.float16},
        "warmup must be at least 1, not 0": {"warmup": 0},
        "most must be at least 1, not 0": {"most": 0},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            CapturedStep(model, optimizer, **options)
    with pytest.raises(ValueError, match=r"early needs an optimizer that steps each parameter by itself .*, not LBFGS"):
        CapturedStep(model, torch.optim.LBFGS(model.parameters()), early=[model.weight])
    with pytest.raises(ValueError, match="the model has no parameter or buffer"):
        CapturedForward(nn.ReLU())
    step = CapturedStep(model, optimizer)
    with pytest.raises(ValueError, match="as many labels as images, at least one: 0 for 2"):
        step(torch.ones(2, 4), torch.empty(0))


def test_the_forward_pass_follows_the_weights() -> None:
    model = Training.network().eval()
    graphs = RecordedGraphs()
    forward = CapturedForward(model, graphs=graphs)
    kept = []
    for i in range(6):
        x = torch.randn(3, 3, 6, 6)
        with torch.no_grad():
            model[0].bias.fill_(i)
            expected = model(x)
        kept.append((forward(x), expected))
        assert not kept[-1][0].requires_grad
    forward(torch.randn(1, 3, 6, 6))
    for actual, expected in kept:
        assert_same(actual, expected)
    assert graphs.events == ["warm", "warm", "capture", *["replay"] * 4, "warm"]
    with torch.inference_mode():
        for _ in range(3):
            forward(x)
    model[6] = nn.Sigmoid()
    x = torch.randn(3, 3, 6, 6)
    for _ in range(3):
        assert_same(forward(x), model(x).detach())
    assert graphs.events.count("capture") == 3


def test_a_value_that_is_not_a_number_does_not_prevent_a_capture() -> None:
    def make() -> nn.Module:
        model = Training.network()
        model.best = float("nan")  # type: ignore[assignment]
        return model

    hand, captured = pair(make=make)
    assert_same(captured.run(6).state(), hand.run(6).state())
    assert captured.step.captured == 1


class Marking(optim.SGD):
    """Keeps a flag of every parameter in its state."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for values in self.state.values():
            values["started"] = True


def test_a_state_that_python_keeps_is_captured() -> None:
    hand, captured = pair(optimizer=Marking, max_norm=9.0)
    assert_same(captured.run(6).state(), hand.run(6).state())
    assert captured.step.captured == 1


def test_gradients_of_parameters_that_the_optimizer_does_not_have() -> None:
    model = nn.Linear(4, 3)
    optimizer = optim.SGD([model.weight], lr=torch.tensor(0.1))
    step = CapturedStep(model, optimizer, graphs=RecordedGraphs())
    for _ in range(6):
        model.zero_grad()
        step(torch.ones(2, 4), torch.tensor([0, 1]))
        assert model.bias.grad is not None
    assert step.captured == 1


def test_weights_that_may_be_updated_early() -> None:
    plain, computed, frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False).requires_grad_(False)
    nn.utils.parametrizations.weight_norm(computed)
    assert _weights_of_linear_layers(nn.Sequential(plain, computed, frozen)) == [plain.weight, frozen.weight]
    assert _weights_of_linear_layers(nn.Sequential(plain, nn.Linear(4, 4, device="meta"))) == []


def test_the_memory_of_a_failed_capture_is_free_for_the_plain_step() -> None:
    kept: list[weakref.ref[Tensor]] = []
    left: list[bool] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            left.append(any(ref() is not None for ref in kept))
            x = x * 2
            kept.append(weakref.ref(x))
            if len(kept) == 4:
                raise RuntimeError("in the capture")
            return x

    model = nn.Sequential(nn.Linear(4, 3), Probe())
    step = CapturedStep(
        model, optim.SGD(model.parameters(), lr=torch.tensor(0.1)), graphs=RecordedGraphs(), notify=lambda text: None
    )
    for _ in range(5):
        step(torch.ones(2, 4), torch.tensor([0, 1]))
    assert left == [False] * 6


class FakeCuda:
    """What `CudaGraphs` calls of torch, with the rule of its pools: without a graph, one that has tensors is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools: dict[int, list[Any]] = {}
        self.underway: list[int] = []
        self.fails = False
        fake = self

        class Graph:
            def capture_begin(self, pool: int, capture_error_mode: str) -> None:
                users = fake.pools.setdefault(pool, [])
                assert not users or any(ref() is not None for ref in users), "the pool is not live"
                users.append(weakref.ref(self))
                fake.underway.append(pool)

            def capture_end(self) -> None:
                if fake.fails:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.underway.pop()

            def replay(self) -> None:
                pass

        handles = itertools.count()
        block = SimpleNamespace(wait_stream=lambda stream: None)
        replaced = {
            "CUDAGraph": Graph,
            "Stream": lambda device: block,
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
            "graph_pool_handle": lambda: next(handles),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "default_generators": [SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)],
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(CudaGraphs, "_usable", lambda graphs: True)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: None, raising=False)

    def end(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)


def test_a_pool_whose_graphs_are_gone_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    graphs = CudaGraphs(torch.device("cuda", 0))
    first, _ = graphs.capture(lambda: None)
    second, _ = graphs.capture(lambda: None)
    assert len(cuda.pools) == 1
    del first, second
    graphs.capture(lambda: None)
    assert len(cuda.pools) == 2


def test_a_capture_that_can_not_be_ended_leaves_no_allocations_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.fails = True
    graphs = CudaGraphs(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="due to a previous error"):
        graphs.capture(lambda: None)
    assert cuda.underway == []
    cuda.fails = False

    def raises() -> None:
        raise ValueError("in the call")

    with pytest.raises(ValueError, match="in the call"):
        graphs.capture(raises)
    assert cuda.underway == []
