"""Prints the least time of each layer of a network at the measured rates of the device.

    python benchmarks/roofline.py [--preset paper] [--batch N] [--dtype bf16|fp32] [--device cpu|cuda]
                                  [--copy GB/s] [--gemm TFLOP/s]

Measures the rates at which the device copies memory and multiplies matrices; --copy and --gemm give those of another
device. A layer's least time is the longer of the times to move its bytes and to compute its operations at these rates:
forward (inference), and forward and backward. The total of the latter includes the optimizer's step.
"""

from __future__ import annotations

import argparse

import torch

from alexnet_kernels._runtime import keep_freed_memory
from alexnet_kernels.bench import roofline, tables
from alexnet_kernels.bench.roofline import Ceilings
from alexnet_kernels.bench.row import SHORT
from alexnet_kernels.models import PRESETS
from alexnet_kernels.op_info.sgd_step import NBYTES

DTYPES = {name: dtype for dtype, name in SHORT.items()}


def floors(preset: str, batch: int, dtype: str, rates: Ceilings) -> list[tuple[str, float, float, bool]]:
    """(layer, seconds forward, seconds forward and backward, whether operations take longer than bytes)."""
    found = []
    for layer, work in roofline.network(preset, DTYPES[dtype]).items():
        forward, both = (
            rates.seconds(work.moved(batch, backward), work.done(batch, backward), dtype) for backward in (False, True)
        )
        found.append((layer, forward, both, rates.by_products(work.moved(batch, True), work.done(batch, True), dtype)))
    sgd = NBYTES * roofline.parameters(preset) / rates.copy
    return [*found, ("SGD", 0.0, sgd, False)]


def measured(device: torch.device) -> Ceilings:
    found: dict = {}
    for rate in roofline.measure_ceilings(device):
        found |= rate
    return Ceilings(found["copy"], found["gemm"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--copy", type=float, metavar="GB/s", help="rate of copying memory")
    parser.add_argument("--gemm", type=float, metavar="TFLOP/s", help="rate of matrix products")
    options = parser.parse_args()
    if options.batch < 1:
        parser.error(f"--batch must be at least 1, not {options.batch}")
    keep_freed_memory()
    if options.copy and options.gemm:
        rates = Ceilings(options.copy * 1e9, {options.dtype: options.gemm * 1e12})
    else:
        rates = measured(torch.device(options.device))
        rates = Ceilings(options.copy * 1e9 if options.copy else rates.copy, rates.gemm)
        print(tables.ceilings_text(rates))
    rows = floors(options.preset, options.batch, options.dtype, rates)
    print(f"preset {options.preset}, batch {options.batch}, {options.dtype}:\n")
    print("| layer | forward | forward and backward | bound by |\n|---|---|---|---|")
    for layer, forward, both, products in rows:
        print(
            f"| {layer} | {tables.seconds_text(forward) if forward else ''} | {tables.seconds_text(both)} "
            f"| {'operations' if products else 'bytes'} |"
        )
    inference, training = (sum(row[i] for row in rows) for i in (1, 2))
    print(f"| inference, training step | {tables.seconds_text(inference)} | {tables.seconds_text(training)} | |")


if __name__ == "__main__":
    main()
