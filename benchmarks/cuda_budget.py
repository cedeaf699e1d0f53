"""Instruction budgets of the CUDA kernels at AlexNet's layers: what is executed, and whether that or memory binds.

    python benchmarks/cuda_budget.py [--library PATH] [--only PATTERN]

Each op is called at AlexNet's layers (`alexnet_kernels.op_info`). The launches of its operators are recorded by the
emulation of tests/emulation, but not run, and benchmarks/sass.py counts what they execute in the machine code for
compute capability 9.0. Needs no GPU. cuda_resources.py writes the budgets to its report. Convolutions are the
library's, with the package's pass for bias and ReLU; convolution_budget.py predicts those of the package's own kernels.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import sass
import torch
from cubin import architectures, demangle, disassemble, find_cuobjdump, hopper, parse_name, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from alexnet_kernels import _library
from alexnet_kernels.op_info import OP_INFOS, Layer, Maker, OpInfo, operator_calls
from alexnet_kernels.op_info._record import OVERHEAD

BATCH = 128
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Multiprocessors' quarters times the clock: instructions, or clocks of a pipe, a second. An H200 has the same.
QUARTERS = 132 * 4 * 1.98e9
# Bytes a second of a copy.
COPY = {"H100": 3.0e12, "H200": 4.3e12}
VECTOR = 16
# Ops whose kernels are passes beside torch's convolution or product.
PRODUCTS = ("conv2d_relu", "linear_relu_dropout")
# The package's own convolution kernels, and the operator's argument `algorithm` for each.
WAYS = {"mma": 2, "wgmma": 3}
DIRECTIONS = {
    "conv2d_relu": "forward",
    "conv2d_relu_backward_input": "input gradient",
    "conv2d_relu_backward_weight": "filter gradient",
}
# What instructions do, as sass.kind_of names it.
KINDS = ("floating point", "special functions", "integer", "conversions", "global loads", "global stores")
KINDS += ("shared memory", "shuffles", "control", "constants", "matrix")

# How much a kernel's instructions may grow before the report must be written anew.
GROWTH = 1.05
REGENERATE = "Write it anew: python benchmarks/cuda_resources.py"


@dataclass
class Launch:
    """A launch, and the instructions of a vector of 16 bytes of its operator's larger tensor."""

    source: str
    kernel: str
    blocks: int
    threads: int
    warp: float  # instructions of a warp, on average
    instructions: float
    special: float
    mix: dict[str, float]
    issue_us: float
    pipe: str  # the one that takes longest
    pipe_us: float


@dataclass
class Budget:
    """An operator at a layer."""

    op: str
    operator: str
    layer: str
    dtype: str
    vectors: int
    bytes: float
    memory_us: dict[str, float]
    launches: list[Launch] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.layer}, {self.dtype}"

    def us(self) -> float:
        """The time of the kernels, one after the other, if memory takes none."""
        return sum(max(launch.issue_us, launch.pipe_us) for launch in self.launches)

    def binds(self, device: str) -> str:
        """What takes longest: memory, issue or a pipe."""
        if self.memory_us[device] >= self.us():
            return "memory"
        longest = max(self.launches, key=lambda launch: max(launch.issue_us, launch.pipe_us))
        return "issue" if longest.issue_us >= longest.pipe_us else longest.pipe


class _NoProducts(TorchDispatchMode):
    """torch's convolutions and products return uninitialised tensors."""

    NAMES = ("conv2d", "convolution", "convolution_backward", "linear", "addmm", "mm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") not in self.NAMES:
            return func(*args, **kwargs)
        fakes = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), (args, kwargs))
        return tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="cpu"), func(*fakes[0], **fakes[1]))


@functools.cache
def emulation() -> ModuleType:
    """The package tests/emulation."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module("emulation")


@functools.cache
def emulated_kernels() -> dict[int, tuple[str, str, tuple[str, ...]]]:
    """(source file, kernel, template arguments) of each function of the emulation's module, by offset."""
    text = run("nm", "--debug-syms", "--no-sort", "--demangle", str(emulation().build(emulation().MODULE.name)))
    found, source = {}, ""
    for line in text.splitlines():
        match = re.match(r"([0-9a-f]+) (\w) (.*)", line)
        if match is None:
            continue
        if match[2] == "a":
            source = match[3]
        elif match[2] in "tTwW" and re.match(
            r"(void )?alexnet_kernels::cuda::[^(]*(\(anonymous namespace\)::)?\w+", match[3]
        ):
            try:
                _, kernel, arguments = parse_name("", match[3])
            except AssertionError:
                continue
            found[int(match[1], 16)] = (source, kernel, plain(arguments))
    return found


