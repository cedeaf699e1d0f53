// The driver's cuTensorMapEncodeTiled for the emulation: the same name, constants and refusals, for tensors of 16-bit
// elements. What it writes is the emulation's own.
#pragma once

#include <cstdint>
#include <cstring>

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE = 0,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

namespace emulation {

constexpr uint64_t kTensorMapMagic = 0x70616d726f736e65;
constexpr int kElementBytes = 2, kMostDimensions = 5;

// The contents of a CUtensorMap. Dimensions beyond the rank have size, box and step 1.
struct TiledMap {
  uint64_t magic;
  const char* address;
  uint64_t stride[kMostDimensions - 1];  // bytes
  uint32_t last[kMostDimensions];        // size - 1
  uint16_t box[kMostDimensions];
  uint8_t step[kMostDimensions];
  uint8_t rank;
  uint8_t swizzle;  // the span in bytes; 16: none
  uint8_t type;

  int elements(int dimension) const { return (box[dimension] + step[dimension] - 1) / step[dimension]; }
};
static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap));

}  // namespace emulation

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, uint32_t rank, void* address,
                                       const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                                       const uint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  using namespace emulation;
  const auto misaligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (map == nullptr || misaligned(map, 64) || address == nullptr || misaligned(address, 16)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (type != CU_TENSOR_MAP_DATA_TYPE_FLOAT16 && type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (rank < 1 || rank > kMostDimensions || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      unsigned(swizzle) > CU_TENSOR_MAP_SWIZZLE_128B || unsigned(promotion) > CU_TENSOR_MAP_L2_PROMOTION_L2_256B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  TiledMap tiled{
      kTensorMapMagic, static_cast<const char*>(address), {}, {}, {}, {}, uint8_t(rank), uint8_t(16 << swizzle),
      uint8_t(type)};
  for (uint32_t i = 0; i < kMostDimensions; ++i) {
    tiled.box[i] = tiled.step[i] = 1;
    if (i >= rank) continue;
    if (sizes[i] == 0 || sizes[i] > uint64_t(1) << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] == 0 || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t(1) << 40)) return CUDA_ERROR_INVALID_VALUE;
    tiled.last[i] = uint32_t(sizes[i] - 1);
    tiled.box[i] = uint16_t(box[i]);
    tiled.step[i] = uint8_t(i == 0 ? 1 : steps[i]);  // TMA has no step in dimension 0
    if (i > 0) tiled.stride[i - 1] = strides[i - 1];
  }
  const uint32_t row = box[0] * kElementBytes;
  if (row % 16 != 0 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row > tiled.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &tiled, sizeof(tiled));
  return CUDA_SUCCESS;
}
