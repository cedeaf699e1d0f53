"""Representational similarity analysis of an AlexNet: which layers tell categories apart, and which layers are alike.

    python examples/rsa.py run/best.ckpt --out rsa.png
    python examples/rsa.py run/best.ckpt --other caffenet.safetensors --layers pool1 pool2 relu3 relu4 pool5 relu6 relu7
    python examples/rsa.py --images 2 --size 96 --width 0.1

Each layer's representational dissimilarity matrix (RDM) is 1 - Pearson's correlation between its responses to two
images (Kriegeskorte, Mur, Bandettini 2008). It is compared with the category model, in which images of one category are
alike and all others are not, by Spearman's correlation and by Kendall's tau-a, which Nili et al. 2014 advise for models
with ties; the p-value is that of a permutation of the images. Layers of two networks are compared by Spearman's
correlation of their RDMs. A network's responses have no noise, so there is no noise ceiling.

Images are those of val/<class>/ in --data, or of the package. Without a checkpoint the weights are random, which is a
baseline to report, not only a demonstration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from images import MEAN, STD, load_images

from alexnet_kernels import AlexNet, features
from alexnet_kernels.training.checkpoint import load_network

LAYERS = ["pool1", "pool2", "relu3", "relu4", "pool5", "relu6", "relu7"]


def responses(checkpoint: Path | None, args: argparse.Namespace) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Activations of each layer, [N, features]; the images' categories [N] and the categories' names."""
    if checkpoint is None:
        torch.manual_seed(args.seed)
        network = AlexNet(preset=args.preset, width=args.width)
        size = args.size or network.input_size
        images, labels, classes, _ = load_images(args.data, "val", size, args.images)
        x = ((images - MEAN) / STD).permute(0, 3, 1, 2)
    else:
        network = load_network(checkpoint)
        # A network of load_network knows the size, the crop and the mean of its images.
        x, labels, classes, _ = load_images(args.data, "val", network.header.stored_size, args.images)
    found = features.extract(network, x, args.layers)
    return {name: y.flatten(1).double().numpy() for name, y in found.items()}, labels.numpy(), classes


def rdm(x: np.ndarray) -> np.ndarray:
    """1 - Pearson's correlation between the rows of x, [N, features]; NaN for a row without variance."""
    with np.errstate(invalid="ignore", divide="ignore"):
        z = x - x.mean(1, keepdims=True)
        z /= np.linalg.norm(z, axis=1, keepdims=True)
    return 1 - z @ z.T


def pairs(matrix: np.ndarray) -> np.ndarray:
    """The elements above the diagonal: each pair of images once."""
    return matrix[np.triu_indices(len(matrix), 1)]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, the mean rank for ties."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def kendall_tau_a(a: np.ndarray, b: np.ndarray) -> float:
    """The pairs of elements in the same order minus those in opposite order, over all pairs."""
    total = sum(float(np.sign(a[i + 1 :] - a[i]) @ np.sign(b[i + 1 :] - b[i])) for i in range(len(a) - 1))
    return total / (len(a) * (len(a) - 1) / 2)


def permutation_p(matrix: np.ndarray, model: np.ndarray, count: int, seed: int) -> float:
    """How often the model's correlation with the RDM is as high if the images are in random order."""
    generator, found = np.random.default_rng(seed), spearman(pairs(matrix), pairs(model))
    orders = (generator.permutation(len(model)) for _ in range(count))
    higher = sum(spearman(pairs(matrix), pairs(model[np.ix_(order, order)])) >= found for order in orders)
    return (higher + 1) / (count + 1)


def draw(rdms: dict[str, np.ndarray], category: np.ndarray, alike: np.ndarray, others: list[str], out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = {**rdms, "category model": category}
    figure, axes = pyplot.subplots(1, len(shown) + 1, figsize=(2.4 * (len(shown) + 1), 3.4), layout="constrained")
    for axis, (name, matrix) in zip(axes, shown.items(), strict=False):
        axis.imshow(matrix, vmin=0, vmax=np.nanpercentile(pairs(matrix), 99), cmap="viridis")
        axis.set(title=name, xticks=[], yticks=[])
    axes[-1].imshow(alike, vmin=0, vmax=1, cmap="magma")
    axes[-1].set(title="RDMs, Spearman", xticks=range(len(others)), yticks=range(len(rdms)), yticklabels=list(rdms))
    axes[-1].set_xticklabels(others, rotation=90)
    figure.savefig(out, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="of the network; default: random weights")
    parser.add_argument("--other", type=Path, help="another network to compare layers with; default: the same")
    parser.add_argument("--layers", nargs="+", default=LAYERS, metavar="NAME")
    parser.add_argument("--data", type=Path, help="a folder with val/<class>/; default: the package's images")
    parser.add_argument("--images", type=int, default=8, help="of each category")
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--preset", default="torchvision", help="of random weights")
    parser.add_argument("--width", type=float, default=1.0, help="of random weights")
    parser.add_argument("--size", type=int, help="of the images for random weights, pixels; default: the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a picture of the RDMs, .png")
    args = parser.parse_args()

    found, labels, classes = responses(args.checkpoint, args)
    rdms = {name: rdm(x) for name, x in found.items()}
    category = (labels[:, None] != labels[None]).astype(float)
    print(f"{len(labels)} images of {len(classes)} categories, {args.checkpoint or 'random weights'}")
    print("layer     Spearman  tau-a      p   (with the category model)")
    for name, matrix in rdms.items():
        values = pairs(matrix), pairs(category)
        p = permutation_p(matrix, category, args.permutations, args.seed)
        print(f"{name:9} {spearman(*values):8.3f} {kendall_tau_a(*values):6.3f} {p:6.3f}")

    others = rdms
    if args.other is not None:
        theirs, _, their_classes = responses(args.other, args)
        if their_classes != classes:
            parser.error("the networks saw images of different categories")
        others = {name: rdm(x) for name, x in theirs.items()}
    alike = np.array([[spearman(pairs(a), pairs(b)) for b in others.values()] for a in rdms.values()])
    print(f"\nSpearman between RDMs, rows {args.checkpoint or 'random'}, columns {args.other or 'the same'}")
    print(" " * 9 + "".join(f"{name:>9}" for name in others))
    for name, row in zip(rdms, alike, strict=True):
        print(f"{name:9}" + "".join(f"{value:9.3f}" for value in row))
    if args.out is not None:
        draw(rdms, category, alike, list(others), args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
