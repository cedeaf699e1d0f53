"""Runs every op once, forward and backward, on small odd shapes: something for memory checkers to watch.

python -m alexnet_kernels.gpu_check.exercise [--device cuda] [--backend cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from alexnet_kernels import _library, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 24, 9, 7), (3, 10, 6, 5), (1, 8, 3, 3))


def exercise(device: torch.device, backend: str) -> Iterator[str]:
    """Runs each op, and yields the name of each that has run."""

    def run(out: Tensor, *inputs: Tensor) -> None:
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    for op in _library.OPS:
        for dtype in DTYPES:
            if op == "sgd_step":
                shapes = [(5,), (3, 7), (2, 3, 3, 3), (1030,)]
                params, grads, buffers = ([torch.rand(s, device=device).to(dtype) for s in shapes] for _ in range(3))
                ops.sgd_step(params, grads, buffers, lr=0.1, backend=backend)
            elif op == "augment":
                images = torch.randint(0, 256, (3, 9, 8, 3), dtype=torch.uint8, device=device)
                crops = torch.tensor([[0, 0], [2, 3], [1, 2]], device=device)
                flips = torch.tensor([True, False, True], device=device)
                ops.augment(images, crops, (7, 5), flips, mean=torch.rand(3, 9, 8, device=device), backend=backend)
            elif op == "linear_relu_dropout":
                x, w = (torch.rand(s, device=device).to(dtype).requires_grad_() for s in ((5, 24), (13, 24)))
                run(ops.linear_relu_dropout(x, w, seed=3, backend=backend), x, w)
            else:
                for shape in SHAPES:
                    for memory_format in (torch.contiguous_format, torch.channels_last):
                        x = torch.rand(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
                        x.requires_grad_()
                        if op == "conv2d_relu":
                            w = torch.rand(6, shape[1] // 2, 3, 3, device=device).to(dtype).requires_grad_()
                            b = torch.rand(6, device=device).to(dtype).requires_grad_()
                            run(ops.conv2d_relu(x, w, b, padding=1, groups=2, backend=backend), x, w, b)
                        elif op == "batch_norm_relu":
                            run(ops.batch_norm_relu(x, None, None, training=True, backend=backend), x)
                        elif op == "dropout":
                            run(ops.dropout(x, seed=3, backend=backend), x)
                        elif op == "max_pool2d":
                            run(ops.max_pool2d(x, padding=1, ceil_mode=True, relu=True, backend=backend), x)
                        elif op == "lrn_max_pool2d":
                            run(ops.lrn_max_pool2d(x, groups=2, padding=1, relu=True, backend=backend), x)
                        elif op == "local_response_norm":
                            run(ops.local_response_norm(x, groups=2, backend=backend), x)
                        else:
                            run(getattr(ops, op)(x, backend=backend), x)
        yield op
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
