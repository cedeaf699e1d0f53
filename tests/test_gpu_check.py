"""python -m alexnet_kernels.testing.gpu_check, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import alexnet_kernels
from alexnet_kernels import backends
from alexnet_kernels.testing import cases, gpu_check, progress, tables
from alexnet_kernels.testing.exercise import exercise

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    """(exit status, gpu_check.json, gpu_check.md, what was printed) of a short run of everything."""
    out = tmp_path_factory.mktemp("check") / "out"
    command = [sys.executable, "-m", "alexnet_kernels.testing.gpu_check", "--device", "cpu", "--out", str(out)]
    command += ["--minutes", "4", "--tests", str(ROOT / "tests")]
    package = Path(cases.__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=out.parent)
    assert (out / "gpu_check.json").exists(), done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.md"]
    text = (out / "gpu_check.json").read_text()
    return done.returncode, json.loads(text), (out / "gpu_check.md").read_text(), done.stdout


class TestWhole:
    def test_passes(self, report) -> None:
        status, found, _, _ = report
        states = {name: part["state"] for name, part in found["parts"].items()}
        assert states == {
            "environment": "passed",
            "ceilings": "passed",
            "tests": "passed",
            "sanitizer": "skipped",
            "ops": "passed",
            "nets": "passed",
        }
        assert status == 0

    def test_tells_where_it_ran(self, report) -> None:
        facts = report[1]["parts"]["environment"]
        assert facts["torch"] == torch.__version__
        assert len(facts["backends"]) == 10
        assert facts["library"]["loaded"]

    def test_tests_ran(self, report) -> None:
        tests = report[1]["parts"]["tests"]
        assert tests["passed"] == tests["collected"] > 10
        assert tests["failures"] == {}

    def test_times_and_ratios(self, report) -> None:
        _, found, text, _ = report
        ops = found["parts"]["ops"]["cases"]
        name = "lrn_max_pool2d, layer 2, bf16, NCHW, batch 2"
        first = ops[name]
        assert first["wrong"] == {}
        for direction in ("forward", "forward and backward"):
            times = first[direction]["times"]
            assert set(times) == {"cpu", "eager"}
            assert all(0 < t["low"] <= t["median"] <= t["high"] for t in times.values())
            ratio = times["eager"]["median"] / times["cpu"]["median"]
            cpu = tables.seconds_text(times["cpu"]["median"])
            assert f"| {name} | {direction} | {cpu} ±" in text
            assert f" | {ratio:.2f} | " in text
        late = found["parts"]["ops"].get("unfinished", [])
        assert {name.partition(",")[0] for name in (*ops, *late)} == set(alexnet_kernels.ops.__all__)
        nets = found["parts"]["nets"]["cases"]
        assert set(nets) == {f"paper, bf16, batch 2, {purpose}" for purpose in ("inference", "training step")}
        for net in nets.values():
            assert net["wrong"] == {}
            (times,) = (net[purpose]["times"] for purpose in ("inference", "training step") if purpose in net)
            assert all("median" in times[variant] for variant in ("auto", "auto, pure bf16", "eager"))

    def test_says_that_a_cpu_proves_nothing_and_ends_with_the_summary(self, report) -> None:
        _, _, text, printed = report
        assert text.startswith("# GPU check, run on a CPU: its figures say nothing")
        assert printed.rstrip().splitlines()[-1].startswith("passed: ")
        assert text.strip() in printed


def test_exercise_runs_every_op() -> None:
    assert set(exercise(CPU, "cpu")) == set(alexnet_kernels.ops.__all__)


class TestFaults:
    def check(self, tmp_path: Path, **options: Any) -> gpu_check.Check:
        return gpu_check.Check(tmp_path, "cpu", options.get("minutes", 1), options.get("tests"))

    def worker(self, tmp_path: Path, monkeypatch, *runs: tuple[list[dict], int | None, str]) -> tuple[dict, list]:
        """The section of a part whose processes write these lines and end so; what each was told to skip."""
        skipped = []

        def run(self, command, limit, variables=None, cwd=None, watched=None):
            lines, status, text = runs[len(skipped)]
            skipped.append([c.removeprefix("--skip=") for c in command if c.startswith("--skip")])
            watched.write_text("\n".join(map(json.dumps, lines)) + '\n{"cut off')
            return status, text

        monkeypatch.setattr(gpu_check.Check, "_run", run)
        section: dict[str, Any] = {}
        self.check(tmp_path)._worker("ops", section, 60)
        return section, skipped

    @staticmethod
    def done(name: str) -> dict[str, Any]:
        return {"cases": {name: {"wrong": {}, "errors": {}}}, "finished": {name: True}}

    @pytest.mark.parametrize(
        ("status", "reason"),
        [(-11, "ended with status -11: CUDA error: an illegal memory access"), (None, "took too long")],
        ids=["crash", "stall"],
    )
    def test_a_crash_in_a_case_costs_that_case_only(self, tmp_path: Path, monkeypatch, status, reason) -> None:
        first = [{"current": "one"}, self.done("one"), {"current": "two by cuda"}]
        second = [{"current": "two"}, self.done("two"), {"current": "three"}, self.done("three")]
        error = "CUDA error: an illegal memory access\n"
        section, skipped = self.worker(tmp_path, monkeypatch, (first, status, error), (second, 0, ""))
        assert set(section["cases"]) == {"one", "two", "three"}
        assert section["crashed"] == {"two by cuda": reason}
        assert section["state"] == "failed"
        assert skipped == [[], ["one", "two by cuda"]]
        assert "finished" not in section

    def test_a_case_that_crashes_again_ends_the_part(self, tmp_path: Path, monkeypatch) -> None:
        runs = [([{"current": "one"}], 1, "no")] * 2
        section, _ = self.worker(tmp_path, monkeypatch, *runs)
        assert section["crashed"] == {"one": "ended with status 1: no"}

    def test_a_process_that_does_not_start_ends_the_part(self, tmp_path: Path, monkeypatch) -> None:
        section, _ = self.worker(tmp_path, monkeypatch, ([], 1, "ImportError: no\n"))
        assert section["crashed"] == {"its start": "ended with status 1: ImportError: no"}

    def test_a_process_that_stalls_is_stopped(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(gpu_check, "STALL", 1.0)
        watched = tmp_path / "lines"
        sleeper = [sys.executable, "-c", "import time; print('asleep', flush=True); time.sleep(60)"]
        start = time.monotonic()
        assert self.check(tmp_path)._run(sleeper, 50, watched=watched) == (None, "asleep\n")
        assert time.monotonic() - start < 30

    def test_parts_share_what_is_left(self, tmp_path: Path, monkeypatch) -> None:
        limits = {}
        monkeypatch.setattr(gpu_check.Check, "part", lambda self, name, limit: limits.update({name: limit}))
        self.check(tmp_path, minutes=1).run(["ops", "nets"])
        assert limits["ops"] == pytest.approx(60 * 0.32 / 0.5, rel=0.01)
        assert limits["nets"] == pytest.approx(60, rel=0.01)

    def test_interrupted(self, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
        def terminated(self, name, section, limit):
            section["cases"] = {}
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(gpu_check.Check, "_worker", terminated)
        before = signal.getsignal(signal.SIGTERM)
        assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu", "--only", "ops", "nets"]) == 1
        assert signal.getsignal(signal.SIGTERM) == before
        found = json.loads((tmp_path / "gpu_check.json").read_text())
        assert found["parts"]["ops"]["state"] == "interrupted"
        assert "nets" not in found["parts"]
        assert "interrupted" in capsys.readouterr().out

    def test_a_part_that_fails_is_reported_and_the_others_go_on(self, tmp_path: Path, monkeypatch) -> None:
        def broken(self, name, section, limit):
            raise OSError("no space left on device")

        monkeypatch.setattr(gpu_check.Check, "_tests", broken)
        status = gpu_check.main(
            ["--out", str(tmp_path), "--device", "cpu", "--only", "tests", "environment", "--minutes", "1"]
        )
        found = json.loads((tmp_path / "gpu_check.json").read_text())
        assert status == 1
        assert found["parts"]["environment"]["state"] == "passed"
        assert found["parts"]["tests"]["state"] == "failed"
        assert found["parts"]["tests"]["error"] == "OSError: no space left on device"
        assert "no space left on device" in (tmp_path / "gpu_check.md").read_text()

    def suite(self, folder: Path, text: str) -> Path:
        """A tests' folder whose one file is what the check runs on a CPU."""
        (folder / "tests" / "ops").mkdir(parents=True)
        (folder / "tests" / "conftest.py").write_text("")
        (folder / "tests" / "ops" / "test_within_map_response_norm.py").write_text(text)
        return folder / "tests"

    def test_failing_and_endless_tests(self, tmp_path: Path) -> None:
        tests = self.suite(
            tmp_path,
            "import time\n"
            "def test_definition_cpu_good(): pass\n"
            "def test_definition_cpu_bad(): assert 1 == 2, 'numbers differ'\n"
            "def test_definition_cpu_endless(): time.sleep(600)\n",
        )
        section: dict[str, Any] = {}
        self.check(tmp_path, tests=tests)._tests("tests", section, 8)
        assert section["state"] == "failed"
        assert (section["passed"], section["failed"], section["collected"]) == (1, 1, 3)
        assert not section["finished"]
        ((name, reason),) = section["failures"].items()
        assert name.endswith("::test_definition_cpu_bad")
        assert "numbers differ" in reason
        assert "Not all were reached" in "\n".join(gpu_check._tests_lines(section))

    def test_a_test_that_crashes_costs_itself_only(self, tmp_path: Path) -> None:
        tests = self.suite(
            tmp_path,
            "import os, pytest\n"
            "def test_definition_cpu_first(): pass\n"
            "def test_definition_cpu_crash(): os.kill(os.getpid(), 11)\n"
            "@pytest.mark.skip(reason='no such thing')\n"
            "def test_definition_cpu_skipped(): pass\n"
            "def test_definition_cpu_lost(): os._exit(70)\n"
            "def test_definition_cpu_last(): pass\n",
        )
        section: dict[str, Any] = {}
        self.check(tmp_path, tests=tests)._tests("tests", section, 60)
        counts = {key: section[key] for key in ("passed", "failed", "errors", "skipped", "collected")}
        assert counts == {"passed": 2, "failed": 2, "errors": 0, "skipped": 1, "collected": 5}
        reasons = {name.rpartition("_")[2]: reason for name, reason in section["failures"].items()}
        assert reasons == {"crash": "the process ended with status -11", "lost": "the process ended with status 70"}
        assert section["skips"] == {"Skipped: no such thing": 1}
        assert (section["state"], section["finished"]) == ("failed", True)

    def test_a_test_that_loses_the_device_ends_its_process(self, tmp_path: Path, monkeypatch) -> None:
        left: list[int] = []
        monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "lines"))
        monkeypatch.setattr(progress, "works", lambda device: False)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(os, "_exit", left.append)
        report = pytest.TestReport("t", ("", 0, "t"), {}, "passed", None, "call")
        progress.pytest_runtest_logreport(report)
        assert left == []
        report.outcome, report.longrepr = "failed", "CUDA error\nmore"
        progress.pytest_runtest_logreport(report)
        assert left == [progress.LOST]
        assert json.loads((tmp_path / "lines").read_text().splitlines()[1])["reason"] == "CUDA error"

    @pytest.mark.parametrize("tool", ["clean", "dirty", "slow"])
    def test_sanitizer(self, tool: str, tmp_path: Path, monkeypatch) -> None:
        said = {
            "clean": "echo '========= ERROR SUMMARY: 0 errors'",
            "dirty": "echo '========= Invalid __global__ read of size 4 bytes'; "
            "echo '========= ERROR SUMMARY: 1 error'; exit 9",
            "slow": "sleep 60",
        }
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{said[tool]}\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(backends, "unavailable", lambda op, backend: None)
        check = self.check(tmp_path)
        check.device = "cuda"
        section: dict[str, Any] = {}
        check._sanitizer("sanitizer", section, 2)
        text = "\n".join(gpu_check._sanitizer_lines(section))
        if tool == "slow":
            assert section["state"] == "skipped"
            assert "- memcheck: took too long" in text
        else:
            assert section["state"] == {"clean": "passed", "dirty": "failed"}[tool]
            assert "- racecheck: ERROR SUMMARY: " in text
            assert ("  - Invalid __global__ read of size 4 bytes" in text) == (tool == "dirty")

    def test_no_tests(self, tmp_path: Path) -> None:
        section: dict[str, Any] = {}
        self.check(tmp_path, tests=tmp_path / "nowhere")._tests("tests", section, 8)
        assert section["state"] == "skipped"
        assert "give --tests" in section["error"]

    def test_out_of_time(self) -> None:
        found = list(gpu_check.time_ops(CPU, gpu_check.Budget(0), set()))
        late = {name.partition(",")[0] for line in found for name in line["unfinished"]}
        assert late == set(alexnet_kernels.ops.__all__)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "--out DIR is required"),
            (["--out", "x", "--minutes", "0"], "--minutes must be positive, not 0.0"),
            (["--out", "/dev/null/x", "--device", "cpu"], "--out /dev/null/x: Not a directory"),
            (["--out", "x", "--only", "speed"], "invalid choice: 'speed'"),
            pytest.param(
                ["--out", "x", "--device", "cuda"],
                "torch sees no CUDA device",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
            ),
        ],
        ids=["no out", "no time", "no folder", "no such part", "no device"],
    )
    def test_bad_arguments(self, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            gpu_check.main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_the_script_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_check.sh")], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: " in done.stderr
