"""The container that computes runs of its children by one op each, and `fuse`, which changes any model."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alexnet_kernels._torch_private import has_global_module_hooks, is_transformed
from alexnet_kernels.backends import leaves_as_torch, select
from alexnet_kernels.nn.layers import RUN_LAYERS, examine, kinds_of
from alexnet_kernels.nn.originals import foreign_mode, replaced
from alexnet_kernels.nn.report import FusionReport, Layers
from alexnet_kernels.nn.runs import NO_MASKS, RULES_WITH_BIAS, Masks, compute, ops_of, rule_of, run_at, takes

__all__ = ["FusedSequential", "fuse", "fusion_report", "unfuse"]

M = TypeVar("M", bound=nn.Module)


class FusedSequential(nn.Sequential):
    """torch.nn.Sequential that computes the same, with one op for each of these runs of children:

    | children | op |
    |---|---|
    | Conv2d[, ReLU] | conv2d_relu; where a max-pool follows, the pool takes the ReLU and, on backend "cuda", the bias |
    | ReLU, [LocalResponseNorm,] MaxPool2d | max_pool2d or lrn_max_pool2d with relu=True |
    | LocalResponseNorm, MaxPool2d | lrn_max_pool2d |
    | MaxPool2d, ReLU | max_pool2d with relu=True: the same function |
    | BatchNorm2d, ReLU | batch_norm_relu |
    | Linear, ReLU[, Dropout] | linear_relu_dropout |
    | Linear alone, on the CPU | linear_relu_dropout with relu=False and p=0 |
    | ReLU, LocalResponseNorm, MaxPool2d, Dropout alone | their own |

    Where a run that begins with a Conv2d follows Conv2d, ReLU, on a GPU, the following convolution's backward applies
    the ReLU's mask, to the gradient that it hands back.

    The children are not changed: state_dict keys, slices, replacement, hooks and re-parenting work as in Sequential.
    Runs are found in every call. A child is part of a run only if nothing about it is the user's: its type is exactly
    torch.nn's or this package's; it has no hook, parametrization, compiled call or method of its own; no method of its
    class and no function of torch that it calls was replaced; its parameters, buffers and input are plain tensors with
    strides; and the op supports its arguments (no dilation, padding_mode or string padding, no return_indices). Every
    other child is called by itself. So is every child under a global module hook; inside torch.func's transforms, the
    vmap of torch.autograd and forward-mode differentiation; under a mode of torch functions or operators that torch
    does not define, unless the mode has the attribute sees_fused_ops = True; in TorchScript; and while torch.export,
    torch.onnx.export or torch.jit.trace records a program, unless a backend is asked for. With gradients, ReLU runs by
    itself where it begins ReLU, LocalResponseNorm, MaxPool2d and others may hold its input: they may overwrite it
    afterwards. Dropout masks are drawn from the ops' stream, not from torch.nn.Dropout's.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for child in self:
                input = child(input)
            return input
        else:  # noqa: RET505  TorchScript compiles what follows an `if`
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if _obstacle() or leaves_as_torch():
            return super().forward(input)
        children = list(self._modules.values())
        kinds = kinds_of(children)
        x, i, masks = input, 0, NO_MASKS
        own = False  # whether nobody else can hold x, and so write into it
        while i < len(children):
            run = _run_taken(kinds, children, i, x)
            if run == "RNP" and not own and x.requires_grad and torch.is_grad_enabled():
                run = "R"  # saves its result; the op would save x
            if run:
                end = i + len(run)
                masks = Masks(run == "CR" and _masks_input(kinds, children, i, end, x), masks.grad)
                y = compute(run, children[i:end], x, masks)
                x, own, i = y, own or y is not x, end
            else:
                x = children[i](x)
                own = kinds[i] == "c"
                i += 1
        return x


def fuse(module: M, verbose: bool = False) -> M:
    """Turn every torch.nn.Sequential in `module`, itself included, into a FusedSequential. Returns `module`.

    Only the type of the containers changes: children, parameters, state_dict keys, hooks and references to the
    containers stay. Subclasses of Sequential are left alone, since their forward may differ. Outputs and gradients are
    those of the original module, within rounding; dropout draws different masks from the same seed. Fusing twice has no
    further effect. verbose prints `fusion_report`.
    """
    _change_type(module, nn.Sequential, FusedSequential)
    if verbose:
        print(fusion_report(module))
    return module


def unfuse(module: M) -> M:
    """Turn every FusedSequential in `module`, itself included, into a torch.nn.Sequential. Returns `module`.

    Undoes `fuse`, and makes an `AlexNet` call child by child.
    """
    return _change_type(module, FusedSequential, nn.Sequential)


