"""Runs every op on its record's small samples, forward and backward, under a memory checker.

python -m alexnet_kernels.gpu_check.exercise [--device cuda] [--backend cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from alexnet_kernels.op_info import OP_INFOS, Maker, OpInfo, forward_backward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)


def exercise(device: torch.device, backend: str) -> Iterator[str]:
    """Runs each op, and yields its name afterwards."""
    for info in OP_INFOS.values():
        for dtype in DTYPES:
            for memory_format in FORMATS if info.images else FORMATS[:1]:
                _exercise(info, Maker(dtype, memory_format, device), backend)
        yield info.name
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exercise(info: OpInfo, make: Maker, backend: str) -> None:
    for sample in (*info.typical, *info.samples[:3], info.large):
        if info.takes(sample, make.dtype):
            forward_backward(info, info.call, info.inputs(sample, make), backend)
    if backend == "cuda" and torch.device(make.device).type == "cuda":
        last = make.memory_format == torch.channels_last
        for path in info.paths(make.dtype, last, torch.device(make.device)).values():
            call = path.call
            forward_backward(info, lambda backend, call=call, **x: call(x), info.inputs(info.large, make), backend)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    options = parser.parse_args()
    for op in exercise(torch.device(options.device), options.backend):
        print(op, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
