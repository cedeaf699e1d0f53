"""The build and its products: symbols, wheels, source distributions, other releases of torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

import alexnet_kernels
from alexnet_kernels import _library, _sources, ops
from alexnet_kernels._dispatch.contracts import public_ops
from alexnet_kernels.op_info import OP_INFOS, Maker, operator_calls

ROOT = Path(__file__).parent.parent


def symbols(*options: str) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "-C", *options, str(_library.PATH)], capture_output=True, text=True, check=True
    ).stdout
    return [line.split(maxsplit=1)[-1].removeprefix("U ").strip() for line in listing.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
class TestSymbols:
    def test_torch_is_reached_through_its_c_functions_only(self) -> None:
        needed = symbols("--undefined-only")
        assert any("torch_call_dispatcher" in name for name in needed)
        unstable = [name for name in needed if re.search(r"\b(at|c10|torch|caffe2)::", name)]
        assert unstable == []

    def test_no_python_and_no_cuda_library_is_needed(self) -> None:
        """The driver's functions (cu...) and the runtime's are found at run time, or linked statically."""
        needed = symbols("--undefined-only")
        assert [name for name in needed if re.match(r"_?Py|__cuda|cuda|cu[A-Z]|nvrtc", name)] == []
        assert [name for name in needed if "cuTensorMap" in name] == []

    @pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
    def test_only_torch_and_the_system_s_libraries_are_loaded(self) -> None:
        command = ["readelf", "--dynamic", "--wide", str(_library.PATH)]
        listing = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"})
        libraries = {name.partition(".so")[0] for name in re.findall(r"\(NEEDED\).*\[(.*)\]", listing.stdout)}
        assert libraries >= {"libtorch", "libtorch_cpu", "libstdc++"}
        system = {"libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
        loader = {name for name in libraries if name.startswith("ld-linux")}
        assert libraries <= {"libtorch", "libtorch_cpu"} | system | loader

    def test_nothing_of_torch_is_exported(self) -> None:
        defined = [name for name in symbols("--defined-only") if re.search(r" ?\b(at|c10|torch)::", name)]
        assert defined == []


# Runs under another torch: the forward pass of every op, on given tensors.
ELSEWHERE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
op = torch.ops.alexnet_kernels
calls = torch.load(sys.argv[2], weights_only=True)
results = {name: getattr(op, name)(*args) for name, args in calls.items()}
torch.save({"torch": str(torch.__version__), "results": results}, sys.argv[3])
"""


def every_op() -> dict[str, tuple]:
    """Arguments of every operator of the library that returns something, forward and backward."""
    make = Maker(memory_format=torch.channels_last)
    calls = {}
    for info in OP_INFOS.values():
        for sample in info.typical if info.name != "sgd_step" else ():
            calls |= dict(operator_calls(info, info.inputs(sample, make), "cpu"))
    return calls


def test_one_build_loads_in_another_torch(tmp_path: Path) -> None:
    other = os.environ.get("ALEXNET_KERNELS_OTHER_PYTHON")
    if other is None:
        pytest.skip("ALEXNET_KERNELS_OTHER_PYTHON names no interpreter with another torch")
    calls = every_op()
    torch.save(calls, tmp_path / "calls.pt")
    command = [other, "-c", ELSEWHERE, str(_library.PATH), str(tmp_path / "calls.pt"), str(tmp_path / "results.pt")]
    subprocess.run(command, check=True, cwd=tmp_path)
    there = torch.load(tmp_path / "results.pt", weights_only=True)
    assert there["torch"] != str(torch.__version__)
    for name, args in calls.items():
        here = getattr(torch.ops.alexnet_kernels, name)(*args)
        torch.testing.assert_close(there["results"][name], here, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def installed() -> Distribution:
    try:
        return distribution("alexnet_kernels")
    except PackageNotFoundError:
        pytest.skip("the package is not installed, but imported from its source tree")


class TestMetadata:
    def test_torch_has_a_lower_bound_only(self, installed: Distribution) -> None:
        requirements = [r for r in installed.requires or [] if "extra" not in r]
        assert [r for r in requirements if r.startswith("torch")] == ["torch>=2.11"]
        assert all("==" not in r and "<" not in r for r in requirements)

    def test_typed_and_complete(self) -> None:
        package = Path(alexnet_kernels.__file__).parent
        assert (package / "py.typed").exists()
        assert (package / "data" / "cifar10_small.zip").stat().st_size > 1_000_000

    def test_version(self, installed: Distribution) -> None:
        assert alexnet_kernels.__version__ == installed.version


def test_source_distribution_holds_the_sources(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    result = subprocess.run([*command, "--formats=gztar"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True, check=True).stdout
    for path in ("csrc/library.cpp", "csrc/cpu/vec.h", "csrc/cpu/max_pool2d.cpp", "setup.py", "LICENSE", "MANIFEST.in"):
        assert f"/{path}\n" in names
    for path in (ROOT / "native_build").glob("*.*"):
        assert f"/native_build/{path.name}\n" in names
    assert "/alexnet_kernels/data/cifar10_small.zip\n" in names
    assert "_C.so" not in names


def test_the_library_tells_its_sources() -> None:
    status = _library.status()
    assert status["sources"] == _sources.digest(ROOT / "csrc")
    assert bool(status["archs"]) == status["cuda_built"]


def test_ops_of_the_library_are_the_package_s() -> None:
    assert set(public_ops()) == set(ops.__all__)
    assert {op for op, key in _library.KERNELS if key == "CPU"} >= set(ops.__all__)
