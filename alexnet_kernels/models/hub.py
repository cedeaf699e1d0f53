"""Folders and repositories of models in the way of the Hugging Face Hub: model.safetensors and config.json.

The methods of `AlexNet` come here with their class. The mixin of huggingface_hub, an optional package, is subclassed on
first use, so that AlexNet's bases do not depend on what is installed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from alexnet_kernels._checksum import serialize_safetensors
from alexnet_kernels._errors import InputError, first_line, require, shortened
from alexnet_kernels._files import atomic_file, read_bounded, write_atomically
from alexnet_kernels.models.config import ARGUMENTS, Description, config_of, description_of
from alexnet_kernels.models.formats.arrays import read_safetensors
from alexnet_kernels.models.keys import check_dtypes, difference

__all__ = ["CONFIG", "WEIGHTS", "from_pretrained", "push_to_hub", "read_config", "save_pretrained"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_LARGEST_CONFIG = 64 << 20
"""Bytes: a mean image of 2048 x 2048."""
_OVERRIDES = ("dropout", "conv1_padding", "num_classes")
"""Arguments that may differ from the config's: the others would give another network for the same weights."""

_TEMPLATE = """---
{{ card_data }}
---

# AlexNet, preset {{ preset }}, {{ num_classes }} classes

```python
from alexnet_kernels import AlexNet

model = AlexNet.from_pretrained("{{ repo_id | default("<this repository>", true) }}")
```

`config.json` describes the network, its classes and what it expects of images; `model.safetensors` holds the weights.

- Code: {{ repo_url | default("[More Information Needed]", true) }}
- Paper: https://papers.nips.cc/paper/2012/hash/c399862d3b9d6b76c8436e924a68c45b-Abstract.html
- Training data: {{ training_data | default("[More Information Needed]", true) }}
- Evaluation: {{ evaluation | default("[More Information Needed]", true) }}
"""