def plain(arguments: list[str]) -> tuple[str, ...]:
    """Template arguments as every demangler spells them."""
    return tuple({"1": "true", "0": "false"}.get(argument, argument) for argument in arguments)


def recorded(operator: str, args: tuple[Any, ...]) -> tuple[Any, list[tuple]]:
    """The result of an operator, uninitialised, and its launches."""
    module = emulation().load()
    function = getattr(getattr(torch.ops, emulation().NAMESPACE), operator).default
    module.set_recording(True)
    try:
        with torch.no_grad(), _NoProducts():
            result = function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
        return result, module.recorded()
    finally:
        module.set_recording(False)


class Code:
    """A library's machine code for compute capability 9.0. A library without it has no functions."""

    def __init__(self, library: Path, cuobjdump: str) -> None:
        self.library, self.arch = library, hopper(library, cuobjdump)
        has_some = self.arch in architectures(library, cuobjdump)
        self.functions = sass.split(disassemble(library, cuobjdump, self.arch)) if has_some else {}
        mangled = list(self.functions)
        self.names: dict[tuple[str, tuple[str, ...]], list[tuple[str, str]]] = {}
        for name, demangled in zip(mangled, demangle(mangled), strict=True):
            source, kernel, arguments = parse_name(name, demangled)
            self.names.setdefault((kernel, plain(arguments)), []).append((source, name))

    def find(self, source: str, kernel: str, arguments: tuple[str, ...]) -> tuple[str, str]:
        """The source and the mangled name of a kernel."""
        found = self.names.get((kernel, arguments), [])
        chosen = found if len(found) == 1 else [pair for pair in found if pair[0] == source]
        if len(chosen) != 1:
            raise LookupError(f"{len(found)} kernels {kernel}<{', '.join(arguments)}> in {self.library}, of {source}")
        return chosen[0]


def nbytes(value: Any) -> int:
    """Of the tensors in a value."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def moved_bytes(info: OpInfo, layer: Layer, operator: str, args: tuple[Any, ...], result: Any) -> float:
    """The bytes that an operator must move: the record's, or its own tensors' where the record has none for it."""
    if operator in PRODUCTS:
        return 2.0 * nbytes(result)  # the product is read and written in place
    if info.name in PRODUCTS:
        return float(nbytes(args) + nbytes(result))
    if operator == "sgd_step":
        params, grads, momentum, masters, *_ = args
        read = nbytes(masters or params)
        return float(read + nbytes(grads) + nbytes(momentum) + nbytes(params) + nbytes(momentum) + nbytes(masters))
    work = layer.work(next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)).element_size())
    forward = work.moved(BATCH, False)
    return work.moved(BATCH, True) - forward if operator.endswith("_backward") else forward


def schema_of(operator: str) -> Any:
    emulation().load()
    return getattr(getattr(torch.ops, emulation().NAMESPACE), operator).default._schema


def with_algorithm(schema: Any, args: tuple[Any, ...], algorithm: int) -> tuple[Any, ...]:
    """The arguments of an operator with the algorithm of a convolution, where it takes one: 0 is the library's."""
    names = [argument.name for argument in schema.arguments]
    if "algorithm" not in names:
        return args
    at = names.index("algorithm")
    missing = [argument.default_value for argument in schema.arguments[len(args) : at]]
    return (*args[:at], *missing, algorithm, *args[at + 1 :])


