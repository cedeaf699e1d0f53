// Overlapping max-pooling with a one-byte argmax, optionally of relu(input + bias). Backward gathers in channels_last.
//   input [N, C, H, W], output, argmax [N, C, OH, OW], all in the input's memory format
//   bias [C]: max(x + b) = max(x) + b, one addition an output; its gradient is the sum of the output's
//   relu: max(relu(x)) = relu(max(x)), one ReLU an output; argmax, kNowhere where its gradient is zero, is its mask
// A task is one output row (backward: one input row) of one image (channels_last), or one plane (NCHW).
#include <vector>

#include "pool_row.h"

namespace alexnet_kernels::cpu {

struct MaxPoolArgs {
  DType dtype;
  bool channels_last, relu;
  Pool pool;
  int64_t C, H, W, OH, OW;
  const void *input, *grad;  // input: forward only; grad: backward only
  void* output;              // forward only
  uint8_t* argmax;
  void* grad_input;
  const void* bias;    // in the computing type; null without a bias
  void* partial_bias;  // its gradient, from each output row (channels_last) or plane; null without
};

namespace ALEXNET_ISA {
namespace {

template <class T, bool kRelu>
void forward(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const A* bias = static_cast<const A*>(a.bias);
  T* output = static_cast<T*>(a.output);
  if (a.channels_last) {
    for (int64_t task = begin; task < end; ++task) {
      const T* image = input + task / a.OH * a.H * a.W * a.C;
      const int64_t at = task * a.OW * a.C;
      pool_row_channels_last<kRelu, T>(
          a.pool, a.H, a.W, a.C, task % a.OH, a.OW, [&](int64_t y) { return image + y * a.W * a.C; }, output + at,
          a.argmax + at);
      if (bias != nullptr) {
        (a.relu ? add_bias_to_pixels<true, T> : add_bias_to_pixels<false, T>)(bias, a.OW, a.C, output + at,
                                                                              a.argmax + at);
      }
    }
    return;
  }
  PlaneRows<A> rows(a.pool, a.H, a.W, a.OW);
  for (int64_t plane = begin; plane < end; ++plane) {
    rows.new_plane();
    const auto fill = [&](int64_t y, A* to) {
      const T* from = input + (plane * a.H + y) * a.W;
      for_lanes<A>(a.W, [&](int64_t x, auto count) { store_n(to + x, load_n(from + x, count), count); });
    };
    for (int64_t oh = 0; oh < a.OH; ++oh) {
      const int64_t at = (plane * a.OH + oh) * a.OW;
      rows.template pool_row<kRelu>(a.H, oh, a.OW, fill, output + at, a.argmax + at);
    }
    if (bias != nullptr) {
      (a.relu ? add_bias_to_plane<true, T> : add_bias_to_plane<false, T>)(bias[plane % a.C], a.OH * a.OW,
                                                                          output + plane * a.OH * a.OW,
                                                                          a.argmax + plane * a.OH * a.OW);
    }
  }
}

template <class T>
void backward(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_input = static_cast<T*>(a.grad_input);
  A* partial = static_cast<A*>(a.partial_bias);
  if (a.channels_last) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task / a.H * a.OH * a.OW * a.C;
      pool_row_backward_channels_last(a.pool, task % a.H, a.W, a.C, a.OH, a.OW, grad + at, a.argmax + at,
                                      grad_input + task * a.W * a.C);
      if (partial == nullptr) continue;
      // The share of the output's rows that falls to this row.
      const int64_t first = task * a.OH / a.H, last = (task + 1) * a.OH / a.H;
      for (int64_t row = first; row < last; ++row) {
        const int64_t from = row * a.OW * a.C;
        sum_pixels(grad + from, a.argmax + from, a.pool.area(), a.OW, a.C, partial + row * a.C);
      }
    }
    return;
  }
  const int64_t pixels = a.H * a.W;
  std::vector<A> sum(std::is_same_v<A, T> ? 0 : pixels);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* to = grad_input + plane * pixels;
    A* into = std::is_same_v<A, T> ? reinterpret_cast<A*>(to) : sum.data();
    std::fill(into, into + pixels, A(0));
    const int64_t at = plane * a.OH * a.OW;
    pool_plane_backward(a.pool, a.H, a.W, a.OH, a.OW, grad + at, a.argmax + at, into);
    if (partial != nullptr) partial[plane] = sum_plane(grad + at, a.argmax + at, a.pool.area(), a.OH * a.OW);
    if constexpr (!std::is_same_v<A, T>) {
      for_lanes<A>(pixels, [&](int64_t i, auto lanes) { store_n(to + i, load_n(into + i, lanes), lanes); });
    }
  }
}

}  // namespace

