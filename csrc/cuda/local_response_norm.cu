// Local response normalisation across channels, forward and backward; lrn.cuh has the formula and the tiling.
//   input, grad, output, grad_input [N, C, H, W] in one memory format; float, bfloat16 or float16; computed in float
#include "lrn.cuh"

namespace alexnet_kernels::cuda {
namespace {

// A lane holds one of `vectors` vectors; `tower`: vectors of a tower at one pixel. One 16-byte load and store a vector.
template <class T>
__global__ void __launch_bounds__(kThreads) lrn_forward(Lrn lrn, int64_t vectors, Divisor tower, const T* x, T* y) {
  constexpr int kVec = kVector<T>;
  const Lane lane;
  const int64_t at = lane.vector() * kVec;
  float own[kVec] = {}, t[kVec];
  if (lane.valid(vectors)) load<kVec>(x + at, own);
  const int in_tower = lane.remainder(tower);
  bases<kVec>(lrn, own, in_tower == 0, in_tower == tower.value() - 1, t);
#pragma unroll
  for (int i = 0; i < kVec; ++i) own[i] *= lrn.gain * fast_powers(t[i]).minus_beta;
  if (lane.stores(vectors)) store<kVec>(y + at, own);
}

// Two 16-byte loads and one store a vector: s is computed again.
template <class T>
__global__ void __launch_bounds__(kThreads)
    lrn_backward_fast(Lrn lrn, int64_t vectors, Divisor tower, const T* g, const T* x, T* dx) {
  constexpr int kVec = kVector<T>;
  const Lane lane;
  const int64_t at = lane.vector() * kVec;
  float own[kVec] = {}, grad[kVec] = {}, d[kVec];
  if (lane.valid(vectors)) {
    load<kVec>(x + at, own);
    load<kVec>(g + at, grad);
  }
  const int in_tower = lane.remainder(tower);
  lrn_backward<kVec>(lrn, own, grad, in_tower == 0, in_tower == tower.value() - 1, d);
  if (lane.stores(vectors)) store<kVec>(dx + at, d);
}

template <class T>
__global__ void __launch_bounds__(kThreads) lrn_forward_any(ImageLayout images, Lrn lrn, const T* x, T* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
  if (i >= images.vectors()) return;
  const Coordinates at = images.locate(first, threadIdx.x);
  const float s = base_at<false>(lrn, x + i, at.c, images.channel_stride);
  y[i] = T(float(x[i]) * powers(s, lrn.beta).minus_beta);
}

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k, int64_t groups) {
  const Operands given = operands("local_response_norm", "input", input);
  given.images("input", input);
  given.towers(size, groups, input.size(1));
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return output;
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int vector = vector_of<T>(format, lrn.group.value(), data<T>(x));
    if (lrn.fast && vector > 1) {
      const int64_t vectors = x.numel() / vector;
      device.launch(lrn_forward<T>, steps_of_lanes(vectors), kThreads, lrn, vectors,
                    Divisor(lrn.group.value() / vector), data<T>(x), mutable_data<T>(output));
    } else {
      const ImageLayout images(sizes_of(x), format, 1);
      device.launch(lrn_forward_any<T>, divide_up(x.numel(), kThreads), kThreads, images, lrn, data<T>(x),
                    mutable_data<T>(output));
    }
  });
  return output;
}

Tensor local_response_norm_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta,
                                    double k, int64_t groups) {
  const Operands given = operands("local_response_norm_backward", "grad", grad);
  given.images("input", input);
  given.alike("grad", grad, input);
  given.towers(size, groups, input.size(1));
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format), g = in_format(grad, format);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return grad_input;
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int vector = vector_of<T>(format, lrn.group.value(), data<T>(x), data<T>(g));
    if (lrn.fast && vector > 1) {
      const int64_t vectors = x.numel() / vector;
      device.launch(lrn_backward_fast<T>, steps_of_lanes(vectors), kThreads, lrn, vectors,
                    Divisor(lrn.group.value() / vector), data<T>(g), data<T>(x), mutable_data<T>(grad_input));
    } else {
      const ImageLayout images(sizes_of(x), format, 1);
      const int64_t blocks = divide_up(x.numel(), kThreads);
      Tensor s = empty(sizes_of(x), ScalarType::Float, x, format);
      device.launch(lrn_bases<false, T>, blocks, kThreads, images, lrn, data<T>(x), mutable_data<float>(s));
      device.launch(lrn_backward_any<false, T, T>, blocks, kThreads, images, lrn, data<T>(g), data<T>(x),
                    data<float>(s), mutable_data<T>(grad_input));
    }
  });
  return grad_input;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("local_response_norm", TORCH_BOX(&local_response_norm));
  m.impl("local_response_norm_backward", TORCH_BOX(&local_response_norm_backward));
}

}  // namespace alexnet_kernels::cuda
