"""Compiles every Triton kernel for several GPUs, none of which is needed, and reports the compiler's results.

    python benchmarks/triton_resources.py [--only PATTERN] [--out benchmarks/results/triton_resources]

Each op is called at AlexNet's layers (`alexnet_kernels.op_info`). The launches of its operators are compiled for every
architecture, but not run. ptxas reports registers, spills and stack; accesses of memory are counted in PTX. The
instructions that kernels without matrix products execute on sm_90 come from their machine code (sass.py). Writes
OUT.json and OUT.md. Fails if a kernel spills, needs more shared memory than the GPU has, or multiplies half-precision
matrices without tensor cores.

A few spilled bytes are accepted: ptxas moves one or two registers to memory where that raises the occupancy.
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
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Triton reads the variable when a kernel is defined; the interpreter compiles nothing.
os.environ.pop("TRITON_INTERPRET", None)

import sass
import torch
import triton
from cubin import disassemble, find_cuobjdump
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import alexnet_kernels.triton  # noqa: F401
from alexnet_kernels.op_info import OP_INFOS, Maker, OperatorCall, operator_calls
from alexnet_kernels.op_info._record import OVERHEAD

# Compute capability, and the shared memory in bytes that a block may have there.
ARCHS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
COUNTED = 90  # the architecture whose instructions are counted
VECTOR = 16  # bytes for which they are
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
POINTER = 0x7F0000000000  # any aligned address
SPILL = 16  # bytes a thread, stored or loaded, that ptxas may spill to raise occupancy
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
MATRIX_OPERATORS = ("conv2d_relu", "conv2d_relu_backward_input", "conv2d_relu_backward_weight")

BATCH = 128
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """An op at a layer."""

    op: str
    layer: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.op}, {self.layer}, {name_of(self.dtype)}"

    def calls(self) -> list[OperatorCall]:
        """One call of each of Triton's operators, forward and backward."""
        info = OP_INFOS[self.op]
        layer = next(layer for layer in info.layers if layer.name == self.layer)
        make = Maker(self.dtype, torch.channels_last, initialize=False)
        calls = operator_calls(info, layer.inputs(make, BATCH), "triton", run=False)
        return list({operator: (operator, args) for operator, args in reversed(calls)}.values())[::-1]


@dataclass
class Row:
    """One kernel that an operator launches, compiled for one architecture; sizes in bytes."""

    operator: str
    layer: str
    dtype: str
    launch: int  # number of the operator's launch, from 1
    kernel: str
    arch: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    warps: int
    stages: int
    dots: int  # tl.dot operations after inlining and unrolling
    tensor_cores: dict[str, int]  # number of instructions by name
    # Number of global memory instructions by bytes per thread; JSON requires text as keys.
    loads: dict[str, int]
    stores: dict[str, int]
    copies: dict[str, int]  # asynchronous, to shared memory
    # Executed for 16 bytes of the larger of the operator's first argument and its result, and of them special
    # functions; None where that isn't counted.
    instructions: float | None
    special: float | None

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.operator}, {self.layer}, {self.dtype}) on {self.arch}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> Iterator[Case]:
    """float16 uses the tiles of bfloat16, and float32 convolutions share their tiles: conv2 alone covers both."""
    for dtype in (BF16, FP32, FP16):
        for info in OP_INFOS.values():
            for layer in info.layers:
                convolution = info.name == "conv2d_relu"
                alike = dtype == FP16 or (convolution and dtype == FP32)
                if layer.name != OVERHEAD and (not alike or (convolution and layer.name == "conv2")):
                    yield Case(info.name, layer.name, dtype)


class Driver:
    """Names the GPU to compile for."""

    arch = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def start_worker(cache: str) -> None:
    """Makes launches compile without running; the kernels go to `compiled`."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    # A cache of its own: a kernel cached by another worker would lack the log of ptxas.
    triton.knobs.cache.dir = os.path.join(cache, str(os.getpid()))
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        logs.setdefault(kernel.hash, printed.getvalue())
        named = {**dict(zip(self.arg_names, args, strict=False)), **options}
        compiled.append((self.__name__, kernel, grid(named) if callable(grid) else grid, named))
        return kernel

    JITFunction.run = compile_only


# Name, kernel, grid and arguments by name of the launches.
compiled: list[tuple[str, Any, Sequence[int], dict[str, Any]]] = []
logs: dict[str, str] = {}  # output of ptxas, by kernel hash


def compile_case(index: int, arch: int) -> tuple[list[Row], str | None]:
    """The rows of a case's launches, and an error message or None."""
    case = next(itertools.islice(cases(), index, None))
    Driver.arch = arch
    rows: list[Row] = []
    for operator, arguments in case.calls():
        compiled.clear()
        try:
            with torch.no_grad():
                result = getattr(torch.ops.alexnet_kernels_triton, operator)(*arguments)
        except Exception as error:
            return [], f"{operator}, {case.name}, sm_{arch}: {type(error).__name__}: {origin(error)}"
        vectors = max(bytes_of(arguments[0]), bytes_of(result)) / VECTOR
        for i, (name, kernel, grid, named) in enumerate(compiled, 1):
            row = row_of(case, operator, arch, i, name, kernel, logs[kernel.hash])
            if arch == COUNTED and not row.dots and (count := executed(kernel, grid, named)):
                lanes = count.warps * sass.LANES / vectors
                row.instructions = round(count.instructions * lanes, 1)
                row.special = round(count.of("MUFU") * lanes, 1)
            rows.append(row)
    return rows, None


