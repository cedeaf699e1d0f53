"""LPIPS: its definition in float64, gradients, kept features, all pairs, weights, and the packages that it replaces."""

from __future__ import annotations

import copy
import pickle
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import LPIPS, fuse, use_backend
from alexnet_kernels.lpips import ImageFeatures, head, pairs, sources

SIZES = ((31, 31), (40, 67))
NONE = ImageFeatures(tuple(torch.zeros(0, channels, 4, 4) for channels in sources.CHANNELS), (40, 40))
WIDE = ImageFeatures(tuple(layer.new_zeros(1, 64, 4, 4).double() for layer in NONE.layers), (40, 40))


@pytest.fixture(scope="module")
def metric() -> LPIPS:
    """With random filters, and random linear weights that are positive, as trained ones are."""
    torch.manual_seed(0)
    made = LPIPS(pretrained=False, pnet_rand=True)
    for layer in made.lins:
        layer.weight.data.abs_()
    return made


@pytest.fixture(scope="module")
def double(metric: LPIPS) -> LPIPS:
    return copy.deepcopy(metric).double()


def images(count: int, size: tuple[int, int] = (40, 67), seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=generator).mul(2).sub(1).to(dtype)


def definition(metric: LPIPS, a: Tensor, b: Tensor, spatial: bool = False) -> list[Tensor]:
    """The distances of the five layers, in float64, from the paper's formula and lpips' constants."""
    state = {key: value.double() for key, value in metric.state_dict().items()}
    found, maps = [], [a.double(), b.double()]
    if metric.version == "0.1":
        shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).reshape(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).reshape(3, 1, 1)
        maps = [(x - shift) / scale for x in maps]
    for i, (index, stride, padding) in enumerate(((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)), 1):
        if i in (2, 3):
            maps = [F.max_pool2d(x, 3, 2) for x in maps]
        weight, bias = (state[f"net.slice{i}.{index}.{kind}"] for kind in ("weight", "bias"))
        maps = [F.relu(F.conv2d(x, weight, bias, stride, padding)) for x in maps]
        units = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in maps]
        squares = (units[0] - units[1]).square()
        linear = state[f"lin{i - 1}.model.1.weight"] if metric.lpips else torch.ones(1, squares.shape[1], 1, 1).double()
        distance = F.conv2d(squares, linear)
        if spatial:
            found.append(F.interpolate(distance, a.shape[2:], mode="bilinear", align_corners=False))
        else:
            found.append(distance.mean((2, 3), keepdim=True))
    return found


def assert_near(actual: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * expected.abs().max().item())


class TestDefinition:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("spatial", [False, True])
    def test_distances_of_layers_and_pixels(self, metric: LPIPS, size: tuple[int, int], spatial: bool) -> None:
        mine = copy.deepcopy(metric)
        mine.spatial = spatial
        a, b = images(3, size), images(3, size, 1)
        value, layers = mine(a, b, retPerLayer=True)
        expected = definition(metric, a, b, spatial)
        assert value.shape == ((3, 1, *size) if spatial else (3, 1, 1, 1))
        assert value.dtype == torch.float32
        for layer, wanted in zip(layers, expected, strict=True):
            assert_near(layer, wanted)
        assert_near(value, sum(expected))
        torch.testing.assert_close(value, sum(layers))
        torch.testing.assert_close(mine(a / 2 + 0.5, b / 2 + 0.5, normalize=True), value)
        torch.testing.assert_close(mine(in0=b, in1=a), value)

    @pytest.mark.parametrize(("version", "lpips"), [("0.0", True), ("0.1", False)])
    def test_versions(self, version: str, lpips: bool) -> None:
        mine = LPIPS(pretrained=False, version=version, lpips=lpips, pnet_rand=True)
        a, b = images(2), images(2, seed=1)
        assert_near(mine(a, b), sum(definition(mine, a, b)))

    def test_equal_images_have_no_distance(self, metric: LPIPS) -> None:
        a = images(3)
        assert metric(a, a.clone()).abs().max() < 1e-12
        b = a[:2]
        assert metric.features(b).layers[4].abs().max() > 0

    def test_one_image_for_all(self, metric: LPIPS) -> None:
        a, b = images(3), images(1, seed=1)
        expected = metric(a, b.expand_as(a))
        torch.testing.assert_close(metric(a, b), expected)
        torch.testing.assert_close(metric(b, a), expected)
        torch.testing.assert_close(metric(b[0], a), expected)
        one = b.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(metric(a, one).sum(), one)
        both = b.expand_as(a).clone().requires_grad_()
        (expected,) = torch.autograd.grad(metric(a, both).sum(), both)
        assert_near(gradient, expected.double().sum(0, keepdim=True))

    @pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
    def test_low_precision(self, metric: LPIPS, dtype: torch.dtype, error: float) -> None:
        a, b = images(2), images(2, seed=1)
        expected = sum(definition(metric, a, b))
        mine = copy.deepcopy(metric).to(dtype)
        assert mine(a.to(dtype), b).dtype == torch.float32
        assert_near(mine(a, b), expected, error)
        with torch.autocast("cpu", dtype):
            assert_near(metric(a, b), expected, error)
        x = a.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(mine(x, b).sum(), x)
        y = a.double().requires_grad_()
        (wanted,) = torch.autograd.grad(sum(definition(metric, y, b)).sum(), y)
        assert gradient.dtype == dtype
        assert (gradient.double() - wanted).norm() < 10 * error * wanted.norm()

    def test_by_pytorchs_operators(self, metric: LPIPS) -> None:
        a, b = images(2).requires_grad_(), images(2, seed=1)
        expected = metric(a, b)
        (gradient,) = torch.autograd.grad(expected.sum(), a)
        with use_backend("native"):
            native = metric(a, b)
            (other,) = torch.autograd.grad(native.sum(), a)
        torch.testing.assert_close(native, expected)
        assert_near(other, gradient.double())


