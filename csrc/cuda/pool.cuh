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

  // AlexNet's windows.
  bool three_by_two() const { return kernel_h == 3 && kernel_w == 3 && stride_h == 2 && stride_w == 2; }

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
  // max(0, value); where that is zero, the position is kNowhere.
  __device__ __forceinline__ void relu() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      position[i] = value[i] <= 0.f ? kNowhere : position[i];
      value[i] = cuda::relu(value[i]);
    }
  }
};

// -inf, for a branch that is seldom taken: the compiler would set registers to a constant before the branch, always.
__device__ __forceinline__ float minus_infinity() {
#if defined(__CUDA_ARCH__)
  float v;
  asm volatile("mov.f32 %0, 0fff800000;" : "=f"(v));
  return v;
#else
  return -INFINITY;
#endif
}

// The running maximum of a vector, its position in a byte for each channel, four in a word. Pixels outside of the image
// are -inf.
template <int kVec>
struct PackedMaximum {
  float value[kVec];
  uint32_t position[kVec / 4];

  // With the values of later pixels.
  __device__ __forceinline__ void update(const float (&other)[kVec], const uint32_t (&at)[kVec / 4]) {
    const uint32_t never[kVec / 4] = {};
    take(other, at, never);
  }
  // With the maxima of another column, whose positions may be earlier: of equal values the earliest wins. Of several
  // NaNs that of the last column does.
  __device__ __forceinline__ void merge(const float (&other)[kVec], const uint32_t (&at)[kVec / 4]) {
    uint32_t earlier[kVec / 4];
#pragma unroll
    for (int word = 0; word < kVec / 4; ++word) {
      // Positions are below 128: no byte borrows from the next one, and its bit 7 tells which position is earlier.
      const uint32_t bits = ~((at[word] | 0x80808080u) - position[word]) & 0x80808080u;
      earlier[word] = (bits >> 7) * 0xffu;
    }
    take(other, at, earlier);
  }

 private:
  // Larger values, and the positions of equal ones whose byte of `ties` is set.
  __device__ __forceinline__ void take(const float (&other)[kVec], const uint32_t (&at)[kVec / 4],
                                       const uint32_t (&ties)[kVec / 4]) {
#pragma unroll
    for (int word = 0; word < kVec / 4; ++word) {
      uint32_t wins = 0, equals = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = other[word * 4 + i];
        float& best = value[word * 4 + i];
        const bool larger = v > best || v != v;
        equals |= v == best ? 0xffu << (8 * i) : 0;
        best = larger ? v : best;
        wins |= larger ? 0xffu << (8 * i) : 0;
      }
      const uint32_t mask = wins | (equals & ties[word]);
      position[word] = (position[word] & ~mask) | (at[word] & mask);
    }
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
// with stride 2 reads up to four windows: per vector, 16 bytes of grad and kVec bytes of argmax each.
template <int kVec, class T>
__device__ __forceinline__ void gather(const Coordinates& at, const ImageLayout& out, const PoolShape& pool,
                                       const T* grad, const uint8_t* argmax, float (&sum)[kVec]) {
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
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += argmax_of_window[i] == position ? g[i] : 0.f;
    }
  }
}

// Backward of windows of 3 x 3 pixels, two apart. Block (i, j) of the input is the pixels (2 i + r - pad_h, 2 j + s -
// pad_w), r and s being 0 or 1. They are in the four windows (i - 1 + p, j - 1 + q), p and q being 0 or 1: row r = 0 is
// row 2 of the windows p = 0 and row 0 of p = 1; row r = 1 is row 1 of p = 1; columns likewise. Nine pairs of pixel and
// window.
inline IntList blocks_of_pixels(const IntList& size, const IntList& padding) {
  return {size[0], size[1], divide_up(size[2] + padding[0], 2), divide_up(size[3] + padding[1], 2)};
}

// A vector of the gradient of a block's pixels, [2][2], gathered from its windows. at: the coordinates of the block.
// exists: whether the block does.
template <int kVec, class T>
__device__ __forceinline__ void gather_block(const Coordinates& at, bool exists, const ImageLayout& out, const T* grad,
                                             const uint8_t* argmax, float (&g)[2][2][kVec]) {
  Packed<T, kVec> grads[2][2] = {};
  Packed<uint8_t, kVec> places[2][2] = {};
  const int64_t first = out.offset(at.n, at.c, at.y - 1, at.x - 1);
  grad += first, argmax += first;
#pragma unroll
  for (int p = 0; p < 2; ++p) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const bool inside = unsigned(at.y - 1 + p) < unsigned(out.H) && unsigned(at.x - 1 + q) < unsigned(out.W);
      if (!exists || !inside) continue;
      const int from = p * out.row_stride + q * out.column_stride;
      grads[p][q].load(grad + from);
      places[p][q].load(argmax + from);
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
#pragma unroll
    for (int p = 0; p < 2; ++p) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const float value = grads[p][q][i];
        const int place = places[p][q][i];
#pragma unroll
        for (int r = 0; r <= p; ++r) {
#pragma unroll
          for (int s = 0; s <= q; ++s) {
            const bool wins = place == (p == 0 ? 2 : r) * 3 + (q == 0 ? 2 : s);
            if (p == r && q == s) {
              g[r][s][i] = wins ? value : 0.f;  // the first window of the pixel
            } else if (wins) {
              g[r][s][i] += value;
            }
          }
        }
      }
    }
  }
}

// Calls body with the row and the column, constants, of each pixel of a block.
template <class Body>
__device__ __forceinline__ void for_pixels(const Body& body) {
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  body(Zero{}, Zero{});
  body(Zero{}, One{});
  body(One{}, Zero{});
  body(One{}, One{});
}

}  // namespace alexnet_kernels::cuda
