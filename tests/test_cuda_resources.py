"""benchmarks/cuda_resources.py: resources of the built CUDA kernels, and whether the committed report agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import benchmark

from alexnet_kernels import _library, ops

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cuda_resources.py"
COMMITTED = SCRIPT.parent / "results" / "cuda_resources.json"


cuda_resources = benchmark("cuda_resources")
needs_kernels = pytest.mark.skipif(
    ("max_pool2d", "CUDA") not in _library.KERNELS
    or cuda_resources.find_cuobjdump() is None
    or shutil.which("c++filt") is None,
    reason="needs a library built with CUDA, cuobjdump and c++filt",
)


@pytest.fixture(scope="module")
def kernels() -> list:
    return cuda_resources.inspect(_library.PATH, cuda_resources.find_cuobjdump())


@needs_kernels
class TestKernels:
    def test_none_spills_and_vectors_move_16_bytes(self, kernels: list) -> None:
        assert cuda_resources.faults(kernels) == []

    def test_every_operator_has_some(self, kernels: list) -> None:
        sources = {kernel.source for kernel in kernels}
        assert {f"{op}.cu" for op in ops.__all__} <= sources | {"headers"}

    def test_every_one_leaves_room_for_a_quarter_of_the_threads(self, kernels: list) -> None:
        # 65,536 registers for 512 of a multiprocessor's 2,048 threads.
        assert [kernel.title for kernel in kernels if kernel.registers > 128] == []

    def test_the_committed_report_names_them_all(self, kernels: list) -> None:
        committed = json.loads(COMMITTED.read_text())["kernels"]
        archs = {kernel.arch for kernel in kernels}
        named = {(k["source"], k["name"], *k["arguments"]) for k in committed if k["arch"] in archs}
        assert named == {(k.source, k.name, *k.arguments) for k in kernels}
        assert not any(k["stack"] or k["local"] or k["local_accesses"] for k in committed)


class TestFaults:
    def kernel(self, **changes: object) -> object:
        given = {"source": "max_pool2d.cu", "name": "pool_forward", "arguments": ["bf16", "8"], "arch": "sm_90"}
        sizes = {"registers": 40, "stack": 0, "local": 0, "shared": 0}
        accesses = {"loads": {"128": 3}, "stores": {"128": 1}}
        return cuda_resources.Kernel(**(given | sizes | accesses | changes))

    def test_a_sound_kernel_has_none(self) -> None:
        assert cuda_resources.faults([self.kernel()]) == []
        assert cuda_resources.faults([self.kernel(arguments=["bf16", "1"], loads={"16": 1}, stores={"16": 1})]) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"stack": 16}, "16 bytes of stack"),
            ({"local_accesses": 2}, "2 instructions on it"),
            ({"stores": {"64": 2}}, "no 128-bit store"),
            ({"loads": {"16": 8}}, "no 128-bit load"),
        ],
        ids=["stack", "spill", "store", "load"],
    )
    def test_each_is_told(self, changes: dict, text: str) -> None:
        (fault,) = cuda_resources.faults([self.kernel(**changes)])
        assert fault.startswith("pool_forward<bf16, 8> of max_pool2d.cu on sm_90: ")
        assert text in fault

    def test_names(self) -> None:
        mangled = "_ZN15alexnet_kernels4cuda49_GLOBAL__N__38cd27c8_10_augment_cu_5b1c5681_20996x"
        plain = "void alexnet_kernels::cuda::(anonymous namespace)::augment_images<c10::Half, 8>(X, int, c10::Half*)"
        assert cuda_resources.parse_name(mangled, plain) == ("augment.cu", "augment_images", ["fp16", "8"])
        digits = mangled.replace("38cd27c8", "38042708")
        assert cuda_resources.parse_name(digits, plain) == ("augment.cu", "augment_images", ["fp16", "8"])
        plain = "void alexnet_kernels::cuda::lrn_bases<(bool)1, float>(alexnet_kernels::cuda::ImageLayout, float*)"
        assert cuda_resources.parse_name("_Z1x", plain) == ("headers", "lrn_bases", ["1", "fp32"])


def test_a_library_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cuda_resources.main(["--library", str(tmp_path / "none.so")])
    assert "none.so does not exist" in capsys.readouterr().err or cuda_resources.find_cuobjdump() is None
