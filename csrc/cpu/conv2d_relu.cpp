// relu(conv2d(input, weight) + bias): torch's convolution (oneDNN) with bias, then ReLU in place.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
namespace {

Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool relu, int64_t algorithm) {
  const Operands given = operands("conv2d_relu", "input", input);
  // 1 falls back to torch's convolution, 2 and 3 do not.
  STD_TORCH_CHECK(algorithm == 0 || algorithm == 1, "conv2d_relu: algorithm ", algorithm,
                  " needs a CUDA device; the CPU has algorithms 0 and 1, which are the same");
  given.images("input", input);
  given.convolution(weight, bias, stride, padding);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const Tensor result = call_torch("aten::conv2d", stack_of(x, weight, bias, stride, padding, IntList{1, 1}, groups));
  const Tensor output = in_format(result, format);
  return relu ? call_torch("aten::relu_", stack_of(output)) : output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
}

}  // namespace alexnet_kernels::cpu
#endif
