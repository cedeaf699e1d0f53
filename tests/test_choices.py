"""What backend "auto" runs by the tables of choices, and the implementations of a convolution by name."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from platforms import BACKENDS, emulation
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_kernels import backends, use_backend
from alexnet_kernels._dispatch import choices, tuned
from alexnet_kernels._dispatch.kinds import FAR, Kind, Row, distance, names_of, nearest
from alexnet_kernels.bench import tuning
from alexnet_kernels.ops import conv2d_by_name, conv2d_relu, max_pool2d
from alexnet_kernels.ops.conv2d_relu import FORWARD_ONLY, conv2d_relu_by

CPU = torch.device("cpu")
LAST = torch.channels_last
EMULATED = pytest.mark.skipif(
    emulation is None or "triton" not in BACKENDS["cpu"], reason="needs pybind11, Triton and a machine without a GPU"
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    choices.forget()
    yield
    choices.set_tuned(False)


def user_table(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> None:
    monkeypatch.setattr(tuned, "rows_of", lambda device: rows)
    choices.set_tuned(True)


class Recorded(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


def rearranges(call: Any) -> bool:
    with Recorded() as recorded:
        call()
    return "alexnet_kernels::space_to_depth" in recorded.names


def strided(dtype: torch.dtype, images: int = 6) -> tuple[torch.Tensor, torch.Tensor, None, int, int]:
    x = torch.randn(images, 3, 39, 39).to(dtype).contiguous(memory_format=LAST)
    return x, torch.randn(16, 3, 11, 11).to(dtype), None, 4, 2


def kind_of_strided(dtype: str, device: str = "cpu", images: int = 6) -> Kind:
    return choices.kind_of("conv2d_relu", "forward", device, getattr(torch, dtype), True,
                           (16, 3, 11, 11, 4, 4, 1, images * 81, 1))  # fmt: skip


def of_h100(layer: tuning.Geometry, batch: int, epilogue: bool, **changes: Any) -> Kind:
    rows = batch * layer.output(0) * layer.output(1)
    shape = (layer.filters, layer.of_group, *layer.kernel, *layer.stride, layer.groups, rows, int(epilogue))
    kind = choices.kind_of("conv2d_relu", "forward", "9.0", torch.bfloat16, True, shape)
    return kind._replace(**changes)


class TestKinds:
    KIND = Kind("conv2d_relu", "forward", "9.0", "bfloat16", "channels_last", (128, 64, 3, 3, 1, 1, 1, 1 << 14, 1))

    def other(self, **sizes: int) -> Kind:
        return self.KIND._replace(shape=tuple((self.KIND.sizes | sizes).values()))

    @pytest.mark.parametrize(
        ("sizes", "apart"),
        [
            ({}, 0.0),
            ({"filters": 256}, 1.0),
            ({"channels": 16}, 2.0),
            ({"rows": 1 << 18}, 2.0),
            ({"rows": 1 << 12, "filters": 64}, 2.0),
            ({"kernel_height": 6, "kernel_width": 6}, 2.0),
            ({"stride_width": 2}, None),
            ({"groups": 2}, None),
            ({"epilogue": 0}, None),
        ],
    )
    def test_distance(self, sizes: dict[str, int], apart: float | None) -> None:
        assert distance(self.KIND, self.other(**sizes)) == apart

    @pytest.mark.parametrize("field", ["direction", "device", "dtype", "format"])
    def test_all_else_must_agree(self, field: str) -> None:
        assert distance(self.KIND, self.KIND._replace(**{field: "another"})) is None

    def test_the_nearest_row_counts_unless_it_is_far(self) -> None:
        rows = [Row(self.other(filters=filters), name, "measured") for filters, name in ((256, "far"), (160, "near"))]
        found = nearest(self.KIND, rows)
        assert found is not None
        assert found.name == "near"
        assert nearest(self.other(channels=64 << int(FAR + 1)), rows) is None

    def test_groups_of_any_number_are_alike(self) -> None:
        assert distance(self.other(groups=2), self.other(groups=4)) == 0


class TestCommitted:
    def test_rows_name_implementations_and_are_kinds_of_their_own(self) -> None:
        kinds = [row.kind for row in choices.COMMITTED]
        assert len(set(kinds)) == len(kinds)
        for row in choices.COMMITTED:
            assert row.name in names_of(row.kind.op, row.kind.direction, row.kind.device)
            assert row.kind == choices.kind_of(*row.kind[:3], getattr(torch, row.kind.dtype), True, (
                row.kind.sizes["filters"] * row.kind.sizes["groups"], *row.kind.shape[1:]))  # fmt: skip
            # The choice is the fastest of what was measured.
            assert min(row.times, key=lambda name: row.times[name]["forward"]) == row.name

    def test_no_row_chooses_a_kernel_that_no_gpu_has_run(self) -> None:
        assert {row.name for row in choices.COMMITTED} <= {"library", "triton"}

    @pytest.mark.parametrize("batch", [32, 128, 1024])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_of_alexnet_on_an_h100(self, batch: int, dtype: str) -> None:
        layers = tuning.convolutions("paper")
        found = {
            name: choices.committed_choice(of_h100(layer, batch, True, dtype=dtype), batch)
            for name, layer in layers.items()
        }
        assert list(found.values()) == ["space_to_depth", "triton", "library", "triton", "triton"]
        inner = layers["conv1"].rearranged
        assert choices.committed_choice(of_h100(inner, batch, True, dtype=dtype), batch) == "triton"
        assert choices.committed_choice(of_h100(inner, batch, False, dtype=dtype), batch) == "library"

    def test_elsewhere_the_rule_holds(self) -> None:
        layers = tuning.convolutions("paper")
        for changes in ({"device": "8.0"}, {"format": "contiguous"}, {"dtype": "float32"}):
            kind = of_h100(layers["conv2"], 128, True, **changes)
            assert choices.committed_choice(kind, 128) == "library"
        large = tuning.Geometry(2048, 7, 7, 2048, 2048, (1, 1), (1, 1), (0, 0), 1)
        assert choices.committed_choice(of_h100(large, 128, True), 128) == "library"
        for direction in ("backward_input", "backward_weight"):
            assert choices.committed_choice(of_h100(layers["conv2"], 128, True, direction=direction), 128) == "library"


class TestOnTheCpu:
    @pytest.mark.parametrize("images", [5, 6])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_without_a_table_the_rule_holds(self, dtype: str, images: int) -> None:
        gains = rearranges(lambda: conv2d_relu(*strided(getattr(torch, dtype), images)))
        assert gains == (dtype == "bfloat16" and images >= 6)

    @pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "library"), ("float32", "space_to_depth")])
    def test_the_users_table_rules_auto_alone(self, dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = strided(getattr(torch, dtype))
        user_table(monkeypatch, Row(kind_of_strided(dtype), name, "tuned"))
        expected = F.conv2d(*arguments).relu()
        assert rearranges(lambda: conv2d_relu(*arguments)) == (name == "space_to_depth")
        torch.testing.assert_close(conv2d_relu(*arguments), expected, rtol=2e-2, atol=2e-1)
        with use_backend("cpu"):
            assert rearranges(lambda: conv2d_relu(*arguments)) == (dtype == "bfloat16")
        assert not rearranges(lambda: conv2d_relu(*arguments, backend="native"))
        choices.set_tuned(False)
        assert rearranges(lambda: conv2d_relu(*arguments)) == (dtype == "bfloat16")

    def test_a_near_row_does_not_rearrange_what_cannot_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        user_table(monkeypatch, Row(kind_of_strided("bfloat16"), "space_to_depth", "tuned"))
        x, w, *_ = strided(torch.bfloat16)
        wide = torch.cat([x, x], 1).contiguous(memory_format=LAST)
        assert not rearranges(lambda: conv2d_relu(wide, torch.cat([w, w], 1), None, 4, 2))

    def test_the_choice_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = []
        find = choices._find_directions
        monkeypatch.setattr(choices, "_find_directions", lambda *args: made.append(args) or find(*args))
        arguments = strided(torch.bfloat16)
        for _ in range(3):
            conv2d_relu(*arguments)
        assert len(made) == 1
        conv2d_relu(*strided(torch.bfloat16, 7))
        assert len(made) == 2

    @pytest.mark.parametrize("name", ["library", "space_to_depth"])
    def test_compiled_graphs_keep_the_choice(self, name: str, fresh_dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
        user_table(monkeypatch, Row(kind_of_strided("bfloat16"), name, "tuned"))
        found: list[bool] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.append(any("space_to_depth" in str(node.target) for node in graph.graph.nodes))
            return graph

        call = torch.compile(lambda x, w: conv2d_relu(x, w, None, 4, 2), fullgraph=True, backend=backend, dynamic=False)
        x, w, *_ = strided(torch.bfloat16)
        torch.testing.assert_close(call(x, w), conv2d_relu(x, w, None, 4, 2))
        assert found == [name == "space_to_depth"]

    def test_one_graph_serves_any_batch(self, fresh_dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
        user_table(monkeypatch, Row(kind_of_strided("bfloat16"), "library", "tuned"))
        graphs = []
        call = torch.compile(
            lambda x, w: conv2d_relu(x, w, None, 4, 2),
            fullgraph=True,
            backend=lambda graph, inputs: graphs.append(1) or graph,
        )
        _, w, *_ = strided(torch.bfloat16)
        for images in (4, 8, 32):
            x = strided(torch.bfloat16, images)[0]
            torch._dynamo.mark_dynamic(x, 0)
            call(x, w)
        assert len(graphs) == 1

    def test_names(self) -> None:
        arguments = strided(torch.float32)
        expected = F.conv2d(*arguments).relu()
        for name, rearranged in (("library", False), ("space_to_depth", True), ("split", False)):
            assert rearranges(lambda name=name: conv2d_relu_by(name, *arguments)) == rearranged
            torch.testing.assert_close(conv2d_relu_by(name, *arguments), expected, rtol=1e-4, atol=1e-3)
        with pytest.raises(ValueError, match="no implementation 'fast': one of 'library', 'own'"):
            conv2d_relu_by("fast", *arguments)
        with pytest.raises(ValueError, match="backend 'native' has the implementation 'library' only"):
            conv2d_relu_by("split", *arguments, backend="native")
        with pytest.raises(ValueError, match="space_to_depth takes at most 4 channels"):
            conv2d_relu_by("space_to_depth", arguments[0], arguments[1], None, 1)


@pytest.mark.parametrize("name", ["library", "split", "triton"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_by_name(name: str, groups: int) -> None:
    if name == "triton":
        if "triton" not in BACKENDS["cpu"]:
            pytest.skip("needs Triton's interpreter")
        backends.select("conv2d_relu", torch.ones(1), "triton")
    x = torch.randn(2, 4 * groups, 7, 6).contiguous(memory_format=LAST).requires_grad_()
    w = torch.randn(6 * groups, 4, 3, 3, requires_grad=True)
    b = torch.randn(6 * groups, requires_grad=True)
    out = F.conv2d(x, w, b, 2, 1, 1, groups).relu()
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, [x, w, b], grad)
    with torch.no_grad():
        operands = (grad, out, x, w, [2, 2], [1, 1], groups)
        of_input = conv2d_by_name.gradient_of_input(name, *operands)
        of_weight, of_bias = conv2d_by_name.gradient_of_weight(name, *operands)
        alone, nothing = conv2d_by_name.gradient_of_weight(name, *operands, with_bias=False)
    assert nothing is None
    assert of_input.is_contiguous(memory_format=LAST)
    for actual, wanted in zip((of_input, of_weight, of_bias, alone), (*expected, expected[1]), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_an_unknown_name_computes_no_gradient() -> None:
    x = torch.ones(1, 1, 3, 3)
    for function in (conv2d_by_name.gradient_of_input, conv2d_by_name.gradient_of_weight):
        with pytest.raises(ValueError, match="'cuda' computes no gradient: one of 'library', 'own', 'mma'"):
            function("cuda", x, None, x, x, [1, 1], [0, 0], 1)


@contextmanager
def emulated_auto() -> Iterator[None]:
    """Backend "auto" takes the emulation of CUDA."""
    with emulation.emulated():
        cuda, cpu = backends.registered("cuda"), backends.registered("cpu")
        with backends.substituted(replace(cpu, devices=())), backends.substituted(replace(cuda, automatic=None)):
            yield


@EMULATED
class TestOnAGpu:
    """With the emulation for CUDA, and Triton's interpreter."""

    SHAPE = (16, 4, 3, 3, 1, 1, 2, 4 * 42, 1)

    @pytest.fixture(autouse=True)
    def auto(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        module = sys.modules["alexnet_kernels.ops.conv2d_relu"]

        def serves(name: str, op: str, tensor: torch.Tensor) -> bool:
            return backends.select(op, tensor, name) == name

        monkeypatch.setattr(module, "serves", serves)
        monkeypatch.setattr(backends, "serves", serves)
        monkeypatch.setattr(choices, "device_name", lambda device: "9.0")
        with emulated_auto():
            yield

    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        x = torch.randn(4, 8, 7, 6).to(dtype).contiguous(memory_format=LAST)
        return {
            "input": x.requires_grad_(),
            "weight": (torch.randn(16, 4, 3, 3) / 6).to(dtype).requires_grad_(),
            "bias": torch.randn(16).to(dtype).requires_grad_(),
            "padding": 1,
            "groups": 2,
        }

    def choosing(self, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str = "float32") -> None:
        kind = choices.kind_of("conv2d_relu", "forward", "9.0", getattr(torch, dtype), True, self.SHAPE)
        monkeypatch.setattr(choices, "COMMITTED", (Row(kind, name, "measured"),))
        choices.forget()

    @pytest.mark.parametrize("epilogue", [False, True])
    def test_triton_forward_and_the_librarys_backward(self, epilogue: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choosing(monkeypatch, "triton")
        given = self.given()
        leaves = [given[name] for name in ("input", "weight", "bias")]
        with Recorded() as recorded:
            out = conv2d_relu(**given)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
        assert "alexnet_kernels_triton::conv2d_relu" in recorded.names
        assert not any("conv2d_relu_backward" in name for name in recorded.names)
        assert "aten::convolution_backward" in recorded.names
        assert torch.equal(out, conv2d_relu(**given, backend="triton"))
        wanted = torch.autograd.grad(
            conv2d_relu(**given, backend="native"), leaves, torch.ones_like(out), create_graph=True
        )
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        twice = [torch.autograd.grad(found[0].square().sum(), leaves[1])[0] for found in (grads, wanted)]
        torch.testing.assert_close(*twice, rtol=1e-4, atol=1e-4)

    def test_a_call_of_another_kind_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choosing(monkeypatch, "triton")
        given = self.given()
        for changes in ({"relu": False, "bias": None}, {"stride": 2}, {"backend": "cuda"}):
            with Recorded() as recorded:
                conv2d_relu(**{**given, **changes})
            assert not any(name.startswith("alexnet_kernels_triton") for name in recorded.names)

    def test_compiles(self, fresh_dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choosing(monkeypatch, "triton")
        given = self.given()
        leaves = [given[name] for name in ("input", "weight", "bias")]
        call = torch.compile(lambda *x: conv2d_relu(*x, padding=1, groups=2), fullgraph=True, backend="aot_eager")
        out, expected = call(*leaves), conv2d_relu(**given)
        assert torch.equal(out, expected)
        for one, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (out, expected)), strict=True):
            torch.testing.assert_close(one, other)

    def test_the_operator_keeps_its_contract(self) -> None:
        given = self.given()
        backends.select("conv2d_relu", given["input"], "triton")
        operands = (*(given[name] for name in ("input", "weight", "bias")), [1, 1], [1, 1], 2, True, FORWARD_ONLY)
        torch.library.opcheck(torch.ops.alexnet_kernels_triton.conv2d_relu.default, operands)

    @pytest.mark.parametrize("name", ["own", "mma", "wgmma"])
    def test_gradients_by_the_packages_kernels(self, name: str) -> None:
        x = torch.randn(2, 16, 7, 6).bfloat16().contiguous(memory_format=LAST)
        w = (torch.randn(32, 8, 3, 3) / 8).bfloat16()
        grad = torch.randn(2, 32, 7, 6).bfloat16().contiguous(memory_format=LAST)
        operands = (grad, None, x, w, [1, 1], [1, 1], 2)
        found = (
            conv2d_by_name.gradient_of_input(name, *operands),
            *conv2d_by_name.gradient_of_weight(name, *operands),
        )
        wide = (grad.double(), None, x.double(), w.double(), *operands[4:])
        exact = (
            conv2d_by_name.gradient_of_input("library", *wide),
            *conv2d_by_name.gradient_of_weight("library", *wide),
        )
        for actual, expected in zip(found, exact, strict=True):
            largest = expected.abs().max().item()
            torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2 * largest)

    @pytest.mark.parametrize("forward", ["library", "triton"])
    @pytest.mark.parametrize(
        ("name", "operator", "calls"),
        [
            ("library", "aten::convolution_backward", 1),
            ("split", "aten::convolution_backward", 4),
            ("triton", "alexnet_kernels_triton::conv2d_relu_backward_", 2),
            ("mma", "alexnet_kernels_emulated::conv2d_relu_backward_", 2),
        ],
    )
    def test_gradients_follow_the_users_table(self, name, operator, calls, forward, monkeypatch) -> None:
        given = self.given(torch.bfloat16)
        kinds = [
            choices.kind_of("conv2d_relu", direction, "9.0", torch.bfloat16, True, self.SHAPE)
            for direction in ("forward", "backward_input", "backward_weight")
        ]
        user_table(
            monkeypatch, *(Row(kind, each, "tuned") for kind, each in zip(kinds, (forward, name, name), strict=True))
        )
        leaves = [given[key] for key in ("input", "weight", "bias")]
        out = conv2d_relu(**given)
        with Recorded() as recorded:
            found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert sum(each.startswith(operator) for each in recorded.names) == calls
        masked = (out > 0).to(out.dtype)
        expected = torch.ops.aten.convolution_backward(
            masked, *leaves[:2], [16], [1, 1], [1, 1], [1, 1], False, [0, 0], 2, [True] * 3
        )
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())

    @pytest.mark.parametrize("name", ["split", "own", "mma", "wgmma"])
    def test_other_names(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choosing(monkeypatch, name, "bfloat16")
        given = self.given(torch.bfloat16)
        with torch.no_grad():
            exact = F.conv2d(*(given[key].double() for key in ("input", "weight", "bias")), 1, 1, 1, 2).relu()
            with Recorded() as recorded:
                out = conv2d_relu(**given)
        assert ("aten::cat" in recorded.names) == (name == "split")
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)

    def test_float32_does_not_take_tensor_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choosing(monkeypatch, "mma")
        given = self.given()
        torch.testing.assert_close(conv2d_relu(**given), conv2d_relu(**given, backend="native"), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_other_ops(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(2, 8, 9, 9).contiguous(memory_format=LAST)
        kind = choices.kind_of("max_pool2d", "both", "9.0", torch.float32, True, (x.numel(),))
        monkeypatch.setattr(choices, "COMMITTED", (Row(kind, name, "measured"),))
        choices.forget()
        chosen = [backends.select("max_pool2d", value, None) for value in (x, x.contiguous(), x.half())]
        assert chosen == [name, "cuda", "cuda"]
        assert torch.equal(max_pool2d(x), F.max_pool2d(x, 3, 2))
        assert backends.select("max_pool2d", x, "cuda") == "cuda"

    def test_repeatable_algorithms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With cuDNN's, which may change from run to run, ReLU is apart; Triton's kernel repeats."""
        given = self.given(torch.bfloat16)
        for name, apart in itertools.product(("triton", "split"), (False, True)):
            self.choosing(monkeypatch, name, "bfloat16")
            monkeypatch.setattr(torch.backends.cudnn, "deterministic", apart)
            assert torch.equal(conv2d_relu(**given), conv2d_relu(**given))
