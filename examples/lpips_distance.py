"""LPIPS, the perceptual distance of Zhang et al. 2018: pairs, gradients, kept references, all pairs.

    python examples/lpips_distance.py --weights DEFAULT      # LPIPS values: torchvision downloads AlexNet's weights
    python examples/lpips_distance.py --weights alexnet.pth  # the same, of a file
    python examples/lpips_distance.py --baseline --size 64   # no linear weights, and random filters: not LPIPS values

The linear weights are those of the package lpips or torchmetrics, whichever is installed. Where lpips is, the script
compares distances, gradients and times with it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from alexnet_kernels import LPIPS, fuse


def peer(metric: LPIPS) -> torch.nn.Module | None:
    """The package's metric with the same weights; None where it is not installed."""
    if importlib.util.find_spec("lpips") is None or importlib.util.find_spec("torchvision") is None:
        return None
    import lpips

    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        theirs = lpips.LPIPS(net="alex", lpips=metric.lpips, pretrained=False, pnet_rand=True)
    theirs.load_state_dict(metric.state_dict())
    return theirs


def gradients(metric: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
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
    parser.add_argument("--baseline", action="store_true", help="the variant without linear weights")
    parser.add_argument("--weights", help="AlexNet's: a file, or DEFAULT for torchvision's; default: random filters")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # compare in full float32

    options = {"pnet_rand": True} if args.weights is None else {"weights": args.weights}
    metric = LPIPS(lpips=not args.baseline, **options).to(args.device)
    if args.baseline:
        print("unweighted baseline, not LPIPS")
    if args.weights is None:
        print("random filters, not LPIPS")

    # Images in -1..1; normalize=True takes 0..1.
    a = torch.rand(4, 3, args.size, args.size, device=args.device) * 2 - 1
    noise = torch.tensor([0.0, 0.05, 0.2, 0.8], device=args.device).view(4, 1, 1, 1)
    b = (a + noise * torch.randn_like(a)).clamp(-1, 1)
    value, gradient, milliseconds = gradients(metric, a, b)
    for sigma, distance in zip(noise.flatten().tolist(), value.tolist(), strict=True):
        print(f"noise {sigma:.2f}: distance {distance:.6f}")

    # References that stay the same go through AlexNet once.
    references = metric.features(b)
    kept, kept_gradient, kept_milliseconds = gradients(lambda x, _: metric(x, references), a, b)
    torch.testing.assert_close(kept, value, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept_gradient, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
    print(f"forward and backward: {milliseconds:.1f} ms, with kept references {kept_milliseconds:.1f} ms")

    # All 16 pairs from 8 images: the diagonal is the pairs above.
    pairs = metric.pairwise(a, references)
    torch.testing.assert_close(pairs.diagonal(), value, rtol=1e-4, atol=1e-6)
    print("all pairs:", "; ".join(" ".join(f"{distance:.3f}" for distance in row) for row in pairs.tolist()))

    theirs = peer(metric)
    if theirs is None:
        print("lpips is not installed: nothing to compare with")
        return
    theirs = theirs.to(args.device)
    expected, expected_gradient, their_milliseconds = gradients(theirs, a, b)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item())
    _, _, fused_milliseconds = gradients(fuse(theirs), a, b)
    print(f"lpips agrees: {their_milliseconds:.1f} ms, fused {fused_milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
