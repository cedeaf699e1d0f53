// The bias of pooled maps, [C], by torch's operators: added, and its gradient summed, in float, or double for double.
#pragma once

#include "tensor.h"

namespace alexnet_kernels {

inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Float
             ? t
             : torch::stable::to(t, ScalarType::Float);
}
// images + bias
inline Tensor plus_bias(const Tensor& images, const Tensor& bias) {
  return torch::stable::subtract(widened(images), torch::stable::reshape(widened(bias), {bias.size(0), 1, 1}), -1.0);
}
// Images in another dtype and in a memory format.
inline Tensor rounded(const Tensor& images, ScalarType type, MemoryFormat format) {
  Tensor result = empty(sizes_of(images), type, images, format);
  torch::stable::copy_(result, images);
  return result;
}
// The gradient of the bias: the sum of the images' gradients. [0] without a bias.
inline Tensor bias_gradient(const Tensor& grad, const std::optional<Tensor>& bias) {
  if (!bias) return empty({0}, grad.scalar_type(), grad);
  const IntList dims{0, 2, 3};
  return torch::stable::to(torch::stable::sum(widened(grad), torch::headeronly::IntHeaderOnlyArrayRef(dims)),
                           bias->scalar_type());
}

}  // namespace alexnet_kernels
