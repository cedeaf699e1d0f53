"""Which convolutions the CUDA operator gives to cuDNN's kernel with bias and ReLU, for which there is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from platforms import emulation

pytestmark = pytest.mark.skipif(
    emulation is None or torch.cuda.is_available(), reason="needs pybind11, and a machine without a GPU"
)

# Prints, for each convolution, whether the stand-in computed it, and whether the results are those of torch.
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, torch.nn.functional as F
from platforms import emulation
from alexnet_kernels.ops.conv2d_relu import LIBRARY, conv2d_relu_by

calls, acceptable = [], [True]

def convolution_relu(input, weight, bias, stride, padding, dilation, groups):
    calls.append((input.shape, weight.shape, stride, padding, dilation, groups))
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()

library = torch.library.Library("aten", "IMPL")
library.impl("cudnn_convolution_relu", convolution_relu, "CPU")
library.impl("cudnn_is_acceptable", lambda input: acceptable[0], "CPU")

LAST = torch.channels_last
CONV3 = dict(x=(2, 256, 13, 13), w=(384, 256, 3, 3), padding=1)
CASES = {
    "conv3": CONV3,
    "conv3, float16": {**CONV3, "dtype": torch.float16},
    "conv3, no bias": {**CONV3, "bias": False},
    "conv3, sliced bias": {**CONV3, "sliced": True},
    "strided": dict(x=(2, 8, 9, 9), w=(16, 8, 3, 3), stride=2),
    "conv4": dict(x=(2, 384, 13, 13), w=(384, 192, 3, 3), padding=1, groups=2),
    "float32": {**CONV3, "dtype": torch.float32},
    "nchw": {**CONV3, "format": torch.contiguous_format},
    "no relu": {**CONV3, "relu": False},
    "not acceptable": {**CONV3, "acceptable": False},
    "deterministic algorithms": {**CONV3, "mode": "algorithms"},
    "deterministic cuDNN": {**CONV3, "mode": "cudnn"},
    "no images": {**CONV3, "x": (0, 256, 13, 13)},
}

def run(x, w, padding=0, stride=1, groups=1, dtype=torch.bfloat16, format=LAST, relu=True, bias=True, sliced=False,
        acceptable_now=True, mode=""):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(mode == "algorithms")
    torch.backends.cudnn.deterministic = mode == "cudnn"
    # Multiples of which every sum is exact: the order of additions and roundings in between do not matter.
    x = torch.randint(-1, 2, x).to(dtype).contiguous(memory_format=format).requires_grad_()
    w = (torch.randint(-1, 2, w).to(dtype) / 64).requires_grad_()
    b = torch.randint(-3, 4, (w.shape[0] * 2,)).to(dtype)[::2]
    b = None if not bias else b.requires_grad_() if sliced else b.contiguous().requires_grad_()
    leaves = [x, w] if b is None else [x, w, b]
    acceptable[0] = acceptable_now
    calls.clear()
    results = []
    for backend in ("cuda", "native"):
        out = conv2d_relu_by(LIBRARY, x, w, b, stride, padding, groups, relu=relu, backend=backend)
        grad = torch.arange(out.numel()).reshape(out.shape) % 3 - 1
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    same = all(torch.allclose(a.float(), e.float(), rtol=0.02, atol=0.02) for a, e in zip(*results))
    formats = results[0][0].stride() == results[1][0].stride()
    return [len(calls), same and formats]

with emulation.emulated():
    found = {name: run(**{("acceptable_now" if k == "acceptable" else k): v for k, v in case.items()})
             for name, case in CASES.items()}
    errors = []
    k = torch.ops.alexnet_kernels_emulated
    x, w, b = torch.zeros(2, 8, 9, 9), torch.zeros(16, 8, 3, 3), torch.zeros(16)
    x, w, b = x.bfloat16().contiguous(memory_format=LAST), w.bfloat16(), b.bfloat16()
    wrong = {
        "channels": (x, w[:, :4], b, [1, 1], [0, 0]),
        "size": (x, w.expand(16, 8, 3, 3).repeat(1, 1, 4, 4), b, [1, 1], [0, 0]),
        "dtype of the weight": (x, w.half(), b, [1, 1], [0, 0]),
        "dtype of the bias": (x, w, b.float(), [1, 1], [0, 0]),
        "short bias": (x, w, b[:8], [1, 1], [0, 0]),
    }
    acceptable[0] = True
    calls.clear()
    for name, arguments in wrong.items():
        try:
            k.conv2d_relu(*arguments, 1, True)
        except RuntimeError:
            errors.append(name)
print(json.dumps([found, errors, len(calls), list(wrong)]))
"""


def test_which_convolutions_cudnn_fuses() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found, refused, calls, wrong = json.loads(result.stdout.splitlines()[-1])
    fused = {"conv3", "conv3, float16", "conv3, no bias", "conv3, sliced bias", "strided"}
    assert {name for name, (called, _) in found.items() if called} == fused
    assert all(right for _, right in found.values()), found
    assert refused == wrong
    assert calls == 0
