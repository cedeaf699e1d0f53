"""The contract of every op on every backend, from the op records."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from contract import (
    LAYOUTS,
    Case,
    as_tuple,
    check,
    expectation,
    expected,
    map_tensors,
    parametrize,
    restride,
    settings,
    typical_cases,
    wanted,
)
from helpers import assert_close, assert_same, check_repeatable, forward_backward
from helpers import check_gradients as check_derivatives
from platforms import BACKENDS, INTERPRETED, emulation

from alexnet_kernels import _library, ops
from alexnet_kernels._dispatch.contracts import CONTRACTS
from alexnet_kernels.op_info import OP_INFOS, Maker, Setting, operator_calls
from alexnet_kernels.op_info._record import OVERHEAD

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
pytestmark = pytest.mark.slow


def auto(device: str) -> list[str | None]:
    return [None]


def test_every_op_has_a_record() -> None:
    assert set(OP_INFOS) == set(ops.__all__)
    for name, info in OP_INFOS.items():
        assert info.name == name
        assert len({sample.id for sample in info.samples}) == len(info.samples), name


def test_every_backend_is_tested() -> None:
    expected = {"cpu", "native"}
    if not torch.cuda.is_available():
        expected |= {"triton"} if _library.TRITON_INSTALLED and os.environ["TRITON_INTERPRET"] == "1" else set()
        expected |= {"cuda"} if emulation else set()
    assert set(BACKENDS["cpu"]) == expected


@parametrize(
    Case(info, sample, setting)
    for info in OP_INFOS.values()
    for sample in info.samples
    for setting in settings(info)
    if info.takes(sample, setting.dtype)
)
def test_equals_the_definition(case: Case) -> None:
    info, sample, setting, _ = case
    assert sample is not None
    check(case, expectation(info.name, sample.id, setting.dtype, setting.memory_format, setting.device))


@parametrize(typical_cases(chosen=auto, dtypes=[F32]))
def test_auto_equals_the_definition(case: Case) -> None:
    check(case, expected(case.info, case.inputs()))


@parametrize(
    Case(info, None, setting, layer.name)
    for info in OP_INFOS.values()
    for layer in info.layers
    if layer.timed and layer.name != OVERHEAD
    # Products take float64 a second each.
    for setting in settings(info, (F32, BF16) if info.images and not info.casts else (F32,), auto)
)
def test_alexnets_layers(case: Case) -> None:
    layer = next(layer for layer in case.info.layers if layer.name == case.layout)
    check(case, expected(case.info, layer.inputs(case.maker, 1)))


@parametrize(
    case
    for case in typical_cases(LAYOUTS)
    # The strides of the others do not depend on the memory format.
    if case.layout == "expanded" or not case.info.images or case.setting.memory_format == torch.channels_last
)
def test_arguments_of_any_strides(case: Case) -> None:
    inputs = {name: map_tensors(lambda t: restride(t, case.layout), value) for name, value in case.inputs().items()}
    if case.layout == "expanded":  # what the op modifies can't be
        inputs |= {name: value for name, value in case.inputs().items() if name in case.info.modifies}
    check(case, expected(case.info, inputs))


@parametrize(case for case in typical_cases(("constant", "sliced", "transposed")) if case.info.wrt)
def test_output_gradients_of_any_strides(case: Case) -> None:
    inputs = case.inputs()
    names, call = wanted(case.info, inputs), case.function(inputs)
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    output = as_tuple(call(*leaves))[0]
    grad = restride(torch.randint(1, 5, output.shape).to(output.device, output.dtype), case.layout)
    dense = torch.empty_like(output).copy_(grad)
    actual, same = (torch.autograd.grad(output, leaves, g, retain_graph=True) for g in (grad, dense))
    for name, a, b in zip(names, actual, same, strict=True):
        assert_close(a, b.double(), slack="library", what=f"gradient of {name}")


@parametrize(
    Case(info, sample, setting)
    for info in OP_INFOS.values()
    for sample in info.derivatives
    for setting in settings(info, [F64])
)
def test_first_and_second_derivatives(case: Case) -> None:
    assert case.sample is not None
    inputs = case.info.derivative_inputs(case.sample, case.maker)
    call = case.function(inputs)
    check_derivatives(lambda *tensors: as_tuple(call(*tensors))[0], [inputs[n] for n in wanted(case.info, inputs)])


@pytest.mark.parametrize("op", [info.name for info in OP_INFOS.values() if info.wrt])
def test_the_definition_is_twice_differentiable(op: str) -> None:
    info = OP_INFOS[op]
    inputs = info.derivative_inputs(info.derivatives[-1], Maker(F64))
    names = wanted(info, inputs)

    def definition(*tensors: torch.Tensor) -> torch.Tensor:
        return as_tuple(info.reference(**{**inputs, **dict(zip(names, tensors, strict=True))}))[0]

    check_derivatives(definition, [inputs[name] for name in names])


@parametrize(
    Case(info, info.large, setting)
    for info in OP_INFOS.values()
    for setting in settings(info)
    if info.takes(info.large, setting.dtype)
    # Triton's interpreter has no threads.
    and not (setting.backend == "triton" and setting.device == "cpu")
)
def test_repeats_bitwise(case: Case, threads: Callable[[int], None]) -> None:
    inputs, across = case.inputs(), case.info.repeats_across_threads(case.setting.backend)
    call, names = case.function(inputs), wanted(case.info, inputs)
    if names:
        check_repeatable(lambda *x: as_tuple(call(*x))[0], [inputs[n] for n in names], threads, across=across)
        return
    first = None
    for count in (1, 1, 2, 2):
        threads(count)
        found = as_tuple(call())
        first = found if first is None else first
        assert_same(found, first, f"{count} threads")


@parametrize(
    Case(info, sample, setting)
    for info in OP_INFOS.values()
    for sample in (*info.typical, *(s for s in info.samples if s.shape and s.shape[0] == 0 and len(s.shape) == 4))
    for setting in settings(info, [F32], lambda device: [b for b in BACKENDS[device] if b != "native"])
    if setting.backend != "cuda" or setting.device == "cuda"  # the emulation has the native library's contracts
)
def test_registration(case: Case) -> None:
    namespace = "alexnet_kernels_triton" if case.setting.backend == "triton" else "alexnet_kernels"
    seen = set()
    for operator, args in operator_calls(case.info, case.inputs(), case.setting.backend or ""):
        if operator not in seen:
            seen.add(operator)
            if operator == case.info.name and case.info.wrt:
                args = tuple(
                    a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
                )
            torch.library.opcheck(getattr(getattr(torch.ops, namespace), operator).default, args)


def test_records_call_every_operator() -> None:
    called = set()
    for info in OP_INFOS.values():
        for sample in (*info.typical, info.large):
            for backend in ("cpu", "triton"):
                setting = Setting(backend, "cpu", BF16, torch.channels_last)
                inputs = Case(info, sample, setting).inputs()
                called |= {operator for operator, _ in operator_calls(info, inputs, backend, run=False)}
    assert called == set(CONTRACTS)


@parametrize(
    Case(info, info.typical[0], setting)
    for info in OP_INFOS.values()
    for setting in settings(info, [F32])
    if setting.backend != "native" or info.native_compiles
)
def test_compiles(case: Case, fresh_dynamo: None) -> None:
    """torch.compile captures the whole function, for any batch size, with bitwise identical results."""
    inputs = case.inputs()
    call, names = case.function(inputs), wanted(case.info, inputs)

    if not names:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert_same(as_tuple(compiled()), as_tuple(call()), "compiled")
        return

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return as_tuple(call(tensors[0] * 2, *tensors[1:]))[0]

    tensors = [inputs[name] for name in names]
    wider = [torch.cat([tensors[0], tensors[0]]), *tensors[1:]]
    for dynamic in (None, True) if case.setting.backend != "native" else (None,):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for given in (tensors, wider) if dynamic else (tensors,):
            actual, eager = forward_backward(compiled, *given), forward_backward(function, *given)
            if case.setting.backend == "native":  # PyTorch's operators may be decomposed
                torch.testing.assert_close(actual, eager)
            else:
                assert_same(actual, eager, "compiled")


@parametrize(
    Case(info, sample, setting)
    for info in OP_INFOS.values()
    if info.wrt
    for sample in info.typical
    for setting in settings(info, [F32], lambda device: [b for b in BACKENDS[device] if b != "native"])
)
def test_the_result_may_be_overwritten(case: Case, fresh_dynamo: None) -> None:
    """Before backward, where torch's composition allows it; the gradients are those of arithmetic out of place."""
    inputs = case.inputs()
    names = wanted(case.info, inputs)

    def gradients(call: Callable, in_place: bool) -> tuple[torch.Tensor, ...]:
        def function(*tensors: torch.Tensor) -> torch.Tensor:
            result = as_tuple(call(*(tensor * 1 for tensor in tensors)))[0]
            return result.mul_(-2).add_(1) if in_place else result * -2 + 1

        compiled = torch.compile(function, backend="aot_eager") if call is compiles else function
        return forward_backward(compiled, *(inputs[name] for name in names))

    compiles = case.function(inputs)
    try:
        gradients(case._replace(setting=case.setting._replace(backend="native")).function(inputs), True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    expected = gradients(lambda *tensors: compiles(*tensors), False)
    assert_same(gradients(lambda *tensors: compiles(*tensors), True), expected, "in place")
    # The other backends' operators save the same.
    if case.setting.backend == case.setting.device and case.setting.memory_format == torch.contiguous_format:
        assert_same(gradients(compiles, True), expected, "compiled")


@parametrize(
    Case(info, info.typical[0], setting)
    for info in OP_INFOS.values()
    if info.wrt
    for setting in settings(info, (F32, BF16))
)
def test_autocast(case: Case) -> None:
    """An op that casts has the results of bfloat16 tensors; any other op ignores autocast."""
    inputs = case.inputs()
    call, tensors = case.function(inputs), [inputs[name] for name in wanted(case.info, inputs)]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return as_tuple(call(*tensors))[0]

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.autocast(case.setting.device, BF16):
        output = function(*leaves)
    plain = function(*[tensor.to(BF16) if case.info.casts else tensor for tensor in tensors])
    assert_same(output.detach(), plain)
    assert output.dtype == (BF16 if case.info.casts else case.setting.dtype)
    gradients = torch.autograd.grad(output.float().square().sum(), leaves)
    if not case.info.casts:
        same = [tensor.clone().requires_grad_() for tensor in tensors]
        assert_same(gradients, torch.autograd.grad(function(*same).float().square().sum(), same))
    assert [gradient.dtype for gradient in gradients] == [leaf.dtype for leaf in leaves]


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set")
def test_triton_operators_have_the_native_ones_arguments() -> None:
    import alexnet_kernels.triton  # noqa: F401

    for operator in CONTRACTS:
        overload = getattr(torch.ops.alexnet_kernels_triton, operator).default
        native = getattr(torch.ops.alexnet_kernels, operator, None)
        if native is not None:
            schemas = overload._schema, native.default._schema
            assert len({tuple(argument.name for argument in schema.arguments) for schema in schemas}) == 1, operator
            assert len({len(schema.returns) for schema in schemas}) == 1, operator
