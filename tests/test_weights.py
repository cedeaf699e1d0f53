"""Weights in and out: what people have as files and dicts, and what is written for others."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import resource
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import alexnet_kernels.models.weights as weights_module
from alexnet_kernels import AlexNet, alexnet
from alexnet_kernels._errors import InputError, RunError
from alexnet_kernels.models import ONNX_ZOO, PRESETS, FileWeights, Preprocessing, read_weights, untrained_layers
from alexnet_kernels.models.fit import fits_of, state_of
from alexnet_kernels.models.formats import detect
from alexnet_kernels.models.formats.pickles import Global, Made, Source, read_pickle
from alexnet_kernels.models.formats.preprocessing import CAFFE, TORCHVISION, normalized
from alexnet_kernels.models.formats.state import LAYERS
from alexnet_kernels.models.presets import variant

NARROW = 0.1

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return AlexNet(num_classes=7, preset="torchvision", width=NARROW).state_dict()


def assert_holds(weights: Any, state: State, **arguments: Any) -> AlexNet:
    model = alexnet(weights, **{"width": NARROW, **arguments})
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    return model


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


class Settings:
    """What a trainer puts into its checkpoints: unknown to weights_only."""

    def __init__(self) -> None:
        self.lr, self.betas = 0.1, (0.9, 0.99)


def imagenet_example(state: State) -> dict[str, Any]:
    """As pytorch/examples' imagenet writes it: DataParallel on the features alone."""
    parallel = {key.replace("features.", "features.module."): value for key, value in state.items()}
    momentum = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "epoch": 90,
        "arch": "alexnet",
        "state_dict": parallel,
        "best_acc1": torch.tensor(56.5),
        "optimizer": momentum,
    }


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model.", state),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(4)}}}],
        "callbacks": {Settings: {"best": 1.0}},
        "hyper_parameters": argparse.Namespace(lr=0.1, settings=Settings()),
    }


CHECKPOINTS: dict[str, Callable[[State], Any]] = {
    "imagenet example": imagenet_example,
    "lightning": lightning,
    "model": lambda s: {"model": s, "epoch": 1},
    "net": lambda s: {"net": s, "acc": 93.1},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"momentum": dict(s)}, "loss": 0.1},
    "a module": lambda s: {"model": network_with(s)},
    "features and classifier apart": lambda s: {
        part: {key.partition(".")[2]: value for key, value in s.items() if key.startswith(part)}
        for part in ("features", "classifier")
    },
    "data parallel": lambda s: under("module.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled layers": lambda s: {key.replace("features.", "features._orig_mod."): value for key, value in s.items()},
    "both": lambda s: under("module._orig_mod.", s),
    "lightning's of data parallel": lambda s: {"state_dict": under("model.module.", s)},
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **under("module.", s)},
    "backbone": lambda s: under("net.backbone.", s),
    "the same twice": lambda s: {"state_dict": s, "state_dict_ema": dict(s)},
    "parameters": lambda s: {key: nn.Parameter(value) for key, value in s.items()},
    "views of one": lambda s: views_of_one(s),
}


def views_of_one(state: State) -> State:
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    return {key: part.view(state[key].shape) for key, part in zip(state, parts, strict=True)}


def network_with(state: State) -> AlexNet:
    model = AlexNet(num_classes=7, preset="torchvision", width=NARROW)
    model.load_state_dict(state)
    return model


