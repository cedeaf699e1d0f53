"""The native library as a whole: instruction sets, backends, and the package without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import alexnet_kernels
from alexnet_kernels import _library, backends, ops

PACKAGE = Path(alexnet_kernels.__file__).parent

# Every op with a kernel of its own, forward and backward, in every dtype: the largest error relative to float64.
EVERY_KERNEL = """
import json, torch
from alexnet_kernels import ops, reference

torch.manual_seed(0)
norm = dict(size=5, alpha=0.5, beta=0.75, k=2.0)
w, b = (torch.rand(21) + 0.5).bfloat16().float(), torch.randn(21).bfloat16().float()  # exact in every dtype
calls = {
    "max_pool2d": (lambda m, x: m.max_pool2d(x, 3, 2, 1, True, relu=True)),
    "local_response_norm": (lambda m, x: m.local_response_norm(x, **norm)),
    "lrn_max_pool2d": (lambda m, x: m.lrn_max_pool2d(x, **norm, relu=True)),
    "within_map_response_norm": (lambda m, x: m.within_map_response_norm(x, 3, 0.5)),
    "dropout": (lambda m, x: m.dropout(x, 0.3, seed=5, offset=2**40)),
    "batch_norm_relu": (lambda m, x: m.batch_norm_relu(x, None, None, w.to(x.dtype), b.to(x.dtype), True)),
    "linear_relu_dropout": (lambda m, x: m.linear_relu_dropout(x[:, :, 0, 0], torch.diag(w).to(x.dtype), seed=1)),
}
errors = {}
for name, call in calls.items():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 21, 9, 11).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
            y = x.detach().double().requires_grad_()
            ours, theirs = call(ops, x), call(reference, y)
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
            g = torch.randn(theirs.shape).to(dtype)
            gradients = torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, y, g.double())[0]
            key = f"{name} {str(dtype)[6:]}"
            for a, e in ((ours, theirs), gradients):
                errors[key] = max(errors.get(key, 0), ((a.double() - e).abs().max() / e.abs().max()).item())
print(json.dumps({"isa": torch.ops.alexnet_kernels.isa(), "errors": errors}))
"""


def start(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def run(code: str, cwd: Path, **variables: str) -> str:
    result = start(code, cwd, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set_is_right(isa: str, tmp_path: Path) -> None:
    report = json.loads(run(EVERY_KERNEL, tmp_path, ALEXNET_KERNELS_ISA=isa))
    if report["isa"] != isa:
        pytest.skip(f"this processor has {report['isa']} at best")
    # A rounding of the result in half precision, a few of the computation in the others.
    allowed = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2**-7, "float16": 2**-10}
    assert {key for key, error in report["errors"].items() if not error <= allowed[key.split()[1]]} == set()


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

    def test_environment(self, tmp_path: Path) -> None:
        code = "from alexnet_kernels import backends; print(backends.get_backend())"
        assert run(code, tmp_path, ALEXNET_KERNELS_BACKEND="native").strip() == "native"

    def test_bad_environment_is_named(self, tmp_path: Path) -> None:
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

    def test_cuda_needs_a_device(self, tmp_path: Path) -> None:
        code = """
import torch
from alexnet_kernels import _library, backends, ops
_library.KERNELS |= {("max_pool2d", "CUDA")}
print(backends.unavailable("max_pool2d", "cuda"))
try:
    ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="cuda")
except ValueError as error:
    print(error)
"""
        reason, refusal = run(code, tmp_path).splitlines()
        assert reason == ("None" if torch.cuda.is_available() else "it needs a CUDA device")
        assert refusal == "max_pool2d: backend 'cuda' needs tensors on cuda, but the input is on cpu"

    def test_auto_takes_the_cuda_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_library, "KERNELS", _library.KERNELS | {(op, "CUDA") for op in ops.__all__})
        with FakeTensorMode():
            x = torch.empty(1, 1, 5, 5, device="cuda:0")
            assert {op: backends.select(op, x, None) for op in ops.__all__} == dict.fromkeys(ops.__all__, "cuda")
            assert backends.select("max_pool2d", x.double(), None) == "native"

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


class TestTransforms:
    """torch.func and forward-mode differentiation know PyTorch's own operators only."""

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


class TestShortWay:
    """In eager mode kernels are called around the dispatcher's way through Python; what listens there still hears."""

    @staticmethod
    def calls() -> dict[str, tuple]:
        """op: (by the function, by the operator itself, tensors that get a gradient)."""
        torch.manual_seed(0)
        x = torch.randn(2, 8, 7, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
        w, b = torch.randn(6, 4, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
        rows, matrix = torch.randn(3, 10, requires_grad=True), torch.randn(5, 10, requires_grad=True)
        k, seed = torch.ops.alexnet_kernels, torch.tensor(3)
        window = ([3, 3], [2, 2], [0, 0])
        return {
            "conv2d_relu": (
                lambda: ops.conv2d_relu(x, w, b, padding=1, groups=2),
                lambda: k.conv2d_relu(x, w, b, [1, 1], [1, 1], 2, True),
                (x, w, b),
            ),
            "max_pool2d": (
                lambda: ops.max_pool2d(x, relu=True),
                lambda: k.max_pool2d(x, *window, False, True)[0],
                (x,),
            ),
            "lrn_max_pool2d": (
                lambda: ops.lrn_max_pool2d(x, 5, 1e-4, 0.75, 2.0),
                lambda: k.lrn_max_pool2d(x, 5, 1e-4, 0.75, 2.0, 1, *window, False, False)[0],
                (x,),
            ),
            "dropout": (
                lambda: ops.dropout(x, seed=3),
                lambda: k.dropout(x, 0.5, 2.0, seed, 0, x.numel(), x.numel(), 0),
                (x,),
            ),
            "linear_relu_dropout": (
                lambda: ops.linear_relu_dropout(rows, matrix, seed=3),
                lambda: k.linear_relu_dropout(rows, matrix, None, True, 0.5, 2.0, seed, 0, 5, 5, 0),
                (rows, matrix),
            ),
        }

    @pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
    @pytest.mark.parametrize("op", ["conv2d_relu", "max_pool2d", "lrn_max_pool2d", "dropout", "linear_relu_dropout"])
    def test_computes_what_the_operator_does(self, op: str, autocast: bool) -> None:
        short, operator, tensors = self.calls()[op]
        results = []
        for call in (short, operator):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = call()
                with torch.no_grad():
                    assert torch.equal(call(), out)
            results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
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
        short, _, _ = self.calls()["max_pool2d"]
        with torch.profiler.profile() as profile:
            short().sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert {"alexnet_kernels::max_pool2d", "alexnet_kernels::max_pool2d_backward"} <= names

        class Seen(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(str(function))
                return function(*args, **kwargs or {})

        seen: list[str] = []
        with Seen():
            short().sum().backward()
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
    loaded, reason, trained, message = json.loads(run(code, tmp_path, PYTHONPATH=str(tmp_path)))
    assert not loaded
    assert "does not exist: build it" in reason
    assert trained
    assert message.startswith("dropout: backend 'cpu' is not available: ")
