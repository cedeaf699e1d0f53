"""Times the CPU kernels and the whole network against PyTorch's own operators, and writes the ratios.

    python benchmarks/cpu_speedup.py [--only PATTERN] [--out benchmarks/results/cpu_speedup]

Both sides run in one process and in turn, an untimed run before each timed one, with the same threads and the same
allocator settings (without which page faults decide), after their results were compared. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# glibc gives large blocks back to the system on free, and faults them in again on the next allocation.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from machine import commit, cpu, cpu_facts  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import alexnet_kernels  # noqa: E402
from alexnet_kernels import ops  # noqa: E402

PAPER_LRN = (5, 5e-4, 0.75, 2.0)


@dataclass
class Case:
    """Two ways to the same result."""

    name: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    tolerance: float | None = 1e-4  # None: random, nothing to compare


@dataclass
class Row:
    name: str
    ours_ms: float
    ours_spread: float  # (slowest - fastest) / median
    peer_ms: float
    peer_spread: float
    ratio: float


def forward_backward(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def run() -> Tensor:
        leaf.grad = None
        function(leaf).backward(grad)
        return leaf.grad

    return run


def op_cases() -> Iterator[Case]:
    shapes = {"LRN1, 96x55x55": (32, 96, 55, 55), "LRN2, 256x27x27": (32, 256, 27, 27)}
    for name, shape in shapes.items():
        for memory_format, layout in ((torch.channels_last, "channels_last"), (torch.contiguous_format, "NCHW")):
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            g = torch.randn(shape).contiguous(memory_format=memory_format)
            pooled = F.max_pool2d(x, 3, 2)
            label = f"{name}, float32 {layout}"

            def norm(x: Tensor) -> Tensor:
                return ops.local_response_norm(x, *PAPER_LRN)

            def torch_norm(x: Tensor) -> Tensor:
                return F.local_response_norm(x, *PAPER_LRN)

            def block(x: Tensor) -> Tensor:
                return ops.lrn_max_pool2d(x, *PAPER_LRN)

            def torch_block(x: Tensor) -> Tensor:
                return F.max_pool2d(F.local_response_norm(x, *PAPER_LRN), 3, 2)

            def torch_pool(x: Tensor) -> Tensor:
                return F.max_pool2d(x, 3, 2)

            yield Case(f"{label}: forward", lambda x=x: norm(x), lambda x=x: torch_norm(x))
            yield Case(f"{label}: forward + backward", forward_backward(norm, x, g), forward_backward(torch_norm, x, g))
            yield Case(f"{label}, with pool: forward", lambda x=x: block(x), lambda x=x: torch_block(x))
            yield Case(
                f"{label}, with pool: forward + backward",
                forward_backward(block, x, pooled),
                forward_backward(torch_block, x, pooled),
            )
            for dtype in (torch.float32, torch.bfloat16):
                y, h = x.to(dtype), pooled.to(dtype)
                label = f"pool after {name}, {str(dtype)[6:]} {layout}"
                yield Case(f"{label}: forward", lambda y=y: ops.max_pool2d(y), lambda y=y: torch_pool(y))
                yield Case(
                    f"{label}: forward + backward",
                    forward_backward(ops.max_pool2d, y, h),
                    forward_backward(torch_pool, y, h),
                    # torch adds the gradients of overlapping windows in bfloat16
                    1e-4 if dtype == torch.float32 else 0.05,
                )
    for count in (32 * 9216, 24_780_800):
        x = torch.randn(count)
        yield Case(f"dropout, {count:,} elements: forward", lambda x=x: ops.dropout(x), lambda x=x: F.dropout(x), None)


def two_towers() -> nn.Sequential:
    """The paper's network in torch.nn alone."""

    def norm() -> nn.Module:
        return nn.LocalResponseNorm(*PAPER_LRN)

    layers = [nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(True), norm(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(96, 256, 5, 1, 2, groups=2), nn.ReLU(True), norm(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU(True)]
    layers += [nn.Conv2d(384, 384, 3, 1, 1, groups=2), nn.ReLU(True)]
    layers += [nn.Conv2d(384, 256, 3, 1, 1, groups=2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Flatten()]
    layers += [nn.Linear(9216, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(4096, 1000))


def network_cases() -> Iterator[Case]:
    x = torch.randn(32, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (32,))
    ours = alexnet_kernels.AlexNet(preset="paper", dropout=0.5).to(memory_format=torch.channels_last)
    peer = two_towers().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for a, b in zip(peer.parameters(), ours.parameters(), strict=True):
            a.copy_(b)

    def train(model: nn.Module, bf16: bool) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(model(x).float(), target)
            loss.backward()

        return run

    def infer(model: nn.Module, bf16: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model(x).float()

        return run

    for bf16, dtype in ((True, "bfloat16 autocast"), (False, "float32")):
        label = f"two-tower net, batch 32, {dtype}, channels_last"
        ours.train(), peer.train()
        yield Case(f"{label}: forward + backward", train(ours, bf16), train(peer, bf16), None)
        ours.eval(), peer.eval()
        # The paper scales dropout at inference: without it both compute the same numbers.
        for module in ours.modules():
            if isinstance(module, nn.Dropout):
                module.scale_at = "training"
        yield Case(f"{label}: inference", infer(ours, bf16), infer(peer, bf16), 0.05 if bf16 else 1e-4)


def agree(case: Case) -> bool:
    if case.tolerance is None:
        return True
    a, b = case.ours().double(), case.peer().double()
    return bool((a - b).abs().max() <= case.tolerance * b.abs().max())


def measure(case: Case, rounds: int) -> Row:
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for i in range(rounds + 1):
        for side in ("ours", "peer"):
            run = getattr(case, side)
            run()  # so that the timed run finds its own side's memory, not the other's
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                times[side].append((time.perf_counter() - start) * 1e3)
    ours, peer = statistics.median(times["ours"]), statistics.median(times["peer"])
    spread = {side: (max(t) - min(t)) / statistics.median(t) for side, t in times.items()}
    return Row(case.name, ours, spread["ours"], peer, spread["peer"], peer / ours)


def machine() -> dict[str, object]:
    flags = cpu_facts().get("flags", "").split()
    return {
        "cpu": cpu(),
        "matrix instructions": [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "threads": torch.get_num_threads(),
        "kernels": torch.ops.alexnet_kernels.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "allocator": ALLOCATOR,
    }


def markdown(about: dict[str, object], rows: list[Row]) -> str:
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "| | this package, ms | torch eager, ms | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.ours_ms:.2f} (±{row.ours_spread / 2:.0%}) "
        f"| {row.peer_ms:.2f} (±{row.peer_spread / 2:.0%}) | {row.ratio:.1f} |"
        for row in rows
    ]
    return "\n".join(["# CPU speed against PyTorch's own operators", "", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure the cases whose name this regular expression finds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    about, rows, wrong = machine(), [], []
    for cases in (op_cases(), network_cases()):
        for case in cases:
            if not re.search(args.only, case.name):
                continue
            if not agree(case):
                wrong.append(case.name)
                print(f"WRONG RESULT, not timed: {case.name}", flush=True)
                continue
            row = measure(case, args.rounds)
            rows.append(row)
            print(f"{row.name:70s} {row.ours_ms:9.2f} ms  {row.peer_ms:9.2f} ms  {row.ratio:6.1f}", flush=True)
    if args.out and rows:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": about, "rows": [asdict(row) for row in rows]}
        args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(about, rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
