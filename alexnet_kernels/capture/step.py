"""The training step, and the forward pass, as one CUDA graph."""

from __future__ import annotations

import contextvars
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_kernels import optim
from alexnet_kernels._torch_private import step_hooks
from alexnet_kernels.capture.graphs import CapturedCall, Found, Graphs, NotCapturable

__all__ = ["CapturedForward", "CapturedStep", "set_rate"]

Loss = Callable[[Tensor, Tensor], Tensor]
_ELEMENTWISE = (
    optim.SGD,
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
"""Optimizers whose step on a parameter depends on no other."""


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Sets a parameter group's learning rate: on a GPU in a tensor there, in place, which a CUDA graph reads."""
    device = group["params"][0].device
    if device.type != "cuda":
        group["lr"] = rate
    elif isinstance(group["lr"], Tensor) and group["lr"].device == device:
        group["lr"].fill_(rate)
    else:
        group["lr"] = torch.full((), rate, dtype=torch.float32, device=device)


class CapturedStep(CapturedCall):
    """A training step that a GPU runs as one CUDA graph: augmentation, forward, loss, backward, clipping, optimizer.

        step = CapturedStep(model, SGD(model.parameters(), lr=torch.tensor(0.01, device="cuda")))
        for images, labels in loader:
            loss, logits = step(images, labels)

    The first `warmup` calls with inputs of a kind (shapes, strides, dtypes) run the plain loop. Then the step is
    captured, and calls copy their inputs into the graph's and replay it: one launch instead of some hundred. Every call
    is one real step. Weights, momentum, loss and logits are bitwise those of the plain loop, and dropout's masks are
    those that `torch.manual_seed` before the call gives there. **No GPU has run this yet.**

    The graph reads from memory: the inputs, parameters, buffers, the optimizer's state, learning rates that are tensors
    on the GPU (`torch.optim.lr_scheduler` and `set_rate` change them in place), and the seed of torch's generator. It
    keeps what Python computes: it is captured anew, after one plain call, where a setting of a parameter group, a
    number, flag or name among a module's attributes (training mode, a dropout's p), requires_grad, the backend,
    autocast or a tensor's address has changed since, as after `optimizer.load_state_dict`. Other Python state of the
    model and of the functions given here must not change.

    On a GPU the weights of the model's nn.Linear layers are updated on a second stream as soon as their gradients are
    complete, while the rest of the backward pass runs; with `max_norm` at the end, as all others.

    The plain loop runs, and one warning says why, where the model, a parameter or the optimizer has hooks, the model is
    split over processes or devices, a learning rate is a number, the call waits for the device, or a capture fails.

    Args:
        model: any module on one device that maps images to logits. Its gradients, and those of the optimizer's
            parameters, are dropped before each step.
        optimizer: this package's SGD, or one of torch's that a graph can hold: `capturable=True`, or SGD with
            `fused=True`; each with learning rates as tensors on the GPU.
        loss: (logits, labels) -> the mean over the images.
        augment: (images, *more) -> the model's input; None for the images themselves.
        accumulate: parts that a batch is processed in, as `Tensor.chunk` cuts it; their gradients are added up.
        max_norm: clips the norm of the model's gradients, by torch.nn.utils.clip_grad_norm_.
        dtype: torch.bfloat16 for autocast around model and loss; None for the caller's autocast, if any.
        capture: False never captures; True raises where the plain loop would run instead.
        warmup: plain calls before a capture, at least one.
        most: graphs that are kept. They share their memory but for gradients, inputs and results.
        early: parameters that are updated before the backward pass has ended; None for the weights of nn.Linear layers
            of a model on one GPU, () for none.
        notify: takes messages; None for warnings.
        graphs: of the device; None for CUDA's.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that do not fit; capture=True and no capture; what the plain
            loop raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss = F.cross_entropy,
        *,
        augment: Callable[..., Tensor] | None = None,
        accumulate: int = 1,
        max_norm: float | None = None,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        warmup: int = 3,
        most: int = 4,
        early: Iterable[Tensor] | None = None,
        notify: Callable[[str], None] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, not {accumulate}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, not {max_norm}")
        if dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"dtype must be torch.bfloat16 or None, not {dtype}: float16 needs torch.amp.GradScaler, whose step "
                f"reads on the CPU whether the gradients are finite, which a CUDA graph can't"
            )
        self.model, self.optimizer, self.loss, self.augment = model, optimizer, loss, augment
        self.accumulate, self.max_norm, self.dtype = accumulate, max_norm, dtype
        device = next(iter(self._parameters())).device
        super().__init__("the training step", device, capture, warmup, most, notify, graphs)
        if early is not None:
            self._early = list(early)
        elif device.type == "cuda":
            self._early = _weights_of_linear_layers(model)
        else:
            self._early = []
        if type(optimizer) not in _ELEMENTWISE:
            if early:
                names = ", ".join(sorted({kind.__name__ for kind in _ELEMENTWISE}))
                raise ValueError(
                    f"early needs an optimizer that steps each parameter by itself ({names}), not "
                    f"{type(optimizer).__name__}"
                )
            self._early = []

    def __call__(self, images: Tensor, labels: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        """One step.

        After it, a parameter's .grad is the gradient of this step. It is the graph's memory, which the next call
        overwrites: clone it to keep it.

        Args:
            images, labels: a batch, [N, ...] and [N], on any device. Copies from the CPU go through pinned memory.
            more: what `augment` takes after the images.

        Returns:
            loss: the mean over the images, without gradient. logits: [N, ...], without gradient. Both are new tensors.
        """
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"a step needs as many labels as images, at least one: {len(labels)} for {len(images)}")
        loss, logits, _ = self._run((images, labels, *more))
        return loss, logits

    def _call(self, graphs: Graphs | None, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Any]:
        images, labels, *more = inputs
        count = len(images)
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()
        with self._autocast():
            x = images if self.augment is None else self.augment(images, *more)
        parts = list(zip(x.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))
        losses, outputs, updated = [], [], []
        for i, (pixels, wanted) in enumerate(parts):
            with self._autocast():
                logits = self.model(pixels)
                loss = self.loss(logits, wanted)
            if len(parts) > 1:
                loss = loss * (len(wanted) / count)
            updated = self._backward(loss, graphs, i + 1 == len(parts))
            losses.append(loss.detach())
            outputs.append(logits.detach())
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        with self._without_gradients(updated):
            self.optimizer.step()
        if updated and graphs is not None:
            graphs.join()
        # Its copies of the weights are those of before the step.
        torch.clear_autocast_cache()
        params = dict.fromkeys([*self._parameters(), *self.model.parameters()])
        grads = [(param, param.grad) for param in params]
        if len(parts) == 1:
            return losses[0], outputs[0], grads
        return torch.stack(losses).sum(), torch.cat(outputs), grads

    def _autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def _backward(self, loss: Tensor, graphs: Graphs | None, last: bool) -> list[Tensor]:
        """The backward pass. In the last one the early parameters are updated; returns those."""
        early = self._early if last and self.max_norm is None and not step_hooks(self.optimizer) else ()
        updated: list[Tensor] = []
        # Autograd has threads of its own for GPUs, where a `use_backend` block of this one does not hold.
        context = contextvars.copy_context()

        def update(param: Tensor) -> None:
            with graphs.forked() if graphs is not None else nullcontext(), self._gradients_only_of(param):
                self.optimizer.step()
            updated.append(param)

        hooks = [
            param.register_post_accumulate_grad_hook(lambda param: context.copy().run(update, param))
            for param in early
            if param.requires_grad
        ]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return updated

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]

    @contextmanager
    def _without_gradients(self, params: Iterable[Tensor]) -> Iterator[None]:
        """A block in which these parameters have no gradient: the optimizer passes over them."""
        hidden = [(param, param.grad) for param in params if param.grad is not None]
        for param, _ in hidden:
            param.grad = None
        try:
            yield
        finally:
            for param, grad in hidden:
                param.grad = grad

    def _gradients_only_of(self, param: Tensor) -> Any:
        return self._without_gradients(other for other in self._parameters() if other is not param)

    def _find(self) -> Found:
        found = Found(self.device)
        found.add_model(self.model)
        found.add_settings()
        if step_hooks(self.optimizer):
            raise NotCapturable("the optimizer has step hooks, whose Python would run at the capture only")
        if torch.is_anomaly_enabled():
            raise NotCapturable("torch.autograd's anomaly detection reads each gradient")
        for i, group in enumerate(self.optimizer.param_groups):
            owner = f"the optimizer's group {i}"
            for name, value in group.items():
                if isinstance(value, Tensor) and (name != "lr" or value.device == self.device):
                    found.add_tensor(value, owner, name)
                elif name == "lr":
                    raise NotCapturable(
                        f"the lr of {owner} is on the CPU, and a graph would keep its value: give "
                        f"torch.tensor({float(value)}, device={str(self.device)!r})"
                    )
                elif name != "params":
                    found.values.append((owner, name, value))
            for param in group["params"]:
                found.add_tensor(param, owner, "a parameter")
                for name, value in self.optimizer.state.get(param, {}).items():
                    if isinstance(value, Tensor):
                        found.add_tensor(value, "the optimizer's state", name)
                    else:
                        found.values.append(("the optimizer's state", name, value))
        return found

    @contextmanager
    def _undone_after_error(self) -> Iterator[None]:
        state = self.optimizer.state
        before = {param: dict(values) for param, values in state.items()}
        try:
            yield
        except BaseException:
            # Gradients and state of the failed capture are memory of its graph.
            self.model.zero_grad(set_to_none=True)
            self.optimizer.zero_grad(set_to_none=True)
            state.clear()
            state.update(before)
            raise

    def _replayed(self, result: tuple[Tensor, Tensor, Any]) -> tuple[Tensor, Tensor, Any]:
        loss, logits, grads = result
        for param, grad in grads:
            if param.grad is not grad:
                param.grad = grad
        return loss.clone(), logits.clone(), grads


def _weights_of_linear_layers(model: nn.Module) -> list[Tensor]:
    """Those that are parameters, on one device: autograd has a thread for each, where hooks would run side by side."""
    if len({param.device for param in model.parameters()}) > 1:
        return []
    # A parametrized layer computes its weight.
    found = (module._parameters.get("weight") for module in model.modules() if isinstance(module, nn.Linear))
    return [weight for weight in found if weight is not None]


class CapturedForward(CapturedCall):
    """A forward pass without gradients that a GPU runs as one CUDA graph, for inputs that repeat their shape.

        forward = CapturedForward(model.eval())
        logits = forward(images)

    Calls, fallbacks, and what the graph follows and keeps are those of `CapturedStep`. The output is a new tensor,
    bitwise that of the model. **No GPU has run this yet.**

    Args:
        model: any module on one device that maps a tensor to a tensor.
        dtype: torch.bfloat16 or torch.float16 for autocast; None for the caller's autocast, if any.
        capture, warmup, most, notify, graphs: as of `CapturedStep`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        capture: bool | None = None,
        warmup: int = 2,
        most: int = 4,
        notify: Callable[[str], None] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or None, not {dtype}")
        self.model, self.dtype = model, dtype
        if (first := next(itertools.chain(model.parameters(), model.buffers()), None)) is None:
            raise ValueError("the model has no parameter or buffer, whose device would be the graph's")
        device = first.device
        super().__init__("the forward pass", device, capture, warmup, most, notify, graphs)

    def __call__(self, images: Tensor) -> Tensor:
        """The model's output for images on any device."""
        return self._run((images,))

    @torch.no_grad()
    def _call(self, graphs: Graphs | None, inputs: Sequence[Tensor]) -> Tensor:
        torch.clear_autocast_cache()
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            output = self.model(*inputs)
        torch.clear_autocast_cache()
        return output

    def _find(self) -> Found:
        found = Found(self.device)
        found.add_model(self.model)
        found.add_settings()
        return found

    def _replayed(self, result: Tensor) -> Tensor:
        return result.clone()