def from_pretrained(
    network: Any,
    name: str | Path,
    *,
    map_location: Any,
    strict: bool,
    download: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> Any:
    """`AlexNet.from_pretrained` for the class `network`; download: keyword arguments of hf_hub_download."""
    folder = Path(name)
    if folder.is_dir():
        where, config_path, weights_path = str(name), folder / CONFIG, folder / WEIGHTS
        config = read_config(config_path) if os.path.lexists(config_path) else None
        if not weights_path.exists():
            raise InputError(f"{name} has no {WEIGHTS}: it is not a folder of AlexNet.save_pretrained")
    else:
        where = f"repository {name}"
        config, weights_path = _download(str(name), download)
    with _named(where):
        description, new_head = _description(config, arguments)
    if new_head and strict:
        raise InputError(
            f"{where} has {new_head} classes, not {description.arguments['num_classes']}: strict=False gives the "
            "network a new last layer"
        )
    state = _weights(weights_path, where)
    try:
        model = network(**description.arguments, device=None if not strict else "meta")
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{where} does not describe an AlexNet: {first_line(error)}") from error
    _fill(model, state, where, strict, bool(new_head))
    model.classes, model.preprocessing = description.classes, description.preprocessing
    return model.to(map_location).eval()


def _download(name: str, download: Mapping[str, Any]) -> tuple[Any, Path]:
    """The config, None if there is none, and the path of the weights, of one commit."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise InputError(f"{shortened(name)} is neither a folder that exists nor the name of a repository, owner/name")
    require(f"the repository {name}", "huggingface_hub", "safetensors", extra="weights")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    config, revision = None, download.get("revision")
    try:
        path = huggingface_hub.hf_hub_download(repo_id=name, filename=CONFIG, **download)
        config = read_config(path)
        # A branch may move between two downloads.
        commit = Path(path).parent.name
        revision = commit if re.fullmatch("[0-9a-f]{40}", commit) else revision
    except LocalEntryNotFoundError:  # offline, and not in the cache
        raise
    except EntryNotFoundError:
        pass
    try:
        weights = huggingface_hub.hf_hub_download(repo_id=name, filename=WEIGHTS, **{**download, "revision": revision})
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise InputError(f"repository {name} has no {WEIGHTS}, other files are not read") from error
    return config, Path(weights)


def read_config(path: str | Path) -> Any:
    """The values of a config.json. InputError if it can't be read, is too large or no JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it has a {constant}")

    try:
        return json.loads(read_bounded(path, _LARGEST_CONFIG), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        reason = shortened(first_line(error))
        raise InputError(f"{str(path)!r} can't be read: it is not a readable config ({reason})") from error


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of the file at the head of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _description(config: Any, given: Mapping[str, Any]) -> tuple[Description, int]:
    """What to build, and the weights' number of classes if that is another, else 0."""
    if unknown := [name for name in given if name not in ARGUMENTS]:
        raise TypeError(f"from_pretrained takes the arguments {', '.join(ARGUMENTS)} of AlexNet, not {unknown[0]}")
    if config is None:
        if "preset" not in given:
            raise InputError(f"it has no {CONFIG}: pass preset=, and what else of {', '.join(ARGUMENTS)} differs")
        return description_of(given), 0
    saved = description_of(config)
    own = saved.arguments
    asked = description_of({**own, **given}).arguments
    for name in given:
        if name not in _OVERRIDES and asked[name] != own[name]:
            shown = [value.name if name == "preset" else value for value in (own[name], asked[name])]
            raise InputError(
                f"{name}={shown[1]!r} is another network than the saved one, which has {shown[0]!r}; "
                f"only {', '.join(_OVERRIDES)} may differ"
            )
    if asked["num_classes"] == own["num_classes"]:
        return Description(asked, saved.classes, saved.preprocessing), 0
    return Description(asked, None, saved.preprocessing), own["num_classes"]


def _weights(path: Path, where: str) -> dict[str, Tensor]:
    try:
        state, _ = read_safetensors(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {path.name} can't be read: {first_line(error)}") from error
    check_dtypes(state, where)
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], where: str, strict: bool, new_head: bool) -> None:
    """Load the weights, with their dtypes."""
    expected = model.state_dict()
    if new_head:
        for key in list(expected)[-2:]:
            state.pop(key, None)
    differs = difference(state, {key: value.shape for key, value in expected.items()})
    if differs.wrong or (differs and strict):
        raise InputError(f"{where} does not hold the weights of its network: {differs}")
    if differs:
        warnings.warn(f"{where}: {differs}; what is missing keeps its initial values", stacklevel=4)
    model.load_state_dict(state, strict=False, assign=True)
    # New layers take the dtype of the loaded ones.
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if differs.missing and len(dtypes) == 1:
        model.to(dtypes.pop())


def save_pretrained(model: Any, folder: str | Path, *, overwrite: bool, push: bool, **options: Any) -> Any:
    """`AlexNet.save_pretrained`."""
    folder = Path(folder)
    if not overwrite and (found := [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]):
        raise InputError(f"{folder / found[0]} exists: name another folder, or pass overwrite=True")
    hub = _hub_model(model)
    return hub.save_pretrained(folder, push_to_hub=push, **_with_card(hub.values, options.get("repo_id"), options))


def push_to_hub(model: Any, repo_id: str, **options: Any) -> str:
    """`AlexNet.push_to_hub`."""
    hub = _hub_model(model)
    return hub.push_to_hub(repo_id, **_with_card(hub.values, repo_id, options))


def _with_card(config: Mapping[str, Any], repo_id: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with the values of the model card."""
    preset = config["preset"] if isinstance(config["preset"], str) else config["preset"]["name"]
    card = {"preset": preset, "num_classes": config["num_classes"], "repo_id": repo_id}
    return {**options, "model_card_kwargs": {**card, **(options.get("model_card_kwargs") or {})}}


def _hub_model(model: Any) -> Any:
    require("saving for the Hub", "huggingface_hub", "safetensors", extra="weights")
    state = model.state_dict()
    places: dict[tuple[int, int], str] = {}
    for key, value in state.items():
        if value.is_meta or value.layout != torch.strided or type(value) is not Tensor:
            raise InputError(f"{key} is not a plain dense tensor with values, and can't be saved")
        place = value.data_ptr(), value.numel()
        if value.numel() and places.setdefault(place, key) != key:
            raise InputError(f"{key} and {places[place]} are one tensor, which {WEIGHTS} can't hold twice")
    return _mixin()(config_of(model), state)


@functools.cache
def _mixin() -> type:
    """The Hub's mixin, around a config and a state_dict."""
    from huggingface_hub import PyTorchModelHubMixin

    class AlexNetOnHub(  # type: ignore[misc, call-arg]
        PyTorchModelHubMixin,
        library_name="alexnet_kernels",
        pipeline_tag="image-classification",
        model_card_template=_TEMPLATE,
        tags=["alexnet", "pytorch"],
    ):
        def __init__(self, values: dict[str, Any], state: dict[str, Tensor]) -> None:
            self.values, self.state = values, state
            self._hub_mixin_config = values

        def _save_pretrained(self, save_directory: Path) -> None:
            tensors = {key: value.detach().cpu().contiguous() for key, value in self.state.items()}
            with atomic_file(save_directory / WEIGHTS) as file:
                file.write(serialize_safetensors(tensors, {"format": "pt"}))
            # Written last: a folder with it is complete.
            write_atomically(save_directory / CONFIG, json.dumps(self.values, sort_keys=True, indent=2) + os.linesep)

    return AlexNetOnHub
