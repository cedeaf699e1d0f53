// Response normalisation inside each map, the second normalisation of the original cuda-convnet network.
//   b[y, x] = a[y, x] * s[y, x]^-beta,  s[y, x] = k + alpha/n^2 * sum of a^2 over the n x n window around (y, x)
//   input, output [N, C, H, W] in either memory format; the window is [i - n/2, i + (n-1)/2] on both axes, cut at the
//   edges
// A task is kWithinMapTaskChannels maps of one image, transposed to [pixel, map] so that vectors hold maps.
#include <vector>

#include "lrn_row.h"

namespace alexnet_kernels::cpu {

// A multiple of the lanes of every vector.
constexpr int64_t kWithinMapTaskChannels = 16;

struct WithinMapArgs {
  DType dtype;
  Lrn lrn;  // alpha_over_n is alpha / n^2
  bool channels_last;
  int64_t C, H, W;
  const void *input, *grad;
  void* output;  // the gradient of the input in backward
};

namespace ALEXNET_ISA {
namespace {

template <class T>
class Maps {
 public:
  using A = acc_t<T>;

  explicit Maps(const WithinMapArgs& args)
      : a_(args), pixels_(args.H * args.W), x_(pixels_ * kWithinMapTaskChannels), g_(x_), scale_(x_), rows_(x_) {}

  void run(int64_t task, bool backward) {
    const int64_t blocks = (a_.C + kWithinMapTaskChannels - 1) / kWithinMapTaskChannels;
    const int64_t first = task % blocks * kWithinMapTaskChannels,
                  count = std::min(kWithinMapTaskChannels, a_.C - first);
    const int64_t origin = task / blocks * a_.C * pixels_ + first * (a_.channels_last ? 1 : pixels_);
    read(static_cast<const T*>(a_.input) + origin, count, x_);
    for_each([&](int64_t i) { store(&g_[i], load(&x_[i]) * load(&x_[i])); });
    window_sum(g_, scale_, a_.lrn.size / 2);
    for_each([&](int64_t i) { store(&scale_[i], A(a_.lrn.k) + A(a_.lrn.alpha_over_n) * load(&scale_[i])); });
    if (backward) {
      read(static_cast<const T*>(a_.grad) + origin, count, g_);
      // scale_ becomes g s^-beta, g_ becomes g x s^(-beta-1), whose window sums the gradient needs.
      for_each([&](int64_t i) {
        const Vec<A> s = load(&scale_[i]), direct = load(&g_[i]) * pow_minus_beta(s, a_.lrn.beta);
        store(&scale_[i], direct);
        store(&g_[i], direct * load(&x_[i]) / s);
      });
      window_sum(g_, g_, (a_.lrn.size - 1) / 2);
      const A factor = A(-2 * a_.lrn.beta * a_.lrn.alpha_over_n);
      for_each([&](int64_t i) { store(&x_[i], load(&scale_[i]) + factor * load(&x_[i]) * load(&g_[i])); });
    } else {
      for_each([&](int64_t i) { store(&x_[i], load(&x_[i]) * pow_minus_beta(load(&scale_[i]), a_.lrn.beta)); });
    }
    write(static_cast<T*>(a_.output) + origin, count);
  }

 private:
  template <class Body>
  void for_each(const Body& body) const {
    for (int64_t i = 0; i < pixels_ * kWithinMapTaskChannels; i += kLanes<A>) body(i);
  }

  int64_t address(int64_t pixel, int64_t map) const {
    return a_.channels_last ? pixel * a_.C + map : map * pixels_ + pixel;
  }
  void read(const T* from, int64_t count, std::vector<A>& to) const {
    std::fill(to.begin(), to.end(), A(0));
    for (int64_t p = 0; p < pixels_; ++p) {
      for (int64_t m = 0; m < count; ++m) to[p * kWithinMapTaskChannels + m] = A(from[address(p, m)]);
    }
  }
  void write(T* to, int64_t count) const {
    for (int64_t p = 0; p < pixels_; ++p) {
      for (int64_t m = 0; m < count; ++m) to[address(p, m)] = T(x_[p * kWithinMapTaskChannels + m]);
    }
  }

  // Sums over n x n windows from `before` pixels above and left of each pixel, separably; `to` may be `from`.
  void window_sum(const std::vector<A>& from, std::vector<A>& to, int64_t before) {
    sum_along(from, rows_, before, a_.W, 1);
    sum_along(rows_, to, before, a_.H, a_.W);
  }
  void sum_along(const std::vector<A>& from, std::vector<A>& to, int64_t before, int64_t length, int64_t stride) const {
    for (int64_t p = 0; p < pixels_; ++p) {
      const int64_t at = p / stride % length;
      const int64_t low = std::max<int64_t>(at - before, 0), high = std::min(at - before + a_.lrn.size, length);
      for (int64_t m = 0; m < kWithinMapTaskChannels; m += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t j = low; j < high; ++j) sum += load(&from[(p + (j - at) * stride) * kWithinMapTaskChannels + m]);
        store(&to[p * kWithinMapTaskChannels + m], sum);
      }
    }
  }

  const WithinMapArgs& a_;
  const int64_t pixels_;
  std::vector<A> x_, g_, scale_, rows_;
};

void within_map(const WithinMapArgs& args, int64_t begin, int64_t end, bool backward) {
  for_dtype(args.dtype, [&](auto t) {
    Maps<decltype(t)> maps(args);
    for (int64_t task = begin; task < end; ++task) maps.run(task, backward);
  });
}

}  // namespace

void within_map_forward(const WithinMapArgs& args, int64_t begin, int64_t end) {
  within_map(args, begin, end, false);
}
void within_map_backward(const WithinMapArgs& args, int64_t begin, int64_t end) {
  within_map(args, begin, end, true);
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(within_map_forward, WithinMapArgs)
ALEXNET_DECLARE_KERNEL(within_map_backward, WithinMapArgs)

namespace {

Tensor normalise(const Operands& given, Kernel<WithinMapArgs> kernel, const Tensor* grad, const Tensor& input,
                 int64_t size, double alpha, double beta, double k) {
  given.images("input", input);
  if (grad) given.alike("grad", *grad, input);
  given.positive("size", size);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const Tensor g = grad ? in_format(*grad, format) : x;
  Tensor out = empty(sizes_of(x), x.scalar_type(), x, format);
  WithinMapArgs args{dtype_of(x),
                     make_lrn(size, alpha / (double(size) * double(size)), beta, k, std::max(x.size(2), x.size(3))),
                     format == MemoryFormat::ChannelsLast,
                     x.size(1),
                     x.size(2),
                     x.size(3),
                     x.const_data_ptr(),
                     g.const_data_ptr(),
                     out.mutable_data_ptr()};
  if (x.numel() > 0)
    run(kernel, args, x.size(0) * ((x.size(1) + kWithinMapTaskChannels - 1) / kWithinMapTaskChannels), x.numel() * 32);
  return out;
}

Tensor within_map_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  return normalise(operands("within_map_response_norm", "input", input), pick_within_map_forward(), nullptr, input,
                   size, alpha, beta, k);
}

Tensor within_map_response_norm_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha,
                                         double beta, double k) {
  return normalise(operands("within_map_response_norm_backward", "grad", grad), pick_within_map_backward(), &grad,
                   input, size, alpha, beta, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("within_map_response_norm", TORCH_BOX(&within_map_response_norm));
  m.impl("within_map_response_norm_backward", TORCH_BOX(&within_map_response_norm_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
