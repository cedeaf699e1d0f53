// relu(conv2d(input, weight) + bias), by the package's own kernels (conv2d_relu.cuh) or by torch's convolution (cuDNN).
// After the latter, bias and ReLU take one pass over its output, in place; where it is faster, cuDNN's kernel computes
// all three.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
//   float, bfloat16 or float16
// A thread of the pass updates 16 bytes of elements.
#include "conv2d_relu.cuh"
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

// A convolution as its arguments give it.
struct Call {
  const Tensor &x, &weight;
  const std::optional<Tensor>& bias;
  const IntList &stride, &padding;
  int64_t groups;
  bool relu;
  MemoryFormat format;  // of x, and of the result

  // Of the output, in dimension d = 0, 1 of the image; 0 if the kernel is larger than the padded image.
  int64_t extent(int d) const {
    const int64_t span = x.size(2 + d) + 2 * padding[d] - weight.size(2 + d);
    return span < 0 ? 0 : span / stride[d] + 1;
  }
  // Elements of the output, which may be too many for an integer.
  double outputs() const { return double(x.size(0)) * double(weight.size(0)) * double(extent(0)) * double(extent(1)); }
  bool is_empty() const { return x.numel() == 0 || weight.numel() == 0 || outputs() == 0; }
};

constexpr double kMostElements = double(int64_t(1) << 31);

// Whether cuDNN's kernel with bias and ReLU takes the convolution, and is faster. An H100, bfloat16, batch 128
// (benchmarks/results/h100/report.md): conv3 68.8 us against 77.2. With two groups it is slower, conv4 366.8 us against
// 121.9 and conv5 975.6 against 69.0. It checks no shapes: those that do not fit go to conv2d, which raises.
bool fuses(const Call& call) {
  const Tensor &x = call.x, &weight = call.weight;
  const ScalarType type = x.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  if (!half || weight.scalar_type() != type || call.groups != 1 || call.format != MemoryFormat::ChannelsLast ||
      weight.size(1) != x.size(1)) {
    return false;
  }
  // torch splits larger batches for its convolution only.
  return !call.is_empty() && double(x.numel()) < kMostElements && call.outputs() < kMostElements &&
         call_torch<bool>("aten::cudnn_is_acceptable", stack_of(x));
}

// Why the package's kernels don't take the convolution; null if they do. Arguments that torch's convolution refuses are
// among the reasons: it has the error.
const char* why_not_own(const Call& call) {
  const Tensor &x = call.x, &weight = call.weight;
  if (call.format != MemoryFormat::ChannelsLast) return "the input is not in channels_last";
  if (x.scalar_type() == ScalarType::Double) return "it takes float32, bfloat16 and float16";
  if (weight.scalar_type() != x.scalar_type()) return "input and weight have different dtypes";
  const int64_t groups = call.groups;
  if (groups < 1 || weight.size(0) % groups != 0 || x.size(1) % groups != 0 || x.size(1) / groups != weight.size(1)) {
    return "the channels of input and weight do not fit the groups";
  }
  for (const int d : {0, 1}) {
    if (weight.size(2 + d) > 0 && call.extent(d) < 1) return "the kernel is larger than the padded image";
    // The kernels' products of a stride and a pixel beyond the output fit an int.
    constexpr int64_t kMost = 1 << 23;
    if (x.size(2 + d) + 2 * call.padding[d] > kMost || call.stride[d] > kMost) {
      return "an extent of the padded image, or a stride, exceeds 2^23";
    }
  }
  if (call.is_empty()) return "a tensor is empty";
  if (double(x.numel()) >= kMostElements || double(weight.numel()) >= kMostElements ||
      call.outputs() >= kMostElements) {
    return "a tensor has 2^31 elements or more";
  }
  return compute_capability() < 80 ? "the device's compute capability is below 8.0" : nullptr;
}

// Empty once wgmma's kernel is launched, else why it does not take a convolution that the package's kernels take.
std::string try_wgmma(const Convolution& convolution, [[maybe_unused]] const OnDevice& device) {
  std::string reason = why_no_wgmma();
#ifdef ALEXNET_SM90A
  if (reason.empty()) {
    if (const char* why = convolve_wgmma(convolution, device); why != nullptr) reason = why;
  }
#endif
  return reason;
}

// The result of the package's own kernels; nothing where algorithm kOwn leaves the convolution to torch.
std::optional<Tensor> convolve(const Operands& given, const Call& call, int64_t algorithm) {
  const Tensor& x = call.x;
  const OnDevice device(x);
  const char* const name = algorithm == kWgmma ? "wgmma" : "mma.sync";
  if (const char* reason = why_not_own(call); reason != nullptr) {
    STD_TORCH_CHECK(algorithm == kOwn, "conv2d_relu: the ", name, " kernel does not take this convolution: ", reason);
    return std::nullopt;
  }
  if (call.bias) given.tensor("bias", *call.bias, x.scalar_type());
  const Tensor weight = in_format(call.weight, MemoryFormat::ChannelsLast);
  const int64_t N = x.size(0), K = weight.size(0), OH = call.extent(0), OW = call.extent(1), groups = call.groups;
  const Convolution c = {
      .x = x,
      .w = weight,
      .y = empty({N, K, OH, OW}, x.scalar_type(), x, MemoryFormat::ChannelsLast),
      .bias = contiguous(call.bias),
      .mask = std::nullopt,
      .N = int(N),
      .H = int(x.size(2)),
      .W = int(x.size(3)),
      .C = int(weight.size(1)),
      .groups = int(groups),
      .K = int(K / groups),
      .R = int(weight.size(2)),
      .S = int(weight.size(3)),
      .OH = int(OH),
      .OW = int(OW),
      .stride = {int(call.stride[0]), int(call.stride[1])},
      .padding = {int(call.padding[0]), int(call.padding[1])},
      .relu = call.relu,
  };
  if (algorithm != kMma) {
    const std::string reason = try_wgmma(c, device);
    if (reason.empty()) return c.y;
    STD_TORCH_CHECK(algorithm == kOwn, "conv2d_relu: the ", name, " kernel does not take this convolution: ", reason);
  }
  convolve_mma(c, device);
  return c.y;
}

// The arguments after `algorithm` are for autograd's formula (alexnet_kernels/ops/conv2d_relu.py).
Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool with_relu, int64_t algorithm, int64_t, int64_t, bool, bool) {
  const Operands given = operands("conv2d_relu", "input", input);
  given.images("input", input);
  given.convolution(weight, bias, stride, padding);
  given.number("algorithm", algorithm, kLibrary, kWgmma);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const Call call = {x, weight, bias, stride, padding, groups, with_relu, format};
  if (algorithm != kLibrary) {
    if (std::optional<Tensor> y = convolve(given, call, algorithm)) return *y;
  }
  // cuDNN's kernel with ReLU may give other bits in another run; the package's kernels, which kOwn asks for, do not.
  if (algorithm == kLibrary && with_relu && fuses(call)) {
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
