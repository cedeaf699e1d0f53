// A bias of each channel, added by a kernel to its input, and the bias's gradient, which kernels of backward sum beside
// theirs. Shared by max_pool2d.cu and lrn_max_pool2d.cu.
#pragma once

#include <numeric>

#include "image_layout.cuh"

namespace alexnet_kernels::cuda {

// bias [C], in the input's type or in float; null without a bias.
struct Bias {
  explicit Bias(const std::optional<Tensor>& bias) {
    if (!bias) return;
    values = bias->const_data_ptr();
    is_float = dtype_of(*bias) == DType::f32;
  }

  // The bias of channel c. T: the input's type.
  template <class T>
  __device__ __forceinline__ float at(int c) const {
    if (values == nullptr) return 0.f;
    return is_float ? static_cast<const float*>(values)[c] : float(static_cast<const T*>(values)[c]);
  }

  const void* values = nullptr;
  bool is_float = false;
};

// General kernels take no bias: torch's operators add it before them and sum its gradient after them, in float.
inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double || t.scalar_type() == ScalarType::Float
             ? t
             : torch::stable::to(t, ScalarType::Float);
}
// images + bias
inline Tensor plus_bias(const Tensor& images, const Tensor& bias) {
  return torch::stable::subtract(widened(images), torch::stable::reshape(widened(bias), {bias.size(0), 1, 1}), -1.0);
}
// Images in another dtype and in a memory format.
inline Tensor rounded(const Tensor& images, ScalarType type, MemoryFormat format) {
  Tensor result = empty(sizes_of(images), type, images, format);
  torch::stable::copy_(result, images);
  return result;
}
// The gradient of the bias: the sum of the images' gradients. [0] without a bias.
inline Tensor bias_gradient(const Tensor& grad, const std::optional<Tensor>& bias) {
  if (!bias) return empty({0}, grad.scalar_type(), grad);
  const IntList dims{0, 2, 3};
  return torch::stable::to(torch::stable::sum(widened(grad), torch::headeronly::IntHeaderOnlyArrayRef(dims)),
                           bias->scalar_type());
}

// The blocks of a backward kernel that sums the bias's gradient walk over the vectors of [N, C, ...] in channels_last,
// `count` neighbouring ones a step, of which each position keeps its channels. Each block leaves the sums of its first
// min(count, vectors of a pixel) positions in `partial`, from which combine_bias_sums takes the gradient: additions in
// an order that no device and no run changes.

// The blocks for so many steps of `count` vectors.
inline int64_t blocks_of_steps(int64_t steps, int64_t count, int64_t vectors_per_pixel) {
  if (steps <= kBiasBlocks) return steps;
  const int64_t period = vectors_per_pixel / std::gcd(vectors_per_pixel, count);
  return std::max<int64_t>(1, kBiasBlocks / period) * period;
}

// Stores the sums of a block. position: of the thread's sums, or -1 of a thread that has none.
template <int kCount, int kVec>
__device__ __forceinline__ void store_bias_sums(const float (&sum)[kVec], int position, int vectors_per_pixel,
                                                float* partial) {
  __shared__ float sums[kCount * kVec];
  if (position >= 0) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[position * kVec + i] = sum[i];
  }
  __syncthreads();
  const int channels = min(kCount, vectors_per_pixel) * kVec;
  for (int c = int(threadIdx.x); c < channels; c += int(blockDim.x)) {
    float total = 0.f;
    for (int at = c; at < kCount * kVec; at += vectors_per_pixel * kVec) total += sums[at];
    partial[int64_t(blockIdx.x) * channels + c] = total;
  }
}

// bias_grad [C]: the sum over `blocks` blocks. A block computes the channels of one vector; its threads take the blocks
// in turn, and their sums are added in the order of the threads.
template <class B, int kVec>
__global__ void __launch_bounds__(kThreads)
    combine_bias_sums(int blocks, int count, int vectors_per_pixel, const float* partial, B* bias_grad) {
  constexpr int kRows = kThreads / kVec;
  __shared__ float sums[kThreads];
  const int vector = int(blockIdx.x), i = int(threadIdx.x) % kVec, positions = min(count, vectors_per_pixel);
  const int first = int(threadIdx.x) / kVec, hop = int(int64_t(kRows) * count % vectors_per_pixel);
  // The position of the vector in a block.
  int position = vector - int(int64_t(first) * count % vectors_per_pixel);
  float total = 0.f;
  for (int block = first; block < blocks; block += kRows, position -= hop) {
    if (position < 0) position += vectors_per_pixel;
    if (position < positions) total += partial[(int64_t(block) * positions + position) * kVec + i];
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  if (int(threadIdx.x) >= kVec) return;
  for (int row = 1; row < kRows; ++row) total += sums[row * kVec + i];
  bias_grad[vector * kVec + i] = B(total);
}

// The sums of such a launch, and the gradient that they give.
class BiasSums {
 public:
  // bias: whose gradient is wanted, if it is; vectors of `vector` channels.
  BiasSums(const std::optional<Tensor>& bias, int64_t blocks, int64_t count, int64_t vectors_per_pixel, int vector)
      : blocks_(blocks), count_(count), vectors_per_pixel_(vectors_per_pixel) {
    if (!bias) return;
    gradient_ = empty(sizes_of(*bias), bias->scalar_type(), *bias);
    sums_ = empty({blocks, std::min(count, vectors_per_pixel) * vector}, ScalarType::Float, *bias);
  }
  int64_t blocks() const { return blocks_; }
  // Of [blocks, ...] floats, or null if no gradient is wanted.
  float* partial() const { return sums_ ? mutable_data<float>(*sums_) : nullptr; }

  // The gradient, if it is wanted. T: the type of the images.
  template <class T>
  std::optional<Tensor> combine(const OnDevice& device) const {
    if (!gradient_) return gradient_;
    auto launch = [&](auto b) {
      using B = decltype(b);
      device.launch(combine_bias_sums<B, kVector<T>>, vectors_per_pixel_, kThreads, int(blocks_), int(count_),
                    int(vectors_per_pixel_), data<float>(*sums_), mutable_data<B>(*gradient_));
    };
    dtype_of(*gradient_) == DType::f32 ? launch(float{}) : launch(T{});
    return gradient_;
  }

 private:
  int64_t blocks_, count_, vectors_per_pixel_;
  std::optional<Tensor> gradient_, sums_;
};

}  // namespace alexnet_kernels::cuda
