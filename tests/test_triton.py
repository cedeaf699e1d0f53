"""The Triton backend as a whole: registration, choice, and what torch.compile sees of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import check_network
from torch._subclasses.fake_tensor import FakeTensorMode

import alexnet_kernels
from alexnet_kernels import _library, backends, ops
from alexnet_kernels.ops import _common

PACKAGE = Path(alexnet_kernels.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _library.TRITON_INSTALLED, reason="triton is not installed"),
]
interpreted = pytest.mark.skipif(not _library.INTERPRETED, reason="TRITON_INTERPRET is not set")

# Traces each operator on fake CUDA tensors as torch.compile does, and prints what is left of it in the graph. Triton
# finds out which arguments a kernel writes for the GPU of its driver: here one that only has a name.
TRACE = """
import json, torch
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0

driver.set_active(Driver())
import alexnet_kernels, alexnet_kernels.triton
from alexnet_kernels import _library, backends, ops

# As if built without CUDA, where "auto" takes Triton.
_library.KERNELS = frozenset(kernel for kernel in _library.KERNELS if kernel[1] != "CUDA")
kernels, found = torch.ops.alexnet_kernels_triton, {}

def trace(name, function, *args):
    def compiler(graph, _):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found[name] = sorted({t for t in targets if "triton" in t})
        launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        found[name + " written"] = [list(kwargs["tensors_to_clone"]) for kwargs in launches]
        values = [kernel_side_table.get_constant_args(kwargs["constant_args_idx"]) for kwargs in launches]
        values = [value for constants in values for value in constants.values() if type(value) is int]
        found[name + " largest"] = max(map(abs, values), default=0)
        return graph
    with torch.no_grad():
        aot_function(function, fw_compiler=compiler)(*args)

with FakeTensorMode():
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="cuda:0")
    x, small, arg = empty(2, 16, 9, 9), empty(2, 16, 4, 4), empty(2, 16, 4, 4, dtype=torch.uint8)
    w, b, v = empty(32, 8, 3, 3), empty(32), empty(16, dtype=torch.float32)
    y, key = empty(2, 32, 9, 9), empty(1, dtype=torch.int64)
    pool, window = ([3, 3], [2, 2], [0, 0]), (5, 1e-4, 0.75, 1.0, 2)
    trace("max_pool2d", lambda x: ops.max_pool2d(x), x)
    trace("max_pool2d_backward",
          lambda g, a: kernels.max_pool2d_backward(g, None, a, x.shape, *pool, False), small, arg)
    trace("local_response_norm", lambda x: ops.local_response_norm(x), x)
    trace("local_response_norm_backward", lambda g, x: kernels.local_response_norm_backward(g, x, *window), x, x)
    trace("lrn_max_pool2d", lambda x: ops.lrn_max_pool2d(x, relu=True), x)
    trace("lrn_max_pool2d_backward",
          lambda g, x, a: kernels.lrn_max_pool2d_backward(g, x, a, *window, *pool, True), small, x, arg)
    trace("within_map_response_norm", lambda x: ops.within_map_response_norm(x), x)
    trace("within_map_response_norm_backward",
          lambda g, x: kernels.within_map_response_norm_backward(g, x, 5, 1e-3, 0.75, 1.0), x, x)
    trace("batch_norm_relu", lambda x, v: ops.batch_norm_relu(x, None, None, v, v, True), x, v)
    trace("batch_norm_relu_backward",
          lambda g, x, v: kernels.batch_norm_relu_backward(g, x, v, v, v, v, True, 1e-5), x, x, v)
    trace("dropout", lambda x: ops.dropout(x, 0.5, seed=1, offset=2**63 - 1), x)
    trace("linear_relu_dropout", lambda x, w: ops.linear_relu_dropout(x, w, seed=1), empty(4, 16), empty(32, 16))
    trace("relu_dropout_backward", lambda g, y: kernels.relu_dropout_backward(g, y, 2.0), x, x)
    trace("conv2d_relu", lambda x, w, b: ops.conv2d_relu(x, w, b, 1, 1, 2, backend="triton"), x, w, b)
    trace("conv2d_relu_backward_input",
          lambda g, y, x, w: kernels.conv2d_relu_backward_input(g, y, x, w, [1, 1], [1, 1], 2), y, y, x, w)
    trace("conv2d_relu_backward_weight",
          lambda g, y, x, w: kernels.conv2d_relu_backward_weight(g, y, x, w, [1, 1], [1, 1], 2), y, y, x, w)
    trace("space_to_depth", lambda x: kernels.space_to_depth(x, 3, [0, 0], [3, 3], torch.bfloat16), x)
    trace("depth_to_space", lambda x: kernels.depth_to_space(x, 4, [0, 0], [16, 16], torch.bfloat16), small)
    images, crops = empty(2, 9, 9, 3, dtype=torch.uint8), empty(2, 2, dtype=torch.int64)
    trace("augment", lambda i, c: kernels.augment(i, c, [7, 7], None, None, None, None, torch.bfloat16, True),
          images, crops)
    choices = {op: backends.select(op, x, None) for op in ops.__all__}
    choices["float64"] = backends.select("max_pool2d", x.double(), None)
