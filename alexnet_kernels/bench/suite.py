"""Problems of KernelBench (Ouyang et al. 2025) about AlexNet's layers, and one of its own, as PyTorch modules.

Shapes and arguments are the suite's, the code is not. A problem's model stays in training mode, as the suite runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["PROBLEMS", "Problem"]


class AlexNetByAttributes(nn.Module):
    """AlexNet without normalisation and groups, as a forward over attributes. [N, 3, 224, 224] to [N, 1000]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4, padding=2)
        self.relu1 = nn.ReLU(inplace=True)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2)
        self.relu2 = nn.ReLU(inplace=True)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.relu3 = nn.ReLU(inplace=True)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1)
        self.relu4 = nn.ReLU(inplace=True)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1)
        self.relu5 = nn.ReLU(inplace=True)
        self.maxpool3 = nn.MaxPool2d(3, stride=2)
        self.fc1 = nn.Linear(256 * 6 * 6, 4096)
        self.relu6 = nn.ReLU(inplace=True)
        self.dropout1 = nn.Dropout(p=0.0)
        self.fc2 = nn.Linear(4096, 4096)
        self.relu7 = nn.ReLU(inplace=True)
        self.dropout2 = nn.Dropout(p=0.0)
        self.fc3 = nn.Linear(4096, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.relu1(self.conv1(x)))
        x = self.maxpool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.conv3(x))
        x = self.relu4(self.conv4(x))
        x = self.maxpool3(self.relu5(self.conv5(x)))
        x = torch.flatten(x, 1)
        x = self.dropout1(self.relu6(self.fc1(x)))
        x = self.dropout2(self.relu7(self.fc2(x)))
        return self.fc3(x)


@dataclass(frozen=True)
class Problem:
    """A model and the shape of its input, which is uniform in [0, 1).

    shape: the suite's, with the batch that it has.
    cpu_batch: the batch on a CPU, where the suite's would take minutes.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int, int]
    cpu_batch: int


PROBLEMS = (
    Problem("KernelBench level 3 problem 5, AlexNet", AlexNetByAttributes, (1024, 3, 224, 224), 32),
    Problem(
        "KernelBench level 1 problem 50, conv1",
        lambda: nn.Conv2d(3, 96, 11, stride=4, padding=2),
        (256, 3, 224, 224),
        32,
    ),
    Problem(
        "KernelBench level 1 problem 42, max-pool",
        lambda: nn.MaxPool2d(4, stride=1, padding=1, dilation=1),
        (32, 64, 512, 512),
        1,
    ),
    Problem("KernelBench level 1 problem 33, batch norm", lambda: nn.BatchNorm2d(64), (64, 64, 512, 512), 1),
    Problem(
        "LRN after conv1, not of KernelBench",
        lambda: nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
        (256, 96, 55, 55),
        32,
    ),
)
