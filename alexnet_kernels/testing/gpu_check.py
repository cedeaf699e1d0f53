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
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alexnet_kernels import AlexNet, __version__, _library, backends, optim, use_backend
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing import progress
from alexnet_kernels.testing.timing import Call, Failure, Timing, copy_rate, gemm_rate, input_sets, measure

PACKAGE = Path(__file__).parents[1]
# The share of the time that each part may take.
SHARES = {"environment": 0.04, "ceilings": 0.05, "tests": 0.30, "sanitizer": 0.11, "ops": 0.32, "nets": 0.18}
OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
RESTARTS = 3  # of a part that crashed, without the case that it crashed in


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
        "nvcc": _output("nvcc", "--version", pattern=r"V([\d.]+)"),
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
    # A processor takes long: one dtype shows that the command works.
    every = [case for case in registry.cases() if gpu or case.dtype == torch.bfloat16]
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
        yield {"cases": {case.name: _time_case(case, batch, device, share)}}
    if SGD not in skip and only is None:
        yield {"current": SGD}
        yield {"cases": {SGD: _time_sgd(device)}}


def _time_case(case: registry.Case, batch: int, device: torch.device, seconds: float) -> dict[str, Any]:
    def ours(backend: str) -> registry.Peer:
        return registry.Peer(lambda x: case.call(x, backend))

    variants: dict[str, registry.Peer] = {}
    reasons: dict[str, str] = {}
    for backend in OURS[device.type]:
        if reason := backends.unavailable(case.op, backend):
            reasons[backend] = reason
        else:
            variants[backend] = ours(backend)
    if case.eager:
        variants["eager"] = ours("native")
    variants |= {name: peer for name, peer in case.peers.items() if device.type == "cuda" or not peer.cuda_only}
    # Compiling takes seconds: half precision in the fast format is where it can win.
    if device.type == "cuda" and seconds > 3 and case.eager and case.dtype == torch.bfloat16 and case.channels_last:
        variants["compiled"] = registry.Peer(torch.compile(ours("native").call, dynamic=False))
    wrong: dict[str, str] = {}
    for name, variant in list(variants.items()):
        if not variant.checked:
            continue
        try:
            problem = registry.check(case, variant.call, 2, device, variant.differentiable)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem:
            wrong[name] = problem
            del variants[name]
    result: dict[str, Any] = {"op": case.op, "layer": case.layer, "batch": batch, "wrong": wrong, "missing": reasons}
    for direction in ("forward", "forward and backward"):
        backward = direction != "forward"
        if backward and not case.wrt:
            continue
        used = {name: v for name, v in variants.items() if v.differentiable or not backward}
        count = input_sets(int(case.moved(batch, backward)), device)
        inputs = [registry.with_gradients(case.make(batch, device), case.wrt) for _ in range(count)]
        calls = {name: [_call(case, v, x, backward) for x in inputs] for name, v in used.items()}
        times = measure(calls, device, seconds=seconds / 4)
        result[direction] = {
            "bytes": case.moved(batch, backward),
            "operations": case.operations[int(backward)] * batch,
            "times": {name: _as_json(timing) for name, timing in times.items()},
        }
    return result


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


def _time_sgd(device: torch.device) -> dict[str, Any]:
    """The optimizer's step over all of AlexNet's parameters; torch.optim.SGD is the peer."""
    shapes = registry.PARAMETERS if device.type == "cuda" else [(64, 3, 3, 3), (100, 64)]

    def parameters() -> list[nn.Parameter]:
        values = [nn.Parameter(torch.randn(shape, device=device) * 0.01) for shape in shapes]
        for value in values:
            value.grad = torch.randn_like(value)
        return values

    def step(optimizer: torch.optim.Optimizer, backend: str = "auto") -> Call:
        def run() -> None:
            with use_backend(backend):
                optimizer.step()

        return run

    settings: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    calls: dict[str, list[Call]] = {}
    missing: dict[str, str] = {}
    for backend in OURS[device.type]:
        if reason := backends.unavailable("sgd_step", backend):
            missing[backend] = reason
        else:
            calls[backend] = [step(optim.SGD(parameters(), rule="torch", **settings), backend)]
    for name, options in {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}.items():
        calls[name] = [step(torch.optim.SGD(parameters(), **settings, **options))]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    times = measure(calls, device)
    return {
        "op": "sgd_step",
        "layer": "AlexNet's parameters",
        "batch": 1,
        "wrong": {},
        "missing": missing,
        "forward": {
            "bytes": 20 * count,
            "operations": 0,
            "times": {name: _as_json(timing) for name, timing in times.items()},
        },
    }


