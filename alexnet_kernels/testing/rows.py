"""What is timed: an op at a layer, the optimizer's step, a whole network. Each by this package and by its peers.

Every row checks its variants against the definition in float64 first, and times those that are right in turn, in the
same process. `time` returns

    {"op", "layer", "dtype", "batch",
     "wrong", "errors", "missing": {variant: reason},
     DIRECTION: {"bytes", "operations", "cached": whether they fit in the cache, "times": {variant: Timing or "error"}}}

with the directions "forward" and "forward and backward" of ops (or "backward", apart), "step", and "inference" or
"training step" of networks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import AlexNet, backends, optim, use_backend
from alexnet_kernels.models import PRESETS
from alexnet_kernels.nn import Dropout
from alexnet_kernels.testing import cases as registry
from alexnet_kernels.testing import peers, roofline
from alexnet_kernels.testing.machine import cache_bytes
from alexnet_kernels.testing.timing import Call, guarded, input_sets, measure, on_capture_stream

OURS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
WITHOUT_MASTERS = "auto, pure bf16, no masters"
OUR_NETS = ("auto", "auto, pure bf16", WITHOUT_MASTERS, "triton")
DIRECTIONS = ("forward", "backward", "forward and backward", "step", "inference", "training step")
PURPOSES = DIRECTIONS[-2:]


def is_ours(variant: str) -> bool:
    return variant in ("cpu", "cuda", *OUR_NETS)


def _ours(op: str, device: torch.device) -> dict[str, str | None]:
    """This package's backends for the device, and why the op has none here."""
    return {backend: backends.unavailable(op, backend) for backend in OURS[device.type]}


def compiled(peer: registry.Peer, **options: Any) -> registry.Peer:
    """The peer by torch.compile. Whole or not at all: past dynamo's limit of recompilations it would be eager."""
    torch._dynamo.reset()
    return dataclasses.replace(peer, call=torch.compile(peer.call, dynamic=False, fullgraph=True, **options))


SPIN = 0.1  # seconds, more than ONNX Runtime's threads spin after a run

