"""One record an op: its arguments, definition, tolerances, baselines and least work.

`OP_INFOS` holds them by name. Contract tests, emulation, Triton checks, benchmarks, the GPU check and the resource
reports iterate it: an op that has a record is in all of them.
"""

import importlib
import pkgutil

from alexnet_kernels.op_info._calls import OperatorCall, forward_backward, operator_calls, with_gradients
from alexnet_kernels.op_info._record import Baseline, Layer, Maker, OpInfo, Sample, Setting, Work, sample

OP_INFOS: dict[str, OpInfo] = {}
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        OP_INFOS[_module.name] = importlib.import_module(f"{__name__}.{_module.name}").INFO
OP_INFOS = dict(sorted(OP_INFOS.items(), key=lambda item: item[1].order))

__all__ = [
    "OP_INFOS",
    "Baseline",
    "Layer",
    "Maker",
    "OpInfo",
    "OperatorCall",
    "Sample",
    "Setting",
    "Work",
    "forward_backward",
    "operator_calls",
    "sample",
    "with_gradients",
]
