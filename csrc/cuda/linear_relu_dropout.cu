// dropout(relu(input @ weight.T + bias)): torch's GEMM with bias (cuBLASLt), then one pass over its output in place.
// Backward of ReLU and dropout is one kernel: the gradient times scale where output > 0.
//   input [N, in], weight [out, in], bias [out], output [N, out]; float, bfloat16 or float16
// A thread holds 16 bytes of elements.
#include "conv2d_relu_backward.cuh"
#include "dropout.cuh"

namespace alexnet_kernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    relu_backward(float scale, int64_t count, const T* grad, const T* output, T* dx) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVec;
  if (at >= count) return;
  float g[kVec], y[kVec];
  load<kVec>(grad + at, g);
  load<kVec>(output + at, y);
#pragma unroll
  for (int i = 0; i < kVec; ++i) g[i] = y[i] <= 0.f ? 0.f : g[i] * scale;
  store<kVec>(dx + at, g);
}

Tensor linear_relu_dropout(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, bool relu, double p,
                           double scale, const Tensor& seed, int64_t offset, int64_t row, int64_t row_stride,
                           int64_t base) {
  const Operands given = operands("linear_relu_dropout", "input", input);
  given.linear(weight, bias);
  Tensor output = in_format(call_torch("aten::linear", stack_of(input, weight, bias)), MemoryFormat::Contiguous);
  given.dropout(p, seed, output.numel(), row);
  if (output.numel() == 0 || (!relu && p == 0 && scale == 1)) return output;
  const OnDevice device(output);
  for_dtype(output, [&](auto t) {
    using T = decltype(t);
    run_dropout(device, Dropout(p, scale, offset), {row, row_stride, base}, relu, output.numel(), data<int64_t>(seed),
                data<T>(output), mutable_data<T>(output));
  });
  return output;
}

}  // namespace

Tensor relu_dropout_backward(const Tensor& grad, const Tensor& output, double scale) {
  operands("relu_dropout_backward", "output", output).alike("grad", grad, output);
  const MemoryFormat format = memory_format_of(output);
  const Tensor g = in_format(grad, format), y = in_format(output, format);
  Tensor grad_input = empty(sizes_of(y), y.scalar_type(), y, format);
  const int64_t count = y.numel();
  if (count == 0) return grad_input;
  const OnDevice device(y);
  for_dtype(y, [&](auto t) {
    using T = decltype(t);
    const bool vectors = count % kVector<T> == 0 && aligned(data<T>(g), data<T>(y));
    for_vector<T>(vectors ? kVector<T> : 1, [&](auto vector) {
      device.launch(relu_backward<T, vector>, divide_up(count, int64_t(vector) * kThreads), kThreads, float(scale),
                    count, data<T>(g), data<T>(y), mutable_data<T>(grad_input));
    });
  });
  return grad_input;
}

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("linear_relu_dropout", TORCH_BOX(&linear_relu_dropout));
  m.impl("relu_dropout_backward", TORCH_BOX(&relu_dropout_backward));
}

}  // namespace alexnet_kernels::cuda
