// Local response normalisation of one row of neighbouring channels, shared by local_response_norm.cpp and lrn_max_pool2d.cpp.
//   b[i] = a[i] * s[i]^-beta,  s[i] = k + alpha/n * sum_{j in window(i)} a[j]^2     Krizhevsky et al. 2012, section 3.3
// window(i) = [i - n/2, i + (n-1)/2], cut at the ends of the row. Computes in float, or double for double.
#pragma once

#include <vector>

#include "common/vec.h"

namespace alexnet_kernels {

struct Lrn {
  int64_t size;         // n
  double alpha_over_n;  // alpha / n
  double beta;
  double k;
};

namespace ALEXNET_ISA {

// s^-beta. The paper's beta = 3/4 needs square roots only.
template <class V>
inline V pow_minus_beta(V s, double beta) {
  if (beta == 0.75) {
    const V inverse = vrsqrt(s);
    return inverse * vsqrt(inverse);
  }
  for (int i = 0; i < int(sizeof(V) / sizeof(s[0])); ++i) s[i] = std::pow(s[i], decltype(+s[0])(-beta));
  return s;
}

template <class T>
class LrnRow {
 public:
  using A = acc_t<T>;

  LrnRow(const Lrn& lrn, int64_t channels)
      : lrn_(lrn), before_(lrn.size / 2), after_((lrn.size - 1) / 2), channels_(channels) {
    // Windows read up to size - 1 zeros beyond the row, and whole vectors.
    const int64_t padded = channels + lrn.size + 2 * kLanes<A>;
    squares_.assign(padded, A(0));
    ratios_.assign(padded, A(0));
    direct_.assign(padded, A(0));
  }

  // y and a may be of different types: y is T, or the computing type A.
  template <bool kRelu, class Y>
  void forward(const T* a, Y* y) {
    square<kRelu>(a);
    with_size([&](auto size) {
      for_lanes<A>(channels_, [&](int64_t c, auto count) {
        const Vec<A> s = scale(window_sum(squares_.data() + c, size));
        const Vec<A> v = input<kRelu>(a + c, count);
        store_n(y + c, v * pow_minus_beta(s, lrn_.beta), count);
      });
    });
  }

  // dx[i] = g[i] s[i]^-beta - 2 beta alpha/n a[i] * sum_{j: i in window(j)} g[j] a[j] s[j]^(-beta-1)
  // G is the type of g: T, or the computing type.
  template <bool kRelu, class G>
  void backward(const T* a, const G* g, T* dx) {
    square<kRelu>(a);
    with_size([&](auto size) {
      for_lanes<A>(channels_, [&](int64_t c, auto count) {
        const Vec<A> s = scale(window_sum(squares_.data() + c, size));
        const Vec<A> direct = load_n(g + c, count) * pow_minus_beta(s, lrn_.beta);
        const Vec<A> ratio = direct * input<kRelu>(a + c, count) / s;
        store_n(direct_.data() + c, direct, count);
        store_n(ratios_.data() + after_ + c, ratio, count);
      });
      const A factor = A(-2 * lrn_.beta * lrn_.alpha_over_n);
      for_lanes<A>(channels_, [&](int64_t c, auto count) {
        const Vec<A> raw = load_n(a + c, count);
        const Vec<A> v = kRelu ? vrelu(raw) : raw;
        Vec<A> d = load(direct_.data() + c) + factor * v * window_sum(ratios_.data() + c, size);
        if (kRelu) d = raw <= Vec<A>{} ? Vec<A>{} : d;
        store_n(dx + c, d, count);
      });
    });
  }

 private:
  template <bool kRelu, class Count>
  static Vec<A> input(const T* a, Count count) {
    const Vec<A> v = load_n(a, count);
    return kRelu ? vrelu(v) : v;
  }

  template <bool kRelu>
  void square(const T* a) {
    for_lanes<A>(channels_, [&](int64_t c, auto count) {
      const Vec<A> v = input<kRelu>(a + c, count);
      store_n(squares_.data() + before_ + c, v * v, count);
    });
  }

  template <class Size>
  static Vec<A> window_sum(const A* p, Size size) {
    Vec<A> sum = load(p);
    for (int64_t j = 1; j < size; ++j) sum += load(p + j);
    return sum;
  }

  Vec<A> scale(Vec<A> sum) const { return A(lrn_.k) + A(lrn_.alpha_over_n) * sum; }

  // The window of 5 that every AlexNet uses is unrolled.
  template <class Body>
  void with_size(const Body& body) const {
    if (lrn_.size == 5) {
      body(std::integral_constant<int64_t, 5>{});
    } else {
      body(lrn_.size);
    }
  }

  const Lrn lrn_;
  const int64_t before_, after_, channels_;
  std::vector<A> squares_, ratios_, direct_;
};

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels
