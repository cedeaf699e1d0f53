"""`alexnet-kernels bench`: rows, protocol, tables, comparison and plots; and `pytest benchmarks/`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import benchmark
from torch import nn

import alexnet_kernels
from alexnet_kernels import AlexNet, _library, backends
from alexnet_kernels.bench import baselines, cases, op_row, optimizer_row, roofline, rows, tables, timing
from alexnet_kernels.bench import report as bench_report
from alexnet_kernels.bench.lpips_row import KEPT, PAIRS, LpipsRow
from alexnet_kernels.bench.machine import cache_bytes
from alexnet_kernels.bench.network_row import NetRow
from alexnet_kernels.bench.op_row import OpRow
from alexnet_kernels.bench.optimizer_row import SgdRow
from alexnet_kernels.bench.roofline import Ceilings
from alexnet_kernels.bench.row import FUSED, ONE_GRAPH, PURPOSES, WITHOUT_MASTERS, Row, is_ours
from alexnet_kernels.bench.suite import Problem
from alexnet_kernels.bench.suite_row import SuiteRow, suite_rows
from alexnet_kernels.bench.timing import DeviceLost, Failure, Timing, copy_rate, input_sets, measure
from alexnet_kernels.cli import main
from alexnet_kernels.models import PRESETS, count_macs
from alexnet_kernels.nn import runs
from alexnet_kernels.op_info import OP_INFOS, Baseline
from alexnet_kernels.op_info._record import OVERHEAD

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def case_named(name: str) -> cases.Case:
    return next(case for case in cases.cases() if case.name == name)


def timed(row: Row, **options: Any) -> dict[str, Any]:
    return row.time(CPU, seconds=0.02, rounds=2, **options).to_json()


class TestCases:
    def test_names_are_unique_and_every_op_is_there(self) -> None:
        names = [case.name for case in cases.cases()]
        assert len(set(names)) == len(names)
        assert not any("NCHW" in name for name in names if name.startswith(("augment", "dropout", "linear")))
        ops = {case.op for case in cases.cases()} | {"sgd_step"}
        assert ops == set(alexnet_kernels.ops.__all__)

    def test_every_op_has_its_dtypes_formats_and_overhead(self) -> None:
        for op in set(alexnet_kernels.ops.__all__) - {"sgd_step"}:
            mine = [case for case in cases.cases() if case.op == op]
            assert {torch.float32, torch.bfloat16} <= {case.dtype for case in mine}
            assert [case.layer for case in mine].count(OVERHEAD) == 1
            if op not in ("linear_relu_dropout", "dropout", "augment"):
                assert {(case.dtype, case.channels_last) for case in mine} >= {
                    (dtype, last) for dtype in (torch.float32, torch.bfloat16) for last in (True, False)
                }

    def test_work(self) -> None:
        case = case_named("local_response_norm, layer 1, bf16")
        assert case.work.seconds(128, False, 4.3e12, 1e15) == pytest.approx(128 * 96 * 55 * 55 * 4 / 4.3e12)
        conv = case_named("conv2d_relu, conv3, bf16")
        assert conv.work.seconds(128, False, 4.3e12, 790e12) == pytest.approx(128 * 2 * 149_520_384 / 790e12)

    def test_peers_compute_the_definition(self) -> None:
        for name in ("lrn_max_pool2d, layer 2, fp32", "local_response_norm, layer 2, fp32"):
            case = case_named(name)
            (baseline,) = case.baselines.values()
            assert cases.Expectation(case, 1, CPU).problem(baseline.call) is None

    def test_convolutions_a_group(self) -> None:
        name = "a convolution a group"
        split = [case for case in cases.cases() if name in case.baselines]
        assert {case.layer for case in split} == {"conv2", "conv4", "conv5"}
        case = case_named("conv2d_relu, conv5, fp32")
        assert cases.Expectation(case, 1, CPU).problem(case.baselines[name].call) is None

    @pytest.mark.parametrize(
        ("capability", "archs", "wgmma"),
        [((9, 0), ["9.0a"], True), ((9, 0), ["8.0"], False), ((10, 0), ["9.0a"], False)],
    )
    def test_paths_of_a_convolution(self, monkeypatch, capability, archs, wgmma: bool) -> None:
        case, device = case_named("conv2d_relu, conv3, bf16"), torch.device("cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(_library, "status", lambda: {"wgmma": "9.0a" in archs})
        monkeypatch.setattr(backends, "unavailable", lambda op, backend: None)
        assert set(case.paths(device)) == {"cuda, cuDNN", "cuda, mma.sync"} | ({"cuda, wgmma"} if wgmma else set())
        assert set(case_named("conv2d_relu, conv3, fp32").paths(device)) == {"cuda, cuDNN", "cuda, mma.sync"}
        assert set(case_named("conv2d_relu, conv3, bf16, NCHW").paths(device)) == {"cuda, cuDNN"}
        assert case.paths(CPU) == {}
        assert all(is_ours(name) for name in case.paths(device))

    def test_a_row_times_every_path(self, monkeypatch) -> None:
        case = case_named("conv2d_relu, overhead, fp32")
        found = {"cuda, one": Baseline(lambda x: case.call(x, "cpu")), "cuda, two": Baseline(lambda x: x["input"])}
        monkeypatch.setattr(cases.Case, "paths", lambda self, device: found)
        result = op_row.OpRow(case, 1).time(CPU, seconds=0.01, rounds=1, skip={"conv2d_relu by eager"})
        assert set(result.directions) == {"forward", "forward and backward"}
        for measured in result.directions.values():
            assert set(measured.times) == {"cpu", "cuda, one"}
        assert list(result.wrong) == ["cuda, two"]


def test_graphs_of_their_own_are_variants_on_a_gpu_only() -> None:
    cuda = torch.device("cuda")
    for purpose in PURPOSES:
        row = NetRow("paper", 2, purpose)
        names = {name for name in row._known(cuda) if name.endswith(ONE_GRAPH)}
        assert names == {"auto, one graph", "auto, pure bf16, one graph"}
        assert all(map(is_ours, names))
        assert not any(name.endswith(ONE_GRAPH) for name in row._known(CPU))


class TestRoofline:
    RATES = Ceilings(4.3e12, {"bf16": 790e12})

    def floors(self, preset: str = "paper") -> list[tuple[str, float, float, bool]]:
        return benchmark("roofline").floors(preset, 128, "bf16", self.RATES)

    def test_the_papers_network_on_an_h200(self) -> None:
        """Microseconds computed by hand for this network at these rates."""
        found = {layer: (forward * 1e6, both * 1e6) for layer, forward, both, _ in self.floors()}
        by_hand = {"conv1": (34, 68), "conv2": (73, 219), "norm1, pool1": (23.5, 64.5), "norm2, pool2": (15, 41)}
        by_hand |= {"conv3": (48.5, 145.5), "conv4": (36, 108), "conv5": (24, 72), "pool5": (3.4, 6.8)}
        by_hand |= {"fc6": (18.4, 55), "fc7": (8.3, 25), "fc8": (2.2, 6.6)}
        for layer, (forward, both) in by_hand.items():
            assert found[layer] == (pytest.approx(forward, rel=0.06), pytest.approx(both, rel=0.06)), layer
        assert found["SGD"][1] == pytest.approx(284, rel=0.01)
        assert sum(both for _, both in found.values()) == pytest.approx(1097, rel=0.01)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_operations_are_those_of_the_network(self, preset: str) -> None:
        works = roofline.network(preset, torch.float32)
        assert sum(work.done(1, False) for work in works.values()) == 2 * count_macs(
            AlexNet(preset=preset, device="meta")
        )
        assert roofline.parameters(preset) == sum(p.numel() for p in AlexNet(preset=preset, device="meta").parameters())
        assert {f"conv{i}" for i in range(1, 6)} | {"fc6", "fc7", "fc8"} <= set(works)

    def test_prints_the_table(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["roofline.py", "--copy", "4300", "--gemm", "790"])
        benchmark("roofline").main()
        out = capsys.readouterr().out
        assert "| conv1 | 34" in out
        assert "| inference, training step | 287 us | 1.1 ms | |" in out

    def test_float32_convolutions_on_a_gpu_take_tf32(self) -> None:
        assert Ceilings(1.0, {"fp32": 2.0, "tf32": 3.0}).product("fp32") == 3.0
        assert Ceilings(1.0, {"fp32": 2.0, "bf16": 5.0}).product("fp16") == 5.0


class TestOps:
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
        assert cases.Expectation(right, 2, CPU).problem(lambda x: right.call(x, "cpu")) is None
        result = timed(OpRow(case, 2))
        assert result["wrong"]["cpu"].startswith(f"{wrong}: " if wrong != "shape" else "output: shape")
        assert set(result["forward"]["times"]) == {"eager"}
        lines = tables.table({"name": result}, None, False)
        assert lines[2].startswith("| name | forward | wrong | ")
        assert any(line.startswith("- WRONG name, cpu: ") for line in lines)
        assert tables.problems({"name": result})

    def test_a_variant_that_cannot_run_is_reported_and_the_others_are_timed(self) -> None:
        right = case_named("max_pool2d, layer 5, fp32")

        def call(inputs, backend):
            if backend == "cpu":
                raise RuntimeError("no kernel image\nmore")
            return right.call(inputs, backend)

        result = timed(OpRow(dataclasses.replace(right, call=call), 2))
        assert result["errors"] == {"cpu": "RuntimeError: no kernel image"}
        assert set(result["forward"]["times"]) == {"eager"}
        assert tables.problems({"name": result}) == ["name, cpu: RuntimeError: no kernel image"]
        assert "- ERROR name, cpu: RuntimeError: no kernel image" in tables.table({"name": result}, None, False)

    def test_what_lost_the_device_is_left_out(self) -> None:
        row = OpRow(case_named("max_pool2d, layer 5, fp32"), 2)
        result = timed(row, skip={f"{row.name} by cpu"})
        assert set(result["forward"]["times"]) == {"eager"}

    def test_says_what_fits_in_the_cache(self) -> None:
        small = timed(OpRow(case_named("dropout, 96x55x55, fp32"), 1))
        assert small["forward"]["bytes"] == 2 * 4 * 96 * 55 * 55
        assert small["forward"]["cached"] == (cache_bytes(CPU) > 6 * 2 * 4 * 96 * 55 * 55)

    def test_compiled_is_compiled_in_every_case(self, fresh_dynamo: None) -> None:
        graphs = []

        def compiler(graph, inputs):
            graphs.append(graph)
            return graph.forward

        x = torch.rand(2, 3)
        for i in range(12):  # exceeds dynamo's recompilation limit
            baseline = op_row.compiled(Baseline(lambda inputs, i=i: inputs["input"] * i), backend=compiler)
            assert torch.equal(baseline.call({"input": x}), x * i)
            assert len(graphs) == i + 1

    def test_a_wrong_optimizer_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = optimizer_row.optim.SGD
        monkeypatch.setattr(optimizer_row.optim, "SGD", lambda *args, lr, **kwargs: right(*args, lr=1.1 * lr, **kwargs))
        result = timed(SgdRow(small=True))
        assert result["wrong"]["cpu"].startswith("parameter: ")
        assert set(result["step"]["times"]) == {"torch fused", "torch foreach"}


class TestNets:
    def row(self, **options: Any) -> NetRow:
        return NetRow(**{"preset": "paper", "batch": 2, "purpose": "inference", "dtype": torch.float32} | options)

    def test_stock_network_equals_ours(self) -> None:
        model = AlexNet(preset="paper", width=0.1).eval()
        for module in model.modules():
            if isinstance(module, alexnet_kernels.nn.Dropout):
                module.scale_at = "training"
        stock = baselines.stock(model)
        assert not any(type(module).__module__.startswith("alexnet") for module in stock.modules())
        x = torch.randn(2, 3, 71, 71)
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("preset", ["paper", "caffenet", "batchnorm"])
    def test_the_hardened_network_equals_the_stock_one(self, preset: str) -> None:
        model = AlexNet(preset=preset, width=0.05).eval()
        x = torch.randn(2, 3, 99, 99)
        results = []
        for network in (baselines.stock(model), baselines.hardened(model)):
            out = network(x)
            gradients = torch.autograd.grad(out.square().sum(), list(network.parameters()))
            results.append([out, *gradients])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.abs().max().item())
        assert any(isinstance(module, baselines.NativePool) for module in network.modules())

    @pytest.mark.parametrize("preset", ["paper", "caffe", "caffenet", "torchvision", "batchnorm"])
    def test_the_onnx_network_equals_ours(self, preset: str) -> None:
        onnx = pytest.importorskip("onnx")
        reference = pytest.importorskip("onnx.reference")
        model = self.row(preset=preset, width=0.03).model(CPU).eval()
        # ONNX's reference evaluator of LRN handles only as many channels as there are images.
        images = max(layer.out_channels for layer in list(model.features)[:5] if isinstance(layer, torch.nn.Conv2d))
        graph = baselines.to_onnx(model, images, model.input_size)
        onnx.checker.check_model(graph, full_check=True)
        x = torch.randn(images, 3, model.input_size, model.input_size)
        (logits,) = reference.ReferenceEvaluator(graph).run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-3, atol=1e-4)

    def test_onnx_refuses_what_it_has_no_operator_for(self) -> None:
        pytest.importorskip("onnx")
        with pytest.raises(ValueError, match="ZeroPad2d"):
            baselines.to_onnx(AlexNet(preset="as_run", width=0.05), 1, 224)
        with pytest.raises(ValueError, match=r"adaptive pooling of \(2, 2\)"):
            baselines.to_onnx(AlexNet(width=0.05), 1, 99)

    @pytest.mark.parametrize("purpose", PURPOSES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_variants_are_timed(self, purpose: str, dtype: torch.dtype) -> None:
        row = self.row(purpose=purpose, dtype=dtype, width=0.05, size=99)
        result = timed(row)
        assert result["wrong"] == {}
        assert "auto" in result[purpose]["times"]
        assert ("auto, pure bf16" in result[purpose]["times"]) == (dtype == torch.bfloat16)
        alike = purpose == "training step" and "eager, pure bf16" in result[purpose]["times"]
        assert (WITHOUT_MASTERS in result[purpose]["times"]) == alike
        assert set(result["errors"]) <= {"onnxruntime", "eager, pure bf16"}
        assert result[purpose]["operations"] > 0
        assert result[purpose]["bytes"] == pytest.approx(sum(nbytes for nbytes, _ in result[purpose]["layers"]))

    @pytest.mark.parametrize("purpose", PURPOSES)
    def test_a_wrong_network_is_not_timed(self, purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = runs.conv2d_relu
        monkeypatch.setattr(
            runs,
            "conv2d_relu",
            lambda x, weight, *args, **options: right(x, 1.02 * weight, *args, **options),
        )
        result = timed(self.row(purpose=purpose, width=0.05, size=99))
        assert re.match("logits: off by|gradient of parameter 0: off by", result["wrong"]["auto"])
        assert set(result[purpose]["times"]) == {"eager"}

    def test_a_compiled_step_is_judged_by_its_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        factor = 1.0
        # Stands in for a torch.compile that computes wrong values.
        monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: factor * model(x))
        row = self.row(purpose="training step", width=0.05, size=99, compile=("compiled",))
        assert timed(row)["wrong"] == {}
        factor = 3.0
        assert timed(row)["wrong"]["compiled"].startswith("loss ")


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
            assert timing.rounds == len(timing.samples) == 3
            assert not timing.graph
            assert 0 < timing.low <= timing.median <= timing.high < 1
            assert set(timing.to_json()) == {"median", "low", "high", "rounds", "graph"}

    def test_rounds_take_turns(self) -> None:
        order: list[str] = []
        measure({name: [lambda name=name: order.append(name)] for name in "ab"}, CPU, rounds=3)
        turns = re.sub(r"(.)\1*", r"\1", "".join(order))
        assert turns == "abababab"  # warm up, then three rounds

    def test_a_lost_device_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(timing, "works", lambda device: False)
        with pytest.raises(DeviceLost, match="b: RuntimeError: CUDA error: an illegal memory access") as lost:
            measure({"a": [lambda: None], "b": [fails]}, CPU)
        assert lost.value.variant == "b"

    def test_a_variant_that_fails_late_has_no_time(self) -> None:
        calls = []

        def fails_late() -> None:
            calls.append(1)
            if len(calls) > 200:
                raise ValueError("late")

        results = measure({"a": [fails_late], "b": [lambda: None]}, CPU, rounds=5)
        assert results["a"] == Failure("ValueError: late")
        assert isinstance(results["b"], Timing)

    def test_rates_and_sets(self) -> None:
        assert copy_rate(CPU, 2**20) > 0
        cache = cache_bytes(CPU)
        assert cache >= 2**20
        assert input_sets(10, CPU) == timing.MOST_SETS
        assert input_sets(cache, CPU) == 2
        assert input_sets(4 * cache, CPU) == 1


def report_of(**medians: float) -> dict[str, Any]:
    """A report of one op with these medians by variant, in seconds."""
    times = {
        name: {"median": m, "low": 0.99 * m, "high": 1.01 * m, "rounds": 9, "graph": False}
        for name, m in medians.items()
    }
    result = {"op": "o", "layer": "l", "dtype": "fp32", "batch": 2, "wrong": {}, "errors": {}, "missing": {}}
    result["forward"] = {"bytes": 1e6, "operations": 0, "cached": False, "times": times}
    return {"format": bench_report.FORMAT, "machine": {"device": "d"}, "ops": {"o, l": result}, "nets": {}}


class TestTables:
    def test_ratio_floor_and_rate(self) -> None:
        report = report_of(cpu=2e-4, eager=5e-4, compiled=3e-4)
        line = tables.table(report["ops"], Ceilings(1e10, {"fp32": 1e12}), False)[2]
        assert line == "| o, l | forward | 200 us ±1% | 300 us ±1% (compiled) | 1.50 | 5 GB/s | 50 |"

    def test_peers_failures_are_told_once_and_are_no_problem(self) -> None:
        one = report_of(cpu=2e-4)["ops"]["o, l"] | {"errors": {"eager": "no"}}
        lines = tables.table({"a": one, "b": one}, None, False)
        assert lines[-2] == "- ERROR a and 1 more, eager: no"
        assert tables.problems({"a": one}) == []

    @pytest.mark.parametrize(
        ("cpu", "eager", "slower"), [(1.2, 1.0, True), (1.2, 1.2, False), (1.05, 1.0, False), (0.5, 1.0, False)]
    )
    def test_compare(self, cpu: float, eager: float, slower: bool) -> None:
        before, after = report_of(cpu=1.0, eager=1.0), report_of(cpu=cpu, eager=eager)
        lines, found = tables.compare(before, after)
        assert found == (["o, l, forward, cpu"] if slower else [])
        assert ("| slower |" in lines[-1]) == slower
        assert ("| faster |" in lines[-1]) == (cpu == 0.5)

    def test_compare_commands(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        paths = [tmp_path / "a.json", tmp_path / "b.json"]
        for path, cpu in zip(paths, (1.0, 1.5), strict=True):
            path.write_text(json.dumps(report_of(cpu=cpu, eager=2.0)))
        assert main(["bench", "--compare", *map(str, paths)]) == 1
        assert "+50%" in capsys.readouterr().out
        assert main(["bench", "--compare", *map(str, reversed(paths))]) == 0
        assert main(["bench", "--compare", *map(str, paths), "--threshold", "0.6"]) == 0
        paths[0].write_text("{}")
        assert main(["bench", "--compare", *map(str, paths)]) == 2
        assert "not a report of `bench`" in capsys.readouterr().err
        assert main(["bench", "--compare", str(tmp_path / "none.json"), str(paths[1])]) == 2
        assert "No such file" in capsys.readouterr().err


class TestSuite:
    def test_a_problem_is_checked_and_timed(self) -> None:
        problem = Problem("small", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (256, 3, 9, 9), 2)
        (row,) = suite_rows([problem], CPU)
        assert row.name == "small, fp32, batch 2, inference"
        assert suite_rows([problem], torch.device("cuda"))[0].batch == 256
        row = dataclasses.replace(row, compile=())
        result = timed(row)
        assert result["wrong"] == result["errors"] == {}
        assert result["tolerances"] == {FUSED: 1e-4, "eager": 1e-4}
        assert set(result["inference"]["times"]) == {FUSED, "eager"}
        assert is_ours(FUSED)

    def test_a_wrong_variant_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = SuiteRow._variant
        errors = {FUSED: 0.5, "eager": 5e-3}
        monkeypatch.setattr(
            SuiteRow, "_variant", lambda self, name, model: lambda x: made(self, "eager", model)(x) + errors[name]
        )
        problem = Problem("small", lambda: nn.ReLU(), (2, 3, 9, 9), 2)
        result = timed(SuiteRow(problem, 2, compile=()))
        assert result["wrong"] == {FUSED: "it differs from eager by more than atol = rtol = 0.01"}
        assert result["tolerances"] == {"eager": 0.01}


class TestLpips:
    @pytest.mark.parametrize("kind", ["", KEPT, PAIRS])
    def test_a_row_is_checked_and_timed(self, kind: str) -> None:
        row = LpipsRow(2, 32, kind=kind)
        result = timed(row)
        assert result["wrong"] == result["errors"] == {}
        for direction in row.directions:
            assert list(result[direction]["times"]) == row.variants(CPU)
        assert is_ours("LPIPS")
        assert is_ours("fused lpips")
        assert not is_ours("lpips")


class TestRows:
    @pytest.mark.parametrize("kind", ["cpu", "cuda"])
    def test_the_whole_matrix(self, kind: str) -> None:
        found = rows.rows(torch.device(kind))
        names = [row.name for row in found]
        assert len(set(names)) == len(names)
        nets = [row for row in found if isinstance(row, NetRow)]
        assert {row.preset for row in nets} == set(PRESETS)
        assert {row.batch for row in nets} == set(rows.BATCHES[kind])
        assert {(row.dtype, row.channels_last, row.purpose) for row in nets if row.preset == "torchvision"} == {
            (dtype, last, purpose)
            for dtype in (torch.float32, torch.bfloat16)
            for last in (True, False)
            for purpose in PURPOSES
        }
        compiled = {name for row in found if not isinstance(row, SgdRow) for name in row.compile}
        assert compiled == {"compiled", "compiled, max-autotune", "hardened"}

    def test_the_smoke_has_every_op_preset_and_kind_of_peer(self) -> None:
        found = rows.rows(CPU, smoke=True)
        assert {row.case.op for row in found if isinstance(row, OpRow)} | {"sgd_step"} == set(
            alexnet_kernels.ops.__all__
        )
        assert {row.preset for row in found if isinstance(row, NetRow)} == set(PRESETS)
        whole = {variant for row in rows.rows(CPU) for variant in row.variants(CPU)}
        assert {variant for row in found for variant in row.variants(CPU)} == whole


class TestCommand:
    def test_writes_a_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "new" / "report"
        only = "^(max_pool2d, layer 5, bf16|linear_relu_dropout, fc7, fp32|dropout, overhead|paper, bf16.*inference)"
        assert main(["bench", "--smoke", "--only", only, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        report = bench_report.load(out.with_suffix(".json"))
        assert bench_report.failed(report) == []
        assert "max_pool2d, layer 5, bf16, batch 2" in report["ops"]
        assert "paper, bf16, batch 2, inference" in report["nets"]
        assert report["machine"]["torch"] == torch.__version__
        assert report["ceilings"]["copy"] > 0
        text = out.with_suffix(".md").read_text()
        assert f"- device: {report['machine']['device']}" in text
        for name, direction, _, measured in tables.measurements({**report["ops"], **report["nets"]}):
            if ratio := tables.ratio(measured):
                assert f" | {ratio:.2f} | " in text
                assert f"{tables.full_name(name, direction)}: " in printed
        assert main(["bench", "--compare", *[str(out.with_suffix(".json"))] * 2]) == 0
        pictures = {path.name for path in out.parent.iterdir()} - {"report.json", "report.md"}
        assert pictures == {"report_ratios.png", "report_roofline.png"}

    def test_throughput_against_batch_is_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        report = bench_report.new_report(CPU)
        for batch in (1, 2):
            row = NetRow("paper", batch, "inference", torch.float32, width=0.05, size=99)
            report["nets"][row.name] = timed(row)
        assert [path.name for path in bench_report.pictures(report, tmp_path / "r")] == [
            "r_ratios.png",
            "r_throughput.png",
        ]

    def test_a_wrong_op_fails_the_command(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = OP_INFOS["max_pool2d"]

        def wrong(input: torch.Tensor, backend: str) -> torch.Tensor:
            return right.op(input, backend=backend) * (1.1 if backend == "cpu" else 1)

        monkeypatch.setitem(OP_INFOS, "max_pool2d", dataclasses.replace(right, op=wrong))
        assert main(["bench", "--smoke", "--only", "^max_pool2d, overhead"]) == 1
        output = capsys.readouterr()
        assert "max_pool2d, overhead, fp32, batch 1, cpu: output: " in output.err
        assert "ratio" not in output.out

    def test_a_lost_device_ends_the_run_with_a_report(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        def lost(self, device, **options):
            raise DeviceLost("cuda", "RuntimeError: CUDA error")

        monkeypatch.setattr(OpRow, "time", lost)
        chosen = rows.select(rows.rows(CPU, smoke=True), "overhead")
        report = bench_report.run(CPU, chosen, small=True, out=tmp_path / "r", say=lambda line: None)
        assert list(report["lost"]) == [f"{chosen[0].name} by cuda"]
        assert bench_report.failed(report)
        assert "- LOST the device: " in (tmp_path / "r.md").read_text()

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", "ops", "--list", "--only", "conv1, bf16, batch"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "conv2d_relu, conv1, bf16, batch 1: cpu, eager",
            "conv2d_relu, conv1, bf16, batch 32: cpu, eager, compiled, compiled, max-autotune",
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["opps"], "'opps' is not one of ops, nets"),
            (["--only", "nothing at all"], "finds no row"),
            (["--only", "("], "is not a regular expression"),
            (["--batches", "0"], "--batches: numbers of at least 1 expected"),
            (["--smoke", "--out", "/dev/null/x/y"], "--out /dev/null/x/y: "),
        ],
    )
    def test_mistakes(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err


class TestPytest:
    """`pytest benchmarks/`."""

    def run(self, tmp_path: Path, *arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-p", "no:cacheprovider", *arguments]
        package = Path(cases.__file__).parents[2]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env["PYTHONPATH"] = str(package)
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        return done.returncode, done.stdout + done.stderr

    def test_hands_the_rounds_to_pytest_benchmark(self, tmp_path: Path) -> None:
        found = tmp_path / "found.json"
        status, text = self.run(tmp_path, "--smoke", "-k", "local_response_norm-overhead", f"--benchmark-json={found}")
        assert status == 0, text
        assert "6 passed" in text
        measured = json.loads(found.read_text())["benchmarks"]
        name = "local_response_norm, overhead, fp32, batch 1"
        groups = [f"{name}, {direction}" for direction in ("forward", "forward and backward")]
        assert sorted(entry["group"] for entry in measured) == sorted(3 * groups)
        for entry in measured:
            assert entry["stats"]["rounds"] == 1
            assert 1e-7 < entry["stats"]["median"] < 1

    def test_refuses_to_measure_in_parallel(self, tmp_path: Path) -> None:
        pytest.importorskip("xdist")
        status, text = self.run(tmp_path, "--smoke", "-n", "2")
        assert status != 0
        assert "leave -n out" in text
