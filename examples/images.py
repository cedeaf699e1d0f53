"""Images for the examples: a folder `<split>/<class>/<image>`, or the 5,000 that come with the package."""

from __future__ import annotations

import zipfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Of ImageNet's pixels, 0..255: what torchvision's weights expect.
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def load_images(
    data: Path | None, split: str, size: int, limit: int | None = None
) -> tuple[Tensor, Tensor, list[str], list[str]]:
    """Read one split into memory.

    Args:
        data: a folder with `train/<class>/<image>` and `val/<class>/<image>`; None: the package's images.
        split: "train" or "val".
        size: each image becomes a square of this side, cut from its centre.
        limit: images of each class; None: all.

    Returns:
        images, uint8 [N, size, size, 3]; labels, int64 [N]; the classes' names; the images' names.
    """
    root: Any = data or zipfile.Path(str(files("alexnet_kernels") / "data" / "cifar10_small.zip"))
    folders = sorted((entry for entry in (root / split).iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    images, labels, names = [], [], []
    for label, folder in enumerate(folders):
        paths = sorted((p for p in folder.iterdir() if p.name.lower().endswith(EXTENSIONS)), key=lambda p: p.name)
        for path in paths[:limit]:
            with path.open("rb") as file:
                square = ImageOps.fit(Image.open(file).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
            images.append(torch.from_numpy(np.array(square)))
            labels.append(label)
            names.append(f"{split}/{folder.name}/{path.name}")
    return torch.stack(images), torch.tensor(labels), [folder.name for folder in folders], names
