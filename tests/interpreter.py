"""Patches Triton's interpreter: bfloat16 as on a GPU, an error for accesses outside of tensors, and less overhead.

The interpreter of Triton 3.6 to 3.9

- stores bfloat16 as raw bits, multiplies those bits in `tl.dot`, and truncates where a GPU rounds to nearest;
- patches `triton.language` again for each function that a kernel calls, which takes milliseconds;
- checks every integer sum and product for overflow even while device assertions are off;
- compares equal shapes one dimension at a time;
- in version 3.6, fails on loop bounds with numpy 2.4, which does not convert an array of one element to an index.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, wraps

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from alexnet_kernels.triton import _config


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values, rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def float32_values(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


# The launch constants that `patch` replaces.
SHIPPED: dict[str, object] = {}
# The memory of the current launch's tensors, as (first address, end address).
allowed: list[tuple[int, int]] = []
# Triton's own modules that the current launch has patched by calling their functions.
patched: set[str] = set()


def memory_of(argument: object) -> list[tuple[int, int]]:
    if isinstance(argument, tuple):
        return [memory for element in argument for memory in memory_of(element)]
    if not isinstance(argument, torch.Tensor):
        return []
    storage = argument.untyped_storage()
    return [(storage.data_ptr(), storage.data_ptr() + storage.nbytes())]


def check_inside(pointers, mask, size: int) -> None:
    """Raises IndexError unless all elements of an access, `size` bytes each, lie in one tensor of the launch."""
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
    if addresses.size:
        low, high = int(addresses.min()), int(addresses.max()) + size
        if not any(first <= low and high <= end for first, end in allowed):
            raise IndexError(f"addresses {low} to {high} are in no tensor of the launch: {allowed}")


def check_memory() -> None:
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, begin = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    @wraps(begin)
    def checked_begin(self, args, kwargs):
        patched.clear()
        arguments = begin(self, args, kwargs)
        allowed[:] = [memory for some in (arguments[0], arguments[1].values()) for a in some for memory in memory_of(a)]
        return arguments

    @wraps(load)
    def checked_load(self, pointers, mask, *rest):
        check_inside(pointers, mask, max(8, pointers.get_element_ty().primitive_bitwidth) // 8)
        return load(self, pointers, mask, *rest)

    @wraps(store)
    def checked_store(self, pointers, value, mask, *rest):
        check_inside(pointers, mask, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = checked_begin
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def reduce_overhead() -> None:
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    broadcast, numpy_dtype = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
    numpy_dtype_of_scalars = cache(numpy_dtype)

    @wraps(broadcast)
    def broadcast_unequal(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and [*lhs.type.shape] == [*rhs.type.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    @wraps(numpy_dtype)
    def cached_numpy_dtype(dtype):
        return numpy_dtype(dtype) if dtype.scalar.is_ptr() else numpy_dtype_of_scalars(dtype.scalar)

    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast_unequal, cached_numpy_dtype


def patch() -> None:
    check_memory()
    reduce_overhead()
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    original = interpreter.InterpretedFunction.__call__

    @wraps(cast)
    def patched_cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            return interpreter.TensorHandle(bfloat16_bits(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return interpreter.TensorHandle(float32_values(src.data), target)
        return cast(self, src, dst_type)

    @wraps(dot)
    def patched_dot(self, a, b, *rest):
        def wide(handle):
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            return interpreter.TensorHandle(float32_values(handle.data), tl.float32)

        return dot(self, wide(a), wide(b), *rest)

    @wraps(original)
    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:  # the launch has not patched this module
            patched.add(module)
            return original(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    patch_tensor = interpreter._patch_lang_tensor

    @wraps(patch_tensor)
    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
    # Interpreting a program takes the same time for any block size: use few, large programs.
    SHIPPED.update({name: getattr(_config, name) for name in ("VECTORS", "SCALARS", "CONV_FLOAT")})
    _config.VECTORS = replace(_config.VECTORS, block=1024)
    _config.SCALARS = replace(_config.SCALARS, block=4096)
    _config.CONV_FLOAT = replace(_config.CONV_HALF, terms=128)
    builder.cast_impl, builder.create_dot = patched_cast, patched_dot
    interpreter.InterpretedFunction.__call__ = call


@triton.jit
def copy_kernel(from_ptr, to_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at), mask=at < count)
