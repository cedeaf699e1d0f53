// Max-pooling of vectors of channels, shared by max_pool2d.cu and lrn_max_pool2d.cu.
#pragma once

#include "images.cuh"

namespace alexnet_kernels {

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

inline IntList pooled_sizes(const IntList& size, const IntList& kernel, const IntList& stride, const IntList& padding,
                            bool ceil_mode) {
  return {size[0], size[1], pooled_size(size[2], kernel[0], stride[0], padding[0], ceil_mode),
          pooled_size(size[3], kernel[1], stride[1], padding[1], ceil_mode)};
}

// The largest of the values offered so far, channel by channel, and its place.
template <int kVec>
struct Best {
  float value[kVec] = {};
  int place[kVec] = {};
  bool none = true;

  __device__ __forceinline__ void offer(const float (&other)[kVec], int at) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool wins = none || other[i] > value[i] || other[i] != other[i];
      value[i] = wins ? other[i] : value[i];
      place[i] = wins ? at : place[i];
    }
    none = false;
  }
  // Those that others were the best of; their places lie `ahead` further.
  __device__ __forceinline__ void offer(const Best& others, int ahead) {
    if (others.none) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const bool wins = none || others.value[i] > value[i] || others.value[i] != others.value[i];
      value[i] = wins ? others.value[i] : value[i];
      place[i] = wins ? others.place[i] + ahead : place[i];
    }
    none = false;
  }
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) value[i] = alexnet_kernels::relu(value[i]);
  }
};

// The windows [first, last) of one axis that cover place `at`, of `count`.
struct Cover {
  int first, last;
};
__device__ __forceinline__ Cover cover(int at, int kernel, const Divisor& stride, int pad, int count) {
  const int p = at + pad;
  return {p < kernel ? 0 : stride.quotient(p - kernel) + 1, min(stride.quotient(p) + 1, count)};
}

// The gradients that reach the input's vector at `at`. y, if any, masks what ReLU cut.
template <int kVec, class T>
__device__ __forceinline__ void gather(const Place& at, const Images& out, const PoolShape& pool, const T* grad,
                                       const T* y, const uint8_t* argmax, float (&sum)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) sum[i] = 0.f;
  const Cover rows = cover(at.y, pool.kernel_h, pool.by_stride_h, pool.pad_h, out.H);
  const Cover columns = cover(at.x, pool.kernel_w, pool.by_stride_w, pool.pad_w, out.W);
  for (int oh = rows.first; oh < rows.last; ++oh) {
    for (int ow = columns.first; ow < columns.last; ++ow) {
      const int place =
          (at.y + pool.pad_h - oh * pool.stride_h) * pool.kernel_w + at.x + pool.pad_w - ow * pool.stride_w;
      const int64_t from = out.offset(at.n, at.c, oh, ow);
      float g[kVec];
      int winner[kVec];
      load<kVec>(grad + from, g);
      load_bytes<kVec>(argmax + from, winner);
      if (y != nullptr) {
        float value[kVec];
        load<kVec>(y + from, value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) g[i] = value[i] <= 0.f ? 0.f : g[i];
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += winner[i] == place ? g[i] : 0.f;
    }
  }
}

}  // namespace alexnet_kernels