class TestCheckpoints:
    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_as_dicts(self, kind: str, state: State) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = assert_holds(CHECKPOINTS[kind](state), state)
        assert model.classifier[-1].out_features == 7

    @pytest.mark.parametrize("kind", CHECKPOINTS)
    def test_as_files(self, kind: str, state: State, tmp_path: Path) -> None:
        """Of any suffix, and in the format of torch before 1.6."""
        for name, zipped in (("model_best.pth.tar", True), ("weights", False), ("x.bin", True)):
            torch.save(CHECKPOINTS[kind](state), tmp_path / name, _use_new_zipfile_serialization=zipped)
            assert_holds(tmp_path / name, state)

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_without_torch_load(
        self, zipped: bool, dtype: torch.dtype, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tensors that are read here are those of torch.load, strides, offsets and dtypes included."""
        saved = {key: value.to(dtype) for key, value in state.items()}
        saved["features.3.weight"] = saved["features.3.weight"].transpose(2, 3)
        torch.save({"state_dict": saved, "settings": Settings()}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
        found, _ = read_weights(tmp_path / "x")
        for key, value in found.tensors.items():
            assert value.dtype == dtype
            assert torch.equal(value, saved[key]), key

    def test_plain_files_are_read_by_torch_load(
        self, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[dict[str, Any]] = []
        load = torch.load
        monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k) or load(*a, **k))
        torch.save(state, tmp_path / "x.pth")
        read_weights(tmp_path / "x.pth")
        assert [call["weights_only"] for call in asked] == [True]
        assert asked[0]["mmap"]

    def test_several_models_are_listed(self, state: State, tmp_path: Path) -> None:
        other = {key: value + 1 for key, value in state.items()}
        both = {"generator": {"net": state}, "discriminator": other}
        torch.save(both, tmp_path / "x.pt")
        for given in (both, tmp_path / "x.pt"):
            found, _ = read_weights(given, part="discriminator")
            assert torch.equal(found.tensors["features.0.bias"], other["features.0.bias"])
            with pytest.raises(ValueError, match=r"no weights of AlexNet .* in gen: it has generator, discriminator"):
                read_weights(given, part="gen")
            with pytest.raises(
                ValueError, match=r"several models: discriminator \(16 .*, generator.net \(16 tensors\)"
            ):
                alexnet(given)

    def test_what_is_beside_the_network_is_said(self, state: State) -> None:
        given = {"state_dict": {**under("model.", state), "loss.weight": torch.ones(2)}}
        with pytest.warns(UserWarning, match=r"left out what is beside the network: state_dict\.loss\.weight"):
            alexnet(given, width=NARROW)
        with pytest.raises(ValueError, match=r"unexpected extra\.weight"):
            alexnet({"state_dict": {**state, "extra.weight": torch.ones(2)}}, width=NARROW)

    def test_others_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"holds no weights of AlexNet .* it has epoch, layer1"):
            alexnet({"epoch": 3, "layer1": {"0.weight": torch.ones(2)}})
        with pytest.raises(ValueError, match=r"holds no weights of AlexNet .* it has nothing"):
            alexnet({})
        torch.save(Settings(), tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"holds a .*Settings, not a state dict"):
            alexnet(tmp_path / "x.pt")

    def test_names_of_layers(self, state: State) -> None:
        named = dict(
            zip((f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")), state.values(), strict=True)
        )
        assert_holds(named, state)
        assert_holds({key: value.numpy() for key, value in named.items()}, state)

    def test_names_of_layers_with_batch_normalisation(self) -> None:
        model = AlexNet(4, "batchnorm", width=NARROW)
        expected = {key: value.shape for key, value in model.state_dict().items()}
        parts = ("weight", "bias", "running_mean", "running_var")
        named, places = {}, iter(model.state_dict().items())
        for layer in ("conv1", "bn1", "conv2", "bn2", *LAYERS[2:]):
            for part in parts if layer.startswith("bn") else parts[:2]:
                named[f"{layer}.{part}"] = next(v for k, v in places if not k.endswith("num_batches_tracked"))
        assert {key: value.shape for key, value in state_of(named, expected).items()} == expected
        assert_holds(named, model.state_dict(), preset="batchnorm")


class TestFiles:
    def test_npz_and_safetensors_by_content(self, state: State, tmp_path: Path) -> None:
        pytest.importorskip("safetensors.torch").save_file(under("module.", state), tmp_path / "a.pth")
        with (tmp_path / "b.pth").open("wb") as file:
            numpy.savez_compressed(file, **{key: value.numpy() for key, value in state.items()})
        assert_holds(tmp_path / "a.pth", state)
        assert_holds(str(tmp_path / "b.pth"), state)

    def test_a_folder_of_the_hub_says_its_network(self, tmp_path: Path) -> None:
        pytest.importorskip("huggingface_hub")
        model = AlexNet(3, "as_run", width=NARROW, dropout=0.2)
        model.classes, model.preprocessing = ("a", "b", "c"), CAFFE
        model.save_pretrained(tmp_path / "net")
        found = alexnet(tmp_path / "net")
        assert (found.preset, found.classes) == ("as_run", ("a", "b", "c"))
        assert torch.equal(found.preprocessing.mean, CAFFE.mean)
        assert found.classifier[2].p == 0.2
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())
        (tmp_path / "net" / "config.json").write_text("[")
        with pytest.raises(ValueError, match=r"config\.json' can't be read"):
            alexnet(tmp_path / "net")
        with pytest.raises(ValueError, match=r"is a folder without model\.safetensors"):
            alexnet(tmp_path)

    def test_readers_of_other_formats(self, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        named = dict(
            zip((f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")), state.values(), strict=True)
        )
        said = Preprocessing(torch.zeros(3))
        found = FileWeights(
            "other", named, PRESETS["torchvision"], "BGR", said, None, ("conv1 takes RGB",), {"width": NARROW}
        )
        reader = SimpleNamespace(recognises=lambda head, path: head.startswith(b"other"), read=lambda path: found)
        monkeypatch.setattr(detect, "READERS", (reader,))
        (tmp_path / "x.bin").write_bytes(b"other format")
        with pytest.warns(UserWarning, match="conv1 takes RGB"):
            model = alexnet(tmp_path / "x.bin")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert model.preprocessing is said

    def test_a_network_of_its_own(self) -> None:
        """A preset that is none of PRESETS, as of the zoo's ONNX file."""
        model = AlexNet(5, ONNX_ZOO, width=NARROW)
        found = FileWeights("other", model.state_dict(), ONNX_ZOO, arguments={"width": NARROW})
        assert fits_of(found.tensors)[0].width == NARROW


class TestFits:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("width", [0.04, 0.37, 1.0, 1.5])
    def test_preset_and_width_by_shapes(self, preset: str, width: float) -> None:
        state = AlexNet(6, preset, width=width, in_channels=1, device="meta").state_dict()
        fits = fits_of(state)
        shared = {"paper", "caffe", "caffenet"}
        assert {fit.preset.name for fit in fits} == (shared if preset in shared else {preset})
        for fit in fits:
            assert (fit.num_classes, fit.in_channels) == (6, 1)
            again = AlexNet(6, fit.preset, width=fit.width, in_channels=1, device="meta").state_dict()
            assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}

    def test_the_error_names_what_fits(self) -> None:
        with pytest.raises(ValueError, match=r"they fit preset='as_run', width=0\.1$"):
            alexnet(AlexNet(3, "as_run", width=0.1).state_dict())
        with pytest.raises(ValueError, match=r"they fit preset='torchvision', width=0\.1, in_channels=1$"):
            alexnet(AlexNet(3, "torchvision", width=0.1, in_channels=1).state_dict())
        with pytest.raises(ValueError, match=r"classifier\.6\.weight .*; they have 3 classes"):
            alexnet(AlexNet(3, "torchvision", width=0.1).state_dict(), width=0.1, num_classes=4)