COMPILED: Mapping[str, dict[str, Any]] = {
    "compiled": {},
    # CUDA graphs are the timing's own.
    "compiled, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
HARDENED = "hardened"  # a network for experts, with max-autotune; "hardened, compiled" is without, and soon compiled


@dataclass(frozen=True)
class OpRow:
    """A case at a batch, forward, and forward and backward."""

    case: registry.Case
    batch: int
    compile: Collection[str] = ()  # of COMPILED
    apart: bool = False  # the backward pass alone, in place of both passes
    label: str = ""  # that tells the row from another one of the same case

    @property
    def name(self) -> str:
        return f"{_prefix(self.label)}{self.case.name}, batch {self.batch}"

    @property
    def directions(self) -> Sequence[str]:
        if not self.case.wrt:
            return ("forward",)
        return ("forward", "backward" if self.apart else "forward and backward")

    def variants(self, device: torch.device) -> list[str]:
        """Those that the device has, if nothing goes wrong."""
        ours = [backend for backend, reason in _ours(self.case.op, device).items() if not reason]
        return ours + list(self._peers(device))

    def _by(self, backend: str) -> registry.Peer:
        outliers = registry.PEER_OUTLIERS if backend == "native" else registry.OUTLIERS
        return registry.Peer(lambda x: self.case.call(x, backend), outliers=outliers)

    def _peers(self, device: torch.device) -> dict[str, Callable[[], registry.Peer]]:
        case = self.case
        found: dict[str, Callable[[], registry.Peer]] = {}
        if case.eager:
            found["eager"] = lambda: self._by("native")
        for name, peer in case.peers.items():
            if device.type == "cuda" or not peer.cuda_only:
                found[name] = lambda peer=peer: peer  # type: ignore[misc]
        best = next((peer for peer in case.peers.values() if peer.differentiable), None)
        base = self._by("native") if case.eager else best
        if base is not None:
            for name in self.compile:
                found[name] = lambda name=name: compiled(base, **COMPILED[name])  # type: ignore[misc]
        return found

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> dict[str, Any]:
        """`skip` names variants, "ROW by VARIANT", that lost the device before."""
        case, batch = self.case, self.batch
        result = _result(case.op, case.layer, roofline.SHORT[case.dtype], batch)
        wrong, errors = result["wrong"], result["errors"]
        made: dict[str, Callable[[], registry.Peer]] = {}
        for backend, reason in _ours(case.op, device).items():
            if reason:
                result["missing"][backend] = reason
            else:
                made[backend] = lambda backend=backend: self._by(backend)  # type: ignore[misc]
        made |= self._peers(device)
        expectation = registry.Expectation(case, 2, device)
        variants: dict[str, registry.Peer] = {}
        for name, make in made.items():
            if f"{self.name} by {name}" in skip:
                continue
            with guarded(name, device, errors):
                variant = make()
                problem = None
                if variant.checked:
                    problem = expectation.problem(variant.call, variant.differentiable, variant.outliers)
                if problem:
                    wrong[name] = problem
                else:
                    variants[name] = variant
        del expectation
        graphs = case.layer != registry.OVERHEAD
        for direction in self.directions:
            backward = direction != "forward"
            moved, done = self._work(direction)
            count = input_sets(int(moved), device)
            inputs = [registry.with_gradients(case.make(batch, device), case.wrt) for _ in range(count)]
            calls: dict[str, list[Call]] = {}
            for name, variant in variants.items():
                if variant.differentiable or not backward:
                    with guarded(name, device, errors):
                        calls[name] = [_call(case, variant, x, direction, device) for x in inputs]
            times = measure(calls, device, seconds=seconds, rounds=rounds, graphs=graphs)
            result[direction] = {
                "bytes": moved,
                "operations": done,
                "cached": moved * count < cache_bytes(device),
                "times": times,
            }
        return result

    def call(self, direction: str, backend: str, device: torch.device) -> Call:
        """One direction by a backend, on inputs of its own; "backward" on the current stream."""
        case = self.case
        inputs = registry.with_gradients(case.make(self.batch, device), case.wrt)
        if direction == "backward":
            return _backward(case.call(inputs, backend), inputs, case.wrt)
        return _call(case, self._by(backend), inputs, direction, device)

    def _work(self, direction: str) -> tuple[float, float]:
        """(bytes, operations)."""
        work, backward = self.case.work, direction != "forward"
        moved, done = work.moved(self.batch, backward), work.done(self.batch, backward)
        if direction == "backward":
            return moved - work.moved(self.batch, False), done - work.done(self.batch, False)
        return moved, done


def _prefix(label: str) -> str:
    return f"{label}: " if label else ""


def _result(op: str, layer: str, dtype: str, batch: int) -> dict[str, Any]:
    return {"op": op, "layer": layer, "dtype": dtype, "batch": batch, "wrong": {}, "errors": {}, "missing": {}}


def _call(
    case: registry.Case, variant: registry.Peer, inputs: registry.Inputs, direction: str, device: torch.device
) -> Call:
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                variant.call(inputs)

        return forward
    if direction == "backward":
        # On the stream that calls are captured on, as the forward pass that it belongs to.
        with on_capture_stream(device):
            return _backward(variant.call(inputs), inputs, case.wrt)
    with torch.no_grad():
        grad = torch.randn_like(variant.call(inputs))

    def both() -> None:
        registry.backward_of(variant.call(inputs), inputs, case.wrt, grad)

    return both


def _backward(out: Tensor, inputs: registry.Inputs, wrt: tuple[str, ...]) -> Call:
    """The backward pass alone, of a forward pass that was made."""
    grad = torch.randn_like(out)

    def backward() -> None:
        torch.autograd.grad(out, [inputs[name] for name in wrt], grad, retain_graph=True)

    return backward


def capturable(lr: float, device: torch.device) -> float | Tensor:
    """A learning rate for steps that CUDA graphs capture."""
    return torch.tensor(lr, device=device) if device.type == "cuda" else lr


@dataclass(frozen=True)
class SgdRow:
    """The optimizer's step over all of AlexNet's parameters, or over small ones; torch.optim.SGD is the peer."""

    small: bool = False
    name = "sgd_step, AlexNet's parameters, fp32"
    directions = ("step",)
    _SETTINGS: ClassVar[dict[str, Any]] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
    _SMALL = ((64, 3, 3, 3), (100, 64), (7,))

    def variants(self, device: torch.device) -> list[str]:
        ours = [backend for backend, reason in _ours("sgd_step", device).items() if not reason]
        return [*ours, "torch fused", "torch foreach"]

    def time(
        self, device: torch.device, *, seconds: float = 1.0, rounds: int = 15, skip: Collection[str] = ()
    ) -> dict[str, Any]:
        shapes = self._SMALL if self.small else registry.PARAMETERS
        result = _result("sgd_step", "AlexNet's parameters", "fp32", 1)
        result["missing"] = {backend: reason for backend, reason in _ours("sgd_step", device).items() if reason}
        calls: dict[str, list[Call]] = {}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            with guarded(name, device, result["errors"]):
                if fault := self.problem(name, device):
                    result["wrong"][name] = fault
                else:
                    calls[name] = [self.call(name, device)]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        moved = roofline.SGD_BYTES * count
        times = measure(calls, device, seconds=seconds, rounds=rounds)
        cached = moved < cache_bytes(device)
        return result | {"step": {"bytes": moved, "operations": 0, "cached": cached, "times": times}}

    def call(self, name: str, device: torch.device) -> Call:
        """A step of this variant."""
        return self._step(self._parameters(self._SMALL if self.small else registry.PARAMETERS, device), name)

    def _step(self, parameters: list[nn.Parameter], name: str) -> Call:
        """A step of this variant; the gradients are there already."""
        if name.startswith("torch"):
            stepper: torch.optim.Optimizer = torch.optim.SGD(
                parameters, **self._SETTINGS, fused=name == "torch fused", foreach=name == "torch foreach"
            )
        else:
            settings = {**self._SETTINGS, "lr": capturable(self._SETTINGS["lr"], parameters[0].device)}
            stepper = optim.SGD(parameters, **settings, rule="torch")
        backend = "auto" if name.startswith("torch") else name

        def step() -> None:
            with use_backend(backend):
                stepper.step()

        return step

    @staticmethod
    def _parameters(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
        torch.manual_seed(0)
        values = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for value in values:
            value.grad = torch.randn_like(value)
        return values

    def problem(self, name: str, device: torch.device) -> str | None:
        few = self._parameters(self._SMALL, device)
        exact = [nn.Parameter(p.detach().cpu().double()) for p in few]
        for wide, value in zip(exact, few, strict=True):
            assert value.grad is not None
            wide.grad = value.grad.cpu().double()
        definition, step = torch.optim.SGD(exact, **self._SETTINGS), self._step(few, name)
        for _ in range(3):
            step()
            definition.step()
        found = (registry.compare(a, b, 1e-5, "parameter", 0) for a, b in zip(few, exact, strict=True))
        return next(filter(None, found), None)


@dataclass(frozen=True)
class NetRow:
    """A preset's inference or training step: forward, loss, backward and optimizer.

    In bfloat16, by autocast, with float32 parameters; and, where a variant's name says so, with bfloat16 ones. Dropout
    scales in training for all, so that all compute the same.
    """

    preset: str
    batch: int
    purpose: str
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    compile: Collection[str] = ()  # of COMPILED, HARDENED, and "hardened, compiled"
    width: float = 1.0
    size: int | None = None  # of the images, if not the preset's
    more: Collection[str] = ()  # "hardened, eager"
    label: str = ""  # that tells the row from another one of the same network

    # Of the norm of the definition's, by dtype: activations and gradients are rounded in every layer.
    TOLERANCES: ClassVar[dict[torch.dtype, float]] = {torch.float32: 5e-3, torch.bfloat16: 0.05}

    @property
    def name(self) -> str:
        layout = "" if self.channels_last else ", NCHW"
        network = f"{_prefix(self.label)}{self.preset}, {roofline.SHORT[self.dtype]}{layout}"
        return f"{network}, batch {self.batch}, {self.purpose}"

    @property
    def directions(self) -> Sequence[str]:
        return (self.purpose,)

    def _known(self, device: torch.device) -> dict[str, str | None]:
        """This row's variants, each with the reason if it is missing here."""
        bf16, cuda = self.dtype == torch.bfloat16, device.type == "cuda"
        found: dict[str, str | None] = {"auto": None}
        if cuda:
            found["triton"] = backends.unavailable("max_pool2d", "triton")
        if bf16:
            found["auto, pure bf16"] = None
        found |= dict.fromkeys(("eager", *self.more, *self.compile))
        if bf16:
            found["eager, pure bf16"] = None
            if self.purpose != "inference":
                found[WITHOUT_MASTERS] = None
        if self.preset == "torchvision" and self.width == 1:
            found["torchvision"] = peers.missing("torchvision")
        if self.purpose == "inference" and (cuda or not bf16):
            session = "tensorrt" if cuda else "onnxruntime"
            found[session] = peers.missing(session) or peers.missing("onnx")
        return found

    def variants(self, device: torch.device) -> list[str]:
        return [name for name, reason in self._known(device).items() if not reason]

    def time(
        self,
        device: torch.device,
        *,
        seconds: float = 4.0,
        rounds: int = 10,
        skip: Collection[str] = (),
    ) -> dict[str, Any]:
        result = _result("net", self.preset, roofline.SHORT[self.dtype], self.batch)
        result["missing"] = {name: reason for name, reason in self._known(device).items() if reason}
        torch._dynamo.reset()
        expected = _NetExpectation(self, device)
        calls: dict[str, list[Call]] = {}
        for name in self.variants(device):
            if f"{self.name} by {name}" in skip:
                continue
            if name == WITHOUT_MASTERS and "eager, pure bf16" not in calls:  # no peer is without
                continue
            with guarded(name, device, result["errors"]):
                variant = NetVariant(self, name, device)
                if problem := expected.problem(variant):
                    result["wrong"][name] = problem
                else:
                    calls[name] = [variant.call]
        training = self.purpose != "inference"
        works = roofline.network(self.preset, self.dtype, self.width, self.size).values()
        # Layer by layer: each is bound by what it needs most.
        layers = [(work.moved(self.batch, training), work.done(self.batch, training)) for work in works]
        if training:
            layers.append((roofline.SGD_BYTES * roofline.parameters(self.preset, self.width), 0))
        result[self.purpose] = {
            "bytes": sum(moved for moved, _ in layers),
            "operations": sum(done for _, done in layers),
            "cached": False,
            "times": measure(
                calls, device, seconds=seconds, rounds=rounds, pause=SPIN if "onnxruntime" in calls else 0
            ),
            "layers": layers,
        }
        del calls, expected
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        size = self.size or PRESETS[self.preset].input_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, size, size, generator=generator).to(device)
        labels = torch.randint(0, 1000, (self.batch,), generator=generator).to(device)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images, labels

    def model(self, device: torch.device) -> AlexNet:
        """The same on every call for the same device."""
        torch.manual_seed(0)
        model = AlexNet(preset=self.preset, width=self.width, device=device).train(self.purpose != "inference")
        for module in model.modules():
            if isinstance(module, Dropout):
                module.scale_at = "training"
            elif isinstance(module, nn.Conv2d | nn.Linear):  # so that what is compared stays of the order of one
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


class NetVariant:
    def __init__(self, row: NetRow, name: str, device: torch.device) -> None:
        self.row, self.device = row, device
        self.images, self.labels = row.inputs(device)
        ours = row.model(device)
        self.model: nn.Module = ours
        self.ours = is_ours(name)
        self.compiled = name in row.compile
        self.pure = "pure bf16" in name
        self.backend = "triton" if name == "triton" else "auto" if self.ours else "native"
        self.session: Callable[[], Tensor] | None = None
        self.run: Callable[[Tensor], Tensor] = self.model
        if name in ("onnxruntime", "tensorrt"):
            images = self.images.to(row.dtype) if name == "tensorrt" else self.images
            self.session = getattr(peers, name)(ours, images)
            return
        if self.pure:
            self.model, self.images = self.model.to(torch.bfloat16), self.images.to(torch.bfloat16)
            self.run = self.model
        if not self.ours:
            make: Callable[[AlexNet], nn.Module] = peers.hardened if name.startswith(HARDENED) else peers.stock
            if name == "torchvision":
                make = peers.torchvision_alexnet
            self.model = make(ours)
            if row.channels_last:
                self.model = self.model.to(memory_format=torch.channels_last)
            self.run = self.model
        if self.compiled:
            named = {HARDENED: "compiled, max-autotune", f"{HARDENED}, compiled": "compiled"}
            options = COMPILED[named.get(name, name)]
            self.run = torch.compile(self.model, dynamic=False, fullgraph=True, **options)
        settings: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
        if self.ours:
            masters = False if name == WITHOUT_MASTERS else None
            settings["lr"] = capturable(settings["lr"], device)
            self.optimizer: torch.optim.Optimizer = optim.SGD(
                self.model.parameters(), rule="torch", master_weights=masters, **settings
            )
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **settings)

    def _mode(self) -> Any:
        if self.pure or self.row.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.row.dtype, True, False)

    def logits(self) -> Tensor:
        if self.session is not None:
            return self.session()
        with use_backend(self.backend), torch.no_grad(), self._mode():
            return self.run(self.images)

    def loss(self) -> Tensor:
        with self._mode():
            return F.cross_entropy(self.run(self.images).float(), self.labels)

    def call(self) -> None:
        if self.row.purpose == "inference":
            self.logits()
            return
        with use_backend(self.backend):
            loss = self.loss()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    def gradients(self, images: Tensor) -> list[Tensor]:
        """Of `_NetExpectation.scalar`, without dropout."""
        training = self.model.training
        self.model.eval()
        with use_backend(self.backend), self._mode():
            out = self.model(images.to(self.images.dtype))
        with use_backend(self.backend):
            found = torch.autograd.grad(_NetExpectation.scalar(out), list(self.model.parameters()))
        self.model.train(training)
        return list(found)


