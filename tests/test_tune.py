"""`alexnet-kernels tune`: what it measures, what it chooses, and its table, whoever else writes or damages it."""

from __future__ import annotations

import json
import multiprocessing
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from test_choices import EMULATED, emulated_auto, rearranges, strided

from alexnet_kernels import backends, ops
from alexnet_kernels._dispatch import choices, tuned
from alexnet_kernels._dispatch.kinds import Kind, Row
from alexnet_kernels._errors import RunError
from alexnet_kernels.bench import tuning
from alexnet_kernels.bench.cases import cases
from alexnet_kernels.bench.timing import Failure, Timing
from alexnet_kernels.cli import main
from alexnet_kernels.op_info._record import OVERHEAD

CPU = torch.device("cpu")
GEOMETRY = tuning.Geometry(3, 39, 39, 16, 3, (11, 11), (4, 4), (2, 2), 1)
TUNE = ["tune", "--device", "cpu", "--batch", "6", "--dtype", "bf16", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder, and a network of one small convolution."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "convolutions", lambda preset: {"conv1": GEOMETRY})
    monkeypatch.setattr(tuned, "_warned", set())
    choices.set_tuned(True)
    yield tmp_path / "cache"
    choices.set_tuned(False)


def taking(median: float, noise: float = 0.01) -> Timing:
    return Timing(median, median * (1 - noise), median * (1 + noise), 5, False)


def timer(monkeypatch: pytest.MonkeyPatch, **times: float | str) -> None:
    """Each implementation takes its time, or fails with its reason."""

    def measure(variants: dict[str, Any], device: torch.device, **options: Any) -> dict[str, Timing | Failure]:
        for calls in variants.values():
            for call in calls:
                call()
        found = {name: times[name] for name in variants}
        return {name: Failure(t) if isinstance(t, str) else taking(t) for name, t in found.items()}

    monkeypatch.setattr(tuning, "measure", measure)


def kind(rows: int = 1 << 9, device: str = "cpu") -> Kind:
    return choices.kind_of("conv2d_relu", "forward", device, torch.bfloat16, True, (16, 3, 11, 11, 4, 4, 1, rows, 1))


class TestDecision:
    @pytest.mark.parametrize(
        ("times", "name"),
        [
            ({"library": [1.0], "split": [0.9]}, "split"),
            ({"library": [1.0], "split": [0.98]}, "library"),
            ({"library": [1.0, 1.0], "split": [0.9, 1.0]}, "split"),
            ({"library": [1.0, 1.0], "split": [0.5, 1.1]}, "library"),
            ({"library": [1.0], "split": [0.9], "triton": [0.8]}, "triton"),
            ({"library": [None], "split": [3.0], "triton": [2.0]}, "triton"),
            ({"library": [1.0], "split": [None]}, "library"),
            ({"library": [None]}, "library"),
        ],
    )
    def test_by_medians(self, times: dict[str, list[float | None]], name: str) -> None:
        passes = range(len(times["library"]))
        found: tuning.Times = {
            str(i): {key: Failure("") if value[i] is None else taking(value[i]) for key, value in times.items()}
            for i in passes
        }
        assert tuning.decide(found, "library") == name

    def test_not_within_the_noise(self) -> None:
        assert (
            tuning.decide({"forward": {"library": taking(1.0, 0.1), "split": taking(0.9, 0.1)}}, "library") == "library"
        )


class TestTasks:
    def test_alexnets_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        layers = tuning.convolutions("paper")
        assert [g.output(0) for g in layers.values()] == [55, 27, 13, 13, 13]
        assert [(g.filters, g.of_group, g.groups) for g in layers.values()] == [
            (96, 3, 1), (256, 48, 2), (384, 256, 1), (384, 192, 2), (256, 192, 2)
        ]  # fmt: skip
        assert layers["conv1"].rearranged[:6] == (48, 57, 57, 96, 48, (3, 3))
        labels = [task.label for task in tuning.tasks(CPU, batches=[1, 64])]
        assert len(labels) == 8  # conv1 of two networks, two batches and dtypes
        assert all("conv1" in label for label in labels)

    def test_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(choices, "device_name", lambda device: "9.0")
        monkeypatch.setattr(tuning.backends, "unavailable", lambda op, backend: None)
        tasks = tuning.tasks(torch.device("cuda", 0))
        assert {task.kind.op for task in tasks} == set(ops.__all__) - {"sgd_step"}
        found = {task.label: task.candidates for task in tasks}
        wanted = ("library", "split", "own", "mma", "triton")
        assert found["conv2d_relu forward, paper conv2, bf16, batch 128"] == wanted
        assert found["conv2d_relu forward, paper conv2, without bias and ReLU, bf16, batch 128"] == wanted
        for direction in ("backward_input", "backward_weight"):
            assert found[f"conv2d_relu {direction}, paper conv2, bf16, batch 128"] == wanted
        assert "space_to_depth" in found["conv2d_relu forward, torchvision conv1, bf16, batch 128"]
        assert found["conv2d_relu forward, paper conv1 rearranged, bf16, batch 128"] == (
            "library",
            "own",
            "mma",
            "triton",
        )
        assert found["max_pool2d, layer 1, bf16, batch 128"] == ("cuda", "triton")
        for task in tasks:
            assert choices.committed_choice(task.kind, task.batch) in task.candidates
        assert len({task.kind for task in tasks}) == len(tasks)


class TestTune:
    def test_on_the_cpu(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(TUNE) == 0
        out = capsys.readouterr().out
        assert re.search(r"^conv2d_relu forward, paper conv1, bf16, batch 6: \w+, (kept|in place of \w+); library", out)
        rows = tuned.rows_of(CPU)
        assert [row.kind for row in rows] == [kind()]
        assert set(rows[0].times) == {"library", "space_to_depth"}
        assert all(set(passes) == {"forward", "both"} for passes in rows[0].times.values())
        assert f"wrote {tuned.path_of(CPU)}" in out
        assert tuned.path_of(CPU).parent == cache

    @pytest.mark.parametrize(("library", "faster"), [(1.0, "library"), (3.0, "space_to_depth")])
    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_the_faster_one_runs_from_then_on(self, library, faster, dtype, monkeypatch, capsys) -> None:
        timer(monkeypatch, library=library, space_to_depth=2.0)
        assert main([*TUNE, "--dtype", dtype]) == 0
        committed = "space_to_depth" if dtype == "bf16" else "library"
        assert (f"in place of {committed}" if faster != committed else "kept") in capsys.readouterr().out
        arguments = strided(torch.bfloat16 if dtype == "bf16" else torch.float32)
        assert rearranges(lambda: ops.conv2d_relu(*arguments)) == (faster == "space_to_depth")

    @pytest.mark.parametrize("fault", ["wrong", "raises", "fails when timed"])
    def test_a_bad_candidate_is_named_and_not_chosen(self, fault, monkeypatch, capsys) -> None:
        by = tuning.conv2d_relu_by

        def broken(name: str, *args: Any, **options: Any) -> torch.Tensor:
            if name == "space_to_depth" and fault == "raises":
                raise RuntimeError("no such kernel")
            out = by(name, *args, **options)
            return out * 1.5 if name == "space_to_depth" and fault == "wrong" else out

        monkeypatch.setattr(tuning, "conv2d_relu_by", broken)
        failing: Any = "RuntimeError: it broke" if fault == "fails when timed" else 1.0
        timer(monkeypatch, library=2.0, space_to_depth=failing)
        assert main(TUNE) == 1
        said = {"wrong": "differs from the library's", "raises": "no such kernel", "fails when timed": "it broke"}[
            fault
        ]
        assert said in capsys.readouterr().err
        assert [row.name for row in tuned.rows_of(CPU)] == ["library"]

    def test_as_json(self, monkeypatch, capsys) -> None:
        timer(monkeypatch, library=1.0, space_to_depth=2.0)
        assert main([*TUNE, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["file"] == str(tuned.path_of(CPU))
        assert [(one["committed"], one["name"]) for one in found["outcomes"]] == [("space_to_depth", "library")]

    def test_show_and_reset(self, monkeypatch, capsys) -> None:
        timer(monkeypatch, library=1e-6, space_to_depth=2e-6)
        assert main(TUNE) == 0
        capsys.readouterr()
        assert main(["tune", "--device", "cpu", "--show"]) == 0
        out = capsys.readouterr().out
        assert f"1 rows of {tuned.path_of(CPU)}, then 0 rows of the package" in out
        assert "16 filters of 3 x 11 x 11, stride 4 x 4, 1 groups, about 512 pixels: library (tuned)" in out
        assert "library forward 1.0 and both 1.0 us, space_to_depth forward 2.0 and both 2.0 us" in out
        assert main(["info", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["choices"]["cpu"]["user_rows"] == 1
        path = tuned.path_of(CPU)
        assert main(["tune", "--device", "cpu", "--reset"]) == 0
        assert f"removed {path}" in capsys.readouterr().out
        assert not path.exists()
        assert main(["tune", "--device", "cpu", "--reset"]) == 0
        assert "there is no table" in capsys.readouterr().out
        assert main(["tune", "--device", "cpu", "--show", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rows"] == []

    def test_show_of_an_h100(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(choices, "device_name", lambda device: "9.0")
        assert main(["tune", "--device", "cpu", "--show"]) == 0
        out = capsys.readouterr().out
        assert out.count("(measured)") == len(choices.COMMITTED)
        assert "128 filters of 48 x 5 x 5, stride 1 x 1, 2 groups, about 131,072 pixels: triton (measured)" in out
        assert "library 279.7 us, triton 138.0 us; NVIDIA H100" in out
        assert "(heuristic)" in out

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--op", "conv"], "--op conv: on cpu there is a choice for conv2d_relu only"),
            (["--show", "--reset"], "one at a time"),
            (["--device", "tpu"], "--device must be"),
        ],
    )
    def test_mistakes(self, options, said, capsys) -> None:
        assert main([*TUNE, *options]) == 2
        assert said in capsys.readouterr().err


def write_some(first: int) -> None:
    for i in range(first, first + 8):
        tuned.merge(CPU, [Row(kind(1 << i), "library", "tuned", {}, str(i))])


def changed(**changes: Any) -> str:
    content = json.loads(tuned.path_of(CPU).read_text())
    content["rows"][0] |= changes
    return json.dumps(content)


DAMAGES: dict[str, Any] = {
    "empty": lambda: "",
    "cut": lambda: tuned.path_of(CPU).read_text()[:-40],
    "not UTF-8": lambda: b"\xff\xfe",
    "a number": lambda: "3",
    "deep": lambda: "[" * 100_000,
    "huge": lambda: " " * (5 << 20),
    "another format": lambda: '{"format": 2}',
    "of another device": lambda: tuned.path_of(CPU).read_text().replace('"torch": "', '"torch": "0'),
    "rows of no list": lambda: re.sub(r"\[.*\]", "{}", tuned.path_of(CPU).read_text(), flags=re.DOTALL),
    "unknown op": lambda: changed(op="eval"),
    "an op of no table": lambda: changed(op=["conv2d_relu"]),
    "unknown name": lambda: changed(name="__import__"),
    "a name of another device": lambda: changed(name="wgmma"),
    "unknown direction": lambda: changed(direction="sideways"),
    "unknown dtype": lambda: changed(dtype="int8"),
    "a shape of text": lambda: changed(shape=dict.fromkeys(kind().sizes, "1")),
    "a huge shape": lambda: changed(shape=dict.fromkeys(kind().sizes, 1 << 100)),
    "a shape of others": lambda: changed(shape={"elements": 3}),
    "times of text": lambda: changed(times={"library": {"forward": "fast"}}),
    "infinite times": lambda: changed(times={"library": {"forward": float("inf")}}),
}


@EMULATED
class TestOnAGpu:
    """With the emulation for CUDA, Triton's interpreter, and times that are made up."""

    @pytest.mark.parametrize("direction", ["forward", "backward_input", "backward_weight"])
    def test_convolutions(self, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
        timer(monkeypatch, library=4.0, split=3.0, triton=2.0, own=1.0, mma=0.5)
        geometry = tuning.Geometry(16, 7, 6, 32, 8, (3, 3), (1, 1), (1, 1), 2)
        names = ("library", "split", "own", "mma", "triton")
        task = tuning.ConvolutionTask("conv", geometry, torch.bfloat16, 2, direction, True, "9.0", names)
        backends.select("conv2d_relu", torch.ones(1), "triton")
        with emulated_auto():
            outcome = tuning.tune(task, CPU, 0.0)
        assert outcome.wrong == {}
        assert (outcome.committed, outcome.name) == ("library", "mma")
        assert set(outcome.row.times) == set(names)

    def test_another_op(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timer(monkeypatch, cuda=2.0, triton=1.0)
        case = next(case for case in cases() if case.op == "max_pool2d" and case.layer == OVERHEAD)
        with emulated_auto():
            outcome = tuning.tune(tuning.OpTask(case, 2, "9.0", ("cuda", "triton")), CPU, 0.0)
        assert outcome.wrong == {}
        assert (outcome.committed, outcome.name) == ("cuda", "triton")
        assert set(outcome.times) == {"forward", "both"}


class TestTable:
    def test_writers_at_the_same_time_lose_nothing(self) -> None:
        fork = multiprocessing.get_context("fork")
        writers = [fork.Process(target=write_some, args=(first,)) for first in (1, 9, 17)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        assert sorted(int(row.note) for row in tuned.rows_of(CPU)) == list(range(1, 25))
        assert [path.name for path in tuned.folder().iterdir()] == [tuned.path_of(CPU).name]

    def test_a_row_replaces_the_one_of_its_kind(self) -> None:
        for name in ("library", "space_to_depth"):
            tuned.merge(CPU, [Row(kind(), name, "tuned")])
        assert [row.name for row in tuned.rows_of(CPU)] == ["space_to_depth"]

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_file_is_ignored_with_one_warning(self, damage: str) -> None:
        path = tuned.merge(CPU, [Row(kind(), "library", "tuned")])
        content = DAMAGES[damage]()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        choices.forget()
        with pytest.warns(RuntimeWarning, match=f"{re.escape(str(path))} is ignored: ") as caught:
            assert rearranges(lambda: ops.conv2d_relu(*strided(torch.bfloat16)))
        assert len([one for one in caught if one.category is RuntimeWarning]) == 1
        choices.forget()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuned.rows_of(CPU) == ()
            tuned.merge(CPU, [Row(kind(), "library", "tuned")])
            assert len(tuned.rows_of(CPU)) == 1

    def test_another_version_has_its_own(self, monkeypatch) -> None:
        before = tuned.merge(CPU, [Row(kind(), "library", "tuned")])
        for module, name in ((tuned, "__version__"), (torch, "__version__"), (tuned._library, "SOURCES")):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, "another")
                choices.forget()
                assert tuned.path_of(CPU) != before
                assert tuned.rows_of(CPU) == ()
        choices.forget()
        assert len(tuned.rows_of(CPU)) == 1

    def test_a_folder_that_cannot_be_written(self, cache: Path, capsys, monkeypatch) -> None:
        cache.write_text("a file")
        timer(monkeypatch, library=1.0, space_to_depth=2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuned.rows_of(CPU) == ()
        assert main(TUNE) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"alexnet-kernels: error: .*{tuned.VARIABLE} names another folder\n", captured.err)

    def test_no_home(self, monkeypatch, capsys) -> None:
        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv(tuned.VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", home)
        choices.forget()
        assert tuned.rows_of(CPU) == ()
        with pytest.raises(RunError, match="there is no folder for the table"):
            tuned.merge(CPU, [])
        assert main(["tune", "--device", "cpu", "--show"]) == 0
        assert main(["info"]) == 0

    def test_where_it_is(self, monkeypatch) -> None:
        monkeypatch.delenv(tuned.VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert tuned.folder() == Path("/somewhere/alexnet_kernels")
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert tuned.folder() == Path.home() / ".cache" / "alexnet_kernels"