class TestTorchvision:
    @pytest.fixture
    def cache(self, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The hub's folder. A small file stands for torchvision's, with the name of its own digest."""
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        torch.save(state, tmp_path / "x")
        digest = hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()[:8]
        monkeypatch.setattr(weights_module, "_URL", f"https://models.invalid/alexnet-owt-{digest}.pth")
        path = tmp_path / "hub" / "checkpoints" / f"alexnet-owt-{digest}.pth"
        path.parent.mkdir(parents=True)
        (tmp_path / "x").rename(path)
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
        return path

    @pytest.mark.parametrize(
        "name",
        ["DEFAULT", "IMAGENET1K_V1", "AlexNet_Weights.DEFAULT", "AlexNet_Weights.IMAGENET1K_V1", "imagenet1k_v1"],
    )
    def test_from_the_cache_without_torchvision(
        self, name: str, cache: Path, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        model = assert_holds(name, state)
        assert torch.equal(model.preprocessing.mean, TORCHVISION.mean)

    def test_download(self, cache: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.rename(cache.with_suffix(".there"))
        asked = []

        def download(url: str, path: str, **options: Any) -> None:
            asked.append((url.rsplit("/", 1)[1], options["progress"], options["hash_prefix"]))
            cache.with_suffix(".there").rename(path)

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        model = alexnet("DEFAULT", progress=False, width=NARROW)
        assert asked == [(cache.name, False, cache.stem[-8:])]
        assert torch.equal(model.features[0].weight, state["features.0.weight"])

    def test_offline(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.unlink()

        def download(*arguments: Any, **options: Any) -> None:
            raise OSError("<urlopen error no route>")

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        with pytest.raises(FileNotFoundError) as caught:
            alexnet("DEFAULT")
        said = str(caught.value)
        assert all(part in said for part in (str(cache), weights_module._URL, "no route", "TORCH_HOME"))
        assert "\n" not in said

    def test_damaged(self, cache: Path) -> None:
        cache.write_bytes(cache.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"is damaged, its SHA-256 does not begin with .*: delete it"):
            alexnet("DEFAULT")

    def test_members(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = pytest.importorskip("torchvision.models")
        assert models.AlexNet_Weights.IMAGENET1K_V1.url == weights_module._URL
        assert set(models.AlexNet_Weights.__members__) == set(weights_module._WEIGHT_NAMES)
        monkeypatch.setattr(weights_module, "_torchvision", lambda *given: given)
        member = models.AlexNet_Weights.IMAGENET1K_V1
        assert read_weights(member) == ((member.url, str(member), True), str(member))
        assert len(weights_module.imagenet_classes()) == 1000
        assert weights_module.imagenet_classes()[0] == "tench"

    def test_preprocessing_is_torchvisions(self) -> None:
        models = pytest.importorskip("torchvision.models")
        image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
        expected = models.AlexNet_Weights.DEFAULT.transforms()(image)
        torch.testing.assert_close(normalized(image[..., 16:240, 16:240], TORCHVISION), expected)


class TestUntrained:
    @pytest.mark.parametrize("preset", [*PRESETS, variant("paper", init="he")], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_initial_values(self, preset: Any, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        model = AlexNet(9, preset, width=NARROW, dtype=dtype)
        assert untrained_layers(model) == list(LAYERS)
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
                layer.weight += 0.2 * layer.weight.std() * torch.randn_like(layer.weight)
                layer.bias += 0.5 * torch.randn_like(layer.bias)
        assert untrained_layers(model) == []

    def test_a_new_last_layer(self) -> None:
        model = trained(AlexNet(9, "torchvision", width=NARROW))
        model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 4)
        assert untrained_layers(model) == ["fc8"]

    def test_other_modules(self) -> None:
        assert untrained_layers(nn.Sequential(nn.Linear(50, 50), nn.ReLU())) == ["0"]


def trained(model: AlexNet) -> AlexNet:
    """With values that no initialization draws, of a deviation of their own in every layer."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
            layer.weight.copy_(torch.randn_like(layer.weight) * 1.3 * layer.weight.std())
            layer.bias.copy_(torch.randn_like(layer.bias))
    return model


MADE = "made-by-the-file"
_PICKLE_ERRORS = r"pickle|exhausted|not enough|opcode|limit|expected|remain|newline"


class TestPickles:
    """The reader of pickles executes nothing, whatever they hold."""

    @staticmethod
    def read(content: bytes) -> Any:
        import io

        return read_pickle(Source(io.BytesIO(content)))

    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_values(self, protocol: int) -> None:
        values = {"a": [1, -2, 2**70, 1.5, None, True, False], "b": ("x", ()), 3: {"deep": [[]]}, "s": "é\n"}
        if protocol > 2:  # before, bytes are a call
            values["bytes"] = b"\0y"
        assert self.read(pickle.dumps(values, protocol)) == values

    def test_calls_are_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import os

        monkeypatch.chdir(tmp_path)

        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (MADE,), {"x": 1}

        found = self.read(pickle.dumps([Evil()]))
        assert isinstance(found[0], Made)
        assert isinstance(found[0].by, Global)
        assert found[0].by.name.endswith(".mkdir")
        assert (found[0].arguments, found[0].state) == ((MADE,), {"x": 1})
        for text in (b"cos\nmkdir\n(S'made'\ntR.", b"(S'made'\nios\nmkdir\n.", b"(cos\nmkdir\nS'made'\no."):
            self.read(text)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "content",
        [
            b"", b".", b"\x80\x02", b"}q\x00(K\x01.", b"0.", b"t.", b"]a.", b"h\x07.", b"\x82\x01.",
            b"\x8e" + struct.pack("<Q", 1 << 40) + b".", b"\x96" + struct.pack("<Q", 1 << 40) + b".",
            b"c" + b"x" * 200_000, b"(" * 100_000 + b".",
            b"I" + b"9" * 5000 + b"\n.", b"}(]]u.", b"\x97.", b"Pid\n.", b"K\x01Q.",
        ],
        ids=lambda content: repr(content[:12]),
    )  # fmt: skip
    def test_damaged(self, content: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=_PICKLE_ERRORS) as caught:
            self.read(content)
        assert len(str(caught.value)) < 300
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000

    def test_shared_tuples_take_no_exponential_time(self) -> None:
        """A tuple of itself twice, 60 times over, as a key of a dict."""
        content = b"}(" + b"K\x01" + b"2\x86" * 60 + b"K\x02u."
        with pytest.raises(ValueError, match="damaged"):
            self.read(content)
        assert self.read(b"K\x01" + b"2\x86" * 60 + b".")

    @pytest.mark.parametrize(
        ("start", "again", "reason"),
        [
            # Each repetition copies, hashes or stores what the pickle has once.
            (b"c_codecs\nencode\nq\x01X\x00\x40\x00\x00" + b"x" * 0x4000 + b"q\x02", b"h\x01h\x02\x85R", "bytes"),
            (
                b"]q\x01(K\x01K\x02\x86" + b"2" * 1000 + b"eccollections\nOrderedDict\nq\x02",
                b"h\x02h\x01\x85R",
                "instructions",
            ),
            (b"B\x00\x40\x00\x00" + b"x" * 0x4000 + b"q\x01", b"}h\x01K\x01s", "bytes"),
            (b"(" + b"K\x01" * 5000 + b"tq\x01", b"}h\x01K\x01s", "bytes"),
            (b"\x8b\x00\x40\x00\x00" + b"\x7f" * 0x4000, b"0", "bits"),
        ],
        ids=["encoded strings", "dicts of pairs", "keys of bytes", "keys of tuples", "numbers"],
    )
    def test_repeated_work_is_counted(self, start: bytes, again: bytes, reason: str) -> None:
        import io

        source = Source(io.BytesIO(start + again * 100 + b"."), 200_000, 20_000)
        with pytest.raises(ValueError, match=f"more than [0-9,]+ (of )?{reason}"):
            read_pickle(source)


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The zip with each member's content changed, or left out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)


