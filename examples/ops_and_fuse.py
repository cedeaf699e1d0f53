"""Call the fused ops, compare them with PyTorch's operators, then fuse a model of your own.

    python examples/ops_and_fuse.py                      # on the GPU if there is one
    python examples/ops_and_fuse.py --device cpu --batch 2 --size 96

The first part calls three ops as functions. The second takes an ordinary torch.nn model, fuses a copy of it in place,
checks that outputs and gradients agree, and times both.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import fuse, ops


def compare(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Print the largest difference, relative to the largest value, and fail if it exceeds rounding."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{name:30} {difference:.1e} relative to PyTorch's")
    assert difference < 1e-4, name


def call_ops(x: Tensor) -> None:
    weight, bias = torch.randn(96, 3, 11, 11, device=x.device) / 19, torch.randn(96, device=x.device)
    maps = ops.conv2d_relu(x, weight, bias, stride=4, padding=2)
    compare("conv2d_relu", maps, F.relu(F.conv2d(x, weight, bias, stride=4, padding=2)))

    pooled = ops.lrn_max_pool2d(maps, size=5, alpha=5e-4, beta=0.75, k=2.0)
    compare("lrn_max_pool2d", pooled, F.max_pool2d(F.local_response_norm(maps, 5, 5e-4, 0.75, 2.0), 3, 2))

    # The mask is a function of the seed and of each element's index: it is not stored, and every device draws it alike.
    dropped = ops.dropout(maps, p=0.5, seed=1)
    again = ops.dropout(maps.contiguous(), p=0.5, seed=1)
    kept = float((ops.dropout(torch.ones_like(maps), p=0.5, seed=1) != 0).float().mean())
    print(f"{'dropout':30} kept {kept:.1%}, the same elements in NCHW: {torch.equal(dropped, again)}")


def build_model() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.BatchNorm2d(192), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(192 * 36, 1024), nn.ReLU(), nn.Linear(1024, 10)),
    )


def step(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    output = model(x)
    output.square().mean().backward()
    return output.detach()


def milliseconds(model: nn.Module, x: Tensor, runs: int = 10) -> float:
    """The fastest of `runs` forward and backward passes."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        step(model, x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # compare in full float32
    # channels_last is the fast memory format.
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device).to(memory_format=torch.channels_last)
    call_ops(x)

    plain = build_model().to(args.device, memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain))  # children, parameters and state_dict keys stay
    compare("fused model, output", step(fused, x), step(plain, x))
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        if name.endswith("weight"):
            compare(f"fused model, gradient {name}", ours.grad, theirs.grad)
    print(f"forward and backward: {milliseconds(plain, x):.1f} ms, fused {milliseconds(fused, x):.1f} ms")


if __name__ == "__main__":
    main()
