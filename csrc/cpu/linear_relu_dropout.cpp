// dropout(relu(input @ weight.T + bias)): torch's GEMM (oneDNN, MKL), then one pass over its output in place. Small
// batches, for which that GEMM does not reach the memory bandwidth, take a kernel that streams the weights once. The
// mask is that of dropout.cpp. Backward of ReLU and dropout is one kernel: the gradient times scale where output > 0.
//   input [N, in], weight [out, in], bias [out], output [N, out]
#include "dropout_mask.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

struct ReluDropoutArgs {
  DType dtype;
  Dropout dropout;
  bool relu;
  int64_t row, row_stride, base;
  void* output;
};

struct StreamArgs {
  ReluDropoutArgs epilogue;
  int64_t batch, in, out;
  const void *input, *weight, *bias;  // bias may be null
};

struct ReluBackwardArgs {
  DType dtype;
  double scale;
  int64_t count;
  const void *grad, *output;
  void* grad_input;
};

namespace ALEXNET_ISA {

// ReLU and dropout of the output's elements [first, first + count).
template <class T>
inline void relu_dropout_span(const ReluDropoutArgs& a, int64_t first, int64_t count) {
  while (count > 0) {
    const int64_t r = first / a.row, i = first % a.row, n = std::min(count, a.row - i);
    T* y = static_cast<T*>(a.output) + first;
    const uint64_t index = index_of(a.base, a.row_stride, r, i);
    a.relu ? dropout_run<true>(a.dropout, index, n, y, y) : dropout_run<false>(a.dropout, index, n, y, y);
    first += n;
    count -= n;
  }
}

void relu_dropout_in_place(const ReluDropoutArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { relu_dropout_span<decltype(t)>(a, begin * a.row, (end - begin) * a.row); });
}

// The register tile: kRows * kImages sums and a vector for each image, of 32 registers with AVX-512, else of 16.
constexpr int kRows = 6, kImages = kVecBytes == 64 ? 4 : 2;

// input[n ... n + images) @ weight[o ... o + rows).T + bias. Every output is summed in the same order, whatever the
// tile.
template <int rows, int images, class T>
inline void products(const StreamArgs& a, int64_t o, int64_t n) {
  using A = acc_t<T>;
  constexpr int step = kLanes<A>;
  const int64_t in = a.in;
  const T* w = static_cast<const T*>(a.weight) + o * in;
  const T* x = static_cast<const T*>(a.input) + n * in;
  Vec<A> sums[rows][images] = {};
  const auto add = [&](int64_t k, auto lanes) __attribute__((always_inline)) {
    Vec<A> v[images];
#pragma GCC unroll 8
    for (int j = 0; j < images; ++j) v[j] = load_n(x + j * in + k, lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      prefetch<512>(w + i * in + k);
      const Vec<A> u = load_n(w + i * in + k, lanes);
#pragma GCC unroll 8
      for (int j = 0; j < images; ++j) sums[i][j] += u * v[j];
    }
  };
  for_lanes<A>(in, add);
  T* y = static_cast<T*>(a.epilogue.output) + n * a.out + o;
  const T* bias = static_cast<const T*>(a.bias);
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < images; ++j) {
      A lanes[step];
      __builtin_memcpy(lanes, &sums[i][j], sizeof(lanes));
      for (int half = step / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
      }
      y[j * a.out + i] = T(lanes[0] + (bias ? A(bias[o + i]) : A(0)));
    }
  }
}

template <int images, class T>
inline void products_of_images(const StreamArgs& a, int64_t o, int64_t end, int64_t n) {
  for (; o + kRows <= end; o += kRows) products<kRows, images, T>(a, o, n);
  for (; o < end; ++o) products<1, images, T>(a, o, n);
}

void linear_stream(const StreamArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.epilogue.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kLinearTaskOutputs, last = std::min(first + kLinearTaskOutputs, a.out);
      int64_t n = 0;
      for (; n + kImages <= a.batch; n += kImages) products_of_images<kImages, T>(a, first, last, n);
      if constexpr (kImages == 4) {
        if (a.batch - n == 3) products_of_images<3, T>(a, first, last, n);
        if (a.batch - n == 2) products_of_images<2, T>(a, first, last, n);
      }
      if (a.batch - n == 1) products_of_images<1, T>(a, first, last, n);
      for (n = 0; n < a.batch; ++n) relu_dropout_span<T>(a.epilogue, n * a.out + first, last - first);
    }
  });
}

