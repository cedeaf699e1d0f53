"""Activations of AlexNet's layers: of tensors in memory, or of any number of images into files.

| module | |
|---|---|
| `layers` | names of layers; the forward pass up to the last wanted one |
| `memory` | activations of tensors |
| `images` | images of a split, a folder or a list of files |
| `store` | files of activations, written in place and read as memory-mapped arrays |
| `run` | activations of images into a folder, which can be interrupted |

Importing the package needs no optional package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alexnet_kernels.features.layers import Layer, find_layers, layers_of
from alexnet_kernels.features.memory import extract
from alexnet_kernels.features.store import Features, load

__all__ = ["Features", "Layer", "extract", "extract_to", "find_layers", "layers_of", "load"]


def extract_to(out: str | Path, network: Any, data: str | Path | None = None, **options: Any) -> Features:
    """Write the activations of images into a folder, and return them. See `run.extract_to`. Needs Pillow."""
    from alexnet_kernels.features import run

    return run.extract_to(out, network, data, **options)
