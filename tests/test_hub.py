"""AlexNet.save_pretrained, from_pretrained and push_to_hub: folders, a fake of the Hub, hostile configs."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("huggingface_hub", reason="of the extra `weights`")
pytest.importorskip("safetensors", reason="of the extra `weights`")

import huggingface_hub
from huggingface_hub import errors
from runs import environment

from alexnet_kernels import AlexNet, alexnet, unfuse
from alexnet_kernels._errors import InputError
from alexnet_kernels.models import ONNX_ZOO, PRESETS, config_of, model_of
from alexnet_kernels.models.config import description_of
from alexnet_kernels.models.formats.file_weights import Preprocessing

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def small(preset: Any = "torchvision", **arguments: Any) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(**{"num_classes": 5, "preset": preset, "width": 0.05, **arguments})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = small()
    model.classes = ["a", "b", "c", "d", "é"]
    model.preprocessing = Preprocessing(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]), 256)
    model.save_pretrained(folder)
    return folder


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize(
    ("preset", "arguments"),
    [
        *((name, {}) for name in PRESETS),
        (ONNX_ZOO, {}),
        (replace(PRESETS["paper"], name="mine", activation="tanh", neurons=2048), {}),
        ("paper", {"conv1_padding": (0, 3, 0, 3), "in_channels": 1, "dropout": 0.25, "dtype": torch.bfloat16}),
    ],
)
def test_a_config_builds_the_same_network(preset: Any, arguments: dict[str, Any]) -> None:
    model = small(preset, **arguments).eval()
    config = json.loads(json.dumps(config_of(unfuse(model))))
    built = model_of(config, dtype=arguments.get("dtype")).eval()
    assert config_of(built) == config_of(model)
    built.load_state_dict(model.state_dict())
    size = model.input_size // 2
    x = torch.randn(1, arguments.get("in_channels", 3), size, size, dtype=arguments.get("dtype"))
    with torch.no_grad():
        torch.testing.assert_close(built(x), model(x))
    assert isinstance(config["preset"], dict) == (config.get("preset") not in tuple(PRESETS))


def test_a_folder_gives_the_model_back(saved: Path) -> None:
    model = AlexNet.from_pretrained(saved)
    assert type(model) is AlexNet
    assert not model.training
    assert same_weights(model, small())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.classes == ("a", "b", "c", "d", "é")
    assert model.preprocessing is not None
    assert model.preprocessing.mean.tolist() == [1, 2, 3]
    assert model.preprocessing.resize == 256
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (saved / "README.md").read_text()
    assert "library_name: alexnet_kernels" in card
    assert "preset torchvision, 5 classes" in card


def test_dtypes_and_a_mean_image_are_kept(tmp_path: Path) -> None:
    model = small("batchnorm").half()
    model.features[0].float()
    model.preprocessing = Preprocessing(torch.rand(3, 8, 8))
    model.save_pretrained(tmp_path)
    loaded = AlexNet.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert loaded.preprocessing is not None
    assert torch.equal(loaded.preprocessing.mean, model.preprocessing.mean)


def test_a_subclass_gives_the_subclass(saved: Path) -> None:
    class Mine(AlexNet):
        pass

    model = Mine.from_pretrained(saved)
    assert type(model) is Mine
    assert config_of(model)["preset"] == "torchvision"


def test_a_model_is_not_replaced_unasked(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    model = small(num_classes=3)
    with pytest.raises(InputError, match="exists: name another folder, or pass overwrite=True"):
        model.save_pretrained(tmp_path / "model")
    assert same_weights(AlexNet.from_pretrained(tmp_path / "model"), small())
    model.save_pretrained(tmp_path / "model", overwrite=True)
    assert same_weights(AlexNet.from_pretrained(tmp_path / "model"), model)
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


def test_replaced_layers_that_a_config_can_describe(tmp_path: Path) -> None:
    model = small()
    model.classifier[-1] = nn.Linear(model.classifier[-1].in_features, 7)
    model.features[0] = nn.Conv2d(1, model.features[0].out_channels, 11, 4, 2)
    model.save_pretrained(tmp_path)
    loaded = AlexNet.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert loaded(torch.randn(1, 1, 64, 64)).shape == (1, 7)


CHANGES: dict[str, tuple[Callable[[AlexNet], Any], str]] = {
    "identity": (lambda m: m.classifier.__setitem__(-1, nn.Identity()), r"classifier.6 is Identity\(\)"),
    "conv": (lambda m: m.features.__setitem__(3, nn.Conv2d(8, 8, 3)), r"features.3 is Conv2d\(8, 8"),
    "no bias": (lambda m: m.classifier.__setitem__(-1, nn.Linear(208, 5, bias=False)), "bias=False"),
    "aux": (lambda m: m.add_module("aux", nn.Linear(2, 2)), r"aux is Linear.* has no layer there"),
    "spectral": (lambda m: nn.utils.parametrizations.weight_norm(m.classifier[1]), "classifier.1 is Parametrized"),
    "pool": (lambda m: setattr(m.features[2], "ceil_mode", True), "features.2 is MaxPool2d"),
    "frozen": (lambda m: setattr(m, "classes", ["x"]), "model.classes names 1 classes, the last layer has 5"),
    "meta": (lambda m: m.to("meta"), "not a plain dense tensor with values"),
    "tied": (lambda m: setattr(m.features[8], "bias", m.features[10].bias), "are one tensor"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_can_not_be_described_says_so(change: str, tmp_path: Path) -> None:
    model = small()
    make, message = CHANGES[change]
    make(model)
    with pytest.raises(InputError, match=message) as found:
        model.save_pretrained(tmp_path / "new")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "new").exists()


def test_overrides_that_keep_the_network(saved: Path) -> None:
    model = AlexNet.from_pretrained(saved, dropout=0.1, width=0.05, num_classes=5)
    assert model.classifier[0].p == 0.1
    for given in ({"preset": "batchnorm"}, {"width": 1.0}, {"in_channels": 1}):
        with pytest.raises(InputError, match="is another network than the saved one"):
            AlexNet.from_pretrained(saved, **given)
    with pytest.raises(InputError, match="has 5 classes, not 9: strict=False gives the network a new last layer"):
        AlexNet.from_pretrained(saved, num_classes=9)
    with pytest.warns(UserWarning, match="missing classifier.6.weight, classifier.6.bias"):
        model = AlexNet.from_pretrained(saved, num_classes=9, strict=False)
    assert model.classifier[-1].out_features == 9
    assert model.classes is None
    assert torch.equal(model.features[0].weight, small().features[0].weight)
    with pytest.raises(TypeError, match="not colour"):
        AlexNet.from_pretrained(saved, colour=1)


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the saved folder with values of its config replaced, or another text in its place."""

    def write(text: str | None = None, **values: Any) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}) if text is None else text)
        return folder

    return write