class _NetExpectation:
    """Logits, or gradients, in float64, of the first images of a row.

    In half precision a rounding decides which of two nearly equal maxima of a pool gets the gradient: this package's
    may be no further from the definition than half as far again as torch.nn's, or the tolerance.
    """

    IMAGES = 2
    SLACK = 1.5
    LOSSES = 5  # with other masks each

    def __init__(self, row: NetRow, device: torch.device) -> None:
        self.row, self.device = row, device
        cpu = torch.device("cpu")
        exact = peers.stock(row.model(device)).to(cpu, torch.float64).eval()
        self.images = row.inputs(cpu)[0][: self.IMAGES]
        self.gradients: list[Tensor] = []
        self.tolerances: list[float] = []
        with use_backend("native"):
            out = exact(self.images.double())
            self.logits = out.detach()
        if row.purpose != "inference":
            self.gradients = list(torch.autograd.grad(self.scalar(out), list(exact.parameters())))
            eager = NetVariant(row, "eager", device).gradients(self.images.to(device))
            for actual, expected in zip(eager, self.gradients, strict=True):
                self.tolerances.append(max(row.TOLERANCES[row.dtype], self.SLACK * _distance(actual, expected)))

    @staticmethod
    def scalar(logits: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return (wide * torch.linspace(-1, 1, wide.shape[1], dtype=wide.dtype, device=wide.device)).sum()

    @cached_property
    def loss(self) -> tuple[float, float]:
        """torch.nn's: mean and standard deviation over dropout's masks."""
        eager = NetVariant(self.row, "eager", self.device)
        with use_backend("native"):
            losses = torch.tensor([eager.loss().item() for _ in range(self.LOSSES)])
        return losses.mean().item(), losses.std().item()

    def problem(self, variant: NetVariant) -> str | None:
        if self.row.purpose == "inference":
            return _far(variant.logits()[: self.IMAGES], self.logits, NetRow.TOLERANCES[self.row.dtype], "logits")
        if variant.compiled:  # for its own shapes and mode only, which draws dropout's masks
            with use_backend(variant.backend):
                loss = variant.loss().item()
            mean, spread = self.loss
            if abs(loss - mean) <= max(0.05 * mean, 5 * spread):
                return None
            return f"loss {loss:.3g}, expected {mean:.3g} ± {spread:.2g}"
        found = variant.gradients(self.images.to(variant.device))
        for i, (actual, expected, limit) in enumerate(zip(found, self.gradients, self.tolerances, strict=True)):
            if wrong := _far(actual, expected, limit, f"gradient of parameter {i}"):
                return wrong
        return None


def _distance(actual: Tensor, expected: Tensor) -> float:
    """As a part of the expected one's norm."""
    return ((actual.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def _far(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> str | None:
    if actual.shape != expected.shape:
        return f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    distance = _distance(actual, expected)
    return None if distance <= tolerance else f"{what}: off by {distance:.2g} of its norm"


Row = OpRow | SgdRow | NetRow


def to_json(result: dict[str, Any]) -> dict[str, Any]:
    """With every timing as a dict."""
    found = dict(result)
    for direction in DIRECTIONS:
        if direction in found:
            times = {name: timing.to_json() for name, timing in found[direction]["times"].items()}
            found[direction] = {**found[direction], "times": times}
    return found
