"""Estimates communication and compute of each plan on 2, 16 and 1024 GPUs, by arithmetic alone.

    python benchmarks/scaling.py > benchmarks/results/scaling.md

Bytes are those of `parallel.step_traffic`, FLOPs those of `count_macs`. The rates are assumptions, set by options.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from alexnet_kernels import AlexNet, parallel
from alexnet_kernels.models import count_macs, count_parameters

MESHES = ((1, 2), (8, 2), (512, 2))
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
NODE = 8
"""GPUs of a node; the towers of a network are in the same node."""


@dataclass(frozen=True)
class Rates:
    flops: float
    """FLOP/s achieved by bfloat16 matrix products."""
    memory: float
    """Bytes/s of device memory."""
    node: float
    """Bytes/s that a GPU sends to others in its node."""
    network: float
    """Bytes/s that a GPU sends to other nodes."""
    latency: float
    """Seconds of an empty collective inside a node; each doubling of the number of nodes adds the same."""


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    compute: float
    sent: float
    bytes: int

    @property
    def whole(self) -> float:
        """The step's time without overlap."""
        return self.compute + self.sent


def step(model: AlexNet, plan: str, images: int, data: int, towers: int, rates: Rates) -> Step:
    """A step of a plan at `images` a GPU. Omits the memory traffic of activations, which is the same in all plans."""
    ranks = data * towers
    traffic = parallel.step_traffic(model, plan, images * ranks, data, towers, activation_bytes=2)
    gradients = traffic.pop("gradients", 0)
    nodes = math.ceil(ranks / NODE)
    link = rates.network if nodes > 1 else rates.node
    parameters = count_parameters(model)
    features = count_parameters(model.features)
    own = {"towers": parameters / towers, "hybrid": features + (parameters - features) / towers, "data": parameters}
    # Weight, gradient and momentum are float32: three are read, and two written.
    compute = 6 * count_macs(model) * images / rates.flops + 20 * own[plan] / rates.memory
    exchanges = 2 * len(traffic) * rates.latency
    reductions = len(list(model.parameters())) * rates.latency * (1 + math.log2(nodes)) if gradients else 0.0
    sent = sum(traffic.values()) / rates.node + gradients / link + exchanges + reductions
    return Step(compute, sent, gradients + sum(traffic.values()))


def crossover(model: AlexNet, first: str, second: str, data: int, towers: int, rates: Rates) -> int | None:
    """The fewest images a GPU, up to 65536, at which the second plan is not slower than the first; None without any."""
    low, high = 1, 65536

    def not_slower(images: int) -> bool:
        one, other = (step(model, plan, images, data, towers, rates).whole for plan in (first, second))
        return other <= one

    if not_slower(low):
        return low
    if not not_slower(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if not_slower(middle) else (middle, high)
    return high


def report(rates: Rates) -> str:
    model = AlexNet(device="meta")
    lines = [
        "# Scaling, on paper",
        "",
        "Written by `python benchmarks/scaling.py`. **Arithmetic, not measurements: no GPU has run any of it.** Preset "
        "`paper`, bfloat16 activations, float32 parameters; bytes of `parallel.step_traffic`, which tests compare with "
        "what 2 and 4 gloo processes send.",
        "",
        f"Assumed: {rates.flops / 1e12:g} TFLOP/s, {rates.memory / 1e12:g} TB/s of memory, {rates.node / 1e9:g} GB/s "
        f"from GPU to GPU of a node of {NODE}, {rates.network / 1e9:g} GB/s a GPU between nodes, "
        f"{rates.latency * 1e6:g} us a collective and as much for each doubling of the nodes.",
        "",
        "Microseconds of a step: compute + communication with nothing overlapped; in brackets communication over "
        "compute. Below 1 it can be hidden behind compute in principle. The fastest plan is in bold.",
    ]
    for data, towers in MESHES:
        ranks = data * towers
        lines += [
            "",
            f"## {ranks} GPUs: {data} x {towers}, {math.ceil(ranks / NODE)} node{'s' * (ranks > NODE)}",
            "",
            "| images a GPU | " + " | ".join(parallel.PLANS) + " | MB sent by a GPU |",
            "|---|" + "---|" * (len(parallel.PLANS) + 1),
        ]
        for images in BATCHES:
            steps = {plan: step(model, plan, images, data, towers, rates) for plan in parallel.PLANS}
            best = min(steps, key=lambda plan: steps[plan].whole)
            cells = []
            for plan, s in steps.items():
                mark = "**" * (plan == best)
                total = f"{s.compute * 1e6:,.0f} + {s.sent * 1e6:,.0f}"
                cells.append(f"{mark}{total}{mark} ({s.sent / s.compute:.2g})")
            sent = " / ".join(f"{s.bytes / 1e6:,.1f}" for s in steps.values())
            lines.append(f"| {images} | " + " | ".join(cells) + f" | {sent} |")
        lines.append("")
        for first, second in (("towers", "hybrid"), ("hybrid", "data"), ("towers", "data")):
            images_ = crossover(model, first, second, data, towers, rates)
            words = "at no batch up to 65536" if images_ is None else f"from {images_} images a GPU on"
            lines.append(f"- {second} is not slower than {first} {words}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="achieved by matrix products (default: 400)")
    parser.add_argument("--memory", type=float, default=4.3, help="TB/s of device memory (default: 4.3)")
    parser.add_argument("--node", type=float, default=450.0, help="GB/s inside a node (default: 450)")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a GPU between nodes (default: 50)")
    parser.add_argument("--latency", type=float, default=10.0, help="us for each collective (default: 10)")
    options = parser.parse_args()
    rates = Rates(
        options.tflops * 1e12, options.memory * 1e12, options.node * 1e9, options.network * 1e9, options.latency * 1e-6
    )
    print(report(rates), end="")


if __name__ == "__main__":
    main()
