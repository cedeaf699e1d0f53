// relu(conv2d(input, weight) + bias): torch's convolution (oneDNN), its output then passed once in place.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
#ifdef ALEXNET_REGISTER
#include "common/tensor.h"

namespace alexnet_kernels {
namespace {

Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool relu) {
  const MemoryFormat format = memory_format_of(input);
  auto stack = stack_of(in_format(input, format), weight, bias, stride, padding, IntList{1, 1}, groups);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  Tensor output = in_format(torch::stable::detail::to<Tensor>(stack[0]), format);
  if (!relu) return output;
  auto relu_stack = stack_of(output);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu_", "", relu_stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(relu_stack[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
}

}  // namespace alexnet_kernels
#endif