void max_pool_forward(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) {
    a.relu && !a.bias ? forward<decltype(t), true>(a, begin, end) : forward<decltype(t), false>(a, begin, end);
  });
}
void max_pool_backward(const MaxPoolArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "map_bias.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(max_pool_forward, MaxPoolArgs)
ALEXNET_DECLARE_KERNEL(max_pool_backward, MaxPoolArgs)

namespace {

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, std::optional<Tensor> bias, IntList kernel, IntList stride,
                                      IntList padding, bool ceil_mode, bool relu) {
  const Operands given = operands("max_pool2d", "input", input);
  given.images("input", input);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  const IntList size = given.pooled(sizes_of(input), kernel, stride, padding, ceil_mode);
  if (relu) given.room_for_nowhere(kernel);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const int64_t N = size[0], C = size[1], H = x.size(2), W = x.size(3), OH = size[2], OW = size[3];
  Tensor output = empty(size, x.scalar_type(), x, format);
  Tensor argmax = empty(size, ScalarType::Byte, x, format);
  MaxPoolArgs args{};
  args.dtype = dtype_of(x);
  args.channels_last = format == MemoryFormat::ChannelsLast;
  args.relu = relu;
  args.pool = {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  args.C = C, args.H = H, args.W = W, args.OH = OH, args.OW = OW;
  args.input = x.const_data_ptr();
  args.output = output.mutable_data_ptr();
  args.argmax = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  const MapBias b(bias);
  args.bias = b.data();
  if (output.numel() > 0) run(pick_max_pool_forward(), args, args.channels_last ? N * OH : N * C, x.numel() * 8);
  return {output, argmax};
}

std::tuple<Tensor, Tensor> max_pool2d_backward(const Tensor& grad, const Tensor& argmax, std::optional<Tensor> bias,
                                               IntList input_size, IntList kernel, IntList stride, IntList padding) {
  const Operands given = operands("max_pool2d_backward", "grad", grad);
  given.pool_gradient(grad, argmax, input_size, kernel, stride, padding);
  given.map_bias(bias, grad.scalar_type(), grad.size(1));
  const MemoryFormat format = memory_format_of(argmax);
  const Tensor g = in_format(grad, format), k = in_format(argmax, format);
  const bool pixels = input_size[2] > 0 && input_size[3] > 0;
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  MapBiasGradient grad_bias(bias, grad, pixels ? input_size[0] * (channels_last ? g.size(2) : 1) : 0);
  Tensor grad_input = empty(input_size, grad.scalar_type(), grad, format);
  MaxPoolArgs args{};
  args.dtype = dtype_of(grad);
  args.channels_last = channels_last;
  args.pool = {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  args.C = input_size[1], args.H = input_size[2], args.W = input_size[3], args.OH = g.size(2), args.OW = g.size(3);
  args.grad = g.const_data_ptr();
  args.argmax = static_cast<uint8_t*>(const_cast<void*>(k.const_data_ptr()));
  args.grad_input = grad_input.mutable_data_ptr();
  const int64_t tasks = input_size[0] * (args.channels_last ? args.H : args.C);
  args.partial_bias = grad_bias.partial();
  if (grad_input.numel() > 0) run(pick_max_pool_backward(), args, tasks, grad_input.numel() * 8);
  return {grad_input, grad_bias.sum()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
