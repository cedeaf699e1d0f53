"""The report of benchmarks/triton_resources.py on the Triton kernels, and whether the committed report agrees."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import alexnet_kernels
from alexnet_kernels import _library

PACKAGE = Path(alexnet_kernels.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMITTED = BENCHMARKS / "results" / "triton_resources.json"
ONLY = os.environ.get("ALEXNET_KERNELS_TEST_RESOURCES", "bfloat16$")  # the others take minutes more
KEY = ("operator", "layer", "dtype", "launch", "kernel", "arch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _library.TRITON_INSTALLED, reason="triton is not installed"),
]


@dataclass(frozen=True)
class Run:
    """The script's exit status, errors and report."""

    status: int
    errors: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    cwd = tmp_path_factory.mktemp("triton_resources")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(BENCHMARKS / "triton_resources.py"), "--out", "report", "--only", ONLY]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    path = cwd / "report.json"
    assert path.exists(), result.stderr
    return Run(result.returncode, result.stderr, json.loads(path.read_text()))


def rows_of(report: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    rows = {tuple(row[name] for name in KEY): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]), "two rows of one key"
    return rows


def launched_kernels() -> set[str]:
    """Every @triton.jit function of the package that no other one calls."""
    jitted, used = set(), set()
    for path in (PACKAGE / "triton").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                jitted.add(node.name)
                used |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return jitted - used


def test_the_script_finds_no_problem(run: Run) -> None:
    assert run.status == 0, run.errors


def test_no_kernel_spills(run: Run) -> None:
    # ptxas may spill up to 16 bytes a thread to raise occupancy.
    spilling = [k for k, row in rows_of(run.report).items() if max(row["spill_stores"], row["spill_loads"]) > 16]
    assert spilling == []


def test_half_precision_matrices_are_multiplied_by_tensor_cores(run: Run) -> None:
    matrix = {key: row for key, row in rows_of(run.report).items() if row["dots"] and row["dtype"] != "float32"}
    assert {row["operator"] for row in matrix.values()} >= {
        "conv2d_relu",
        "conv2d_relu_backward_input",
        "conv2d_relu_backward_weight",
    }
    expected = {"sm_80": {"mma.sync"}, "sm_90": {"wgmma.mma_async"}, "sm_100": {"mma.sync", "tcgen05.mma"}}
    without = [key for key, row in matrix.items() if not expected[row["arch"]] & set(row["tensor_cores"])]
    assert without == []


def test_every_operator_and_every_kernel_is_reported(run: Run) -> None:
    import alexnet_kernels.triton  # noqa: F401

    prefix = f"{_library.TRITON_NAMESPACE}::"
    names = torch._C._dispatch_get_all_op_names()
    operators = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    assert {row["operator"] for row in run.report["rows"]} == operators
    assert {row["kernel"] for row in run.report["rows"]} == launched_kernels()


def test_the_committed_report_is_true(run: Run) -> None:
    committed = json.loads(COMMITTED.read_text())
    actual = rows_of(run.report)
    expected = {key: row for key, row in rows_of(committed).items() if re.search(ONLY, row["dtype"])}
    assert set(actual) == set(expected), "run benchmarks/triton_resources.py --out benchmarks/results/triton_resources"

    def compilers(report: dict[str, Any]) -> dict[str, str]:
        return {name: version for name, version in report["versions"].items() if name != "torch"}

    if compilers(run.report) == compilers(committed):
        changed = {key: (row, expected[key]) for key, row in actual.items() if row != expected[key]}
        assert changed == {}, "run benchmarks/triton_resources.py --out benchmarks/results/triton_resources"
