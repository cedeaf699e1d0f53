// Max-pooling of rows, shared by max_pool2d.cpp and lrn_max_pool2d.cpp. argmax is the byte i * kernel_w + j, the
// position of the maximum in its window, or with kRelu kNowhere where the maximum is not positive. A NaN is. The first
// of equal values wins; NaN wins over numbers, the last NaN over the others.
#pragma once

#include <limits>
#include <vector>

#include "common/pool.h"
#include "vec.h"

namespace alexnet_kernels::cpu {
namespace ALEXNET_ISA {

// Comparison of pixels as floating-point numbers, a vector at a time.
template <class S>
struct Values {
  using Lane = acc_t<S>;
  using V = Vec<Lane>;
  V sum{};

  template <class Count>
  static V load(const S* p, Count count) {
    return load_n(p, count);
  }
  template <bool kRelu, class T, class Count>
  static void store(T* p, V best, Count count) {
    store_n(p, kRelu ? vrelu(best) : best, count);
  }
  static auto is_nan(V v) { return v != v; }
  static V nan_as_largest(V v) { return v; }
  // One NaN test for a whole window. Infinities of both signs also sum to NaN: that costs time, the result is the same.
  void note(V v) { sum += v; }
  bool noted_nan(V) const { return any(sum != sum); }
};

// Comparison of 16-bit floating-point numbers as 16-bit integers of the same order, twice as many lanes. Both zeros
// become 0.
template <class S>
struct Keys {
  using Lane = int16_t;
  using V = Vec<int16_t>;
  static constexpr int16_t kInfinity = std::is_same_v<S, bf16> ? 0x7f80 : 0x7c00;
  V least{};

  template <class Count>
  static V load(const S* p, Count count) {
    if constexpr (std::is_same_v<Count, int>) {
      S lanes[kLanes<int16_t>] = {};
      std::memcpy((void*)lanes, p, count * sizeof(S));
      return ordered(load_raw<V>(lanes));
    } else {
      return ordered(load_raw<V>(p));
    }
  }
  template <bool kRelu, class T, class Count>
  static void store(T* p, V best, Count count) {
    const V bits = ordered(kRelu ? vrelu(best) : best);
    __builtin_memcpy(p, &bits, count * sizeof(T));
  }
  static V is_nan(V key) { return (key > kInfinity) | (key < int16_t(-kInfinity)); }
  // NaN as the largest key.
  static V nan_as_largest(V key) { return is_nan(key) ? V{} + std::numeric_limits<int16_t>::max() : key; }
  void note(V key) { least = key < least ? key : least; }
  bool noted_nan(V best) const { return any((best > kInfinity) | (least < int16_t(-kInfinity))); }

