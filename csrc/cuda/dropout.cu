// Dropout whose mask is a function of a seed and each element's index in row-major order; dropout.cuh has the rule.
//   input, output: any shape, of one memory format without gaps; float, bfloat16 or float16; seed int64, one element
// A thread holds 16 bytes of elements. In channels_last, the channels of a vector have indices in different quads: each
// takes a Philox call of its own.
#include "dropout.cuh"

namespace alexnet_kernels::cuda {
namespace {

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    dropout_images(Dropout d, Rows rows, ImageLayout images, const int64_t* seed, const T* x, T* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= images.vectors()) return;
  const Coordinates at = images.locate(first, threadIdx.x);
  float v[kVec];
  load<kVec>(x + vector * kVec, v);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int64_t plane = at.n * images.C + at.c + i;
    v[i] = drop(d, uint64_t(*seed), rows.index((plane * images.H + at.y) * images.W + at.x), v[i]);
  }
  store<kVec>(y + vector * kVec, v);
}

Tensor dropout(const Tensor& input, double p, double scale, const Tensor& seed, int64_t offset, int64_t row,
               int64_t row_stride, int64_t base) {
  operands("dropout", "input", input).dropout(p, seed, input.numel(), row);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return output;
  const OnDevice device(x);
  const Dropout d(p, scale, offset);
  const Rows rows{row, row_stride, base};
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    if (format == MemoryFormat::Contiguous) {
      run_dropout(device, d, rows, false, x.numel(), data<int64_t>(seed), data<T>(x), mutable_data<T>(output));
      return;
    }
    for_vector<T>(vector_of<T>(format, x.size(1), data<T>(x)), [&](auto vector) {
      const ImageLayout images(sizes_of(x), format, vector);
      device.launch(dropout_images<T, vector>, divide_up(images.vectors(), kThreads), kThreads, d, rows, images,
                    data<int64_t>(seed), data<T>(x), mutable_data<T>(output));
    });
  });
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("dropout", TORCH_BOX(&dropout));
}

}  // namespace alexnet_kernels::cuda