print(json.dumps([found, choices]))
"""

# Compiles every operator's kernels for tensors and arguments of one, in NCHW: Triton makes a constant of an argument
# that is 1, which the interpreter doesn't. Prints what failed, and the kernels that were launched.
ONES = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
launch, done = JITFunction.run, set()

def compile_only(self, *args, grid, warmup, **options):
    done.add(self.__name__)
    return launch(self, *args, grid=grid, warmup=True, **options)

JITFunction.run = compile_only
import alexnet_kernels.triton
kernels = torch.ops.alexnet_kernels_triton
failed = {}

def call(op, *args):
    try:
        with torch.no_grad():
            getattr(kernels, op)(*args)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        failed.setdefault(op, []).append(f"{type(error).__name__}: {error}")

for shape in ((1, 1, 1, 1), (3, 5, 2, 3)):
    n, c, h, w = shape
    x = torch.empty(shape)
    v, key = torch.empty(c), torch.empty(1, dtype=torch.int64)
    arg = torch.empty(shape, dtype=torch.uint8)
    pool, lrn = ([1, 1], [1, 1], [0, 0]), (1 if c == 1 else 4, 1.0, 0.5, 1.0, 1)
    call("max_pool2d", x, *pool, False, True)
    call("max_pool2d_backward", x, x, arg, shape, *pool, True)
    call("max_pool2d", x, [1, 3], [1, 1], [0, 1], False, False)
    call("local_response_norm", x, *lrn)
    call("local_response_norm_backward", x, x, *lrn)
    call("lrn_max_pool2d", x, *lrn, *pool, False, True)
    call("lrn_max_pool2d_backward", x, x, arg, *lrn, *pool, True)
    call("within_map_response_norm", x, *lrn[:-1])
    call("within_map_response_norm_backward", x, x, *lrn[:-1])
    call("batch_norm_relu", x, v, v, None, None, False, 1.0)
    if c > 1:
        call("batch_norm_relu", x, None, None, None, v, True, 1.0)
    call("batch_norm_relu_backward", x, x, v, v, None, None, True, 1.0)
    for row in ((x.numel(), x.numel(), 0), (1, 1, 1), (1, 2, 1)):
        call("dropout", x, 0.5, 1.0, key, 1, *row)
    call("dropout", x.contiguous(memory_format=torch.channels_last), 1.0, 1.0, key, 2**40, 1, 1, 1)
    call("linear_relu_dropout", torch.empty(1, c), torch.empty(1, c), None, True, 0.5, 1.0, key, 1, 1, 1, 0)
    call("relu_dropout_backward", x, x, 1.0)
    weight = torch.empty(c, 1, 1, 1)
    conv = (x, x, x, weight, [1, 1], [0, 0], c)
    call("conv2d_relu", x, weight, None, [1, 1], [0, 0], c, True)
    call("conv2d_relu_backward_input", *conv)
    call("conv2d_relu_backward_weight", *conv)
    call("space_to_depth", x, 1, [0, 0], [h, w], torch.float32)
    call("depth_to_space", x, 1, [0, 0], [h, w], torch.bfloat16)
    call("augment", torch.empty(1, h, w, 3, dtype=torch.uint8), torch.empty(1, 2, dtype=torch.int64), [1, 1],
         torch.empty(1, dtype=torch.bool), torch.empty(1, 3), torch.empty(3), None, torch.float32, False)
    one = [torch.empty(1)]
    call("sgd_step", one, one, one, [], 1.0, 1.0, 1.0, 1.0, True, False, False)
    call("sgd_step", [*one, x], [*one, x], [*one, x], [], 1.0, 1.0, 1.0, 0.0, False, True, True)
print(json.dumps([failed, sorted(done)]))
"""


