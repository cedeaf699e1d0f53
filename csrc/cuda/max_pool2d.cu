// Max-pooling, forward and backward, optionally with the ReLU before it.
//   input, grad_input [N, C, H, W]; output, grad [N, C, OH, OW]; argmax uint8 [N, C, OH, OW], the position
//   i * kernel_w + j of the maximum in its window, with ReLU kNowhere where that is not positive; all in one memory
//   format; float, bfloat16 or float16
// Forward, a thread holds a vector of channels of one pixel of the output. Backward gathers: of 3 x 3 windows two
// apart, a thread holds a vector of 2 x 2 pixels of the input (pool.cuh), which four windows serve; of other windows a
// vector of one pixel. Positions are those of pool.cuh's Maximum. The bias is added to the maximum, before ReLU.
#include "bias.cuh"
#include "pool.cuh"

namespace alexnet_kernels::cuda {
namespace {

// kThree: 3 x 3 windows, nine 16-byte loads a vector.
template <class T, int kVec, bool kThree>
__global__ void __launch_bounds__(kThreads) pool_forward(ImageLayout in, ImageLayout out, PoolShape pool,
                                                         bool with_relu, const T* x, Bias bias, T* y, uint8_t* argmax) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= out.vectors()) return;
  const Coordinates at = out.locate(first, threadIdx.x);
  const int top = at.y * pool.stride_h - pool.pad_h, left = at.x * pool.stride_w - pool.pad_w;
  const int kernel_h = kThree ? 3 : pool.kernel_h, kernel_w = kThree ? 3 : pool.kernel_w;
  Maximum<kVec> maximum;
  const int64_t corner = in.offset(at.n, at.c, top, left);
  const int64_t row = in.offset(0, 0, 1, 0), step = in.offset(0, 0, 0, 1);
#pragma unroll
  for (int i = 0; i < kernel_h; ++i) {
    if (unsigned(top + i) >= unsigned(in.H)) continue;
    if constexpr (kThree) {
      // Issues the loads of a row together.
      float value[3][kVec] = {};
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (unsigned(left + j) < unsigned(in.W)) load<kVec>(x + corner + i * row + j * step, value[j]);
      }
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (unsigned(left + j) < unsigned(in.W)) maximum.update(value[j], i * 3 + j);
      }
    } else {
      for (int j = 0; j < kernel_w; ++j) {
        if (unsigned(left + j) >= unsigned(in.W)) continue;
        float value[kVec];
        load<kVec>(x + corner + i * row + j * step, value);
        maximum.update(value, i * kernel_w + j);
      }
    }
  }
  if (bias.values != nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) maximum.value[i] += bias.at<T>(at.c + i);
  }
  if (with_relu) maximum.relu();
  store<kVec>(y + vector * kVec, maximum.value);
  store_bytes<kVec>(argmax + vector * kVec, maximum.position);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_backward(ImageLayout in, ImageLayout out, PoolShape pool, const T* grad, const uint8_t* argmax, T* dx) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= in.vectors()) return;
  float sum[kVec];
  gather<kVec>(in.locate(first, threadIdx.x), out, pool, grad, argmax, sum);
  store<kVec>(dx + vector * kVec, sum);
}

