"""Fine-tune an AlexNet on a folder of images.

    python examples/fine_tune.py --data FOLDER --weights DEFAULT    # torchvision's ImageNet weights, downloaded
    python examples/fine_tune.py --data FOLDER --weights alexnet.safetensors --preset batchnorm
    python examples/fine_tune.py --size 64 --width 0.5              # the package's images, from random weights

FOLDER holds `train/<class>/<image>` and `val/<class>/<image>`, read into memory. --weights takes what
`alexnet_kernels.alexnet` takes: a file of weights (docs/weights.md) or the name of torchvision's. Pixels are normalised
as torchvision's weights expect. Without --weights the network is trained from scratch: accuracy then shows that the
script works, not what fine-tuning reaches.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from images import MEAN, STD, load_images
from torch import Tensor, nn

from alexnet_kernels import AlexNet, alexnet, ops, optim


def prepare(images: Tensor, size: int, device: str, training: bool) -> Tensor:
    """Crop, in training at random and mirrored, and normalise: uint8 [N, S, S, 3] to float32 [N, 3, size, size]."""
    n, margin = len(images), images.shape[1] - size
    crops = torch.randint(0, margin + 1, (n, 2)) if training else torch.full((n, 2), margin // 2)
    flips = torch.rand(n) < 0.5 if training else torch.zeros(n, dtype=torch.bool)
    images, crops, flips = images.to(device), crops.to(device), flips.to(device)
    return ops.augment(images, crops, size, flips, mean=MEAN.to(device), scale=1 / STD.to(device))


@torch.no_grad()
def accuracy(model: AlexNet, images: Tensor, labels: Tensor, size: int, device: str) -> float:
    model.eval()
    batches = zip(images.split(64), labels.split(64), strict=True)
    right = sum(int((model(prepare(x, size, device, False)).argmax(1).cpu() == y).sum()) for x, y in batches)
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images; default: the package's own")
    parser.add_argument("--weights", help="initial weights; default: random")
    parser.add_argument("--preset", help="default: torchvision, batchnorm without --weights")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the preset's filters and neurons")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops, pixels")
    parser.add_argument("--limit", type=int, help="images of each class; default: all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument(
        "--lr", type=float, default=0.01, help="rate of the new layer; weights that were given: a tenth"
    )
    parser.add_argument("--out", type=Path, help="where to write the state_dict (.pth)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    stored = args.size * 8 // 7  # 256 for crops of 224
    images, labels, classes, _ = load_images(args.data, "train", stored, args.limit)
    val_images, val_labels, _, _ = load_images(args.data, "val", stored, args.limit)
    print(f"{len(images)} training and {len(val_images)} validation images of {len(classes)} classes")

    preset = args.preset or ("torchvision" if args.weights else "batchnorm")
    model = alexnet(args.weights, preset=preset, width=args.width)
    model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, len(classes))
    model.to(args.device, memory_format=torch.channels_last)
    head = list(model.classifier[-1].parameters())
    body = [parameter for parameter in model.parameters() if all(parameter is not p for p in head)]
    groups = [{"params": head}, {"params": body, "lr": args.lr / 10 if args.weights else args.lr}]
    optimizer = optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=5e-4)

    for epoch in range(args.epochs):
        begin, total = time.perf_counter(), 0.0
        model.train()
        for index in torch.randperm(len(images)).split(args.batch):
            output = model(prepare(images[index], args.size, args.device, True))
            loss = F.cross_entropy(output, labels[index].to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
        rate = len(images) / (time.perf_counter() - begin)  # of training alone
        top1 = accuracy(model, val_images, val_labels, args.size, args.device)
        print(f"epoch {epoch + 1}: loss {total / len(images):.3f}, validation accuracy {top1:.1%}, {rate:.0f} images/s")
    if args.out:
        torch.save(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
