"""python -m alexnet_kernels.gpu_check, on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import alexnet_kernels
from alexnet_kernels.bench import cases, tables
from alexnet_kernels.bench.roofline import Ceilings
from alexnet_kernels.gpu_check import (
    __main__,
    convolutions,
    counters,
    findings,
    kernel_times,
    plan,
    progress,
    report,
    runner,
    worker,
)
from alexnet_kernels.gpu_check.exercise import exercise
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.op_info._layers import CONVOLUTIONS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
PACKAGE = Path(alexnet_kernels.__file__).parent
FILES = ["findings.jsonl", "log.txt", "report.json", "report.md"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


def commands() -> list[list[str]]:
    """The words of every process on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text(errors="replace").split("\0")[:-1])
    return found


def parts_of(out: Path) -> dict[str, Any]:
    """The report's parts."""
    return json.loads((out / "report.json").read_text())["parts"]


def command(out: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "alexnet_kernels.gpu_check", "--device", "cpu", "--out", str(out)]
    return [*words, "--library", str(PACKAGE / "_C.so"), "--tests", str(ROOT / "tests"), *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    """(exit status, report.json, report.md, what was printed) of a short run of everything."""
    out = tmp_path_factory.mktemp("check") / "out"
    done = subprocess.run(
        command(out, "--minutes", "10"), capture_output=True, text=True, env=ENVIRONMENT, cwd=out.parent
    )
    assert (out / "report.json").exists(), done.stderr
    assert sorted(path.name for path in out.iterdir()) == FILES
    return done.returncode, json.loads((out / "report.json").read_text()), (out / "report.md").read_text(), done.stdout


class TestWhole:
    def test_passes(self, whole) -> None:
        status, found, _, _ = whole
        states = {name: part["state"] for name, part in found["parts"].items()}
        assert states == dict.fromkeys(plan.PARTS, "passed") | {"counters": "skipped", "sanitizer": "skipped"}
        assert status == 0

    def test_tells_where_it_ran(self, whole) -> None:
        facts = whole[1]["parts"]["environment"]["results"]["facts"]
        assert facts["torch"] == torch.__version__
        assert len(facts["backends"]) == 10
        assert facts["library"]["loaded"]
        assert len(facts["library"]["sources"]) == 16

    def test_every_op_was_compared_with_its_definition(self, whole) -> None:
        found = whole[1]["parts"]["smoke"]["results"]
        assert {item.partition(",")[0] for item in found} == set(alexnet_kernels.ops.__all__)
        assert all(result["wrong"] is None and result["error"] is None for result in found.values())

    def test_tests_ran(self, whole) -> None:
        tests = whole[1]["parts"]["tests"]
        assert tests["passed"] == tests["collected"] > 10
        assert tests["failures"] == {}

    def test_times_and_ratios(self, whole) -> None:
        _, found, text, _ = whole
        ops = found["parts"]["ops"]["results"]
        name = "lrn_max_pool2d, layer 2, bf16, NCHW, batch 2"
        first = ops[name]
        assert first["wrong"] == {}
        for direction in ("forward", "backward"):
            times = first[direction]["times"]
            assert set(times) == {"cpu", "eager"}
            assert all(0 < t["low"] <= t["median"] <= t["high"] for t in times.values())
            ratio = times["eager"]["median"] / times["cpu"]["median"]
            cpu = tables.seconds_text(times["cpu"]["median"])
            assert f"| {name} | {direction} | {cpu} ±" in text
            assert f" | {ratio:.2f} | " in text
        assert {name.partition(",")[0] for name in ops} == set(alexnet_kernels.ops.__all__)

    def test_networks_and_where_their_time_goes(self, whole) -> None:
        _, found, text, _ = whole
        results = found["parts"]["networks"]["results"]
        for purpose in ("inference", "training step"):
            name = f"paper, bf16, batch 2, {purpose}"
            assert results[name]["wrong"] == {}
            assert all("median" in results[name][purpose]["times"][variant] for variant in ("auto", "eager"))
            for variant in ("auto", "auto, pure bf16", "eager"):
                table = results[f"kernels of {name} by {variant}"]
                assert sum(kernel["share"] for kernel in table["kernels"]) == pytest.approx(1, abs=0.02)
                names = " ".join(kernel["name"] for kernel in table["kernels"])
                assert ("alexnet_kernels" in names) == (variant != "eager")
                assert f"**{name} by {variant}**: " in text
        training = results["kernels of paper, bf16, batch 2, training step by auto"]["operators"]
        (step,) = [one for one in training if "sgd_step" in one["name"]]
        # Parameters, gradients and momentum, in float32.
        count = sum(p.numel() for p in alexnet_kernels.AlexNet(preset="paper", width=0.1, device="meta").parameters())
        assert step["calls"] == 1
        assert step["bytes"] == 3 * 4 * count

    def test_convolutions_alone(self, whole) -> None:
        found = whole[1]["parts"]["convolutions"]["results"]["conv5, bf16, batch 2"]
        assert found["missing"] == {}
        for direction in convolutions.ALONE:
            assert set(found[direction]) == {"grouped", "split"}
        for direction in convolutions.OP:
            assert set(found[direction]) == {"eager", "cpu"}
            assert all("median" in timing for timing in found[direction].values())

    def test_says_that_a_cpu_proves_nothing_and_ends_with_the_summary(self, whole) -> None:
        _, _, text, printed = whole
        assert text.startswith("# GPU check, run on a CPU: its figures say nothing")
        assert printed.rstrip().splitlines()[-1].startswith("passed: ")
        assert text.strip() in printed


def test_exercise_runs_every_op() -> None:
    assert set(exercise(CPU, "cpu")) == set(alexnet_kernels.ops.__all__)


class TestFindings:
    def test_a_line_that_was_cut_off_costs_itself_only(self, tmp_path: Path) -> None:
        found = Findings(tmp_path / "f")
        found.add("ops", item="one", result={"a": 1})
        with open(found.path, "a") as file:
            file.write('{"part": "ops", "item": "two", "res')
        since = found.size()
        found.add("ops", item="three", result={})
        assert findings.results(found.lines("ops")) == {"one": {"a": 1}, "three": {}}
        assert findings.results(found.lines(since=since)) == {"three": {}}
        assert found.lines("tests") == []

    def test_what_is_finished_and_what_was_under_way(self) -> None:
        lines: list[findings.Line] = [
            {"part": "ops", "items": ["one", "two", "three"]},
            {"part": "ops", "started": "one"},
            {"part": "ops", "item": "one", "result": {}},
            {"part": "ops", "started": "two"},
        ]
        assert findings.unreached(lines) == ["two", "three"]
        assert findings.under_way(lines) == ("ops", "two")
        lines.append({"part": "ops", "crashed": "two", "reason": "x"})
        assert findings.crashed(lines) == {"two": "x"}
        assert findings.unreached(lines) == ["three"]
        lines.append({"part": "ops", "item": "two", "result": {}})
        assert findings.crashed(lines) == {}

    def test_a_part_that_never_ended_is_told_with_what_it_was_in(self, tmp_path: Path) -> None:
        found = Findings(tmp_path / findings.FILE)
        found.add("ops", started="one", worker=0)
        found.add("ops", item="one", result={"wrong": {}, "errors": {}, "missing": {}, "op": "x"})
        found.add("ops", started="two", worker=0)
        report.write(tmp_path, found)
        assert "| ops | interrupted |  |  | in two |" in (tmp_path / "report.md").read_text()


PROCESS = runner.Check.process

# A worker whose part "ops" has some items, and a fault in a few of them.
SCRIPT = """
import os, signal, sys, time
from alexnet_kernels.gpu_check import __main__, worker
from alexnet_kernels.bench.timing import DeviceLost

def run(name, skip):
    if name in {names}:
        {fault}
    return {{"of": name}}

def items(device):
    names = ("one", "two", "three", "four", "five")[: {count}]
    return [worker.Item(name, lambda skip, name=name: run(name, skip), 1.0, {compiles}) for name in names]

worker.WORK["ops"] = items
worker.GRACE = 5.0
raise SystemExit(__main__.main())
"""


class TestFaults:
    def run(
        self, tmp_path: Path, monkeypatch, fault: str, compiles: bool = False, names: tuple = ("two",), **options: Any
    ) -> dict[str, Any]:
        """The report's part "ops" after a run with such a worker."""
        script = tmp_path / "worker.py"
        script.write_text(SCRIPT.format(fault=fault, compiles=compiles, names=names, count=options.pop("count", 4)))
        process = PROCESS

        def other(self, name, command, *rest, **more):
            assert command[:3] == [sys.executable, "-m", "alexnet_kernels.gpu_check"]
            return process(self, name, [sys.executable, str(script), *command[3:]], *rest, **more)

        monkeypatch.setattr(runner.Check, "process", other)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        check = runner.Check(out, "cpu", options.pop("seconds", 60.0), **options)
        passed = check.run(["ops"])
        assert sorted(path.name for path in out.iterdir()) == FILES
        part = parts_of(out)["ops"]
        assert passed == (part["state"] in ("passed", "unfinished"))
        return part

    def test_a_fault_in_an_item_costs_that_item_only(self, tmp_path: Path, monkeypatch) -> None:
        fault = (
            "{'two': lambda: os.kill(os.getpid(), signal.SIGSEGV), 'three': lambda: time.sleep(60), "
            "'four': lambda: getattr(os, 'illegal memory access')}[name]()"
        )
        part = self.run(tmp_path, monkeypatch, fault, names=("two", "three", "four"), patience=2.0, count=5)
        assert set(part["results"]) == {"one", "five"}
        assert part["crashed"] == {
            "two": "ended with status -11: Fatal Python error: Segmentation fault",
            "three": "it took too long: the log has its stack",
            "four": "ended with status 1: AttributeError: module 'os' has no attribute 'illegal memory access'",
        }
        assert part["state"] == "failed"
        log = (tmp_path / "out" / "log.txt").read_text()
        assert "Traceback (most recent call last)" in log
        assert len(re.findall(r'worker.py", line \d+ in run', log)) >= 2  # the crash's and the hang's stacks
        text = (tmp_path / "out" / "report.md").read_text()
        for item, reason in part["crashed"].items():
            assert f"CRASHED in ops: {item}: {reason}" in text

    def test_a_variant_that_loses_the_device_costs_itself_only(self, tmp_path: Path, monkeypatch) -> None:
        fault = "if 'two by cuda' not in skip: raise DeviceLost('cuda', 'CUDA error')"
        part = self.run(tmp_path, monkeypatch, fault)
        assert set(part["results"]) == {"one", "two", "three", "four"}
        assert list(part["crashed"]) == ["two by cuda"]
        assert part["crashed"]["two by cuda"].endswith("DeviceLost: cuda: CUDA error")

    def test_what_compiles_is_no_hang(self, tmp_path: Path, monkeypatch) -> None:
        part = self.run(tmp_path, monkeypatch, "time.sleep(3)", compiles=True, patience=1.0)
        assert set(part["results"]) == {"one", "two", "three", "four"}
        assert part["state"] == "passed"

    def test_a_slow_machine_reaches_less(self, tmp_path: Path, monkeypatch) -> None:
        start = time.monotonic()
        part = self.run(tmp_path, monkeypatch, "time.sleep(5)", names=("two", "three", "four"), seconds=14.0)
        assert time.monotonic() - start < 45
        assert {"one", "two"} <= set(part["results"])
        assert [*part["results"], *part["late"]] == ["one", "two", "three", "four"]
        assert part["late"][-1] == "four"
        assert part["state"] == "unfinished"
        text = (tmp_path / "out" / "report.md").read_text()
        assert f"- Not reached in the time, of ops: {'; '.join(part['late'])}" in text

    @pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiles"])
    def test_what_overruns_its_part_is_late(self, compiles: bool, tmp_path: Path, monkeypatch) -> None:
        part = self.run(tmp_path, monkeypatch, "time.sleep(100)", compiles=compiles, seconds=10.0)
        assert set(part["results"]) == {"one"}
        assert part["late"] == ["two", "three", "four"]
        assert (part["state"], part["error"]) == ("unfinished", "3 of 4 were not reached")

    def test_a_worker_that_does_not_start_ends_the_part(self, tmp_path: Path, monkeypatch) -> None:
        def broken(self, *arguments, **options):
            return runner.Ended(1, ("Traceback", "ImportError: no such library"))

        monkeypatch.setattr(runner.Check, "process", broken)
        check = runner.Check(tmp_path, "cpu", 60)
        assert not check.run(["networks", "ops", "tests"])
        parts = parts_of(tmp_path)
        for part in ("networks", "ops"):
            assert parts[part]["state"] == "failed"
            assert parts[part]["error"] == "ended with status 1: ImportError: no such library"
        assert "tests" in parts

    def test_what_failed_is_tried_again_by_a_second_command(self, tmp_path: Path, monkeypatch) -> None:
        part = self.run(tmp_path, monkeypatch, "os._exit(3)")
        assert part["crashed"] == {"two": "ended with status 3: it printed nothing"}
        part = self.run(tmp_path, monkeypatch, "os._exit(4)")  # nothing new passes: the part is no better
        assert part["crashed"] == {"two": "ended with status 4: it printed nothing"}
        assert part["state"] == "failed"
        part = self.run(tmp_path, monkeypatch, "pass")
        assert set(part["results"]) == {"one", "two", "three", "four"}
        assert "crashed" not in part
        assert part["state"] == "passed"

    def test_a_part_whose_items_all_crash_ends_and_says_what_is_left(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(runner, "RESTARTS", 2)
        part = self.run(tmp_path, monkeypatch, "pass\n    os._exit(5)")
        assert list(part["crashed"]) == ["one", "two"]
        assert part["late"] == ["three", "four"]
        assert part["state"] == "failed"
        assert part["error"].startswith("ended with status 5")

    def test_a_second_command_goes_on(self, tmp_path: Path, monkeypatch) -> None:
        self.run(tmp_path, monkeypatch, "time.sleep(5)", names=("two", "three", "four"), seconds=14.0)
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path / "out"), "--device", "cpu"])
        part = self.run(tmp_path, monkeypatch, "raise AssertionError('two again')")
        assert set(part["results"]) == {"one", "two", "three", "four"}
        assert "late" not in part
        assert part["state"] == "passed"

    def test_parts_without_time_are_not_reached(self, tmp_path: Path) -> None:
        check = runner.Check(tmp_path, "cpu", 1.0)
        assert check.run(["smoke", "networks", "tests"])
        parts = parts_of(tmp_path)
        assert {part["state"] for part in parts.values()} == {"not reached"}
        assert set(parts) == {"smoke", "networks", "tests"}

    def test_a_report_that_cannot_be_written_costs_the_report_only(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(report, "write", lambda *_: 1 / 0)
        check = runner.Check(tmp_path, "cpu", 1.0)
        assert check.run(["smoke"])
        assert "could not be written: ZeroDivisionError" in (tmp_path / "log.txt").read_text()

    def test_one_check_at_a_time(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        check = runner.Check(tmp_path, "cpu", 1.0)
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu", "--only", "ops"])
        assert f"another check is at work in {tmp_path}" in capsys.readouterr().err
        check.log.close()

    def test_another_device_needs_another_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Findings(tmp_path / findings.FILE).add("command", device="cuda", name="NVIDIA H100", parts=[])
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu", "--only", "ops"])
        assert "has findings of another device, NVIDIA H100, not " in capsys.readouterr().err

    def test_what_the_log_has_no_room_for_is_told(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(runner, "LARGEST_LOG", 100)
        log = runner.Log(tmp_path / "log")
        for _ in range(30):
            log.write("x", "a line")
        text = (tmp_path / "log").read_text()
        assert len(text) < 200
        assert text.endswith("check| the log is full: 100 bytes\n")

    def test_a_part_that_fails_is_reported_and_the_others_go_on(self, tmp_path: Path, monkeypatch) -> None:
        def broken(self, limit):
            raise OSError("no space left on device")

        monkeypatch.setattr(runner.Check, "_tests", broken)
        monkeypatch.setattr(__main__, "_age", lambda: 0.0)
        status = __main__.main(
            ["--out", str(tmp_path), "--device", "cpu", "--only", "tests", "environment", "--minutes", "1"]
        )
        found = json.loads((tmp_path / "report.json").read_text())
        assert status == 1
        assert found["parts"]["environment"]["state"] == "passed"
        assert found["parts"]["tests"]["state"] == "failed"
        assert found["parts"]["tests"]["error"] == "OSError: no space left on device"
        assert "no space left on device" in (tmp_path / "report.md").read_text()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
    def test_ended_at_any_moment_it_goes_on(self, number: int, tmp_path: Path) -> None:
        """What was found is kept, what the check started ends with it, and a second command finds the rest."""
        out = tmp_path / "out"
        words = command(out, "--only", "smoke", "--minutes", "3")
        # Not in the source tree, whose package `python -m` would import.
        where: dict[str, Any] = {"env": ENVIRONMENT, "cwd": tmp_path, "text": True}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **where)
        found = Findings(out / findings.FILE)
        end = time.monotonic() + 60
        while len(findings.results(found.lines())) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(random.random() / 2)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=20)
        if number == signal.SIGTERM:
            assert process.returncode == 1
            assert "interrupted: " in printed
            assert "| smoke | interrupted |" in (out / "report.md").read_text()
        before = findings.results(found.lines("smoke"))
        assert len(before) >= 3
        time.sleep(1)
        assert not [words for words in commands() if str(out) in words]
        done = subprocess.run(words, capture_output=True, **where)
        assert done.returncode == 0, done.stdout
        after = findings.results(found.lines("smoke"))
        assert {item: after[item] for item in before} == before
        assert len(after) == 10


class TestTests:
    def check(self, tmp_path: Path, text: str, **options: Any) -> runner.Check:
        """Of a tests' folder whose one file is what the check runs on a CPU."""
        (tmp_path / "tests" / "ops").mkdir(parents=True)
        (tmp_path / "tests" / "conftest.py").write_text("")
        (tmp_path / "tests" / "ops" / "test_contract.py").write_text(text)
        (tmp_path / "out").mkdir()
        return runner.Check(tmp_path / "out", "cpu", 60, tests=tmp_path / "tests", **options)

    @pytest.fixture(params=[2], ids=["two processes"], autouse=True)
    def processes(self, request: pytest.FixtureRequest, monkeypatch) -> int:
        monkeypatch.setattr(runner, "_cores", lambda: request.param + 2)
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            monkeypatch.delenv(name)  # of the run that this test is in
        return request.param

    @pytest.mark.parametrize("processes", [1, 2], ids=["one process", "two processes"], indirect=True)
    def test_faults_cost_their_test_only(self, tmp_path: Path) -> None:
        check = self.check(
            tmp_path,
            "import os, time, pytest\n"
            "def test_auto_first(): pass\n"
            "def test_auto_bad():\n    seen = 1\n    assert seen == 2, 'numbers differ'\n"
            "def test_auto_crash(): os.kill(os.getpid(), 11)\n"
            "@pytest.mark.skip(reason='no such thing')\n"
            "def test_auto_skipped(): pass\n"
            "def test_auto_endless(): time.sleep(600)\n"
            "def test_auto_lost(): os._exit(70)\n"
            "def test_auto_last(): pass\n",
            patience=3.0,
        )
        assert not check.run(["tests"])
        section = parts_of(tmp_path / "out")["tests"]
        counts = {key: section[key] for key in ("passed", "failed", "errors", "skipped", "collected")}
        assert counts == {"passed": 2, "failed": 4, "errors": 0, "skipped": 1, "collected": 7}
        failed = {name.rpartition("_")[2]: reason for name, reason in section["failures"].items()}
        assert set(failed) == {"bad", "crash", "endless", "lost"}
        assert "numbers differ" in failed["bad"]
        assert section["skips"] == {"Skipped: no such thing": 1}
        log = (tmp_path / "out" / "log.txt").read_text()
        assert "seen = 1" in log  # the whole traceback
        assert "in test_auto_endless" in log  # the hang's stack

    def test_out_of_time_and_a_second_command(self, tmp_path: Path) -> None:
        check = self.check(
            tmp_path,
            "import time, os, pytest\n"
            "@pytest.mark.parametrize('i', range(40))\n"
            "def test_auto_slow(i): time.sleep(0 if os.path.exists('/proc/self') and i < 10 else "
            f"0 if os.path.exists({str(tmp_path / 'fast')!r}) else 5)\n",
        )
        check.budget = plan.Budget(12)
        check.run(["tests"])
        section = parts_of(tmp_path / "out")["tests"]
        assert section["state"] == "unfinished"
        assert section["collected"] == 40
        first = section["passed"]
        assert first < 40
        assert f"{40 - first} were not reached in the time." in (tmp_path / "out" / "report.md").read_text()
        (tmp_path / "fast").write_text("")
        assert runner.Check(tmp_path / "out", "cpu", 60, tests=tmp_path / "tests").run(["tests"])
        section = parts_of(tmp_path / "out")["tests"]
        assert section["state"] == "passed"
        assert section["passed"] == 40

    def test_no_tests(self, tmp_path: Path) -> None:
        check = runner.Check(tmp_path, "cpu", 8, tests=tmp_path / "nowhere")
        assert check.run(["tests"])
        section = parts_of(tmp_path)["tests"]
        assert section["state"] == "skipped"
        assert "give --tests" in section["error"]


def test_a_test_that_loses_the_device_ends_its_process(tmp_path: Path, monkeypatch) -> None:
    left: list[int] = []
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "lines"))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(progress, "works", lambda device: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", left.append)
    outcome = pytest.TestReport("t", ("", 0, "t"), {}, "passed", None, "call")
    progress.pytest_runtest_logreport(outcome)
    assert left == []
    outcome.outcome, outcome.longrepr = "failed", "CUDA error\nmore"
    progress.pytest_runtest_logreport(outcome)
    assert left == [progress.LOST]
    assert json.loads((tmp_path / "lines").read_text().splitlines()[1])["reason"] == "CUDA error"


def test_a_sample_of_every_function_and_backend_comes_first() -> None:
    class Item:
        def __init__(self, function: str, backend: str, number: int) -> None:
            self.location = ("test_x.py",)
            self.name = self.originalname = function
            self.callspec = type("Spec", (), {"params": {"backend": backend, "number": number}})()

    items = [Item(f, b, i) for f in ("test_a", "test_b") for b in ("triton", "cuda") for i in range(30)]
    items.append(Item("test_c", "cuda", 0))
    order = [(item.name, *item.callspec.params.values()) for item in progress.ordered(items)]
    assert len(order) == len(set(order)) == len(items)
    sample = order[: 4 * progress.SAMPLE + 1]
    counted = {pair: sum(entry[:2] == pair for entry in sample) for pair in {entry[:2] for entry in sample}}
    every = {(f, b): progress.SAMPLE for f in ("test_a", "test_b") for b in ("triton", "cuda")}
    assert counted == every | {("test_c", "cuda"): 1}
    backends_of = [entry[1] for entry in sample]
    assert backends_of == sorted(backends_of)  # "cuda" before "triton"


def timing(seconds: float) -> dict[str, Any]:
    return {"median": seconds, "low": seconds, "high": seconds, "rounds": 1, "graph": True}


def test_the_grandchildren_of_a_killed_check_are_ended(tmp_path: Path) -> None:
    marker, log = f"sleep 61.{os.getpid()}", tmp_path / "log.txt"
    code = (
        "import pathlib, sys; from alexnet_kernels.gpu_check import runner;"
        "check = runner.Check(pathlib.Path(sys.argv[1]), 'cpu', 60); check._reaper = runner.Reaper();"
        f"check.process('x', ['sh', '-c', '{marker} & echo begun; wait'], 50)"
    )

    def until(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)
        return condition()

    def runs() -> bool:
        return marker.split() in commands()

    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, cwd=tmp_path)
    assert until(lambda: log.exists() and "x| begun" in log.read_text())
    assert runs()
    process.kill()
    process.wait()
    assert until(lambda: not runs())


