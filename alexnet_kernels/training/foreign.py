"""Weights that no run of this package trained, as a network with a header for evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from alexnet_kernels._errors import InputError, first_line
from alexnet_kernels.models import PRESETS, AlexNet, config_of
from alexnet_kernels.models.fit import Fit, fits_of, load_state, network_of, not_finite
from alexnet_kernels.models.formats import FileWeights
from alexnet_kernels.models.formats.preprocessing import TORCHVISION, usual
from alexnet_kernels.models.untrained import untrained_layers, untrained_note
from alexnet_kernels.models.weights import imagenet_classes, read_weights
from alexnet_kernels.training.augmentation import Statistics, stored_size
from alexnet_kernels.training.header import Header
from alexnet_kernels.training.settings import Settings

__all__ = ["describe", "read_foreign"]

_LARGEST = 4096
"""Side of the largest stored squares, in pixels."""


def read_foreign(
    path: str | Path, preset: str | None = None, part: str | None = None
) -> tuple[AlexNet, Header, dict[str, Tensor], list[str]]:
    """(the network without values, its header, its state_dict, notes for the user) of a file of weights.

    path: as of `alexnet`. preset: a name of `PRESETS`, for weights that several presets fit. part: as of
    `read_weights`. The state_dict has the file's dtypes. Raises InputError for weights that can't be read or do not
    fit, MissingPackage.
    """
    try:
        found, name = read_weights(str(path), part=part)
        arguments = _arguments(found, name, preset)
        state = load_state(found, name, arguments, strict=True)
        model = AlexNet(**{**arguments, "device": "meta"})
    except InputError:
        raise
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise InputError(first_line(error)) from error
    notes = list(found.notes)
    spec, outputs = model._spec, arguments["num_classes"]
    if arguments.get("in_channels", 3) != 3:
        raise InputError(f"{name} is of a network for images of {arguments['in_channels']} channels, not RGB")
    model.classes, note = _classes(found, outputs)
    notes.append(note)
    model.preprocessing = found.preprocessing
    if found.preprocessing is None:
        model.preprocessing = usual(spec)
        kind = "torchvision's" if model.preprocessing is TORCHVISION else "Caffe's"
        notes.append(f"the file does not say how pixels were normalised: {kind} mean and scale are taken")
    header = _header(model, found.format, notes)
    notes.append(not_finite(state))
    return model, header, state, [note for note in notes if note]


def describe(model: AlexNet) -> str:
    """A line for the user about layers that hold initial values, else empty."""
    return untrained_note(untrained_layers(model))


def _arguments(found: FileWeights, name: str, preset: str | None) -> dict[str, Any]:
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if found.preset is not None:
        return network_of(found, **({} if preset is None else {"preset": preset}))
    fits = [fit for fit in fits_of(found.tensors, **found.arguments) if preset in (None, fit.preset.name)]
    if len(fits) > 1:
        names = ", ".join(fit.preset.name for fit in fits)
        raise InputError(
            f"{name} has shapes that presets {names} have alike, and does not say which: `alexnet-kernels convert "
            "--preset` does"
        )
    return network_of(found, **(_of(fits[0]) if fits else {} if preset is None else {"preset": preset}))


def _of(fit: Fit) -> dict[str, Any]:
    channels = {} if fit.in_channels == 3 else {"in_channels": fit.in_channels}
    return {"preset": fit.preset, "width": fit.width, "num_classes": fit.num_classes, **channels}


def _classes(found: FileWeights, outputs: int) -> tuple[tuple[str, ...], str]:
    if found.classes is not None and len(found.classes) == outputs:
        return found.classes, ""
    if outputs == 1000:
        names = imagenet_classes()
        kind = "numbers" if names[0] == "0" else "ImageNet's, as torchvision has them"
        return names, f"the file names no classes: they are {kind}"
    return tuple(map(str, range(outputs))), "the file names no classes: they are numbers"


def _header(model: AlexNet, format: str, notes: list[str]) -> Header:
    spec, said = model._spec, model.preprocessing
    assert said is not None  # as `read_foreign` has set it
    side = max(said.resize or stored_size(spec.input_size), model.input_size)
    if side > _LARGEST:
        raise InputError(f"its images are of {side} x {side} pixels, more than {_LARGEST}")
    mean = said.mean.float()
    image = None
    if mean.dim() == 3:
        image = _mean_image(mean, side)
        if image is None:
            notes.append(
                f"a mean image of {mean.shape[1]} x {mean.shape[2]} can't be laid over {side} x {side}: each "
                "channel's mean is subtracted"
            )
    channels = mean.flatten(1).mean(1) if mean.dim() == 3 else mean
    std = (1.0, 1.0, 1.0) if said.std is None else tuple(said.std.tolist())
    statistics = Statistics(
        tuple(channels.tolist()),
        std,
        ((0.0,) * 3,) * 3,
        channels[:, None, None].expand(3, side, side).contiguous() if image is None else image,
    )
    built: dict[str, Any] = model._built
    settings = Settings(
        preset=spec.name if spec.name in PRESETS else "paper",
        width=built["width"],
        dropout=built["dropout"],
        image_size=model.input_size,
        mean="channel" if image is None else "image",
        color_shift=0.0,
        epochs=1,
        batch_size=1,
        lr=1.0,
        schedule="constant",
        precision="32",
    )
    origin = {"format": format, "config": config_of(model)}
    return Header(settings, list(model.classes or ()), statistics, "", 0, "", side, origin=origin)


def _mean_image(mean: Tensor, side: int) -> Tensor | None:
    """The mean image of the stored squares; one of the crops' size is continued at its edges. None: neither fits."""
    height, width = mean.shape[1:]
    if height != width or height > side or (side - height) % 2:
        return None
    return F.pad(mean[None], ((side - height) // 2,) * 4, mode="replicate")[0].contiguous()
