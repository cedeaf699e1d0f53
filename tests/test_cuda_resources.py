"""benchmarks/cuda_resources.py: resources of the built CUDA kernels, and whether the committed report agrees."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from helpers import benchmark

from alexnet_kernels import _library, ops

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cuda_resources.py"
COMMITTED = SCRIPT.parent / "results" / "cuda_resources.json"


cuda_resources, cuda_budget = benchmark("cuda_resources"), benchmark("cuda_budget")
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
        # 65,536 registers for 512 of a multiprocessor's 2,048 threads. Warpgroups hold large accumulators instead.
        wide = [kernel for kernel in kernels if kernel.registers > 128]
        assert [kernel.title for kernel in wide if not kernel.has("HGMMA")] == []

    def test_the_committed_report_names_them_all(self, kernels: list) -> None:
        committed = json.loads(COMMITTED.read_text())["kernels"]
        archs = {kernel.arch for kernel in kernels}
        named = {(k["source"], k["name"], *k["arguments"]) for k in committed if k["arch"] in archs}
        assert named == {(k.source, k.name, *k.arguments) for k in kernels}
        assert not any(k["stack"] or k["local"] or k["local_accesses"] for k in committed)


@pytest.fixture(scope="module")
def budgets() -> list:
    pytest.importorskip("emulation")
    code = cuda_budget.Code(_library.PATH, cuda_resources.find_cuobjdump())
    if not code.functions:
        pytest.skip("the library has no machine code for compute capability 9.0")
    return list(cuda_budget.budgets(code))


@needs_kernels
class TestBudgets:
    def test_none_has_grown(self, budgets: list) -> None:
        committed = json.loads(COMMITTED.read_text())
        if committed["compiler"] != cuda_resources.compiler():
            pytest.skip(f"the report is of {committed['compiler']}, whose machine code differs")
        assert cuda_budget.faults(budgets, committed["budgets"]) == []

    def test_every_op_has_some(self, budgets: list) -> None:
        assert {budget.op for budget in budgets} == set(ops.__all__)

    def test_vectors_of_a_known_layer(self, budgets: list) -> None:
        (budget,) = (b for b in budgets if b.name == "local_response_norm, layer 1, bfloat16")
        assert budget.vectors == 128 * 96 * 55 * 55 / 8
        assert budget.bytes == 2 * 2 * 128 * 96 * 55 * 55
        assert budget.memory_us["H100"] == pytest.approx(budget.bytes / 3e6, rel=1e-3)
        (launch,) = budget.launches
        # 30 of 32 lanes store a vector.
        assert launch.blocks == -(-budget.vectors // (30 * 8))
        assert launch.instructions == pytest.approx(launch.warp * 32 / 30, rel=1e-3)


class TestBudgetFaults:
    def budget(self, **changes: object) -> object:
        given = {"source": "max_pool2d.cu", "kernel": "pool_forward<bf16, 8, true>", "blocks": 10, "threads": 256}
        given |= {"warp": 700.0, "instructions": 170.0, "special": 0.5, "mix": {"integer": 170.0}}
        times = {"issue_us": 24.5, "pipe": "ALU", "pipe_us": 28.2}
        launch = cuda_budget.Launch(**(given | times | changes))
        memory = {"H100": 33.7, "H200": 23.5}
        return cuda_budget.Budget("max_pool2d", "max_pool2d", "layer 1", "bfloat16", 9, 1e8, memory, [launch])

    def committed(self) -> list[dict]:
        return [dataclasses.asdict(self.budget())]

    @pytest.mark.parametrize("instructions", [100.0, 170.0, 178.4])
    def test_growth_up_to_a_twentieth_is_none(self, instructions: float) -> None:
        assert cuda_budget.faults([self.budget(instructions=instructions)], self.committed()) == []

    def test_growth_of_six_percent_is_told(self) -> None:
        (fault,) = cuda_budget.faults([self.budget(instructions=180.2)], self.committed())
        assert fault.startswith(
            "max_pool2d, layer 1, bfloat16: pool_forward<bf16, 8, true> executes 180.2 instructions"
        )
        assert "170.0 in the report" in fault
        assert "python benchmarks/cuda_resources.py" in fault

    def test_what_the_report_lacks_is_told(self) -> None:
        (fault,) = cuda_budget.faults([self.budget(kernel="pool_forward_rows<bf16>")], self.committed())
        assert "lacks its launches, pool_forward_rows<bf16>" in fault
        (fault,) = cuda_budget.faults([self.budget()], [])
        assert "lacks its launches" in fault

    def test_what_binds(self) -> None:
        assert self.budget().binds("H100") == "memory"
        assert self.budget().binds("H200") == "ALU"
        assert self.budget(issue_us=40.0).binds("H100") == "issue"


WGMMA = {"source": "conv2d_relu_sm90a.cu", "name": "convolve", "arguments": ["bf16"], "arch": "sm_90a"}
WGMMA |= {"matrix": {"HGMMA.64x96x16": 12, "UTMALDG": 2, "SYNCS": 9}, "overlapped": 8, "loads": {"16": 2}}
MMA = {"source": "conv2d_relu_sm80.cu", "name": "convolve", "arguments": ["bf16", "96", "true"]}
MMA |= {"matrix": {"HMMA.16816": 64, "LDGSTS.128": 15}, "loads": {"32": 4}}
FLOAT = {"arguments": ["fp32", "96", "true"], "stores": {"64": 8}}
ELEMENTS = {"arguments": ["bf16", "64", "false"], "matrix": {"HMMA.16816": 64}, "stores": {"16": 8}}


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

    def test_kernels_for_tensor_cores_without(self) -> None:
        """TMA and cp.async load for them; in float the accumulators' pairs are stored."""
        for changes in (WGMMA, MMA, MMA | FLOAT, MMA | ELEMENTS):
            assert cuda_resources.faults([self.kernel(**changes)]) == []
        by_tma = WGMMA | {"matrix": WGMMA["matrix"] | {"UTMASTG": 1}, "stores": {}}
        assert cuda_resources.faults([self.kernel(**by_tma)]) == []

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            (WGMMA | {"matrix": {"UTMALDG": 2}}, "no HGMMA"),
            (WGMMA | {"matrix": {"HGMMA.64x96x16": 12}, "loads": {"128": 1}}, "no UTMALDG"),
            (WGMMA | {"source": "other.cu", "matrix": {"HGMMA.64x96x16": 9}, "loads": {"128": 1}}, "no UTMALDG"),
            (WGMMA | {"overlapped": 0}, "it waits for every HGMMA before the next"),
            (WGMMA | {"local": 8}, "8 of local memory"),
            (WGMMA | {"stores": {"16": 2}}, "no 128-bit store"),
            (MMA | {"matrix": {"LDGSTS.128": 15}}, "no HMMA"),
            (MMA | {"matrix": {"HMMA.16816": 64, "LDGSTS.32": 15}}, "no 128-bit load"),
            (MMA | FLOAT | {"stores": {"32": 8}}, "no 64-bit store"),
        ],
    )
    def test_each_of_tensor_cores_is_told(self, changes: dict, text: str) -> None:
        (fault,) = cuda_resources.faults([self.kernel(**changes)])
        assert text in fault

    @pytest.mark.parametrize(
        ("instruction", "key"),
        [
            (("HGMMA", ".64x96x16.F32.BF16"), "HGMMA.64x96x16"),
            (("HMMA", ".16816.F32.BF16"), "HMMA.16816"),
            (("LDGSTS", ".E.BYPASS.LTC128B.128.ZFILL"), "LDGSTS.128"),
            (("LDGSTS", ".E"), "LDGSTS.32"),
            (("UTMALDG", ".5D"), "UTMALDG"),
            (("SYNCS", ".ARRIVE.TRANS64"), "SYNCS"),
        ],
    )
    def test_instructions_are_counted_by_shape(self, instruction: tuple[str, str], key: str) -> None:
        assert cuda_resources.matrix_key(*instruction) == key

    def test_the_report_has_a_table_of_them(self) -> None:
        kernels = [self.kernel(**WGMMA), self.kernel(**MMA), self.kernel()]
        text = cuda_resources.markdown(kernels, [], [], "nvcc")
        row = "| `convolve<bf16>` | sm_90a | 40 | 12 HGMMA.64x96x16 | 8 | 2 UTMALDG, 9 SYNCS |"
        assert row in text.splitlines()
        assert "| `convolve<bf16, 96, true>` | sm_90 | 40 | 64 HMMA.16816 | - | 15 LDGSTS.128 |" in text.splitlines()
        # A kernel of one of the architectures.
        assert "| conv2d_relu_sm90a.cu | `convolve<bf16>` | - / 40 | 2 x 16 | 1 x 128 | 0 B | 0 |" in text.splitlines()

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
