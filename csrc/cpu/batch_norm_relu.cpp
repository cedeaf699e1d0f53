// Batch normalisation (Ioffe, Szegedy 2015) and ReLU in one pass, forward and backward.
//   y = relu((x - mean) / sqrt(var + eps) * weight + bias), mean and var over N, H, W (training) or running (inference)
//   input, output [N, C, H, W] in either memory format; mean, var, weight, bias [C] in float, or double for double
// The moments of each part of the batch come from two passes, the second from the cache. Parts are combined in a fixed
// order, so that the result does not depend on the number of threads. Backward recomputes ReLU's mask.
// A task is one part: kBatchNormPartBytes of pixels with all channels (channels_last), or one plane (NCHW).
#include <vector>

#include "channel_moments.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

struct BatchNormArgs {
  DType dtype;
  bool channels_last, training;
  int64_t N, C, pixels;  // pixels = H * W
  int64_t part;          // pixels of a part (channels_last)
  double eps;
  const void *input, *grad;
  const void *mean, *var, *weight, *bias;  // weight and bias may be null
  void* output;                            // the gradient of the input in backward
  // [parts, C, 2]. Forward: mean and sum of squares around it. Backward: sums of the gradient and of the gradient times
  // x - mean.
  double* partial;
  const double* sums;  // [C, 2], backward: the partial sums added up
};

