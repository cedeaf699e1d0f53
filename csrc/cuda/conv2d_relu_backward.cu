// The gradients of relu(conv2d(input, weight) + bias), by the package's own kernels or by torch's convolution (cuDNN).
//   grad, output [N, K, OH, OW], input [N, C, H, W], weight [K, C / groups, R, S]
//   float, bfloat16 or float16
//
// The input's gradient is a convolution of the output's: with stride 1, kernels that are turned by half a circle and
// whose channels and filters change places, and padding R - 1 - padding. The kernels of forward compute it
// (conv2d_relu.cuh), and clear it where the input is not positive, if the input is a ReLU's output.
// conv2d_relu_backward.cuh has the kernels of the weight's gradient.
#include <string>

#include "common/convolution_backward.h"
#include "conv2d_relu.cuh"
#include "conv2d_relu_backward.cuh"
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

constexpr int kTurned = 32;  // filters and channels of a tile of `turn_filters`

// turned[c, R - 1 - r, S - 1 - s, k] = w[k, c, r, s] in each group, w by strides. A block turns a tile of one tap.
template <class T>
__global__ void __launch_bounds__(kThreads)
    turn_filters(int C, int K, int S, int taps, int c_tiles, int k_tiles, int64_t filter_stride, int64_t channel_stride,
                 int64_t row_stride, int64_t column_stride, const T* w, T* turned) {
  constexpr int kPitch = kTurned + 1, kLines = kThreads / kTurned;
  T* const tile = reinterpret_cast<T*>(dynamic_shared());
  int rest = int(blockIdx.x);
  const int first_c = rest % c_tiles * kTurned;
  rest /= c_tiles;
  const int first_k = rest % k_tiles * kTurned;
  rest /= k_tiles;
  const int tap = rest % taps, group = rest / taps;
  const int along = int(threadIdx.x) % kTurned, line = int(threadIdx.x) / kTurned;
  const T* const from = w + tap / S * row_stride + tap % S * column_stride;
#pragma unroll
  for (int i = line; i < kTurned; i += kLines) {
    const int k = first_k + i, c = first_c + along;
    if (k < K && c < C) tile[i * kPitch + along] = from[(int64_t(group) * K + k) * filter_stride + c * channel_stride];
  }
  __syncthreads();
#pragma unroll
  for (int i = line; i < kTurned; i += kLines) {
    const int c = first_c + i, k = first_k + along;
    if (k < K && c < C) {
      turned[((int64_t(group) * C + c) * taps + taps - 1 - tap) * K + k] = tile[along * kPitch + i];
    }
  }
}

constexpr int kSumLines = kThreads / kWarp;

// A warp adds every kSumLines-th split, in ascending order, for 32 vectors of elements; then the first warp adds the
// sums of the others. So many splits of few elements do not wait for memory one after the other.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) sum_splits(int splits, int64_t elements, const float* partials, T* out) {
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  const int line = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t at = (int64_t(blockIdx.x) * kWarp + lane) * kVec;
  float sum[kVec] = {};
  if (at < elements) {
#pragma unroll 4
    for (int split = line; split < splits; split += kSumLines) {
      float part[kVec];
      load<kVec>(partials + split * elements + at, part);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += part[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) sums[(line * kVec + i) * kWarp + lane] = sum[i];
  __syncthreads();
  if (line > 0 || at >= elements) return;
  for (int other = 1; other < min(splits, kSumLines); ++other) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum[i] += sums[(other * kVec + i) * kWarp + lane];
  }
  store<kVec>(out + at, sum);
}

Tensor masked(const Tensor& grad, const Tensor& output) {
  return relu_dropout_backward(grad, output, 1);
}

// Why the package's kernels don't take the gradients of a convolution; null if they do, stride and padding apart.
const char* why_not_own(const ConvolutionGradient& c) {
  const Tensor &x = c.input, &g = c.grad, &w = c.weight;
  if (memory_format_of(x) != MemoryFormat::ChannelsLast) return "the input is not in channels_last";
  if (x.scalar_type() == ScalarType::Double) return "it takes float32, bfloat16 and float16";
  if (c.is_empty()) return "a tensor is empty";
  for (const int d : {0, 1}) {
    // Products of a stride and a pixel beyond the output fit an int.
    constexpr int64_t kMost = 1 << 23;
    if (x.size(2 + d) + 2 * c.padding[d] > kMost || c.stride[d] > kMost) {
      return "an extent of the padded image, or a stride, exceeds 2^23";
    }
  }
  constexpr int64_t kMostElements = int64_t(1) << 31;
  if (x.numel() >= kMostElements || g.numel() >= kMostElements || w.numel() >= kMostElements) {
    return "a tensor has 2^31 elements or more";
  }
  return compute_capability() < 80 ? "the device's compute capability is below 8.0" : nullptr;
}

