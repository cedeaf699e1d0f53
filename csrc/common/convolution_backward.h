// The gradients of convolution, bias and ReLU by torch's convolution.
#pragma once

#include "tensor.h"

namespace alexnet_kernels {

// The arguments of the backward operators of conv2d_relu.
struct ConvolutionGradient {
  const Tensor& grad;
  const std::optional<Tensor>& output;  // whose ReLU's mask is to be applied to grad, if it is given
  const Tensor &input, &weight;
  const IntList &stride, &padding;
  int64_t groups;

  bool is_empty() const { return grad.numel() == 0 || input.numel() == 0 || weight.numel() == 0; }
};

inline Tensor zeros(const IntList& size, const Tensor& like, MemoryFormat format) {
  return call_torch("aten::zero_", stack_of(empty(size, like.scalar_type(), like, format)));
}

// aten::convolution_backward; gradients that aren't asked for are undefined.
inline std::array<Tensor, 3> convolution_backward(const ConvolutionGradient& c, const Tensor& grad,
                                                  const std::array<bool, 3>& wanted) {
  const std::optional<IntList> bias_size = IntList{c.weight.size(0)};
  auto stack = stack_of(grad, c.input, c.weight, bias_size, c.stride, c.padding, IntList{1, 1}, false, IntList{0, 0},
                        c.groups, torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), wanted.size()));
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const auto result = [&](int i) { return torch::stable::detail::to<Tensor>(stack[i]); };
  return {result(0), result(1), result(2)};
}

// The gradient of c.input, in its memory format. mask(gradient, y) is the gradient where y is positive.
template <class Mask>
Tensor library_input_gradient(const ConvolutionGradient& c, bool mask_input, const Mask& mask) {
  const MemoryFormat format = memory_format_of(c.input);
  if (c.is_empty()) return zeros(sizes_of(c.input), c.input, format);
  const Tensor grad = c.output ? mask(c.grad, *c.output) : c.grad;
  const Tensor dx = in_format(convolution_backward(c, grad, {true, false, false})[0], format);
  return mask_input ? mask(dx, c.input) : dx;
}

// The gradients of c.weight, in its memory format, and of the bias.
template <class Mask>
std::tuple<Tensor, Tensor> library_weight_gradient(const ConvolutionGradient& c, const Mask& mask) {
  const MemoryFormat format = memory_format_of(c.weight);
  if (c.is_empty()) {
    return {zeros(sizes_of(c.weight), c.weight, format), zeros({c.weight.size(0)}, c.weight, MemoryFormat::Contiguous)};
  }
  const Tensor grad = c.output ? mask(c.grad, *c.output) : c.grad;
  const auto [_, dw, db] = convolution_backward(c, grad, {false, true, true});
  return {in_format(dw, format), db};
}

}  // namespace alexnet_kernels
