// space_to_depth moves blocks of pixels into channels, with zero padding and a cast; depth_to_space is its inverse. A
// convolution of few channels with stride `block` becomes one of block^2 times as many channels with stride 1.
//   space [N, C, H, W], depth [N, block^2 C, OH, OW] in channels_last: channel (dy block + dx) C + c of pixel (Y, X) is
//   space[c, Y block + dy - pad_h, X block + dx - pad_w], or 0 outside the image; float, bfloat16 or float16
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

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

// A thread computes kVec channels of one pixel of depth: kVec loads of one element, one store of up to 16 bytes.
template <class From, class To, int kVec>
__global__ void __launch_bounds__(kThreads) to_depth(ImageLayout in, ImageLayout out, Blocks b, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= out.vectors()) return;
  const Coordinates at = out.locate(first, threadIdx.x);
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

// A thread computes one channel of one pixel of space. Pixels beyond the last block are zero.
template <class From, class To>
__global__ void __launch_bounds__(kThreads) to_space(ImageLayout in, ImageLayout out, Blocks b, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
  if (i >= out.vectors()) return;
  const Coordinates at = out.locate(first, threadIdx.x);
  const int row = b.by_block.quotient(at.y + b.pad_h), dy = at.y + b.pad_h - row * b.block;
  const int column = b.by_block.quotient(at.x + b.pad_w), dx = at.x + b.pad_w - column * b.block;
  const bool inside = row < in.H && column < in.W;
  y[i] = To(inside ? float(x[in.offset(at.n, (dy * b.block + dx) * b.C + at.c, row, column)]) : 0.f);
}

Tensor space_to_depth(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("space_to_depth", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size);
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
        const ImageLayout in(sizes_of(x), format, 1), out(to, MemoryFormat::ChannelsLast, vector);
        device.launch(to_depth<decltype(from), T, vector>, divide_up(out.vectors(), kThreads), kThreads, in, out,
                      Blocks(sizes_of(x), block, padding), data<decltype(from)>(x), mutable_data<T>(output));
      });
    });
  });
  return output;
}

Tensor depth_to_space(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("depth_to_space", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size, input.size(1));
  const Tensor x = in_format(input, MemoryFormat::ChannelsLast);
  const IntList to{x.size(0), x.size(1) / (block * block), size[0], size[1]};
  Tensor output = empty(to, dtype, x, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const OnDevice device(x);
  for_dtype(x, [&](auto from) {
    for_dtype(output, [&](auto t) {
      using T = decltype(t);
      const ImageLayout in(sizes_of(x), MemoryFormat::ChannelsLast, 1), out(to, MemoryFormat::ChannelsLast, 1);
      device.launch(to_space<decltype(from), T>, divide_up(out.vectors(), kThreads), kThreads, in, out,
                    Blocks(to, block, padding), data<decltype(from)>(x), mutable_data<T>(output));
    });
  });
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
}

}  // namespace alexnet_kernels::cuda
