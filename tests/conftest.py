from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from alexnet_kernels import backends

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BACKENDS = {"cpu": ["cpu", "native"], "cuda": ["cuda", "triton", "native"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take `device` on each device, and those that take `backend` on each of its backends.

    Of tests/ops/test_<op>.py, a CUDA backend that the installation lacks is skipped, with the reason.
    """
    op = metafunc.module.__name__.rpartition("test_")[2]

    def on(device: str, *values: str) -> object:
        marks = [pytest.mark.gpu] if device == "cuda" else []
        reason = backends.unavailable(op, values[0]) if device == "cuda" and values else None
        if reason:
            marks.append(pytest.mark.skip(reason=f"{values[0]}: {reason}"))
        return pytest.param(device, *values, id="-".join(values or [device]), marks=marks)

    if "backend" in metafunc.fixturenames:
        pairs = [on(device, backend) for device in DEVICES for backend in BACKENDS[device]]
        metafunc.parametrize(("device", "backend"), pairs)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [on(device) for device in DEVICES])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch allocates without a value holds NaN (or the largest integer) until it is written."""
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
