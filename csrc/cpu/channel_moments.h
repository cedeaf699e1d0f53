// Sums over the pixels of a part of a batch, channel by channel, for batch_norm_relu.cpp.
#pragma once

#include "tasks.h"
#include "vec.h"

namespace alexnet_kernels::cpu {

// The mean of a number of elements and the sum of squares around it.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  // Chan, Golub, LeVeque 1983.
  void merge(double n, double other_mean, double other_squares) {
    const double delta = other_mean - mean, total = count + n;
    mean += delta * n / total;
    squares += other_squares + delta * delta * n * count / total;
    count = total;
  }
};

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

// Calls body(first, count) for the chunks of a plane, short enough to be summed in float and read again from the cache.
template <class Body>
inline void for_chunks(int64_t pixels, const Body& body) {
  for (int64_t first = 0; first < pixels; first += kBatchNormPartPixels) {
    body(first, std::min(kBatchNormPartPixels, pixels - first));
  }
}

template <class A>
inline double total(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += double(v[i]);
  return sum;
}

// partial[0], partial[1]: the mean of one plane and the sum of squares around it. Two passes over each chunk: the
// second sums around the rounded mean of the first.
template <class T>
inline void plane_moments(const T* x, int64_t pixels, double* partial) {
  using A = acc_t<T>;
  Moments moments;
  for_chunks(pixels, [&](int64_t first, int64_t count) {
    const T* from = x + first;
    Vec<A> sum{}, rest{}, squares{};
    for_lanes<A>(count, [&](int64_t i, auto lanes) { sum += load_n(from + i, lanes); });
    const A centre = A(total<A>(sum) / double(count));
    double rest_of_tail = 0, squares_of_tail = 0;
    for_lanes<A>(count, [&](int64_t i, auto lanes) {
      const Vec<A> d = load_n(from + i, lanes) - centre;
      if constexpr (std::is_same_v<decltype(lanes), int>) {
        for (int j = 0; j < lanes; ++j) rest_of_tail += double(d[j]), squares_of_tail += double(d[j]) * double(d[j]);
      } else {
        rest += d;
        squares += d * d;
      }
    });
    const double shift = (total<A>(rest) + rest_of_tail) / double(count);
    moments.merge(double(count), double(centre) + shift,
                  total<A>(squares) + squares_of_tail - double(count) * shift * shift);
  });
  partial[0] = moments.mean, partial[1] = moments.squares;
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
