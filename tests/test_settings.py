"""Settings: allowed values, the networks they define, recipes, and the learning rate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("yaml")

from alexnet_kernels._errors import InputError
from alexnet_kernels.models import PRESETS, AlexNet
from alexnet_kernels.training.settings import Settings, recipe_names, save_recipe, settings_of, stalls

QUICK = settings_of("quick", precision="32")


class TestChecks:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("epochs", 0),
            ("epochs", 1.5),
            ("epochs", True),
            ("batch_size", 0),
            ("accumulate", 0),
            ("accumulate", 65),
            ("lr", 0.0),
            ("lr", float("nan")),
            ("lr", float("inf")),
            ("lr", "fast"),
            ("schedule", "exp"),
            ("warmup", -1.0),
            ("warmup", 1.0),
            ("lr_factor", 0.0),
            ("lr_factor", 2.0),
            ("lr_drops", -1),
            ("lr_epochs", (3, 2)),
            ("lr_epochs", (0,)),
            ("lr_epochs", (1.5,)),
            ("patience", 0),
            ("rule", "adam"),
            ("momentum", 1.0),
            ("weight_decay", -1.0),
            ("bias_lr", -1.0),
            ("bias_decay", float("inf")),
            ("image_size", 0),
            ("mean", "none"),
            ("color_shift", -0.1),
            ("width", 0.0),
            ("dropout", 1.0),
            ("activation", "gelu"),
            ("pooling", "mean"),
            ("norm", "layer"),
            ("init", "zero"),
            ("precision", "64"),
            ("seed", -1),
            ("preset", "vgg"),
        ],
    )
    def test_values_out_of_range(self, name: str, value: object) -> None:
        with pytest.raises(InputError) as error:
            replace(QUICK, **{name: value})
        assert str(error.value).startswith(f"--{name.replace('_', '-')} must be ")
        assert str(error.value).endswith(f", got {value}")

    def test_dict_and_back(self) -> None:
        assert Settings.from_dict(QUICK.to_dict()) == QUICK
        with pytest.raises(InputError, match="settings lr are missing or unknown"):
            Settings.from_dict({name: value for name, value in QUICK.to_dict().items() if name != "lr"})


class TestNetwork:
    def test_nothing_changed_is_the_preset(self) -> None:
        for name, preset in PRESETS.items():
            assert replace(QUICK, preset=name).network() == preset

    def children(self, **changes: object) -> list[torch.nn.Module]:
        model = AlexNet(10, replace(QUICK, **changes).network(), width=0.1)
        return [*model.features, *model.classifier]

    def test_activation(self) -> None:
        kinds = [type(child) for child in self.children(preset="paper", activation="tanh")]
        assert kinds.count(torch.nn.Tanh) == 7
        assert torch.nn.ReLU not in kinds
        layers = [m for m in self.children(preset="paper", activation="tanh") if hasattr(m, "bias")]
        assert all(not layer.bias.any() for layer in layers)

    def test_pooling(self) -> None:
        def pools(**changes: object) -> list[tuple[int, int]]:
            found = [child for child in self.children(**changes) if isinstance(child, torch.nn.MaxPool2d)]
            return [(pool.kernel_size, pool.stride) for pool in found]

        assert pools(preset="paper", pooling="plain") == [(2, 2)] * 3
        assert pools(preset="batchnorm") == [(2, 2), (2, 2), (3, 2)]
        assert pools(preset="batchnorm", pooling="overlapping") == [(3, 2)] * 3

    @pytest.mark.parametrize("preset", ["paper", "as_run", "batchnorm"])
    def test_no_normalisation(self, preset: str) -> None:
        names = [type(child).__name__ for child in self.children(preset=preset, norm="none")]
        assert not [name for name in names if "Norm" in name]
        assert [type(child).__name__ for child in self.children(preset=preset)] != names

    @pytest.mark.parametrize("preset", ["paper", "batchnorm"])
    def test_he(self, preset: str) -> None:
        torch.manual_seed(0)
        model = AlexNet(10, replace(QUICK, preset=preset, init="he").network(), width=0.5)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.05)
        assert bool(model.features[4 if preset == "paper" else 0].bias.any()) == (preset == "paper")

    def test_smallest_image_of_tanh_and_plain_pools(self) -> None:
        spec = replace(QUICK, preset="paper", activation="tanh", pooling="plain").network()
        model = AlexNet(10, spec, width=0.1)
        smallest = max(model.min_size)
        assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 10)
        with pytest.raises(ValueError, match="too small"):
            model(torch.zeros(1, 3, smallest - 1, smallest))


class TestRecipes:
    def test_every_recipe_is_whole(self) -> None:
        assert {"paper", "as_run", "caffe", "torchvision", "cifar", "quick", *PRESETS} <= set(recipe_names())
        for name in recipe_names():
            settings = settings_of(name)
            assert settings.preset == (name if name in PRESETS else settings.preset)
            if name not in ("quick", "cifar"):
                assert settings.image_size == PRESETS[settings.preset].input_size

    def test_the_papers(self) -> None:
        paper = settings_of("paper")
        assert (paper.batch_size, paper.epochs, paper.lr, paper.momentum, paper.weight_decay) == (
            128, 90, 0.01, 0.9, 5e-4
        )  # fmt: skip
        assert (paper.rule, paper.schedule, paper.lr_factor, paper.lr_drops) == ("paper", "plateau", 0.1, 3)
        as_run = settings_of("as_run")
        assert (as_run.bias_lr, as_run.bias_decay, as_run.lr_epochs) == (2.0, 0.0, (25, 51, 79))

    def test_options_replace_a_recipes_values(self) -> None:
        settings = settings_of("paper", preset="caffe", lr=0.5)
        assert (settings.preset, settings.lr, settings.image_size, settings.schedule) == ("caffe", 0.5, 227, "plateau")

    def test_saved_and_read_again(self, tmp_path: Path) -> None:
        settings = settings_of("as_run", lr=1e-7, width=0.3, precision="32")
        save_recipe(settings, tmp_path / "r.yaml")
        assert settings_of(str(tmp_path / "r.yaml")) == settings

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [", "is not readable YAML"),
            ("- 1", "must map names of settings to values"),
            ("leraning_rate: 1", "sets leraning_rate, which is none of preset, "),
            ("preset: vgg", "--preset must be one of paper, "),
            ("epochs: many\nbatch_size: 1\nlr: 1\nschedule: step", "--epochs must be a whole number, got many"),
            ("lr: fast", "lr must be a number, got fast"),
            (
                "lr_epochs: 3\nepochs: 1\nbatch_size: 1\nlr: 1\nschedule: step",
                "--lr-epochs must be whole numbers, got 3",
            ),
            ("preset: paper", "must set epochs, batch_size, lr, schedule"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as error:
            settings_of(str(path))
        assert message in str(error.value)

    def test_numbers_that_yaml_takes_for_words(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("preset: paper\nepochs: 1\nbatch_size: 2\nlr: 1e-4\nschedule: constant\nprecision: 32\n")
        assert settings_of(str(path)).lr == 1e-4

    def test_unknown(self) -> None:
        with pytest.raises(InputError, match=r"--recipe nice: there is no such recipe; give one of .*paper"):
            settings_of("nice")


class TestLearningRate:
    def rates(self, errors: list[float] | None = None, **changes: object) -> list[float]:
        """Of each step of four epochs of ten; errors are those known from epoch to epoch."""
        settings = replace(QUICK, epochs=4, lr=1.0, lr_factor=0.1, **{"warmup": 0.0, **changes})
        return [settings.lr_at(step, 10, (errors or [])[: step // 10]) for step in range(40)]

    def test_constant(self) -> None:
        assert self.rates(schedule="constant") == [1.0] * 40

    def test_warm_up(self) -> None:
        rates = self.rates(schedule="constant", warmup=0.125)
        assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])

    def test_linear(self) -> None:
        assert self.rates(schedule="linear") == pytest.approx([1 - step / 40 for step in range(40)])

    def test_cosine(self) -> None:
        rates = self.rates(schedule="cosine", warmup=0.25)
        assert rates[10] == max(rates) == 1.0
        assert rates[25] == pytest.approx(0.5)
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01

    def test_step(self) -> None:
        rates = self.rates(schedule="step", lr_epochs=(1, 3))
        assert rates == pytest.approx([1.0] * 10 + [0.1] * 20 + [0.01] * 10)

    def test_dexp_is_the_2012_codes(self) -> None:
        rates = self.rates(schedule="dexp", lr_drops=3)
        assert rates == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10 + [0.001] * 10)
        settings = settings_of("dexp")
        assert settings.lr_at(89, 1, []) == pytest.approx(0.01 / 250, rel=1e-4)

    def test_plateau(self) -> None:
        assert self.rates([0.5, 0.5, 0.4], schedule="plateau", patience=1) == pytest.approx([1.0] * 20 + [0.1] * 20)
        assert self.rates([0.5, 0.5, 0.5], schedule="plateau", patience=1, lr_drops=1)[-1] == pytest.approx(0.1)
        assert self.rates([0.5, 0.4, 0.3], schedule="plateau", patience=1) == [1.0] * 40

    def test_stalls(self) -> None:
        assert stalls([], 2) == 0
        assert stalls([0.5, 0.6, 0.7], 2) == 1
        assert stalls([0.5, 0.6, 0.4, 0.5], 2) == 0
        assert stalls([0.5, 0.6, 0.7, 0.6, 0.6, 0.3, 0.3, 0.3], 2) == 3
        assert stalls([math.nan, math.nan], 2) == 1