def time_nets(device: torch.device, budget: Budget, skip: set[str]) -> Iterator[dict[str, Any]]:
    """Inference and training of whole networks, in bfloat16, beside PyTorch's own operators."""
    torch.backends.cudnn.benchmark = True
    gpu = device.type == "cuda"
    batch, size, width = (128, None, 1.0) if gpu else (2, 71, 0.1)
    batches = [batch, 1024] if gpu else [batch]
    wanted = [(preset, n) for n in batches for preset in ("torchvision", "paper", "batchnorm")]
    unfinished: list[str] = []
    for preset, n in wanted:
        name = f"{preset}, batch {n}"
        if name in skip:
            continue
        if gpu and budget.left() < 8:
            unfinished.append(name)
            yield {"unfinished": list(unfinished)}
            continue
        yield {"current": name}
        nets: dict[str, Any] = {}
        for purpose in ("inference", "training step"):
            try:
                nets[purpose] = _time_net(preset, n, size, width, purpose, device, budget.left())
            except torch.OutOfMemoryError as error:
                nets[purpose] = {"error": str(error).splitlines()[0]}
            yield {"nets": {name: dict(nets)}}


def _time_net(
    preset: str, batch: int, size: int | None, width: float, purpose: str, device: torch.device, seconds: float
) -> dict[str, Any]:
    training = purpose != "inference"
    extent = size or (227 if preset.startswith("caffe") else 224)
    images = torch.randn(batch, 3, extent, extent, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def model_call(backend: str, pure: bool, compiled: bool) -> Call:
        torch.manual_seed(0)
        model = AlexNet(preset=preset, width=width).to(device).to(memory_format=torch.channels_last).train(training)
        x = images
        if pure:
            model, x = model.to(torch.bfloat16), images.to(torch.bfloat16)
        own = backend != "native"
        if own:
            optimizer: torch.optim.Optimizer = optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, rule="torch")
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
        run = torch.compile(model, dynamic=False) if compiled else model
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

    calls = {"auto": [model_call("auto", False, False)], "eager": [model_call("native", False, False)]}
    if device.type == "cuda":
        calls["auto, pure bf16"] = [model_call("auto", True, False)]
        calls["eager, pure bf16"] = [model_call("native", True, False)]
        if backends.unavailable("max_pool2d", "triton") is None:
            calls["triton"] = [model_call("triton", False, False)]
        if seconds > 45:
            calls["compiled"] = [model_call("native", False, True)]
    times = measure(calls, device, seconds=min(4.0, seconds / 8), rounds=10)
    return {"batch": batch, "times": {name: _as_json(timing) for name, timing in times.items()}}


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

    def part(self, name: str) -> None:
        section: dict[str, Any] = {"state": "running"}
        self.report["parts"][name] = section
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        limit = self.seconds * SHARES[name]
        try:
            {"tests": self._tests, "sanitizer": self._sanitizer}.get(name, self._worker)(name, section, limit)
        except Exception as error:
            section["state"] = "failed"
            section["error"] = f"{type(error).__name__}: {error}"
        section.pop("current", None)
        section["seconds"] = round(time.monotonic() - start, 1)
        print(f"{name}: {section['state']}, {section['seconds']:.0f} s. {self._line(name, section)}", flush=True)
        self.write()

    def write(self) -> None:
        write_atomically(self.out / "gpu_check.json", json.dumps(self.report, indent=1) + "\n")
        write_atomically(self.out / "gpu_check.md", markdown(self.report))

    def _worker(self, name: str, section: dict[str, Any], limit: float) -> None:
        """Runs a part in a process; one that crashes or hangs in a case is started again without that case."""
        budget = Budget(limit)
        skip: list[str] = []
        for _ in range(RESTARTS):
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "result.jsonl"
                command = [sys.executable, "-m", "alexnet_kernels.testing.gpu_check", "--worker", name]
                command += ["--device", self.device, "--seconds", str(budget.left()), "--result", str(result)]
                command += [f"--skip={case}" for case in skip]
                status, errors = self._run(command, budget.left() + 30)
                for line in result.read_text().splitlines() if result.exists() else []:
                    with contextlib.suppress(json.JSONDecodeError):
                        merge(section, json.loads(line))
            if status == 0:
                section["state"] = "failed" if section.get("crashed") or self._wrong(section) else "passed"
                return
            reason = "took too long" if status is None else f"ended with status {status}: {_last_line(errors)}"
            case = section.get("current", "its start")
            merge(section, {"crashed": {case: reason}, "state": "failed"})
            if case in skip or "current" not in section or budget.left() < 10:
                return
            skip.append(case)

    @staticmethod
    def _wrong(section: dict[str, Any]) -> bool:
        return any(
            name in case["wrong"] for case in section.get("cases", {}).values() for name in ("cpu", "cuda", "triton")
        )

    def _tests(self, name: str, section: dict[str, Any], limit: float) -> None:
        tests = (self.tests or PACKAGE.parent / "tests").resolve()
        if not (tests / "conftest.py").exists():
            section |= {"state": "skipped", "error": f"there are no tests at {tests}: give --tests"}
            return
        if self.device == "cuda":
            chosen = [str(tests / "ops"), str(tests / "test_gpu.py"), "-m", "gpu"]
        else:
            chosen = [str(tests / "ops" / "test_within_map_response_norm.py"), "-k", "definition and cpu"]
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "progress.jsonl"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", progress.__name__]
            command += ["--continue-on-collection-errors", *chosen]
            # Not from the source tree, which would shadow an installed package.
            status, errors = self._run(command, limit, {progress.VARIABLE: str(lines)}, cwd=tests)
            found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        outcomes = [line for line in found if "test" in line]
        for outcome in ("passed", "failed", "error", "skipped"):
            section[outcome] = sum(line["outcome"] == outcome for line in outcomes)
        section["collected"] = next((line["collected"] for line in found if "collected" in line), 0)
        bad = [line for line in outcomes if line["outcome"] in ("failed", "error")]
        section["failures"] = {line["test"]: line["reason"] for line in bad}
        reasons = [line["reason"] for line in outcomes if line["outcome"] == "skipped"]
        section["skips"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        section["finished"] = status is not None
        section["state"] = "passed" if section["passed"] and not bad and status in (0, None) else "failed"
        if not outcomes:
            section["error"] = _last_line(errors)

    def _sanitizer(self, name: str, section: dict[str, Any], limit: float) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        found = [shutil.which("compute-sanitizer"), f"{home}/bin/compute-sanitizer"]
        sanitizer = next((path for path in found if path and Path(path).exists()), None)
        if self.device != "cuda" or sanitizer is None:
            section |= {"state": "skipped", "error": "compute-sanitizer is not available"}
            return
        exercise = [sys.executable, "-m", "alexnet_kernels.testing.exercise"]
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *exercise]
            # So that the tool sees every allocation by itself.
            status, text = self._run(command, limit / 2, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
            section[tool] = summary[-1] if summary else ("took too long" if status is None else _last_line(text))
            section[f"{tool} status"] = status
        statuses = [section["memcheck status"], section["racecheck status"]]
        section["state"] = "failed" if any(s not in (0, None) for s in statuses) else "passed"
        if None in statuses:
            section["error"] = "a tool took too long"

    def _run(
        self, command: list[str], limit: float, variables: dict[str, str] | None = None, cwd: Path | None = None
    ) -> tuple[int | None, str]:
        """(exit status, or None if stopped at the limit; what was printed)."""
        path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, **(variables or {})}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
            )
            status: int | None = None
            try:
                status = process.wait(max(5.0, limit))
            except subprocess.TimeoutExpired:
                pass
            finally:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, 9)
                    process.wait()
            output.seek(0)
            return status, output.read()

    def _line(self, name: str, section: dict[str, Any]) -> str:
        if section.get("error"):
            return str(section["error"])
        if name == "tests":
            rest = "" if section["finished"] else f" of {section['collected']}, the rest not reached"
            return f"{section['passed']} passed, {section['failed'] + section['error']} failed{rest}"
        if name == "ops":
            return f"{len(section.get('cases', {}))} cases"
        if name == "ceilings" and "copy_bytes_per_second" in section:
            return f"copy {section['copy_bytes_per_second'] / 1e9:.0f} GB/s"
        return ""

    def passed(self) -> bool:
        return all(part["state"] in ("passed", "skipped") for part in self.report["parts"].values())


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
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    for name, part in parts.items():
        note = part.get("error") or "; ".join(f"{k}: {v}" for k, v in part.get("crashed", {}).items())
        lines.append(f"| {name} | {part['state']} | {part.get('seconds', '')} | {note} |")
    lines.append("")
    ceiling = parts.get("ceilings", {})
    rates = {name: rate / 1e12 for name, rate in ceiling.get("gemm_operations_per_second", {}).items()}
    copy = ceiling.get("copy_bytes_per_second")
    if copy:
        gemms = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in rates.items())
        lines += [f"Measured here: copy {copy / 1e9:.0f} GB/s (read and written); GEMM {gemms}.", ""]
    lines += _tests_lines(parts.get("tests", {})) + _sanitizer_lines(parts.get("sanitizer", {}))
    lines += _ops_lines(parts.get("ops", {}), copy, rates) + _nets_lines(parts.get("nets", {}))
    return "\n".join(lines)


