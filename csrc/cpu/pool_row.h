// Max-pooling of rows, shared by max_pool2d.cpp and lrn_max_pool2d.cpp. The winner's position in its window travels as
// the byte i * kernel_w + j. Ties go to the first position in row-major order; NaN wins, the last one over the others.
#pragma once

#include "common/pool.h"
#include "common/vec.h"

namespace alexnet_kernels {
namespace ALEXNET_ISA {

// One output row of an image whose pixels are `channels` apart. row(y) gives input row y.
template <bool kRelu, class S, class T, class Row>
inline void pool_row_channels_last(const Pool& pool, int64_t H, int64_t W, int64_t channels, int64_t oh, int64_t OW,
                                   const Row& row, T* out, uint8_t* argmax) {
  using A = acc_t<S>;
  const int64_t top = oh * pool.stride_h - pool.pad_h;
  const int64_t i0 = std::max<int64_t>(0, -top), i1 = std::min(pool.kernel_h, H - top);
  for (int64_t ow = 0; ow < OW; ++ow, out += channels, argmax += channels) {
    const int64_t left = ow * pool.stride_w - pool.pad_w;
    const int64_t j0 = std::max<int64_t>(0, -left), j1 = std::min(pool.kernel_w, W - left);
    for_lanes<A>(channels, [&](int64_t c, auto count) {
      Vec<A> best = splat<A>(-std::numeric_limits<A>::infinity());
      IntVec<A> where = IntVec<A>{} + lane_int_t<A>(i0 * pool.kernel_w + j0);
      for (int64_t i = i0; i < i1; ++i) {
        const S* p = row(top + i) + (left + j0) * channels + c;
        for (int64_t j = j0; j < j1; ++j, p += channels) {
          const Vec<A> v = load_n(p, count);
          const auto wins = (v > best) | (v != v);
          best = wins ? v : best;
          where = wins ? IntVec<A>{} + lane_int_t<A>(i * pool.kernel_w + j) : where;
        }
      }
      store_n(out + c, kRelu ? vrelu(best) : best, count);
      store_bytes_n<A>(argmax + c, where, count);
    });
  }
}

// One output row of one plane: every window position in turn, over the whole row.
template <bool kRelu, class S, class T>
inline void pool_row_plane(const Pool& pool, int64_t H, int64_t W, int64_t oh, int64_t OW, const S* plane, T* out,
                           uint8_t* argmax, acc_t<S>* best) {
  using A = acc_t<S>;
  const int64_t top = oh * pool.stride_h - pool.pad_h;
  const int64_t i0 = std::max<int64_t>(0, -top), i1 = std::min(pool.kernel_h, H - top);
  for (int64_t ow = 0; ow < OW; ++ow) {
    best[ow] = -std::numeric_limits<A>::infinity();
    const int64_t j0 = std::max<int64_t>(0, pool.pad_w - ow * pool.stride_w);
    argmax[ow] = uint8_t(i0 * pool.kernel_w + j0);
  }
  for (int64_t i = i0; i < i1; ++i) {
    const S* row = plane + (top + i) * W;
    for (int64_t j = 0; j < pool.kernel_w; ++j) {
      // Windows whose position j lies inside the row.
      const int64_t first = j >= pool.pad_w ? 0 : (pool.pad_w - j + pool.stride_w - 1) / pool.stride_w;
      const int64_t room = W - 1 + pool.pad_w - j;
      const int64_t last = room < 0 ? 0 : std::min(OW, room / pool.stride_w + 1);
      const uint8_t position = uint8_t(i * pool.kernel_w + j);
      const S* from = row + j - pool.pad_w;
      auto take = [&](int64_t stride) {
        for (int64_t ow = first; ow < last; ++ow) {
          const A v = A(from[ow * stride]);
          const bool wins = (v > best[ow]) | (v != v);
          best[ow] = wins ? v : best[ow];
          argmax[ow] = wins ? position : argmax[ow];
        }
      };
      if (pool.stride_w == 2) {
        take(2);
      } else {
        take(pool.stride_w);
      }
    }
  }
  for (int64_t ow = 0; ow < OW; ++ow) out[ow] = T(kRelu && best[ow] <= 0 ? A(0) : best[ow]);
}

// Adds the gradients that reach input row y of one image to `sum`, which holds W pixels of `channels`. Rows and pixels of
// grad, output and argmax follow each other; output is read only with kRelu, to mask what ReLU cut.
template <bool kRelu, class T>
inline void pool_row_backward_channels_last(const Pool& pool, int64_t y, int64_t W, int64_t channels, int64_t OH,
                                            int64_t OW, const T* grad, const T* output, const uint8_t* argmax,
                                            acc_t<T>* sum) {
  using A = acc_t<T>;
  const Windows over = windows_over(y, pool.kernel_h, pool.stride_h, pool.pad_h, OH);
  for (int64_t x = 0; x < W; ++x) {
    const Windows across = windows_over(x, pool.kernel_w, pool.stride_w, pool.pad_w, OW);
    for_lanes<A>(channels, [&](int64_t c, auto count) {
      Vec<A> total{};
      for (int64_t oh = over.first; oh < over.last; ++oh) {
        const int64_t i = y + pool.pad_h - oh * pool.stride_h;
        for (int64_t ow = across.first; ow < across.last; ++ow) {
          const int64_t j = x + pool.pad_w - ow * pool.stride_w;
          const int64_t at = (oh * OW + ow) * channels + c;
          const auto here = load_bytes_n<A>(argmax + at, count) == lane_int_t<A>(i * pool.kernel_w + j);
          Vec<A> g = load_n(grad + at, count);
          if (kRelu) g = load_n(output + at, count) <= Vec<A>{} ? Vec<A>{} : g;
          total += here ? g : Vec<A>{};
        }
      }
      store_n(sum + x * channels + c, total, count);
    });
  }
}

// Adds the gradients of one plane to `sum`, which holds H * W zeros.
template <bool kRelu, class T>
inline void pool_plane_backward(const Pool& pool, int64_t W, int64_t OH, int64_t OW, const T* grad, const T* output,
                                const uint8_t* argmax, acc_t<T>* sum) {
  using A = acc_t<T>;
  for (int64_t oh = 0; oh < OH; ++oh) {
    for (int64_t ow = 0; ow < OW; ++ow, ++grad, ++output, ++argmax) {
      const int64_t i = *argmax / pool.kernel_w, j = *argmax % pool.kernel_w;
      if (kRelu && A(*output) <= 0) continue;
      sum[(oh * pool.stride_h - pool.pad_h + i) * W + ow * pool.stride_w - pool.pad_w + j] += A(*grad);
    }
  }
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels
