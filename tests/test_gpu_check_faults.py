"""Faults while `python -m alexnet_kernels.gpu_check` runs: crashes, hangs, kills, and a lack of time."""

from __future__ import annotations

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
from checks import ENVIRONMENT, FILES, ForkedPython, command, command_lines, parts_of, start_fork_server

from alexnet_kernels.gpu_check import __main__, findings, plan, processes, programs, progress, report, runner
from alexnet_kernels.gpu_check.findings import Findings

pytestmark = pytest.mark.slow


# A worker whose part "ops" has `count` items, some of them with a fault.
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


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    start_fork_server()


class TestFaults:
    def run(
        self, tmp_path: Path, monkeypatch, fault: str, compiles: bool = False, names: tuple = ("two",), **options: Any
    ) -> dict[str, Any]:
        """Runs part "ops" in such a worker; returns the part's report."""
        script = tmp_path / "worker.py"
        script.write_text(SCRIPT.format(fault=fault, compiles=compiles, names=names, count=options.pop("count", 4)))

        def opened(command, env, cwd):
            assert command[:3] == [sys.executable, "-m", "alexnet_kernels.gpu_check"]
            return ForkedPython([sys.executable, str(script), *command[3:]], env, cwd)

        monkeypatch.setattr(processes, "_open", opened)
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

    def test_a_kernel_that_hangs_is_avoided_by_the_other_parts(self, tmp_path: Path, monkeypatch) -> None:
        script = tmp_path / "worker.py"
        script.write_text(
            "import os, time\n"
            "from alexnet_kernels.gpu_check import __main__, worker\n"
            "right = lambda _: {'wrong': None, 'error': None}\n"
            "by = {'mma.sync': right, 'wgmma': lambda _: time.sleep(60)}\n"
            "items = [worker.Item(f'{layer} by cuda, {name}', call, most=2.0)\n"
            "         for layer in ('conv2', 'conv3') for name, call in by.items()]\n"
            "seen = lambda skip: {'skip': sorted(skip), 'means': os.environ.get('ALEXNET_KERNELS_CONV2D_RELU')}\n"
            "worker.WORK['paths'] = lambda _: items\n"
            "worker.WORK['ops'] = lambda _: [worker.Item('seen', seen)]\n"
            "raise SystemExit(__main__.main())\n"
        )
        monkeypatch.setattr(
            processes, "_open", lambda words, env, cwd: ForkedPython([words[0], str(script), *words[3:]], env, cwd)
        )
        assert not runner.Check(tmp_path, "cpu", 60).run(["paths", "ops"])
        parts = parts_of(tmp_path)
        wgmma = {"conv2 by cuda, wgmma", "conv3 by cuda, wgmma"}
        assert set(parts["paths"]["results"]) == {"conv2 by cuda, mma.sync", "conv3 by cuda, mma.sync"}
        assert parts["paths"]["crashed"] == dict.fromkeys(wgmma, "it took too long: the log has its stack")
        assert parts["ops"]["results"]["seen"] == {"skip": ["conv2d_relu by cuda, wgmma"], "means": "library"}
        text = (tmp_path / "report.md").read_text()
        assert "- conv3 by cuda, mma.sync: right" in text
        assert "- CRASHED in paths: conv2 by cuda, wgmma: it took too long" in text

    def test_what_compiles_is_no_hang(self, tmp_path: Path, monkeypatch) -> None:
        part = self.run(tmp_path, monkeypatch, "time.sleep(3)", compiles=True, patience=1.0)
        assert set(part["results"]) == {"one", "two", "three", "four"}
        assert part["state"] == "passed"

    def test_a_slow_machine_reaches_less(self, tmp_path: Path, monkeypatch) -> None:
        start = time.monotonic()
        part = self.run(tmp_path, monkeypatch, "time.sleep(3)", names=("two", "three", "four"), seconds=9.0)
        assert time.monotonic() - start < 40
        assert {"one", "two"} <= set(part["results"])
        assert [*part["results"], *part["late"]] == ["one", "two", "three", "four"]
        assert part["late"][-1] == "four"
        assert part["state"] == "unfinished"
        text = (tmp_path / "out" / "report.md").read_text()
        assert f"- Not reached in the time, of ops: {'; '.join(part['late'])}" in text

    @pytest.mark.parametrize("compiles", [False, True], ids=["plain", "compiles"])
    def test_what_overruns_its_part_is_late(self, compiles: bool, tmp_path: Path, monkeypatch) -> None:
        part = self.run(tmp_path, monkeypatch, "time.sleep(100)", compiles=compiles, seconds=7.0)
        assert set(part["results"]) == {"one"}
        assert part["late"] == ["two", "three", "four"]
        assert (part["state"], part["error"]) == ("unfinished", "3 of 4 were not reached")

    def test_a_worker_that_does_not_start_ends_the_part(self, tmp_path: Path, monkeypatch) -> None:
        def broken(self, *arguments, **options):
            return processes.Ended(1, ("Traceback", "ImportError: no such library"))

        monkeypatch.setattr(processes.Processes, "run", broken)
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
        monkeypatch.setattr(plan, "RESTARTS", 2)
        part = self.run(tmp_path, monkeypatch, "pass\n    os._exit(5)")
        assert list(part["crashed"]) == ["one", "two"]
        assert part["late"] == ["three", "four"]
        assert part["state"] == "failed"
        assert part["error"].startswith("ended with status 5")

    def test_a_second_command_goes_on(self, tmp_path: Path, monkeypatch) -> None:
        self.run(tmp_path, monkeypatch, "time.sleep(3)", names=("two", "three", "four"), seconds=9.0)
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
        assert f"another check is running in {tmp_path}" in capsys.readouterr().err
        check.log.close()

    def test_another_device_needs_another_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        Findings(tmp_path / findings.FILE).add("command", device="cuda", name="NVIDIA H100", parts=[])
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu", "--only", "ops"])
        assert "has findings of another device, NVIDIA H100, not " in capsys.readouterr().err

    def test_what_the_log_has_no_room_for_is_told(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(processes, "LARGEST_LOG", 100)
        log = processes.Log(tmp_path / "log")
        for _ in range(30):
            log.write("x", "a line")
        text = (tmp_path / "log").read_text()
        assert len(text) < 200
        assert text.endswith("check| the log is full: 100 bytes\n")

    def test_a_part_that_fails_is_reported_and_the_others_go_on(self, tmp_path: Path, monkeypatch) -> None:
        def broken(context, limit):
            raise OSError("no space left on device")

        monkeypatch.setitem(programs.PROGRAMS, "tests", broken)
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
        """Findings are kept, the check's processes end with it, and a second command completes the rest."""
        out = tmp_path / "out"
        words = command(out, "--only", "smoke", "--minutes", "3")
        # Outside of the source tree, from which `python -m` would import the package.
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
        assert not [words for words in command_lines() if str(out) in words]
        done = subprocess.run(words, capture_output=True, **where)
        assert done.returncode == 0, done.stdout
        after = findings.results(found.lines("smoke"))
        assert {item: after[item] for item in before} == before
        assert len(after) == 10


class TestTests:
    def check(self, tmp_path: Path, text: str, seconds: float = 60, **options: Any) -> runner.Check:
        """A check whose folder of tests has one file, the one that a check on the CPU runs."""
        (tmp_path / "tests" / "ops").mkdir(parents=True)
        (tmp_path / "tests" / "conftest.py").write_text("")
        (tmp_path / "tests" / "ops" / "test_contract.py").write_text(text)
        (tmp_path / "out").mkdir()
        return runner.Check(tmp_path / "out", "cpu", seconds, tests=tmp_path / "tests", **options)

    @pytest.fixture(params=[2], ids=["two processes"], autouse=True)
    def processes(self, request: pytest.FixtureRequest, monkeypatch) -> int:
        monkeypatch.setattr(plan, "cores", lambda: request.param + 2)
        monkeypatch.setattr(processes, "_open", ForkedPython)
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:
            monkeypatch.delenv(name)  # set by the run of this test
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
            seconds=12 + runner.RESERVE,
        )
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


def test_the_grandchildren_of_a_killed_check_are_ended(tmp_path: Path) -> None:
    marker, log = f"sleep 61.{os.getpid()}", tmp_path / "log.txt"
    code = (
        "import pathlib, sys; from alexnet_kernels.gpu_check import runner;"
        "check = runner.Check(pathlib.Path(sys.argv[1]), 'cpu', 60); check.processes.__enter__();"
        f"check.processes.run('x', ['sh', '-c', '{marker} & echo begun; wait'], 50)"
    )

    def until(condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + 30
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)
        return condition()

    def runs() -> bool:
        return marker.split() in command_lines()

    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT, cwd=tmp_path)
    assert until(lambda: log.exists() and "x| begun" in log.read_text())
    assert until(runs)
    process.kill()
    process.wait()
    assert until(lambda: not runs())


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