class TestHostileFiles:
    """One line, nothing executed, bounded memory."""

    @pytest.fixture
    def saved(self, state: State, tmp_path: Path) -> Path:
        torch.save(state, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    @staticmethod
    def refuses(path: Path, reason: str) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=reason) as caught:
            alexnet(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000

    def test_tensors_larger_than_their_storage(self, saved: Path, tmp_path: Path) -> None:
        """torch.load would allocate what the pickle declares."""

        # bias of conv1, (8,): the sizes and strides are BININT1 of the pickle
        def change(name: str, content: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return content
            assert content.count(b"K\x08\x85") >= 1
            return content.replace(b"K\x08\x85", b"J\xff\xff\xff\x7f\x85", 1)

        rewritten(saved, change)
        self.refuses(saved, r"it declares a tensor of shape \[2147483647\] in a storage of 8 elements")

    @pytest.mark.parametrize("older", [False, True])
    def test_one_tensor_many_times(self, older: bool, tmp_path: Path) -> None:
        """A thousand names of one tensor, in a file whose tensors are read one by one."""
        content = {f"m{i}": {"features.0.weight": part} for part in [torch.zeros(2_000_000)] for i in range(1000)}
        beside = {"x": Settings()}
        torch.save({**content, **beside}, tmp_path / "x", _use_new_zipfile_serialization=not older)
        self.refuses(tmp_path / "x", "does not fit preset")
        whole = torch.zeros(2_000_000)
        views = {f"features.0.w{i}": whole[i:] for i in range(1000)}
        torch.save({**views, **beside}, tmp_path / "x", _use_new_zipfile_serialization=not older)
        self.refuses(tmp_path / "x", "its tensors overlap: they would take 7,998,002,000 bytes, of 8,000,000 that")

    @pytest.mark.parametrize("older", [False, True])
    def test_expanded_tensors(self, older: bool, tmp_path: Path) -> None:
        """Two models are compared, which would write out tensors of 256 GiB."""
        content = {key: {"features.0.weight": torch.full((1,), i).expand(2**36)} for i, key in enumerate("ab")}
        torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=not older)
        self.refuses(tmp_path / "x", r"features\.0\.weight as something else than .*: \[68719476736\] in")

    @pytest.mark.parametrize("beside", [{}, {"x": Settings()}], ids=["plain", "with objects"])
    def test_older_files_of_ten_gigabytes(self, beside: dict[str, Any], tmp_path: Path) -> None:
        path, count = tmp_path / "x", (10 << 30) // 4
        torch.save({"features.0.weight": torch.zeros(4), **beside}, path, _use_new_zipfile_serialization=False)
        content, number = path.read_bytes(), b"\x8a\5" + struct.pack("<q", count)[:5]
        for end in (b"Nt", b"\x85"):
            assert content.count(b"K\4" + end) == 1
            content = content.replace(b"K\4" + end, number + end)
        path.write_bytes(content[:-24] + struct.pack("<q", count))
        with path.open("ab") as file:
            file.truncate(file.tell() + 4 * count)
        self.refuses(path, "holds 10,737,418,240 bytes of weights, more than the 4,294,967,296 that are read")

    def test_storages_larger_than_their_bytes(self, saved: Path) -> None:
        rewritten(saved, lambda name, content: content[:-4] if name.endswith("data/0") else content)
        self.refuses(saved, "it declares .* bytes of values in .*data/0 and has")

    def test_missing_storages(self, saved: Path) -> None:
        rewritten(saved, lambda name, content: None if name.endswith("data/0") else content)
        self.refuses(saved, "data/0 and has none")

    def test_compressed_archives(self, saved: Path) -> None:
        rewritten(saved, lambda name, content: content, zipfile.ZIP_DEFLATED)
        self.refuses(saved, "its members are compressed")

    def test_compressed_arrays_that_would_fill_the_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from alexnet_kernels.models.formats import arrays

        monkeypatch.setattr(arrays, "_ARRAYS", 1 << 20)
        numpy.savez_compressed(tmp_path / "x.npz", **{"features.0.weight": numpy.zeros((64, 3, 64, 64), "f4")})
        self.refuses(tmp_path / "x.npz", "its arrays would have 3,145,8.. bytes, from a file of")

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
    def test_cut_off(self, zipped: bool, part: float, state: State, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        self.refuses(path, "can't be read")

    def test_damaged_bytes(self, saved: Path) -> None:
        content = bytearray(saved.read_bytes())
        content[len(content) // 2] ^= 1
        saved.write_bytes(content)
        self.refuses(saved, "does not have its checksum|damaged")

    def test_damaged_pickles(self, state: State, tmp_path: Path) -> None:
        """Of the older format, which has no checksums."""
        draw, refused = random.Random(3), list[str]()
        torch.save({"state_dict": state, "x": Settings()}, tmp_path / "whole", _use_new_zipfile_serialization=False)
        content = (tmp_path / "whole").read_bytes()
        for _ in range(60):
            changed = bytearray(content)
            for _ in range(draw.randint(1, 3)):
                changed[draw.randrange(content.rfind(b"storage"))] = draw.randrange(256)
            (tmp_path / "x").write_bytes(changed)
            try:
                read_weights(tmp_path / "x")
            except ValueError as error:
                refused.append(str(error))
        assert len(refused) > 20
        assert all(len(line) < 600 and "\n" not in line for line in refused)

    def test_sparse_files_of_ten_gigabytes(self, tmp_path: Path) -> None:
        for head in (b"", b"PK\3\4", detect.LEGACY, b'\xff\xff\xff\x4f\2\0\0\0{"', b"\xff" * 8 + b'{"', b"\x80\x02c"):
            path = tmp_path / "x.pth"
            with path.open("wb") as file:
                file.write(head)
                file.truncate(10 << 30)
            self.refuses(path, "can't be read|is no file of weights")

    def test_directories_of_gigabytes(self, tmp_path: Path) -> None:
        """A zip's end that declares a directory of a gigabyte before it."""
        path = tmp_path / "x.pth"
        with path.open("wb") as file:
            file.write(b"PK\3\4")
            file.seek((1 << 30) + 4)
            file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1 << 30, 4, 0))
        self.refuses(path, "its directory is longer than|damaged zip")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda t: t.to(torch.int8), "features.3.weight in torch.int8, which weights can't have"),
            (lambda t: t.to(torch.complex64), "in torch.complex64, which"),
            (lambda t: t.to(torch.float8_e4m3fn), "in torch.float8_e4m3fn, which"),
            (lambda t: t.to(torch.bool), "in torch.bool, which"),
            (lambda t: t.to_sparse(), "as something else than a dense tensor: a sparse tensor"),
            (lambda t: t.to("meta"), r"as something else than a dense tensor: a tensor without values \(on the meta"),
            (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "a quantised tensor"),
            (lambda t: t.tolist(), "its entry 'features.3.weight' is of type list"),
        ],
        ids=["int8", "complex", "float8", "bool", "sparse", "meta", "quantised", "list"],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:.*quantize", "ignore:.*TypedStorage", "ignore:.*deprecated")
    def test_other_tensors(self, change: Callable[[Tensor], Any], reason: str, state: State, tmp_path: Path) -> None:
        given = {**state, "features.3.weight": change(state["features.3.weight"])}
        torch.save(given, tmp_path / "x.pth")
        for weights in (given, tmp_path / "x.pth"):
            with pytest.raises(ValueError, match=reason):
                alexnet(weights, width=NARROW)

    def test_nan_is_said(self, state: State) -> None:
        given = {**state, "features.3.bias": torch.full_like(state["features.3.bias"], torch.nan)}
        with pytest.warns(UserWarning, match="NaN or infinity in features.3.bias"):
            alexnet(given, width=NARROW)

    def test_rounding_is_said(self, state: State) -> None:
        with pytest.warns(UserWarning, match=r"holds weights in torch.float64, which become torch.float32"):
            alexnet({key: value.double() for key, value in state.items()}, width=NARROW)

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_programs(self, tmp_path: Path) -> None:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "x.pt"))
        self.refuses(tmp_path / "x.pt", "it is a program .*: save the model's state_dict instead")

    def test_no_regular_file(self, tmp_path: Path) -> None:
        import os

        os.mkfifo(tmp_path / "pipe")
        self.refuses(tmp_path / "pipe", "it is not a regular file")


