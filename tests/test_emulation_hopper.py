"""The emulation of Hopper's instructions (tests/emulation/hopper.h): results and planted faults."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

np = pytest.importorskip("numpy")
emulation = pytest.importorskip("emulation")
trials = pytest.importorskip("emulation.trials")

ORDERS = range(8)

pytestmark = trials.needs_compiler


@dataclasses.dataclass
class Pipeline:
    """The options of the kernel of hopper_trials.h."""

    bf16: bool = True
    columns: int = 64
    row_bytes: int = 128
    groups: int = 1
    channels: int = 64
    taps: int = 3
    stages: int = 2
    warpgroups: int = 1
    size: tuple[int, int, int, int] = (13, 9, 3, 1)
    box: tuple[int, int, int, int] = (8, 8, 1, 1)
    origin: tuple[int, int, int, int] = (2, 1, 0, 0)
    halves: bool = False

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """Whole numbers, whose products and sums are exact: the input [pixels, channels] and the filters."""
        draw = np.random.default_rng(self.columns + self.channels)
        filled = (self.groups * self.channels + 7) // 8 * 8
        images = draw.integers(-4, 5, (*self.size[::-1], filled)).astype(np.float32)
        filled = (self.channels + 7) // 8 * 8
        filters = draw.integers(-4, 5, (self.groups, self.taps, self.columns, filled)).astype(np.float32)
        filters[..., self.channels :] = np.nan  # beyond the tensor
        return images, filters

    def expected(self, images: np.ndarray, filters: np.ndarray) -> np.ndarray:
        rows = np.indices(self.box[::-1]).reshape(4, -1)[::-1]
        out = np.zeros((self.groups, rows.shape[1], self.columns), np.float32)
        for group, tap in np.ndindex(self.groups, self.taps):
            at = rows + np.reshape(self.origin, (4, 1)) + np.reshape((tap, 0, 0, 0), (4, 1))
            inside = ((at >= 0) & (at < np.reshape(self.size, (4, 1)))).all(0)
            mine = slice(group * self.channels, (group + 1) * self.channels)
            values = images[tuple(at[::-1, inside])][:, mine]
            out[group, inside] += values @ filters[group, tap, :, : self.channels].T
        return out

    def run(self, cuda: ModuleType, fault: str = "none") -> tuple[np.ndarray, np.ndarray]:
        """What the kernel computes, and what it should."""
        images, filters = self.operands()
        expected = self.expected(images, filters)
        out = np.full(expected.shape, -7, np.float32)
        options = [int(v) for value in dataclasses.astuple(self) for v in np.atleast_1d(value)]
        cuda.run_pipeline(fault, np.concatenate([images.ravel(), filters.ravel()]), out, options)
        return out, expected


PIPELINES = [
    Pipeline(columns=columns, row_bytes=row_bytes, bf16=bf16, warpgroups=warpgroups, box=(8, 8, warpgroups, 1))
    for columns, row_bytes, bf16, warpgroups in itertools.product(
        (64, 96, 128, 192), (32, 64, 128), (True, False), (1,)
    )
] + [
    Pipeline(warpgroups=2, stages=3, size=(15, 8, 2, 3), box=(4, 4, 2, 4), origin=(-3, -2, -1, -1)),
    Pipeline(warpgroups=3, stages=4, columns=192, size=(20, 17, 2, 1), box=(24, 8, 1, 1), origin=(-1, 11, 1, 0)),
    Pipeline(warpgroups=1, stages=1, taps=1, channels=16, row_bytes=32),
    Pipeline(groups=2, channels=72, columns=96, row_bytes=64, bf16=False, origin=(-9, -20, 0, 0)),
    Pipeline(groups=3, channels=24, columns=128, row_bytes=128, taps=5, stages=5, origin=(12, 2, -1, 0)),
    Pipeline(groups=2, channels=40, columns=64, row_bytes=128, size=(1, 1, 1, 1), origin=(-2, 0, 0, 0)),
    Pipeline(columns=128, halves=True, warpgroups=2, box=(16, 8, 1, 1), stages=3),
    Pipeline(columns=192, halves=True, row_bytes=64, bf16=False),
    Pipeline(channels=200, stages=3, taps=2, box=(64, 1, 1, 1), size=(61, 2, 2, 2), origin=(0, 1, 1, 1)),
]


class TestPipeline:
    @pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
    def test_results(self, cuda: ModuleType, pipeline: Pipeline) -> None:
        for order in ORDERS:
            cuda.set_order(order)
            out, expected = pipeline.run(cuda)
            np.testing.assert_array_equal(out, expected)


# The error of each fault, in every order.
ERRORS = {
    "wrong parity of empty stages": "does not complete: phase 0 of the barrier at .* waits for 1 of 1 arrivals",
    "no fence": "without wgmma_fence",
    "no fence after a change": "without wgmma_fence",
    "no commit": "products that it did not wait for",
    "no wait for products": "products that it did not wait for",
    "no last wait for products": "products that it did not wait for",
    "change of accumulators under way": "accumulators are changed while a product is under way",
    "change of the left operand under way": "left operand is changed while its product is under way",
    "too few bytes": "more bytes than a phase of the barrier",
    "too many bytes": "does not complete.* waits for 0 of 1 arrivals and for 16 bytes",
    "too few arrivals": "does not complete.* waits for 1 of 129 arrivals and for 0 bytes",
    "too many arrivals": "the block ends in the middle of a phase: .* of 127 arrivals",
    "no publish_barriers": "was not published",
    "no __syncthreads after init": "used before __syncthreads|was not initialised",
    "no init": "was not initialised",
    "two inits": "is initialised twice",
    "overwritten barrier": "was overwritten",
    "wrong stride": "matrix beyond dynamic shared memory",
    "base offset": "base offset",
    "matrix beyond shared memory": "matrix beyond dynamic shared memory",
    "misaligned copy": "a copy at 128, which is not a multiple of 1024",
    "copy beyond shared memory": "a copy beyond dynamic shared memory",
    "no tensor map": "did not write",
    "half a warpgroup": "less than 128 threads",
    "lanes differ": "start different products",
    "warps differ": "start different products",
    "counts differ": "start different products",
    "waits differ": "wait for different products",
}
# Faults that show as an error or in the results, and in how many of eight orders at least.
RACES = {
    "no wait for full stages": 6,
    "no wait for empty stages": 8,
    "wrong parity of full stages": 8,
    "arrival before the wait": 4,
    "copy at the end": 8,
    "wrong swizzle": 8,
    "wrong start": 8,
}


class TestFaults:
    @pytest.mark.parametrize("fault", ERRORS)
    def test_errors(self, cuda: ModuleType, fault: str) -> None:
        for order in ORDERS:
            cuda.set_order(order)
            with pytest.raises(RuntimeError, match=ERRORS[fault]):
                Pipeline().run(cuda, fault)
        out, expected = Pipeline().run(cuda)
        np.testing.assert_array_equal(out, expected)

    @pytest.mark.parametrize("fault", RACES)
    def test_races(self, cuda: ModuleType, fault: str) -> None:
        shown = []
        for order in ORDERS:
            cuda.set_order(order)
            try:
                out, expected = Pipeline().run(cuda, fault)
            except RuntimeError:
                shown.append(order)
            else:
                shown += [order] if (out != expected).any() else []
        assert 0 in shown
        assert len(shown) >= RACES[fault], shown


TILED = {
    "type": 9,
    "rank": 5,
    "address": 1 << 20,
    "sizes": [200, 13, 9, 3, 5],
    "strides": [400, 5200, 46800, 140400],
    "box": [64, 8, 8, 1, 1],
    "steps": [1, 1, 1, 1, 1],
    "swizzle": 3,
}


def changed(name: str, index: int, value: int) -> dict:
    values = list(TILED[name])
    values[index] = value
    return {name: values}


class TestTensorMaps:
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"type": 6},
            {"rank": 3},
            {"address": (1 << 20) + 16},
            changed("sizes", 0, 1),
            changed("sizes", 4, 1 << 32),
            changed("strides", 3, (1 << 40) - 16),
            changed("box", 1, 256),
            changed("box", 0, 8),
            changed("steps", 1, 8),
            {"swizzle": 0},
        ],
        ids=str,
    )
    def test_what_the_driver_takes(self, cuda: ModuleType, change: dict) -> None:
        assert cuda.encode_tiled(**TILED | change) == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"type": 7},
            {"rank": 0},
            {"rank": 6},
            {"address": 0},
            {"address": (1 << 20) + 8},
            changed("sizes", 3, 0),
            changed("sizes", 3, (1 << 32) + 1),
            changed("strides", 0, 408),
            changed("strides", 3, 1 << 40),
            changed("box", 2, 0),
            changed("box", 2, 257),
            changed("box", 0, 60),
            changed("box", 0, 72),
            changed("steps", 2, 0),
            changed("steps", 2, 9),
            {"swizzle": 2},
        ],
        ids=str,
    )
    def test_what_the_driver_refuses(self, cuda: ModuleType, change: dict) -> None:
        assert cuda.encode_tiled(**TILED | change) == 1

    @pytest.mark.parametrize("name", ["address", "sizes", "strides", "box"])
    def test_encode_refuses_what_tma_does_not_take(self, cuda: ModuleType, name: str) -> None:
        given = {key: TILED[key] for key in ("address", "sizes", "strides", "box")}
        cuda.encode(**given, bf16=True)
        given[name] = 8 if name == "address" else [*given[name][:-1], 1 << 31 if name == "box" else (1 << 40) + 8]
        with pytest.raises(RuntimeError, match="TMA does not take this tensor"):
            cuda.encode(**given, bf16=True)


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What emulation/cute.cpp prints, by kind."""
    library = importlib.util.find_spec("cutlass_library")
    nvcc = shutil.which("nvcc")
    if library is None or nvcc is None:
        pytest.skip("needs the headers of nvidia-cutlass and of the CUDA toolkit")
    program = tmp_path_factory.mktemp("cute") / "cute"
    include = Path(library.origin).parent / "source" / "include"
    source = Path(emulation.__file__).parent / "cute.cpp"
    command = [nvcc, "-std=c++17", "-Xcompiler=-w", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1", f"-I{include}"]
    done = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    kinds: dict[str, list[dict]] = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        if line.startswith("{"):
            fact = json.loads(line)
            kinds.setdefault(fact["kind"], []).append(fact)
    return kinds


@pytest.mark.slow
class TestCute:
    """NVIDIA's library agrees about operands."""

    def test_descriptors(self, cuda: ModuleType, cute: dict[str, list[dict]]) -> None:
        assert {fact["row_bytes"] for fact in cute["descriptor"]} == {32, 64, 128}
        for fact in cute["descriptor"]:
            address = 64 * fact["row_bytes"] * fact["tile"] + 32 * fact["step"]
            assert fact["bits"] == cuda.describe(fact["row_bytes"], address), fact
            # The next 16 columns, and other matrices, are so many 16-byte units away.
            assert fact["bits"] == cuda.describe(fact["row_bytes"], 0) + address // 16

    def test_swizzles(self, cuda: ModuleType, cute: dict[str, list[dict]]) -> None:
        for fact in cute["swizzle"]:
            row_bytes = fact["row_bytes"]
            assert fact["bytes"] == [cuda.swizzled(at, row_bytes) for at in range(0, 64 * row_bytes, 2)]
        assert len(cute["swizzle"]) == 6

    def test_transposed_matrices(self, cuda: ModuleType, cute: dict[str, list[dict]]) -> None:
        for fact in cute["transposed"]:
            row_bytes, rows, terms = fact["row_bytes"], fact["rows"], fact["terms"]
            places = np.reshape(fact["bytes"], (terms, rows))
            # The rows of a term are in several matrices, one behind the other, if they exceed row_bytes.
            several, beyond = 2 * rows > row_bytes, terms * row_bytes
            for step, bits in enumerate(fact["bits"]):
                mine = cuda.describe_transposed(row_bytes, 16 * row_bytes * step, beyond)
                other = 0 if several else 0x3FFF << 16  # means nothing with one matrix
                assert bits & ~other == mine & ~other, fact
            mine = cuda.describe_transposed(row_bytes, 0, beyond)
            for term, row in itertools.product(range(16), range(0, rows, 8)):
                assert cuda.transposed(mine, term, row) == places[term, row]
                assert (np.diff(places[term, row : row + 8]) == 2).all()
        assert {fact["rows"] for fact in cute["transposed"]} == {64, 96, 128, 192}

    def test_accumulators(self, cute: dict[str, list[dict]]) -> None:
        for fact in cute["accumulators"]:
            rows, columns, depth = fact["shape"]
            thread, i = np.indices((128, columns // 2))
            # As csrc/cuda/hopper.cuh says.
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
            assert fact["elements"] == (row + rows * column).ravel().tolist()
            assert (rows, depth, fact["threads"]) == (64, 16, 128)
            assert (fact["a"], fact["b"]) == (rows * depth, columns * depth)
        assert {fact["shape"][1] for fact in cute["accumulators"]} == {64, 96, 128, 192}

    def test_the_left_operand_s_registers(self, cute: dict[str, list[dict]]) -> None:
        """Two terms a register, as csrc/cuda/hopper.cuh says."""
        ((fact),) = cute["left"]
        thread, i = np.indices((128, 8))
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
        term = 8 * (i // 4) + 2 * (thread % 4) + i % 2
        assert fact["elements"] == (row + 64 * term).ravel().tolist()

    def test_tensor_maps(self, cuda: ModuleType, cute: dict[str, list[dict]]) -> None:
        for fact in cute["tensor map"]:
            given = {name: fact[name] for name in ("sizes", "strides", "box")}
            encoded = cuda.encode(address=1 << 20, **given, bf16=fact["type"] == 9)
            assert {name: encoded[name] for name in given} == given
            for name in ("type", "rank", "steps"):
                assert encoded[name] == fact[name]
            assert encoded["swizzle"] == 16 << fact["swizzle"]
            assert (encoded["address"], fact["offset"], fact["interleave"], fact["fill"]) == (1 << 20, 0, 0, 0)
        assert {fact["box"][0] for fact in cute["tensor map"]} == {16, 32, 64}

    def test_instructions(self, cute: dict[str, list[dict]]) -> None:
        """The operands after the accumulators: A's registers, B, whether to accumulate, and the constants."""
        (constants,) = cute["constants"]
        assert (constants["k_major"], constants["mn_major"], constants["scale_one"]) == (0, 1, 1)
        library = Path(importlib.util.find_spec("cutlass_library").origin).parent
        theirs = (library / "source" / "include" / "cute" / "arch" / "mma_sm90_gmma.hpp").read_text()
        text = theirs[theirs.index("struct MMA_64x128x16_F32BF16BF16_RS") :]
        asm = text[text.index("asm volatile") : text.index("#else")]
        assert re.search(r'"setp.ne.b32 p, %69, 0;', asm)
        registers = r'"\{%64,\s*%65,\s*%66,\s*%67\},"\s*'
        assert re.search(registers + r'"\s*%68,"\s*"\s*p,\s*%70,\s*%71,\s*%72;', asm)
        inputs = asm[asm.rindex(":  ") :]
        names = re.findall(r'"[lrn]"\((?:int32_t\()?(\w+)', inputs)
        assert names == ["a00", "a01", "a02", "a03", "desc_b", "scale_D", "scaleA", "scaleB", "tnspB"]
        ours = re.sub(r"\\\n\s*", "", (emulation.ROOT / "csrc" / "cuda" / "hopper.cuh").read_text())
        assert re.search(r'"\}, \{" a0 ", " a1 ", " a2 ", " a3 "\}, " b_operand ", 1, 1, 1, " transposed ";"', ours)
        assert '"n"(int(kTransposed))' in ours
