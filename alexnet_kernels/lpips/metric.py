"""The LPIPS module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels._dispatch.checks import is_plain
from alexnet_kernels._errors import TensorTypeError, TensorValueError
from alexnet_kernels._torch_private import dispatch_modes, has_global_module_hooks, is_leaving, is_transformed
from alexnet_kernels.lpips import head, sources
from alexnet_kernels.lpips.features import ImageFeatures
from alexnet_kernels.lpips.pairs import Pairs
from alexnet_kernels.lpips.trunk import Trunk, trunk_of
from alexnet_kernels.nn import FusedSequential
from alexnet_kernels.nn.layers import kinds_of
from alexnet_kernels.nn.originals import foreign_mode

__all__ = ["LPIPS"]

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation for images in -1..1, as lpips rounds them."""
SMALLEST = 31
"""Pixels: both pools have an output."""
_SLICES = ("CR", "PCR", "PCR", "CR", "CR")
"""The kinds of layers of the slices, see `nn/layers.py`."""
_VERSIONS = ("0.1", "0.0")


class _Scaling(nn.Module):
    """lpips' ScalingLayer, whose buffers are part of its state_dict."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class _Linear(nn.Module):
    """lpips' NetLinLayer: a 1 x 1 convolution to one channel. The dropout of its training has no effect here."""

    def __init__(self, channels: int, dropout: bool) -> None:
        super().__init__()
        layers = [nn.Dropout()] if dropout else []
        self.model = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        """[1, C, 1, 1]."""
        conv: Any = self.model[-1]
        return conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class _Net(nn.Module):
    """AlexNet's features up to the fifth ReLU, in lpips' five slices; each child has its index in `features`."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.Conv2d(256, 256, 3, padding=1),
        )
        for i, (conv, index) in enumerate(zip(convolutions, sources.CONVOLUTIONS, strict=True), 1):
            part = FusedSequential()
            if i in (2, 3):
                part.add_module(str(index - 1), nn.MaxPool2d(3, stride=2))
            part.add_module(str(index), conv)
            part.add_module(str(index + 1), nn.ReLU())
            setattr(self, f"slice{i}", part)

    @property
    def slices(self) -> list[nn.Sequential]:
        return [getattr(self, f"slice{i}") for i in range(1, 6)]

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for part in self.slices:
            x = part(x)
            found.append(x)
        return found


class LPIPS(nn.Module):
    """The perceptual distance of Zhang et al. 2018 on AlexNet: drop-in for `lpips.LPIPS(net="alex")`.

    Both images go through AlexNet's convolutions. At each of the five ReLUs every pixel's features are divided by
    their norm plus 1e-10; the squared differences are summed with a weight for each channel, and averaged over the
    pixels. The five averages are added. The weights are frozen: gradients are those of the images, of any order.

    Args:
        pretrained: False for random linear weights.
        net: "alex"; others need the package lpips.
        version: "0.1", or "0.0", whose images are not scaled.
        lpips: False for no linear weights: all channels count alike ("baseline").
        spatial: maps instead of averages: each layer's, upsampled (bilinear) to the images' size.
        pnet_rand: True for random filters.
        use_dropout: whether a dropout layer is before the linear layers, which changes their state_dict keys, and
            nothing else: the metric is always in evaluation.
        model_path: a file of linear weights with lpips' keys. None: that of the installed lpips or torchmetrics.
        verbose: prints where the linear weights come from.
        pnet_tune, eval_mode: lpips' options for training the metric itself; refused, unless at their defaults.
        weights: AlexNet's filters: "DEFAULT" is torchvision's download; a file, a state dict or whatever else `alexnet`
            takes; or a model with torchvision's `features`.

    The state_dict has lpips' keys, and that of `lpips.LPIPS(net="alex")` and of torchmetrics' metric load.

    Of the metric in float32 the distances are those of lpips to within 1e-6; see docs/lpips.md for bfloat16 and float16
    (`metric.bfloat16()`, or autocast), whose convolutions are in that dtype and the rest in float32.

    Where the features of a pixel are all zero, lpips computes the gradient of their norm as 0 / 0, and relies on the
    ReLU below to drop the NaN; here it is zero.

    Raises:
        ValueError, FileNotFoundError, ImportError, TypeError: arguments of other values; weights that are not there.
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | os.PathLike[str] | None = None,
        eval_mode: bool = True,
        verbose: bool = False,
        *,
        weights: Any = "DEFAULT",
    ) -> None:
        _check_options(net, version, pnet_tune, eval_mode)
        super().__init__()
        self.pnet_type, self.version = net, version
        self.lpips, self.spatial = bool(lpips), bool(spatial)
        self.scaling_layer = _Scaling()
        filters = None if pnet_rand else sources.backbone(weights)
        self.net = _Net()
        if filters is not None:
            self.net.load_state_dict(dict(zip(self.net.state_dict(), filters.values(), strict=True)))
        if self.lpips:
            linear = [_Linear(channels, use_dropout) for channels in sources.CHANNELS]
            if pretrained:
                values, file = sources.linear_weights(model_path, version)
                for layer, value in zip(linear, values, strict=True):
                    layer.weight.data.copy_(value.reshape(1, -1, 1, 1))
                if verbose:
                    print(f"LPIPS: linear weights of {file}")
            for i, layer in enumerate(linear):
                setattr(self, f"lin{i}", layer)
            self.lins = nn.ModuleList(linear)
        self.requires_grad_(False)
        super().train(False)
        self._trunks: dict[Any, tuple[Any, _Frozen]] = {}
        self.register_load_state_dict_pre_hook(_complete)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Of `.half().float()` the address may be as before, and the version is.
        self._trunks.clear()
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> LPIPS:
        """Has no effect: the metric is always in evaluation."""
        return self

    def forward(
        self,
        in0: Tensor | ImageFeatures,
        in1: Tensor | ImageFeatures,
        retPerLayer: bool = False,
        normalize: bool = False,
    ) -> Any:
        """The distance of each pair of images.

        Args:
            in0, in1: images [N, 3, H, W] or [3, H, W], values in -1..1, at least 31 x 31, floating-point, any memory
                format; or what `features` returned. Either may be of one image, for all of the other. Both have the
                same size.
            retPerLayer: whether the distances of the five layers are returned, too.
            normalize: whether the values are in 0..1 (features have their own).

        Images that are equal have a distance of 0 up to rounding, below 1e-12.

        Returns:
            [N, 1, 1, 1]; with spatial=True [N, 1, H, W]. float32, or float64 of a metric in float64. With retPerLayer a
            pair of that and a list of five tensors of that shape, which it is the sum of.

        Raises:
            TypeError, ValueError: other tensors (also a RuntimeError, as torch's).
        """
        first, second = self._operand("in0", in0), self._operand("in1", in1)
        size, counts = _size_of(first), (_count_of(first), _count_of(second))
        if _size_of(second) != size:
            raise TensorValueError(f"LPIPS: images of {_text(size)} and of {_text(_size_of(second))} can't be compared")
        if 0 in counts:
            raise TensorValueError(f"LPIPS: features of no image, {counts[0]} and {counts[1]} images can't be paired")
        if counts[0] != counts[1] and 1 not in counts:
            raise TensorValueError(f"LPIPS: {counts[0]} images and {counts[1]} can't be paired: equal numbers, or one")
        maps = self._maps(first, second, normalize)
        if self.spatial:
            layers = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in maps]
        else:
            layers = [each.mean((2, 3), keepdim=True) for each in maps]
        value = torch.stack(layers).sum(0) if not self.spatial else sum(layers[1:], layers[0])
        return (value, layers) if retPerLayer else value

    def features(self, images: Tensor, normalize: bool = False) -> ImageFeatures:
        """What `forward` and `pairwise` compute of images first, to take it in place of them any number of times.

        They take 0.13 MB an image of 64 x 64, and 2.6 MB an image of 256 x 256. If the images require gradients, so do
        the features; `detach()` makes constants of them.
        """
        x = self._images("images", images)
        if (x.requires_grad and torch.is_grad_enabled()) or not self._is_plain(x):
            layers = self._differentiable_features(x, normalize)
        else:
            layers = self._frozen(x, normalize).unit_features(x)
        return ImageFeatures(tuple(layers), (x.shape[2], x.shape[3]))

    def pairwise(
        self,
        x: Tensor | ImageFeatures,
        y: Tensor | ImageFeatures | None = None,
        *,
        normalize: bool = False,
        memory: float = 2**30,
        exact: bool = False,
    ) -> Tensor:
        """The distances of all pairs, [M, N]: of M images and N others, or with y=None of M images among themselves.

        Each image goes through AlexNet once, if the features of x take at most half of `memory`; otherwise y's are
        computed again for each part of x. Distances are products of matrices, |a|^2 + |b|^2 - 2 a b, of features from
        which the mean of y's is subtracted; pairs for which that loses accuracy are computed as differences, so that
        the error is below 1e-6, and below 1e-4 of the distance. Of images among themselves only one half is computed,
        and the diagonal is 0. There are no gradients.

        Args:
            x, y: images [M, 3, H, W], as `forward` takes; or features.
            normalize: whether the values are in 0..1.
            memory: bytes for features and what is computed of them, about. At least a few images always are in memory.
            exact: computes all pairs as differences: the numbers of `forward`, within rounding, in more time.

        Returns:
            [M, N], float32, or float64 of a metric in float64; on the images' device.

        Raises:
            ValueError: as `forward`; images that require gradients; a metric with spatial=True.
        """
        if self.spatial:
            raise ValueError("LPIPS.pairwise averages over pixels: it needs a metric with spatial=False")
        first = self._operand("x", x)
        second = None if y is None else self._operand("y", y)
        for name, given in (("x", first), ("y", second)):
            if given is not None and given.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"LPIPS.pairwise has no gradients: {name} requires them, pass {name}.detach()")
        if second is not None and _size_of(second) != _size_of(first):
            raise TensorValueError(
                f"LPIPS: images of {_text(_size_of(first))} and of {_text(_size_of(second))} can't be compared"
            )
        if not memory > 0:
            raise ValueError(f"memory must be a number of bytes above 0, got {memory}")
        with torch.no_grad():
            pairs = Pairs(
                lambda part: self.features(part, normalize),
                self._linear(self._dtype()),
                memory,
                exact,
            )
            return pairs.distances(first, second)

    def extra_repr(self) -> str:
        kind = "" if self.lpips else ", lpips=False"
        return f"net={self.pnet_type!r}, version={self.version!r}{kind}, spatial={self.spatial}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trunks": {}}

    def _operand(self, name: str, given: Any) -> Tensor | ImageFeatures:
        if isinstance(given, ImageFeatures):
            device = self.scaling_layer.shift.device
            if given.layers[0].device != device:
                raise TensorValueError(f"LPIPS: {name} is on {given.layers[0].device}, the metric on {device}")
            expected = torch.promote_types(self._dtype(), torch.float32)
            if given.layers[0].dtype != expected:
                raise TensorTypeError(
                    f"LPIPS: {name} holds features of {given.layers[0].dtype}, the metric's are {expected}: "
                    "compute them anew"
                )
            return given
        return self._images(name, given)

    def _images(self, name: str, images: Any) -> Tensor:
        if not isinstance(images, Tensor):
            raise TensorTypeError(f"LPIPS: {name} must be images, a tensor, or features, not {type(images).__name__}")
        if images.dim() == 3:
            images = images.unsqueeze(0)
        if images.dim() != 4 or images.shape[1] != 3:
            raise TensorValueError(f"LPIPS: {name} must be images [N, 3, H, W], not of shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TensorTypeError(
                f"LPIPS: {name} must be floating-point, not {images.dtype}: -1..1, or with normalize=True 0..1"
            )
        if not torch.compiler.is_compiling() and not is_leaving():  # sizes may be symbols
            if min(images.shape[2:]) < SMALLEST:
                raise TensorValueError(
                    f"LPIPS: {name}, images of {_text(images.shape[2:])}, is too small: {SMALLEST} x {SMALLEST} or more"
                )
            if not len(images):
                raise TensorValueError(f"LPIPS: {name} holds no image, shape {tuple(images.shape)}")
        if images.device != self.scaling_layer.shift.device:
            raise TensorValueError(
                f"LPIPS: {name} is on {images.device}, the metric on {self.scaling_layer.shift.device}"
            )
        return images

    def _maps(self, first: Any, second: Any, normalize: bool) -> Sequence[Tensor]:
        """The distances of each layer's pixels, [N, 1, h, w]."""
        given: list[Tensor] = [x for x in (first, second) if isinstance(x, Tensor)]
        kept = [x for x in (first, second) if not isinstance(x, Tensor)]
        fast = given and all(map(self._is_plain, given)) and not any(x.requires_grad for x in kept)
        if fast and not kept and len(first) != len(second):
            # The one image is compared with each of the others.
            single = first if len(first) == 1 else second
            if single.requires_grad and torch.is_grad_enabled():
                first, second = (x.expand(max(len(first), len(second)), -1, -1, -1) for x in (first, second))
            else:
                kept = [self.features(single, normalize)]
                given = [second if single is first else first]
        if fast and kept and len(given[0]) == 1 < len(kept[0]):
            fast = False
        if not fast:
            a, b = (
                self._differentiable_features(x, normalize) if isinstance(x, Tensor) else x.layers
                for x in (first, second)
            )
            return self._differentiable_maps(a, b)
        if not kept:
            given = [first, second]
        frozen = self._frozen(given[0], normalize)
        definition = lambda *images: self._differentiable_maps(  # noqa: E731
            *(self._differentiable_features(x, normalize) for x in images), *(x.layers for x in kept)
        )
        layers = [layer for x in kept for layer in x.layers]
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        return _Maps.apply(frozen, definition, keep, given[0], given[1] if len(given) > 1 else None, *layers)

    def _differentiable_features(self, x: Tensor, normalize: bool) -> list[Tensor]:
        """The unit features by PyTorch's operators and the fused ones, for what has to see each: the definition."""
        x = 2 * x - 1 if normalize else x
        if self.version == "0.1":
            x = self.scaling_layer(x)
        x = x.to(self._dtype())
        return [head.unit_differentiable(maps) for maps in self.net(x)]

    def _differentiable_maps(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
        weights = self._linear(a[0].dtype)
        squares = (torch.sub(x, y).square() for x, y in zip(a, b, strict=True))
        return [
            (square * weight.reshape(1, -1, 1, 1)).sum(1, keepdim=True)
            for square, weight in zip(squares, weights, strict=True)
        ]

    def _is_plain(self, x: Tensor) -> bool:
        """Whether nothing has to see the layers' calls, and the layers are those that the fast way computes."""
        return not (
            torch.compiler.is_compiling()
            or dispatch_modes()
            or foreign_mode()
            or is_leaving()
            or is_transformed()
            or has_global_module_hooks()
            or not is_plain(x)
            or any(kinds_of(list(part)) != kinds for part, kinds in zip(self.net.slices, _SLICES, strict=True))
        )

    def _dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.net.parameters()).dtype

    def _linear(self, dtype: torch.dtype) -> list[Tensor]:
        """The weights of the five layers, [C] each, in the dtype of the head."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if self.lpips:
            layers: Any = self.lins
            return [layer.weight.detach().reshape(-1).to(dtype) for layer in layers]
        device = self.scaling_layer.shift.device
        return [torch.ones(channels, dtype=dtype, device=device) for channels in sources.CHANNELS]

    def _frozen(self, x: Tensor, normalize: bool) -> _Frozen:
        """What the fast way computes with, made anew after the parameters change."""
        tensors = [*self.parameters(), *self.buffers()]
        if any(tensor.requires_grad for tensor in tensors):
            _warn_frozen()
        dtype = tensors[0].dtype
        device = x.device.type
        if dtype == torch.float32 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Tensors made in inference mode do not count their changes.
        counted = not any(tensor.is_inference() for tensor in tensors)
        state = [(t.data_ptr(), t._version, t.dtype) for t in tensors] if counted else None
        name = dtype, bool(normalize)
        found = self._trunks.get(name)
        if found is None or state is None or found[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                found = self._trunks[name] = state, self._make_frozen(dtype, normalize)
        return found[1]

    def _make_frozen(self, dtype: torch.dtype, normalize: bool) -> _Frozen:
        shift, scale = (
            _exact(*pair) for pair in ((self.scaling_layer.shift, SHIFT), (self.scaling_layer.scale, SCALE))
        )
        if self.version != "0.1":
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        factor = 1 / scale
        if normalize:  # 2 x - 1 - shift
            shift, factor = (1 + shift) / 2, 2 * factor
        trunk = trunk_of([list(part) for part in self.net.slices], shift, factor, dtype)
        return _Frozen(trunk, [weight.contiguous() for weight in self._linear(dtype)])


class _Frozen:
    """The trunk and the linear weights of the head, in one dtype, for one range of pixels."""

    def __init__(self, trunk: Trunk, linear: list[Tensor]) -> None:
        self.trunk, self.linear = trunk, linear

    def unit_features(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            x, found = self.trunk.batch([images]), []
            for conv, pool in zip(self.trunk.convolutions, self.trunk.pools, strict=True):
                x = conv.forward(x if pool is None else pool.forward(x, False)[0])
                found.append(head.unit(x))
        return found


class _Maps(torch.autograd.Function):
    """The distances of each layer's pixels, [N, 1, h, w], of images and others, or the others' unit features."""

    @staticmethod
    def forward(
        ctx: Any, frozen: _Frozen, definition: Any, keep: bool, first: Tensor, second: Tensor | None, *others: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(first)
        saved: list[Tensor] = []
        found: list[Tensor] = []
        with torch.autocast(first.device.type, enabled=False):
            x = frozen.trunk.batch([first] if second is None else [first, second])
            for i, (conv, pool) in enumerate(zip(frozen.trunk.convolutions, frozen.trunk.pools, strict=True)):
                if pool is not None:
                    x, argmax = pool.forward(x, keep)
                    if keep and argmax is not None:
                        saved.append(argmax)
                x = conv.forward(x)
                a = head.pixels(x[:count])
                b = head.pixels(x[count:] if second is not None else others[i])
                distances, kept = head.distances(a, b, frozen.linear[i], second is None, keep)
                saved += [x, *kept] if keep else []
                found.append(distances.reshape(count, 1, *x.shape[2:]))
        ctx.save_for_backward(*saved)
        ctx.frozen, ctx.definition = frozen, definition
        ctx.images = (first, second) if keep else (None, None)
        ctx.versions = [None if image is None or image.is_inference() else image._version for image in ctx.images]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _by_definition(ctx, grads)
        needs_first, needs_second = ctx.needs_input_grad[3:5]
        first, second = ctx.images
        count = len(first)
        part = slice(0 if needs_first else count, None if needs_second else count)
        with torch.autocast(first.device.type, enabled=False):
            grad = _backward(
                ctx.frozen, list(ctx.saved_tensors), grads, count, second is not None, part, first.shape[2:]
            )
        found: list[Tensor | None] = [None, None]
        if needs_first:
            found[0] = grad[:count].to(first.dtype)
        if needs_second:
            found[1] = grad[count if needs_first else 0 :].to(second.dtype)
        return None, None, None, *found, *[None] * (len(ctx.needs_input_grad) - 5)


def _backward(
    frozen: _Frozen,
    saved: list[Tensor],
    grads: Sequence[Tensor],
    count: int,
    paired: bool,
    part: slice,
    size: Sequence[int],
) -> Tensor:
    """The gradient of that part of the batch, for the gradients of each layer's distances [N, 1, h, w]."""
    trunk, grad = frozen.trunk, None
    for i in reversed(range(len(grads))):
        conv, pool = trunk.convolutions[i], trunk.pools[i]
        scales = [saved.pop() for _ in range(2 if paired else 1)][::-1]
        differences, whole = saved.pop(), saved.pop()
        x = whole[part]
        out = torch.empty_like(x) if grad is None else grad
        of_distances = grads[i].permute(0, 2, 3, 1).reshape(count, -1)
        first = 0
        for sign, scale in zip((1, -1), scales, strict=False):
            mine = (part.start == 0) if sign == 1 else (part.stop is None and paired)
            if mine:
                span = slice(first, first + count)
                maps = head.pixels(x[span]), differences, scale, frozen.linear[i]
                head.gradient(of_distances, *maps, sign, head.pixels(out[span]), grad is not None)
                first += count
        if pool is None:
            grad = conv.backward(out, size if i == 0 else x.shape[2:])
        else:
            argmax = saved.pop()[part]
            below = saved[-4 if paired else -3][part]  # the maps that the pool took
            grad = pool.backward(conv.backward(out, argmax.shape[2:]), argmax, below)
    assert grad is not None
    return grad