class TestTools:
    """Programs of the CUDA toolkit, in whose place scripts stand."""

    def check(self, tmp_path: Path, monkeypatch, name: str, script: str) -> runner.Check:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        (tmp_path / "out").mkdir()
        return runner.Check(tmp_path / "out", "cuda", 6)

    @pytest.mark.parametrize("tool", ["clean", "dirty", "slow"])
    def test_sanitizer(self, tool: str, tmp_path: Path, monkeypatch) -> None:
        said = {
            "clean": "echo max_pool2d; echo '========= ERROR SUMMARY: 0 errors'",
            "dirty": "echo '========= Invalid __global__ read of size 4 bytes'; "
            "echo '========= ERROR SUMMARY: 1 error'; exit 9",
            "slow": "sleep 60",
        }
        check = self.check(tmp_path, monkeypatch, "compute-sanitizer", said[tool])
        passed = check.run(["sanitizer"])
        text = (tmp_path / "out" / "report.md").read_text()
        assert passed == (tool != "dirty")
        if tool == "slow":
            assert "| sanitizer | not reached |" in text
            assert "- Not reached in the time, of sanitizer: memcheck; racecheck" in text
        else:
            assert f"| sanitizer | {'passed' if tool == 'clean' else 'failed'} |" in text
            assert "- racecheck: ERROR SUMMARY: " in text
            assert ("  - Invalid __global__ read of size 4 bytes" in text) == (tool == "dirty")
            assert ("(1 ops were run)" in text) == (tool == "clean")

    CSV = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Stream","Section Name","Metric Name","Metric Unit","Metric Value","Rule Description"\n'
        '"0","pool(int)","13","SpeedOfLight","Duration","us","1,234.5",""\n'
        '"0","pool(int)","13","SpeedOfLight","","","","Memory is busier"\n'
        '"1","bias(int)","13","SpeedOfLight","Duration","us","7",""\n'
        '"2","lrn(int)","14","LaunchStats","Registers Per Thread","register/thread","62",""\n'
    )

    def test_counters_are_those_of_the_slowest_rows(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "csv").write_text(self.CSV)
        script = f'while [ "$1" != --log-file ]; do shift; done; cp {tmp_path / "csv"} "$2"'
        check = self.check(tmp_path, monkeypatch, "ncu", script)
        rates = {"copy": 1e9, "gemm": {"bf16": 1e12}}
        check.findings.add("ceilings", item="rates", result=rates)
        for name, seconds in (("slow, bf16", 5.0), ("fast, bf16", 1.0), ("slower, bf16, NCHW", 9.0)):
            measured = {"bytes": 1e9, "operations": 0, "cached": False, "times": {"cuda": timing(seconds)}}
            row = {"op": "x", "dtype": "bf16", "wrong": {}, "errors": {}, "missing": {}, "forward": measured}
            check.findings.add("ops", item=name, result=row)
        chosen = counters.slowest(findings.results(check.findings.lines("ops")), Ceilings(**rates))
        assert chosen == [("slow, bf16", "forward", 0.2), ("fast, bf16", "forward", 1.0)]
        assert check.run(["counters"])
        results = parts_of(tmp_path / "out")["counters"]["results"]
        assert list(results) == ["slow, bf16, forward", "fast, bf16, forward"]
        pool, bias = results["slow, bf16, forward"]["kernels"]
        assert pool == {"kernel": "pool(int)", "Duration [us]": 1234.5, "rules": ["Memory is busier"]}
        assert bias == {"kernel": "bias(int)", "Duration [us]": 7.0}
        assert results["fast, bf16, forward"]["kernels"][0]["Registers Per Thread [register/thread]"] == 62.0
        assert "`lrn(int)`: Registers Per Thread [register/thread] 62" in (tmp_path / "out" / "report.md").read_text()

    def test_counters_of_a_tool_that_refuses(self, tmp_path: Path, monkeypatch) -> None:
        check = self.check(tmp_path, monkeypatch, "ncu", "echo '==ERROR== no permission'; exit 1")
        check.findings.add("ceilings", item="rates", result={"copy": 1e9, "gemm": {"bf16": 1e12}})
        measured = {"bytes": 1e9, "operations": 0, "cached": False, "times": {"cuda": timing(1.0)}}
        row = {"op": "x", "dtype": "bf16", "wrong": {}, "errors": {}, "missing": {}, "forward": measured}
        check.findings.add("ops", item="x, bf16", result=row)
        assert check.run(["counters"])
        part = parts_of(tmp_path / "out")["counters"]
        assert part["state"] == "skipped"
        assert part["error"] == "0 of 1 rows: ncu ended with status 1: ==ERROR== no permission"

    @pytest.mark.parametrize("op", sorted(set(alexnet_kernels.ops.__all__) - {"augment"}))
    def test_the_rows_that_ncu_watches_can_be_run(self, op: str) -> None:
        if op == "sgd_step":
            counters.call_of("sgd_step, AlexNet's parameters, fp32", "step", "cpu", CPU)()
            return
        case = min((c for c in cases.cases() if c.op == op and c.core), key=lambda c: c.work.moved(1, True))
        for direction in ("forward", "backward"):
            counters.call_of(f"{case.name}, batch 2", direction, "cpu", CPU)()
        with pytest.raises(SystemExit, match="has no direction 'step'"):
            counters.call_of(f"{case.name}, batch 2", "step", "cpu", CPU)