namespace ALEXNET_ISA {
namespace {

template <class A>
A at_or(const void* values, int64_t c, A otherwise) {
  return values ? static_cast<const A*>(values)[c] : otherwise;
}

// The map from x to the normalised value: (x - mean) * factor + bias.
template <class A>
struct Affine {
  A mean, inverse_std, factor, bias;
  Affine(const BatchNormArgs& a, int64_t c)
      : mean(static_cast<const A*>(a.mean)[c]),
        inverse_std(A(1 / std::sqrt(double(static_cast<const A*>(a.var)[c]) + a.eps))),
        factor(inverse_std * at_or(a.weight, c, A(1))),
        bias(at_or(a.bias, c, A(0))) {}
};

// The affine maps of all channels, as arrays that vectors are loaded from.
template <class A>
struct AffineRows {
  std::vector<A> mean, inverse_std, factor, bias;
  explicit AffineRows(const BatchNormArgs& a) : mean(a.C), inverse_std(a.C), factor(a.C), bias(a.C) {
    for (int64_t c = 0; c < a.C; ++c) {
      const Affine<A> m(a, c);
      mean[c] = m.mean, inverse_std[c] = m.inverse_std, factor[c] = m.factor, bias[c] = m.bias;
    }
  }
};

template <class T>
void moments(const BatchNormArgs& a, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(a.input);
  for (int64_t task = begin; task < end; ++task) {
    if (a.channels_last) {
      const int64_t first = task * a.part, count = std::min(a.part, a.N * a.pixels - first);
      row_moments(input + first * a.C, count, a.C, a.partial + 2 * task * a.C);
    } else {
      plane_moments(input + task * a.pixels, a.pixels, a.partial + 2 * task);
    }
  }
}

template <class T>
void normalise(const BatchNormArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  T* output = static_cast<T*>(a.output);
  if (a.channels_last) {
    const AffineRows<A> rows(a);
    const int64_t last = std::min(end * a.part, a.N * a.pixels);
    for (int64_t p = begin * a.part; p < last; ++p) {
      for_lanes<A>(a.C, [&](int64_t c, auto lanes) {
        const Vec<A> x = load_n(input + p * a.C + c, lanes);
        const Vec<A> y =
            (x - load_n(&rows.mean[c], lanes)) * load_n(&rows.factor[c], lanes) + load_n(&rows.bias[c], lanes);
        store_n(output + p * a.C + c, vrelu(y), lanes);
      });
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const Affine<A> m(a, task % a.C);
    for_lanes<A>(a.pixels, [&](int64_t i, auto lanes) {
      const int64_t at = task * a.pixels + i;
      store_n(output + at, vrelu((load_n(input + at, lanes) - m.mean) * m.factor + m.bias), lanes);
    });
  }
}

// The gradient with ReLU's mask: zero where the normalised value is not positive.
template <class A>
Vec<A> masked(Vec<A> g, Vec<A> centred, Vec<A> factor, Vec<A> bias) {
  return centred * factor + bias <= Vec<A>{} ? Vec<A>{} : g;
}

template <class T>
void backward_sums(const BatchNormArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const T* grad = static_cast<const T*>(a.grad);
  if (a.channels_last) {
    const AffineRows<A> rows(a);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * a.part, last = std::min(first + a.part, a.N * a.pixels);
      for_channels<A, 4>(a.C, [&](int64_t c, auto vectors, auto lanes) {
        constexpr int n = vectors;
        Vec<A> sum[n] = {}, product[n] = {}, mean[n], factor[n], bias[n];
        for (int v = 0; v < n; ++v) {
          const int64_t i = c + v * kLanes<A>;
          mean[v] = load_n(&rows.mean[i], lanes);
          factor[v] = load_n(&rows.factor[i], lanes), bias[v] = load_n(&rows.bias[i], lanes);
        }
        for (int64_t p = first; p < last; ++p) {
#pragma GCC unroll 4
          for (int v = 0; v < n; ++v) {
            const int64_t i = p * a.C + c + v * kLanes<A>;
            const Vec<A> d = load_n(input + i, lanes) - mean[v];
            const Vec<A> g = masked<A>(load_n(grad + i, lanes), d, factor[v], bias[v]);
            sum[v] += g;
            product[v] += g * d;
          }
        }
        for (int v = 0; v < n; ++v) {
          double* partial = a.partial + 2 * (task * a.C + c + v * kLanes<A>);
          for (int l = 0; l < lanes; ++l) {
            partial[2 * l] = double(sum[v][l]);
            partial[2 * l + 1] = double(product[v][l]);
          }
        }
      });
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const Affine<A> m(a, task % a.C);
    double* partial = a.partial + 2 * task;
    partial[0] = partial[1] = 0;
    for_chunks(a.pixels, [&](int64_t first, int64_t count) {
      const int64_t from = task * a.pixels + first;
      Vec<A> sum{}, product{};
      for_lanes<A>(count, [&](int64_t i, auto lanes) {
        const Vec<A> d = load_n(input + from + i, lanes) - m.mean;
        // Lanes past the end have a zero gradient.
        const Vec<A> g = masked<A>(load_n(grad + from + i, lanes), d, splat(m.factor), splat(m.bias));
        sum += g;
        product += g * d;
      });
      partial[0] += total<A>(sum), partial[1] += total<A>(product);
    });
  }
}

// dx = factor * (g - mean(g) - (x - mean) / (var + eps) * mean(g (x - mean))); inference: factor * g
template <class T>
void backward_input(const BatchNormArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const T* grad = static_cast<const T*>(a.grad);
  T* dx = static_cast<T*>(a.output);
  const double count = double(a.N * a.pixels);
  const AffineRows<A> rows(a);
  std::vector<A> mean_g(a.C), slope(a.C);
  for (int64_t c = 0; c < a.C && a.training; ++c) {
    mean_g[c] = A(a.sums[2 * c] / count);
    slope[c] = A(double(rows.inverse_std[c]) * double(rows.inverse_std[c]) * a.sums[2 * c + 1] / count);
  }
  auto gradient = [](Vec<A> x, Vec<A> g, Vec<A> mean, Vec<A> factor, Vec<A> bias, Vec<A> mean_g, Vec<A> slope) {
    const Vec<A> d = x - mean;
    return factor * (masked<A>(g, d, factor, bias) - mean_g - d * slope);
  };
  if (a.channels_last) {
    const int64_t last = std::min(end * a.part, a.N * a.pixels);
    for (int64_t p = begin * a.part; p < last; ++p) {
      for_lanes<A>(a.C, [&](int64_t c, auto lanes) {
        const int64_t at = p * a.C + c;
        store_n(dx + at,
                gradient(load_n(input + at, lanes), load_n(grad + at, lanes), load_n(&rows.mean[c], lanes),
                         load_n(&rows.factor[c], lanes), load_n(&rows.bias[c], lanes), load_n(&mean_g[c], lanes),
                         load_n(&slope[c], lanes)),
                lanes);
      });
    }
    return;
  }
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task % a.C;
    for_lanes<A>(a.pixels, [&](int64_t i, auto lanes) {
      const int64_t at = task * a.pixels + i;
      store_n(dx + at,
              gradient(load_n(input + at, lanes), load_n(grad + at, lanes), splat(rows.mean[c]), splat(rows.factor[c]),
                       splat(rows.bias[c]), splat(mean_g[c]), splat(slope[c])),
              lanes);
    });
  }
}

}  // namespace

void batch_norm_moments(const BatchNormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { moments<decltype(t)>(a, begin, end); });
}
void batch_norm_relu_forward(const BatchNormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { normalise<decltype(t)>(a, begin, end); });
}
void batch_norm_backward_sums(const BatchNormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { backward_sums<decltype(t)>(a, begin, end); });
}
void batch_norm_relu_backward_input(const BatchNormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { backward_input<decltype(t)>(a, begin, end); });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(batch_norm_moments, BatchNormArgs)
ALEXNET_DECLARE_KERNEL(batch_norm_relu_forward, BatchNormArgs)
ALEXNET_DECLARE_KERNEL(batch_norm_backward_sums, BatchNormArgs)
ALEXNET_DECLARE_KERNEL(batch_norm_relu_backward_input, BatchNormArgs)

