// Sums over the pixels of a part of a batch, channel by channel, for batch_norm_relu.cpp.
#pragma once

#include "vec.h"

namespace alexnet_kernels::cpu {
namespace ALEXNET_ISA {

// Calls body(first channel, vectors, lanes) over the channels: kVectors vectors at a time, then one, then the last
// lanes.
template <class A, int kVectors, class Body>
inline void for_channels(int64_t channels, const Body& body) {
  constexpr int64_t step = kVectors * kLanes<A>;
  int64_t c = 0;
  for (; c + step <= channels; c += step) {
    body(c, std::integral_constant<int, kVectors>{}, std::integral_constant<int, kLanes<A>>{});
  }
  for_lanes<A>(channels - c, [&](int64_t i, auto lanes) { body(c + i, std::integral_constant<int, 1>{}, lanes); });
}

// partial[0], partial[1]: the mean of one plane and the sum of squares around it. Two passes: the second sums squares
// around the rounded mean.
template <class T>
inline void plane_moments(const T* x, int64_t pixels, double* partial) {
  using A = acc_t<T>;
  Vec<A> sum{}, squares{};
  for_lanes<A>(pixels, [&](int64_t i, auto lanes) { sum += load_n(x + i, lanes); });
  double total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += double(sum[i]);
  const A centre = A(total / double(pixels));
  double tail = 0;
  for_lanes<A>(pixels, [&](int64_t i, auto lanes) {
    const Vec<A> d = load_n(x + i, lanes) - centre;
    if constexpr (std::is_same_v<decltype(lanes), int>) {
      for (int j = 0; j < lanes; ++j) tail += double(d[j]) * double(d[j]);
    } else {
      squares += d * d;
    }
  });
  for (int i = 0; i < kLanes<A>; ++i) tail += double(squares[i]);
  // Moves the sum of squares from `centre` to the mean.
  partial[0] = double(centre) + (total - double(pixels) * double(centre)) / double(pixels);
  const double shift = partial[0] - double(centre);
  partial[1] = tail - double(pixels) * shift * shift;
}

// The same for each channel c of `rows` rows of `channels` elements, in partial[2 c] and partial[2 c + 1].
template <class T>
inline void row_moments(const T* x, int64_t rows, int64_t channels, double* partial) {
  using A = acc_t<T>;
  for_channels<A, 4>(channels, [&](int64_t c, auto vectors, auto lanes) {
    constexpr int n = vectors;
    const auto at = [&](int64_t p, int v) { return load_n(x + p * channels + c + v * kLanes<A>, lanes); };
    Vec<A> mean[n] = {}, square[n] = {}, rest[n] = {};
    for (int64_t p = 0; p < rows; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) mean[v] += at(p, v);
    }
    for (int v = 0; v < n; ++v) mean[v] /= A(rows);
    for (int64_t p = 0; p < rows; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        const Vec<A> d = at(p, v) - mean[v];
        square[v] += d * d;
        rest[v] += d;
      }
    }
    for (int v = 0; v < n; ++v) {
      double* to = partial + 2 * (c + v * kLanes<A>);
      for (int l = 0; l < lanes; ++l) {
        // mean is rounded; the mean of what remains corrects it.
        const double shift = double(rest[v][l]) / double(rows);
        to[2 * l] = double(mean[v][l]) + shift;
        to[2 * l + 1] = double(square[v][l]) - double(rows) * shift * shift;
      }
    }
  });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu
