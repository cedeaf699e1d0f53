"""The kernels for tensor cores: what ptxas made of wgmma, their machine code, and the prediction of their times."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import benchmark

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*_sm90a.cu"))

budget, resources, ptxas = benchmark("convolution_budget"), benchmark("cuda_resources"), benchmark("ptxas")
cuda_budget, cubin = benchmark("cuda_budget"), benchmark("cubin")
needs_nvcc = pytest.mark.skipif(
    ptxas.find_nvcc() is None or cubin.find_cuobjdump() is None or shutil.which("c++filt") is None,
    reason="needs nvcc, cuobjdump and c++filt",
)

# A warpgroup that adds four products to its accumulators in each step.
REGISTERS = ", ".join(f"%{i}" for i in range(32))
OPERANDS = ", ".join(f'"+f"(sum[{i}])' for i in range(32))
KERNEL = """
#include "hopper.cuh"

namespace alexnet_kernels::cuda {
namespace {
template <int kProducts>
__global__ void __launch_bounds__(kWarpgroup)
    multiply(const __grid_constant__ TensorMap map, uint64_t a, uint64_t b, int steps, float* out) {
  unsigned char* shared = dynamic_shared();
  Barrier* barrier = reinterpret_cast<Barrier*>(shared);
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  if (threadIdx.x == 0) {
    init(barrier, 1);
    publish_barriers();
  }
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0) {
      arrive_and_expect(barrier, 16384);
      load_box(shared + 1024, map, barrier, step, 0, 0, 0, 0);
    }
    wait(barrier, step % 2);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {REGISTERS}, %32, %33, 1, 1, 1, 0, 0;"
                   : OPERANDS : "l"(a + 2 * i), "l"(b + 2 * i));
      TOUCH
    }
    wgmma_commit();
    wgmma_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) reinterpret_cast<float4*>(out)[threadIdx.x * 8 + i] = *(float4*)(sum + 4 * i);
}
}  // namespace

