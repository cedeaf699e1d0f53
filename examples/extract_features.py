"""Extract features from inner layers of an AlexNet and save them as an .npz file.

    python examples/extract_features.py --weights DEFAULT --data FOLDER --out features.npz
    python examples/extract_features.py --limit 8 --size 64 --layers features.12 classifier.5

FOLDER holds `val/<class>/<image>`; without it the package's own images are taken. --weights is as in fine_tune.py;
without it the filters are random, and the features only show that the script works. Layers are named as
`print(alexnet())` shows them: classifier.5, say, is fc7 after ReLU. Maps are averaged over their pixels.

The features come from forward hooks. A layer with a hook is called by itself, so that the hook sees its output; all
others still run fused.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from images import MEAN, STD, load_images
from torch import Tensor, nn

from alexnet_kernels import alexnet


def record(outputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A forward hook that appends what its layer computes, [N, C] or [N, C, H, W], as float32 [N, C] on the CPU."""

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A copy: a ReLU that works in place may overwrite the output.
        outputs.append((output.mean((2, 3)) if output.dim() == 4 else output.clone()).float().cpu())

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images; default: the package's own")
    parser.add_argument("--weights", help="of the network; default: random")
    parser.add_argument("--preset", default="torchvision")
    parser.add_argument("--layers", nargs="+", default=["features.12", "classifier.5"], metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images, pixels")
    parser.add_argument("--limit", type=int, help="images of each class; default: all")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--out", type=Path, default=Path("features.npz"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    images, labels, classes, names = load_images(args.data, "val", args.size, args.limit)
    model = alexnet(args.weights, preset=args.preset).eval().to(args.device, memory_format=torch.channels_last)
    found: dict[str, list[Tensor]] = defaultdict(list)
    for name in args.layers:
        model.get_submodule(name).register_forward_hook(record(found[name]))
    with torch.inference_mode():
        for batch in images.split(args.batch):
            # Permuting [N, H, W, 3] gives NCHW in channels_last: no copy.
            model(((batch.to(args.device) - MEAN.to(args.device)) / STD.to(args.device)).permute(0, 3, 1, 2))

    features = {name: torch.cat(outputs).numpy() for name, outputs in found.items()}
    np.savez(args.out, labels=labels.numpy(), classes=np.array(classes), names=np.array(names), **features)
    for name, values in features.items():
        print(f"{name}: {values.shape[0]} x {values.shape[1]}, mean {values.mean():.4f}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
