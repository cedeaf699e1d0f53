"""The private names of torch that the package depends on, in one place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

dispatch_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys
"""The dispatch keys of a tensor, and those that the thread's state includes."""
BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset
"""The keys of kernels: below autograd, autocast and functorch."""
has_global_module_hooks: Callable[[], bool] = nn.modules.module._has_any_global_hook
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
TRACED_TENSORS: tuple[type[Tensor], ...] = (FakeTensor, FunctionalTensor)
"""The subclasses of Tensor that stand for plain tensors while torch traces a graph."""
_LEGACY_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")
"""In a thread's keys inside the vmap of torch.autograd's is_grads_batched and of jacobian(vectorize=True)."""


def in_transform() -> bool:
    """Whether a torch.func transform, torch.autograd's own vmap or forward-mode differentiation is active."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_LEGACY_VMAP)
    )


def in_vmap() -> bool:
    """Whether a vmap is active, however many transforms it is nested in."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return torch._C._dispatch_tls_is_dispatch_key_included(_LEGACY_VMAP) or any(
        interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack
    )


def is_transformed() -> bool:
    """`in_transform`; inside torch.compile its value while the graph is traced."""
    return _in_transform_when_traced() if torch.compiler.is_compiling() else in_transform()


def is_mapped() -> bool:
    """`in_vmap`; inside torch.compile its value while the graph is traced."""
    return _in_vmap_when_traced() if torch.compiler.is_compiling() else in_vmap()


def function_modes() -> list[Any]:
    """The active modes that see functions of torch."""
    if not torch._C._len_torch_function_stack():
        return []
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def dispatch_modes() -> list[Any]:
    """The active modes that see operators; none inside torch.compile, which does not trace below one."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return []
    return _get_current_dispatch_mode_stack()


def in_autograd_thread() -> bool:
    """Whether the calling thread is one that autograd has started, for the backward passes of a GPU."""
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)


def is_exporting() -> bool:
    """Whether torch.export is recording. Before torch 2.14 torch.compiler.is_exporting() holds in torch.compile too."""
    return torch.compiler._is_exporting_flag


def holds_torch_only() -> bool:
    """Whether torch.jit.trace or torch.onnx.export is recording: neither can hold this package's ops."""
    if torch.compiler.is_compiling():
        return is_exporting() and torch.onnx.is_in_onnx_export()
    return torch._C._get_tracing_state() is not None


def is_leaving() -> bool:
    """Whether torch.export, torch.onnx.export or torch.jit.trace is recording a program that runs without Python."""
    return is_exporting() or holds_torch_only()


def is_observed() -> bool:
    """Whether a mode, a tracer, torch.compile or a transform has to see every operator call."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or is_transformed()
    )


def without_autocast(key: str) -> Any:
    """A context in which the dispatch key "AutocastCPU" or "AutocastCUDA" is skipped."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return torch._C._ExcludeDispatchKeyGuard(keys)


def module_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks of its forward or backward pass."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_seen(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward, or a dispatch mode records its operators."""
    return bool(
        module_hooks(module)
        or has_global_module_hooks()
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or (not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack())
    )


def tensor_hooks(tensor: Tensor) -> bool:
    """Whether a leaf has hooks of its gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)  # type: ignore[attr-defined]


def step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks run before or after the optimizer's steps."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def end_failed_capture(device: int, pool: tuple[int, int]) -> None:
    """Ends the allocations into a graph's pool that torch leaves open where `capture_end` raises.

    While they are open, memory that another stream has used is not reused, and the pool's is not freed.
    """
    with suppress(RuntimeError):  # torch has ended them
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def has_kernel(operator: str, key: str) -> bool:
    """Whether "namespace::operator" has a kernel for a dispatch key."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key))


def operators(namespace: str) -> list[str]:
    """The names, sorted, of a namespace's operators."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({name.split("::")[1].split(".")[0] for name in names if name.startswith(f"{namespace}::")})


F = TypeVar("F", bound=Callable[..., Any])


def is_static(number: Any) -> bool:
    """Whether a size is a number, rather than a symbol of a graph that serves several."""
    if torch.compiler.is_compiling():
        return bool(torch.fx.experimental.symbolic_shapes.has_static_value(number))
    return type(number) is int


def constant_when_compiled(function: F) -> F:
    """What torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def inductor(mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
    """torch.compile's own backend, with a mode and options."""
    return torch._TorchCompileInductorWrapper(mode, options, None)


@constant_when_compiled
def _in_transform_when_traced() -> bool:
    return in_transform()


@constant_when_compiled
def _in_vmap_when_traced() -> bool:
    return in_vmap()
