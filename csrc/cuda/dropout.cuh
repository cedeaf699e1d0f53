// Dropout by Philox, shared by dropout.cu and linear_relu_dropout.cu. An element is dropped when its word
// (common/philox.h) is below threshold = round(p * 2^32), and multiplied by scale otherwise.
#pragma once

#include "common/philox.h"
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {

struct Dropout {
  Dropout(double p, double scale, int64_t offset)
      : threshold(uint64_t(p * 4294967296.0 + 0.5)), offset(uint64_t(offset)), scale(float(scale)) {}

  uint64_t threshold;  // up to 2^32
  uint64_t offset;
  float scale;
};

// Element i of row r, of `row` elements, has index base + r * row_stride + i.
struct Rows {
  Rows(int64_t row, int64_t row_stride, int64_t base) : row(row), row_stride(row_stride), base(base) {}

  __device__ __forceinline__ int64_t index(int64_t element) const {
    if (row.value() == row_stride) return base + element;
    const int64_t r = row.quotient(element);
    return base + r * row_stride + (element - r * row.value());
  }

  LongDivisor row;
  int64_t row_stride, base;
};

__device__ __forceinline__ float dropped(const Dropout& d, float v, uint32_t word) {
  return word < d.threshold ? 0.f : v * d.scale;
}

// The element of this index.
__device__ __forceinline__ float drop(const Dropout& d, uint64_t seed, int64_t index, float v) {
  if (d.threshold == 0) return v * d.scale;
  const Words4 words = philox(seed, d.offset, uint64_t(index) / 4);
  const uint32_t low = index % 2 ? words.word[1] : words.word[0], high = index % 2 ? words.word[3] : words.word[2];
  return dropped(d, v, index % 4 < 2 ? low : high);
}

// kCount consecutive elements, the first of which is `element`. Four elements of one quad share one Philox call.
template <int kCount>
__device__ __forceinline__ void drop(const Dropout& d, const Rows& rows, uint64_t seed, int64_t element,
                                     float (&v)[kCount]) {
  constexpr int kStep = kCount % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    const int64_t index = rows.index(element + i);
    if (kStep == 4 && index % 4 == 0 && rows.index(element + i + kStep - 1) == index + 3 && d.threshold != 0) {
      const Words4 words = philox(seed, d.offset, uint64_t(index) / 4);
#pragma unroll
      for (int j = 0; j < kStep; ++j) v[i + j] = dropped(d, v[i + j], words.word[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kStep; ++j) v[i + j] = drop(d, seed, rows.index(element + i + j), v[i + j]);
    }
  }
}

// A thread computes kVec elements of arrays without gaps. The seed is read from device memory: a captured CUDA graph
// drops other elements when it changes.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    dropout_rows(Dropout d, Rows rows, bool with_relu, int64_t count, const int64_t* seed, const T* x, T* y) {
  const int64_t element = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (element >= count) return;
  float v[kVec];
  load<kVec>(x + element, v);
  if (with_relu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = relu(v[i]);
  }
  drop<kVec>(d, rows, uint64_t(*seed), element, v);
  store<kVec>(y + element, v);
}

// y = dropout(x), or dropout(relu(x)) if with_relu; y may be x.
template <class T>
void run_dropout(const OnDevice& device, const Dropout& d, Rows rows, bool with_relu, int64_t count,
                 const int64_t* seed, const T* x, T* y) {
  if (rows.row.value() >= count) rows.row_stride = rows.row.value();
  for_vector<T>(count % kVector<T> == 0 && aligned(x, y) ? kVector<T> : 1, [&](auto vector) {
    device.launch(dropout_rows<T, vector>, divide_up(count, int64_t(vector) * kThreads), kThreads, d, rows, with_relu,
                  count, seed, x, y);
  });
}

}  // namespace alexnet_kernels::cuda
