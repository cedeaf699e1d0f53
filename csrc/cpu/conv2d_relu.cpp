// relu(conv2d(input, weight) + bias): torch's convolution (oneDNN) with bias, then ReLU in place.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
#ifdef ALEXNET_REGISTER
#include "common/convolution_backward.h"
#include "operator.h"

namespace alexnet_kernels::cpu {
namespace {

// 1 falls back to torch's convolution, 2 and 3 do not.
void check_algorithm(const char* op, int64_t algorithm) {
  STD_TORCH_CHECK(algorithm == 0 || algorithm == 1, op, ": algorithm ", algorithm,
                  " needs a CUDA device; the CPU has algorithms 0 and 1, which are the same");
}

Tensor masked(const Tensor& grad, const Tensor& output) {
  return relu_dropout_backward(grad, output, 1);
}

// The arguments after `algorithm` are for autograd's formula (alexnet_kernels/ops/conv2d_relu.py).
Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool relu, int64_t algorithm, int64_t, int64_t, bool, bool) {
  const Operands given = operands("conv2d_relu", "input", input);
  check_algorithm("conv2d_relu", algorithm);
  given.images("input", input);
  given.convolution(weight, bias, stride, padding);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const Tensor result = call_torch("aten::conv2d", stack_of(x, weight, bias, stride, padding, IntList{1, 1}, groups));
  const Tensor output = in_format(result, format);
  return relu ? call_torch("aten::relu_", stack_of(output)) : output;
}

Tensor conv2d_relu_backward_input(const Tensor& grad, std::optional<Tensor> output, const Tensor& input,
                                  const Tensor& weight, IntList stride, IntList padding, int64_t groups,
                                  bool mask_input, int64_t algorithm) {
  constexpr const char* kOp = "conv2d_relu_backward_input";
  check_algorithm(kOp, algorithm);
  operands(kOp, "grad", grad).convolution_gradient(grad, output, input, weight, stride, padding, groups);
  return library_input_gradient({grad, output, input, weight, stride, padding, groups}, mask_input, masked);
}

std::tuple<Tensor, Tensor> conv2d_relu_backward_weight(const Tensor& grad, std::optional<Tensor> output,
                                                       const Tensor& input, const Tensor& weight, IntList stride,
                                                       IntList padding, int64_t groups, int64_t algorithm) {
  constexpr const char* kOp = "conv2d_relu_backward_weight";
  check_algorithm(kOp, algorithm);
  operands(kOp, "grad", grad).convolution_gradient(grad, output, input, weight, stride, padding, groups);
  return library_weight_gradient({grad, output, input, weight, stride, padding, groups}, masked);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
  m.impl("conv2d_relu_backward_input", TORCH_BOX(&conv2d_relu_backward_input));
  m.impl("conv2d_relu_backward_weight", TORCH_BOX(&conv2d_relu_backward_weight));
}

}  // namespace alexnet_kernels::cpu
#endif