class TestNetworks:
    """load_network, evaluate, predict and convert with weights that were trained elsewhere."""

    @pytest.fixture(autouse=True)
    def _trainer(self) -> None:
        pytest.importorskip("lightning")
        pytest.importorskip("safetensors")

    @staticmethod
    def load(path: Path, **options: Any) -> Any:
        from alexnet_kernels.training.checkpoint import load_network

        return load_network(path, **options)

    def test_a_header_is_made_up(self, tmp_path: Path) -> None:
        model = trained(AlexNet(1000, "torchvision", width=NARROW))
        torch.save({"state_dict": under("module.", model.state_dict())}, tmp_path / "x.pth.tar")
        network = self.load(tmp_path / "x.pth.tar")
        assert network.header.origin["format"] == "torch.save, under state_dict.module"
        assert (network.model.preset, network.header.settings.width, network.header.stored_size) == (
            "torchvision",
            0.1,
            256,
        )
        assert network.header.classes == list(weights_module.imagenet_classes())
        assert not network.model.training
        pixels = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
        expected = normalized(pixels.permute(0, 3, 1, 2)[..., 16:240, 16:240], TORCHVISION)
        torch.testing.assert_close(network.crops.centre(pixels), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(network.model(expected), model.eval()(expected), rtol=1e-3, atol=1e-4)
        assert [note.split(":")[0] for note in network.notes] == [
            "the file names no classes",
            "the file does not say how pixels were normalised",
        ]

    def test_mean_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of the stored squares and of the crops."""
        model = trained(AlexNet(2, "caffe", width=NARROW))
        for side in (256, 226):
            image = torch.rand(3, side, side) * 255
            said = Preprocessing(image, None, 256)
            found = FileWeights(
                "other", model.state_dict(), PRESETS["caffe"], preprocessing=said, arguments={"width": NARROW}
            )
            reader = SimpleNamespace(recognises=lambda head, path: True, read=lambda path, found=found: found)
            monkeypatch.setattr(detect, "READERS", (reader,))
            (tmp_path / "x.caffemodel").write_bytes(b"other")
            network = self.load(tmp_path / "x.caffemodel")
            pixels = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)
            crop = network.crops.centre(pixels)
            assert crop.shape == (1, 3, 227, 227)
            rest = pixels.permute(0, 3, 1, 2)[..., 14:241, 14:241].float() - crop
            place = slice(60 + (14 - (256 - side) // 2), 160 + (14 - (256 - side) // 2))
            torch.testing.assert_close(rest[0, :, 60:160, 60:160], image[:, place, place], rtol=0, atol=1e-3)

    @pytest.mark.parametrize(
        ("preset", "dtype"),
        [("torchvision", torch.float32), ("as_run", torch.bfloat16), ("batchnorm", torch.float16)],
        ids=str,
    )
    def test_round_trips(self, preset: str, dtype: torch.dtype, tmp_path: Path, capsys: Any) -> None:
        from alexnet_kernels.cli import main

        pytest.importorskip("huggingface_hub")
        state = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in trained(AlexNet(4, preset, width=NARROW)).state_dict().items()
        }
        source = tmp_path / "x.tar"
        torch.save({"net": state}, source)
        for name in ("a.safetensors", "b.pt", "folder", "c.pth"):
            assert main(["convert", str(source), str(tmp_path / name)]) == 0
            said = capsys.readouterr().out
            assert f"preset {preset}, width 0.1, 4 classes" in said or source.suffix == ".safetensors"
            source = tmp_path / name
            found, _ = read_weights(source)
            assert found.tensors.keys() == state.keys()
            for key, value in found.tensors.items():
                assert value.dtype == state[key].dtype, key
                assert torch.equal(value, state[key]), key
        network = self.load(tmp_path / "a.safetensors")
        assert {value.dtype for value in network.model.parameters()} == {torch.float32}
        assert network.header.origin["format"] == "torch.save, under net"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.pt", "c.pth", "folder", "x.tar"]

    @pytest.mark.filterwarnings("ignore:.*(channels are BGR|has no dropout|channels were BGR)")
    def test_onnx(self, tmp_path: Path, capsys: Any) -> None:
        pytest.importorskip("onnx")
        from alexnet_kernels.cli import main

        model = trained(AlexNet(4, "caffenet", width=NARROW))
        model.classes, model.preprocessing = ("a", "b", "c", "d"), CAFFE
        torch.save(model.state_dict(), tmp_path / "x.pth")
        options = ["--preset", "caffenet", "--channels", "BGR"]
        assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "x.onnx"), *options]) == 0
        assert main(["convert", str(tmp_path / "x.onnx"), str(tmp_path / "y.safetensors")]) == 0
        capsys.readouterr()
        for path in (tmp_path / "x.onnx", tmp_path / "y.safetensors"):
            found = alexnet(path)
            assert found.features[3].size == 5
            assert torch.equal(found.preprocessing.mean, CAFFE.mean)
            for key, value in found.state_dict().items():
                assert torch.equal(value, model.state_dict()[key]), key
        assert main(["convert", str(tmp_path / "y.safetensors"), str(tmp_path / "bgr.pth"), *options[2:]]) == 0
        flipped = torch.load(tmp_path / "bgr.pth", weights_only=True)["features.0.weight"]
        assert torch.equal(flipped.flip(1), model.state_dict()["features.0.weight"])
        assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "z.safetensors"), *options]) == 2

    def test_presets_of_one_shape(self, tmp_path: Path, capsys: Any) -> None:
        from alexnet_kernels.cli import main

        torch.save(AlexNet(4, "caffenet", width=NARROW).state_dict(), tmp_path / "x.pth")
        with pytest.raises(InputError, match=r"presets paper, caffe, caffenet have alike.*convert --preset"):
            self.load(tmp_path / "x.pth")
        out = tmp_path / "x.safetensors"
        assert main(["convert", str(tmp_path / "x.pth"), str(out), "--preset", "caffenet"]) == 0
        said = capsys.readouterr().out
        assert "Caffe's mean" in said
        assert "all layers hold initial values: the weights are untrained" in said
        network = self.load(out)
        assert network.model.preset == "caffenet"
        assert alexnet(out).preset == "caffenet"
        assert main(["convert", str(out), str(tmp_path / "y.pth"), "--preset", "paper"]) == 2

    def test_evaluate_and_predict(self, tmp_path: Path, capsys: Any) -> None:
        from runs import shipped_images

        from alexnet_kernels.cli import main

        data = shipped_images(tmp_path / "data", ("cat", "frog", "ship"), train=1, val=2)
        model = trained(AlexNet(3, "batchnorm", width=0.04))
        model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 3)
        torch.save(model.state_dict(), tmp_path / "x.pth")
        assert main(["evaluate", str(tmp_path / "x.pth")]) == 2
        assert "give --data" in capsys.readouterr().err
        assert main(["evaluate", str(tmp_path / "x.pth"), "--data", str(data)]) == 0
        said = capsys.readouterr().out
        assert said.count("fc8 holds initial values") == 1
        assert "its classes are taken in their order" in said
        assert "of 6 images, 1 crop, preset batchnorm" in said
        assert main(["predict", str(tmp_path / "x.pth"), str(next(data.rglob("*.png"))), "--json"]) == 0
        captured = capsys.readouterr()
        assert {row["class"] for row in json.loads(captured.out)[0]["classes"]} == {"0", "1", "2"}
        assert captured.err.count("note: ") == 3

    @pytest.mark.parametrize("kind", ["text", "features", "nothing", "gray"])
    def test_mistakes(self, kind: str, tmp_path: Path, capsys: Any) -> None:
        from alexnet_kernels.cli import main

        state = AlexNet(3, "torchvision", width=0.04, in_channels=1 if kind == "gray" else 3).state_dict()
        path = tmp_path / "x.pth"
        if kind == "text":
            path.write_text("not weights")
        else:
            torch.save({"features": {k: v for k, v in state.items() if k.startswith("features.")}, "nothing": {},
                        "gray": state}[kind], path)  # fmt: skip
        reasons = {
            "text": "is no file of weights",
            "features": "missing classifier",
            "nothing": "no weights of AlexNet",
            "gray": "1 channels, not RGB",
        }
        assert main(["convert", str(path), str(tmp_path / "y.safetensors")]) == 2
        said = capsys.readouterr().err
        assert reasons[kind] in said
        assert said.count("\n") == 1
        assert not (tmp_path / "y.safetensors").exists()

    def test_own_checkpoints_say_their_network(self, tmp_path: Path) -> None:
        from runs import shipped_images, train

        from alexnet_kernels.training.settings import settings_of

        data = shipped_images(tmp_path / "data", ("cat", "ship"), train=2, val=1)
        small: dict[str, Any] = {"epochs": 1, "warmup": 0.0, "batch_size": 2, "image_size": 64, "width": 0.04}
        network = {"preset": "batchnorm", "pooling": "overlapping", "dropout": 0.25}
        settings = settings_of("quick", precision="32", **small, **network)
        folder = train(settings, data, out=tmp_path / "run").folder
        model = alexnet(folder / "best.ckpt")
        network = self.load(folder)
        assert network.header.origin is None
        assert network.notes == ()
        assert (model.preset, model.classes) == ("batchnorm", ("cat", "ship"))
        assert model.features[3].kernel_size == 3
        assert model.classifier[2].p == 0.25
        for key, value in network.model.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)

    def test_nothing_is_left_of_a_failed_conversion(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from alexnet_kernels.training import exporting

        torch.save(trained(AlexNet(3, "torchvision", width=0.04)).state_dict(), tmp_path / "x.pth")
        network = self.load(tmp_path / "x.pth")

        def full(*arguments: Any, **options: Any) -> None:
            raise RuntimeError("unexpected pos 64 vs 0")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(RunError, match=r"y\.pth could not be written"):
            exporting.write(network, tmp_path / "y.pth")
        assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
