"""LPIPS, against the packages lpips and torchmetrics."""

from __future__ import annotations


def test_lpips(row, direction, variant, give_report) -> None:
    give_report(row, direction, variant)
