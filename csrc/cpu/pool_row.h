// Max-pooling of rows, shared by max_pool2d.cpp and lrn_max_pool2d.cpp. The winner's position in its window travels as
// the byte i * kernel_w + j. Ties go to the first position in row-major order; NaN wins, the last one over the others.
#pragma once

#include <vector>

#include "common/pool.h"
#include "common/vec.h"

namespace alexnet_kernels {
namespace ALEXNET_ISA {

// The best of the window's pixels (i, j), i0 <= i < i1 and j0 <= j < j1, for each channel.
template <bool kRelu, class S, class T, class Row, class I0, class I1, class J0, class J1>
inline void pool_window(const Pool& pool, int64_t top, int64_t left, int64_t channels, const Row& row, I0 i0, I1 i1,
                        J0 j0, J1 j1, T* out, uint8_t* argmax) {
  using A = acc_t<S>;
  for_lanes<A>(channels, [&](int64_t c, auto count) {
    Vec<A> best{};
    IntVec<A> where = IntVec<A>{} + lane_int_t<A>(i0 * pool.kernel_w + j0);
    for (int64_t i = i0; i < i1; ++i) {
      const S* p = row(top + i) + left * channels + c;
      for (int64_t j = j0; j < j1; ++j) {
        const Vec<A> v = load_n(p + j * channels, count);
        if (i == i0 && j == j0) {
          best = v;
          continue;
        }
        const auto wins = (v > best) | (v != v);
        best = wins ? v : best;
        where = wins ? IntVec<A>{} + lane_int_t<A>(i * pool.kernel_w + j) : where;
      }
    }
    store_n(out + c, kRelu ? vrelu(best) : best, count);
    store_bytes_n<A>(argmax + c, where, count);
  });
}

// One output row of an image whose pixels are `channels` apart. row(y) gives input row y.
template <bool kRelu, class S, class T, class Row>
inline void pool_row_channels_last(const Pool& pool, int64_t H, int64_t W, int64_t channels, int64_t oh, int64_t OW,
                                   const Row& row, T* out, uint8_t* argmax) {
  const std::integral_constant<int64_t, 0> zero;
  const std::integral_constant<int64_t, 3> three;
  const int64_t top = oh * pool.stride_h - pool.pad_h;
  const int64_t i0 = std::max<int64_t>(0, -top), i1 = std::min(pool.kernel_h, H - top);
  for (int64_t ow = 0; ow < OW; ++ow, out += channels, argmax += channels) {
    const int64_t left = ow * pool.stride_w - pool.pad_w;
    const int64_t j0 = std::max<int64_t>(0, -left), j1 = std::min(pool.kernel_w, W - left);
    if (pool.kernel_w == 3 && i1 - i0 == 3 && j1 - j0 == 3) {
      pool_window<kRelu, S>(pool, top, left, channels, row, zero, three, zero, three, out, argmax);
    } else {
      pool_window<kRelu, S>(pool, top, left, channels, row, i0, i1, j0, j1, out, argmax);
    }
  }
}

// Every stride-th of the values from p on.
template <class A>
inline Vec<A> load_strided(const A* p, int64_t stride) {
  Vec<A> v;
  if (stride == 1) return load(p);
  if (stride == 2) {
    const Vec<A> low = load(p), high = load(p + kLanes<A>);
    for (int i = 0; i < kLanes<A>; ++i) v[i] = i < kLanes<A> / 2 ? low[2 * i] : high[2 * i - kLanes<A>];
    return v;
  }
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * stride];
  return v;
}

// The rows of one plane that windows read: kernel_h of them at a time, in the computing type, -inf on both sides.
template <class A>
class PlaneRows {
 public:
  PlaneRows(const Pool& pool, int64_t W, int64_t OW)
      : pool_(pool),
        width_(std::max((OW + kLanes<A>)*pool.stride_w + pool.kernel_w + kLanes<A>, pool.pad_w + W)),
        values_(pool.kernel_h * width_, -std::numeric_limits<A>::infinity()),
        held_(pool.kernel_h, -1),
        first_(OW + kLanes<A>) {
    for (size_t ow = 0; ow < first_.size(); ++ow) {
      first_[ow] = lane_int_t<A>(std::max<int64_t>(0, pool.pad_w - int64_t(ow) * pool.stride_w));
    }
  }