class TestGradients:
    @pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
    def test_of_either_image(self, metric: LPIPS, needs: tuple[bool, bool]) -> None:
        a, b = (images(2, seed=i).requires_grad_(need) for i, need in enumerate(needs))
        x, y = (image.detach().double().requires_grad_(image.requires_grad) for image in (a, b))
        weights = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
        (metric(a, b) * weights).sum().backward()
        (sum(definition(metric, x, y)) * weights).sum().backward()
        for mine, other in ((a, x), (b, y)):
            if mine.requires_grad:
                assert_near(mine.grad, other.grad, 1e-4)
            else:
                assert mine.grad is None

    def test_of_layers_and_pixels(self, metric: LPIPS) -> None:
        mine = copy.deepcopy(metric)
        mine.spatial = True
        a, b = images(1).requires_grad_(), images(1, seed=1)
        weights = torch.rand(1, 1, 40, 67)
        (gradient,) = torch.autograd.grad((mine(a, b, retPerLayer=True)[1][1] * weights).sum(), a)
        x = a.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad((definition(metric, x, b, spatial=True)[1] * weights).sum(), x)
        assert_near(gradient, expected, 1e-4)

    def test_by_differences(self, double: LPIPS) -> None:
        """The first and the second derivative along a direction."""
        a, b = images(1, (31, 31), dtype=torch.float64), images(1, (31, 31), 1, torch.float64)
        direction, step = images(1, (31, 31), 2, torch.float64), 1e-6

        def along(t: float, create_graph: bool = True) -> tuple[Tensor, Tensor, Tensor]:
            x = (a + t * direction).requires_grad_()
            value = double(x, b).sum()
            (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph)
            return x, value.detach(), (gradient * direction).sum()

        (_, low, low_slope), (_, high, high_slope) = along(-step, False), along(step, False)
        x, _, slope = along(0.0)
        torch.testing.assert_close(slope.detach(), (high - low) / (2 * step), rtol=1e-5, atol=0)
        curvature = (torch.autograd.grad(slope, x)[0] * direction).sum()
        torch.testing.assert_close(curvature, (high_slope - low_slope) / (2 * step), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_of_images_that_depend_on_one_another(self, double: LPIPS, create_graph: bool) -> None:
        a = images(2, (31, 31), dtype=torch.float64)
        for pair in (lambda x: (x, 0.5 * x.flip(3)), lambda x: (x.sin(), x), lambda x: (x[:1], x)):
            x = a.clone().requires_grad_()
            found = torch.autograd.grad(double(*pair(x)).sum(), x, create_graph=create_graph)[0]
            first, second = (image.expand_as(x) for image in pair(x))
            expected = torch.autograd.grad(sum(definition(double, first, second)).sum(), x)[0]
            assert_near(found.detach(), expected, 1e-6)

    def test_head_by_differences(self) -> None:
        maps = torch.rand(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(head.unit_differentiable, (maps,))

    def test_pixels_without_features(self, double: LPIPS) -> None:
        """All features of an image of the mean colour are zero without biases; their norm's derivative is 0 / 0."""
        mine = copy.deepcopy(double)
        for name, parameter in mine.net.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
        a = mine.scaling_layer.shift.expand(1, 3, 40, 67).clone()
        assert mine(a, a).item() == 0
        a[..., :20] += 0.5
        for b in (images(1, dtype=torch.float64), a.clone()):
            x = a.clone().requires_grad_()
            fast = torch.autograd.grad(mine(x, b).sum(), x)[0]
            assert fast.isfinite().all()
            slow = torch.autograd.grad(mine(x, b).sum(), x, create_graph=True)[0]
            torch.testing.assert_close(slow.detach(), fast)

    def test_backward_twice_and_images_changed_in_place(self, metric: LPIPS) -> None:
        a, b = images(1).requires_grad_(), images(1, seed=1)
        value = metric(a, b)
        first = torch.autograd.grad(value, a, retain_graph=True)[0]
        b.zero_()
        torch.testing.assert_close(torch.autograd.grad(value, a, retain_graph=True)[0], first, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="changed in place"):
            torch.autograd.grad(value, a, create_graph=True)

    def test_keeps_nothing_without_gradients(self, metric: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = []
        distances = head.distances
        monkeypatch.setattr(head, "distances", lambda *args: kept.append(args[4]) or distances(*args))
        a, b = images(1).requires_grad_(), images(1, seed=1)
        with torch.no_grad():
            metric(a, b)
        metric(a.detach(), b)
        assert not any(kept)
        metric(a, b)
        assert any(kept)

    def test_weights_are_frozen(self, metric: LPIPS) -> None:
        mine = copy.deepcopy(metric).train()
        assert not mine.training
        nn.Sequential(mine).train()
        assert not any(module.training for module in mine.modules())
        assert not any(parameter.requires_grad for parameter in mine.parameters())
        mine.requires_grad_(True)
        with pytest.warns(UserWarning, match="frozen"):
            mine(images(1), images(1, seed=1))


class TestFeatures:
    def test_in_place_of_either_image(self, metric: LPIPS) -> None:
        a, b = images(3).requires_grad_(), images(3, seed=1)
        expected = metric(a, b)
        (gradient,) = torch.autograd.grad(expected.sum(), a)
        kept = metric.features(b)
        assert (len(kept), kept.size, kept.requires_grad) == (3, (40, 67), False)
        for value in (metric(a, kept), metric(kept, a)):
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(torch.autograd.grad(value.sum(), a)[0], gradient)
        torch.testing.assert_close(metric(metric.features(a.detach()), kept), expected.detach())
        torch.testing.assert_close(metric(metric.features(a.detach()), b), expected.detach())
        torch.testing.assert_close(metric(a, kept[1]), metric(a, b[1]))
        torch.testing.assert_close(metric(b[0], kept[[2, 0]]), metric(b[0], b[[2, 0]]))
        assert len(kept[1:]) == 2
        with pytest.raises(IndexError):
            kept[3]

    def test_with_gradients_unless_detached(self, metric: LPIPS) -> None:
        a, b = images(2).requires_grad_(), images(2, seed=1).requires_grad_()
        expected = torch.autograd.grad(metric(a, b).sum(), [a, b])
        kept = metric.features(b)
        assert kept.requires_grad
        found = torch.autograd.grad(metric(a, kept).sum(), [a, b])
        for mine, other in zip(found, expected, strict=True):
            assert_near(mine, other.double(), 1e-4)
        assert torch.autograd.grad(metric(a, kept.detach()).sum(), [a, b], allow_unused=True)[1] is None

    def test_made_in_inference_mode(self, metric: LPIPS) -> None:
        mine, b = copy.deepcopy(metric), images(1, seed=1)
        with torch.inference_mode():
            kept = mine.features(b)
        a = images(1).requires_grad_()
        mine(a, b).sum().backward()
        torch.testing.assert_close(metric(a.detach(), b), mine(a.detach(), kept))


class TestPairwise:
    def expected(self, metric: LPIPS, x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([sum(definition(metric, x, other.expand_as(x))).flatten() for other in y], 1)

    @pytest.mark.parametrize(("memory", "exact"), [(2**30, False), (1, False), (1e6, True)])
    def test_all_pairs(self, metric: LPIPS, memory: float, exact: bool) -> None:
        x, y = images(3, (31, 31)), images(2, (31, 31), 1)
        found = metric.pairwise(x, y, memory=memory, exact=exact)
        assert found.shape == (3, 2)
        assert_near(found, self.expected(metric, x, y))
        itself = metric.pairwise(x, memory=memory, exact=exact)
        assert_near(itself, self.expected(metric, x, x))
        assert torch.equal(itself, itself.T)
        assert itself.diagonal().tolist() == [0, 0, 0]

    def test_features(self, metric: LPIPS) -> None:
        x, y = images(3), images(2, seed=1)
        kept = metric.features(x)
        torch.testing.assert_close(metric.pairwise(kept, y), metric.pairwise(x, y))
        torch.testing.assert_close(metric.pairwise(y, kept, memory=1e6), metric.pairwise(y, x))
        torch.testing.assert_close(metric.pairwise(kept), metric.pairwise(x))

    def test_near_images_are_as_accurate(self, metric: LPIPS) -> None:
        """|a|^2 + |b|^2 - 2 a b would lose them."""
        x = images(2, (31, 31))
        x = torch.cat([x, x + 1e-3 * images(2, (31, 31), 1)])
        expected = self.expected(metric, x, x)
        near = expected[torch.arange(2), torch.arange(2, 4)]
        assert near.max() < 1e-2 * expected[:2, :2].max()
        found = metric.pairwise(x)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(metric.pairwise(x, x[:2]).double(), expected[:, :2], rtol=1e-3, atol=1e-12)

    def test_negative_weights(self, double: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
        mine = copy.deepcopy(double)
        for layer in mine.lins:
            layer.weight.data[:, ::2].neg_()
        x = images(3, (31, 31), dtype=torch.float64)
        monkeypatch.setattr(pairs, "TERMS", 1000)  # many parts
        torch.testing.assert_close(mine.pairwise(x), self.expected(mine, x, x), atol=1e-9, rtol=1e-6)

    @pytest.mark.parametrize("memory", [2**30, 1])
    def test_nan_stays_with_its_image(self, metric: LPIPS, memory: float) -> None:
        x, y = images(2), images(3, seed=1)
        y[1, 0, 5, 5] = torch.nan
        found, itself = metric.pairwise(x, y, memory=memory), metric.pairwise(y, memory=memory)
        assert found[:, 1].isnan().all()
        torch.testing.assert_close(found[:, ::2], metric.pairwise(x, y[::2]))
        torch.testing.assert_close(itself[::2, ::2], metric.pairwise(y[::2]))

    def test_each_image_goes_through_alexnet_once(self, metric: LPIPS, monkeypatch: pytest.MonkeyPatch) -> None:
        passed = []
        features = LPIPS.features
        monkeypatch.setattr(LPIPS, "features", lambda *args: passed.append(len(args[1])) or features(*args))
        metric.pairwise(images(6), images(3, seed=1))
        assert sum(passed) <= 6 + 3 + 4  # one image more for each question of the size of its features


class TestInput:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ((torch.zeros(1, 1, 40, 40), torch.zeros(1, 3, 40, 40)), r"in0 must be images \[N, 3, H, W\]"),
            ((torch.zeros(1, 3, 40, 40), torch.zeros(40, 40)), r"in1 must be images .* not of shape \(40, 40\)"),
            ((torch.zeros(1, 3, 40, 40), torch.zeros(1, 3, 40, 41)), "40 x 40 and of 40 x 41 can't be compared"),
            ((torch.zeros(2, 3, 40, 40), torch.zeros(3, 3, 40, 40)), "2 images and 3 can't be paired"),
            ((torch.zeros(1, 3, 30, 40), torch.zeros(1, 3, 30, 40)), "30 x 40, is too small: 31 x 31"),
            ((torch.zeros(0, 3, 40, 40), torch.zeros(0, 3, 40, 40)), "holds no image"),
            ((torch.zeros(1, 3, 40, 40).byte(), torch.zeros(1, 3, 40, 40)), "floating-point, not torch.uint8"),
            (([0.0], torch.zeros(1, 3, 40, 40)), "not list"),
            ((NONE, torch.zeros(1, 3, 40, 40)), "features of no image, 0 and 1 images"),
            ((WIDE, torch.zeros(1, 3, 40, 40)), "in0 holds features of torch.float64, the metric's are torch.float32"),
            ((torch.zeros(1, 3, 40, 40, device="meta"), torch.zeros(1, 3, 40, 40)), "on meta, the metric on cpu"),
        ],
    )
    def test_images(self, metric: LPIPS, given: tuple[Any, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message) as raised:
            metric(*given)
        assert isinstance(raised.value, RuntimeError)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"net": "vgg"}, r"net='alex' only: for 'vgg' use fuse\(lpips.LPIPS\(net='vgg'\)\)"),
            ({"version": "0.2"}, "version must be one of '0.1', '0.0', got '0.2'"),
            ({"pnet_tune": True}, r"frozen: to train the metric itself use fuse\(lpips"),
            ({"eval_mode": False}, "frozen"),
            ({"weights": {"features.0.weight": torch.zeros(1)}}, r"features.0.weight is \(1,\), LPIPS takes \(64, 3"),
            ({"weights": nn.Linear(2, 2)}, "the model Linear has no features.0.weight"),
            ({"pnet_rand": True, "model_path": "missing.pth"}, "no file of linear weights at 'missing.pth'"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            LPIPS(**options)

    def test_pairwise(self, metric: LPIPS) -> None:
        with pytest.raises(ValueError, match="has no gradients: y requires them"):
            metric.pairwise(images(1), images(1).requires_grad_())
        with pytest.raises(ValueError, match="can't be compared"):
            metric.pairwise(images(1), images(1, (31, 31)))
        with pytest.raises(ValueError, match="memory must be"):
            metric.pairwise(images(1), memory=0)
        spatial = LPIPS(lpips=False, pnet_rand=True, spatial=True)
        with pytest.raises(ValueError, match="spatial=False"):
            spatial.pairwise(images(1))


class TestWeights:
    def test_of_a_model_a_state_dict_and_a_file(self, metric: LPIPS, tmp_path: Path) -> None:
        torch.manual_seed(1)
        features = nn.Sequential(*LPIPS(lpips=False, pnet_rand=True).net.slices).state_dict()
        state = {f"features.{key.split('.', 1)[1]}": value for key, value in features.items()}
        linear = {f"lin{i}.model.1.weight": layer.weight for i, layer in enumerate(metric.lins)}
        torch.save(linear, tmp_path / "linear.pth")
        torch.save(state, tmp_path / "filters.pth")
        model = nn.Module()
        model.features = nn.Module()
        for key, value in state.items():
            _, index, kind = key.split(".")
            if not hasattr(model.features, index):
                setattr(model.features, index, nn.Module())
            setattr(getattr(model.features, index), kind, nn.Parameter(value))
        for weights in (state, model, str(tmp_path / "filters.pth")):
            made = LPIPS(weights=weights, model_path=tmp_path / "linear.pth")
            assert torch.equal(made.net.slice4[0].weight, state["features.8.weight"])
            assert torch.equal(made.lin2.weight, metric.lin2.weight)
            assert not made.training

    def test_broken_files(self, tmp_path: Path) -> None:
        path = tmp_path / "linear.pth"
        for content, message in (
            ([1], "holds a list, not a state dict"),
            ({}, "has no lin0.model.1.weight"),
            ({"lin0.model.1.weight": torch.zeros(1, 5, 1, 1)}, r"is \(1, 5, 1, 1\), not \(1, 64, 1, 1\)"),
        ):
            torch.save(content, path)
            with pytest.raises(ValueError, match=message):
                LPIPS(pnet_rand=True, model_path=path)
        path.write_bytes(b"no file of torch")
        with pytest.raises(ValueError, match="can't be read as a state dict"):
            LPIPS(pnet_rand=True, model_path=path)

    def test_says_where_linear_weights_come_from(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            FileNotFoundError, match="pip install lpips, or pass model_path=FILE; lpips=False needs none"
        ):
            LPIPS(pnet_rand=True)

    def test_says_what_to_do_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(**options: Any) -> None:
            raise urllib.error.HTTPError("address", 404, "gone", None, None)  # type: ignore[arg-type]

        monkeypatch.setattr(sources, "alexnet", fails)
        with pytest.raises(OSError, match=r"'DEFAULT' can't be had: HTTP Error 404: gone; pass weights=FILE"):
            LPIPS()

    def test_new_weights_take_effect(self, metric: LPIPS) -> None:
        mine, a, b = copy.deepcopy(metric), images(1), images(1, seed=1)
        before = mine(a, b)
        other = LPIPS(pretrained=False, pnet_rand=True)
        mine.load_state_dict(other.state_dict())
        torch.testing.assert_close(mine(a, b), other(a, b))
        assert not torch.equal(mine(a, b), before)
        torch.testing.assert_close(pickle.loads(pickle.dumps(metric))(a, b), before)
        torch.testing.assert_close(copy.deepcopy(metric).double()(a, b).float(), before)

    def test_changed_weights_take_effect(self, metric: LPIPS) -> None:
        def changed(mine: LPIPS) -> None:
            found, fresh = mine(a, b), LPIPS(pretrained=False, pnet_rand=True)
            fresh.load_state_dict(mine.state_dict())
            torch.testing.assert_close(found, fresh(a, b))
            assert not torch.equal(found, before)

        a, b = images(1), images(1, seed=1)
        before = metric(a, b)
        mine = copy.deepcopy(metric)
        mine(a, b)
        # As .half().float() may, it leaves addresses and versions as they were.
        mine._apply(lambda tensor: tensor.mul_(1.5))
        changed(mine)
        with torch.inference_mode():
            mine = LPIPS(pretrained=False, pnet_rand=True)
            mine.load_state_dict(metric.state_dict())
            mine(a, b)
            mine.net.slice2[1].weight.neg_()
        changed(mine)

    def test_state_dict_without_dropout(self, metric: LPIPS) -> None:
        other = LPIPS(pretrained=False, pnet_rand=True, use_dropout=False)
        assert "lin0.model.0.weight" in other.state_dict()
        other.load_state_dict(metric.state_dict())
        torch.testing.assert_close(other(images(1), images(1, seed=1)), metric(images(1), images(1, seed=1)))


class TestPackages:
    @pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than")
    def test_lpips(self) -> None:
        lpips = pytest.importorskip("lpips")
        theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        mine = LPIPS(net="alex", pnet_rand=True, verbose=False)
        assert torch.equal(mine.lin3.weight, theirs.lin3.model[1].weight)
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        mine.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(mine.state_dict())
        for size in ((64, 64), (33, 50)):
            a, b = images(2, size), images(2, size, 1)
            expected, layers = theirs(a, b, retPerLayer=True, normalize=False)
            found, mine_layers = mine(a, b, retPerLayer=True, normalize=False)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            for ours, other in zip(mine_layers, layers, strict=True):
                torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
        x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
        mine(x, b).sum().backward()
        theirs(y, b).sum().backward()
        assert_near(x.grad, y.grad.double(), 1e-4)
        fused = fuse(copy.deepcopy(theirs))
        torch.testing.assert_close(fused(a, b), expected, rtol=0, atol=1e-6)
        (gradient,) = torch.autograd.grad(fused(y, b).sum(), y)
        assert_near(gradient, y.grad.double(), 1e-4)

    def test_torchmetrics(self) -> None:
        image = pytest.importorskip("torchmetrics.functional.image.lpips")
        pytest.importorskip("torchvision")
        theirs = image._LPIPS(net="alex", pnet_rand=True)
        mine = LPIPS(pnet_rand=True)
        mine.load_state_dict(theirs.state_dict())
        a, b = images(2, (64, 64)), images(2, (64, 64), 1)
        expected = theirs(a, b)
        torch.testing.assert_close(mine(a, b), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(fuse(theirs)(a, b), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("fresh_dynamo")
class TestTracing:
    def test_hooks_see_the_layers(self, metric: LPIPS) -> None:
        mine, seen = copy.deepcopy(metric), []
        mine.net.slice3[2].register_forward_hook(lambda *args: seen.append(args[2].shape))
        a, b = images(1), images(1, seed=1)
        torch.testing.assert_close(mine(a, b), metric(a, b))
        assert len(seen) == 2

    @pytest.mark.filterwarnings("ignore")  # of torch.jit's tracer
    def test_compile_and_transforms(self, metric: LPIPS) -> None:
        a, b = images(2), images(2, seed=1)
        expected = metric(a, b)
        compiled = torch.compile(metric, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(a, b), expected)
        gradient = torch.func.grad(lambda x: metric(x, b).sum())(a)
        x = a.clone().requires_grad_()
        assert_near(gradient, torch.autograd.grad(metric(x, b).sum(), x)[0].double(), 1e-4)
        batch = torch.export.Dim("batch")
        exported = torch.export.export(metric, (a, b), dynamic_shapes=({0: batch}, {0: batch})).module()
        torch.testing.assert_close(exported(images(3), images(3, seed=1)), metric(images(3), images(3, seed=1)))
        traced = torch.jit.trace(metric, (a, b), check_trace=False)
        torch.testing.assert_close(traced(a, b), expected)


def test_features_are_a_plain_value(metric: LPIPS) -> None:
    kept = metric.features(images(2))
    moved = kept.to("cpu")
    assert isinstance(moved, ImageFeatures)
    assert kept.nbytes == sum(layer.nbytes for layer in pickle.loads(pickle.dumps(kept)).layers)