def fusion_report(module: nn.Module) -> FusionReport:
    """Which layers of `module` are computed together, by which op, and why the others are not.

    Layers are named by their paths, such as "features.0". The report holds for images [N, C, H, W] on the device of the
    parameters and for the hooks, modes and transforms that are active now. Only the children of a FusedSequential are
    fused; `fuse` makes them.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    report = FusionReport()
    _describe(module, "", report.layers)
    return report


def _describe(module: nn.Module, path: str, layers: list[Layers]) -> None:
    children = {f"{path}.{name}".lstrip("."): child for name, child in module._modules.items() if child is not None}
    if type(module) is FusedSequential:
        _describe_children(children, layers)
        return
    if not path and not children:
        layers.append(Layers((type(module).__name__,), None, "not in a Sequential"))
    for name, child in children.items():
        if child._modules:
            _describe(child, name, layers)
        else:
            layers.append(Layers((name,), None, f"in {_container(module)}"))


def _container(module: nn.Module) -> str:
    name = type(module).__name__
    if type(module) is nn.Sequential:
        return "a Sequential that is not fused"
    return f"{name}, a subclass of Sequential" if isinstance(module, nn.Sequential) else f"{name}, not a Sequential"


def _describe_children(named: dict[str, nn.Module], layers: list[Layers]) -> None:
    """What becomes of the children of a FusedSequential."""
    names, children, obstacle = list(named), list(named.values()), _obstacle()
    kinds, i = kinds_of(children), 0
    while i < len(children):
        run, child = "" if obstacle else run_at(kinds, i), children[i]
        if kinds[i] == "." and child._modules:
            _describe(child, names[i], layers)
        elif run and ops_of(run) and _runs_on_its_device(run, child):
            layers.append(Layers(tuple(names[i : i + len(run)]), " and ".join(ops_of(run))))
            i += len(run)
            continue
        else:
            layers.append(Layers((names[i],), None, obstacle or _reason(kinds[i], child)))
        i += 1


def _runs_on_its_device(run: str, child: Any) -> bool:
    return not rule_of(run).cpu or child.weight.device.type == "cpu"


def _reason(kind: str, child: nn.Module) -> str:
    """Why no op computes a child that is not part of a run."""
    if kind == "i":
        return "it overwrites a tensor that others may hold"
    return examine(child)[1] or f"{type(child).__name__} alone" + (" on a GPU" if kind == "L" else "")


def _change_type(module: M, old: type[nn.Sequential], new: type[nn.Sequential]) -> M:
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if type(part) is old:
            part.__class__ = new
    return module


def _obstacle() -> str:
    """Why no run is computed by an op at all; "" if nothing is in the way."""
    if has_global_module_hooks():
        return "a global module hook"
    if is_transformed():
        return "a transform of torch.func or torch.autograd, or forward-mode differentiation"
    if mode := foreign_mode():
        return f"the mode {mode}"
    return replaced(nn.Sequential, "", torch.compiler.is_compiling())


def _run_with_bias_at(kinds: str, children: Sequence[Any], i: int, x: Any) -> str:
    """The run that starts at child i, if its pool should take the bias of its convolution; otherwise "".

    On backend "cuda" the convolution may be cuDNN's, after which bias and ReLU are a pass over its output. Backward,
    their gradients are two passes. The pool computes them in its own. oneDNN and Triton's kernel add the bias for free.
    Layers that compute their runs themselves keep their bias.
    """
    run = next((run for run in RULES_WITH_BIAS if kinds.startswith(run, i)), "") if kinds[i] == "C" else ""
    if not run:
        return ""
    conv, end = children[i], i + len(run)
    taken = (
        takes(rule_of(run), x)
        and conv.bias is not None
        and conv.bias.dtype == conv.weight.dtype
        and not any(type(child) in RUN_LAYERS for child in children[i:end])
        and select("conv2d_relu", x, None) == "cuda"
    )
    return run if taken else ""


def _run_taken(kinds: str, children: Sequence[Any], i: int, x: Any) -> str:
    """The run to compute at child i; "" if the child is called by itself."""
    run = _run_with_bias_at(kinds, children, i, x)
    if run:
        return run
    run = run_at(kinds, i)
    return run if run and takes(rule_of(run), x) else ""


def _masks_input(kinds: str, children: Sequence[Any], i: int, end: int, x: Tensor) -> bool:
    """Whether the run at child `end` is a convolution whose backward applies the mask of the ReLU of run i.

    Nobody but that convolution reads the ReLU's output, and no hook sees its gradient. On the CPU, where torch's own
    convolutions run, nothing is gained.
    """
    if not torch.is_grad_enabled() or end == len(children) or select("conv2d_relu", x, None) in ("cpu", "native"):
        return False
    following = _run_taken(kinds, children, end, x)  # run i hands on a tensor like x
    taken = children[i:end], children[end : end + len(following)]
    return following.startswith("C") and not any(type(child) in RUN_LAYERS for run in taken for child in run)
