// Local response normalisation across channels, forward and backward. lrn_row.h has the formula.
//   input, output [N, C, H, W] in either memory format. Windows stay inside one of `groups` towers of channels: a tower
//   of a pixel (channels_last) or of an image (NCHW) is normalised by itself.
// A task is one row of C / groups channels (channels_last) or kLrnTaskPixels pixels of one tower of one image (NCHW).
#include "lrn_row.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

struct LrnArgs {
  DType dtype;
  Lrn lrn;
  bool channels_last;
  int64_t channels;  // C / groups
  int64_t pixels;    // H * W (NCHW)
  int64_t tiles;     // tasks of an image (NCHW)
  const void* grad;
  const void* input;
  void* output;  // the gradient of the input in backward
};

namespace ALEXNET_ISA {
namespace {

template <class T>
struct PixelTile {
  using A = acc_t<T>;
  const Lrn& lrn;
  const int64_t channels, pixels, first, count;  // channel c of pixel p is at [c * pixels + first + p]

  Vec<A> square_sum(const T* a, int64_t low, int64_t high, int64_t p, int lanes) const {
    Vec<A> sum{};
    for (int64_t j = std::max<int64_t>(low, 0); j < std::min(high, channels); ++j) {
      const Vec<A> v = load_any(a + j * pixels + first + p, lanes);
      sum += v * v;
    }
    return sum;
  }

  static Vec<A> load_any(const T* p, int lanes) { return lanes == kLanes<A> ? load(p) : load_partial(p, lanes); }
  static void store_any(T* p, Vec<A> v, int lanes) { lanes == kLanes<A> ? store(p, v) : store_partial(p, v, lanes); }

  Vec<A> scale(const T* a, int64_t c, int64_t p, int lanes) const {
    const int64_t low = c - lrn.size / 2;
    return A(lrn.k) + A(lrn.alpha_over_n) * square_sum(a, low, low + lrn.size, p, lanes);
  }

  void forward(const T* a, T* y) const {
    for (int64_t c = 0; c < channels; ++c) {
      for_lanes<A>(count, [&](int64_t p, int lanes) {
        const int64_t at = c * pixels + first + p;
        store_any(y + at, load_any(a + at, lanes) * pow_minus_beta(scale(a, c, p, lanes), lrn.beta), lanes);
      });
    }
  }

  void backward(const T* a, const T* g, T* dx, std::vector<A>& direct, std::vector<A>& ratio) const {
    constexpr int64_t kRow = kLrnTaskPixels + kLanes<A>;
    direct.resize(channels * kRow);
    ratio.resize(channels * kRow);
    for (int64_t c = 0; c < channels; ++c) {
      for_lanes<A>(count, [&](int64_t p, int lanes) {
        const int64_t at = c * pixels + first + p;
        const Vec<A> s = scale(a, c, p, lanes);
        const Vec<A> d = load_any(g + at, lanes) * pow_minus_beta(s, lrn.beta);
        store(&direct[c * kRow + p], d);
        store(&ratio[c * kRow + p], d * load_any(a + at, lanes) / s);
      });
    }
    const A factor = A(-2 * lrn.beta * lrn.alpha_over_n);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t low = std::max<int64_t>(c - (lrn.size - 1) / 2, 0);
      const int64_t high = std::min(c + lrn.size / 2 + 1, channels);
      for_lanes<A>(count, [&](int64_t p, int lanes) {
        const int64_t at = c * pixels + first + p;
        Vec<A> sum{};
        for (int64_t j = low; j < high; ++j) sum += load(&ratio[j * kRow + p]);
        store_any(dx + at, load(&direct[c * kRow + p]) + factor * load_any(a + at, lanes) * sum, lanes);
      });
    }
  }
};

template <class T, bool kBackward>
void lrn(const LrnArgs& args, int64_t begin, int64_t end) {
  const T* a = static_cast<const T*>(args.input);
  const T* g = static_cast<const T*>(args.grad);
  T* out = static_cast<T*>(args.output);
  if (args.channels_last) {
    LrnRows<T> rows(args.lrn, args.channels);
    const int64_t at = begin * args.channels;
    if constexpr (kBackward) {
      rows.template backward<false>(a + at, g + at, out + at, end - begin);
    } else {
      rows.template forward<false>(a + at, out + at, end - begin);
    }
    return;
  }
  std::vector<acc_t<T>> direct, ratio;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / args.tiles * args.channels * args.pixels;
    const int64_t first = task % args.tiles * kLrnTaskPixels;
    const PixelTile<T> tile{args.lrn, args.channels, args.pixels, first, std::min(kLrnTaskPixels, args.pixels - first)};
    if constexpr (kBackward) {
      tile.backward(a + image, g + image, out + image, direct, ratio);
    } else {
      tile.forward(a + image, out + image);
    }
  }
}

}  // namespace

void lrn_forward(const LrnArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto t) { lrn<decltype(t), false>(args, begin, end); });
}
void lrn_backward(const LrnArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto t) { lrn<decltype(t), true>(args, begin, end); });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(lrn_forward, LrnArgs)
ALEXNET_DECLARE_KERNEL(lrn_backward, LrnArgs)

namespace {

Tensor normalise(const Operands& given, Kernel<LrnArgs> kernel, const Tensor* grad, const Tensor& input, int64_t size,
                 double alpha, double beta, double k, int64_t groups) {
  given.images("input", input);
  if (grad) given.alike("grad", *grad, input);
  given.towers(size, groups, input.size(1));
  const MemoryFormat format = memory_format_of(input);
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  const Tensor a = in_format(input, format);
  const Tensor g = grad ? in_format(*grad, format) : a;
  Tensor out = empty(sizes_of(input), input.scalar_type(), input, format);
  if (input.numel() == 0) return out;
  const int64_t pixels = input.size(2) * input.size(3);
  LrnArgs args{dtype_of(input),
               make_lrn(size, alpha / double(size), beta, k, input.size(1)),
               channels_last,
               input.size(1) / groups,
               pixels,
               (pixels + kLrnTaskPixels - 1) / kLrnTaskPixels,
               g.const_data_ptr(),
               a.const_data_ptr(),
               out.mutable_data_ptr()};
  run(kernel, args, input.size(0) * groups * (channels_last ? pixels : args.tiles), input.numel() * 12);
  return out;
}

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k, int64_t groups) {
  return normalise(operands("local_response_norm", "input", input), pick_lrn_forward(), nullptr, input, size, alpha,
                   beta, k, groups);
}

Tensor local_response_norm_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta,
                                    double k, int64_t groups) {
  return normalise(operands("local_response_norm_backward", "grad", grad), pick_lrn_backward(), &grad, input, size,
                   alpha, beta, k, groups);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&local_response_norm));
  m.impl("local_response_norm_backward", TORCH_BOX(&local_response_norm_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