 private:
  // The key of the bits, and the bits of a key.
  static V ordered(V bits) {
    // Unsigned, because the lanes that are not selected overflow.
    using Unsigned = Vec<uint16_t>;
    return bits < 0 ? V(Unsigned{} + uint16_t(0x8000) - Unsigned(bits)) : bits;
  }
};

template <class S, class T>
using Comparison = std::conditional_t<std::is_same_v<S, T> && sizeof(S) == 2, Keys<S>, Values<S>>;

// The positions of maxima, kNowhere where those are not positive. All bits of that byte are set.
template <class V, class Positions>
inline Positions unless_positive(V maximum, Positions position) {
  return position | ((maximum <= V{}) & kNowhere);
}

// The maximum of a window's pixels (i, j), i0 <= i < i1 and j0 <= j < j1, channel by channel. A second pass handles
// NaN.
template <bool kRelu, class S, class T, class Row, class I0, class I1, class J0, class J1>
inline void pool_window(const Pool& pool, int64_t top, int64_t left, int64_t channels, const Row& row, I0 i0, I1 i1,
                        J0 j0, J1 j1, T* out, uint8_t* argmax) {
  using C = Comparison<S, T>;
  using V = typename C::V;
  using Lane = typename C::Lane;
  using Positions = IntVec<Lane>;
  for_lanes<Lane>(channels, [&](int64_t c, auto count) {
    V best{};
    Positions position{};
    const auto pool_pixels = [&](auto nan, auto& notes) __attribute__((always_inline)) {
      position = Positions{} + lane_int_t<Lane>(i0 * pool.kernel_w + j0);
      for (int64_t i = i0; i < i1; ++i) {
        const S* p = row(top + i) + left * channels + c;
        for (int64_t j = j0; j < j1; ++j) {
          const V loaded = C::load(p + j * channels, count), v = nan ? C::nan_as_largest(loaded) : loaded;
          if constexpr (!nan) {
            notes.note(v);
            if (i > 0 && j > 0) prefetch(p + j * channels);
          }
          if (i == i0 && j == j0) {
            best = v;
            continue;
          }
          auto wins = v > best;
          if constexpr (nan) wins |= C::is_nan(v);
          best = wins ? v : best;
          position = wins ? Positions{} + lane_int_t<Lane>(i * pool.kernel_w + j) : position;
        }
      }
    };
    C notes;
    pool_pixels(std::false_type{}, notes);
    if (__builtin_expect(notes.noted_nan(best), 0)) pool_pixels(std::true_type{}, notes);
    C::template store<kRelu>(out + c, best, count);
    if constexpr (kRelu) position = unless_positive(best, position);
    store_bytes_n<Lane>(argmax + c, position, count);
  });
}

// One output row of an image in channels_last. row(y) returns input row y.
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
    if (pool.kernel_w == 3 && i0 == 0 && i1 == 3 && j0 == 0 && j1 == 3) {
      pool_window<kRelu, S>(pool, top, left, channels, row, zero, three, zero, three, out, argmax);
    } else {
      pool_window<kRelu, S>(pool, top, left, channels, row, i0, i1, j0, j1, out, argmax);
    }
  }
}

// p[0], p[stride], p[2 * stride] ...
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

// A ring buffer of the rows of a plane that a row of windows reads, in the computing type, with -inf as padding.
template <class A>
class PlaneRows {
 public:
  PlaneRows(const Pool& pool, int64_t H, int64_t W, int64_t OW)
      : pool_(with_bounded_stride(pool, OW)),
        slots_(std::min(pool.kernel_h, H)),
        width_(std::max((OW + kLanes<A>)*pool_.stride_w + pool.kernel_w + kLanes<A>, pool.pad_w + W)),
        values_(slots_ * width_, -std::numeric_limits<A>::infinity()),
        held_(slots_, -1),
        first_(OW + kLanes<A>) {
    for (size_t ow = 0; ow < first_.size(); ++ow) {
      first_[ow] = lane_int_t<A>(std::max<int64_t>(0, pool.pad_w - int64_t(ow) * pool_.stride_w));
    }
  }

  void new_plane() { std::fill(held_.begin(), held_.end(), -1); }

  // Output row oh; fill(y, to) writes the W values of input row y.
  template <bool kRelu, class T, class Fill>
  void pool_row(int64_t H, int64_t oh, int64_t OW, const Fill& fill, T* out, uint8_t* argmax) {
    const int64_t top = oh * pool_.stride_h - pool_.pad_h;
    const int64_t i0 = std::max<int64_t>(0, -top), i1 = std::min(pool_.kernel_h, H - top);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t slot = (top + i) % slots_;
      if (held_[slot] == top + i) continue;
      held_[slot] = top + i;
      fill(top + i, &values_[slot * width_ + pool_.pad_w]);
    }
    for_lanes<A>(OW, [&](int64_t ow, auto count) {
      Vec<A> best = splat<A>(-std::numeric_limits<A>::infinity());
      // If all pixels are -inf, the first one inside the image wins.
      IntVec<A> position = load_raw<IntVec<A>>(&first_[ow]) + lane_int_t<A>(i0 * pool_.kernel_w);
      for (int64_t i = i0; i < i1; ++i) {
        const A* row = &values_[(top + i) % slots_ * width_ + ow * pool_.stride_w];
        for (int64_t j = 0; j < pool_.kernel_w; ++j) {
          const Vec<A> v = load_strided(row + j, pool_.stride_w);
          const auto wins = (v > best) | (v != v);
          best = wins ? v : best;
          position = wins ? IntVec<A>{} + lane_int_t<A>(i * pool_.kernel_w + j) : position;
        }
      }
      store_n(out + ow, kRelu ? vrelu(best) : best, count);
      if constexpr (kRelu) position = unless_positive(best, position);
      store_bytes_n<A>(argmax + ow, position, count);
    });
  }

 private:
  // The stride of a single window has no effect, but may be larger than the memory.
  static Pool with_bounded_stride(Pool pool, int64_t OW) {
    if (OW == 1) pool.stride_w = 1;
    return pool;
  }

  const Pool pool_;
  const int64_t slots_;  // rows that are held, no more than the plane has
  const int64_t width_;
  std::vector<A> values_;
  std::vector<int64_t> held_;  // the input row in each slot
  std::vector<lane_int_t<A>> first_;
};

