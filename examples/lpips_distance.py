"""Fuse the AlexNet of LPIPS, the perceptual distance of Zhang et al. 2018.

    python examples/lpips_distance.py                      # the `lpips` package where it is installed
    python examples/lpips_distance.py --baseline --size 64 --weights alexnet.pth

With `lpips`, the metric is lpips.LPIPS(net="alex"), which downloads torchvision's weights. Without it, or with
--baseline, the script builds the distance by hand from AlexNet's features: the UNWEIGHTED "baseline" variant, which has
no trained linear weights, so that its values are not LPIPS values. Without --weights even its filters are random.

`fuse` needs no knowledge of the metric: it finds the Sequential slices inside.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from alexnet_kernels import alexnet, fuse

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of LPIPS, for images in -1..1


class Baseline(nn.Module):
    """Squared differences of AlexNet's five ReLU outputs, each of unit length across channels; images [N, 3, H, W]."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        features = alexnet(weights).features
        self.slices = nn.ModuleList(nn.Sequential(*features[a:b]) for a, b in pairwise((0, 2, 5, 8, 10, 12)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, total = (a - self.mean) / self.std, (b - self.mean) / self.std, 0.0
        for part in self.slices:
            a, b = part(a), part(b)
            difference = nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)
            total = total + difference.square().sum(1, keepdim=True).mean((2, 3), keepdim=True)
        return total


def distances(metric: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """The distance of each pair, its gradient with respect to `a`, and the milliseconds of the fastest of five runs."""
    times = []
    for _ in range(5):
        image, begin = a.clone().requires_grad_(), time.perf_counter()
        value = metric(image, b).flatten()
        (gradient,) = torch.autograd.grad(value.sum(), image)
        if a.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return value.detach(), gradient, 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", action="store_true", help="the unweighted variant, even where lpips is installed")
    parser.add_argument("--weights", help="of the baseline's AlexNet, torchvision's layers; default: random")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # compare in full float32

    if args.baseline or importlib.util.find_spec("lpips") is None:
        print("unweighted baseline, not LPIPS:", args.weights or "random filters")
        plain: nn.Module = Baseline(args.weights)
    else:
        import lpips

        plain = lpips.LPIPS(net="alex", verbose=False)
    plain = plain.eval().to(args.device, memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain))

    a = torch.rand(4, 3, args.size, args.size, device=args.device).mul(2).sub(1).to(memory_format=torch.channels_last)
    noise = torch.tensor([0.0, 0.05, 0.2, 0.8], device=args.device).view(4, 1, 1, 1)
    b = (a + noise * torch.randn_like(a)).clamp(-1, 1)
    expected, expected_gradient, plain_time = distances(plain, a, b)
    actual, gradient, fused_time = distances(fused, a, b)
    for sigma, before, after in zip(noise.flatten().tolist(), expected.tolist(), actual.tolist(), strict=True):
        print(f"noise {sigma:.2f}: distance {before:.6f}, fused {after:.6f}")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    # Not of the equal pair: lpips divides by the norm of features, which may be zero there.
    torch.testing.assert_close(
        gradient[1:], expected_gradient[1:], rtol=1e-2, atol=1e-3 * gradient[1:].abs().max().item()
    )
    print(f"distances and gradients agree; {plain_time:.1f} ms, fused {fused_time:.1f} ms")


if __name__ == "__main__":
    main()