const char* why_not_input(const ConvolutionGradient& c) {
  if (c.stride[0] != 1 || c.stride[1] != 1) return "it takes stride 1";
  if (c.padding[0] >= c.weight.size(2) || c.padding[1] >= c.weight.size(3)) return "the padding covers a whole kernel";
  return why_not_own(c);
}

const char* why_not_weight(const ConvolutionGradient& c) {
  if (c.input.scalar_type() == ScalarType::Float) return "it takes bfloat16 and float16";
  return why_not_own(c);
}

// The weight for the input's gradient.
Tensor turned(const ConvolutionGradient& c, const OnDevice& device) {
  const Tensor& w = c.weight;
  const int64_t K = w.size(0) / c.groups, C = w.size(1), taps = w.size(2) * w.size(3);
  Tensor result = empty({c.groups * C, K, w.size(2), w.size(3)}, w.scalar_type(), w, MemoryFormat::ChannelsLast);
  const int64_t c_tiles = divide_up(C, kTurned), k_tiles = divide_up(K, kTurned);
  for_dtype(w, [&](auto t) {
    using T = decltype(t);
    device.launch_with_shared(turn_filters<T>, c_tiles * k_tiles * taps * c.groups, kThreads,
                              int(sizeof(T)) * kTurned * (kTurned + 1), int(C), int(K), int(w.size(3)), int(taps),
                              int(c_tiles), int(k_tiles), w.stride(0), w.stride(1), w.stride(2), w.stride(3),
                              data<T>(w), mutable_data<T>(result));
  });
  return result;
}

void refuse(const char* gradient, int64_t algorithm, const std::string& reason) {
  STD_TORCH_CHECK(algorithm == kOwn, "conv2d_relu: the ", algorithm == kWgmma ? "wgmma" : "mma.sync",
                  " kernel does not take the gradient of this convolution's ", gradient, ": ", reason);
}

// The gradient by the package's own kernels; nothing where algorithm kOwn leaves it to torch.
std::optional<Tensor> own_input_gradient(const ConvolutionGradient& c, bool mask_input, int64_t algorithm) {
  if (const char* reason = why_not_input(c); reason != nullptr) {
    refuse("input", algorithm, reason);
    return std::nullopt;
  }
  const MemoryFormat format = MemoryFormat::ChannelsLast;
  const OnDevice device(c.input);
  const Tensor x = in_format(c.input, format), grad = c.output ? masked(c.grad, *c.output) : c.grad;
  const Convolution convolution = {
      .x = in_format(grad, format),
      .w = turned(c, device),
      .y = empty(sizes_of(x), x.scalar_type(), x, format),
      .bias = std::nullopt,
      .mask = mask_input ? std::optional<Tensor>(x) : std::nullopt,
      .N = int(x.size(0)),
      .H = int(grad.size(2)),
      .W = int(grad.size(3)),
      .C = int(c.weight.size(0) / c.groups),
      .groups = int(c.groups),
      .K = int(c.weight.size(1)),
      .R = int(c.weight.size(2)),
      .S = int(c.weight.size(3)),
      .OH = int(x.size(2)),
      .OW = int(x.size(3)),
      .stride = {1, 1},
      .padding = {int(c.weight.size(2) - 1 - c.padding[0]), int(c.weight.size(3) - 1 - c.padding[1])},
      .relu = false,
  };
  if (algorithm != kMma) {
    std::string reason = why_no_wgmma();
#ifdef ALEXNET_SM90A
    if (reason.empty()) {
      if (const char* why = convolve_wgmma(convolution, device); why != nullptr) reason = why;
    }
#endif
    if (reason.empty()) return convolution.y;
    refuse("input", algorithm, reason);
  }
  convolve_mma(convolution, device);
  return convolution.y;
}