void relu_backward(const ReluBackwardArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    using A = acc_t<T>;
    const int64_t first = begin * kElementwiseTaskElements,
                  count = std::min(end * kElementwiseTaskElements, a.count) - first;
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
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(relu_dropout_in_place, ReluDropoutArgs)
ALEXNET_DECLARE_KERNEL(linear_stream, StreamArgs)
ALEXNET_DECLARE_KERNEL(relu_backward, ReluBackwardArgs)

namespace {

// The largest batch that linear_stream takes. CPU time in ms of fc6 by linear_stream and aten::linear (Zen 4, AVX-512):
constexpr int64_t kStreamFloat = 16;    // batch 1: 5.7, 6.0; 16: 16, 38; SSE2 at 16: equal
constexpr int64_t kStreamDouble = 16;   // batch 1: 11, 12; 16: 30, 45
constexpr int64_t kStreamBFloat16 = 4;  // batch 1: 3.0, 6.1; 4: 3.9, 5.8; 8: 6.8, 7.2 (fc7: 3.3, 3.0)
constexpr int64_t kStreamHalf = 64;     // batch 1: 3.1, 6.3; 16: 13, 52; fc7 at 64: 23, 89

int64_t stream_limit(DType dtype) {
  // Without vector instructions that widen 16 bits to 32, linear_stream is slower: fc7 in bfloat16 at batch 1, 11 and
  // 2.4 ms.
  const bool widens = current_isa() != Isa::generic;
  switch (dtype) {
    case DType::f32: return kStreamFloat;
    case DType::f64: return kStreamDouble;
    case DType::bf16: return widens ? kStreamBFloat16 : 0;
    case DType::f16: return widens ? kStreamHalf : 0;
  }
  return 0;
}

// Whether linear_stream takes the operands. aten::linear takes or refuses all others.
bool streams(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto fits = [&](const Tensor& t) { return t.scalar_type() == input.scalar_type(); };
  return input.dim() == 2 && input.size(0) <= stream_limit(dtype_of(input)) && weight.dim() == 2 &&
         weight.size(1) == input.size(1) && weight.is_contiguous() && fits(weight) &&
         (!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && fits(*bias)));
}

Tensor linear_relu_dropout(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, bool relu, double p,
                           double scale, const Tensor& seed, int64_t offset, int64_t row, int64_t row_stride,
                           int64_t base) {
  const Operands given = operands("linear_relu_dropout", "input", input);
  given.linear(weight, bias);
  const bool streamed = streams(input, weight, bias);
  Tensor output = streamed
                      ? empty({input.size(0), weight.size(0)}, input.scalar_type(), input)
                      : in_format(call_torch("aten::linear", stack_of(input, weight, bias)), MemoryFormat::Contiguous);
  given.dropout(p, seed, output.numel(), row);
  if (output.numel() == 0 || (!streamed && !relu && p == 0 && scale == 1)) return output;
  const int64_t key = *static_cast<const int64_t*>(seed.const_data_ptr());
  ReluDropoutArgs args{dtype_of(output),         make_dropout(p, scale, key, offset), relu, row, row_stride, base,
                       output.mutable_data_ptr()};
  if (!streamed) {
    run(pick_relu_dropout_in_place(), args, output.numel() / row, output.numel() * 16);
    return output;
  }
  const Tensor x = in_format(input, MemoryFormat::Contiguous);
  const Tensor b = bias ? in_format(*bias, MemoryFormat::Contiguous) : Tensor();
  StreamArgs stream{args,
                    x.size(0),
                    x.size(1),
                    weight.size(0),
                    x.const_data_ptr(),
                    weight.const_data_ptr(),
                    bias ? b.const_data_ptr() : nullptr};
  run(pick_linear_stream(), stream, (stream.out + kLinearTaskOutputs - 1) / kLinearTaskOutputs, weight.numel() * 4);
  return output;
}

}  // namespace

Tensor relu_dropout_backward(const Tensor& grad, const Tensor& output, double scale) {
  operands("relu_dropout_backward", "output", output).alike("grad", grad, output);
  const MemoryFormat format = memory_format_of(output);
  const Tensor g = in_format(grad, format), y = in_format(output, format);
  Tensor grad_input = empty(sizes_of(y), y.scalar_type(), y, format);
  ReluBackwardArgs args{
      dtype_of(y), scale, y.numel(), g.const_data_ptr(), y.const_data_ptr(), grad_input.mutable_data_ptr()};
  run(pick_relu_backward(), args, (y.numel() + kElementwiseTaskElements - 1) / kElementwiseTaskElements,
      y.numel() * 12);
  return grad_input;
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("linear_relu_dropout", TORCH_BOX(&linear_relu_dropout));
  m.impl("relu_dropout_backward", TORCH_BOX(&relu_dropout_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