  void new_plane() { std::fill(held_.begin(), held_.end(), -1); }

  // Output row oh; fill(y, to) writes the W values of input row y.
  template <bool kRelu, class T, class Fill>
  void pool_row(int64_t H, int64_t oh, int64_t OW, const Fill& fill, T* out, uint8_t* argmax) {
    const int64_t top = oh * pool_.stride_h - pool_.pad_h;
    const int64_t i0 = std::max<int64_t>(0, -top), i1 = std::min(pool_.kernel_h, H - top);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t slot = (top + i) % pool_.kernel_h;
      if (held_[slot] == top + i) continue;
      held_[slot] = top + i;
      fill(top + i, &values_[slot * width_ + pool_.pad_w]);
    }
    for_lanes<A>(OW, [&](int64_t ow, auto count) {
      Vec<A> best = splat<A>(-std::numeric_limits<A>::infinity());
      // The first pixel inside the image, should every one of them be -inf.
      IntVec<A> where = load_raw<IntVec<A>>(&first_[ow]) + lane_int_t<A>(i0 * pool_.kernel_w);
      for (int64_t i = i0; i < i1; ++i) {
        const A* row = &values_[(top + i) % pool_.kernel_h * width_ + ow * pool_.stride_w];
        for (int64_t j = 0; j < pool_.kernel_w; ++j) {
          const Vec<A> v = load_strided(row + j, pool_.stride_w);
          const auto wins = (v > best) | (v != v);
          best = wins ? v : best;
          where = wins ? IntVec<A>{} + lane_int_t<A>(i * pool_.kernel_w + j) : where;
        }
      }
      store_n(out + ow, kRelu ? vrelu(best) : best, count);
      store_bytes_n<A>(argmax + ow, where, count);
    });
  }

 private:
  const Pool pool_;
  const int64_t width_;
  std::vector<A> values_;
  std::vector<int64_t> held_;  // which input row each slot holds
  std::vector<lane_int_t<A>> first_;
};

// The gradients that reach input row y of one image, to `sum`, which holds W pixels of `channels`. Rows and pixels of
// grad, output and argmax follow each other; output is read only with kRelu, to mask what ReLU cut.
template <bool kRelu, class T>
inline void pool_row_backward_channels_last(const Pool& pool, int64_t y, int64_t W, int64_t channels, int64_t OH,
                                            int64_t OW, const T* grad, const T* output, const uint8_t* argmax,
                                            acc_t<T>* sum) {
  using A = acc_t<T>;
  const Windows over = windows_over(y, pool.kernel_h, pool.stride_h, pool.pad_h, OH);
  for (int64_t x = 0; x < W; ++x, sum += channels) {
    const Windows across = windows_over(x, pool.kernel_w, pool.stride_w, pool.pad_w, OW);
    bool first = true;
    for (int64_t oh = over.first; oh < over.last; ++oh) {
      const int64_t i = y + pool.pad_h - oh * pool.stride_h;
      for (int64_t ow = across.first; ow < across.last; ++ow) {
        const lane_int_t<A> position(i * pool.kernel_w + x + pool.pad_w - ow * pool.stride_w);
        const int64_t at = (oh * OW + ow) * channels;
        for_lanes<A>(channels, [&](int64_t c, auto count) {
          const auto here = load_bytes_n<A>(argmax + at + c, count) == position;
          Vec<A> g = load_n(grad + at + c, count);
          if (kRelu) g = load_n(output + at + c, count) <= Vec<A>{} ? Vec<A>{} : g;
          g = here ? g : Vec<A>{};
          store_n(sum + c, first ? g : load_n(sum + c, count) + g, count);
        });
        first = false;
      }
    }
    if (first) std::fill(sum, sum + channels, A(0));
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
