// Local response normalisation of rows of consecutive channels, shared by local_response_norm.cpp and
// lrn_max_pool2d.cpp.
// a is the input, plus the bias of its channel with kBias, then its ReLU with kRelu.
//   b[i] = a[i] * s[i]^-beta,  s[i] = k + alpha/n * sum_{j in window(i)} a[j]^2     Krizhevsky et al. 2012, section 3.3
// window(i) = [i - n/2, i + (n-1)/2], cut at the ends of the row. Computes in float, or double for double.
#pragma once

#include <vector>

#include "vec.h"

namespace alexnet_kernels::cpu {

struct Lrn {
  int64_t size;         // n
  double alpha_over_n;  // alpha / n
  double beta;
  double k;
};

// Windows that are cut at both ends of `length` channels or pixels may be larger: no memory depends on their size then.
inline Lrn make_lrn(int64_t size, double alpha_over_n, double beta, double k, int64_t length) {
  return {size / 2 < length ? size : 2 * length + 1, alpha_over_n, beta, k};
}

namespace ALEXNET_ISA {

// s^-beta and 1 / s. For the paper's beta = 3/4, square roots suffice.
template <class V>
struct Powers {
  V minus_beta, inverse;
};
template <class V>
inline Powers<V> powers(V s, double beta) {
  if (beta == 0.75) {
    const V root = vrsqrt(s);
    return {root * vsqrt(root), root * root};
  }
  const V inverse = 1 / s;
  for (int i = 0; i < int(sizeof(V) / sizeof(s[0])); ++i) s[i] = std::pow(s[i], decltype(+s[0])(-beta));
  return {s, inverse};
}
template <class V>
inline V pow_minus_beta(V s, double beta) {
  return powers(s, beta).minus_beta;
}

// Rows of `channels` values, consecutive in memory. Each stage processes a batch of rows: it loads the squares of the
// stage before at unaligned offsets, and store forwarding fails for those as long as the stores are in flight.
template <class T>
class LrnRows {
 public:
  using A = acc_t<T>;

  // bias: of `groups` rows after each other, whose turn repeats; read with kBias only.
  LrnRows(const Lrn& lrn, int64_t channels, const A* bias = nullptr, int64_t groups = 1)
      : lrn_(lrn),
        bias_(bias),
        groups_(groups),
        before_(lrn.size / 2),
        after_((lrn.size - 1) / 2),
        channels_(channels),
        padded_(channels + lrn.size + 2 * kLanes<A>),
        batch_(std::max<int64_t>(1, kBatchValues / channels)),
        squares_(batch_ * padded_),
        ratios_(padded_),
        direct_(padded_) {}

  // y is of type T, or of the computing type A. kFetch prefetches a; use it where y stays in the cache.
  template <bool kRelu, bool kBias = false, bool kFetch = false, class Y>
  void forward(const T* a, Y* y, int64_t rows) {
    for_batches(batch_, rows, [&](int64_t first, int64_t count, auto size) {
      square<kRelu, kBias, kFetch>(a, first, count);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t row = first + r * channels_;
        const A* bias = bias_of<kBias>(row);
        for_lanes<A>(channels_, [&](int64_t c, auto lanes) {
          const Vec<A> s = scale(window_sum(&squares_[r * padded_ + c], size));
          const Vec<A> v = rectified<kRelu>(biased<kBias>(a + row, bias, c, lanes));
          store_n(y + row + c, v * pow_minus_beta(s, lrn_.beta), lanes);
        });
      }
    });
  }

