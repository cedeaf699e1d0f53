"""Problems of KernelBench, by torch.compile with this package's backend."""

from __future__ import annotations


def test_problem(row, direction, variant, give_report) -> None:
    give_report(row, direction, variant)