class TestLibrary:
    def test_one_that_does_not_fit_is_refused(self, tmp_path: Path, monkeypatch) -> None:
        package = tmp_path / "alexnet_kernels"
        package.mkdir()
        monkeypatch.setattr(runner, "PACKAGE", package)
        (tmp_path / "library").write_text("no library")
        (tmp_path / "out").mkdir()
        check = runner.Check(tmp_path / "out", "cpu", 60, library=tmp_path / "library")
        monkeypatch.setattr(check, "_fits", lambda: ("failed", "the library: no"))
        assert not check.run(["build"])
        assert (package / "_C.so").read_text() == "no library"
        assert "| build | failed | " in (tmp_path / "out" / "report.md").read_text()

    def test_an_architecture_that_is_missing_is_reported(self, monkeypatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        gpu = torch.device("cuda")
        for archs in (["8.0", "9.0"], ["9.0a"], ["10.0+PTX", "9.0+PTX"]):
            assert worker.missing_arch({"archs": archs}, gpu) is None
        why = worker.missing_arch({"archs": ["8.0", "10.0+PTX"]}, gpu)
        assert why == "built for 8.0, 10.0+PTX, but the device is 9.0"
        facts = {"missing_arch": why, "backends": []}
        text = report.markdown(
            {"device": "cuda", "parts": {"environment": {"state": "failed", "results": {"facts": facts}}}}
        )
        assert f"- The library lacks this device's architecture: {why}" in text
        assert report.problems("environment", {"facts": facts}) == [f"the library: {why}"]


class TestConvolutions:
    @pytest.mark.parametrize("layer", CONVOLUTIONS)
    def test_every_form_computes_as_many_outputs(self, layer: str) -> None:
        filters, _, _, _, _, _, size = CONVOLUTIONS[layer]
        count = filters * {224: 55}.get(size, size) ** 2
        for form in ("grouped", "space-to-depth" if layer == "conv1" else "split"):
            made = convolutions.Form(layer, torch.float32, 1, CPU, form)
            assert sum(grad.numel() for _, _, grad in made.parts) == count
            for direction in convolutions.ALONE:
                made.call(direction)()

    def test_rates_count_both_gradients(self) -> None:
        found = {"layer": "conv3", "operations": 10.0}
        assert convolutions.rate(found, "forward", 2.0) == 5
        assert convolutions.rate(found, "op, backward", 2.0) == 10
        assert convolutions.rate({**found, "layer": "conv1"}, "op, backward", 2.0) == 5


def test_kernels_of_an_operator_are_told_apart() -> None:
    launched = [("conv", 100, [("gemm", 6.0), ("pad", 3.0)]), ("relu", 50, [("clamp", 3.0)])] * kernel_times.STEPS
    found = kernel_times.summary(launched)
    assert found["step_us"] == 12.0
    assert found["kernels"] == [
        {"name": "gemm", "calls": 1.0, "us": 6.0, "share": 0.5},
        {"name": "pad", "calls": 1.0, "us": 3.0, "share": 0.25},
        {"name": "clamp", "calls": 1.0, "us": 3.0, "share": 0.25, "bytes": 50},
    ]
    assert found["operators"][0] == {
        "name": "conv",
        "bytes": 100,
        "calls": 1.0,
        "us": 9.0,
        "share": 0.75,
        "kernels": ["gemm", "pad"],
    }


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--out DIR is required"),
            (["--out", "x", "--minutes", "0"], "--minutes must be positive, not 0.0"),
            (["--out", "x", "--patience", "0"], "--patience must be positive, not 0.0"),
            (["--out", "/dev/null/x", "--device", "cpu"], "--out /dev/null/x: Not a directory"),
            (["--out", "x", "--only", "speed"], "invalid choice: 'speed'"),
            (["--out", "x", "--only", "ops", "--from", "ops"], "not allowed with argument"),
            (["--out", "x", "--device", "cpu", "--library", "nowhere"], "--library nowhere: there is no such file"),
            pytest.param(
                ["--out", "x", "--device", "cuda"],
                "torch sees no CUDA device",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
            ),
        ],
        ids=["no out", "no time", "no patience", "no folder", "no such part", "both", "no library", "no device"],
    )
    def test_bad_arguments(self, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            __main__.main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err

    def test_findings_of_an_earlier_run_are_not_lost(self, tmp_path: Path, capsys) -> None:
        Findings(tmp_path / findings.FILE).add("ops", item="one", result={})
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu"])
        assert "has findings already: go on with --from or --only" in capsys.readouterr().err

    def test_a_report_can_be_written_again(self, tmp_path: Path, capsys) -> None:
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu", "--report"])
        assert "has no findings" in capsys.readouterr().err
        Findings(tmp_path / findings.FILE).add("smoke", item="one", result={"wrong": "all", "error": None})
        assert __main__.main(["--out", str(tmp_path), "--device", "cpu", "--report"]) == 0
        assert "- WRONG one: all" in (tmp_path / "report.md").read_text()

    def test_parts_that_share_a_workers_start(self) -> None:
        order = [["build"], ["environment", "ceilings"], ["smoke"], ["networks", "convolutions", "ops"], ["tests"]]
        assert plan.stages(plan.PARTS) == [*order, ["counters"], ["compiled"], ["sanitizer"]]
        assert plan.stages(["smoke", "ops", "compiled"]) == [["smoke"], ["ops", "compiled"]]

    def test_the_script_says_how_it_is_used(self) -> None:
        done = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_check.sh")], capture_output=True, text=True)
        assert done.returncode == 2
        assert "usage: " in done.stderr
        words = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
        environment = {**ENVIRONMENT, "PYTHON": "echo"}
        for given, passed in ((["--help"], "--help"), (["x", "--minutes", "2"], "--out x --minutes 2")):
            said = subprocess.run([*words, *given], capture_output=True, text=True, env=environment).stdout
            assert said == f"-m alexnet_kernels.gpu_check {passed}\n"
