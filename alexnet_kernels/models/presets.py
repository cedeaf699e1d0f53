"""The published variants of AlexNet, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["ONNX_ZOO", "PRESETS", "Initialization", "Pool", "Preset", "ResponseNorm", "variant"]


@dataclass(frozen=True)
class ResponseNorm:
    """Normalisation across channels, `b = a / (k + alpha / size * sum a^2)^beta`: torch's convention."""

    size: int
    """Channels in the window; n in the paper."""
    alpha: float
    """Divided by size. The paper's 1e-4, which is not divided, is 5e-4 here."""
    beta: float
    k: float
    towers: int = 1
    """Number of towers that the channels are split into. A window stays inside one tower."""


@dataclass(frozen=True)
class Pool:
    """Max-pooling without padding."""

    kernel_size: int = 3
    stride: int = 2
    ceil_mode: bool = False
    """Whether a window that extends past the bottom or right edge counts."""


@dataclass(frozen=True)
class Initialization:
    """Weights from N(0, std) and constant biases, in the order conv1-conv5, fc6, fc7, fc8."""

    weight_std: tuple[float, ...] | None
    """None: the square root of 2 / fan-in (He et al. 2015)."""
    bias: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """A variant of AlexNet. Layers 1-5 are conv1-conv5, layers 6-8 fc6-fc8. fc6 and fc7 have an activation."""

    name: str
    source: str
    """Where the network is defined."""
    input_size: int
    """Height and width of the images: those for which conv1's output is 55 x 55 (54 in `ONNX_ZOO`)."""
    conv1_padding: int | tuple[int, int, int, int]
    """Zero padding of the input on all sides, or (left, right, top, bottom)."""
    filters: tuple[int, int, int, int, int]
    """Output channels of conv1-conv5."""
    groups: int
    """Groups of conv2, conv4 and conv5, the towers. conv1, conv3 and the fc layers see every channel."""
    layers: tuple[str, str, str, str, str]
    """The layers after each of conv1-conv5, in order: relu, norm (across channels), map_norm, batch_norm, pool."""
    pools: tuple[Pool | None, ...]
    """The pool of each of layers 1-5."""
    norm: ResponseNorm | None
    """Definition of norm."""
    map_norm: ResponseNorm | None
    """Definition of map_norm: a size x size window inside one map, alpha divided by size^2."""
    dropout_on: str
    """outputs or inputs: whether dropout is applied to the outputs or the inputs of fc6 and fc7."""
    dropout_scale_at: str
    """inference: the paper's, activations times 1 - p in evaluation. training: kept activations times 1 / (1 - p) in
    training."""
    initialization: Initialization | None
    """None: torch's default."""
    inplace_relu: bool = False
    """Whether the ReLU modules work in place when they are called unfused."""
    activation: str = "relu"
    """Definition of relu in every layer: relu or tanh."""
    neurons: int = 4096
    """Outputs of fc6 and of fc7."""


_FILTERS = (96, 256, 384, 384, 256)
_OVERLAPPING = (Pool(), Pool(), None, None, Pool())
_OVERLAPPING_CEIL = (Pool(ceil_mode=True), Pool(ceil_mode=True), None, None, Pool(ceil_mode=True))
_WEIGHT_STD = (0.01,) * 8
_CAFFE_WEIGHT_STD = (0.01, 0.01, 0.01, 0.01, 0.01, 0.005, 0.005, 0.01)


def _biases(value: float) -> tuple[float, ...]:
    """Biases of `value` for conv2, conv4, conv5, fc6 and fc7, whose ReLUs then start in their linear range."""
    return (0.0, value, 0.0, value, value, value, value, 0.0)


_PAPER = Preset(
    name="paper",
    source="Krizhevsky, Sutskever, Hinton 2012, as printed",
    input_size=224,
    conv1_padding=2,
    filters=_FILTERS,
    groups=2,
    layers=("relu norm pool", "relu norm pool", "relu", "relu", "relu pool"),
    pools=_OVERLAPPING,
    norm=ResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0),
    map_norm=None,
    dropout_on="outputs",
    dropout_scale_at="inference",
    initialization=Initialization(_WEIGHT_STD, _biases(1.0)),
)

_AS_RUN = Preset(
    name="as_run",
    source="the 2012 code, layers-145.cfg",
    input_size=224,
    conv1_padding=(0, 3, 0, 3),
    filters=_FILTERS,
    groups=2,
    layers=("norm pool relu", "relu norm map_norm pool", "relu", "relu", "pool relu"),
    pools=_OVERLAPPING,
    norm=ResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0, towers=2),
    map_norm=ResponseNorm(size=5, alpha=1e-3, beta=0.75, k=1.0),
    dropout_on="outputs",
    dropout_scale_at="inference",
    initialization=Initialization((0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01), _biases(1.0)),
)