void launch(const TensorMap& map, float* out) {
  multiply<4><<<1, kWarpgroup>>>(map, 0, 0, 3, out);
}
}  // namespace alexnet_kernels::cuda
""".replace("REGISTERS", REGISTERS).replace("OPERANDS", OPERANDS)


@needs_nvcc
class TestSerialised:
    """ptxas waits for each product where other instructions touch its accumulators."""

    def build(self, tmp_path: Path, touch: str) -> tuple[list[str], list]:
        """What ptxas says of wgmma, and the kernels."""
        source, output = tmp_path / "planted_sm90a.cu", tmp_path / "planted.cubin"
        source.write_text(KERNEL.replace("TOUCH", touch))
        said = ptxas.compile_cubin(source, output)
        return ptxas.serialised(said), resources.inspect(output, cubin.find_cuobjdump())

    def test_products_that_overlap(self, tmp_path: Path) -> None:
        lines, kernels = self.build(tmp_path, "")
        assert lines == []
        assert resources.faults(kernels) == []
        (kernel,) = kernels
        assert (kernel.source, kernel.title, kernel.arch) == ("planted_sm90a.cu", "multiply<4>", "sm_90a")
        assert kernel.matrix["HGMMA.64x64x16"] % 4 == 0
        assert kernel.overlapped == kernel.matrix["HGMMA.64x64x16"] * 3 / 4  # all but the last of each four
        assert kernel.matrix["UTMALDG"] >= 1
        assert kernel.matrix["SYNCS"] >= 3

    @pytest.mark.parametrize(
        ("touch", "told"),
        [
            ("sum[i] += 1;", "warpgroup.wait is injected"),
            ("out[i] = sum[i];", "wgmma.mma_async instructions are serialized"),
        ],
        ids=["written", "read"],
    )
    def test_products_that_are_waited_for(self, touch: str, told: str, tmp_path: Path) -> None:
        lines, kernels = self.build(tmp_path, touch)
        assert any(told in line for line in lines)
        (fault,) = resources.faults(kernels)
        assert fault.endswith("it waits for every HGMMA before the next (serialised)")

    @pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
    def test_the_package_s_products_overlap(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "out.cubin"
        assert ptxas.serialised(ptxas.compile_cubin(source, output)) == []
        kernels = resources.inspect(output, cubin.find_cuobjdump())
        assert any(kernel.has("HGMMA") for kernel in kernels)
        assert resources.faults(kernels) == []
        for kernel in kernels:
            if shape := re.search(r"Shape<(\d+)", " ".join(kernel.arguments)):
                warpgroups = int(shape[1])
                if warpgroups > 2:
                    # setmaxnreg moves registers of a pool, those that the launch gives to all threads.
                    assert kernel.registers == 65536 // (128 * (warpgroups + 1)) // 8 * 8, kernel.title


class TestPrediction:
    """Numbers computed by hand."""

    def launch(self, **changes: object) -> object:
        """264 tiles: two for each multiprocessor."""
        layer = budget.Layer("layer", 128, 15, 13, 64, 192, 1, 3)
        given = {"layer": layer, "way": "wgmma", "tiles": 264, "rows": 128, "columns": 96, "terms": 160}
        return budget.Launch(**(given | {"tile_bytes": 1000} | changes))

    def test_products_take_half_a_clock_for_each_column_of_64_rows_and_16_terms(self) -> None:
        # Two products of 64 rows for each 16 terms, 48 clocks each; 2 tiles.
        clocks = 2 * 2 * 10 * 48
        assert self.launch().tensor_us == pytest.approx(clocks / 1755)
        assert self.launch(way="mma").tensor_us == pytest.approx(clocks / 1755 / 0.62)

    @pytest.mark.parametrize(("tiles", "most"), [(1, 1), (132, 1), (133, 2), (264, 2), (265, 3)])
    def test_the_busiest_multiprocessor_counts(self, tiles: int, most: int) -> None:
        assert self.launch(tiles=tiles).tensor_us == pytest.approx(most * 960 / 1755)

    def test_copies(self) -> None:
        assert self.launch().l2_us == pytest.approx(264 * 1000 / 5.5e6)
        resident = self.launch(block_bytes=500)
        assert resident.l2_bytes == 264 * 1000 + 132 * 500
        assert self.launch(tiles=3, block_bytes=500).l2_bytes == 3 * 1500

    def test_the_longest_binds(self) -> None:
        launch = self.launch()
        x, w, y = 128 * 15 * 15 * 64, 192 * 9 * 64, 128 * 13 * 13 * 192
        assert launch.layer.bytes == 2 * (x + w + y)
        times = launch.times("H100")
        assert times["DRAM"] == pytest.approx(2 * (x + w + y) / 3e6)
        assert launch.times("H200")["DRAM"] == pytest.approx(2 * (x + w + y) / 4.3e6)
        assert launch.binds("H100") == "DRAM"
        assert launch.us("H100") == times["DRAM"]
        assert self.launch(tile_bytes=10**6).binds("H100") == "L2"
        assert self.launch(terms=16000).binds("H100") == "tensor cores"

    def test_what_the_definition_asks_for(self) -> None:
        # A tile of 128 x 96 for half as many pixels, and half of the multiprocessors.
        layer = budget.Layer("layer", 66, 8, 8, 16, 96, 1, 1)
        launch = budget.Launch(layer, "wgmma", 66, 128, 96, 16, 0)
        assert launch.useful == pytest.approx(0.25)


class TestTiles:
    def test_layers_are_alexnet_s(self) -> None:
        """In blocks of 4 x 4 pixels, conv1 has 48 channels and 3 x 3 taps."""
        assert budget.layer("conv1") == budget.Layer("conv1", 128, 57, 55, 48, 96, 1, 3)
        assert budget.layer("conv2") == budget.Layer("conv2", 128, 27, 27, 48, 128, 2, 5)
        assert budget.layer("conv5") == budget.Layer("conv5", 128, 13, 13, 192, 128, 2, 3)

    def test_of_wgmma(self) -> None:
        conv2 = budget.wgmma(budget.layer("conv2"), (1, 9, 27), 256, 128, 48)
        assert conv2.tiles == 128 * 3 * 2  # images, boxes of 9 rows, groups
        assert conv2.terms == 25 * 48
        assert conv2.tile_bytes == 2 * 48 * (13 * 31 + 25 * 128)
        assert conv2.tensor_us == pytest.approx(6 * 4 * 75 * 64 / 1755)  # 6 tiles of 4 x 75 products of 64 clocks
        conv3 = budget.wgmma(budget.layer("conv3"), (1, 13, 13), 192, 192, 64)
        assert (conv3.tiles, conv3.terms, conv3.block_bytes) == (128 * 2, 9 * 256, 0)
        assert conv3.tile_bytes == 4 * 2 * 64 * (15 * 15 + 9 * 192)
        conv4 = budget.wgmma(budget.layer("conv4"), (1, 13, 13), 192, 192, 64)
        assert (conv4.tiles, conv4.terms) == (128 * 2, 9 * 192)

    def test_of_wgmma_with_resident_filters(self) -> None:
        conv1 = budget.wgmma(budget.layer("conv1"), (2, 11, 11), 256, 96, 48, resident=True)
        assert conv1.tiles == 64 * 5 * 5
        assert conv1.tile_bytes == 2 * 48 * 2 * 13 * 13
        assert conv1.block_bytes == 2 * 48 * 9 * 96

    def test_of_mma(self) -> None:
        conv4 = budget.mma(budget.layer("conv4"), 96)
        assert conv4.tiles == 169 * 2 * 2  # of 128 pixels; groups; 96 filters
        assert (conv4.terms, conv4.tile_bytes) == (1728, 2 * 1728 * (128 + 96))
        assert budget.mma(budget.layer("conv2"), 128).terms == 1216  # 37.5 chunks of 32

    def test_input_gradients(self) -> None:
        conv2 = budget.mirrored(budget.Layer("layer", 2, 8, 6, 16, 96, 2, 3))
        assert conv2 == budget.Layer("layer", 2, 6, 8, 96, 16, 2, 3)
        assert (conv2.products, conv2.bytes) == (
            2 * 64 * 2 * 9 * 16 * 96,
            2 * (2 * 2 * (36 * 96 + 64 * 16) + 2 * 9 * 1536),
        )

    def test_filter_gradients_of_wgmma(self) -> None:
        # 75 units of 16 channels of a tap in blocks of 16; 128 x 3 boxes, 30 of them in the largest of 13 splits.
        conv2 = budget.weight_wgmma(budget.layer("conv2"), (1, 9, 27), 3, 16, 128, 13)
        assert conv2.tiles == 5 * 2 * 13
        assert (conv2.rows, conv2.columns, conv2.terms) == (256, 128, 30 * 256)
        assert conv2.tile_bytes == 30 * 2 * (48 * 11 * 31 + 243 * 128)
        assert conv2.sums_us == pytest.approx(13 * 256 * 1200 * 8 / 5.5e6)
        assert conv2.us("H100") == pytest.approx(conv2.tensor_us + conv2.sums_us)
        conv4 = budget.weight_wgmma(budget.layer("conv4"), (1, 13, 13), 1, 12, 192, 7)
        assert (conv4.tiles, conv4.terms) == (3 * 3 * 2 * 7, 19 * 176)  # taps in threes, 64 channels each

    def test_filter_gradients_of_mma(self) -> None:
        conv5 = budget.weight_mma(budget.layer("conv5"), 128, 9)
        assert (conv5.tiles, conv5.terms) == (14 * 2 * 9, 76 * 32)  # 676 chunks of 32 pixels
        assert conv5.sums_us == pytest.approx(9 * 256 * 1728 * 8 / 5.5e6)

    def test_every_layer_has_both_ways(self) -> None:
        names = [launch.name for launch in budget.launches()]
        directions = [f"conv{i}, {direction}" for i in range(1, 6) for direction in cuda_budget.DIRECTIONS.values()]
        directions.remove("conv1, input gradient")
        assert sorted(names) == sorted(f"{first}, {way}" for first in directions for way in cuda_budget.WAYS)

    def test_they_are_the_kernels(self) -> None:
        """As far as launches and template arguments tell."""
        pytest.importorskip("emulation")
        sources = ("_sm80.cu", "_sm90a.cu")
        recorded = {one.name: one for one in cuda_budget.convolutions() if one.source.endswith(sources)}
        for launch in budget.launches():
            found = recorded[launch.name]
            numbers = list(map(int, re.findall(r"\d+", found.kernel.partition("bf16")[2])))
            if launch.way == "mma":
                assert (found.blocks, numbers[0]) == (launch.tiles, launch.columns), launch.name
            elif launch.direction == budget.FILTER:
                warpgroups, units, columns = numbers  # of 16 channels, for a warp
                assert (64 * warpgroups * units, columns) == (launch.rows, launch.columns), launch.name
                assert found.blocks == launch.tiles, launch.name
            else:
                assert (64 * numbers[0], numbers[1]) == (launch.rows, launch.columns), (
                    launch.name
                )  # warpgroups, columns
                assert found.blocks == min(launch.tiles, budget.MULTIPROCESSORS), launch.name

    def test_the_report(self) -> None:
        launch = cuda_budget.Recorded(
            "conv3", "forward", "wgmma", "conv2d_relu_sm90a.cu", "convolve<bf16>", 132, 512, 200000
        )
        kernel = resources.Kernel("conv2d_relu_sm90a.cu", "convolve", ["bf16"], "sm_90a", 128, 0, 0, 0)
        lines = budget.markdown([launch], [kernel])
        assert "| conv3, forward, wgmma | `convolve<bf16>` | 132 x 512 | 128 | 200000 B |" in lines
        (conv3,) = [line for line in lines if line.startswith("| conv3, forward, wgmma | 256 |")]
        assert conv3.startswith(
            "| conv3, forward, wgmma | 256 | 192 x 192 x 2304 | 47.3 | 85% | 46.5 | 9.8 / 6.9 | 0.0 | 47.3 / 47.3 |"
        )


class TestRecording:
    """The budgets count the library's convolution; the kernels of the package's own are recorded apart."""

    SCHEMA = torch._C.parse_schema("conv(Tensor x, int groups=1, bool relu=True, int algorithm=0) -> Tensor")

    def test_the_algorithm_is_given(self) -> None:
        for args in (("x",), ("x", 1, True), ("x", 1, True, 1)):
            assert cuda_budget.with_algorithm(self.SCHEMA, args, 3) == ("x", 1, True, 3)
        assert cuda_budget.with_algorithm(self.SCHEMA, ("x", 2, False, 1), 0) == ("x", 2, False, 0)

    def test_other_operators_stay_as_they_are(self) -> None:
        args = ("x", 1)
        schema = torch._C.parse_schema("pool(Tensor x, int size) -> Tensor")
        assert cuda_budget.with_algorithm(schema, args, 0) is args

    def test_the_package_s_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = type("Layer", (), {"name": "conv3"})
        calls = [(None, layer, "bfloat16", "conv", ("x", 1, True, 0)), (None, layer, "bfloat16", "backward", ("x",))]
        monkeypatch.setattr(cuda_budget, "DIRECTIONS", {"conv": "forward"})
        monkeypatch.setattr(cuda_budget, "operators", lambda only: iter(calls))
        backward = torch._C.parse_schema("backward(Tensor x) -> Tensor")
        monkeypatch.setattr(cuda_budget, "schema_of", {"conv": self.SCHEMA, "backward": backward}.get)
        names = {2: ("a_sm80.cu", "convolve", ("bf16", "96")), 3: ("a_sm90a.cu", "convolve", ("bf16",))}
        monkeypatch.setattr(cuda_budget, "emulated_kernels", lambda: names)

        def recorded(operator: str, args: Sequence[object]) -> tuple[None, list[tuple]]:
            return None, [(args[-1], [8, 1, 1], [128, 1, 1], 1000 * args[-1], b"")]

        monkeypatch.setattr(cuda_budget, "recorded", recorded)
        assert cuda_budget.convolutions() == [
            cuda_budget.Recorded("conv3", "forward", "mma", "a_sm80.cu", "convolve<bf16, 96>", 8, 128, 2000),
            cuda_budget.Recorded("conv3", "forward", "wgmma", "a_sm90a.cu", "convolve<bf16>", 8, 128, 3000),
        ]