std::optional<std::tuple<Tensor, Tensor>> own_weight_gradient(const ConvolutionGradient& c, int64_t algorithm) {
  if (const char* reason = why_not_weight(c); reason != nullptr) {
    refuse("weight", algorithm, reason);
    return std::nullopt;
  }
  const MemoryFormat format = MemoryFormat::ChannelsLast;
  const OnDevice device(c.input);
  const Tensor& w = c.weight;
  const Tensor grad = c.output ? masked(c.grad, *c.output) : c.grad;
  const WeightGradient gradient = {
      .x = in_format(c.input, format),
      .g = in_format(grad, format),
      .dw = empty(sizes_of(w), w.scalar_type(), w, format),
      .db = empty({w.size(0)}, w.scalar_type(), w),
      .N = int(grad.size(0)),
      .H = int(c.input.size(2)),
      .W = int(c.input.size(3)),
      .C = int(w.size(1)),
      .groups = int(c.groups),
      .K = int(w.size(0) / c.groups),
      .R = int(w.size(2)),
      .S = int(w.size(3)),
      .OH = int(grad.size(2)),
      .OW = int(grad.size(3)),
      .stride = {int(c.stride[0]), int(c.stride[1])},
      .padding = {int(c.padding[0]), int(c.padding[1])},
  };
  const auto result = [&] { return std::tuple(in_format(gradient.dw, memory_format_of(w)), *gradient.db); };
  if (algorithm != kMma) {
    std::string reason = why_no_wgmma();
#ifdef ALEXNET_SM90A
    if (reason.empty()) {
      if (const char* why = weight_gradient_wgmma(gradient, device); why != nullptr) reason = why;
    }
#endif
    if (reason.empty()) return result();
    refuse("weight", algorithm, reason);
  }
  weight_gradient_mma(gradient, device);
  return result();
}

Tensor conv2d_relu_backward_input(const Tensor& grad, std::optional<Tensor> output, const Tensor& input,
                                  const Tensor& weight, IntList stride, IntList padding, int64_t groups,
                                  bool mask_input, int64_t algorithm) {
  const Operands given = operands("conv2d_relu_backward_input", "grad", grad);
  given.convolution_gradient(grad, output, input, weight, stride, padding, groups);
  given.number("algorithm", algorithm, kLibrary, kWgmma);
  const ConvolutionGradient c = {grad, output, input, weight, stride, padding, groups};
  if (algorithm != kLibrary) {
    if (std::optional<Tensor> result = own_input_gradient(c, mask_input, algorithm)) return *result;
  }
  return library_input_gradient(c, mask_input, masked);
}

std::tuple<Tensor, Tensor> conv2d_relu_backward_weight(const Tensor& grad, std::optional<Tensor> output,
                                                       const Tensor& input, const Tensor& weight, IntList stride,
                                                       IntList padding, int64_t groups, int64_t algorithm) {
  const Operands given = operands("conv2d_relu_backward_weight", "grad", grad);
  given.convolution_gradient(grad, output, input, weight, stride, padding, groups);
  given.number("algorithm", algorithm, kLibrary, kWgmma);
  const ConvolutionGradient c = {grad, output, input, weight, stride, padding, groups};
  if (algorithm != kLibrary) {
    if (auto result = own_weight_gradient(c, algorithm)) return *result;
  }
  return library_weight_gradient(c, masked);
}

}  // namespace

void add_splits(const OnDevice& device, const float* partials, int splits, int64_t elements, Tensor& out) {
  for_dtype(out, [&](auto t) {
    using T = decltype(t);
    T* const to = mutable_data<T>(out);
    for_vector<T>(elements % kVector<T> == 0 && aligned(partials, to) ? kVector<T> : 1, [&](auto vector) {
      device.launch_with_shared(sum_splits<T, vector>, divide_up(elements, int64_t(vector) * kWarp), kThreads,
                                int(sizeof(float)) * vector * kThreads, splits, elements, partials, to);
    });
  });
}

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("conv2d_relu_backward_input", TORCH_BOX(&conv2d_relu_backward_input));
  m.impl("conv2d_relu_backward_weight", TORCH_BOX(&conv2d_relu_backward_weight));
}

}  // namespace alexnet_kernels::cuda
