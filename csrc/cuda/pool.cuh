// Max-pooling of vectors of channels, shared by max_pool2d.cu and lrn_max_pool2d.cu.
#pragma once

#include "common/pool.h"
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {

struct PoolShape {
  PoolShape(const IntList& kernel, const IntList& stride, const IntList& padding)
      : kernel_h(int(kernel[0])),
        kernel_w(int(kernel[1])),
        stride_h(int(stride[0])),
        stride_w(int(stride[1])),
        pad_h(int(padding[0])),
        pad_w(int(padding[1])),
        by_stride_h(stride[0]),
        by_stride_w(stride[1]) {}

  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  Divisor by_stride_h, by_stride_w;
};

// The running maximum of a window and its position in the window, for each channel of a vector. The first of equal
// values wins; NaN wins over numbers, the last NaN over the others.
template <int kVec>
struct Maximum {
  float value[kVec] = {};
  int position[kVec] = {};
  bool empty = true;

  __device__ __forceinline__ void update(const float (&other)[kVec], int at) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool wins = empty || other[i] > value[i] || other[i] != other[i];
      value[i] = wins ? other[i] : value[i];
      position[i] = wins ? at : position[i];
    }
    empty = false;
  }
  // Merges the maximum of later pixels; `offset` is added to its positions.
  __device__ __forceinline__ void merge(const Maximum& later, int offset) {
    if (later.empty) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool wins = empty || later.value[i] > value[i] || later.value[i] != later.value[i];
      value[i] = wins ? later.value[i] : value[i];
      position[i] = wins ? later.position[i] + offset : position[i];
    }
    empty = false;
  }
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = cuda::relu(value[i]);
  }
};

// The windows [first, last), of `count` along one axis, that contain position `at`.
struct WindowRange {
  int first, last;
};
__device__ __forceinline__ WindowRange windows_over(int at, int kernel, const Divisor& stride, int pad, int count) {
  const int p = at + pad;
  return {p < kernel ? 0 : stride.quotient(p - kernel) + 1, min(stride.quotient(p) + 1, count)};
}

// The gradient of the input's vector at `at`, gathered from the windows that contain it by their argmax. A 3 x 3 window
// with stride 2 reads up to four windows: per vector, 16 bytes of grad and kVec bytes of argmax each. y: the pooled
// output, for the mask of ReLU, or null.
template <int kVec, class T>
__device__ __forceinline__ void gather(const Coordinates& at, const ImageLayout& out, const PoolShape& pool,
                                       const T* grad, const T* y, const uint8_t* argmax, float (&sum)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] = 0.f;
  const WindowRange rows = windows_over(at.y, pool.kernel_h, pool.by_stride_h, pool.pad_h, out.H);
  const WindowRange columns = windows_over(at.x, pool.kernel_w, pool.by_stride_w, pool.pad_w, out.W);
  for (int oh = rows.first; oh < rows.last; ++oh) {
    for (int ow = columns.first; ow < columns.last; ++ow) {
      const int position =
          (at.y + pool.pad_h - oh * pool.stride_h) * pool.kernel_w + at.x + pool.pad_w - ow * pool.stride_w;
      const int64_t from = out.offset(at.n, at.c, oh, ow);
      float g[kVec];
      int argmax_of_window[kVec];
      load<kVec>(grad + from, g);
      load_bytes<kVec>(argmax + from, argmax_of_window);
      if (y != nullptr) {
        float value[kVec];
        load<kVec>(y + from, value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) g[i] = value[i] <= 0.f ? 0.f : g[i];
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += argmax_of_window[i] == position ? g[i] : 0.f;
    }
  }
}

}  // namespace alexnet_kernels::cuda
