"""What the ops share: argument checks, memory formats, registration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_kernels import _library
from alexnet_kernels.backends import is_transformed

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, not {type(value).__name__}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, not {tensor.dtype}")


def check_images(op: str, input: Tensor) -> None:
    """A floating-point [N, C, H, W]."""
    check_tensor(op, "input", input)
    check_floating(op, "input", input)
    if input.dim() != 4:
        raise ValueError(f"{op}: input must be [N, C, H, W], not of shape {list(input.shape)}")


def check_like(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """On the input's device."""
    check_tensor(op, name, tensor)
    if tensor.device != input.device:
        raise RuntimeError(f"{op}: {name} is on {tensor.device}, but the input is on {input.device}")


def check_same_dtype(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    """In the input's dtype, unless autocast is about to cast both."""
    if tensor.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
        raise TypeError(f"{op}: {name} is {tensor.dtype}, but the input is {input.dtype}: they must agree")


def remembered(check: Callable) -> Callable:
    """The check of an op's arguments, done once for tensors of the same shapes, dtypes and devices.

    The check looks at nothing else of them, and at autocast; its result isn't changed by who gets it. Repeating it
    would take as long as the rest of a small op.
    """
    passed: dict[tuple, Any] = {}

    @functools.wraps(check)
    def call(*args: Any) -> Any:
        key = _arguments_key(args)
        if key is None:
            return check(*args)
        try:
            return passed[key]
        except KeyError:
            pass
        result = check(*args)
        if len(passed) >= 1024:
            passed.clear()
        passed[key] = result
        return result

    return call


def _arguments_key(args: Sequence[Any]) -> tuple | None:
    """What a check may look at; None if some argument isn't a plain tensor, name, integer or list from `pair`."""
    if torch.compiler.is_compiling():
        return None
    key: list[Any] = []
    device = None
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            key += (arg.shape, arg.dtype, device := arg.device)
        elif kind is list:
            key.append(tuple(arg))
        elif kind in _NAMES:
            key.append(arg)
        else:
            return None
    if torch._C._is_any_autocast_enabled():
        if device is None or device.type not in ("cpu", "cuda"):
            return None
        key.append(torch.is_autocast_enabled(device.type))
    return tuple(key)


def pair(op: str, name: str, value: int | Sequence[int], least: int) -> list[int]:
    """Two integers of at least `least`, from one or two."""
    if type(value) is int and value >= least:
        return [value, value]
    values = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{op}: {name} must be an int or two ints, not {value!r}")
    if min(values) < least:
        raise ValueError(f"{op}: {name} must be at least {least}, not {value!r}")
    return values


def check_groups(op: str, groups: int, channels: int, name: str = "channels") -> None:
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"{op}: groups must be a positive int, not {groups!r}")
    if channels % groups:
        raise ValueError(f"{op}: groups={groups} does not divide the {channels} {name}")


def check_probability(op: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: p must be in [0, 1], not {p}")


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """The memory format results take: csrc/common/tensor.h holds the same rule."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return torch.contiguous_format
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    slice_of_channels_last = tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]
    return torch.channels_last if slice_of_channels_last else torch.contiguous_format


def local(tensor: Any) -> Any:
    """A DTensor's part on this rank; anything else itself."""
    # torch may be built without torch.distributed.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def empty_like(tensor: Tensor, shape: Sequence[Any] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the memory format results take, for fakes."""
    return torch.empty(
        tensor.shape if shape is None else shape,
        dtype=dtype or tensor.dtype,
        device=tensor.device,
        memory_format=memory_format_of(tensor),
    )


class Contract(NamedTuple):
    """What an operator's implementations share."""

    fake: Callable
    backward: Callable | None
    setup_context: Callable | None
    autocast: bool
    eager: Callable | None


CONTRACTS: dict[str, Contract] = {}


def kernels(backend: str) -> Any:
    """The operators of a backend that `select` chose: those of the native library, or the Triton ones."""
    return operators(_library.NAMESPACES[backend])


def operators(namespace: str) -> Any:
    """The operators of a namespace, called by the short way where one may."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops, namespace)
    found = _OPERATORS.get(namespace)
    return found if found is not None else _OPERATORS.setdefault(namespace, _Operators(namespace))


class _Operators:
    """torch.ops.<namespace>, whose operators in eager mode skip the dispatcher's way through Python.

    An autograd formula that torch.library registered costs some 20 us a call, twice what the rest of a small op takes:
    here the kernel is called below autograd at once, or through an autograd.Function with the same formula. Whatever
    listens in between, a mode, a subclass of Tensor, a tracer, a profiler or functorch, sees the operator itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, op: str) -> Callable:
        short = _short_way(self, op)
        setattr(self, op, short)
        return short


_OPERATORS: dict[str, _Operators] = {}


def _short_way(kernels: _Operators, op: str) -> Callable:
    overload = getattr(getattr(torch.ops, kernels.name), op).default
    contract = CONTRACTS.get(op)
    if contract is None or contract.backward is None or contract.setup_context is None:
        return overload
    formula, setup_context, autocast = contract.backward, contract.setup_context, contract.autocast
    eager = contract.eager if kernels.name == _library.NAMESPACE else None
    redispatch = overload.redispatch

    def direct(args: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        keys = _keys_of(tensors[0])
        for tensor in tensors[1:]:
            keys = keys | _keys_of(tensor)
        return redispatch(keys & _BELOW_AUTOGRAD, *args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            output = direct(args, [arg for arg in args if type(arg) in _PLAIN])
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return formula(operators(kernels.name), ctx, *grads)

    Function.__name__ = Function.__qualname__ = f"{op}_{kernels.name}"

    def call(*args: Any) -> Any:
        tensors = _plain_tensors(args)
        if not tensors:
            return overload(*args)
        if eager and tensors[0].device.type == "cpu":
            return eager(*args)
        if autocast and torch.is_autocast_enabled(tensors[0].device.type):
            args = tuple(_cast(args, torch.get_autocast_dtype(tensors[0].device.type)))
            tensors = [arg for arg in args if type(arg) in _PLAIN]
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad:
                    return Function.apply(*args)
        return direct(args, tensors)

    return call


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NAMES = frozenset((int, bool, str, type(None)))
_OTHERS = frozenset((bool, int, float, list, tuple, type(None), torch.dtype))
_keys_of = torch._C._dispatch_keys
_BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset


def _plain_tensors(args: Sequence[Any]) -> list[Tensor] | None:
    """The tensors among them, if nothing but autograd and autocast stands between the call and its kernel."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or is_transformed()
    ):
        return None
    tensors = []
    for arg in args:
        kind = type(arg)
        if kind in _PLAIN:
            tensors.append(arg)
        elif kind not in _OTHERS:
            return None
    return tensors


def register(
    op: str,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    autocast: bool = False,
    native: bool = True,
    eager: Callable | None = None,
) -> None:
    """Registers the fake, and the backward if any, of an operator of the native library and its Triton twin.

    `backward(kernels, ctx, *grads)` is given the operators of the forward operator's backend. With autocast, the op's
    floating-point tensors are cast to the autocast dtype, as torch casts those of conv2d. Without `native` the operator
    exists in Triton alone. `eager` computes on the CPU what the operator does there, by torch's own operators alone,
    which autograd and autocast know: that saves the way to ours.
    """
    CONTRACTS[op] = Contract(fake, backward, setup_context, autocast, eager)
    if native and _library.LOADED:
        implement(_library.NAMESPACE, op)


def implement(namespace: str, op: str) -> None:
    """Gives an operator of `namespace` the contract of the op."""
    contract, name = CONTRACTS[op], f"{namespace}::{op}"
    torch.library.register_fake(name, contract.fake)
    if contract.backward is not None:
        backward = functools.partial(_backward, contract.backward, namespace)
        torch.library.register_autograd(name, backward, setup_context=contract.setup_context)
    if contract.autocast:
        _register_autocast(namespace, op)


def _backward(backward: Callable, namespace: str, ctx: Any, *grads: Any) -> Any:
    return backward(operators(namespace), ctx, *grads)


_autocast: list[torch.library.Library] = []


def _cast(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments of an op that computes in autocast's dtype."""
    return [
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64 else arg
        for arg in args
    ]


def _register_autocast(namespace: str, op: str) -> None:
    overload = getattr(getattr(torch.ops, namespace), op).default
    library = torch.library.Library(namespace, "IMPL")
    _autocast.append(library)
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def run(*args: Any, device: str = device, key: str = key) -> Any:
            dtype = torch.get_autocast_dtype(device)
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return overload(*_cast(args, dtype))

        library.impl(op, run, key)


def double_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, grad_grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, with respect to `grad` and `inputs`, of the gradients that `function` gives its inputs for `grad`.

    `function` is an op's definition in plain PyTorch; half-precision values go through it in float32. The result is
    differentiable again.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():

        def leaf(t: Tensor) -> Tensor:
            return t if create_graph and t.requires_grad else t.detach().requires_grad_()

        def wide(t: Tensor) -> Tensor:
            return t.float() if t.dtype in LOW_PRECISION else t

        xs, g = [leaf(x) for x in inputs], leaf(grad)
        wanted = [i for i, gg in enumerate(grad_grads) if gg is not None]
        out = function(*map(wide, xs)).to(g.dtype)
        first = torch.autograd.grad(out, [xs[i] for i in wanted], g, create_graph=True)
        return torch.autograd.grad(
            first,
            [g, *xs],
            [grad_grads[i] for i in wanted],
            create_graph=create_graph,
            allow_unused=True,
        )
