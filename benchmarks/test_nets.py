"""Whole networks: inference and training steps."""

from __future__ import annotations


def test_net(row, direction, variant, report) -> None:
    report(row, direction, variant)
