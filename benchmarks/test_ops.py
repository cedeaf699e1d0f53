"""Every op at AlexNet's layers, forward and backward, and the optimizer's step."""

from __future__ import annotations


def test_op(row, direction, variant, give_report) -> None:
    give_report(row, direction, variant)
