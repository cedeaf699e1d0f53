"""Checks and times this package on the device present, and writes one report.

    python -m alexnet_kernels.testing.gpu_check --out DIR [--minutes 8] [--device cuda] [--only PART ...]

Parts: environment, ceilings (copy bandwidth and GEMM rates measured here), tests (those marked gpu), sanitizer
(compute-sanitizer, where there is one), ops (every op against the definition, then timed beside its peers), nets. Each
runs in a process of its own: one that fails, crashes or takes too long is reported, and the others go on. DIR then
holds gpu_check.json and gpu_check.md, brought up to date after every part. The exit status is 0 if all that ran passed.

Without a GPU everything runs on the CPU, small, so that the command itself can be tested: its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alexnet_kernels import AlexNet, __version__, _library, backends, optim, use_backend
from alexnet_kernels.nn import LocalResponseNorm
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing import progress
from alexnet_kernels.testing.timing import (
    Call,
    DeviceLost,
    Failure,
    Timing,
    copy_rate,
    gemm_rate,
    guarded,
    input_sets,
    measure,
)

PACKAGE = Path(__file__).parents[1]
# The share of the time that each part may take.
SHARES = {"environment": 0.04, "ceilings": 0.05, "tests": 0.30, "sanitizer": 0.11, "ops": 0.32, "nets": 0.18}
OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
PYTEST_ENDED = (0, 1, 5)  # by itself: all passed, some failed, none were left
RESTARTS = 12  # of a part that crashed, without what it crashed in
STALL = 100.0  # seconds without a finding after which a part is taken to hang: compiling takes tens of seconds


class Budget:
    """Seconds that are left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


# The parts, as they run in their own process. Each yields what is to be merged into its section of the report.


