"""python -m alexnet_kernels.testing.gpu_check, on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet_kernels.testing import cases, gpu_check
from alexnet_kernels.testing.exercise import exercise
from alexnet_kernels.testing.timing import Failure, Timing, copy_rate, input_sets, measure

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def case_named(name: str) -> cases.Case:
    return next(case for case in cases.cases() if case.name == name)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    """(exit status, gpu_check.json, gpu_check.md, what was printed) of a short run of everything."""
    out = tmp_path_factory.mktemp("check") / "out"
    command = [sys.executable, "-m", "alexnet_kernels.testing.gpu_check", "--device", "cpu", "--out", str(out)]
    command += ["--minutes", "1.5", "--tests", str(ROOT / "tests")]
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
        first = ops["lrn_max_pool2d, layer 1, bf16"]
        assert first["wrong"] == {}
        for direction in ("forward", "forward and backward"):
            times = first[direction]["times"]
            assert set(times) == {"cpu", "eager"}
            assert all(0 < t["low"] <= t["median"] <= t["high"] for t in times.values())
            ratio = times["eager"]["median"] / times["cpu"]["median"]
            cpu = times["cpu"]["median"] * 1e6
            assert f"| lrn_max_pool2d, layer 1, bf16 | {direction} | {cpu:.1f} | " in text
            assert f" | {ratio:.2f} | " in text
        nets = found["parts"]["nets"]["nets"]["paper, batch 2"]
        assert set(nets) == {"inference", "training step"}
        assert all("median" in t for net in nets.values() for t in net["times"].values())

    def test_says_that_a_cpu_proves_nothing_and_ends_with_the_summary(self, report) -> None:
        _, _, text, printed = report
        assert text.startswith("# GPU check, run on a CPU: its figures say nothing")
        assert printed.rstrip().splitlines()[-1].startswith("passed: ")
        assert text.strip() in printed


class TestCases:
    def test_names_are_unique_and_every_op_is_there(self) -> None:
        names = [case.name for case in cases.cases()]
        assert len(set(names)) == len(names)
        ops = {case.op for case in cases.cases()} | {"sgd_step"}
        assert ops == set(__import__("alexnet_kernels").ops.__all__)

    def test_floor(self) -> None:
        case = case_named("local_response_norm, layer 1, bf16")
        assert case.floor(128, False, 4.3e12, 1e15) == pytest.approx(128 * 96 * 55 * 55 * 4 / 4.3e12)
        conv = case_named("conv2d_relu, conv3, bf16")
        assert conv.floor(128, False, 4.3e12, 790e12) == pytest.approx(128 * 2 * 149_520_384 / 790e12)

    @pytest.mark.parametrize("wrong", ["output", "gradient of input", "shape"])
    def test_a_wrong_variant_is_seen_and_not_timed(self, wrong: str) -> None:
        right = case_named("max_pool2d, layer 5, fp32")

        def call(inputs, backend):
            out = right.call(inputs, backend)
            if backend != "cpu":
                return out
            if wrong == "shape":
                return out[:, 1:]
            return (
                out * 1.01
                if wrong == "output"
                else out + (inputs["input"].sum() * 0.1 - inputs["input"].detach().sum() * 0.1)
            )

        case = dataclasses.replace(right, call=call)
        assert cases.check(right, lambda x: right.call(x, "cpu"), 2, CPU) is None
        result = gpu_check._time_case(case, 2, CPU, 0.1)
        assert result["wrong"]["cpu"].startswith(f"{wrong}: " if wrong != "shape" else "output: shape")
        assert set(result["forward"]["times"]) == {"eager"}
        row = gpu_check._op_row("name", "forward", result, ["cpu"], 1e10, {"fp32": 1.0})
        assert row.startswith("| name | forward | wrong | ")
        section = {"cases": {"name": result}}
        assert gpu_check.Check._wrong(section)
        assert "- WRONG name, cpu: " in "\n".join(gpu_check._ops_lines(section, 1e10, {"fp32": 1.0}))

    def test_exercise_runs_every_op(self) -> None:
        assert set(exercise(CPU, "cpu")) == set(__import__("alexnet_kernels").ops.__all__)


class TestTiming:
    def test_variants(self) -> None:
        def fails() -> None:
            raise ValueError("no such thing\nmore")

        x = torch.zeros(1000)
        results = measure({"a": [lambda: x.add_(1)], "b": [fails], "c": [lambda: x.mul_(2)] * 2}, CPU, rounds=3)
        assert list(results) == ["a", "b", "c"]
        assert results["b"] == Failure("ValueError: no such thing")
        for name in ("a", "c"):
            timing = results[name]
            assert isinstance(timing, Timing)
            assert timing.rounds == 3
            assert not timing.graph
            assert 0 < timing.low <= timing.median <= timing.high < 1

    def test_rates_and_sets(self) -> None:
        assert copy_rate(CPU, 2**20) > 0
        assert input_sets(10, CPU) == 1
        assert input_sets(2**20, torch.device("cuda")) == 6
        assert input_sets(2**30, torch.device("cuda")) == 1


class TestFaults:
    def check(self, tmp_path: Path, **options: Any) -> gpu_check.Check:
        return gpu_check.Check(tmp_path, "cpu", options.get("minutes", 1), options.get("tests"))

    def test_a_crash_in_a_case_costs_that_case_only(self, tmp_path: Path, monkeypatch) -> None:
        commands = []

        def run(self, command, limit, variables=None, cwd=None):
            commands.append(command)
            lines: list[dict] = [{"current": "one"}, {"cases": {"one": {"wrong": {}}}}, {"current": "two"}]
            if len(commands) == 2:
                lines = [{"current": "three"}, {"cases": {"three": {"wrong": {}}}}]
            Path(command[command.index("--result") + 1]).write_text("\n".join(map(json.dumps, lines)) + '\n{"cut off')
            return (-11, "CUDA error: an illegal memory access\n") if len(commands) == 1 else (0, "")

        monkeypatch.setattr(gpu_check.Check, "_run", run)
        check = self.check(tmp_path)
        section: dict[str, Any] = {}
        check._worker("ops", section, 60)
        assert set(section["cases"]) == {"one", "three"}
        assert section["crashed"] == {"two": "ended with status -11: CUDA error: an illegal memory access"}
        assert section["state"] == "failed"
        assert [c for c in commands[1] if c.startswith("--skip")] == ["--skip=two"]

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

    def test_failing_and_endless_tests(self, tmp_path: Path) -> None:
        folder = tmp_path / "tests" / "ops"
        folder.mkdir(parents=True)
        (tmp_path / "tests" / "conftest.py").write_text("")
        (folder / "test_within_map_response_norm.py").write_text(
            "import time\n"
            "def test_definition_cpu_good(): pass\n"
            "def test_definition_cpu_bad(): assert 1 == 2, 'numbers differ'\n"
            "def test_definition_cpu_endless(): time.sleep(600)\n"
        )
        section: dict[str, Any] = {}
        self.check(tmp_path, tests=tmp_path / "tests")._tests("tests", section, 8)
        assert section["state"] == "failed"
        assert (section["passed"], section["failed"], section["collected"]) == (1, 1, 3)
        assert not section["finished"]
        ((name, reason),) = section["failures"].items()
        assert name.endswith("::test_definition_cpu_bad")
        assert "numbers differ" in reason
        assert "Not all were reached" in "\n".join(gpu_check._tests_lines(section))

    def test_no_tests(self, tmp_path: Path) -> None:
        section: dict[str, Any] = {}
        self.check(tmp_path, tests=tmp_path / "nowhere")._tests("tests", section, 8)
        assert section["state"] == "skipped"
        assert "give --tests" in section["error"]

    def test_out_of_time(self) -> None:
        (found,) = gpu_check.time_ops(CPU, gpu_check.Budget(0), set())
        assert len(found["unfinished"]) == sum(case.dtype == torch.bfloat16 for case in cases.cases())

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