namespace {

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// The values of all channels, float or double.
struct Channels {
  float* floats = nullptr;
  double* doubles = nullptr;
  explicit Channels(const Tensor& t) {
    void* data = t.mutable_data_ptr();
    t.scalar_type() == ScalarType::Double ? void(doubles = static_cast<double*>(data))
                                          : void(floats = static_cast<float*>(data));
  }
  double get(int64_t c) const { return doubles ? doubles[c] : double(floats[c]); }
  void put(int64_t c, double value) const { doubles ? void(doubles[c] = value) : void(floats[c] = float(value)); }
};
Tensor in_type(const Tensor& t, ScalarType type) {
  return in_format(t.scalar_type() == type ? t : torch::stable::to(t, type), MemoryFormat::Contiguous);
}
struct Parameter {
  std::optional<Tensor> tensor;
  Parameter(const std::optional<Tensor>& t, ScalarType type) {
    if (t) tensor = in_type(*t, type);
  }
  const void* data() const { return tensor ? tensor->const_data_ptr() : nullptr; }
};

BatchNormArgs arguments(const Tensor& x, MemoryFormat format, bool training, double eps) {
  BatchNormArgs a{};
  a.dtype = dtype_of(x);
  a.channels_last = format == MemoryFormat::ChannelsLast;
  a.training = training;
  a.N = x.size(0), a.C = x.size(1), a.pixels = x.size(2) * x.size(3);
  a.part =
      std::clamp<int64_t>(kBatchNormPartBytes / std::max<int64_t>(1, a.C * x.element_size()), 1, kBatchNormPartPixels);
  a.eps = eps;
  a.input = x.const_data_ptr();
  return a;
}
int64_t parts_of(const BatchNormArgs& a) {
  return a.channels_last ? (a.N * a.pixels + a.part - 1) / a.part : a.N * a.C;
}
// Calls body(partial, pixels) for the parts of one channel.
template <class Body>
void for_parts(const BatchNormArgs& a, int64_t c, const Body& body) {
  const int64_t parts = a.channels_last ? parts_of(a) : a.N;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t count = a.channels_last ? std::min(a.part, a.N * a.pixels - p * a.part) : a.pixels;
    if (count > 0) body(a.partial + 2 * (p * a.C + c), double(count));
  }
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& input, std::optional<Tensor> running_mean,
                                                   std::optional<Tensor> running_var, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, bool training, double eps) {
  const Operands given = operands("batch_norm_relu", "input", input);
  given.batch_norm(input, running_mean, running_var, weight, bias);
  if (!training) given.required("running_mean", running_mean), given.required("running_var", running_var);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const ScalarType type = statistics_type(x);
  BatchNormArgs a = arguments(x, format, training, eps);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  Tensor mean = empty({a.C}, type, x), var = empty({a.C}, type, x);
  if (training) {
    std::vector<double> partial(2 * (a.channels_last ? parts_of(a) * a.C : parts_of(a)));
    a.partial = partial.data();
    if (x.numel() > 0) run(pick_batch_norm_moments(), a, parts_of(a), x.numel() * 4);
    const Channels means(mean), variances(var);
    for (int64_t c = 0; c < a.C; ++c) {
      Moments all;
      for_parts(a, c, [&](const double* part, double count) { all.merge(count, part[0], part[1]); });
      means.put(c, all.mean);
      variances.put(c, all.count > 0 ? all.squares / all.count : 0);
    }
  } else {
    torch::stable::copy_(mean, *running_mean);
    torch::stable::copy_(var, *running_var);
  }
  const Parameter w(weight, type), b(bias, type);
  a.mean = mean.const_data_ptr(), a.var = var.const_data_ptr(), a.weight = w.data(), a.bias = b.data();
  a.output = output.mutable_data_ptr();
  if (x.numel() > 0) run(pick_batch_norm_relu_forward(), a, parts_of(a), x.numel() * 8);
  return {output, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                            const Tensor& var, std::optional<Tensor> weight,
                                                            std::optional<Tensor> bias, bool training, double eps) {
  const Operands given = operands("batch_norm_relu_backward", "grad", grad);
  given.batch_norm(input, mean, var, weight, bias);
  given.alike("grad", grad, input);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format), g = in_format(grad, format);
  const ScalarType type = statistics_type(x);
  const Tensor m = in_type(mean, type), v = in_type(var, type);
  BatchNormArgs a = arguments(x, format, training, eps);
  const Parameter w(weight, type), b(bias, type);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  Tensor grad_weight = empty({a.C}, type, x), grad_bias = empty({a.C}, type, x);
  std::vector<double> partial(2 * (a.channels_last ? parts_of(a) * a.C : parts_of(a))), sums(2 * a.C);
  a.partial = partial.data(), a.sums = sums.data();
  a.mean = m.const_data_ptr(), a.var = v.const_data_ptr(), a.weight = w.data(), a.bias = b.data();
  a.grad = g.const_data_ptr(), a.output = grad_input.mutable_data_ptr();
  if (x.numel() > 0) run(pick_batch_norm_backward_sums(), a, parts_of(a), x.numel() * 8);
  const Channels variances(v), weight_grads(grad_weight), bias_grads(grad_bias);
  for (int64_t c = 0; c < a.C; ++c) {
    for_parts(a, c, [&](const double* part, double) { sums[2 * c] += part[0], sums[2 * c + 1] += part[1]; });
    weight_grads.put(c, sums[2 * c + 1] / std::sqrt(variances.get(c) + eps));
    bias_grads.put(c, sums[2 * c]);
  }
  if (x.numel() > 0) run(pick_batch_norm_relu_backward_input(), a, parts_of(a), x.numel() * 12);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace alexnet_kernels::cpu
#endif