// Stores max(0, v), and kNowhere as the argmax where v is not positive.
template <class T, class Count>
inline void store_relu(Vec<acc_t<T>> v, T* y, uint8_t* argmax, Count count) {
  using A = acc_t<T>;
  store_n(y, vrelu(v), count);
  const IntVec<A> position = load_bytes_n<A>(argmax, count);
  store_bytes_n<A>(argmax, unless_positive(v, position), count);
}

// Adds the bias of their channels to `pixels` pixels in channels_last, then applies ReLU with kRelu.
template <bool kRelu, class T>
inline void add_bias_to_pixels(const acc_t<T>* bias, int64_t pixels, int64_t channels, T* y, uint8_t* argmax) {
  using A = acc_t<T>;
  for (int64_t p = 0; p < pixels; ++p, y += channels, argmax += channels) {
    for_lanes<A>(channels, [&](int64_t c, auto count) {
      const Vec<A> v = load_n(y + c, count) + load_n(bias + c, count);
      kRelu ? store_relu(v, y + c, argmax + c, count) : store_n(y + c, v, count);
    });
  }
}

// The same for pixels of one channel.
template <bool kRelu, class T>
inline void add_bias_to_plane(acc_t<T> bias, int64_t pixels, T* y, uint8_t* argmax) {
  using A = acc_t<T>;
  for_lanes<A>(pixels, [&](int64_t p, auto count) {
    const Vec<A> v = load_n(y + p, count) + bias;
    kRelu ? store_relu(v, y + p, argmax + p, count) : store_n(y + p, v, count);
  });
}

// The gradients that reach a window of `area` pixels: zero where its argmax is none of them.
template <class T, class Count>
inline Vec<acc_t<T>> load_selected(const T* grad, const uint8_t* argmax, int64_t area, Count count) {
  using A = acc_t<T>;
  const auto selected = load_bytes_n<A>(argmax, count) < lane_int_t<A>(area);
  return selected ? load_n(grad, count) : Vec<A>{};
}

// The gradient of the bias from `pixels` pixels in channels_last.
template <class T>
inline void sum_pixels(const T* grad, const uint8_t* argmax, int64_t area, int64_t pixels, int64_t channels,
                       acc_t<T>* to) {
  using A = acc_t<T>;
  for_lanes<A>(channels, [&](int64_t c, auto count) {
    Vec<A> sum{};
    for (int64_t p = 0; p < pixels; ++p) {
      sum += load_selected(grad + p * channels + c, argmax + p * channels + c, area, count);
    }
    store_n(to + c, sum, count);
  });
}

// The sum of vectors, of which kMost are added in the computing type, those sums in double.
template <class A>
class PlaneSum {
 public:
  template <class Count>
  void add(Vec<A> v, Count count) {
    if constexpr (std::is_same_v<Count, int>) {
      for (int i = 0; i < count; ++i) total_ += double(v[i]);
    } else {
      sum_ += v;
      if (++held_ == kMost) flush();
    }
  }
  A total() {
    flush();
    return A(total_);
  }

 private:
  void flush() {
    for (int i = 0; i < kLanes<A>; ++i) total_ += double(sum_[i]);
    sum_ = Vec<A>{};
    held_ = 0;
  }

  static constexpr int kMost = 256;
  Vec<A> sum_{};
  double total_ = 0;
  int held_ = 0;
};

