"""The private names of torch that the package depends on, in one place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

dispatch_keys: Callable[[Tensor], Any] = torch._C._dispatch_keys
"""The dispatch keys of a tensor, and those that the thread's state includes."""
BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset
"""The keys of kernels: below autograd, autocast and functorch."""
has_global_module_hooks: Callable[[], bool] = nn.modules.module._has_any_global_hook
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active. torch.compile can't trace it."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_transformed() -> bool:
    """`in_transform`; False inside torch.compile."""
    return not torch.compiler.is_compiling() and in_transform()


def in_autograd_thread() -> bool:
    """Whether the calling thread is one that autograd has started, for the backward passes of a GPU."""
    return torch._C._current_graph_task_id() != -1 and isinstance(threading.current_thread(), threading._DummyThread)


def is_observed() -> bool:
    """Whether a mode, a tracer, a profiler, torch.compile or a transform has to see every operator call."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
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
