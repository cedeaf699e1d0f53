// dropout(relu(input @ weight.T + bias)): torch's GEMM (oneDNN, MKL), then one pass over its output in place. The mask
// is the one dropout.cpp would draw. Backward of ReLU and dropout together: the gradient times scale where output > 0.
//   input [N, in], weight [out, in], bias [out], output [N, out]
#include "dropout_mask.h"

namespace alexnet_kernels {

struct ReluDropoutArgs {
  DType dtype;
  Dropout dropout;
  bool relu;
  int64_t row, row_stride, base;
  void* output;
};

struct ReluBackwardArgs {
  DType dtype;
  double scale;
  int64_t count;
  const void *grad, *output;
  void* grad_input;
};

constexpr int64_t kSpan = 1 << 13;  // elements of one task of relu_backward

namespace ALEXNET_ISA {

void relu_dropout_in_place(const ReluDropoutArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t r = begin; r < end; ++r) {
      T* y = static_cast<T*>(a.output) + r * a.row;
      const uint64_t index = a.base + r * a.row_stride;
      a.relu ? dropout_run<true>(a.dropout, index, a.row, y, y) : dropout_run<false>(a.dropout, index, a.row, y, y);
    }
  });
}

void relu_backward(const ReluBackwardArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const int64_t first = begin * kSpan, count = std::min(end * kSpan, a.count) - first;
    const T* g = static_cast<const T*>(a.grad) + first;
    const T* y = static_cast<const T*>(a.output) + first;
    T* dx = static_cast<T*>(a.grad_input) + first;
    for_lanes<A>(count, [&](int64_t i, auto lanes) {
      const Vec<A> v = load_n(g + i, lanes) * A(a.scale);
      store_n(dx + i, load_n(y + i, lanes) <= Vec<A>{} ? Vec<A>{} : v, lanes);
    });
  });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels

#ifdef ALEXNET_REGISTER
#include "common/tensor.h"

namespace alexnet_kernels {
ALEXNET_DECLARE_KERNEL(relu_dropout_in_place, ReluDropoutArgs)
ALEXNET_DECLARE_KERNEL(relu_backward, ReluBackwardArgs)

namespace {

Tensor linear_relu_dropout(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, bool relu, double p,
                           double scale, const Tensor& seed, int64_t offset, int64_t row, int64_t row_stride,
                           int64_t base) {
  Tensor output = in_format(call_torch("aten::linear", stack_of(input, weight, bias)), MemoryFormat::Contiguous);
  if (output.numel() == 0 || (!relu && p == 0 && scale == 1)) return output;
  const int64_t key = *static_cast<const int64_t*>(seed.const_data_ptr());
  ReluDropoutArgs args{dtype_of(output),         make_dropout(p, scale, key, offset), relu, row, row_stride, base,
                       output.mutable_data_ptr()};
  run(pick_relu_dropout_in_place(), args, output.numel() / row, output.numel() * 16);
  return output;
}

Tensor relu_dropout_backward(const Tensor& grad, const Tensor& output, double scale) {
  const MemoryFormat format = memory_format_of(output);
  const Tensor g = in_format(grad, format), y = in_format(output, format);
  Tensor grad_input = empty(sizes_of(y), y.scalar_type(), y, format);
  ReluBackwardArgs args{
      dtype_of(y), scale, y.numel(), g.const_data_ptr(), y.const_data_ptr(), grad_input.mutable_data_ptr()};
  run(pick_relu_backward(), args, (y.numel() + kSpan - 1) / kSpan, y.numel() * 12);
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("linear_relu_dropout", TORCH_BOX(&linear_relu_dropout));
  m.impl("relu_dropout_backward", TORCH_BOX(&relu_dropout_backward));
}

}  // namespace alexnet_kernels
#endif