FIELDS = config_of(AlexNet(5, replace(PRESETS["torchvision"], name="own"), width=0.05, device="meta"))["preset"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "[" * 100_000}, "is not a readable config"),
        ({"text": "{"}, "is not a readable config"),
        ({"text": '{"preset": NaN}'}, "it has a NaN"),
        ({"text": '{"num_classes": ' + "9" * 5000 + "}"}, "is not a readable config"),
        ({"text": "[1]"}, "of type list, not an object"),
        ({"text": '{"architecture": "alexnet"}'}, "unknown keys architecture: it is another's"),
        ({"text": "{}"}, "names no preset"),
        ({"new_field": 1, "alexnet_kernels": "9.1"}, "unknown keys new_field: it was written by version 9.1"),
        ({"preset": "vgg"}, "preset vgg is none of paper"),
        ({"preset": {"name": "x"}}, "preset has no source"),
        ({"preset": {**FIELDS, "code": 1}}, "preset has the unknown keys code"),
        ({"preset": {**FIELDS, "layers": ["relu " * 100_000] * 5}}, "are more than 16"),
        ({"preset": {**FIELDS, "layers": ["eval", *FIELDS["layers"][1:]]}}, "names 'eval' in layer 1"),
        ({"preset": {**FIELDS, "groups": 1 << 40}}, "groups 1099511627776 is not a whole number"),
        ({"preset": {**FIELDS, "filters": [1 << 20] * 5}, "width": 1e9}, "width 1e"),
        ({"num_classes": True}, "num_classes True is not a whole number"),
        ({"num_classes": 1 << 19}, "of another shape|names 5 classes"),
        ({"dropout": "x"}, "dropout x is not a finite number"),
        ({"dropout": 2}, "is not in"),
        ({"conv1_padding": [1, 2]}, "conv1_padding is not a list of 4"),
        ({"classes": [["a"]] * 5}, "not a list of names"),
        ({"preprocessing": {"std": [1, 1, 1]}}, "preprocessing has no mean"),
        ({"preprocessing": {"mean": {"shape": [3, 4096, 4096], "float32": "AAAA"}}}, "can't be decoded"),
        ({"preprocessing": {"mean": {"shape": [3, 4096, 4096], "float32": "AAAAAA=="}}}, "mean image is not of 3"),
        ({"in_channels": 4}, "std is not a list|mean is not a list of 4"),
        ({"preprocessing": None, "in_channels": 4}, "of another shape features.0.weight"),
    ],
)
def test_a_hostile_config_is_one_clear_line(
    values: dict[str, Any], message: str, broken: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as found:
        AlexNet.from_pretrained(broken(**values))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600 + len(str(tmp_path))


def test_files_that_are_missing_or_damaged(saved: Path, broken: Callable[..., Path], tmp_path: Path) -> None:
    folder = broken()
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json: pass preset="):
        AlexNet.from_pretrained(folder)
    model = AlexNet.from_pretrained(folder, preset="torchvision", width=0.05, num_classes=5)
    assert same_weights(model, small())
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model.safetensors can't be read: it does not have its checksum"):
        AlexNet.from_pretrained(folder, preset="torchvision")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model.safetensors"):
        AlexNet.from_pretrained(folder, preset="torchvision")
    for name in ("./none", "a/b/c", str(tmp_path / "none"), "../none"):
        with pytest.raises(InputError, match="neither a folder that exists nor the name"):
            AlexNet.from_pretrained(name)


@pytest.mark.parametrize("read", [AlexNet.from_pretrained, alexnet])
def test_a_config_whose_link_leads_nowhere(read: Callable[..., Any], saved: Path, tmp_path: Path) -> None:
    """As in a cache of the Hub that lost a file: the weights are not read as those of another network."""
    shutil.copytree(saved, tmp_path / "x")
    (tmp_path / "x" / "config.json").unlink()
    (tmp_path / "x" / "config.json").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"config\.json.*No such file") as caught:
        read(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_a_repository(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    snapshot = tmp_path / "snapshots" / COMMIT
    shutil.copytree(saved, snapshot)

    def download(**options: Any) -> str:
        calls.append(options)
        if options["repo_id"] == "me/away":
            raise errors.LocalEntryNotFoundError("the connection failed")
        if not (path := snapshot / options["filename"]).exists():
            raise errors.EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    given = {"token": "secret", "cache_dir": tmp_path, "local_files_only": True, "force_download": True}
    model = AlexNet.from_pretrained("me/alexnet", revision="main", **given)
    assert same_weights(model, small())
    assert [call["filename"] for call in calls] == ["config.json", "model.safetensors"]
    assert [call["revision"] for call in calls] == ["main", COMMIT]
    assert all(call["repo_id"] == "me/alexnet" and given.items() <= call.items() for call in calls)
    with pytest.raises(errors.LocalEntryNotFoundError, match="the connection failed"):
        AlexNet.from_pretrained("me/away")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "pytorch_model.bin").write_bytes(b"hostile")
    with pytest.raises(InputError, match=r"has no model.safetensors, other files are not read"):
        AlexNet.from_pretrained("me/alexnet")


def test_pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pushed["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            pushed["created"] = options
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            pushed.update(options)
            shutil.copytree(folder_path, tmp_path / "repository")
            return "https://commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = small()
    assert model.push_to_hub("me/alexnet", token="t", private=True, branch="dev") == "https://commit"
    assert pushed["token"] == "t"
    assert (pushed["repo_id"], pushed["revision"]) == ("me/alexnet", "dev")
    assert pushed["created"]["private"] is True
    assert same_weights(AlexNet.from_pretrained(tmp_path / "repository"), model)
    assert 'AlexNet.from_pretrained("me/alexnet")' in (tmp_path / "repository" / "README.md").read_text()
    shutil.rmtree(tmp_path / "repository")
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/other", commit_message="new")
    assert (pushed["repo_id"], pushed["commit_message"]) == ("me/other", "new")


@pytest.mark.filterwarnings("ignore:`torch.jit:")
def test_a_model_with_names_leaves_pytorch(saved: Path) -> None:
    model, x = AlexNet.from_pretrained(saved), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for left in (torch.jit.script(model), torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
            torch.testing.assert_close(left(x), expected)
    assert copy.deepcopy(model).classes == model.classes


def test_importing_the_package_needs_no_hub(tmp_path: Path, saved: Path) -> None:
    program = f"""
import sys
sys.modules["huggingface_hub"] = None
from alexnet_kernels import AlexNet
assert AlexNet.__bases__[0].__name__ == "Module"
AlexNet.from_pretrained({str(saved)!r})
try:
    AlexNet.from_pretrained("me/alexnet")
except ImportError as error:
    assert "needs huggingface_hub" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=environment(), cwd=tmp_path)


def test_a_description_of_no_mapping() -> None:
    with pytest.raises(InputError, match="the config is null, not an object"):
        description_of(None)
