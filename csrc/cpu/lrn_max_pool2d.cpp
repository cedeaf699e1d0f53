// Local response normalisation and max-pooling in one pass, forward and backward, optionally with the bias [C] and the
// ReLU before them. The normalised activations are not written to memory.
//   input [N, C, H, W], output and argmax [N, C, OH, OW], in the input's memory format
// Channels_last: a task is one output row (backward: one input row) of one image. A ring buffer holds the kernel_h
// normalised rows of a window. NCHW: a task is kLrnPoolTaskChannels channels of one image.
#include "lrn_row.h"
#include "pool_row.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

struct LrnMaxPoolArgs {
  DType dtype;
  bool channels_last, relu;
  Lrn lrn;
  Pool pool;
  int64_t C, groups, H, W, OH, OW;
  const void *input, *grad;
  void* output;  // the gradient of the input in backward
  uint8_t* argmax;
  const void* bias;    // in the computing type; null without a bias
  void* partial_bias;  // its gradient, from each input row (channels_last) or image; null without
};

inline int64_t blocks_of(const LrnMaxPoolArgs& a) {
  return (a.C / a.groups + kLrnPoolTaskChannels - 1) / kLrnPoolTaskChannels;
}

namespace ALEXNET_ISA {
namespace {

template <class T, bool kRelu, bool kBias>
void forward_channels_last(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  T* output = static_cast<T*>(a.output);
  const int64_t tower = a.C / a.groups, row_size = a.W * a.C;
  LrnRows<T> lrn(a.lrn, tower, static_cast<const A*>(a.bias), a.groups);
  const int64_t slots = std::min(a.pool.kernel_h, a.H);
  std::vector<A> rows(slots * row_size);
  std::vector<int64_t> held(slots, -1);  // the row of the batch in each slot
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.OH, oh = task % a.OH;
    const int64_t top = oh * a.pool.stride_h - a.pool.pad_h;
    const int64_t last = std::min(top + a.pool.kernel_h, a.H);
    for (int64_t y = std::max<int64_t>(top, 0); y < last; ++y) {
      const int64_t slot = y % slots, row = n * a.H + y;
      if (held[slot] == row) continue;
      held[slot] = row;
      lrn.template forward<kRelu, kBias, true>(input + row * row_size, &rows[slot * row_size], a.W * a.groups);
    }
    const int64_t at = task * a.OW * a.C;
    pool_row_channels_last<false, A>(
        a.pool, a.H, a.W, a.C, oh, a.OW, [&](int64_t y) -> const A* { return &rows[y % slots * row_size]; },
        output + at, a.argmax + at);
  }
}

template <class T, bool kRelu, bool kBias>
void backward_channels_last(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_input = static_cast<T*>(a.output);
  const int64_t tower = a.C / a.groups, row_size = a.W * a.C;
  LrnRows<T> lrn(a.lrn, tower, static_cast<const A*>(a.bias), a.groups);
  std::vector<A> sum(row_size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t at = task / a.H * a.OH * a.OW * a.C;
    pool_row_backward_channels_last<T>(a.pool, task % a.H, a.W, a.C, a.OH, a.OW, grad + at, a.argmax + at, sum.data());
    const int64_t i = task * row_size;
    A* partial = kBias ? static_cast<A*>(a.partial_bias) + task * a.C : nullptr;
    if (kBias) std::fill(partial, partial + a.C, A(0));
    lrn.template backward<kRelu, kBias>(input + i, sum.data(), grad_input + i, a.W * a.groups, partial);
  }
}

// The planes of one tower: channel c is plane c, of `pixels` elements.
template <class T, bool kRelu, bool kBias>
struct Planes {
  using A = acc_t<T>;
  const Lrn& lrn;
  const T* tower;
  const A* bias;  // of the tower's channels
  int64_t channels, pixels;

