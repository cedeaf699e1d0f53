// relu(conv2d(input, weight) + bias): torch's convolution (cuDNN), then bias and ReLU in one pass over its output, in
// place; where it is faster, cuDNN's kernel of all three.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
//   float, bfloat16 or float16
// A thread updates 16 bytes of elements.
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

// y = relu(y + bias); bias may be null. In channels_last a vector holds consecutive channels, and `period` is the
// vectors of a pixel. In NCHW it holds pixels of one plane, or of that and the next, and `period` is the vectors of an
// image.
template <class T, int kVec, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    bias_relu(int64_t vectors, LongDivisor period, Divisor pixels, bool with_relu, const T* bias, T* y) {
  const int64_t vector = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= vectors) return;
  float v[kVec], b[kVec] = {};
  load<kVec>(y + vector * kVec, v);
  if (bias != nullptr) {
    const int at = int(vector - period.quotient(vector) * period.value()) * kVec;
    if constexpr (kChannelsLast) {
      load<kVec>(bias + at, b);
    } else {
      const int plane = pixels.quotient(at), left = (plane + 1) * pixels.value() - at;
      const float here = float(bias[plane]), next = left < kVec ? float(bias[plane + 1]) : 0.f;
#pragma unroll
      for (int i = 0; i < kVec; ++i) b[i] = i < left ? here : next;
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = with_relu ? relu(v[i] + b[i]) : v[i] + b[i];
  store<kVec>(y + vector * kVec, v);
}

// Whether cuDNN's kernel with bias and ReLU takes the convolution, and is faster. An H100, bfloat16, batch 128
// (benchmarks/results/h100/report.md): conv3 68.8 us against 77.2. With two groups it is slower, conv4 366.8 us against
// 121.9 and conv5 975.6 against 69.0. It checks no shapes: those that do not fit go to conv2d, which raises.
bool fuses(const Tensor& x, const Tensor& weight, const IntList& stride, const IntList& padding, int64_t groups,
           MemoryFormat format) {
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (!half || weight.scalar_type() != type || groups != 1 || format != MemoryFormat::ChannelsLast ||
      weight.size(1) != x.size(1)) {
    return false;
  }
  double outputs = double(x.size(0)) * double(weight.size(0));
  for (const int d : {0, 1}) {
    const int64_t span = x.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
    if (span < 0) return false;
    outputs *= double(span / stride[d] + 1);
  }
  const double most = double(int64_t(1) << 31);  // torch splits larger batches for its convolution only
  return x.numel() > 0 && weight.numel() > 0 && double(x.numel()) < most && outputs < most &&
         call_torch<bool>("aten::cudnn_is_acceptable", stack_of(x));
}

Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool with_relu) {
  const Operands given = operands("conv2d_relu", "input", input);
  given.images("input", input);
  given.convolution(weight, bias, stride, padding);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  if (with_relu && fuses(x, weight, stride, padding, groups, format)) {
    if (bias) given.tensor("bias", *bias, x.scalar_type());
    return in_format(call_torch("aten::cudnn_convolution_relu",
                                stack_of(x, weight, contiguous(bias), stride, padding, IntList{1, 1}, groups)),
                     format);
  }
  const std::optional<Tensor> none;
  Tensor y =
      in_format(call_torch("aten::conv2d", stack_of(x, weight, none, stride, padding, IntList{1, 1}, groups)), format);
  if (y.numel() == 0 || (!bias && !with_relu)) return y;
  if (bias) given.tensor("bias", *bias, y.scalar_type());
  const OnDevice device(y);
  const std::optional<Tensor> b = contiguous(bias);
  const int64_t pixels = y.size(2) * y.size(3), per_image = y.size(1) * pixels;
  STD_TORCH_CHECK(per_image < (int64_t(1) << 31), "conv2d_relu: images of 2^31 elements or more");
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  for_dtype(y, [&](auto t) {
    using T = decltype(t);
    const T* values = b ? data<T>(*b) : nullptr;
    const bool fits = channels_last ? y.size(1) % kVector<T> == 0 && aligned(values)
                                    : per_image % kVector<T> == 0 && pixels >= kVector<T>;
    for_vector<T>(fits && aligned(data<T>(y)) ? kVector<T> : 1, [&](auto vector) {
      for_bool(channels_last, [&](auto last) {
        const int64_t vectors = y.numel() / vector;
        device.launch(bias_relu<T, vector, last>, divide_up(vectors, kThreads), kThreads, vectors,
                      LongDivisor((last ? y.size(1) : per_image) / vector), Divisor(pixels), with_relu, values,
                      mutable_data<T>(y));
      });
    });
  });
  return y;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
}

}  // namespace alexnet_kernels::cuda