def operators(only: str) -> Iterator[tuple[OpInfo, Layer, str, str, tuple[Any, ...]]]:
    """Every operator at AlexNet's layers, in channels_last: op, layer, dtype, operator, arguments."""
    for dtype, info in itertools.product(DTYPES, OP_INFOS.values()):
        for layer in info.layers:
            name = str(dtype).removeprefix("torch.")
            if layer.name == OVERHEAD or not re.search(only, f"{info.name}, {layer.name}, {name}"):
                continue
            make = Maker(dtype, torch.channels_last, initialize=False)
            with _NoProducts():
                calls = operator_calls(info, layer.inputs(make, BATCH), "cuda", run=False)
            firsts = dict(reversed(calls))
            for operator in reversed(firsts):
                yield info, layer, name, operator, with_algorithm(schema_of(operator), firsts[operator], 0)


def budgets(code: Code, only: str = "") -> Iterator[Budget]:
    """The budgets of the operators that launch a kernel. only: a regular expression of `op, layer, dtype`."""
    for info, layer, dtype, operator, args in operators(only):
        result, launches = recorded(operator, args)
        if launches:
            written = nbytes(result[0] if isinstance(result, tuple) else result)
            largest = written if operator in PRODUCTS else max(written, nbytes(args[0]))
            moved = moved_bytes(info, layer, operator, args, result)
            memory = {device: round(moved / rate * 1e6, 2) for device, rate in COPY.items()}
            budget = Budget(info.name, operator, layer.name, dtype, largest // VECTOR, moved, memory)
            budget.launches += [counted(code, budget.vectors, *launch) for launch in launches]
            yield budget


@dataclass(frozen=True)
class Recorded:
    """A launch of one of the package's own convolution kernels at one of AlexNet's layers, in bfloat16."""

    layer: str
    direction: str  # of DIRECTIONS
    way: str  # of WAYS
    source: str
    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes of dynamic shared memory

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.direction}, {self.way}"


def title_of(kernel: str, arguments: Sequence[str]) -> str:
    return f"{kernel}<{', '.join(arguments)}>" if arguments else kernel


def convolutions() -> list[Recorded]:
    """What the operators launch where they are told which of the package's kernels to take, not the library's."""
    found = []
    for _, layer, _, operator, args in operators("conv2d_relu, .*, bfloat16"):
        schema = schema_of(operator)
        for way, algorithm in WAYS.items():
            given = with_algorithm(schema, args, algorithm)
            for offset, grid, block, shared, _ in recorded(operator, given)[1] if given is not args else ():
                source, kernel, arguments = emulated_kernels()[offset]
                title, blocks, threads = title_of(kernel, arguments), math.prod(grid), math.prod(block)
                direction = DIRECTIONS[operator]
                found.append(Recorded(layer.name, direction, way, source, title, blocks, threads, shared))
    return found


def counted(
    code: Code, vectors: int, offset: int, grid: list[int], block: list[int], shared: int, arguments: bytes
) -> Launch:
    emulated = emulated_kernels()[offset]
    source, mangled = code.find(*emulated)
    title = title_of(*emulated[1:])
    try:
        count = sass.count(code.functions[mangled], arguments, grid, block, arch=code.arch)
    except sass.UnknownError as error:
        raise sass.UnknownError(f"{title} of {source}: {error}") from None
    lanes = count.warps * sass.LANES / vectors
    clocks = count.clocks()
    issue = clocks.pop("issue")
    pipe = max(clocks, key=lambda name: clocks[name])
    us = count.warps / QUARTERS * 1e6
    return Launch(
        source,
        title,
        grid[0] * grid[1] * grid[2],
        block[0] * block[1] * block[2],
        round(count.instructions, 1),
        round(count.instructions * lanes, 1),
        round(count.of("MUFU") * lanes, 1),
        {kind: round(amount * lanes, 1) for kind, amount in count.mix().items()},
        round(issue * us, 2),
        pipe,
        round(clocks[pipe] * us, 2),
    )


def faults(found: list[Budget], committed: list[dict[str, Any]]) -> list[str]:
    """One message for each launch that the committed report lacks, or that executes more than it says."""
    texts = []
    known = {(row["operator"], row["layer"], row["dtype"]): row["launches"] for row in committed}
    for budget in found:
        launches = known.get((budget.operator, budget.layer, budget.dtype))
        if launches is None or [row["kernel"] for row in launches] != [launch.kernel for launch in budget.launches]:
            now = ", ".join(launch.kernel for launch in budget.launches)
            texts.append(f"{budget.name}: the report lacks its launches, {now}. {REGENERATE}")
            continue
        for launch, row in zip(budget.launches, launches, strict=True):
            if launch.instructions > GROWTH * row["instructions"]:
                texts.append(
                    f"{budget.name}: {launch.kernel} executes {launch.instructions} instructions a vector; "
                    f"{row['instructions']} in the report. If that is meant: {REGENERATE}"
                )
    return texts


