"""Compiles every Triton kernel for GPUs that need not be there, and reports what the compiler made of them.

    python benchmarks/triton_resources.py [--only PATTERN] [--out benchmarks/results/triton_resources]

Each operator is called on tensors of AlexNet's own shapes, as a GPU would get them; its launches compile for every
architecture, and nothing runs. Registers, spills and stack are ptxas's own account, instructions are counted in the
PTX. Writes OUT.json and OUT.md. Fails if a kernel spills, takes more shared memory than the GPU has, or multiplies
half-precision matrices without tensor cores.

A few bytes are no spill: ptxas moves a register or two to memory where the rest then lets one more warp run at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Triton reads it when a kernel is defined, and compiles nothing then.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import alexnet_kernels.triton  # noqa: F401

# Compute capability, and the shared memory in bytes that a block may have there.
ARCHS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SPILL = 16  # bytes a thread, stores or loads, that ptxas may trade for occupancy
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
MATRIX_OPERATORS = ("conv2d_relu", "conv2d_relu_backward_input", "conv2d_relu_backward_weight")

BATCH = 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call of an operator."""

    operator: str
    layer: str
    dtype: torch.dtype
    arguments: tuple

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.layer}, {name_of(self.dtype)}"


@dataclass
class Row:
    """One kernel that a case launches, compiled for one architecture; sizes in bytes."""

    operator: str
    layer: str
    dtype: str
    launch: int  # which of the case's, from 1
    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    warps: int
    stages: int
    dots: int  # of the kernel's source, after inlining and unrolling
    tensor_cores: dict[str, int]  # the instructions, and how many
    # Instructions on global memory: how many bytes a thread moves (as text: JSON's keys are), how many instructions.
    loads: dict[str, int]
    stores: dict[str, int]
    copies: dict[str, int]  # straight to shared memory

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.operator}, {self.layer}, {self.dtype}) on {self.arch}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Memory that nothing touches."""
    return torch.empty(shape, dtype=dtype)


def images(channels: int, size: int, dtype: torch.dtype, count: int = BATCH) -> Tensor:
    return torch.empty(count, channels, size, size, dtype=dtype, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Conv:
    channels: int
    size: int
    filters: int
    kernel: int
    padding: int
    groups: int


# The first is what ops.conv2d_relu makes of [3, 224, 224], 11x11 filters, stride 4 and padding 2.
CONVS = {
    "conv1": Conv(48, 57, 96, 3, 0, 1),
    "conv2": Conv(96, 27, 256, 5, 2, 2),
    "conv3": Conv(256, 13, 384, 3, 1, 1),
    "conv4": Conv(384, 13, 384, 3, 1, 2),
    "conv5": Conv(384, 13, 256, 3, 1, 2),
}
WEIGHTS = (
    (96, 3, 11, 11),
    (256, 48, 5, 5),
    (384, 256, 3, 3),
    (384, 192, 3, 3),
    (256, 192, 3, 3),
    (4096, 9216),
    (4096, 4096),
    (1000, 4096),
)
LRN = (5, 5e-4, 0.75, 2.0)
POOL = ([3, 3], [2, 2], [0, 0])
SEED = torch.zeros((), dtype=torch.int64)
OFFSET = 7


def conv_cases(dtype: torch.dtype, *names: str) -> Iterator[Case]:
    for name in names:
        conv = CONVS[name]
        layer = f"{name} {conv.channels}x{conv.size}x{conv.size}"
        x = images(conv.channels, conv.size, dtype)
        y = images(conv.filters, conv.size + 2 * conv.padding - conv.kernel + 1, dtype)
        weight = images(conv.channels // conv.groups, conv.kernel, dtype, count=conv.filters)
        geometry = ([1, 1], [conv.padding, conv.padding], conv.groups)
        yield Case("conv2d_relu", layer, dtype, (x, weight, empty(conv.filters, dtype=dtype), *geometry, True))
        for operator in ("conv2d_relu_backward_input", "conv2d_relu_backward_weight"):
            yield Case(operator, layer, dtype, (y, y, x, weight, *geometry))


def channel_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Normalisation and pooling."""
    for name, channels, size in (("norm1", 96, 55), ("norm2", 256, 27)):
        x, y = images(channels, size, dtype), images(channels, (size - 1) // 2, dtype)
        layer, argmax = f"{name} {channels}x{size}x{size}", images(channels, (size - 1) // 2, torch.uint8)
        yield Case("local_response_norm", layer, dtype, (x, *LRN, 1))
        yield Case("local_response_norm_backward", layer, dtype, (x, x, *LRN, 1))
        yield Case("lrn_max_pool2d", layer, dtype, (x, *LRN, 1, *POOL, False, True))
        yield Case("lrn_max_pool2d_backward", layer, dtype, (y, x, argmax, *LRN, 1, *POOL, True))
    for name, channels, size in (("pool1", 96, 55), ("pool5", 256, 13)):
        x, y = images(channels, size, dtype), images(channels, (size - 1) // 2, dtype)
        layer, argmax = f"{name} {channels}x{size}x{size}", images(channels, (size - 1) // 2, torch.uint8)
        yield Case("max_pool2d", layer, dtype, (x, *POOL, False, True))
        yield Case("max_pool2d_backward", layer, dtype, (y, y, argmax, list(x.shape), *POOL, True))
    x = images(256, 27, dtype)
    yield Case("within_map_response_norm", "norm2 256x27x27", dtype, (x, *LRN))
    yield Case("within_map_response_norm_backward", "norm2 256x27x27", dtype, (x, x, *LRN))
    x, channel = images(96, 55, dtype), empty(96)
    vectors, eps = (channel, channel, channel, channel), 1e-5
    yield Case("batch_norm_relu", "norm1 96x55x55, training", dtype, (x, *vectors, True, eps))
    yield Case("batch_norm_relu", "norm1 96x55x55, inference", dtype, (x, *vectors, False, eps))
    yield Case("batch_norm_relu_backward", "norm1 96x55x55, training", dtype, (x, x, *vectors, True, eps))


def element_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Dropout, the optimizer's step, and the input's way into the net."""
    x, y = empty(BATCH, 9216, dtype=dtype), empty(BATCH, 4096, dtype=dtype)
    maps = images(256, 6, dtype)
    draw, count = (0.5, 2.0, SEED, OFFSET), x.numel()
    yield Case("dropout", "fc6 9216", dtype, (x, *draw, count, count, 0))
    yield Case("dropout", "pool5 256x6x6", dtype, (maps, *draw, count, count, 0))
    weight, bias = empty(4096, 9216, dtype=dtype), empty(4096, dtype=dtype)
    yield Case("linear_relu_dropout", "fc6 9216", dtype, (x, weight, bias, True, *draw, 4096, 4096, 0))
    yield Case("relu_dropout_backward", "fc6 4096", dtype, (y, y, 2.0))
    params = [empty(*shape, dtype=dtype) for weight in WEIGHTS for shape in (weight, weight[:1])]
    wide = [empty(*param.shape) for param in params]
    masters = [] if dtype == FP32 else wide
    settings = (0.01, 0.9, 5e-4, 0.0, False)
    for rule, paper in (("paper's rule", True), ("torch's rule", False)):
        yield Case("sgd_step", f"all 16, {rule}", dtype, (params, params, wide, masters, *settings, paper, False))
    pixels, crops = torch.empty(BATCH, 256, 256, 3, dtype=torch.uint8), torch.zeros(BATCH, 2, dtype=torch.int64)
    flips, shift, mean = torch.zeros(BATCH, dtype=torch.bool), empty(BATCH, 3), empty(3, 256, 256)
    arguments = (pixels, crops, [224, 224], flips, shift, mean, empty(3), dtype, True)
    yield Case("augment", "input 3x224x224", dtype, arguments)
    padding, blocks = [2, 2], images(48, 57, dtype)
    yield Case("space_to_depth", "input 3x224x224", dtype, (images(3, 224, dtype), 4, padding, [57, 57], dtype))
    yield Case("depth_to_space", "input 3x224x224", dtype, (blocks, 4, padding, [224, 224], dtype))


def cases() -> Iterator[Case]:
    yield from conv_cases(BF16, *CONVS)
    for dtype in (BF16, FP32):
        yield from channel_cases(dtype)
        yield from element_cases(dtype)
    # float16 takes the tiles of bfloat16, and float32's are alike: a layer is enough.
    for dtype in (FP16, FP32):
        yield from conv_cases(dtype, "conv2")


class Driver:
    """Stands for a GPU to compile for."""

    arch = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def start_worker(cache: str) -> None:
    """Makes launches compile, into `compiled`, instead of run."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    # A cache of its own: what another worker compiled would come without the log.
    triton.knobs.cache.dir = os.path.join(cache, str(os.getpid()))
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        logs.setdefault(kernel.hash, printed.getvalue())
        compiled.append((self.__name__, kernel))
        return kernel

    JITFunction.run = compile_only


compiled: list[tuple[str, Any]] = []
logs: dict[str, str] = {}  # of ptxas, by the kernel's hash


def compile_case(index: int, arch: int) -> tuple[list[Row], str | None]:
    """The rows of a case's launches, and what went wrong, if anything."""
    case = next(itertools.islice(cases(), index, None))
    Driver.arch = arch
    compiled.clear()
    try:
        with torch.no_grad():
            getattr(torch.ops.alexnet_kernels_triton, case.operator)(*case.arguments)
    except Exception as error:
        return [], f"{case.name}, sm_{arch}: {type(error).__name__}: {origin(error)}"
    return [
        row_of(case, arch, i, name, kernel, logs[kernel.hash]) for i, (name, kernel) in enumerate(compiled, 1)
    ], None


def origin(error: BaseException) -> str:
    """What happened in the innermost of the kernel's functions: Triton wraps the error of each in its caller's."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def row_of(case: Case, arch: int, launch: int, name: str, kernel: Any, log: str) -> Row:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, spill_stores, spill_loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    ptx = kernel.asm["ptx"]
    return Row(
        case.operator,
        case.layer,
        name_of(case.dtype),
        launch,
        name,
        f"sm_{arch}",
        max(map(int, re.findall(r"Used (\d+) registers", log))),
        spill_stores,
        spill_loads,
        stack,
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
        len(re.findall(r"\btt\.dot", kernel.asm["ttir"])),
        {name: count for name in TENSOR_CORES if (count := len(re.findall(rf"\b{re.escape(name)}\b", ptx)))},
        **global_accesses(ptx),
    )


def global_accesses(ptx: str) -> dict[str, dict[str, int]]:
    sizes: dict[str, list[int]] = {"loads": [], "stores": [], "copies": []}
    for name, qualifiers in re.findall(r"\b(ld|st)((?:\.[\w:]+)+)", ptx):
        parts = qualifiers[1:].split(".")
        if "global" in parts:
            vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            sizes["loads" if name == "ld" else "stores"].append(vector * int(parts[-1][1:]) // 8)
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (\w+)", ptx):
        sizes["copies"].append(int(size, 0))
    return {kind: {str(n): count for n, count in sorted(Counter(found).items())} for kind, found in sizes.items()}


def problems(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if max(row.spill_stores, row.spill_loads) > SPILL:
            found.append(f"{row.name} spills: {row.spill_stores} bytes of stores, {row.spill_loads} bytes of loads")
        limit = ARCHS[int(row.arch.removeprefix("sm_"))]
        if row.shared > limit:
            found.append(f"{row.name} takes {row.shared} bytes of shared memory, of which a block may have {limit}")
        if row.dots and row.dtype != name_of(FP32):
            wanted = TENSOR_CORES[1:2] if row.arch == "sm_90" else TENSOR_CORES
            if not set(wanted) & set(row.tensor_cores):
                found.append(f"{row.name} has no {' or '.join(wanted)}, but {row.tensor_cores or 'none at all'}")
    calls: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row.operator in MATRIX_OPERATORS:
            call = (row.operator, row.layer, row.dtype, row.arch)
            calls[call] = calls.get(call, 0) + row.dots
    return found + [f"{', '.join(call)}: no kernel multiplies matrices" for call, dots in calls.items() if not dots]


def versions() -> dict[str, str]:
    nvidia = triton.knobs.nvidia
    return {
        "triton": triton.__version__,
        "torch": str(torch.__version__),
        "ptxas": str(nvidia.ptxas.version),
        "ptxas for sm_100": str(nvidia.ptxas_blackwell.version),
    }


COLUMNS = ("layer", "dtype", "launch", "kernel", "arch", "registers", "spills", "stack", "shared", "warps", "stages")
COLUMNS += ("tensor cores", "loads", "stores", "copies")


def markdown(about: dict[str, str], rows: list[Row]) -> str:
    lines = [
        "# What the compiler made of the Triton kernels",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        f"AlexNet's shapes at batch {BATCH}, channels_last. Spills (stores/loads), stack and shared memory in bytes;",
        "tensor cores: instructions in the PTX; loads, stores and copies to shared memory: the PTX's instructions on",
        "global memory, `2 x 16 + 8 x 2` being two that move sixteen bytes a thread and eight that move two.",
    ]
    for operator, group in itertools.groupby(sorted(rows, key=lambda row: row.operator), lambda row: row.operator):
        lines += ["", f"## {operator}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for row in group:
            cores = ", ".join(f"{count} {name}" for name, count in row.tensor_cores.items())
            values = (
                row.layer,
                row.dtype,
                row.launch,
                row.kernel,
                row.arch,
                row.registers,
                f"{row.spill_stores}/{row.spill_loads}",
                row.stack,
                row.shared,
                row.warps,
                row.stages,
                cores or "-",
                *map(sizes_of, (row.loads, row.stores, row.copies)),
            )
            lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join([*lines, ""])


def sizes_of(accesses: dict[str, int]) -> str:
    """Such as `2 x 16 + 8 x 2`: two of sixteen bytes, eight of two."""
    return " + ".join(f"{count} x {size}" for size, count in reversed(accesses.items())) or "-"


def report(about: dict[str, str], rows: list[Row]) -> str:
    """JSON, a line a row."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    return f'{{\n "versions": {json.dumps(about)},\n "rows": [\n{lines}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile the cases whose name this regular expression finds")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))), help="processes")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    chosen = [i for i, case in enumerate(cases()) if re.search(args.only, case.name)]
    rows: list[Row] = []
    found: list[str] = []
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), start_worker, (cache,)) as pool,
    ):
        tasks = list(itertools.product(chosen, ARCHS))
        for compiled_rows, error in pool.map(compile_case, *zip(*tasks, strict=True)):
            for row in compiled_rows:
                cores = " ".join(row.tensor_cores)
                print(f"{row.name:110s} {row.registers:3d} registers {row.shared:6d} shared {cores}", flush=True)
            rows += compiled_rows
            found += [error] if error else []
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(report(versions(), rows))
        args.out.with_suffix(".md").write_text(markdown(versions(), rows))
    found += problems(rows)
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
