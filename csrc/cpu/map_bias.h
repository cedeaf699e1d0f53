// For the operators of ops on maps with a bias: the bias in the computing type, and its gradient from partial sums.
#pragma once

#include "operator.h"

namespace alexnet_kernels::cpu {

inline ScalarType computing_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [C], or nothing.
class MapBias {
 public:
  explicit MapBias(const std::optional<Tensor>& bias) {
    if (!bias) return;
    const ScalarType type = computing_type(*bias);
    values_ = in_format(bias->scalar_type() == type ? *bias : torch::stable::to(*bias, type), MemoryFormat::Contiguous);
  }
  const void* data() const { return values_ ? values_->const_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> values_;
};

// The sum of `parts` partial sums for each channel, in their order and in double, whatever the number of threads.
// Allocate the gradient of the images after it: smaller tensors behind that one keep malloc from reusing its memory,
// and its pages are mapped anew in each call.
class MapBiasGradient {
 public:
  MapBiasGradient(const std::optional<Tensor>& bias, const Tensor& grad, int64_t parts)
      : parts_(parts),
        result_(empty({bias ? bias->size(0) : 0}, bias ? bias->scalar_type() : grad.scalar_type(), grad)) {
    if (bias) partial_ = empty({parts, bias->size(0)}, computing_type(grad), grad);
  }
  // [parts, C] in the computing type; null without a bias.
  void* partial() const { return partial_ ? partial_->mutable_data_ptr() : nullptr; }
  // [C] in the bias's dtype; [0] without a bias.
  Tensor sum() {
    if (!partial_) return result_;
    Tensor total = empty({partial_->size(1)}, ScalarType::Double, *partial_);
    double* to = static_cast<double*>(total.mutable_data_ptr());
    partial_->scalar_type() == ScalarType::Double ? add(static_cast<const double*>(partial_->const_data_ptr()), to)
                                                  : add(static_cast<const float*>(partial_->const_data_ptr()), to);
    torch::stable::copy_(result_, total);
    return result_;
  }

 private:
  template <class A>
  void add(const A* from, double* to) const {
    const int64_t channels = partial_->size(1), bytes = parts_ * channels * int64_t(sizeof(A));
    const int64_t grain = std::max<int64_t>(kGrain, channels * kBytesPerThread / std::max<int64_t>(1, bytes));
    torch::stable::parallel_for(0, channels, grain, [&](int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, 0.0);
      for (int64_t part = 0; part < parts_; ++part) {
        for (int64_t c = begin; c < end; ++c) to[c] += double(from[part * channels + c]);
      }
    });
  }

  static constexpr int64_t kGrain = 16;  // the channels of a cache line
  const int64_t parts_;
  Tensor result_;
  std::optional<Tensor> partial_;
};

}  // namespace alexnet_kernels::cpu
