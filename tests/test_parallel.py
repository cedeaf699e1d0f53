"""AlexNet on 2 and 4 processes over gloo against the same network on one device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import parallel_ranks
import pytest
import torch
from helpers import benchmark
from safetensors.torch import load_file

from alexnet_kernels import AlexNet, parallel
from alexnet_kernels.optim import SGD

NAMES = ["-".join(case) for case in parallel_ranks.CASES]
# Ten steps let float32's rounding grow.
TOLERANCE = {"float64": 1e-12, "float32": 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    """The results of 2 processes, and then of 4."""
    parallel_ranks.save_one(folder / "one")
    result = {}
    for world in (2, 4):
        torch.multiprocessing.spawn(parallel_ranks.run, (world, str(folder)), world)
        result[world] = json.loads((folder / f"{world}.json").read_text())
    return result


@pytest.fixture(params=[(world, name) for world in (2, 4) for name in NAMES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest, found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The results for one network, plan and dtype."""
    world, name = request.param
    if name not in found[world]["cases"]:
        pytest.skip("float32 is run on two ranks")
    *_, parameters, dtype = name.split("-")
    return {**found[world]["cases"][name], "parameters": parameters, "dtype": dtype}


@pytest.mark.slow
def test_ranks_compute_what_one_device_computes(case):
    for what in ("forward", "gradient", "weight"):
        assert case[what] < TOLERANCE[case["dtype"]], what
    assert case["masks"]


@pytest.mark.slow
def test_bytes_sent_are_those_of_the_arithmetic(case):
    sent = {key: count for key, count in case["traffic"].items() if count}
    if case["parameters"] == "sharded" and "gradients" in sent:
        # Shards are padded to the same size.
        assert sent.pop("gradients") == pytest.approx(case["arithmetic"].pop("gradients"), rel=0.01)
    assert sent == case["arithmetic"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("plan", "plan must be one of towers, hybrid, data, not 'rows'"),
        ("one tower", "preset 'torchvision' has 1 tower, the mesh 2; plans 'hybrid' and 'data' can split it"),
        ("batch norm", "batch normalisation's statistics"),
        ("presets", "ranks 0 and 1 have different networks"),
        ("seeds", "ranks 0 and 1 have different random states"),
        ("traffic", "traffic must be None, torch.bfloat16 or torch.float16"),
        ("traffic of one rank", "ranks 0 and 1 have different arguments"),
        ("uneven", "every rank needs the same number of images"),
        ("not parallel", "the model is not parallel"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(what, words, found):
    for refusals in found[2]["everyone's refusals"]:
        assert refusals[what].startswith("ValueError")
        assert words in refusals[what]


@pytest.mark.slow
def test_rounded_traffic_is_half_as_much(found):
    assert 0 < found[2]["rounded"]["distance"] < 0.02
    model = parallel_ranks.network("paper", torch.float32)
    step = parallel.step_traffic(model, "towers", 4, image_size=parallel_ranks.SIZE, activation_bytes=2)
    logits = step.pop("logits")
    assert found[2]["rounded"]["sent"] == sum(step.values()) // 2 + logits


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_gradients_of_parts_add_up_before_they_are_reduced(world, parameters, found):
    assert found[world]["accumulated"][parameters] < 1e-12


@pytest.mark.slow
def test_checkpoints_go_between_one_two_and_four_ranks(found, folder):
    assert found[2]["checkpoints"]["of one process"]
    assert "exists" in found[2]["checkpoints"]["again"]
    assert "no checkpoint" in found[4]["checkpoints"]["missing"]
    two, four = load_file(folder / "two.safetensors"), load_file(folder / "four.safetensors")
    model = parallel_ranks.network("paper", torch.float32)
    optimizer = SGD(model.parameters(), 0.01)
    parallel.load(model, optimizer, folder / "four")
    moved = False
    for name, value in model.state_dict().items():
        assert torch.equal(two[name], four[name])
        assert torch.equal(value, two[name])
    for state in optimizer.state.values():
        moved = moved or bool(state["momentum_buffer"].abs().max() > 0)
    assert moved


def test_the_arithmetic_of_the_paper():
    """Of the whole network, 128 images on two GPUs: docs/parallel.md."""
    model = AlexNet(device="meta")
    sent = parallel.step_traffic(model, "towers", 128, activation_bytes=2)
    assert sent["conv3"] == 2 * 128 * 128 * 13 * 13 * 2
    assert sent["norm1"] == 2 * 128 * 2 * 55 * 55 * 2
    assert sent["fc6"] == 2 * 128 * 4608 * 2
    assert "gradients" not in sent
    data = parallel.step_traffic(model, "data", 128, activation_bytes=2)
    assert data == {"gradients": 60_965_224 * 4}


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return benchmark("scaling")


def test_the_scaling_page_is_what_the_arithmetic_says(scaling, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    path = Path(scaling.__file__).parent / "results" / "scaling.md"
    assert capsys.readouterr().out == path.read_text(), "run benchmarks/scaling.py > benchmarks/results/scaling.md"


def test_plans_change_places_at_the_crossover(scaling):
    model = AlexNet(device="meta")
    rates = scaling.Rates(4e14, 4e12, 4e11, 5e10, 1e-5)
    images = scaling.crossover(model, "towers", "hybrid", 8, 2, rates)
    for count, slower in ((images - 1, True), (images, False)):
        towers, hybrid = (scaling.step(model, plan, count, 8, 2, rates).whole for plan in ("towers", "hybrid"))
        assert (hybrid > towers) == slower
    free = scaling.Rates(4e14, 1e30, 1e30, 1e30, 0.0)
    assert scaling.crossover(model, "towers", "data", 8, 2, free) is not None
