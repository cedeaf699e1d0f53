"""`python -m alexnet_kernels.gpu_check`: a whole run on the CPU, its parts, its report and its options."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import ENVIRONMENT, FILES, ROOT, command, parts_of

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
    programs,
    report,
    runner,
    worker,
)
from alexnet_kernels.gpu_check.exercise import exercise
from alexnet_kernels.gpu_check.findings import Findings
from alexnet_kernels.gpu_check.processes import Ended
from alexnet_kernels.op_info._layers import CONVOLUTIONS

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    """(exit status, report.json, report.md, standard output) of a whole run."""
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
        assert text.startswith("# GPU check on a CPU: its timings mean nothing")
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


def timing(seconds: float) -> dict[str, Any]:
    return {"median": seconds, "low": seconds, "high": seconds, "rounds": 1, "graph": True}


class TestTools:
    """Scripts stand in for programs of the CUDA toolkit."""

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
        monkeypatch.setattr(programs, "PACKAGE", package)
        (tmp_path / "library").write_text("no library")
        (tmp_path / "out").mkdir()
        check = runner.Check(tmp_path / "out", "cpu", 60, library=tmp_path / "library")
        monkeypatch.setattr(programs, "_fits", lambda context: ("failed", "the library: no"))
        assert not check.run(["build"])
        assert (package / "_C.so").read_text() == "no library"
        assert "| build | failed | " in (tmp_path / "out" / "report.md").read_text()

    @pytest.mark.parametrize(
        ("said", "arch"), [("8 0", "8.0"), ("8 9", "8.9"), ("9 0", "9.0a"), ("10 3", "10.3"), ("no GPU", None)]
    )
    def test_it_is_built_for_the_device(self, said: str, arch: str | None, tmp_path: Path, monkeypatch) -> None:
        """For Hopper with the kernels that only run there."""
        built = []

        def run(name: str, command: list[str], limit: float, variables: dict | None = None, *_: object) -> Ended:
            built.extend([variables] if "setup.py" in command else [])
            return Ended(0, (said,))

        monkeypatch.setattr(programs, "_fits", lambda context: ("passed", ""))
        monkeypatch.setattr(programs, "ROOT", tmp_path)
        (tmp_path / "setup.py").touch()
        processes = SimpleNamespace(run=run)
        context = programs.Context(tmp_path, "cuda", tmp_path, None, 1.0, None, 0, processes)
        state, _ = programs.build(context, 60)
        assert state == ("passed" if arch else "failed")
        assert built == ([{"ALEXNET_KERNELS_CUDA": "1", "ALEXNET_KERNELS_ARCHS": arch}] if arch else [])

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
        assert "has findings already: continue with --from or --only" in capsys.readouterr().err

    def test_a_report_can_be_written_again(self, tmp_path: Path, capsys) -> None:
        with pytest.raises(SystemExit):
            __main__.main(["--out", str(tmp_path), "--device", "cpu", "--report"])
        assert "has no findings" in capsys.readouterr().err
        Findings(tmp_path / findings.FILE).add("smoke", item="one", result={"wrong": "all", "error": None})
        assert __main__.main(["--out", str(tmp_path), "--device", "cpu", "--report"]) == 0
        assert "- WRONG one: all" in (tmp_path / "report.md").read_text()

    def test_parts_that_share_a_workers_start(self) -> None:
        order = [["build"], ["environment", "ceilings"], ["paths"], ["smoke"], ["networks", "convolutions", "ops"]]
        assert plan.stages(plan.PARTS) == [*order, ["tests"], ["counters"], ["compiled"], ["sanitizer"]]
        assert sum(plan.SHARES.values()) == pytest.approx(1)
        assert plan.stages(["smoke", "ops", "compiled"]) == [["smoke"], ["ops", "compiled"]]

    def test_the_script_says_how_it_is_used(self) -> None:
        done = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_check.sh")], capture_output=True, text=True)
        assert done.returncode == 2
        assert "usage: " in done.stderr
        words = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
        environment = {**ENVIRONMENT, "PYTHON": "echo"}
        for given, passed in ((["--help"], "--help"), (["x", "--minutes", "2"], "--out x --minutes 2")):
            said = subprocess.run([*words, *given], capture_output=True, text=True, env=environment).stdout
            assert said.endswith(f" -m alexnet_kernels.gpu_check {passed}\n")
