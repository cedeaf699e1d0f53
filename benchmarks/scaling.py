"""Communication against compute on 2, 16 and 1024 GPUs for each plan: arithmetic, nothing is run.

    python benchmarks/scaling.py > benchmarks/results/scaling.md

Bytes are those of `parallel.step_traffic`, FLOPs those of `count_macs`. Rates are assumptions: options change them.
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
"""GPUs of a node; towers are neighbours in one."""


@dataclass(frozen=True)
class Rates:
    flops: float
    """FLOP/s of bfloat16 products, as reached."""
    memory: float
    """Bytes/s of the device's memory."""
    node: float
    """Bytes/s that a GPU sends to its node's others."""
    network: float
    """Bytes/s that a GPU sends to other nodes."""
    latency: float
    """Seconds of an empty collective inside a node; each doubling of the nodes adds as much."""


@dataclass(frozen=True)
class Step:
    """Seconds of a training step."""

    compute: float
    sent: float
    bytes: int

    @property
    def whole(self) -> float:
        """With nothing overlapped."""
        return self.compute + self.sent


def step(model: AlexNet, plan: str, images: int, data: int, towers: int, rates: Rates) -> Step:
    """Of a plan with so many images a GPU. Memory traffic of activations is left out: the plans share it."""
    ranks = data * towers
    traffic = parallel.step_traffic(model, plan, images * ranks, data, towers, activation_bytes=2)
    gradients = traffic.pop("gradients", 0)
    nodes = math.ceil(ranks / NODE)
    link = rates.network if nodes > 1 else rates.node
    parameters = count_parameters(model)
    features = count_parameters(model.features)
    own = {"towers": parameters / towers, "hybrid": features + (parameters - features) / towers, "data": parameters}
    # A weight, its gradient and its momentum are float32: three are read, two written.
    compute = 6 * count_macs(model) * images / rates.flops + 20 * own[plan] / rates.memory
    exchanges = 2 * len(traffic) * rates.latency
    reductions = len(list(model.parameters())) * rates.latency * (1 + math.log2(nodes)) if gradients else 0.0
    sent = sum(traffic.values()) / rates.node + gradients / link + exchanges + reductions
    return Step(compute, sent, gradients + sum(traffic.values()))


def crossover(model: AlexNet, first: str, second: str, data: int, towers: int, rates: Rates) -> int | None:
    """Images a GPU from which the second plan's step is not slower than the first's; None up to 65536."""
    low, high = 1, 65536

    def ahead(images: int) -> bool:
        one, other = (step(model, plan, images, data, towers, rates).whole for plan in (first, second))
        return other <= one

    if ahead(low):
        return low
    if not ahead(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
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
    parser.add_argument("--tflops", type=float, default=400.0, help="reached in products (default: 400)")
    parser.add_argument("--memory", type=float, default=4.3, help="TB/s (default: 4.3)")
    parser.add_argument("--node", type=float, default=450.0, help="GB/s inside a node (default: 450)")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a GPU between nodes (default: 50)")
    parser.add_argument("--latency", type=float, default=10.0, help="us a collective (default: 10)")
    options = parser.parse_args()
    rates = Rates(
        options.tflops * 1e12, options.memory * 1e12, options.node * 1e9, options.network * 1e9, options.latency * 1e-6
    )
    print(report(rates), end="")


if __name__ == "__main__":
    main()