  template <class Count>
  Vec<A> biased(int64_t c, int64_t p, Count count) const {
    const Vec<A> v = load_n(tower + c * pixels + p, count);
    return kBias ? v + bias[c] : v;
  }
  template <class Count>
  Vec<A> input(int64_t c, int64_t p, Count count) const {
    const Vec<A> v = biased(c, p, count);
    return kRelu ? vrelu(v) : v;
  }
  template <class Count>
  Vec<A> scale(int64_t c, int64_t p, Count count) const {
    const int64_t low = std::max<int64_t>(c - lrn.size / 2, 0);
    const int64_t high = std::min(c + (lrn.size - 1) / 2 + 1, channels);
    Vec<A> sum{};
    for (int64_t j = low; j < high; ++j) {
      const Vec<A> v = input(j, p, count);
      sum += v * v;
    }
    return A(lrn.k) + A(lrn.alpha_over_n) * sum;
  }
};

struct Block {
  int64_t image, tower, first, last;  // channels [first, last) of the tower
};
inline Block block_of(const LrnMaxPoolArgs& a, int64_t task) {
  const int64_t blocks = blocks_of(a), first = task % blocks * kLrnPoolTaskChannels;
  return {task / blocks / a.groups, task / blocks % a.groups, first,
          std::min(first + kLrnPoolTaskChannels, a.C / a.groups)};
}

template <class T, bool kRelu, bool kBias>
void forward_planes(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  T* output = static_cast<T*>(a.output);
  const int64_t channels = a.C / a.groups, pixels = a.H * a.W;
  PlaneRows<A> rows(a.pool, a.H, a.W, a.OW);
  for (int64_t task = begin; task < end; ++task) {
    const Block b = block_of(a, task);
    const int64_t first_plane = b.image * a.C + b.tower * channels;
    const A* bias = kBias ? static_cast<const A*>(a.bias) + b.tower * channels : nullptr;
    const Planes<T, kRelu, kBias> planes{a.lrn, input + first_plane * pixels, bias, channels, pixels};
    for (int64_t c = b.first; c < b.last; ++c) {
      rows.new_plane();
      const auto fill = [&](int64_t y, A* to) {
        for_lanes<A>(a.W, [&](int64_t x, auto count) {
          const int64_t p = y * a.W + x;
          const Vec<A> s = planes.scale(c, p, count);
          store_n(to + x, planes.input(c, p, count) * pow_minus_beta(s, a.lrn.beta), count);
        });
      };
      for (int64_t oh = 0; oh < a.OH; ++oh) {
        const int64_t at = ((first_plane + c) * a.OH + oh) * a.OW;
        rows.template pool_row<false>(a.H, oh, a.OW, fill, output + at, a.argmax + at);
      }
    }
  }
}

template <class T, bool kRelu, bool kBias>
void backward_planes(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const T* grad = static_cast<const T*>(a.grad);
  T* grad_input = static_cast<T*>(a.output);
  const int64_t channels = a.C / a.groups, pixels = a.H * a.W, pooled = a.OH * a.OW;
  const int64_t before = (a.lrn.size - 1) / 2, after = a.lrn.size / 2;
  // The planes of the task and the halo of planes whose windows reach into it.
  std::vector<A> direct((kLrnPoolTaskChannels + a.lrn.size) * pixels),
      ratio((kLrnPoolTaskChannels + a.lrn.size) * pixels);
  const A factor = A(-2 * a.lrn.beta * a.lrn.alpha_over_n);
  for (int64_t task = begin; task < end; ++task) {
    const Block b = block_of(a, task);
    const int64_t first_plane = b.image * a.C + b.tower * channels;
    const A* bias = kBias ? static_cast<const A*>(a.bias) + b.tower * channels : nullptr;
    const Planes<T, kRelu, kBias> planes{a.lrn, input + first_plane * pixels, bias, channels, pixels};
    const int64_t low = std::max<int64_t>(b.first - before, 0), high = std::min(b.last + after, channels);
    for (int64_t c = low; c < high; ++c) {
      A* d = &direct[(c - low) * pixels];
      A* r = &ratio[(c - low) * pixels];
      std::fill(d, d + pixels, A(0));
      const int64_t at = (first_plane + c) * pooled;
      pool_plane_backward<T>(a.pool, a.H, a.W, a.OH, a.OW, grad + at, a.argmax + at, d);
      for_lanes<A>(pixels, [&](int64_t p, auto count) {
        const Vec<A> s = planes.scale(c, p, count);
        const Vec<A> v = load_n(d + p, count) * pow_minus_beta(s, a.lrn.beta);
        store_n(d + p, v, count);
        store_n(r + p, v * planes.input(c, p, count) / s, count);
      });
    }
    for (int64_t c = b.first; c < b.last; ++c) {
      const int64_t from = std::max(c - before, low), to = std::min(c + after + 1, high);
      PlaneSum<A> total;
      for_lanes<A>(pixels, [&](int64_t p, auto count) {
        Vec<A> sum{};
        for (int64_t j = from; j < to; ++j) sum += load_n(&ratio[(j - low) * pixels + p], count);
        const Vec<A> raw = planes.biased(c, p, count);
        const Vec<A> v = kRelu ? vrelu(raw) : raw;
        Vec<A> dx = load_n(&direct[(c - low) * pixels + p], count) + factor * v * sum;
        if (kRelu) dx = raw <= Vec<A>{} ? Vec<A>{} : dx;
        store_n(grad_input + (first_plane + c) * pixels + p, dx, count);
        if (kBias) total.add(dx, count);
      });
      if (kBias) static_cast<A*>(a.partial_bias)[first_plane + c] = total.total();
    }
  }
}

// Calls body(value of the storage type, relu, biased), the latter two as compile-time constants.
template <class Body>
void for_variant(const LrnMaxPoolArgs& a, const Body& body) {
  for_dtype(a.dtype, [&](auto t) {
    const auto with_relu = [&](auto relu) {
      a.bias != nullptr ? body(t, relu, std::true_type{}) : body(t, relu, std::false_type{});
    };
    a.relu ? with_relu(std::true_type{}) : with_relu(std::false_type{});
  });
}

}  // namespace