  // dx[i] = g[i] s[i]^-beta - 2 beta alpha/n a[i] * sum_{j: i in window(j)} g[j] a[j] s[j]^(-beta-1)
  // g is of type T, or of the computing type A. With kBias dx is added to db, as long as the bias.
  template <bool kRelu, bool kBias = false, class G>
  void backward(const T* a, const G* g, T* dx, int64_t rows, A* db = nullptr) {
    const A factor = A(-2 * lrn_.beta * lrn_.alpha_over_n);
    for_batches(1, rows, [&](int64_t row, int64_t, auto size) {
      square<kRelu, kBias>(a, row, 1);
      const A* bias = bias_of<kBias>(row);
      A* sum = kBias ? db + (bias - bias_) : nullptr;
      for_lanes<A>(channels_, [&](int64_t c, auto lanes) {
        const auto p = powers(scale(window_sum(&squares_[c], size)), lrn_.beta);
        const Vec<A> direct = load_n(g + row + c, lanes) * p.minus_beta;
        store_n(&direct_[c], direct, lanes);
        const Vec<A> v = rectified<kRelu>(biased<kBias>(a + row, bias, c, lanes));
        store_n(&ratios_[after_ + c], direct * v * p.inverse, lanes);
      });
      for_lanes<A>(channels_, [&](int64_t c, auto lanes) {
        const Vec<A> raw = biased<kBias>(a + row, bias, c, lanes);
        const Vec<A> v = rectified<kRelu>(raw);
        Vec<A> d = load(&direct_[c]) + factor * v * window_sum(&ratios_[c], size);
        if (kRelu) d = raw <= Vec<A>{} ? Vec<A>{} : d;
        store_n(dx + row + c, d, lanes);
        if (kBias) store_n(sum + c, load_n(sum + c, lanes) + d, lanes);
      });
    });
  }

 private:
  template <bool kRelu>
  static Vec<A> rectified(Vec<A> v) {
    return kRelu ? vrelu(v) : v;
  }
  template <bool kBias, class Count>
  static Vec<A> biased(const T* a, const A* bias, int64_t c, Count count) {
    const Vec<A> v = load_n(a + c, count);
    return kBias ? v + load_n(bias + c, count) : v;
  }
  // Of the row that begins at element `row`.
  template <bool kBias>
  const A* bias_of(int64_t row) const {
    return kBias ? bias_ + row / channels_ % groups_ * channels_ : nullptr;
  }

  // Of the rows from element `first` on.
  template <bool kRelu, bool kBias, bool kFetch = false>
  void square(const T* a, int64_t first, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = a + first + r * channels_;
      const A* bias = bias_of<kBias>(first + r * channels_);
      for_lanes<A>(channels_, [&](int64_t c, auto lanes) {
        const Vec<A> v = rectified<kRelu>(biased<kBias>(row, bias, c, lanes));
        if (kFetch) prefetch(row + c);
        store_n(&squares_[r * padded_ + before_ + c], v * v, lanes);
      });
    }
  }

  template <class Size>
  static Vec<A> window_sum(const A* p, Size size) {
    Vec<A> sum = load(p);
    for (int64_t j = 1; j < size; ++j) sum += load(p + j);
    return sum;
  }

  Vec<A> scale(Vec<A> sum) const { return A(lrn_.k) + A(lrn_.alpha_over_n) * sum; }

  // Calls body(offset of the first row, rows, window size) for each batch. The window of 5 channels is unrolled.
  template <class Body>
  void for_batches(int64_t batch, int64_t rows, const Body& body) const {
    for (int64_t r = 0; r < rows; r += batch) {
      const int64_t count = std::min(batch, rows - r);
      if (lrn_.size == 5) {
        body(r * channels_, count, std::integral_constant<int64_t, 5>{});
      } else {
        body(r * channels_, count, lrn_.size);
      }
    }
  }

  static constexpr int64_t kBatchValues = 512;  // fits the L1 cache
  const Lrn lrn_;
  const A* bias_;
  const int64_t groups_;
  const int64_t before_, after_, channels_;
  const int64_t padded_;  // the row, a halo of size - 1 zeros, and room for whole vectors
  const int64_t batch_;
  std::vector<A> squares_, ratios_, direct_;
};

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu
