"""Training in bfloat16 with float32 masters, and the precision that "auto" stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")

from runs import assert_same, shipped_images, train

from alexnet_kernels import ops
from alexnet_kernels._errors import InputError
from alexnet_kernels.optim import SGD
from alexnet_kernels.training import checkpoint, datasets, inference
from alexnet_kernels.training.distributed.config import ParallelConfig
from alexnet_kernels.training.header import KEY
from alexnet_kernels.training.loader import ImageLoader
from alexnet_kernels.training.precision import resolve
from alexnet_kernels.training.settings import load_recipe, settings_of

PURE = settings_of("quick", epochs=2, batch_size=8, image_size=64, width=0.04, precision="bf16-pure")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped_images(tmp_path_factory.mktemp("data"), ("airplane", "automobile", "ship"), train=12, val=6)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    return train(PURE, data, out=tmp_path_factory.mktemp("runs") / "run", device="cpu").folder


def weights(path: Path) -> dict[str, Tensor]:
    return checkpoint.load(path).content["state_dict"]


def by_hand(header: checkpoint.Header, data: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network after all steps of a run, and the float32 values of its parameters."""
    settings = header.settings
    torch.manual_seed(settings.seed)
    model = header.model().to(memory_format=torch.channels_last)
    exact = {name: param.detach().clone() for name, param in model.named_parameters()}
    momentum = {name: torch.zeros_like(value) for name, value in exact.items()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(BF16)
    loader = ImageLoader(datasets.open_data(data, header.stored_size)[0], settings.batch_size, 0, settings.seed)
    crops, step = header.crops(), 0
    for epoch in range(settings.epochs):
        loader.batch_sampler.sampler.set_epoch(epoch)
        for batch in loader:
            torch.manual_seed((settings.seed << 32) + step)
            x = crops.random(batch["images"], batch["indices"], epoch).to(BF16)
            model.zero_grad()
            F.cross_entropy(model(x).float(), batch["labels"]).backward()
            lr = settings.lr_at(step, len(loader), [])
            for name, param in model.named_parameters():
                masters = [exact[name]] if param.dtype == BF16 else []
                weight = param if masters else param.detach()
                ops.sgd_step([weight], [param.grad], [momentum[name]], masters, lr=lr, rule=settings.rule)
                if not masters:
                    exact[name] = param.detach()
            step += 1
    return model, exact


class TestPure:
    def test_equals_a_loop_by_hand(self, run: Path, data: Path) -> None:
        model, exact = by_hand(checkpoint.load(run / "last.ckpt").header, data)
        saved = weights(run / "last.ckpt")
        for name, value in (model.state_dict() | exact).items():
            assert torch.equal(saved[f"model.{name}"], value), name

    def test_equals_autocast_on_a_cpu(self, run: Path, data: Path, tmp_path: Path) -> None:
        """There autocast rounds the same weights, images and gradients."""
        cast = train(replace(PURE, precision="bf16"), data, out=tmp_path / "run", device="cpu").folder
        assert_same(run / "last.ckpt", cast / "last.ckpt")

    def test_a_checkpoint_holds_the_masters(self, run: Path) -> None:
        content = checkpoint.load(run / "last.ckpt").content
        for name, value in content["state_dict"].items():
            assert value.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32), name
        fc6 = content["state_dict"]["model.classifier.0.weight"]
        assert not torch.equal(fc6, fc6.to(BF16).float())
        (optimizer,) = content["optimizer_states"]
        assert all(set(values) == {"momentum_buffer"} for values in optimizer["state"].values())
        assert content[KEY]["settings"]["precision"] == "bf16-pure"
        assert load_recipe(str(run / "recipe.yaml"))["precision"] == "bf16-pure"

    def test_resumes_to_the_same_bits(self, data: Path, run: Path, tmp_path: Path) -> None:
        train(PURE, data, out=tmp_path / "run", device="cpu", max_seconds=1e-9)
        assert checkpoint.load(tmp_path / "run" / "last.ckpt").content["global_step"] == 1
        train(replace(PURE, precision="auto"), resume=tmp_path / "run", device="cpu")
        assert_same(run / "last.ckpt", tmp_path / "run" / "last.ckpt")

    def test_a_resumed_run_keeps_its_precision(self, data: Path, tmp_path: Path) -> None:
        folder = train(PURE, data, out=tmp_path / "run", max_seconds=1e-9).folder
        with pytest.raises(InputError, match=r"--precision 32 can't be used with --resume: .* begun with bf16-pure"):
            train(replace(PURE, precision="32"), resume=folder)

    def test_evaluation_rounds_the_exact_weights(self, run: Path, data: Path) -> None:
        network = checkpoint.load_network(run / "last.ckpt")
        saved = weights(run / "last.ckpt")
        for name, value in network.model.state_dict().items():
            assert torch.equal(value, saved[f"model.{name}"])
        pixels = datasets.open_data(data, network.header.stored_size)[1].__getitems__(range(18))["images"]
        rounded = checkpoint.load_network(run / "last.ckpt").model
        for module in rounded.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(BF16)
        expected = rounded(network.crops.centre(pixels).to(BF16)).float().softmax(1)
        assert torch.equal(inference.probabilities(network, pixels), expected)
        assert inference.features(network, pixels).dtype == torch.float32
        assert all(param.dtype == torch.float32 for param in network.model.parameters())
        result = inference.evaluate(network, data)
        assert result["top1"] == pytest.approx(network.history.epochs[-1]["val_top1"])

    def test_parts_of_a_batch_are_added_in_float32(self, data: Path, tmp_path: Path) -> None:
        settings = replace(PURE, preset="paper", init="he", epochs=1, batch_size=36, dropout=0.0, warmup=0.0)
        whole = train(settings, data, out=tmp_path / "whole").folder
        parts = train(replace(settings, accumulate=36), data, out=tmp_path / "parts").folder
        after = weights(parts / "last.ckpt")
        for name, value in weights(whole / "last.ckpt").items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0.035 * settings.lr)

    def test_layer_figures_are_of_the_masters(self, run: Path) -> None:
        last = [row for row in checkpoint.load(run / "last.ckpt").history.layers if row["epoch"] == 2]
        saved = weights(run / "last.ckpt")
        for row in last:
            assert row["w"] == pytest.approx(float(saved[f"model.{row['name']}"].double().abs().mean()), rel=1e-9)

    def test_several_processes(self) -> None:
        with pytest.raises(InputError, match=r"--precision bf16-pure can't be used with --parallel, .* 32 can"):
            ParallelConfig("data", towers=1).check(2, replace(PURE, preset="paper"))


class TestAuto:
    AUTO = replace(PURE, precision="auto")

    @pytest.mark.parametrize(
        ("where", "capability", "parallel", "expected"),
        [
            ("cpu", (9, 0), False, "cpu"),
            ("cpu", (9, 0), True, "cpu"),
            ("cuda", (7, 5), False, "32"),
            ("cuda", (8, 0), False, "bf16-pure"),
            ("cuda:1", (12, 0), False, "bf16-pure"),
            ("cuda", (9, 0), True, "bf16"),
        ],
    )
    def test_stands_for(
        self, where: str, capability: tuple[int, int], parallel: bool, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda given: capability)
        for name in ("avx512_bf16", "amx_bf16", "avx512_f"):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True}, raising=False)
            on_cpu = "bf16" if "bf16" in name else "32"
            wanted = replace(self.AUTO, precision=on_cpu if expected == "cpu" else expected)
            assert resolve(self.AUTO, torch.device(where), parallel) == wanted
        assert resolve(PURE, torch.device(where), parallel) == PURE

    def test_is_the_default(self) -> None:
        assert settings_of("quick").precision == settings_of("paper").precision == "auto"

    def test_a_run_records_what_it_stood_for(self, data: Path, tmp_path: Path) -> None:
        folder = train(self.AUTO, data, out=tmp_path / "run", device="cpu", max_seconds=1e-9).folder
        expected = resolve(self.AUTO, torch.device("cpu")).precision
        assert checkpoint.load(folder / "last.ckpt").header.settings.precision == expected
        assert load_recipe(str(folder / "recipe.yaml"))["precision"] == expected
        content = checkpoint.load(folder / "last.ckpt").content
        content[KEY]["settings"]["precision"] = "auto"
        checkpoint.save(content, folder / "last.ckpt")
        with pytest.raises(InputError, match="its precision is auto"):
            train(self.AUTO, resume=folder)


class TestMasters:
    def test_start_from_the_exact_values(self) -> None:
        exact = torch.randn(5, 3, 2, 2).to(memory_format=torch.channels_last)
        param = nn.Parameter(exact.to(BF16).contiguous())
        optimizer = SGD([param], lr=0.5, momentum=0.0, weight_decay=0.0)
        optimizer.set_masters({param: exact})
        assert optimizer.state[param]["master"].stride() == param.stride()
        param.grad = torch.full_like(param, 1e-4)
        optimizer.step()
        expected = exact - 0.5 * param.grad.float()
        assert torch.equal(optimizer.state[param]["master"], expected)
        assert torch.equal(param, expected.to(BF16))

    def test_of_a_state_without_a_step_are_loaded(self) -> None:
        params = [nn.Parameter(torch.zeros(3, dtype=BF16)) for _ in range(2)]
        first, second = (SGD([param]) for param in params)
        first.set_masters({params[0]: torch.tensor([0.1, 0.2, 0.3])})
        second.load_state_dict(first.state_dict())
        assert torch.equal(second.state[params[1]]["master"], torch.tensor([0.1, 0.2, 0.3]))

    @pytest.mark.parametrize(
        ("master", "dtype", "options", "error", "message"),
        [
            (torch.zeros(3, dtype=BF16), BF16, {}, TypeError, "must be a float32 tensor, not torch.bfloat16"),
            ([0.0], BF16, {}, TypeError, "must be a float32 tensor, not list"),
            (torch.zeros(2), BF16, {}, ValueError, r"a master is \[2\], its parameter \[3\]"),
            (torch.zeros(3), torch.float32, {}, ValueError, "a torch.float32 parameter .* has no master"),
            (torch.zeros(3), BF16, {"master_weights": False}, ValueError, "master_weights=False has no master"),
        ],
    )
    def test_mistakes(
        self, master: object, dtype: torch.dtype, options: dict[str, bool], error: type[Exception], message: str
    ) -> None:
        param = nn.Parameter(torch.zeros(3, dtype=dtype))
        optimizer = SGD([param], **options)
        with pytest.raises(error, match=message):
            optimizer.set_masters({param: master})
        assert not optimizer.state[param]
        with pytest.raises(ValueError, match="none of this optimizer's"):
            optimizer.set_masters({nn.Parameter(torch.zeros(3, dtype=BF16)): torch.zeros(3)})
