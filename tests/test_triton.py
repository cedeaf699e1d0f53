"""The Triton backend as a whole: registration, selection, and tracing by torch.compile."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
from contract import Case, check, expected
from helpers import check_network
from torch._subclasses.fake_tensor import FakeTensorMode

import alexnet_kernels
from alexnet_kernels import _library, backends, ops
from alexnet_kernels._dispatch.contracts import CONTRACTS
from alexnet_kernels.op_info import OP_INFOS, Setting

PACKAGE = Path(alexnet_kernels.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _library.TRITON_INSTALLED, reason="triton is not installed"),
]
interpreted = pytest.mark.skipif(not _library.INTERPRETED, reason="TRITON_INTERPRET is not set")

# Traces each operator on fake CUDA tensors as torch.compile does, and prints its nodes in the graph. Triton's analysis
# of the arguments that a kernel writes needs a driver: this one names a GPU without having one.
TRACE = """
import json, torch
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0

driver.set_active(Driver())
import alexnet_kernels.triton
from alexnet_kernels import _library, backends, ops
from alexnet_kernels.op_info import OP_INFOS, Maker, operator_calls

kernels, found = torch.ops.alexnet_kernels_triton, {}

def trace(name, args):
    def compiler(graph, _):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        found.setdefault(name, []).append(sorted({t for t in targets if "triton" in t}))
        launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        found[name + " written"] = [list(kwargs["tensors_to_clone"]) for kwargs in launches]
        values = [kernel_side_table.get_constant_args(kwargs["constant_args_idx"]) for kwargs in launches]
        values = [value for constants in values for value in constants.values() if type(value) is int]
        found[name + " largest"] = max(map(abs, values), default=found.get(name + " largest", 0))
        return graph
    leaves, tree = tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    def function(*tensors):
        given = dict(zip(places, tensors))
        return getattr(kernels, name)(*tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], tree))
    tensors = [leaves[i] for i in places]
    with torch.no_grad(), FakeTensorMode():
        fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda:0") for t in tensors]
        aot_function(function, fw_compiler=compiler)(*fakes)

make = Maker(torch.bfloat16, torch.channels_last)
for info in OP_INFOS.values():
    for sample in (*info.typical, info.samples[-1], info.large):
        if info.takes(sample, make.dtype) and 0 not in sample.shape:  # which launches nothing
            for operator, args in operator_calls(info, info.inputs(sample, make), "triton", run=False):
                if operator != "sgd_step":
                    trace(operator, args)
# As if built without CUDA, where "auto" takes Triton.
_library.KERNELS = frozenset(kernel for kernel in _library.KERNELS if kernel[1] != "CUDA")
with FakeTensorMode():
    x = torch.empty(2, 16, 9, 9, dtype=torch.bfloat16, device="cuda:0")
    choices = {op: backends.select(op, x, None) for op in ops.__all__}
    choices["float64"] = backends.select("max_pool2d", x.double(), None)
print(json.dumps([found, choices]))
"""

# Compiles every operator's kernels for sizes and arguments of one: Triton turns an argument of 1 into a constant, which
# the interpreter does not. Prints the failures, and the kernels that were launched.
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
from alexnet_kernels.op_info import OP_INFOS, Maker, operator_calls

failed = {}
for info in OP_INFOS.values():
    for sample in info.ones:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            inputs = info.inputs(sample, Maker(torch.float32, memory_format))
            for operator, args in operator_calls(info, inputs, "triton", run=False):
                try:
                    with torch.no_grad():
                        getattr(torch.ops.alexnet_kernels_triton, operator)(*args)
                except Exception as error:
                    while error.__cause__ is not None:
                        error = error.__cause__
                    failed.setdefault(operator, []).append(f"{sample.id}: {type(error).__name__}: {error}")
print(json.dumps([failed, sorted(done)]))
"""


def run(code: str, cwd: Path, **variables: str) -> str:
    """The standard output of a Python process in which Triton compiles its kernels."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **variables}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_compile_sees_through_every_operator(tmp_path: Path) -> None:
    found, choices = json.loads(run(TRACE, tmp_path))
    traced = {name for name in found if not name.endswith((" written", " largest"))}
    # sgd_step launches one kernel with tuples of tensors, which torch.compile can't hold.
    assert traced == set(CONTRACTS) - {"sgd_step"}
    for name in traced:
        assert all(targets == ["triton_kernel_wrapper_functional"] for targets in found[name]), name
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
    from alexnet_kernels.triton._common import on_its_device

    modules = [value for name, value in sys.modules.items() if name.startswith("alexnet_kernels.triton.")]
    values = [value for module in modules for value in vars(module).values()]
    operators = [value for value in values if isinstance(value, torch.library.CustomOpDef)]
    assert {operator._name for operator in operators} == set(CONTRACTS)
    guarded = on_its_device(print).__code__
    assert {operator._name for operator in operators if operator._init_fn.__code__ is not guarded} == set()


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
    @pytest.fixture(scope="class")
    def printed(self, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
        """The output of a process without the interpreter: whether the package imports Triton, and an error."""
        code = """
import sys
import torch
from alexnet_kernels import ops
print("alexnet_kernels.triton" in sys.modules)
try:
    ops.max_pool2d(torch.zeros(1, 1, 5, 5), backend="triton")
except ValueError as error:
    print(error)
"""
        return run(code, tmp_path_factory.mktemp("choice")).splitlines()

    def test_on_the_cpu_without_the_interpreter(self, printed: list[str]) -> None:
        expected = "max_pool2d: backend 'triton' needs tensors on a GPU, but the input is on cpu (TRITON_INTERPRET=1 "
        assert printed[1].startswith(expected)

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

    def test_the_package_does_not_import_triton_unasked(self, printed: list[str]) -> None:
        assert printed[0] == "False"

    def test_environment_and_context(self, tmp_path: Path) -> None:
        code = "from alexnet_kernels import backends; print(backends.get_backend())"
        assert run(code, tmp_path, ALEXNET_KERNELS_BACKEND="triton").strip() == "triton"


@interpreted
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("op", [i.name for i in OP_INFOS.values() if i.on_images and "weight" not in i.wrt])
def test_the_size_of_programs_changes_no_bit(op, memory_format, monkeypatch) -> None:
    from alexnet_kernels.triton import _config

    info = OP_INFOS[op]
    x = torch.randn(2, 24, 5, 7).contiguous(memory_format=memory_format)

    def run(block: int) -> tuple[torch.Tensor, torch.Tensor]:
        for name in ("VECTORS", "SCALARS"):
            monkeypatch.setattr(_config, name, _config.Launch(block=block))
        leaf = x.clone().requires_grad_()
        out = info.op(**info.on_images(leaf), backend="triton")
        out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
        return out.detach(), leaf.grad

    for small, large in zip(run(16), run(1024), strict=True):
        assert torch.equal(small, large)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OP_INFOS)
def test_the_launch_constants_that_ship(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests run larger programs, which the interpreter executes faster."""
    from alexnet_kernels.triton import _config

    info = OP_INFOS[op]
    for name, value in interpreter.SHIPPED.items():
        monkeypatch.setattr(_config, name, value)
    for sample in info.typical:
        if info.takes(sample, dtype):
            case = Case(info, sample, Setting("triton", "cpu", dtype, torch.channels_last))
            check(case, expected(info, case.inputs()))


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
