"""Whole networks: inference and training steps."""

from __future__ import annotations


def test_net(row, direction, variant, give_report) -> None:
    give_report(row, direction, variant)