void lrn_max_pool_forward(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  for_variant(a, [&](auto t, auto relu, auto biased) {
    using T = decltype(t);
    a.channels_last ? forward_channels_last<T, relu, biased>(a, begin, end)
                    : forward_planes<T, relu, biased>(a, begin, end);
  });
}
void lrn_max_pool_backward(const LrnMaxPoolArgs& a, int64_t begin, int64_t end) {
  for_variant(a, [&](auto t, auto relu, auto biased) {
    using T = decltype(t);
    a.channels_last ? backward_channels_last<T, relu, biased>(a, begin, end)
                    : backward_planes<T, relu, biased>(a, begin, end);
  });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "map_bias.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(lrn_max_pool_forward, LrnMaxPoolArgs)
ALEXNET_DECLARE_KERNEL(lrn_max_pool_backward, LrnMaxPoolArgs)

namespace {

LrnMaxPoolArgs arguments(const Tensor& x, MemoryFormat format, const Lrn& lrn, int64_t groups, const IntList& kernel,
                         const IntList& stride, const IntList& padding, bool relu) {
  LrnMaxPoolArgs args{};
  args.dtype = dtype_of(x);
  args.channels_last = format == MemoryFormat::ChannelsLast;
  args.relu = relu;
  args.lrn = lrn;
  args.pool = {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1]};
  args.C = x.size(1), args.groups = groups, args.H = x.size(2), args.W = x.size(3);
  args.input = x.const_data_ptr();
  return args;
}

std::tuple<Tensor, Tensor> lrn_max_pool2d(const Tensor& input, std::optional<Tensor> bias, int64_t size, double alpha,
                                          double beta, double k, int64_t groups, IntList kernel, IntList stride,
                                          IntList padding, bool ceil_mode, bool relu) {
  const Operands given = operands("lrn_max_pool2d", "input", input);
  given.images("input", input);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  given.towers(size, groups, input.size(1));
  const IntList shape = given.pooled(sizes_of(input), kernel, stride, padding, ceil_mode);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const Lrn lrn = make_lrn(size, alpha / double(size), beta, k, x.size(1));
  LrnMaxPoolArgs args = arguments(x, format, lrn, groups, kernel, stride, padding, relu);
  args.OH = shape[2], args.OW = shape[3];
  const MapBias b(bias);
  args.bias = b.data();
  Tensor output = empty(shape, x.scalar_type(), x, format);
  Tensor argmax = empty(shape, ScalarType::Byte, x, format);
  args.output = output.mutable_data_ptr();
  args.argmax = static_cast<uint8_t*>(argmax.mutable_data_ptr());
  const int64_t tasks = x.size(0) * (args.channels_last ? args.OH : groups * blocks_of(args));
  if (output.numel() > 0) run(pick_lrn_max_pool_forward(), args, tasks, x.numel() * 12);
  return {output, argmax};
}

std::tuple<Tensor, Tensor> lrn_max_pool2d_backward(const Tensor& grad, const Tensor& input, std::optional<Tensor> bias,
                                                   const Tensor& argmax, int64_t size, double alpha, double beta,
                                                   double k, int64_t groups, IntList kernel, IntList stride,
                                                   IntList padding, bool relu) {
  const Operands given = operands("lrn_max_pool2d_backward", "grad", grad);
  given.tensor("input", input, grad.scalar_type());
  given.dimensions("input", input, 4);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  given.towers(size, groups, input.size(1));
  given.pool_gradient(grad, argmax, sizes_of(input), kernel, stride, padding);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format), g = in_format(grad, format), winners = in_format(argmax, format);
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  MapBiasGradient grad_bias(bias, grad, x.numel() == 0 ? 0 : x.size(0) * (channels_last ? x.size(2) : 1));
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  const Lrn lrn = make_lrn(size, alpha / double(size), beta, k, x.size(1));
  LrnMaxPoolArgs args = arguments(x, format, lrn, groups, kernel, stride, padding, relu);
  args.OH = g.size(2), args.OW = g.size(3);
  args.grad = g.const_data_ptr();
  args.argmax = static_cast<uint8_t*>(const_cast<void*>(winners.const_data_ptr()));
  args.output = grad_input.mutable_data_ptr();
  const int64_t tasks = x.size(0) * (args.channels_last ? args.H : groups * blocks_of(args));
  const MapBias b(bias);
  args.bias = b.data();
  args.partial_bias = grad_bias.partial();
  if (x.numel() > 0) run(pick_lrn_max_pool_backward(), args, tasks, x.numel() * 16);
  return {grad_input, grad_bias.sum()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("lrn_max_pool2d", TORCH_BOX(&lrn_max_pool2d));
  m.impl("lrn_max_pool2d_backward", TORCH_BOX(&lrn_max_pool2d_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
