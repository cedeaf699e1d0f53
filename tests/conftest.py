from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

# A developer's table of choices takes no part, here and in the processes that tests start.
os.environ["ALEXNET_KERNELS_TUNED"] = "0"
os.environ.pop("ALEXNET_KERNELS_CACHE", None)

from platforms import BACKENDS, DEVICES, INTERPRETED, emulation

from alexnet_kernels import backends, ops

if INTERPRETED:
    import interpreter

    interpreter.patch()

# Processes of `pytest -n 2` share the cores: more threads than cores would slow each other down.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# A shell starts background jobs with SIGINT ignored, which the processes of tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Results are compared with float64.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """A benchmark that a test before ran in this process allows TF32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """The module of the emulation, whose settings are restored afterwards."""
    if emulation is None:
        pytest.skip("needs pybind11")
    module = emulation.load()
    yield module
    module.set_recording(False)
    module.set_order(0)
    module.set_device()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="N times as many random arguments, drawn anew")


@pytest.fixture(scope="session")
def fuzz(request: pytest.FixtureRequest) -> int:
    """How many times as many random arguments as usual a test draws."""
    return request.config.getoption("--fuzz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes tests with `device` over the devices, and tests with `backend` over the backends of each device.

    In tests/ops/test_<op>.py, CUDA backends that the installation lacks are skipped with the reason.
    """
    op = metafunc.module.__name__.rpartition("test_")[2]

    def on(device: str, *values: str) -> object:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        reason = backends.unavailable(op, values[0]) if device == "cuda" and values and op in ops.__all__ else None
        if reason:
            marks.append(pytest.mark.skip(reason=f"{values[0]}: {reason}"))
        return pytest.param(device, *values, id="-".join(values or [device]), marks=marks)

    if "backend" in metafunc.fixturenames:
        pairs = [on(device, backend) for device in DEVICES for backend in BACKENDS[device]]
        metafunc.parametrize(("device", "backend"), pairs)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [on(device) for device in DEVICES])


def needs_float64(item: pytest.Item) -> bool:
    dtypes = [v for v in item.callspec.params.values() if isinstance(v, torch.dtype)]
    return item.get_closest_marker("float64") is not None or torch.float64 in dtypes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def impossible(item: pytest.Item) -> bool:
        """Whether the backend can't run it: GPU kernels lack float64, and Triton's interpreter lacks threads."""
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") not in ("cuda", "triton"):
            return False
        interpreted = params["backend"] == "triton" and params["device"] == "cpu"
        return needs_float64(item) or (interpreted and "threads" in item.fixturenames)

    deselected = [item for item in items if impossible(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if not impossible(item)]
    # Files with slow tests first, so that no process starts one last.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes whole files over the processes of `pytest -n 2`, so that each file's fixtures are made once."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            # The many contract tests are split by op.
            return f"{file}::{name.partition('[')[2].partition('-')[0]}" if "test_contract" in file else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def emulated_cuda(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the CPU, backend "cuda" is the emulation; its first test builds it."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    setting = params["case"].setting if "case" in params and hasattr(params["case"], "setting") else None
    device, backend = (setting.device, setting.backend) if setting else (params.get("device"), params.get("backend"))
    if backend == "cuda" and device == "cpu":
        with emulation.emulated():
            yield
    else:
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory of torch holds NaN, or the largest integer."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