_CAFFE = Preset(
    name="caffe",
    source="Caffe's bvlc_alexnet",
    input_size=227,
    conv1_padding=0,
    filters=_FILTERS,
    groups=2,
    layers=("relu norm pool", "relu norm pool", "relu", "relu", "relu pool"),
    pools=_OVERLAPPING_CEIL,
    norm=ResponseNorm(size=5, alpha=1e-4, beta=0.75, k=1.0),
    map_norm=None,
    dropout_on="outputs",
    dropout_scale_at="training",
    initialization=Initialization(_CAFFE_WEIGHT_STD, _biases(0.1)),
)

_CAFFENET = Preset(
    name="caffenet",
    source="Caffe's bvlc_reference_caffenet",
    input_size=227,
    conv1_padding=0,
    filters=_FILTERS,
    groups=2,
    layers=("relu pool norm", "relu pool norm", "relu", "relu", "relu pool"),
    pools=_OVERLAPPING_CEIL,
    norm=ResponseNorm(size=5, alpha=1e-4, beta=0.75, k=1.0),
    map_norm=None,
    dropout_on="outputs",
    dropout_scale_at="training",
    initialization=Initialization(_CAFFE_WEIGHT_STD, _biases(1.0)),
)

_TORCHVISION = Preset(
    name="torchvision",
    source="torchvision's alexnet; Krizhevsky 2014, One weird trick",
    input_size=224,
    conv1_padding=2,
    filters=(64, 192, 384, 256, 256),
    groups=1,
    layers=("relu pool", "relu pool", "relu", "relu", "relu pool"),
    pools=_OVERLAPPING,
    norm=None,
    map_norm=None,
    dropout_on="inputs",
    dropout_scale_at="training",
    initialization=None,
    inplace_relu=True,
)

_BATCHNORM = Preset(
    name="batchnorm",
    source="the variant of modern lecture notes",
    input_size=224,
    conv1_padding=2,
    filters=_FILTERS,
    groups=1,
    layers=("batch_norm relu pool", "batch_norm relu pool", "relu", "relu", "relu pool"),
    pools=(Pool(kernel_size=2), Pool(kernel_size=2), None, None, Pool()),
    norm=None,
    map_norm=None,
    dropout_on="outputs",
    dropout_scale_at="training",
    initialization=None,
)

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (_PAPER, _AS_RUN, _CAFFE, _CAFFENET, _TORCHVISION, _BATCHNORM)
}
"""The presets by name: paper, as_run, caffe, caffenet, torchvision, batchnorm."""

ONNX_ZOO = replace(
    _CAFFE,
    name="onnx_zoo",
    source="the ONNX model zoo's bvlc_alexnet",
    input_size=224,
    pools=(Pool(), Pool(), None, None, Pool(ceil_mode=True)),
)
"""Caffe's network as converted: for 224 x 224, with maps of 54, 26, 12 and 6. Its weights are those of preset caffe."""


def variant(
    preset: str, *, activation: str = "relu", pooling: str = "preset", norm: str = "preset", init: str = "preset"
) -> Preset:
    """A preset with settings of `alexnet-kernels train`.

    activation: relu or tanh, with which biases start at 0. pooling: overlapping (3 x 3) or plain (2 x 2). norm: none
    leaves the normalisation layers out. init: he for normal weights of variance 2 / fan-in.
    """
    spec = PRESETS[preset]
    if norm == "none":
        kept = [" ".join(w for w in layer.split() if "norm" not in w) for layer in spec.layers]
        a, b, c, d, e = kept
        spec = replace(spec, layers=(a, b, c, d, e), norm=None, map_norm=None)
    if pooling != "preset":
        size = 3 if pooling == "overlapping" else 2
        spec = replace(spec, pools=tuple(pool and Pool(size, 2, pool.ceil_mode) for pool in spec.pools))
    if init == "he":
        biases = (0.0,) * 8 if spec.initialization is None else spec.initialization.bias
        spec = replace(spec, initialization=Initialization(None, biases))
    if activation == "tanh":
        spec = replace(spec, activation="tanh")
        if spec.initialization is not None:
            spec = replace(spec, initialization=replace(spec.initialization, bias=(0.0,) * 8))
    return spec
