"""The AlexNet module."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from alexnet_kernels._dispatch.checks import is_plain
from alexnet_kernels._errors import InputError, TensorValueError, first_line
from alexnet_kernels._torch_private import is_leaving, is_seen
from alexnet_kernels.models import hub
from alexnet_kernels.models.config import description_of
from alexnet_kernels.models.formats.file_weights import Preprocessing
from alexnet_kernels.models.presets import PRESETS, Preset
from alexnet_kernels.nn import Dropout, FusedSequential, LocalResponseNorm, WithinMapResponseNorm
from alexnet_kernels.nn.originals import foreign_mode, replaced

__all__ = ["AlexNet", "model_of"]

A = TypeVar("A", bound="AlexNet")
_CONVOLUTIONS = 5
_CONV_SHAPES = (
    {"kernel_size": 11, "stride": 4},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1},
)
_IN_TOWERS = (False, True, False, True, True)
"""Whether a convolution sees only its own tower's channels."""


class AlexNet(nn.Module):
    """AlexNet: five convolutions and three fully-connected layers.

    Input: images [N, in_channels, H, W] of the parameters' dtype (float32, bfloat16, float16 or float64; any of them
    under autocast), NCHW or channels_last, which is faster. Output: logits [N, num_classes]. H and W may have any value
    from `min_size` on: `avgpool` brings the last pool's maps to 6 x 6.

    conv1's output is 55 x 55, that of the later layers 27, 13, 13, 13 and, after the last pool, 6, for an input of:

    - 224 with zero padding of 3 at the right and bottom: the 2012 code; preset "as_run", or
      conv1_padding=(0, 3, 0, 3).
    - 224 with zero padding of 2 on all sides: torchvision; presets "torchvision", "paper" and "batchnorm", or
      conv1_padding=2. The paper gives 224 and 55, but not the padding.
    - 227 without padding: Caffe; presets "caffe" and "caffenet", or conv1_padding=0.

    224 without padding gives 54 instead: the ONNX zoo's bvlc_alexnet, `models.ONNX_ZOO`, whose first two pools round
    down (54, 26, 12, 6). Preset "caffe" takes 224 too, and its pools round up (54, 27, 13, 6).

    Args:
        num_classes: outputs of fc8.
        preset: a name in `PRESETS`, or a `Preset`: order and sizes of the layers, normalisation, initial values.
        dropout: probability of dropping the outputs of fc6 and fc7 (their inputs in preset "torchvision"); pass it by
            keyword, since torchvision's class has it second. The presets "paper" and "as_run" scale activations in
            evaluation (`alexnet_kernels.nn.Dropout`), the others in training (torch.nn.Dropout).
        width: factor on the preset's filters and neurons, which are rounded to a multiple of 8 per tower.
        in_channels: channels of the images.
        conv1_padding: zero padding before conv1 in place of the preset's: a number for all sides, or (left, right, top,
            bottom). Unequal padding is an nn.ZeroPad2d before conv1, which shifts every index in `features` by one.
        device, dtype: of the parameters.

    Attributes:
        preset: the `Preset`'s name.
        input_size: height and width of the preset's images, for which conv1's output is 55 x 55 (54 in the ONNX zoo's).
        min_size: the smallest (height, width) that leaves every layer, as built, an output.
        classes: names of the outputs, or None. They go into checkpoints for the Hub, as does
        preprocessing: what the images were made of pixels, or None.
        features, avgpool, classifier: torchvision's names. In preset "torchvision" they have its 13, 1 and 7 children
            and its state_dict keys. `features` and `classifier` are FusedSequential.

    Raises:
        TypeError, ValueError: an argument of another type or out of range. The forward pass raises ValueError for an
            input of another shape, dtype or number of channels, or one that is too small. The error is also a
            RuntimeError, which torch raises there.
    """

    # TorchScript reads annotations, and does not know these.
    classes = cast("Sequence[str] | None", None)
    preprocessing = cast("Preprocessing | None", None)

    def __init__(
        self,
        num_classes: int = 1000,
        preset: str | Preset = "paper",
        dropout: float = 0.5,
        width: float = 1.0,
        in_channels: int = 3,
        conv1_padding: int | Sequence[int] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = _preset(preset)
        _check_count("num_classes", num_classes)
        _check_count("in_channels", in_channels)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")
        if not 0 < width < float("inf"):
            raise ValueError(f"width must be a positive factor, got {width}")
        padding = _sides(spec.conv1_padding if conv1_padding is None else conv1_padding)
        super().__init__()
        self._spec = spec
        self._built = {
            "num_classes": num_classes,
            "dropout": dropout,
            "width": width,
            "in_channels": in_channels,
            "conv1_padding": None if conv1_padding is None else padding,
        }
        self.preset = spec.name
        self.input_size = _input_size(spec, padding)

        # Initial values are drawn once: by torch's layers, or by reset_parameters into layers on the meta device.
        target = torch.get_default_device() if device is None else torch.device(device)
        device = target if spec.initialization is None else "meta"
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        multiple = 8 * spec.groups
        filters = [_scaled(count, width, multiple) for count in spec.filters]
        neurons = _scaled(spec.neurons, width, multiple)
        self.features = FusedSequential(*_features(spec, in_channels, filters, padding, factory))
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = FusedSequential(*_classifier(spec, filters[-1] * 36, neurons, num_classes, dropout, factory))
        self.min_size = _smallest_input(self.features)
        if spec.initialization is not None:
            self.to_empty(device=target)
            self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.avgpool(self.features(x))
        else:
            if isinstance(x, Tensor):
                self._check_input(x)
            x = self.features(x)
            if not self._is_averaged(x):
                x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)

    def _is_averaged(self, x: Any) -> bool:
        """Whether avgpool would copy x, and nobody looks at the call or has to record it."""
        pool = self.avgpool
        return (
            type(pool) is nn.AdaptiveAvgPool2d
            and isinstance(x, Tensor)
            and is_plain(x)
            # The TorchScript-based ONNX exporter may lose the size on the way, and needs it to export the pool.
            and (not is_leaving() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()))
            and x.dim() == 4
            and tuple(x.shape[2:]) == pool.output_size
            and not is_seen(pool)
            and not foreign_mode()
            and not replaced(nn.AdaptiveAvgPool2d, "A", torch.compiler.is_compiling())
        )

    def reset_parameters(self) -> None:
        """Draw new initial values as the preset defines them, and reset batch normalisation's statistics."""
        layers = [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        initialization = self._spec.initialization
        if initialization is None:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                    layer.reset_parameters()
            return
        if len(layers) != len(initialization.bias):
            raise RuntimeError(
                f"reset_parameters knows the {len(initialization.bias)} layers of preset {self.preset!r}, "
                f"but the model now has {len(layers)} Conv2d and Linear layers"
            )
        stds = initialization.weight_std or [math.sqrt(2 / layer.weight[0].numel()) for layer in layers]
        for layer, std, bias in zip(layers, stds, initialization.bias, strict=True):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)

    def extra_repr(self) -> str:
        return f"preset={self.preset!r}"

    @classmethod
    def from_pretrained(
        cls: type[A],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: torch.device | str = "cpu",
        strict: bool = True,
        **kwargs: Any,
    ) -> A:
        """The model of a repository of the Hugging Face Hub, or of a folder of `save_pretrained`, in evaluation mode.

        config.json and model.safetensors are read, and nothing of them is executed. Weights keep their dtypes. A folder
        needs no network and no huggingface_hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository as owner/name.
            force_download, token, cache_dir, local_files_only, revision: as of huggingface_hub.hf_hub_download.
            map_location: device of the parameters.
            strict: False accepts missing and unexpected keys, with a warning, and another number of classes, for which
                the last layer is new.
            **kwargs: arguments of `AlexNet` in place of the config's: dropout, conv1_padding, and num_classes with
                strict=False. Where there is no config.json, all that differ from the defaults, and preset.

        Raises:
            InputError, a ValueError: no such folder or repository, a config or weights that can't be read, weights that
                do not fit, an argument that would give the weights another network.
            MissingPackage, an ImportError: without huggingface_hub or safetensors, of the extra `weights`.
            huggingface_hub's errors: no such repository or revision, no access, no network.
        """
        download = {
            "force_download": force_download,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "revision": revision,
        }
        name = os.fspath(pretrained_model_name_or_path)
        return hub.from_pretrained(
            cls, name, map_location=map_location, strict=strict, download=download, arguments=kwargs
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write model.safetensors, config.json (see `models.config_of`) and a model card into a folder.

        The state_dict's keys and dtypes are kept. config.json is written last.

        Args:
            save_directory: the folder, created if missing.
            repo_id, push_to_hub, model_card_kwargs, **push_to_hub_kwargs: as of huggingface_hub.PyTorchModelHubMixin.
            overwrite: whether to replace a model in the folder. A model card that is there is kept.

        Returns the commit's address if it was pushed.

        Raises:
            InputError, a ValueError: the folder has a model; the model's layers are not those that AlexNet builds.
            MissingPackage, an ImportError: without huggingface_hub or safetensors, of the extra `weights`.
        """
        options = {"repo_id": repo_id, "model_card_kwargs": model_card_kwargs, **push_to_hub_kwargs}
        return hub.save_pretrained(self, os.fspath(save_directory), overwrite=overwrite, push=push_to_hub, **options)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Write the files of `save_pretrained` into a repository of the Hugging Face Hub, created if missing.

        kwargs: commit_message, private, token, branch, create_pr, allow_patterns, ignore_patterns, delete_patterns,
        model_card_kwargs, as of huggingface_hub.PyTorchModelHubMixin. Returns the commit's address. Errors as of
        `save_pretrained`, and huggingface_hub's.
        """
        return hub.push_to_hub(self, repo_id, **kwargs)

    @staticmethod
    def _blank(**arguments: Any) -> "AlexNet":
        """AlexNet(**arguments), whatever the subclass: what `models.config_of` compares a model with."""
        return AlexNet(**arguments)

    def _check_input(self, x: Tensor) -> None:
        first = next((m for m in self.features.children() if not isinstance(m, nn.ZeroPad2d)), None)
        # Another layer that the user has put first, or a hook before it, may take other tensors.
        if not _is_conv(first):
            return
        if x.dim() != 4:
            raise TensorValueError(f"expected images [N, {first.in_channels}, H, W], got shape {tuple(x.shape)}")
        dtype = first.weight.dtype
        if x.dtype != dtype and not x.is_floating_point():
            raise TensorValueError(f"expected images of a floating-point dtype, got {x.dtype}")
        if is_leaving():  # sizes may be symbols; the program's own layers check them
            return
        if x.shape[1] != first.in_channels:
            raise TensorValueError(f"expected {first.in_channels} channels, got shape {tuple(x.shape)}")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise TensorValueError(f"expected images of the parameters' dtype {dtype}, got {x.dtype}")
        height, width = x.shape[2:]
        if height < self.min_size[0] or width < self.min_size[1]:
            smallest = _smallest_input(self.features)
            if height < smallest[0] or width < smallest[1]:
                raise TensorValueError(
                    f"images of {height} x {width} are too small for the layers' windows: "
                    f"the smallest size is {smallest[0]} x {smallest[1]}"
                )


def model_of(config: Mapping[str, Any], *, device: Any = None, dtype: torch.dtype | None = None) -> AlexNet:
    """The network that a config of `config_of` describes, with new initial values, classes and preprocessing.

    Raises InputError for a config of other keys, or values of another type or out of range.
    """
    description = description_of(config)
    try:
        model = AlexNet(**description.arguments, device=device, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise InputError(f"the config does not describe an AlexNet: {first_line(error)}") from error
    model.classes, model.preprocessing = description.classes, description.preprocessing
    return model


def _is_conv(layer: Any) -> TypeGuard[nn.Conv2d]:
    """Whether the layer takes what nn.Conv2d takes."""
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer).forward is nn.Conv2d.forward
        and "forward" not in layer.__dict__
        and not layer._forward_pre_hooks
    )


