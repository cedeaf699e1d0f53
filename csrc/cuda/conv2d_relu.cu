// relu(conv2d(input, weight) + bias): torch's convolution (cuDNN), then bias and ReLU in one pass over its output, in
// place. And the rearrangement of a convolution of few channels as one of many with stride 1.
//   input [N, C, H, W], weight [K, C / groups, R, S], bias [K], output [N, K, OH, OW] in the input's memory format
//   float, bfloat16 or float16
// A thread holds 16 bytes of elements.
#include "images.cuh"

namespace alexnet_kernels {
namespace {

// y = max(0, y + bias) of images [N, C, H, W]; bias may be null. kRuns: a vector is one of channels.
template <class T, int kVec, bool kRuns>
__global__ void __launch_bounds__(kThreads)
    bias_relu(int64_t vectors, int64_t vectors_per_image, Divisor channels, Divisor pixels, bool channels_last,
              bool with_relu, const T* bias, T* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= vectors) return;
  const int at = int(first % vectors_per_image + threadIdx.x) * kVec;  // may run into the next image
  float v[kVec], b[kVec] = {};
  load<kVec>(y + vector * kVec, v);
  if (bias != nullptr) {
    if constexpr (kRuns) {
      load<kVec>(bias + channels.remainder(at), b);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        b[i] = float(bias[channels.remainder(channels_last ? at + i : pixels.quotient(at + i))]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = with_relu ? relu(v[i] + b[i]) : v[i] + b[i];
  store<kVec>(y + vector * kVec, v);
}

Tensor conv2d_relu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias, IntList stride,
                   IntList padding, int64_t groups, bool with_relu) {
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const std::optional<Tensor> none;
  Tensor y =
      in_format(call_torch("aten::conv2d", stack_of(x, weight, none, stride, padding, IntList{1, 1}, groups)), format);
  if (y.numel() == 0 || (!bias && !with_relu)) return y;
  const OnDevice device(y);
  const std::optional<Tensor> b =
      bias ? std::optional<Tensor>(in_format(*bias, MemoryFormat::Contiguous)) : std::nullopt;
  const int64_t pixels = y.size(2) * y.size(3), per_image = y.size(1) * pixels;
  STD_TORCH_CHECK(per_image < (int64_t(1) << 31) - 16 * kThreads, "conv2d_relu: images of 2^31 elements or more");
  const bool channels_last = format == MemoryFormat::ChannelsLast;
  for_dtype(y, [&](auto t) {
    using T = decltype(t);
    const T* values = b ? data<T>(*b) : nullptr;
    for_vector<T>(per_image % kVector<T> == 0 && aligned(data<T>(y), values) ? kVector<T> : 1, [&](auto vector) {
      for_bool(channels_last && y.size(1) % vector == 0, [&](auto runs) {
        const int64_t vectors = y.numel() / vector;
        device.launch(bias_relu<T, vector, runs>, divide_up(vectors, kThreads), kThreads, vectors, per_image / vector,
                      Divisor(y.size(1)), Divisor(pixels), channels_last, with_relu, values, mutable_data<T>(y));
      });
    });
  });
  return y;
}

// Blocks of block x block pixels as channels (dy block + dx) C + c, in channels_last.
struct Blocks {
  Blocks(const IntList& image, int64_t block, const IntList& padding)
      : C(int(image[1])),
        H(int(image[2])),
        W(int(image[3])),
        block(int(block)),
        pad_h(int(padding[0])),
        pad_w(int(padding[1])),
        by_channels(image[1]),
        by_block(block) {}

  int C, H, W, block, pad_h, pad_w;
  Divisor by_channels, by_block;
};

// A thread: kVec channels of one pixel of `out`. What lies outside the image is zero.
template <class From, class To, int kVec>
__global__ void __launch_bounds__(kThreads) to_depth(Images in, Images out, Blocks b, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= out.vectors()) return;
  const Place at = out.locate(first, threadIdx.x);
  float v[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int pixel = b.by_channels.quotient(at.c + i), c = at.c + i - pixel * b.C;
    const int dy = b.by_block.quotient(pixel), dx = pixel - dy * b.block;
    const int row = at.y * b.block + dy - b.pad_h, column = at.x * b.block + dx - b.pad_w;
    const bool inside = unsigned(row) < unsigned(b.H) && unsigned(column) < unsigned(b.W);
    v[i] = inside ? float(x[in.offset(at.n, c, row, column)]) : 0.f;
  }
  store<kVec>(y + vector * kVec, v);
}

// A thread: one channel of one pixel of `out`. Rows and columns that no block holds are zero.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) to_space(Images in, Images out, Blocks b, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
  if (i >= out.vectors()) return;
  const Place at = out.locate(first, threadIdx.x);
  const int row = b.by_block.quotient(at.y + b.pad_h), dy = at.y + b.pad_h - row * b.block;
  const int column = b.by_block.quotient(at.x + b.pad_w), dx = at.x + b.pad_w - column * b.block;
  const bool inside = row < in.H && column < in.W;
  y[i] = To(inside ? float(x[in.offset(at.n, (dy * b.block + dx) * b.C + at.c, row, column)]) : 0.f);
}

Tensor space_to_depth(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const IntList to{x.size(0), block * block * x.size(1), size[0], size[1]};
  Tensor output = empty(to, dtype, x, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const OnDevice device(x);
  for_dtype(x, [&](auto from) {
    for_dtype(output, [&](auto t) {
      using T = decltype(t);
      for_vector<T>(vector_of<T>(MemoryFormat::ChannelsLast, to[1]), [&](auto vector) {
        const Images in(sizes_of(x), format, 1), out(to, MemoryFormat::ChannelsLast, vector);
        device.launch(to_depth<decltype(from), T, vector>, divide_up(out.vectors(), kThreads), kThreads, in, out,
                      Blocks(sizes_of(x), block, padding), data<decltype(from)>(x), mutable_data<T>(output));
      });
    });
  });
  return output;
}

Tensor depth_to_space(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Tensor x = in_format(input, MemoryFormat::ChannelsLast);
  const IntList to{x.size(0), x.size(1) / (block * block), size[0], size[1]};
  Tensor output = empty(to, dtype, x, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const OnDevice device(x);
  for_dtype(x, [&](auto from) {
    for_dtype(output, [&](auto t) {
      using T = decltype(t);
      const Images in(sizes_of(x), MemoryFormat::ChannelsLast, 1), out(to, MemoryFormat::ChannelsLast, 1);
      device.launch(to_space<decltype(from), T>, divide_up(out.vectors(), kThreads), kThreads, in, out,
                    Blocks(to, block, padding), data<decltype(from)>(x), mutable_data<T>(output));
    });
  });
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
}

}  // namespace alexnet_kernels
