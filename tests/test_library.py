"""The native library as a whole: instruction sets, backends, and the package without it."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import alexnet_kernels
from alexnet_kernels import _library, backends, cli, ops
from alexnet_kernels.op_info import OP_INFOS, Maker, operator_calls, with_gradients

PACKAGE = Path(alexnet_kernels.__file__).parent

# Compares every op with its definition on the CPU kernels, in every dtype and memory format; prints the differences.
EVERY_KERNEL = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from contract import Case, check, expected, settings
from alexnet_kernels.op_info import OP_INFOS

failed, checked = [], 0
for info in OP_INFOS.values():
    for sample in (*info.typical, info.large):
        for setting in settings(info, chosen=lambda device: ["cpu"]):
            if setting.device == "cpu" and info.takes(sample, setting.dtype):
                case = Case(info, sample, setting)
                checked += 1
                try:
                    check(case, expected(info, case.inputs()))
                except AssertionError as error:
                    failed.append(f"{case.id}: {error}")
print(json.dumps({"isa": torch.ops.alexnet_kernels.isa(), "failed": failed, "checked": checked}))
"""


def start(code: str, cwd: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run(code: str, cwd: Path, *arguments: str, **variables: str) -> str:
    result = start(code, cwd, *arguments, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_is_right(isa: str, tmp_path: Path) -> None:
    report = json.loads(run(EVERY_KERNEL, tmp_path, str(Path(__file__).parent), ALEXNET_KERNELS_ISA=isa))
    if report["isa"] != isa:
        pytest.skip(f"this processor has {report['isa']} at best")
    assert report["checked"] > 100
    assert report["failed"] == []


class TestBackends:
    def test_auto_is_the_kernel_of_the_device(self) -> None:
        assert backends.select("max_pool2d", torch.empty(1), None) == "cpu"
        assert backends.select("max_pool2d", torch.empty(1, device="meta"), None) == "native"

    def test_the_call_wins_over_the_context_and_that_over_the_default(self) -> None:
        x = torch.empty(1)
        with alexnet_kernels.use_backend("native"):
            assert backends.select("max_pool2d", x, None) == "native"
            assert backends.select("max_pool2d", x, "cpu") == "cpu"
            with alexnet_kernels.use_backend("cpu"):
                assert backends.get_backend() == "cpu"
            assert backends.get_backend() == "native"
        assert backends.get_backend() == "auto"

    def test_context_ends_with_an_exception(self) -> None:
        with pytest.raises(KeyError), alexnet_kernels.use_backend("native"):
            raise KeyError
        assert backends.get_backend() == "auto"

    def test_threads_have_their_own(self) -> None:
        x, seen = torch.empty(1), {}
        entered, leave = threading.Barrier(3), threading.Event()

        def inside(name: str) -> None:
            with alexnet_kernels.use_backend(name):
                entered.wait(10)
                leave.wait(10)
                seen[name] = (backends.get_backend(), backends.select("max_pool2d", x, None))
            seen[f"{name}, after"] = backends.get_backend()

        threads = [threading.Thread(target=inside, args=(name,)) for name in ("cpu", "native")]
        for thread in threads:
            thread.start()
        entered.wait(10)
        seen["main"] = backends.get_backend()
        leave.set()
        for thread in threads:
            thread.join(10)
        assert seen == {
            "main": "auto",
            "cpu": ("cpu", "cpu"),
            "native": ("native", "native"),
            "cpu, after": "auto",
            "native, after": "auto",
        }

    @pytest.mark.parametrize("traces", [False, True], ids=["old torch", "new torch"])
    def test_different_blocks_warn_where_compiled_code_cannot_tell_threads(
        self, traces: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backends, "_TRACES_CONTEXT", traces)

        def other() -> None:
            with alexnet_kernels.use_backend("native"):
                pass

        with alexnet_kernels.use_backend("cpu"), alexnet_kernels.use_backend("native"):
            pass  # one thread may nest them
        with warnings.catch_warnings(record=True) as caught, alexnet_kernels.use_backend("cpu"):
            warnings.simplefilter("always")
            thread = threading.Thread(target=other)
            thread.start()
            thread.join(10)
        assert ["entered last" in str(warning.message) for warning in caught] == ([] if traces else [True])
        assert backends._entered == []

    def test_async_tasks_have_their_own(self) -> None:
        async def inside(name: str) -> list[str]:
            found = []
            with alexnet_kernels.use_backend(name):
                for _ in range(3):
                    await asyncio.sleep(0)
                    found.append(backends.get_backend())
            return found

        async def both() -> list[list[str]]:
            return await asyncio.gather(inside("cpu"), inside("native"))

        assert asyncio.run(both()) == [["cpu"] * 3, ["native"] * 3]

    def test_autograds_own_threads_follow_the_block(self) -> None:
        """They recompute checkpointed activations on a GPU; here a thread that Python's threading did not start."""
        x = torch.randn(2, 8, 7, 7, requires_grad=True)
        done, failed = threading.Event(), []

        def backward() -> None:
            try:
                loss.backward()
            except Exception as error:
                failed.append(error)
            done.set()

        with alexnet_kernels.use_backend("native"):
            loss = checkpoint(lambda x: ops.lrn_max_pool2d(x, relu=True).sum(), x, use_reentrant=False)
            _thread.start_new_thread(backward, ())
            assert done.wait(30)
        assert failed == []
        assert x.grad is not None

    def test_a_block_may_be_closed_in_another_context(self) -> None:
        def generator() -> Iterator[None]:
            with alexnet_kernels.use_backend("native"):
                yield

        held = generator()
        contextvars.copy_context().run(next, held)
        held.close()
        assert backends.get_backend() == "auto"
        assert backends._entered == []

    def test_the_default_is_that_of_every_thread(self) -> None:
        found = []
        alexnet_kernels.set_backend("native")
        try:
            thread = threading.Thread(target=lambda: found.append(backends.get_backend()))
            thread.start()
            thread.join(10)
            with alexnet_kernels.use_backend("cpu"):
                alexnet_kernels.set_backend("auto")
                assert backends.get_backend() == "cpu"
        finally:
            alexnet_kernels.set_backend("auto")
        assert found == ["native"]

    def test_compiled_code_follows_the_block(self, fresh_dynamo: None) -> None:
        graphs = []

        def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            graphs.append(str(graph.graph))
            return graph.forward

        compiled = torch.compile(lambda x: ops.max_pool2d(x), backend=compiler, fullgraph=True)
        x = torch.randn(1, 4, 5, 5)
        for name in ("cpu", "native", "cpu"):
            with alexnet_kernels.use_backend(name):
                assert torch.equal(compiled(x), ops.max_pool2d(x))
        assert ["alexnet_kernels" in graph for graph in graphs] == [True, False]

    def test_compiled_code_may_hold_a_block(self, fresh_dynamo: None) -> None:
        def function(x: torch.Tensor) -> torch.Tensor:
            with alexnet_kernels.use_backend("native"):
                y = ops.max_pool2d(x)
            return ops.local_response_norm(y)

        graphs = []

        def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
            graphs.append(str(graph.graph))
            return graph.forward

        x = torch.randn(1, 4, 5, 5)
        assert torch.equal(torch.compile(function, backend=compiler, fullgraph=True)(x), function(x))
        (graph,) = graphs
        assert "local_response_norm" in graph
        assert "alexnet_kernels.max_pool2d" not in graph
        assert backends.get_backend() == "auto"

    def test_environment(self, tmp_path: Path) -> None:
        code = "from alexnet_kernels import backends; print(backends.get_backend())"
        assert run(code, tmp_path, ALEXNET_KERNELS_BACKEND="native").strip() == "native"

    def test_bad_environment_is_named(self, tmp_path: Path) -> None:
        result = start("import alexnet_kernels", tmp_path, ALEXNET_KERNELS_CONV2D_RELU="fast")
        assert "ALEXNET_KERNELS_CONV2D_RELU='fast': 'own' or 'library' expected" in result.stderr
        result = start("import alexnet_kernels", tmp_path, ALEXNET_KERNELS_BACKEND="fast")
        assert "ALEXNET_KERNELS_BACKEND='fast': one of 'auto', 'cpu'" in result.stderr

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match="backend='fast': one of 'auto', 'cpu', 'cuda', 'triton'"):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="fast")
        with pytest.raises(ValueError, match="one of"):
            alexnet_kernels.set_backend("fast")

    @pytest.mark.parametrize("name", ["cuda", "triton"])
    def test_backend_that_is_not_there(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_library, "KERNELS", frozenset())
        monkeypatch.setattr(_library, "TRITON_INSTALLED", False)
        with pytest.raises(RuntimeError, match=f"max_pool2d: backend '{name}' is not available: "):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend=name)

    def test_cuda_needs_a_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_library, "KERNELS", _library.KERNELS | {("max_pool2d", "CUDA")})
        reason = backends.unavailable("max_pool2d", "cuda")
        assert reason == (None if torch.cuda.is_available() else "it needs a CUDA device")
        with pytest.raises(
            ValueError, match=r"max_pool2d: backend 'cuda' needs tensors on cuda, but the input is on cpu$"
        ):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="cuda")

    def test_auto_takes_the_cuda_kernels(self) -> None:
        built = dataclasses.replace(backends.registered("cuda"), missing=lambda op: None)
        with FakeTensorMode(), backends.substituted(built):
            x = torch.empty(1, 1, 5, 5, device="cuda:0")
            assert {op: backends.select(op, x, None) for op in ops.__all__} == dict.fromkeys(ops.__all__, "cuda")
            assert backends.select("max_pool2d", x.double(), None) == "native"

    @pytest.mark.parametrize(
        ("capability", "archs"),
        [
            ((8, 0), "8.0"),
            ((8, 6), "8.0"),
            ((8, 7), "8.7"),
            ((9, 0), "9.0a"),
            ((9, 0), "8.0 9.0a 10.0+PTX"),
            ((10, 0), "8.0+PTX 9.0a"),
            ((9, 0), "7.5 8.0+PTX"),
            ((8, 7), "8.0+PTX"),
            ((10, 3), "10.0f"),
            ((12, 1), "8.0 9.0 10.0+PTX"),
        ],
    )
    def test_architectures_that_run(self, capability: tuple[int, int], archs: str) -> None:
        assert any(_library.runs_on(arch, capability) for arch in archs.split())

    @pytest.mark.parametrize(
        ("capability", "archs"),
        [
            ((7, 5), "8.0 9.0 10.0+PTX"),
            ((8, 0), "8.6 9.0"),
            ((8, 7), "8.0 9.0"),
            ((9, 0), "8.0"),
            ((10, 0), "9.0a+PTX"),
            ((10, 0), "8.0 9.0a"),
            ((10, 3), "10.0a"),
            ((12, 0), "8.0 9.0 10.0f+PTX"),
        ],
    )
    def test_architectures_that_do_not(self, capability: tuple[int, int], archs: str) -> None:
        assert not any(_library.runs_on(arch, capability) for arch in archs.split())

    @pytest.mark.skipif(("max_pool2d", "CUDA") not in _library.KERNELS, reason="built without CUDA")
    def test_every_op_has_cuda_kernels(self) -> None:
        assert {op for op, key in _library.KERNELS if key == "CUDA"} >= set(ops.__all__)

    def test_report(self) -> None:
        rows = {row["op"]: row["backends"] for row in backends.report()}
        assert set(rows) == set(ops.__all__)
        assert all(row["cpu"] == row["native"] == "available" for row in rows.values())

    def test_status(self) -> None:
        status = _library.status()
        assert status["loaded"]
        assert status["reason"] is None
        assert status["isa"] in ("generic", "avx2", "avx512")
        assert status["wgmma"] == any(arch.startswith("9.0a") for arch in status["archs"])

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3)])
    def test_the_architecture_to_build_for_a_gpu(self, capability: tuple[int, int]) -> None:
        arch = _library.arch_of(capability)
        assert _library.runs_on(arch, capability)
        assert arch.endswith("a") == (capability == (9, 0))  # only there the kernels need more


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two GPUs, for the first of which the library has no kernels."""
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_name", "GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 if index else 8, 0))
    # It allocates on the GPU where a fake tensor is made.
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None, raising=False)
    monkeypatch.setattr(_library, "ARCHS", ("8.6", "9.0"))
    monkeypatch.setattr(_library, "_searched", False)
    monkeypatch.setattr(_library, "UNSERVED", {})
    monkeypatch.setattr(_library, "TRITON_INSTALLED", True)
    with backends.substituted(dataclasses.replace(backends.registered("cuda"), missing=lambda op: None)):
        yield


@pytest.mark.usefixtures("old_gpu")
class TestGPUWithoutKernels:
    REASON = (
        "the native library has no kernels for architecture 8.0 of GPU, only for 8.6, 9.0: build it with "
        "ALEXNET_KERNELS_ARCHS=8.0"
    )

    def test_auto_takes_triton_there_and_warns_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loads = dataclasses.replace(backends.registered("triton"), load=None, automatic=lambda op: op != "conv2d_relu")
        with FakeTensorMode(), backends.substituted(loads), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                for index, expected in enumerate(("triton", "cuda")):
                    x = torch.empty(1, 1, 5, 5, device=f"cuda:{index}")
                    assert backends.select("max_pool2d", x, None) == expected
                    assert backends.select("conv2d_relu", x, None) == ("cuda" if index else "native")
        (warning,) = [w for w in caught if "kernels" in str(w.message)]
        assert str(warning.message) == f"{self.REASON}. There the ops run on Triton"

    def test_asking_for_cuda_is_an_error(self) -> None:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.empty(1, 1, 5, 5, device="cuda:0")
            with pytest.raises(RuntimeError, match=f"backend 'cuda' can't run on cuda:0: {self.REASON}"):
                backends.select("max_pool2d", x, "cuda")
            assert backends.select("max_pool2d", x.to("cuda:1"), "cuda") == "cuda"

    def test_one_that_is_too_old_has_no_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
        with pytest.warns(RuntimeWarning, match=r"architecture 7\.5 .*: they need 8\.0 or later\. There the ops run"):
            assert set(_library.unserved_gpus()) == {0, 1}

    def test_a_hopper_gpu_is_to_get_its_own_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_library, "ARCHS", ("8.0",))
        with pytest.warns(RuntimeWarning, match=r"architecture 9\.0 .*: build it with ALEXNET_KERNELS_ARCHS=9\.0a\. "):
            assert set(_library.unserved_gpus()) == {1}

    def test_it_is_reported_once(self, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli.main(["info"]) == 0
        assert capsys.readouterr().out.count(self.REASON) == 1
        assert backends.unavailable("max_pool2d", "cuda") is None
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert backends.unavailable("max_pool2d", "cuda") == self.REASON
        assert _library.slow_path(torch.device("cuda")) == _library.slow_path(torch.device("cuda:0")) == self.REASON
        assert _library.slow_path(torch.device("cuda:1")) is None
        assert _library.slow_path(torch.device("cpu")) is None


@pytest.mark.parametrize(("unserved", "expected"), [({}, 3.0), ({None: "too old"}, 2.0)])
def test_compiled_code_takes_triton_too(unserved, expected, monkeypatch, fresh_dynamo: None) -> None:
    """With the CPU in the GPU's place, whose index is None."""
    monkeypatch.setattr(_library, "UNSERVED", unserved)
    cuda = dataclasses.replace(backends.registered("cuda"), devices=("cpu",), missing=lambda op: None)
    triton = dataclasses.replace(backends.registered("triton"), devices=("cpu",), load=None, automatic=lambda op: True)
    cpu = dataclasses.replace(backends.registered("cpu"), devices=())

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + ("native", "triton", "cuda").index(backends.select("max_pool2d", x, None))

    with backends.substituted(cuda), backends.substituted(triton), backends.substituted(cpu):
        assert torch.compile(function, backend="eager", fullgraph=True)(torch.ones(1)).item() == expected
        assert function(torch.ones(1)).item() == expected