def _preset(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str) or preset not in PRESETS:
        hint = ""
        if isinstance(preset, int | float):
            hint = f": write AlexNet(dropout={preset}); torchvision's AlexNet is alexnet(dropout={preset})"
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or a Preset, got {preset!r}{hint}")
    return PRESETS[preset]


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _sides(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """The padding as (left, right, top, bottom)."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(sides) != 4 or not all(isinstance(side, int) and side >= 0 for side in sides):
        raise ValueError(
            f"conv1_padding must be a number >= 0 or four of them, (left, right, top, bottom), got {padding!r}"
        )
    return sides


def _input_size(spec: Preset, padding: tuple[int, int, int, int]) -> int:
    """The preset's size; with other padding 224 if conv1 then gives 55 x 55, otherwise the smallest size that does."""
    if padding == _sides(spec.conv1_padding):
        return spec.input_size
    left, right, top, bottom = padding
    rows, columns = top + bottom, left + right
    gives_55 = all(0 <= 224 + pad - 227 < 4 for pad in (rows, columns))
    return 224 if gives_55 else 227 - min(rows, columns)


def _scaled(count: int, width: float, multiple: int) -> int:
    return max(1, round(count * width / multiple)) * multiple


def _features(
    spec: Preset,
    channels: int,
    filters: Sequence[int],
    padding: tuple[int, int, int, int],
    factory: dict[str, Any],
) -> list[nn.Module]:
    left, right, top, bottom = padding
    even = left == right and top == bottom
    children: list[nn.Module] = [] if even else [nn.ZeroPad2d(padding)]
    for i in range(_CONVOLUTIONS):
        shape: dict[str, Any] = dict(_CONV_SHAPES[i])
        if i == 0 and even:
            shape["padding"] = (top, left)
        groups = spec.groups if _IN_TOWERS[i] else 1
        children.append(nn.Conv2d(channels, filters[i], groups=groups, **shape, **factory))
        channels = filters[i]
        for layer in spec.layers[i].split():
            children.append(_layer(spec, layer, i, channels, factory))
    return children


def _layer(spec: Preset, layer: str, i: int, channels: int, factory: dict[str, Any]) -> nn.Module:
    if layer == "relu":
        return _activation(spec)
    if layer == "batch_norm":
        return nn.BatchNorm2d(channels, **factory)
    if layer == "norm" and spec.norm is not None:
        norm = spec.norm
        return LocalResponseNorm(norm.size, norm.alpha, norm.beta, norm.k, norm.towers)
    if layer == "map_norm" and spec.map_norm is not None:
        norm = spec.map_norm
        return WithinMapResponseNorm(norm.size, norm.alpha, norm.beta, norm.k)
    pool = spec.pools[i]
    if layer == "pool" and pool is not None:
        return nn.MaxPool2d(pool.kernel_size, pool.stride, ceil_mode=pool.ceil_mode)
    raise ValueError(f"preset {spec.name!r} names {layer!r} in layer {i + 1} and does not define it")


def _activation(spec: Preset) -> nn.Module:
    if spec.activation == "relu":
        return nn.ReLU(inplace=spec.inplace_relu)
    if spec.activation == "tanh":
        return nn.Tanh()
    raise ValueError(f"preset {spec.name!r} names the activation {spec.activation!r}; relu and tanh are known")


def _classifier(
    spec: Preset, inputs: int, neurons: int, num_classes: int, dropout: float, factory: dict[str, Any]
) -> list[nn.Module]:
    children: list[nn.Module] = []
    for features in (inputs, neurons):
        hidden = [nn.Linear(features, neurons, **factory), _activation(spec)]
        # Tools know torch's type by name.
        scaled_in_training = spec.dropout_scale_at == "training"
        drop = nn.Dropout(dropout) if scaled_in_training else Dropout(dropout, scale_at=spec.dropout_scale_at)
        children += [drop, *hidden] if spec.dropout_on == "inputs" else [*hidden, drop]
    return [*children, nn.Linear(neurons, num_classes, **factory)]


def _smallest_input(features: nn.Module) -> tuple[int, int]:
    """The smallest (height, width) for which every convolution and pool has an output; (1, 1) if layers are unknown."""
    needs = [1, 1]
    for layer in reversed(list(features.children())):
        if isinstance(layer, nn.ZeroPad2d):
            left, right, top, bottom = layer.padding
            needs = [max(1, needs[0] - top - bottom), max(1, needs[1] - left - right)]
        elif isinstance(layer, nn.Conv2d | nn.MaxPool2d) and not isinstance(layer.padding, str):
            needs = [_needed(layer, axis, needs[axis]) for axis in (0, 1)]
        elif not isinstance(layer, nn.ReLU | nn.Tanh | nn.BatchNorm2d | nn.LocalResponseNorm | WithinMapResponseNorm):
            return 1, 1
    return needs[0], needs[1]


def _needed(layer: nn.Conv2d | nn.MaxPool2d, axis: int, outputs: int) -> int:
    """Rows (axis 0) or columns (axis 1) of input needed for that many of output."""
    sizes: tuple[Any, ...] = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = (value if isinstance(value, int) else value[axis] for value in sizes)
    reach = dilation * (kernel - 1) + 1
    if isinstance(layer, nn.MaxPool2d) and layer.ceil_mode:
        # The last window exists if it begins inside the input or its top or left padding.
        partial = (outputs - 2) * stride + reach - 2 * padding + 1
        return max(1, partial, (outputs - 1) * stride - padding + 1)
    return max(1, (outputs - 1) * stride + reach - 2 * padding)