def bytes_of(value: Any) -> int:
    """Of a tensor, of a list of tensors together, and of the first of a tuple of results."""
    if isinstance(value, tuple):
        value = value[0]
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def executed(kernel: Any, grid: Sequence[int], named: dict[str, Any]) -> sass.Count | None:
    """The instructions that a launch executes, or None where that depends on more than its arguments."""
    parameters = bytearray()

    def add(kind: Any, value: Any) -> None:
        if isinstance(kind, (tuple, list)):
            for parts in zip(kind, value, strict=True):
                add(*parts)
        elif kind != "constexpr":
            pointer = POINTER + (len(parameters) << 32)
            form, given = ("Q", pointer) if kind.startswith("*") else (FORMATS[kind], value)
            size = struct.calcsize(form)
            parameters.extend(bytes(-len(parameters) % size) + struct.pack(f"<{form}", given))

    for name, kind in kernel.src.signature.items():
        add(kind, named.get(name))
    for _ in range(2):  # scratch memory
        add("i64", 0)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (text,) = sass.split(disassemble(Path(file.name), cuobjdump, f"sm_{COUNTED}")).values()
    try:
        return sass.count(text, bytes(parameters), grid, [kernel.metadata.num_warps * sass.LANES])
    except sass.UnknownError:
        return None


def origin(error: BaseException) -> str:
    """The message of the innermost function's error, which Triton wraps once for each caller."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def row_of(case: Case, operator: str, arch: int, launch: int, name: str, kernel: Any, log: str) -> Row:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, spill_stores, spill_loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    ptx = kernel.asm["ptx"]
    return Row(
        operator,
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
        instructions=None,
        special=None,
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
            found.append(f"{row.name} uses {row.shared} bytes of shared memory; a block may have {limit}")
        if row.dots and row.dtype != name_of(FP32):
            wanted = TENSOR_CORES[1:2] if row.arch == "sm_90" else TENSOR_CORES
            if not set(wanted) & set(row.tensor_cores):
                found.append(
                    f"{row.name} has no {' or '.join(wanted)}, but {row.tensor_cores or 'no tensor-core instruction'}"
                )
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
COLUMNS += ("tensor cores", "loads", "stores", "copies", "instructions", "special")


def markdown(about: dict[str, str], rows: list[Row]) -> str:
    lines = [
        "# What the compiler made of the Triton kernels",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        f"AlexNet's shapes at batch {BATCH}, channels_last. Spills (stores/loads), stack and shared memory in bytes;",
        "tensor cores: instructions in the PTX; loads, stores and copies to shared memory: the PTX's instructions on",
        "global memory, `2 x 16 + 8 x 2` being two that move sixteen bytes a thread and eight that move two.",
        "Instructions, and those of special functions (MUFU) among them: executed by the launch on sm_90 for 16 bytes",
        "of the larger of the operator's first argument and its result; a prediction from the machine code.",
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
                *("-" if number is None else number for number in (row.instructions, row.special)),
            )
            lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join([*lines, ""])


def sizes_of(accesses: dict[str, int]) -> str:
    """For example `2 x 16 + 8 x 2`: two instructions of 16 bytes and eight of 2 bytes."""
    return " + ".join(f"{count} x {size}" for size, count in reversed(accesses.items())) or "-"


def report(about: dict[str, str], rows: list[Row]) -> str:
    """JSON with one line for each row."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    return f'{{\n "versions": {json.dumps(about)},\n "rows": [\n{lines}\n ]\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile the cases whose name matches this regular expression")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, len(os.sched_getaffinity(0))),
        help="number of processes (default: %(default)s)",
    )
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