class TestTransforms:
    """torch.func and forward-mode differentiation support PyTorch's own operators only."""

    def test_forward_mode(self) -> None:
        x, v = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.randn(1, 4, 5, 5, dtype=torch.float64)

        def function(x: torch.Tensor) -> torch.Tensor:
            return ops.local_response_norm(x, alpha=0.5)

        _, tangent = torch.func.jvp(function, (x,), (v,))
        step = 1e-6
        torch.testing.assert_close(tangent, (function(x + step * v) - function(x - step * v)) / (2 * step))

    def test_vmap_of_grad(self) -> None:
        x = torch.randn(3, 1, 4, 5, 5, dtype=torch.float64)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return ops.max_pool2d(x, relu=True).square().sum()

        expected = torch.stack([torch.func.grad(loss)(image) for image in x])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)


class TestEagerCalls:
    """Eager calls bypass the dispatcher's Python layer; observers of operators still see them."""

    @pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
    @pytest.mark.parametrize("op", [info.name for info in OP_INFOS.values() if info.wrt])
    def test_compute_what_the_operator_does(self, op: str, autocast: bool) -> None:
        info = OP_INFOS[op]
        inputs = with_gradients(info.inputs(info.typical[0], Maker(memory_format=torch.channels_last)), info.wrt)
        operator = getattr(torch.ops.alexnet_kernels, op).default
        _, args = operator_calls(info, inputs, "cpu")[0]
        names = [argument.name for argument in operator._schema.arguments][: len(args)]
        args = [inputs[name] if name in info.wrt else arg for name, arg in zip(names, args, strict=True)]

        def call_operator() -> torch.Tensor:
            result = operator(*args)
            return result[0] if isinstance(result, tuple | list) else result

        results = []
        for call in (lambda: info.op(**inputs), call_operator):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = call()
                with torch.no_grad():
                    assert torch.equal(call(), out)
            results.append([out, *torch.autograd.grad(out, [inputs[n] for n in info.wrt], torch.ones_like(out))])
        for actual, expected in zip(*results, strict=True):
            assert actual.dtype == expected.dtype
            assert actual.stride() == expected.stride()
            assert torch.equal(actual, expected)

    def test_what_a_check_passed_lets_nothing_else_pass(self) -> None:
        x, w = torch.randn(1, 4, 5, 5), torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)
        for _ in range(2):
            with pytest.raises(TypeError, match="they must agree"):
                ops.conv2d_relu(x, w)
            with torch.autocast("cpu", torch.bfloat16):
                assert ops.conv2d_relu(x, w).dtype == torch.bfloat16
                assert ops.max_pool2d(x.to("meta")).shape == (1, 4, 2, 2)
            assert ops.max_pool2d(x).shape == (1, 4, 2, 2)
            assert ops.local_response_norm(x, 5).shape == x.shape
            with pytest.raises(TypeError, match="kernel_size must be an int"):
                ops.max_pool2d(x, 3.0)
            with pytest.raises(ValueError, match="size must be a positive int"):
                ops.local_response_norm(x, 5.0)
            with pytest.raises(TypeError, match="int64"):
                ops.max_pool2d(x.long())
            with pytest.raises(ValueError, match="smaller than the window"):
                ops.max_pool2d(x[..., :2])

    def test_profilers_and_modes_see_the_operator(self) -> None:
        x = torch.randn(2, 8, 7, 7, requires_grad=True)

        def call() -> torch.Tensor:
            return ops.max_pool2d(x, relu=True)

        with torch.profiler.profile() as profile:
            call().sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert {"alexnet_kernels::max_pool2d", "alexnet_kernels::max_pool2d_backward"} <= names

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **kwargs or {})

        seen: list[str] = []
        with Seen():
            call().sum().backward()
        assert {"alexnet_kernels.max_pool2d.default", "alexnet_kernels.max_pool2d_backward.default"} <= set(seen)

    def test_subclasses_hear_of_the_operator(self) -> None:
        class Loud(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                heard.append(str(function))
                return super().__torch_function__(function, types, args, kwargs or {})

        heard: list[str] = []
        x = torch.randn(1, 8, 5, 5)
        assert torch.equal(ops.max_pool2d(x.as_subclass(Loud)), ops.max_pool2d(x))
        assert "alexnet_kernels.max_pool2d.default" in heard

    def test_saved_tensor_hooks_and_lazy_negation(self) -> None:
        x = torch.randn(1, 8, 5, 5, requires_grad=True)
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
            out = ops.local_response_norm(x)
        assert packed == [x.shape]
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
        negated = torch._neg_view(x.detach())
        assert negated.is_neg()
        assert torch.equal(ops.max_pool2d(negated), ops.max_pool2d(-x.detach()))
        assert torch.equal(ops.local_response_norm(negated), -out.detach())

    def test_an_output_without_a_gradient(self) -> None:
        x = torch.randn(1, 8, 5, 5, requires_grad=True)

        class Undefined(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                return y.clone()

            @staticmethod
            def backward(ctx, grad):
                return None

        (grad,) = torch.autograd.grad(Undefined.apply(ops.max_pool2d(x)).sum(), x, allow_unused=True)
        assert grad is None


def test_package_without_its_library(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "alexnet_kernels", ignore=shutil.ignore_patterns("*.so", "*.zip"))
    code = """
import torch, json
import alexnet_kernels as ak
x = torch.randn(2, 3, 64, 64, requires_grad=True)
model = ak.AlexNet(num_classes=4, width=0.1)
model(x).sum().backward()
try:
    ak.ops.dropout(x, backend="cpu")
except RuntimeError as error:
    message = str(error)
status = ak._library.status()
print(json.dumps([status["loaded"], status["reason"], bool(x.grad.isfinite().all()), message]))
"""
    result = start(code, tmp_path, PYTHONPATH=str(tmp_path))
    loaded, reason, trained, message = json.loads(result.stdout)
    assert not loaded
    assert "does not exist" in reason
    assert "build it" in reason
    assert trained
    assert message.startswith("dropout: backend 'cpu' is not available: ")
    assert result.stderr.count(f"RuntimeWarning: PyTorch's operators compute all ops, slowly: {reason}\n") == 1


def test_a_library_that_does_not_load_is_told(tmp_path: Path) -> None:
    tree = tmp_path / "alexnet_kernels"
    shutil.copytree(PACKAGE, tree, ignore=shutil.ignore_patterns("*.so", "*.zip"))
    (tree / "_C.so").write_text("no library")
    result = start("import alexnet_kernels", tmp_path, PYTHONPATH=str(tmp_path))
    reason = f"{tree / '_C.so'} could not be loaded by torch {torch.__version__}: "
    assert f"RuntimeWarning: PyTorch's operators compute all ops, slowly: {reason}" in result.stderr
    assert result.returncode == 0


def test_a_source_tree_that_hides_the_installed_package_is_told(tmp_path: Path) -> None:
    """At import, and by `train`; as after `git clone`, `pip install .` and a start in the clone."""
    for package in ("lightning", "PIL", "matplotlib"):
        pytest.importorskip(package, reason="`train` needs it")
    tree, installed = tmp_path / "tree" / "alexnet_kernels", tmp_path / "installed" / "alexnet_kernels"
    shutil.copytree(PACKAGE, tree, ignore=shutil.ignore_patterns("*.so"))
    installed.mkdir(parents=True)
    (installed / "_C.so").touch()
    code = """
import sys, types
from alexnet_kernels import cli
def stop(*args):
    raise SystemExit(5)
sys.modules["alexnet_kernels.training.run"] = types.SimpleNamespace(train=stop)
sys.exit(cli.main(["train", "--device", "cpu"]))
"""
    result = start(code, tree.parent, PYTHONPATH=str(installed.parent))
    assert result.returncode == 5, result.stderr
    reason = f"this source tree hides the package installed in {installed}: start in another folder"
    (warning,) = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert "PyTorch's operators compute all ops, slowly: " in warning
    assert reason in warning
    (line,) = result.stdout.splitlines()
    assert line.startswith("without this package's kernels: ")
    assert reason in line