def environment(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": platform.processor() or platform.machine(),
        "alexnet_kernels": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU threads",
        "triton": _version("triton"),
        "nvcc": _output(_tool("nvcc") or "nvcc", "--version", pattern=r"V([\d.]+)"),
        "library": _library.status(),
        "backends": backends.report(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", pattern=r"([\d.]+)"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    yield facts


def ceilings(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    large = device.type == "cuda"
    yield {"copy_bytes_per_second": copy_rate(device, 2**31 if large else 2**26)}
    size = 8192 if large else 512
    rates = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    gemm: dict[str, float] = {}
    for name, dtype in rates.items():
        gemm[name] = gemm_rate(device, size if dtype.itemsize == 2 else size // 2, dtype)
        yield {"gemm_operations_per_second": dict(gemm)}
    if large:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        gemm["tf32"] = gemm_rate(device, size // 2, torch.float32)
        torch.backends.cuda.matmul.allow_tf32 = before
        yield {"gemm_operations_per_second": dict(gemm)}


def time_ops(
    device: torch.device, budget: Budget, skip: set[str], only: Sequence[registry.Case] | None = None
) -> Iterator[dict[str, Any]]:
    """Every case: each variant is compared with the definition first, and timed only if it is right."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    gpu = device.type == "cuda"
    every = registry.cases()
    if not gpu:  # A processor takes long: one case of each op shows that the command works.
        every = list({case.op: case for case in every if case.dtype == torch.bfloat16}.values())
    chosen = every if only is None else only
    batch = 128 if gpu else 2
    for i, case in enumerate(chosen):
        if case.name in skip:
            continue
        if budget.left() < 2:
            yield {"unfinished": [c.name for c in chosen[i:]]}
            return
        yield {"current": case.name}
        share = min(20.0, max(1.0, budget.left() / (len(chosen) - i)))
        try:
            result = _time_case(case, batch, device, share, skip)
        except DeviceLost as lost:
            yield {"current": f"{case.name} by {lost.variant}"}
            raise
        yield {"cases": {case.name: result}, "finished": {case.name: True}}
    if SGD not in skip and only is None:
        yield {"current": SGD}
        try:
            result = _time_sgd(device, skip)
        except DeviceLost as lost:
            yield {"current": f"{SGD} by {lost.variant}"}
            raise
        yield {"cases": {SGD: result}}


def _time_case(
    case: registry.Case, batch: int, device: torch.device, seconds: float, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Times what computes the right values. `skip` names variants, "CASE by VARIANT", that lost the device before."""

    def by(backend: str) -> registry.Peer:
        outliers = registry.PEER_OUTLIERS if backend == "native" else registry.OUTLIERS
        return registry.Peer(lambda x: case.call(x, backend), outliers=outliers)

    variants: dict[str, registry.Peer] = {}
    reasons: dict[str, str] = {}
    for backend in OURS[device.type]:
        if reason := backends.unavailable(case.op, backend):
            reasons[backend] = reason
        else:
            variants[backend] = by(backend)
    if case.eager:
        variants["eager"] = by("native")
    variants |= {name: peer for name, peer in case.peers.items() if device.type == "cuda" or not peer.cuda_only}
    # Compiling takes seconds: half precision in the fast format is where it can win.
    if device.type == "cuda" and seconds > 3 and case.eager and case.dtype == torch.bfloat16 and case.channels_last:
        variants["compiled"] = compiled(by("native"))
    variants = {name: variant for name, variant in variants.items() if f"{case.name} by {name}" not in skip}
    expectation = registry.Expectation(case, 2, device)
    wrong: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, variant in list(variants.items()):
        if variant.checked:
            with guarded(name, device, errors):
                problem = expectation.problem(variant.call, variant.differentiable, variant.outliers)
                if problem:
                    wrong[name] = problem
            if name in wrong or name in errors:
                del variants[name]
    del expectation
    result: dict[str, Any] = {
        "op": case.op,
        "layer": case.layer,
        "batch": batch,
        "wrong": wrong,
        "errors": errors,
        "missing": reasons,
    }
    for direction in ("forward", "forward and backward"):
        backward = direction != "forward"
        if backward and not case.wrt:
            continue
        count = input_sets(int(case.moved(batch, backward)), device)
        inputs = [registry.with_gradients(case.make(batch, device), case.wrt) for _ in range(count)]
        calls: dict[str, list[Call]] = {}
        for name, variant in variants.items():
            if variant.differentiable or not backward:
                with guarded(name, device, errors):
                    calls[name] = [_call(case, variant, x, backward) for x in inputs]
        times = measure(calls, device, seconds=seconds / 4)
        result[direction] = {
            "bytes": case.moved(batch, backward),
            "operations": case.operations[int(backward)] * batch,
            "times": {name: _as_json(timing) for name, timing in times.items()},
        }
    return result


def compiled(peer: registry.Peer, **options: Any) -> registry.Peer:
    """The peer by torch.compile. Whole or not at all: past dynamo's limit of recompilations it would be eager."""
    torch._dynamo.reset()
    return dataclasses.replace(peer, call=torch.compile(peer.call, dynamic=False, fullgraph=True, **options))


def _call(case: registry.Case, variant: registry.Peer, inputs: registry.Inputs, backward: bool) -> Call:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                variant.call(inputs)

        return forward
    with torch.no_grad():
        grad = torch.randn_like(variant.call(inputs))

    def both() -> None:
        registry.backward_of(variant.call(inputs), inputs, case.wrt, grad)

    return both


SGD = "sgd_step, AlexNet's parameters, fp32"


def _time_sgd(device: torch.device, skip: Collection[str] = ()) -> dict[str, Any]:
    """The optimizer's step over all of AlexNet's parameters; torch.optim.SGD is the peer."""
    settings: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    variants: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], str]] = {}
    missing: dict[str, str] = {}
    for backend in OURS[device.type]:
        if reason := backends.unavailable("sgd_step", backend):
            missing[backend] = reason
        else:
            variants[backend] = optim.SGD, {"rule": "torch"}, backend
    variants["torch fused"] = torch.optim.SGD, {"fused": True}, "auto"
    variants["torch foreach"] = torch.optim.SGD, {"foreach": True}, "auto"

    def prepared(parameters: list[nn.Parameter], name: str) -> Call:
        """A step of this variant; the gradients are there already."""
        optimizer, options, backend = variants[name]
        stepper = optimizer(parameters, **settings, **options)

        def step() -> None:
            with use_backend(backend):
                stepper.step()

        return step

    def parameters(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
        torch.manual_seed(0)
        values = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
        for value in values:
            value.grad = torch.randn_like(value)
        return values

    def problem(name: str) -> str | None:
        few = parameters([(64, 3, 3, 3), (100, 64), (7,)], device, torch.float32)
        exact = [nn.Parameter(p.detach().cpu().double()) for p in few]
        for wide, value in zip(exact, few, strict=True):
            assert value.grad is not None
            wide.grad = value.grad.cpu().double()
        definition, step = torch.optim.SGD(exact, **settings), prepared(few, name)
        for _ in range(3):
            step()
            definition.step()
        found = (registry.compare(a, b, 1e-5, "parameter", 0) for a, b in zip(few, exact, strict=True))
        return next(filter(None, found), None)

    shapes = registry.PARAMETERS if device.type == "cuda" else [(64, 3, 3, 3), (100, 64)]
    wrong: dict[str, str] = {}
    errors: dict[str, str] = {}
    calls: dict[str, list[Call]] = {}
    for name in variants:
        if f"{SGD} by {name}" in skip:
            continue
        with guarded(name, device, errors):
            if fault := problem(name):
                wrong[name] = fault
            else:
                calls[name] = [prepared(parameters(shapes, device, torch.float32), name)]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    times = measure(calls, device)
    return {
        "op": "sgd_step",
        "layer": "AlexNet's parameters",
        "batch": 1,
        "wrong": wrong,
        "errors": errors,
        "missing": missing,
        "forward": {
            "bytes": 20 * count,  # a parameter's value and momentum, read and written, and its gradient
            "operations": 0,
            "times": {name: _as_json(timing) for name, timing in times.items()},
        },
    }


def time_nets(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    """Inference and training of whole networks, in bfloat16, beside PyTorch's own operators.

    What is left of the time goes to torch.compile: then the net's other variants are timed anew beside it.
    """
    torch.backends.cudnn.benchmark = True
    gpu = device.type == "cuda"
    batch, size, width = (128, None, 1.0) if gpu else (2, 71, 0.1)
    wanted = [
        (preset, n, purpose, False)
        for n in ([batch, 1024] if gpu else [batch])
        for preset in ("paper", "torchvision", "batchnorm")[: 3 if gpu else 1]
        for purpose in PURPOSES
    ]
    if gpu:
        wanted += [(preset, batch, purpose, True) for preset in ("paper", "torchvision") for purpose in PURPOSES]
    unfinished: list[str] = []
    for preset, n, purpose, compiled in wanted:
        net = f"{preset}, batch {n}"
        name = f"{net}, {purpose}{', compiled' if compiled else ''}"
        if name in skip:
            continue
        if gpu and budget.left() < (40 if compiled else 6):
            unfinished.append(name)
            yield {"unfinished": list(unfinished)}
            continue
        yield {"current": name}
        try:
            times = _time_net(preset, n, size, width, purpose, device, budget.left(), compiled, skip)
        except DeviceLost as lost:
            yield {"current": f"{name} by {lost.variant}"}
            raise
        found = {name: _as_json(timing) for name, timing in times.items()}
        yield {"nets": {net: {purpose: {"batch": n, "times": found}}}, "finished": {name: True}}
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()


PURPOSES = ("inference", "training step")


def stock(model: AlexNet) -> nn.Module:
    """The same network of torch.nn's own modules, parameters shared."""

    def plain(module: nn.Module) -> nn.Module:
        if isinstance(module, LocalResponseNorm):
            return nn.LocalResponseNorm(module.size, module.alpha, module.beta, module.k)
        if isinstance(module, nn.Dropout):
            return nn.Dropout(module.p)
        return module

    features, classifier = (nn.Sequential(*map(plain, part)) for part in (model.features, model.classifier))
    return nn.Sequential(features, model.avgpool, nn.Flatten(), classifier)


def _time_net(
    preset: str,
    batch: int,
    size: int | None,
    width: float,
    purpose: str,
    device: torch.device,
    seconds: float,
    compiled: bool,
    skip: Collection[str],
) -> dict[str, Timing | Failure]:
    training = purpose != "inference"
    gpu = device.type == "cuda"
    images = torch.randn(batch, 3, size or 224, size or 224, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def model_call(backend: str, pure: bool = False, change: Callable[[Any], Callable] | None = None) -> Call:
        torch.manual_seed(0)
        model = AlexNet(preset=preset, width=width).to(device).to(memory_format=torch.channels_last).train(training)
        x = images
        if pure:
            model, x = model.to(torch.bfloat16), images.to(torch.bfloat16)
        if backend != "native":
            optimizer: torch.optim.Optimizer = optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, rule="torch")
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
        run = change(model) if change else model
        mode = contextlib.nullcontext if pure else (lambda: torch.autocast(device.type, torch.bfloat16, True, False))

        def call() -> None:
            with use_backend(backend):
                if not training:
                    with torch.no_grad(), mode():
                        run(x)
                    return
                with mode():
                    loss = F.cross_entropy(run(x).float(), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return call

    made: dict[str, Callable[[], Call]] = {
        "auto": lambda: model_call("auto"),
        "eager": lambda: model_call("native"),
    }

    def stocked(model: AlexNet) -> nn.Module:
        return stock(model).train(training)

    made["torch.nn"] = lambda: model_call("native", change=stocked)
    if gpu:
        made["torch.nn, pure bf16"] = lambda: model_call("native", pure=True, change=stocked)
        made["auto, pure bf16"] = lambda: model_call("auto", pure=True)
        made["eager, pure bf16"] = lambda: model_call("native", pure=True)
        if backends.unavailable("max_pool2d", "triton") is None:
            made["triton"] = lambda: model_call("triton")
    if compiled:
        torch._dynamo.reset()
        made["compiled"] = lambda: model_call(
            "native", change=lambda model: torch.compile(model, dynamic=False, fullgraph=True)
        )
    name = f"{preset}, batch {batch}, {purpose}{', compiled' if compiled else ''}"
    errors: dict[str, str] = {}
    calls: dict[str, list[Call]] = {}
    for variant, make in made.items():
        if f"{name} by {variant}" not in skip:
            with guarded(variant, device, errors):
                calls[variant] = [make()]
    times = measure(calls, device, seconds=min(4.0, seconds / 8), rounds=10)
    return times | {variant: Failure(reason) for variant, reason in errors.items()}


WORKERS: dict[str, Callable[[torch.device, Budget, set[str]], Iterator[dict[str, Any]]]] = {
    "environment": environment,
    "ceilings": ceilings,
    "ops": time_ops,
    "nets": time_nets,
}


def _as_json(timing: Timing | Failure) -> dict[str, Any]:
    return {"error": timing.reason} if isinstance(timing, Failure) else vars(timing)


def _output(*command: str, pattern: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    match = re.search(pattern, text)
    return match[1] if match else "unknown"


def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(f"{home}/bin/{name}")


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return "unknown" if not commit else commit + (" and changes" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        return "unknown"


# The command: it starts the parts, keeps their results, and writes the report.


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds `new`; dicts of both are merged likewise."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


class Check:
    """A run of the command."""

    def __init__(self, out: Path, device: str, minutes: float, tests: Path | None) -> None:
        self.out, self.device, self.tests = out, device, tests
        self.seconds = minutes * 60
        self.report: dict[str, Any] = {"device": device, "minutes": minutes, "parts": {}}

    def run(self, names: Sequence[str]) -> None:
        """Each part has its share of what the parts before it left of the time."""
        end = time.monotonic() + self.seconds
        for i, name in enumerate(names):
            share = SHARES[name] / sum(SHARES[later] for later in names[i:])
            self.part(name, max(5.0, (end - time.monotonic()) * share))

    def part(self, name: str, limit: float) -> None:
        section: dict[str, Any] = {"state": "running"}
        self.report["parts"][name] = section
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            {"tests": self._tests, "sanitizer": self._sanitizer}.get(name, self._worker)(name, section, limit)
        except Exception as error:
            section["state"] = "failed"
            section["error"] = f"{type(error).__name__}: {error}"
        except BaseException:
            section["state"] = "interrupted"
            raise
        finally:
            section.pop("current", None)
            section["seconds"] = round(time.monotonic() - start, 1)
            self.write()
        print(f"{name}: {section['state']}, {section['seconds']:.0f} s. {self._line(name, section)}", flush=True)

    def write(self) -> None:
        write_atomically(self.out / "gpu_check.json", json.dumps(self.report, indent=1) + "\n")
        write_atomically(self.out / "gpu_check.md", markdown(self.report))

    def _worker(self, name: str, section: dict[str, Any], limit: float) -> None:
        """Runs a part in a process; after a crash or a stall another one goes on, without what that was in."""
        budget = Budget(limit)
        crashed: dict[str, str] = {}
        for _ in range(RESTARTS):
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "result.jsonl"
                command = [sys.executable, "-m", "alexnet_kernels.testing.gpu_check", "--worker", name]
                command += ["--device", self.device, "--seconds", str(budget.left()), "--result", str(result)]
                command += [f"--skip={case}" for case in (*section.get("finished", {}), *crashed)]
                section.pop("current", None)
                try:
                    status, errors = self._run(command, budget.left() + 20, watched=result)
                finally:
                    for line in _json_lines(result):
                        merge(section, line)
            if status == 0:
                break
            case = section.get("current", "its start")
            if status is None and budget.left() < 0:
                section["unfinished"] = [*section.get("unfinished", []), case]
                break
            again = case in crashed
            crashed[case] = "took too long" if status is None else f"ended with status {status}: {_last_line(errors)}"
            if again or "current" not in section or budget.left() < 10:
                break
        section.pop("finished", None)
        if crashed:
            section["crashed"] = crashed
        section["state"] = "failed" if crashed or self._wrong(section) else "passed"

    @staticmethod
    def _wrong(section: dict[str, Any]) -> bool:
        """Whether a variant of ours computes wrong values, or can't run."""
        return any(
            name in case["wrong"] or name in case["errors"]
            for case in section.get("cases", {}).values()
            for name in ("cpu", "cuda", "triton")
        )

    def _tests(self, name: str, section: dict[str, Any], limit: float) -> None:
        tests = (self.tests or PACKAGE.parent / "tests").resolve()
        if not (tests / "conftest.py").exists():
            section |= {"state": "skipped", "error": f"there are no tests at {tests}: give --tests"}
            return
        if importlib.util.find_spec("pytest") is None:
            section |= {"state": "skipped", "error": "pytest is not installed"}
            return
        if self.device == "cuda":
            chosen = [str(tests / "ops"), str(tests / "test_gpu.py"), "-m", "gpu"]
        else:
            chosen = [str(tests / "ops" / "test_within_map_response_norm.py"), "-k", "definition and cpu"]
        budget = Budget(limit)
        status: int | None = 0
        errors = ""
        # In a folder of its own: `python -m` would import a source tree's package from the current one.
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "progress.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", progress.__name__]
            command += ["--continue-on-collection-errors", *chosen]
            try:
                for _ in range(RESTARTS):
                    variables = {progress.VARIABLE: str(lines)}
                    status, errors = self._run(command, budget.left(), variables, Path(folder), watched=lines)
                    if status in PYTEST_ENDED or budget.left() < 5:
                        break
                    # It crashed or stalled: the next process takes the tests that follow.
                    under_way = progress.unfinished(_json_lines(lines))
                    if under_way is None and status != progress.LOST:
                        break
                    if under_way is not None:
                        reason = "took too long" if status is None else f"the process ended with status {status}"
                        progress.write(lines, {"test": under_way, "outcome": "failed", "reason": reason})
            finally:
                self._count(section, _json_lines(lines))
        section["finished"] = status in PYTEST_ENDED
        bad = section["failed"] + section["errors"]
        section["state"] = "passed" if section["passed"] and not bad else "failed"
        if not section["failures"] and status not in (0, None):
            section["state"] = "failed"
            section["error"] = f"pytest ended with status {status}: {_last_line(errors)}"

    @staticmethod
    def _count(section: dict[str, Any], found: list[dict[str, Any]]) -> None:
        outcomes = [line for line in found if "outcome" in line]
        for key, outcome in {"passed": "passed", "failed": "failed", "errors": "error", "skipped": "skipped"}.items():
            section[key] = sum(line["outcome"] == outcome for line in outcomes)
        section["collected"] = next((line["collected"] for line in found if "collected" in line), 0)
        section["failures"] = {
            line["test"]: line["reason"] for line in outcomes if line["outcome"] in ("failed", "error")
        }
        reasons = [line["reason"] for line in outcomes if line["outcome"] == "skipped"]
        section["skips"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        section["finished"] = False

    def _sanitizer(self, name: str, section: dict[str, Any], limit: float) -> None:
        sanitizer = _tool("compute-sanitizer")
        if self.device != "cuda" or sanitizer is None:
            section |= {"state": "skipped", "error": "compute-sanitizer is not available"}
            return
        if reason := backends.unavailable("max_pool2d", "cuda"):
            section |= {"state": "skipped", "error": f"backend 'cuda': {reason}"}
            return
        budget = Budget(limit)
        tools = ("memcheck", "racecheck")
        statuses: list[int | None] = []
        for i, tool in enumerate(tools):
            # Of this package's kernels only: the libraries' are many, and theirs to check.
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=alexnet_kernels"]
            command += [sys.executable, "-m", "alexnet_kernels.testing.exercise"]
            # So that the tool sees every allocation by itself.
            variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            status, text = self._run(command, budget.left() / (len(tools) - i), variables)
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            section[tool] = summary[-1] if summary else ("took too long" if status is None else _last_line(text))
            errors = re.findall(r"=+ ((?:Invalid|Error|Misaligned|Program hit|Uninit).*)", text)
            if errors:
                section[f"{tool} found"] = errors[:10]
            statuses.append(status)
        section["state"] = "failed" if any(s not in (0, None) for s in statuses) else "passed"
        if all(s is None for s in statuses):
            section |= {"state": "skipped", "error": "neither tool ended in the time"}

    def _run(
        self,
        command: list[str],
        limit: float,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        watched: Path | None = None,
    ) -> tuple[int | None, str]:
        """(exit status, what was printed).

        The status is None if the process was stopped: after `limit` seconds, or STALL during which the file `watched`
        did not grow.
        """
        path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, **(variables or {})}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
            )
            status: int | None = None
            end = time.monotonic() + max(1.0, limit)
            size, grown = -1, time.monotonic()
            try:
                while status is None and time.monotonic() < min(end, grown + STALL if watched else end):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        status = process.wait(0.2)
                    now = watched.stat().st_size if watched and watched.exists() else 0
                    if now != size:
                        size, grown = now, time.monotonic()
            finally:
                # Its children too, of which a process that ended by itself may have left some.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return status, output.read()

    def _line(self, name: str, section: dict[str, Any]) -> str:
        if section.get("error"):
            return str(section["error"])
        if name == "tests":
            rest = "" if section["finished"] else f" of {section['collected']}, the rest not reached"
            return f"{section['passed']} passed, {section['failed'] + section['errors']} failed{rest}"
        if name == "ops":
            return f"{len(section.get('cases', {}))} cases"
        if name == "ceilings" and "copy_bytes_per_second" in section:
            return f"copy {section['copy_bytes_per_second'] / 1e9:.0f} GB/s"
        return ""

    def passed(self) -> bool:
        return all(part["state"] in ("passed", "skipped") for part in self.report["parts"].values())


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """What a process wrote; it may have ended in the middle of a line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


# The report.


def best(times: dict[str, dict[str, Any]], ours: bool) -> tuple[str, float] | None:
    """The fastest of our variants, or of the others: (name, seconds)."""
    mine = ("cuda", "triton", "cpu", "auto", "auto, pure bf16")
    valid = {n: t["median"] for n, t in times.items() if "median" in t and (n in mine) == ours}
    name = min(valid, key=valid.__getitem__, default=None)
    return None if name is None else (name, valid[name])


def markdown(report: dict[str, Any]) -> str:
    parts = report["parts"]
    facts = parts.get("environment", {})
    lines = ["# GPU check" if report["device"] == "cuda" else "# GPU check, run on a CPU: its figures say nothing", ""]
    keys = ("device", "driver", "torch", "cuda", "cudnn", "triton", "nvcc", "python", "host", "commit", "date")
    lines += [", ".join(f"{key} {facts[key]}" for key in keys if key in facts), ""]
    if "capability" in facts:
        memory = facts["memory"] / 2**30
        lines += [f"Compute capability {facts['capability']}, {facts['multiprocessors']} SMs, {memory:.0f} GiB.", ""]
    absent: dict[str, list[str]] = {}
    for entry in facts.get("backends", []):
        for backend in OURS[report["device"]]:
            if entry["backends"][backend] != "available":
                absent.setdefault(f"{backend}: {entry['backends'][backend]}", []).append(entry["op"])
    lines += [f"- No backend {reason} ({', '.join(ops)})" for reason, ops in absent.items()] + [""] * bool(absent)
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    for name, part in parts.items():
        note = part.get("error") or "; ".join(f"{k} {v}" for k, v in part.get("crashed", {}).items())
        lines.append(f"| {name} | {part['state']} | {part.get('seconds', '')} | {note} |")
    lines.append("")
    ceiling = parts.get("ceilings", {})
    rates = {name: rate / 1e12 for name, rate in ceiling.get("gemm_operations_per_second", {}).items()}
    copy = ceiling.get("copy_bytes_per_second")
    if copy:
        gemms = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in rates.items())
        lines += [f"Measured here: copy {copy / 1e9:.0f} GB/s (read and written); GEMM {gemms}.", ""]
    lines += _tests_lines(parts.get("tests", {})) + _sanitizer_lines(parts.get("sanitizer", {}))
    lines += _ops_lines(parts.get("ops", {}), OURS[report["device"]], copy, rates) + _nets_lines(parts.get("nets", {}))
    return "\n".join(lines)


def _tests_lines(tests: dict[str, Any]) -> list[str]:
    if "collected" not in tests:
        return []
    lines = ["## Tests", ""]
    end = "" if tests["finished"] else " Not all were reached in the time."
    lines += [
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['errors']} errors, {tests['skipped']} skipped of "
        f"{tests['collected']}.{end}",
        "",
    ]
    lines += [f"- FAILED `{name}`: {reason}" for name, reason in tests["failures"].items()]
    lines += [f"- {count} skipped: {reason}" for reason, count in tests["skips"].items()]
    return [*lines, ""]


def _sanitizer_lines(sanitizer: dict[str, Any]) -> list[str]:
    tools = []
    for tool in ("memcheck", "racecheck"):
        if tool in sanitizer:
            tools.append(f"- {tool}: {sanitizer[tool]}")
            tools += [f"  - {found}" for found in sanitizer.get(f"{tool} found", [])]
    return ["## compute-sanitizer", "", *tools, ""] if tools else []


def _ops_lines(
    section: dict[str, Any], columns: Sequence[str], copy: float | None, rates: dict[str, float]
) -> list[str]:
    if not section.get("cases"):
        return []
    lines = [
        "## Ops",
        "",
        "us; the ratio is the best peer's time to the best of ours. The floor is what the fewest bytes",
    ]
    lines += ["and operations take at the rates measured here. A variant that computes wrong values has no time."]
    lines += ["Medians ± half the quartiles' distance; * without a CUDA graph, the time to launch included.", ""]
    lines += [f"| case | | {' | '.join(columns)} | best peer | ratio | GB/s | % of floor |"]
    lines += ["|---|---|" + "---|" * (len(columns) + 4)]
    for name, case in section["cases"].items():
        for direction in ("forward", "forward and backward"):
            if direction in case:
                lines.append(_op_row(name, direction, case, columns, copy, rates))
    wrong = [f"- WRONG {n}, {v}: {why}" for n, case in section["cases"].items() for v, why in case["wrong"].items()]
    errors = [f"- ERROR {n}, {v}: {why}" for n, case in section["cases"].items() for v, why in case["errors"].items()]
    errors += [
        f"- {name}, {variant}, {direction}: {time['error']}"
        for name, case in section["cases"].items()
        for direction in ("forward", "forward and backward")
        for variant, time in case.get(direction, {}).get("times", {}).items()
        if "error" in time
    ]
    unfinished = section.get("unfinished", [])
    late = [f"Not reached in the time: {'; '.join(unfinished)}.", ""] if unfinished else []
    return [*lines, "", *wrong, *errors, "", *late]


def _op_row(
    name: str, direction: str, case: dict[str, Any], columns: Sequence[str], copy: float | None, rates: dict[str, float]
) -> str:
    times = case[direction]["times"]
    mine, peer = best(times, True), best(times, False)
    cells = []
    for column in columns:
        timing = times.get(column, {})
        state = "wrong" if column in case["wrong"] else "error" if column in case["errors"] else "-"
        cells.append(_microseconds(timing) if "median" in timing else state)
    cells.append(f"{_microseconds(times[peer[0]])} ({peer[0]})" if peer else "-")
    cells.append(f"{peer[1] / mine[1]:.2f}" if mine and peer else "-")
    cells.append(f"{case[direction]['bytes'] / mine[1] / 1e9:.0f}" if mine else "-")
    rate = rates.get("tf32" if "fp32" in name else "bf16") or rates.get("fp32")
    if mine and copy and rate:
        floor = max(case[direction]["bytes"] / copy, case[direction]["operations"] / (rate * 1e12))
        cells.append(f"{100 * floor / mine[1]:.0f}")
    else:
        cells.append("-")
    return f"| {name} | {direction} | {' | '.join(cells)} |"


def _microseconds(timing: dict[str, Any]) -> str:
    """The median, and half the distance of the quartiles as a part of it."""
    spread = (timing["high"] - timing["low"]) / 2 / timing["median"]
    return f"{timing['median'] * 1e6:.1f} ±{spread:.0%}{'' if timing['graph'] else '*'}"


def _nets_lines(section: dict[str, Any]) -> list[str]:
    if not section.get("nets"):
        return []
    lines = [
        "## Networks",
        "",
        "Images a second in bfloat16 (autocast unless pure); the ratio is to the best peer.",
        "",
    ]
    lines += ["| net | | ours | peers | ratio |", "|---|---|---|---|---|"]
    for name, purposes in section["nets"].items():
        for purpose, net in purposes.items():
            if "error" in net:
                lines.append(f"| {name} | {purpose} | {net['error']} | | |")
                continue
            mine, peer = best(net["times"], True), best(net["times"], False)

            def speeds(ours: bool, net: dict[str, Any] = net) -> str:
                found = []
                for variant, timing in net["times"].items():
                    if (variant.split(",")[0] in ("auto", "triton")) == ours:
                        speed = f"{net['batch'] / timing['median']:.0f}" if "median" in timing else timing["error"]
                        found.append(f"{variant}: {speed}{' (graph)' if timing.get('graph') else ''}")
                return ", ".join(found)

            ratio = f"{peer[1] / mine[1]:.2f}" if mine and peer else "-"
            lines.append(f"| {name} | {purpose} | {speeds(True)} | {speeds(False)} | {ratio} |")
    if "unfinished" in section:
        lines += ["", f"Not reached in the time: {'; '.join(section['unfinished'])}."]
    return [*lines, ""]


def _work(options: argparse.Namespace) -> int:
    """A part in its own process: a line of JSON for each finding."""
    torch.manual_seed(0)
    with open(options.result, "w") as file:
        for found in WORKERS[options.worker](torch.device(options.device), Budget(options.seconds), set(options.skip)):
            file.write(json.dumps(found) + "\n")
            file.flush()
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m alexnet_kernels.testing.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--minutes", type=float, default=8, help="that everything may take (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), metavar="PART", help=f"of {', '.join(SHARES)}")
    parser.add_argument("--tests", type=Path, metavar="DIR", help="the tests' folder (default: beside the package)")
    for name in ("--worker", "--result"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return _work(options)
    if options.out is None:
        parser.error("--out DIR is required")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, not {options.minutes}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    check = Check(options.out, options.device, options.minutes, options.tests)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        check.run([name for name in SHARES if not options.only or name in options.only])
    except KeyboardInterrupt:
        print(f"interrupted: {options.out}/gpu_check.md has what was found")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    print((options.out / "gpu_check.md").read_text())
    print(f"{'passed' if check.passed() else 'FAILED'}: {options.out}/gpu_check.md, {options.out}/gpu_check.json")
    return 0 if check.passed() else 1


if __name__ == "__main__":
    raise SystemExit(main())