def _tests_lines(tests: dict[str, Any]) -> list[str]:
    if "collected" not in tests:
        return []
    lines = ["## Tests", ""]
    end = "" if tests["finished"] else " Not all were reached in the time."
    lines += [
        f"{tests['passed']} passed, {tests['failed']} failed, {tests['error']} errors, {tests['skipped']} skipped of "
        f"{tests['collected']}.{end}",
        "",
    ]
    lines += [f"- FAILED `{name}`: {reason}" for name, reason in tests["failures"].items()]
    lines += [f"- {count} skipped: {reason}" for reason, count in tests["skips"].items()]
    return [*lines, ""]


def _sanitizer_lines(sanitizer: dict[str, Any]) -> list[str]:
    tools = [f"- {tool}: {sanitizer[tool]}" for tool in ("memcheck", "racecheck") if tool in sanitizer]
    return ["## compute-sanitizer", "", *tools, ""] if tools else []


def _ops_lines(section: dict[str, Any], copy: float | None, rates: dict[str, float]) -> list[str]:
    if not section.get("cases"):
        return []
    lines = [
        "## Ops",
        "",
        "us; the ratio is the best peer's time to the best of ours. The floor is what the fewest bytes",
    ]
    lines += ["and operations take at the rates measured here. A variant that computes wrong values has no time.", ""]
    columns = ["cuda", "triton"] if any("cuda" in c["forward"]["times"] for c in section["cases"].values()) else ["cpu"]
    lines += [f"| case | | {' | '.join(columns)} | best peer | ratio | GB/s | % of floor |"]
    lines += ["|---|---|" + "---|" * (len(columns) + 4)]
    for name, case in section["cases"].items():
        for direction in ("forward", "forward and backward"):
            if direction in case:
                lines.append(_op_row(name, direction, case, columns, copy, rates))
    wrong = [f"- WRONG {n}, {v}: {why}" for n, case in section["cases"].items() for v, why in case["wrong"].items()]
    errors = [
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
    name: str, direction: str, case: dict[str, Any], columns: list[str], copy: float | None, rates: dict[str, float]
) -> str:
    times = case[direction]["times"]
    mine, peer = best(times, True), best(times, False)
    cells = []
    for column in columns:
        timing = times.get(column, {})
        state = "wrong" if column in case["wrong"] else "-"
        cells.append(f"{timing['median'] * 1e6:.1f}" if "median" in timing else state)
    cells.append(f"{peer[1] * 1e6:.1f} ({peer[0]})" if peer else "-")
    cells.append(f"{peer[1] / mine[1]:.2f}" if mine and peer else "-")
    cells.append(f"{case[direction]['bytes'] / mine[1] / 1e9:.0f}" if mine else "-")
    rate = rates.get("tf32" if "fp32" in name else "bf16") or rates.get("fp32")
    if mine and copy and rate:
        floor = max(case[direction]["bytes"] / copy, case[direction]["operations"] / (rate * 1e12))
        cells.append(f"{100 * floor / mine[1]:.0f}")
    else:
        cells.append("-")
    return f"| {name} | {direction} | {' | '.join(cells)} |"


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
    for name in SHARES:
        if not options.only or name in options.only:
            check.part(name)
    check.write()
    print((options.out / "gpu_check.md").read_text())
    print(f"{'passed' if check.passed() else 'FAILED'}: {options.out}/gpu_check.md, {options.out}/gpu_check.json")
    return 0 if check.passed() else 1


if __name__ == "__main__":
    raise SystemExit(main())
