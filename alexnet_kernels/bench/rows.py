"""The rows that `alexnet-kernels bench` and `pytest benchmarks/` measure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from alexnet_kernels.bench.cases import Case, cases
from alexnet_kernels.bench.lpips_row import lpips_rows
from alexnet_kernels.bench.network_row import NetRow
from alexnet_kernels.bench.op_row import OpRow
from alexnet_kernels.bench.optimizer_row import SgdRow
from alexnet_kernels.bench.row import COMPILED, PURPOSES, Row
from alexnet_kernels.bench.suite import PROBLEMS
from alexnet_kernels.bench.suite_row import suite_rows
from alexnet_kernels.models import PRESETS
from alexnet_kernels.op_info._record import OVERHEAD

KINDS = ("ops", "nets", "suite", "lpips")
BATCHES = {"cpu": (1, 32), "cuda": (1, 32, 128, 256, 1024)}
REFERENCE = {"cpu": 32, "cuda": 128}
"""The batch size at which compiled baselines are measured as well."""
SMOKE = 2
"""The batch size of a smoke run."""
SMOKE_TIMING: dict[str, Any] = {"seconds": 0.01, "rounds": 1}


def rows(
    device: torch.device, kinds: Collection[str] = KINDS, batches: Sequence[int] | None = None, smoke: bool = False
) -> list[Row]:
    """All rows, the most important first. `smoke`: small rows of every op, network and baseline.

    batches: of ops and networks; problems of a suite have the suite's, rows of LPIPS their own.
    """
    kind = device.type
    reference = SMOKE if smoke else REFERENCE[kind]
    chosen = (SMOKE,) if smoke else tuple(batches or BATCHES[kind])
    found: list[Row] = []
    if "ops" in kinds:
        found += _ops(chosen, reference, smoke)
    if "nets" in kinds:
        found += _nets(chosen, reference, smoke)
    if "suite" in kinds:
        found += suite_rows(PROBLEMS, device, 1 if smoke else None)
    if "lpips" in kinds:
        found += lpips_rows(smoke)
    return found


def _ops(batches: Sequence[int], reference: int, smoke: bool) -> list[Row]:
    every = cases()
    if smoke:  # each op in each dtype and format, at the layer with the least work
        cheapest: dict[Any, Case] = {}
        for case in every:
            key = case.op, case.dtype, case.channels_last, case.layer == OVERHEAD
            if key not in cheapest or case.work.moved(1, True) < cheapest[key].work.moved(1, True):
                cheapest[key] = case
        every = list(cheapest.values())
    compiles = [case for case in every if case.core and case.channels_last and case.dtype != torch.float16]
    if smoke:
        compiles = [case for case in compiles if case.op == "max_pool2d" and case.dtype == torch.float32]
    compiled = {case.name for case in compiles}
    matrices = ("conv2d_relu", "linear_relu_dropout")  # ops whose kernels autotuning can choose

    def row(case: Case, batch: int) -> Row:
        names: tuple[str, ...] = ()
        if batch == reference and case.name in compiled and case.op != "augment":
            names = tuple(COMPILED) if case.op in matrices or smoke else ("compiled",)
        return OpRow(case, batch, names)

    found: list[Row] = [row(case, batch) for case in every if case.layer != OVERHEAD for batch in batches]
    found.append(SgdRow(small=smoke))
    return found + [OpRow(case, 1) for case in every if case.layer == OVERHEAD]


def _nets(batches: Sequence[int], reference: int, smoke: bool) -> list[Row]:
    found: list[Row] = []
    main = ("paper", "torchvision")
    for channels_last in (True, False):
        for dtype in (torch.bfloat16, torch.float32):
            for preset in PRESETS if channels_last and not smoke else main:
                for batch in batches:
                    for purpose in PURPOSES:
                        row = NetRow(preset, batch, purpose, dtype, channels_last)
                        if smoke:
                            row = dataclasses.replace(row, width=0.05)
                        compiles = batch == reference and channels_last and preset in main
                        if smoke:
                            compiles = compiles and (preset, dtype) == ("paper", torch.float32)
                        if compiles:
                            row = dataclasses.replace(row, compile=(*COMPILED, "hardened"))
                        found.append(row)
    if smoke:  # torchvision's model has full width
        found.append(NetRow("torchvision", 1, "inference", torch.float32))
        found += [NetRow(preset, SMOKE, "training step", width=0.05) for preset in PRESETS if preset not in main]
    return found


def select(found: Sequence[Row], only: str | None) -> list[Row]:
    """The rows whose name matches the regular expression somewhere."""
    return [row for row in found if only is None or re.search(only, row.name)]