def run(code: str, cwd: Path, **variables: str) -> str:
    """The standard output of a Python process in which Triton compiles its kernels."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def arguments(operator: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in operator._schema.arguments]


@interpreted
def test_every_contract_has_a_triton_operator_with_its_arguments() -> None:
    import alexnet_kernels.triton  # noqa: F401

    assert set(ops.__all__) <= set(_common.CONTRACTS)
    for op in _common.CONTRACTS:
        operator = getattr(torch.ops.alexnet_kernels_triton, op).default
        native = getattr(torch.ops.alexnet_kernels, op, None)
        if native is not None:
            assert arguments(operator) == arguments(native.default), op
            assert len(operator._schema.returns) == len(native.default._schema.returns), op


def test_compile_sees_through_every_operator(tmp_path: Path) -> None:
    found, choices = json.loads(run(TRACE, tmp_path))
    traced = {name for name in found if not name.endswith((" written", " largest"))}
    # sgd_step launches one kernel with tuples of tensors, which torch.compile can't hold.
    assert traced == set(_common.CONTRACTS) - {"sgd_step"}
    for name in traced:
        assert found[name] == ["triton_kernel_wrapper_functional"], name
        assert found[f"{name} largest"] <= 2**31, name  # torch 2.11 compiles no launch with a larger number
    assert found["lrn_max_pool2d written"] == [["out_ptr", "arg_ptr"]]
    assert found["lrn_max_pool2d_backward written"] == [["dx_ptr"]]
    # Without CUDA C++ kernels.
    if not any(key == "CUDA" for _, key in _library.KERNELS):
        expected = {op: "native" if op == "conv2d_relu" else "triton" for op in ops.__all__}
        assert choices == {**expected, "float64": "native"}


def test_a_launch_makes_its_tensors_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_kernels.triton._common import on_its_device

    entered: list[torch.device] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    launched = on_its_device(lambda tensors, *_: len(entered))
    with FakeTensorMode():
        here, there = (torch.empty(2, device=f"cuda:{i}") for i in range(2))
    assert launched(torch.empty(2)) == launched(here) == launched([]) == launched([here]) == 0
    assert launched(there, here) == 1
    assert launched([there, there], 1) == 2
    assert entered == [there.device] * 2


@interpreted
def test_every_operator_launches_on_its_tensors_device() -> None:
    import alexnet_kernels.triton
    from alexnet_kernels.triton._common import on_its_device

    modules = [value for value in vars(alexnet_kernels.triton).values() if isinstance(value, ModuleType)]
    operators = [value for module in modules for value in vars(module).values() if hasattr(value, "_init_fn")]
    assert {operator._name for operator in operators} == set(_common.CONTRACTS)
    guarded = on_its_device(print).__code__
    assert {operator._name for operator in operators if operator._init_fn.__code__ is not guarded} == set()


POOL, LRN = ([3, 3], [2, 2], [0, 0]), (5, 1e-4, 0.75, 1.0, 2)


def operands(memory_format: torch.memory_format) -> dict[str, tuple]:
    """Arguments for every operator."""

    def images(channels: int, size: int, requires_grad: bool = False) -> torch.Tensor:
        x = torch.randn(2, channels, size, size).contiguous(memory_format=memory_format)
        return x.requires_grad_(requires_grad)

    x, g, y = images(8, 9, True), images(8, 4), images(8, 9)
    arg = torch.randint(0, 9, (2, 8, 4, 4), dtype=torch.uint8).contiguous(memory_format=memory_format)
    w, b = torch.randn(16, 4, 3, 3, requires_grad=True), torch.randn(16, requires_grad=True)
    v, key, out = torch.rand(8), torch.tensor(5), images(16, 9)
    conv = (out, out, x.detach(), w.detach(), [1, 1], [1, 1], 2)
    tensors = [[torch.randn(5, 3)] for _ in range(3)]
    pixels = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    return {
        "max_pool2d": (x, *POOL, False, True),
        "max_pool2d_backward": (g, g, arg, [2, 8, 9, 9], *POOL, True),
        "local_response_norm": (x, *LRN),
        "local_response_norm_backward": (y, y, *LRN),
        "lrn_max_pool2d": (x, *LRN, *POOL, False, True),
        "lrn_max_pool2d_backward": (g, y, arg, *LRN, *POOL, True),
        "within_map_response_norm": (x, *LRN[:-1]),
        "within_map_response_norm_backward": (y, y, *LRN[:-1]),
        "batch_norm_relu": (x, None, None, v, None, True, 1e-5),
        "batch_norm_relu_backward": (y, y, v, v, v, None, True, 1e-5),
        "dropout": (x, 0.5, 2.0, key, 1, 1296, 1296, 0),
        "linear_relu_dropout": (torch.randn(3, 8), torch.randn(6, 8), None, True, 0.5, 2.0, key, 1, 6, 6, 0),
        "relu_dropout_backward": (y, y, 2.0),
        "conv2d_relu": (x, w, b, [1, 1], [1, 1], 2, True),
        "conv2d_relu_backward_input": conv,
        "conv2d_relu_backward_weight": conv,
        "space_to_depth": (x, 3, [1, 0], [3, 3], torch.bfloat16),
        "depth_to_space": (y, 2, [0, 1], [18, 17], torch.float32),
        "sgd_step": (*tensors, [], 0.1, 0.9, 5e-4, 0.0, False, True, False),
        "augment": (pixels, torch.zeros(2, 2, dtype=torch.int64), [7, 7], None, None, v[:3], None, torch.float16, True),
    }


@interpreted
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", operands(torch.contiguous_format))
def test_registration(op: str, memory_format: torch.memory_format) -> None:
    import alexnet_kernels.triton  # noqa: F401

    torch.library.opcheck(getattr(torch.ops.alexnet_kernels_triton, op).default, operands(memory_format)[op])


@interpreted
def test_every_operator_is_checked() -> None:
    assert set(operands(torch.contiguous_format)) == set(_common.CONTRACTS)


def test_every_kernel_compiles_for_sizes_and_arguments_of_one(tmp_path: Path) -> None:
    failed, compiled = json.loads(run(ONES, tmp_path, TRITON_CACHE_DIR=str(tmp_path)))
    assert failed == {}
    sources = "".join(path.read_text() for path in (PACKAGE / "triton").glob("*.py"))
    assert compiled == sorted(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


@interpreted
def test_the_interpreter_refuses_accesses_outside_of_tensors() -> None:
    from interpreter import copy_kernel

    few, many = torch.arange(5.0), torch.zeros(8)
    copy_kernel[(1,)](many, few, 5, BLOCK=8)
    assert few.eq(0).all()
    for source, target, count in ((few, many, 5), (many, few, 8)):  # a read too far, a write too far
        with pytest.raises(Exception, match="are in no tensor of the launch"):
            copy_kernel[(1,)](source, target, count, BLOCK=8)


def test_what_32_bits_cannot_count_is_refused() -> None:
    from alexnet_kernels.triton._common import check_size, in_own_format

    for shape in ((2**20, 1, 64, 64), (1, 2**20, 64, 64)):
        with pytest.raises(ValueError, match=r"take fewer than 2147418112 pixels, not tensors of shape \["):
            check_size(torch.empty(shape, device="meta"))
    with pytest.raises(ValueError, match=r"images of fewer than 2\^31 elements"):
        in_own_format(torch.empty(1, 2**20, 64, 64, device="meta"))


class TestChoice:
    def test_on_the_cpu_without_the_interpreter(self, tmp_path: Path) -> None:
        code = """
