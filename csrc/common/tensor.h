// Tensors through torch's stable ABI: dtypes, memory formats, allocation, calls of torch's operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "dtype.h"

namespace alexnet_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "alexnet_kernels: float32, float64, bfloat16 or float16 expected");
  }
}

inline bool has_channels_last_strides(const Tensor& t) {
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The memory format of results. alexnet_kernels/_dispatch/layout.py has the same rule for fake tensors.
inline MemoryFormat memory_format_of(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return MemoryFormat::Contiguous;
  if (has_channels_last_strides(t)) return MemoryFormat::ChannelsLast;
  const bool slice_of_channels_last = t.size(1) > 1 && t.stride(1) == 1 && t.stride(3) >= t.size(1);
  return slice_of_channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// t with dense strides of the given format: its memory is [N, C, H, W] (Contiguous) or [N, H, W, C] (ChannelsLast).
inline Tensor in_format(const Tensor& t, MemoryFormat format) {
  if (format == MemoryFormat::Contiguous) return t.is_contiguous() ? t : torch::stable::contiguous(t);
  return has_channels_last_strides(t) ? t : torch::stable::contiguous(t, format);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(in_format(*t, MemoryFormat::Contiguous)) : std::nullopt;
}

inline Tensor empty(const IntList& size, ScalarType dtype, const Tensor& like,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline IntList sizes_of(const Tensor& t) {
  auto s = t.sizes();
  return IntList(s.begin(), s.end());
}

// The macro's name in torch 2.11.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Calls the default overload of one of torch's operators. The dispatcher replaces the first argument by the result.
template <class Result = Tensor, size_t kCount>
inline Result call_torch(const char* op, std::array<StableIValue, kCount> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

template <class... Args>
inline std::array<StableIValue, sizeof...(Args)> stack_of(const Args&... args) {
  return {torch::stable::detail::from(args)...};
}

}  // namespace alexnet_kernels