// A thread computes a vector of the four pixels of a block, of NCHW a channel.
template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    pool_backward_blocks(ImageLayout in, ImageLayout out, ImageLayout blocks, PoolShape pool, int vectors_per_pixel,
                         int64_t steps, const T* grad, const uint8_t* argmax, T* dx, float* partial) {
  float bias_grad[kVec] = {};
  for (int64_t step = blockIdx.x; step < steps; step += gridDim.x) {
    const int64_t vector = step * kThreads + threadIdx.x;
    if (vector >= blocks.vectors()) break;
    const Coordinates at = blocks.locate(vector, 0);
    float g[2][2][kVec];
    gather_block<kVec>(at, true, out, grad, argmax, g);
    const int top = 2 * at.y - pool.pad_h, left = 2 * at.x - pool.pad_w;
    T* const to = dx + in.offset(at.n, at.c, top, left);
    for_pixels([&](auto r, auto s) {
      if (unsigned(top + r) >= unsigned(in.H) || unsigned(left + s) >= unsigned(in.W)) return;
      store<kVec>(to + (r * in.row_stride + s * in.column_stride), g[r][s]);
#pragma unroll
      for (int i = 0; i < kVec; ++i) bias_grad[i] += g[r][s][i];
    });
  }
  if constexpr (kVec > 1) {
    if (partial != nullptr) store_bias_sums<kThreads, kVec>(bias_grad, int(threadIdx.x), vectors_per_pixel, partial);
  }
}

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& input, std::optional<Tensor> bias, IntList kernel, IntList stride,
                                      IntList padding, bool ceil_mode, bool relu) {
  const Operands given = operands("max_pool2d", "input", input);
  given.images("input", input);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  const IntList size = given.pooled(sizes_of(input), kernel, stride, padding, ceil_mode);
  if (relu) given.room_for_nowhere(kernel);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const std::optional<Tensor> b = contiguous(bias);
  Tensor output = empty(size, x.scalar_type(), x, format), argmax = empty(size, ScalarType::Byte, x, format);
  if (output.numel() == 0) return {output, argmax};
  const OnDevice device(x);
  const PoolShape pool(kernel, stride, padding);
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    for_vector<T>(vector_of<T>(format, x.size(1), data<T>(x)), [&](auto vector) {
      for_bool(pool.kernel_h == 3 && pool.kernel_w == 3, [&](auto three) {
        const ImageLayout in(sizes_of(x), format, vector), out(size, format, vector);
        device.launch(pool_forward<T, vector, three>, divide_up(out.vectors(), kThreads), kThreads, in, out, pool, relu,
                      data<T>(x), Bias(b), mutable_data<T>(output), mutable_data<uint8_t>(argmax));
      });
    });
  });
  return {output, argmax};
}

std::tuple<Tensor, Tensor> max_pool2d_backward(const Tensor& grad, const Tensor& argmax, std::optional<Tensor> bias,
                                               IntList input_size, IntList kernel, IntList stride, IntList padding) {
  const Operands given = operands("max_pool2d_backward", "grad", grad);
  given.pool_gradient(grad, argmax, input_size, kernel, stride, padding);
  given.map_bias(bias, grad.scalar_type(), grad.size(1));
  const MemoryFormat format = memory_format_of(argmax);
  const Tensor g = in_format(grad, format), argmaxes = in_format(argmax, format);
  Tensor grad_input = empty(input_size, grad.scalar_type(), grad, format);
  if (grad_input.numel() == 0) return {grad_input, bias_gradient(grad_input, bias)};
  const OnDevice device(g);
  const PoolShape pool(kernel, stride, padding);
  std::optional<Tensor> grad_bias;
  for_dtype(g, [&](auto t) {
    using T = decltype(t);
    const int most = vector_of<T>(format, input_size[1], data<T>(g), data<uint8_t>(argmaxes));
    for_vector<T>(most, [&](auto vector) {
      const ImageLayout in(input_size, format, vector), out(sizes_of(g), format, vector);
      if (!pool.three_by_two()) {
        device.launch(pool_backward<T, vector>, divide_up(in.vectors(), kThreads), kThreads, in, out, pool, data<T>(g),
                      data<uint8_t>(argmaxes), mutable_data<T>(grad_input));
        return;
      }
      const ImageLayout blocks(blocks_of_pixels(input_size, padding), format, vector);
      const int64_t steps = divide_up(blocks.vectors(), kThreads), per_pixel = input_size[1] / vector;
      const BiasSums sums(vector > 1 ? bias : std::nullopt, blocks_of_steps(steps, kThreads, per_pixel), kThreads,
                          per_pixel, vector);
      device.launch(pool_backward_blocks<T, vector>, sums.blocks(), kThreads, in, out, blocks, pool, int(per_pixel),
                    steps, data<T>(g), data<uint8_t>(argmaxes), mutable_data<T>(grad_input), sums.partial());
      grad_bias = sums.template combine<T>(device);
    });
  });
  return {grad_input, grad_bias ? *grad_bias : bias_gradient(grad_input, bias)};
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

}  // namespace alexnet_kernels::cuda
