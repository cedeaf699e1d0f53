// The description of a tensor in global memory, of which TMA copies boxes.
#pragma once

#include <array>

#include "runtime.cuh"
#if defined(__CUDACC__)
#include <cuda.h>  // types only
#else
#include "emulation/tensor_map.h"
#endif

namespace alexnet_kernels::cuda {

constexpr int kBoxDimensions = 5;
constexpr int kMostBox = 256;  // elements along a dimension

// What cuTensorMapEncodeTiled writes.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// A tensor of 16-bit elements, of five dimensions, the fastest first, and its boxes. Strides are of dimensions 1 to 4,
// in bytes. A row of a box, its dimension 0, has 32, 64 or 128 bytes, whose 16-byte parts are permuted in shared memory
// (swizzle): part i of row r goes to i ^ (r * bytes / 128) % (bytes / 16).
struct Boxes {
  const void* address;
  std::array<uint64_t, kBoxDimensions> size;
  std::array<uint64_t, kBoxDimensions - 1> stride;
  std::array<uint32_t, kBoxDimensions> box;
  bool bf16;
};

// Whether TMA takes them: addresses and strides of multiples of 16 bytes, sizes below 2^32, boxes of at most 256.
inline bool encodable(const Boxes& boxes) {
  bool fits = reinterpret_cast<uintptr_t>(boxes.address) % 16 == 0;
  for (const uint64_t size : boxes.size) fits = fits && 0 < size && size < (uint64_t(1) << 32);
  for (const uint64_t stride : boxes.stride) fits = fits && stride % 16 == 0 && stride < (uint64_t(1) << 40);
  for (const uint32_t extent : boxes.box) fits = fits && 0 < extent && extent <= kMostBox;
  const uint32_t row = 2 * boxes.box[0];
  return fits && (row == 32 || row == 64 || row == 128);
}

// The driver's function. libcuda.so is not linked: the library loads where there is no driver.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
#if defined(__CUDACC__)
  static const Encode encode_tiled = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion");
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
               "cudaGetDriverEntryPoint");
#endif
    STD_TORCH_CHECK(found != nullptr, "alexnet_kernels: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  return encode_tiled;
#else
  return Encode(&cuTensorMapEncodeTiled);
#endif
}

// Requires encodable(boxes). An error of the driver is raised.
inline TensorMap encode(const Boxes& boxes) {
  STD_TORCH_CHECK(encodable(boxes), "alexnet_kernels: TMA does not take this tensor");
  TensorMap map;
  std::array<uint32_t, kBoxDimensions> steps;
  steps.fill(1);
  const uint32_t row = 2 * boxes.box[0];
  const CUtensorMapSwizzle swizzle = row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : CU_TENSOR_MAP_SWIZZLE_32B;
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));
  const CUresult error = tensor_map_encoder()(
      reinterpret_cast<CUtensorMap*>(&map),
      boxes.bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kBoxDimensions,
      const_cast<void*>(boxes.address), boxes.size.data(), boxes.stride.data(), boxes.box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(error == CUDA_SUCCESS, "alexnet_kernels: cuTensorMapEncodeTiled: error ", int(error));
  return map;
}

}  // namespace alexnet_kernels::cuda