def _by_definition(ctx: Any, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients as functions that can be differentiated again."""
    # Aliases: one image may have been computed from the other, or be it, and each has its own derivative.
    images: list[Any] = [None if image is None else image.view_as(image) for image in ctx.images]
    for image, version in zip(ctx.images, ctx.versions, strict=True):
        if version is not None and image._version != version:
            raise RuntimeError(
                "LPIPS: an image was changed in place after the forward pass: create_graph=True needs it"
            )
    needed = [image for image, needs in zip(images, ctx.needs_input_grad[3:5], strict=True) if needs]
    distances = ctx.definition(*(image for image in images if image is not None))
    found = iter(torch.autograd.grad(distances, needed, grads, create_graph=True))
    taken = [next(found) if needs else None for needs in ctx.needs_input_grad[3:5]]
    return None, None, None, *taken, *[None] * (len(ctx.needs_input_grad) - 5)


def _check_options(net: str, version: str, pnet_tune: bool, eval_mode: bool) -> None:
    if net != "alex":
        raise ValueError(f"LPIPS has net='alex' only: for {net!r} use fuse(lpips.LPIPS(net={net!r}))")
    if version not in _VERSIONS:
        raise ValueError(f"version must be one of {', '.join(map(repr, _VERSIONS))}, got {version!r}")
    if pnet_tune or not eval_mode:
        raise ValueError(
            "LPIPS's weights are frozen: to train the metric itself use fuse(lpips.LPIPS(...)) with pnet_tune or "
            "eval_mode=False, and load its state_dict here"
        )


_warned = False


def _warn_frozen() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn("LPIPS's weights are frozen: requires_grad=True gives them no gradient", stacklevel=5)


def _exact(buffer: Tensor, values: Sequence[float]) -> Tensor:
    """The buffer in float64; where it holds these values, rounded, the values."""
    exact = torch.tensor(values, dtype=torch.float64, device=buffer.device).reshape(buffer.shape)
    return exact if torch.equal(exact.to(buffer.dtype), buffer) else buffer.double()


def _complete(module: LPIPS, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Lets the state_dict of torchmetrics and of other settings of lpips load: what does not depend on training."""
    for name in ("shift", "scale"):
        state.setdefault(f"{prefix}scaling_layer.{name}", getattr(module.scaling_layer, name))
    if not module.lpips:
        return
    layers: Any = module.lins
    for i, layer in enumerate(layers):
        last = len(layer.model) - 1
        for name in (f"{prefix}lin{i}.model.{{}}.weight", f"{prefix}lins.{i}.model.{{}}.weight"):
            given = name.format(1 - last)
            if given in state and name.format(last) not in state:
                state[name.format(last)] = state.pop(given)
        pair = f"{prefix}lin{i}.model.{last}.weight", f"{prefix}lins.{i}.model.{last}.weight"
        for name, other in (pair, pair[::-1]):
            if name in state:
                state.setdefault(other, state[name])


def _size_of(operand: Tensor | ImageFeatures) -> tuple[int, int]:
    return operand.size if isinstance(operand, ImageFeatures) else (operand.shape[2], operand.shape[3])


def _count_of(operand: Tensor | ImageFeatures) -> int:
    """Which may be a symbol, as `len` of a tensor may not."""
    return len(operand) if isinstance(operand, ImageFeatures) else operand.shape[0]


def _text(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