def markdown(found: list[Budget]) -> list[str]:
    """A section of cuda_resources.md; float16, which differs little from bfloat16, is in the JSON."""
    lines = [
        "## Instruction budgets",
        "",
        f"What the operators execute on compute capability 9.0 at AlexNet's layers, channels_last, batch {BATCH},",
        "interpreted from the machine code (benchmarks/sass.py): a prediction, not a measurement. A **vector** is 16",
        "bytes of the larger of the operator's first argument and result; of the result, where the kernel is a pass",
        "beside a library's convolution or product. **Instructions** are all that warps issue, times 32 lanes, divided",
        "by the vectors: those of lanes that only supply a halo are among them. **Issue** is the time at one",
        "instruction a clock of each quarter of 132 multiprocessors at 1.98 GHz (H100 and H200), **pipe** that of the",
        "busiest pipe (special: special functions and conversions at 16 lanes a clock of a multiprocessor; ALU:",
        "integers, comparisons and selections at 64; FMA: float arithmetic at 128, integer products at 64; LSU: memory",
        "and shuffles), **memory** that of the least bytes at a copy's rate (3.0 TB/s on an H100, 4.3 TB/s on an",
        "H200). **Binds** names the longest.",
        "",
        "| operator, layer, dtype | kernel | blocks | instructions | MUFU | issue, us | pipe, us | MB | "
        "memory, us, H100 / H200 | binds, H100 / H200 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    shown = [budget for budget in found if budget.dtype != "float16"]
    for budget in shown:
        memory = " / ".join(f"{us:.1f}" for us in budget.memory_us.values())
        binds = " / ".join(budget.binds(device) for device in COPY)
        for i, launch in enumerate(budget.launches):
            mb = f"{budget.bytes / 1e6:.1f} | {memory} | {binds}" if i == 0 else "| |"
            name = budget.name if i == 0 else ""
            lines.append(
                f"| {name} | `{launch.kernel}` | {launch.blocks} | {launch.instructions} | {launch.special} | "
                f"{launch.issue_us:.1f} | {launch.pipe_us:.1f} {launch.pipe} | {mb} |"
            )
    lines += ["", "What a vector's instructions are:", "", f"| kernel, layer, dtype | {' | '.join(KINDS)} |"]
    lines.append("|---" * (len(KINDS) + 1) + "|")
    for budget in shown:
        for launch in budget.launches:
            amounts = (f"{launch.mix[kind]:.1f}" if launch.mix.get(kind) else "-" for kind in KINDS)
            lines.append(f"| `{launch.kernel}`, {budget.layer}, {budget.dtype} | {' | '.join(amounts)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=_library.PATH, help="a library, or a cubin of one file")
    parser.add_argument("--only", default="", help="those whose `op, layer, dtype` matches this regular expression")
    options = parser.parse_args(argv)
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        parser.error("cuobjdump is in neither PATH, CUDA_HOME nor the triton package")
    for budget in budgets(Code(options.library, cuobjdump), options.only):
        memory = ", ".join(f"memory {device} {us:.1f} us" for device, us in budget.memory_us.items())
        print(f"{budget.name}: {budget.us():.1f} us, {memory}, {budget.bytes / 1e6:.1f} MB, {budget.vectors} vectors")
        for launch in budget.launches:
            mix = ", ".join(f"{amount:.1f} {kind}" for kind, amount in launch.mix.items())
            print(
                f"  {launch.kernel}: {launch.blocks} x {launch.threads}, {launch.warp} instructions a warp; "
                f"a vector {launch.instructions} instructions, {launch.special} MUFU; issue {launch.issue_us} us, "
                f"{launch.pipe} {launch.pipe_us} us\n    {mix}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