// The same from pixels of one channel. Inlined, it slows the scatter of the gradients beside it by 5%.
template <class T>
__attribute__((noinline)) acc_t<T> sum_plane(const T* grad, const uint8_t* argmax, int64_t area, int64_t pixels) {
  using A = acc_t<T>;
  PlaneSum<A> sum;
  for_lanes<A>(pixels,
               [&](int64_t p, auto count) { sum.add(load_selected(grad + p, argmax + p, area, count), count); });
  return sum.total();
}

// The gradient of one pixel, gathered from the `rows` x `columns` windows that contain it. grad and argmax
// point to the first window, in which the pixel has position (i, j); rows of windows are `below` elements apart.
template <class T, class U, class Rows, class Columns>
inline void pool_pixel_backward(const Pool& pool, int64_t i, int64_t j, int64_t channels, int64_t below, Rows rows,
                                Columns columns, const T* grad, const uint8_t* argmax, U* to) {
  using A = acc_t<T>;
  for_lanes<A>(channels, [&](int64_t c, auto count) {
    Vec<A> sum{};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t q = 0; q < columns; ++q) {
        const int64_t at = r * below + q * channels + c;
        const lane_int_t<A> position((i - r * pool.stride_h) * pool.kernel_w + j - q * pool.stride_w);
        const auto selected = load_bytes_n<A>(argmax + at, count) == position;
        sum += selected ? load_n(grad + at, count) : Vec<A>{};
      }
    }
    store_n(to + c, sum, count);
  });
}

// The gradient of input row y of one image in channels_last, written to the W pixels at `to`.
template <class T, class U>
inline void pool_row_backward_channels_last(const Pool& pool, int64_t y, int64_t W, int64_t channels, int64_t OH,
                                            int64_t OW, const T* grad, const uint8_t* argmax, U* to) {
  const std::integral_constant<int64_t, 1> one;
  const std::integral_constant<int64_t, 2> two;
  const Windows over = windows_over(y, pool.kernel_h, pool.stride_h, pool.pad_h, OH);
  const int64_t rows = std::max<int64_t>(over.last - over.first, 0);
  const int64_t i = y + pool.pad_h - over.first * pool.stride_h;
  for (int64_t x = 0; x < W; ++x, to += channels) {
    const Windows across = windows_over(x, pool.kernel_w, pool.stride_w, pool.pad_w, OW);
    const int64_t columns = std::max<int64_t>(across.last - across.first, 0);
    const int64_t j = x + pool.pad_w - across.first * pool.stride_w;
    const int64_t at = (over.first * OW + across.first) * channels;
    const auto gather = [&](auto r, auto q) {
      pool_pixel_backward(pool, i, j, channels, OW * channels, r, q, grad + at, argmax + at, to);
    };
    if (rows == 1 && columns == 1)
      gather(one, one);
    else if (rows == 1 && columns == 2)
      gather(one, two);
    else if (rows == 2 && columns == 1)
      gather(two, one);
    else if (rows == 2 && columns == 2)
      gather(two, two);
    else
      gather(rows, columns);
  }
}

// Scatters the gradients of one plane into `sum`, H * W zeros at first. A position outside the window or the plane has
// no effect.
template <class T>
inline void pool_plane_backward(const Pool& pool, int64_t H, int64_t W, int64_t OH, int64_t OW, const T* grad,
                                const uint8_t* argmax, acc_t<T>* sum) {
  using A = acc_t<T>;
  for (int64_t oh = 0; oh < OH; ++oh) {
    for (int64_t ow = 0; ow < OW; ++ow, ++grad, ++argmax) {
      if (*argmax >= pool.area()) continue;
      const int64_t y = oh * pool.stride_h - pool.pad_h + *argmax / pool.kernel_w;
      const int64_t x = ow * pool.stride_w - pool.pad_w + *argmax % pool.kernel_w;
      const bool inside = uint64_t(y) < uint64_t(H) && uint64_t(x) < uint64_t(W);
      if (!inside) continue;
      sum[y * W + x] += A(*grad);
    }
  }
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu
