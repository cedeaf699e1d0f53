// The storage types of floating-point tensors.
#pragma once

#include <cstdint>

namespace alexnet_kernels {

enum class DType : uint8_t { f32, f64, bf16, f16 };

}  // namespace alexnet_kernels
