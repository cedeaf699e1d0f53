from __future__ import annotations

import math

import pytest

from alexnet_kernels.training.diagnosis import Movement, hint, learns

LAYERS = ("conv1", "conv2", "fc3")


def layers(*ratios: float, decay: float = 5e-5) -> list[Movement]:
    return [Movement(name, ratio, decay) for name, ratio in zip(LAYERS, ratios, strict=True)]


@pytest.mark.parametrize(
    ("loss", "learning"), [(0.5, True), (2.25, True), (2.26, False), (2.303, False), (4.0, False), (math.nan, True)]
)
def test_the_loss_of_guessing(loss: float, learning: bool) -> None:
    assert learns(loss, 10) == learning


@pytest.mark.parametrize(
    ("loss", "moved", "he", "expected"),
    [
        (
            2.31,
            layers(4.9e-5, 6e-5, 1e-2),
            False,
            "is that of guessing, ln(10) = 2.303; no gradients reach conv1 to conv2",
        ),
        (2.31, layers(0.0, 1e-3, 1e-2, decay=0.0), False, "no gradients reach conv1: try --init he, or a lower --lr"),
        (2.31, layers(4.9e-5, 1e-2, 1e-2), True, "no gradients reach conv1: try a lower --lr"),
        (3.5, layers(5e-5, 5e-5, 5e-5), False, "is above that of guessing, ln(10) = 2.303; all units are dead"),
        (3.5, layers(math.nan, 0.0, 0.0, decay=0.0), False, "all units are dead"),
        (3.5, layers(1e-3, 1e-3, 1e-3), False, "ln(10) = 2.303; try a lower --lr"),
        (2.3, layers(1e-3, 5e-5, 1e-3), False, "ln(10) = 2.303; try another --lr, or --init he"),
        (2.3, [], True, "ln(10) = 2.303; try another --lr"),
    ],
)
def test_what_the_hint_says(loss: float, moved: list[Movement], he: bool, expected: str) -> None:
    assert expected in hint(loss, 10, moved, he)