import torch
from alexnet_kernels import ops
try:
    ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="triton")
except ValueError as error:
    print(error)
"""
        expected = "max_pool2d: backend 'triton' needs tensors on a GPU, but the input is on cpu (TRITON_INTERPRET=1 "
        assert run(code, tmp_path).startswith(expected)

    @interpreted
    def test_float64_is_refused(self) -> None:
        with pytest.raises(TypeError, match="backend 'triton' takes float32, bfloat16 and float16, not"):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5, dtype=torch.float64), backend="triton")
        params = [torch.zeros(3), torch.zeros(3, dtype=torch.float64)]
        with pytest.raises(TypeError, match="backend 'triton' takes float32"):
            ops.sgd_step(params, params, params, lr=0.1, backend="triton")

    def test_other_devices_are_refused(self) -> None:
        with pytest.raises(ValueError, match="needs tensors on a GPU, but the input is on meta"):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5, device="meta"), backend="triton")

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_library, "TRITON_INSTALLED", False)
        with pytest.raises(RuntimeError, match="'triton' is not available: triton is not installed"):
            ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="triton")
        assert backends.unavailable("max_pool2d", "triton") == "triton is not installed"

    def test_the_package_does_not_import_triton_unasked(self, tmp_path: Path) -> None:
        code = "import alexnet_kernels, sys; print('alexnet_kernels.triton' in sys.modules)"
        assert run(code, tmp_path).strip() == "False"

    def test_environment_and_context(self, tmp_path: Path) -> None:
        code = "from alexnet_kernels import backends; print(backends.get_backend())"
        assert run(code, tmp_path, ALEXNET_KERNELS_BACKEND="triton").strip() == "triton"


@interpreted
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", ["max_pool2d", "local_response_norm", "lrn_max_pool2d", "within_map_response_norm"])
def test_the_size_of_programs_changes_no_bit(op, memory_format, monkeypatch) -> None:
    from alexnet_kernels.triton import _config

    function = getattr(ops, op)
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=memory_format)

    def run(block: int) -> tuple[torch.Tensor, torch.Tensor]:
        for name in ("VECTORS", "SCALARS"):
            monkeypatch.setattr(_config, name, _config.Launch(block=block))
        leaf = x.clone().requires_grad_()
        out = function(leaf, backend="triton")
        out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
        return out.detach(), leaf.grad

    for small, large in zip(run(16), run(1024), strict=True):
        assert torch.equal(small, large)


@interpreted
@pytest.mark.parametrize("shape", [(3, 1000), (2, 19, 5, 7)], ids=str)
@pytest.mark.parametrize("shard", [None, (1, 3, 5000)], ids=["whole", "shard"])
def test_dropout_draws_the_bits_of_the_cpu_kernel(shard, shape) -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.ones(shape)
        x = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        for seed, offset in ((0, 0), (-1, 2**33 + 1), (2**63 - 1, 7)):
            options = {"seed": seed, "offset": offset, "shard": shard}
            theirs = ops.dropout(x, 0.3, **options, backend="cpu")
            assert torch.equal(ops.dropout(x, 0.3, **options, backend="triton"), theirs)


@interpreted
@pytest.mark.parametrize("preset", ["paper", "as_run", "batchnorm"])
def test_the_network_equals_pytorchs_own_operators(preset: str) -> None:
    check_network(preset, "triton")
