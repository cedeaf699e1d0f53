// Local response normalisation and max-pooling in one pass, forward and backward, optionally with the ReLU before them.
// The normalised activations are not stored.
//   input, grad_input [N, C, H, W]; output, grad [N, C, OH, OW]; argmax as in max_pool2d.cu; all in one memory format;
//   float, bfloat16 or float16; computed, and compared, in float
// Fast kernels (lrn.cuh; 3 x 3 windows with vertical stride 2). Forward, a lane computes a strip of kLrnPoolRows
// outputs of one column from top to bottom: the row of normalised pixels that two windows share is computed once, 27
// vectors instead of 36. Backward, a lane holds a vector of the input and gathers the windows that contain it. General
// kernels: forward, one output a thread; backward in three kernels.
#include "common/bias.h"
#include "lrn.cuh"
#include "pool.cuh"

namespace alexnet_kernels::cuda {
namespace {

// The maximum of the normalised pixels of row y, columns left ... left + 2: three 16-byte loads and twelve shuffles a
// lane. Every lane of the warp must call it.
template <bool kRelu, class T>
__device__ __forceinline__ Maximum<kVector<T>> row_maximum(const ImageLayout& in, const Lrn& lrn, const T* x,
                                                           bool valid, int y, int left, bool first, bool last) {
  constexpr int kVec = kVector<T>;
  float own[3][kVec] = {};
  bool inside[3];
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    inside[j] = valid && unsigned(y) < unsigned(in.H) && unsigned(left + j) < unsigned(in.W);
    if (inside[j]) load<kVec>(x + (y * in.W + left + j) * in.C, own[j]);
  }
  Maximum<kVec> maximum;
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    float a[kVec + 2 * kHalo] = {}, s[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) a[kHalo + i] = kRelu ? relu(own[j][i]) : own[j][i];
    exchange<kVec>(a, first, last);
    bases<kVec>(lrn, a, s);
#pragma unroll
    for (int i = 0; i < kVec; ++i) own[j][i] = a[kHalo + i] * fast_powers(s[i]).minus_beta;
    if (inside[j]) maximum.update(own[j], j);
  }
  return maximum;
}

// strips: the output's layout with kLrnPoolRows rows as one.
template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    forward_fast(ImageLayout in, ImageLayout out, ImageLayout strips, PoolShape pool, Lrn lrn, Divisor tower,
                 const T* x, T* y, uint8_t* argmax) {
  constexpr int kVec = kVector<T>;
  const Lane lane;
  const int in_tower = lane.in_tower(tower);
  const bool valid = lane.valid(strips.vectors()), stores = lane.stores(strips.vectors());
  const bool first = in_tower == 0, last = in_tower == tower.value() - 1;
  Coordinates at{};
  if (valid) at = lane.locate(strips);
  const int left = at.x * pool.stride_w - pool.pad_w;
  int oh = at.y * kLrnPoolRows, row = oh * 2 - pool.pad_h;
  x += in.offset(at.n, at.c, 0, 0);
  Maximum<kVec> shared = row_maximum<kRelu>(in, lrn, x, valid, row, left, first, last);
#pragma unroll 1
  for (int i = 0; i < kLrnPoolRows; ++i, ++oh, row += 2) {
    if (!__any_sync(0xffffffffu, valid && oh < out.H)) break;
    Maximum<kVec> maximum = shared;
    maximum.merge(row_maximum<kRelu>(in, lrn, x, valid, row + 1, left, first, last), 3);
    shared = row_maximum<kRelu>(in, lrn, x, valid, row + 2, left, first, last);
    maximum.merge(shared, 6);
    if (stores && oh < out.H) {
      const int64_t to = out.offset(at.n, at.c, oh, at.x);
      store<kVec>(y + to, maximum.value);
      store_bytes<kVec>(argmax + to, maximum.position);
    }
  }
}

template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    backward_fast(ImageLayout in, ImageLayout out, PoolShape pool, Lrn lrn, Divisor tower, const T* grad, const T* x,
                  const uint8_t* argmax, T* dx) {
  constexpr int kVec = kVector<T>;
  const Lane lane;
  const int in_tower = lane.in_tower(tower);
  const bool first = in_tower == 0, last = in_tower == tower.value() - 1;
  const int64_t vector = lane.vector() * kVec;
  float raw[kVec] = {}, g[kVec] = {}, a[kVec + 2 * kHalo] = {}, d[kVec];
  if (lane.valid(in.vectors())) {
    load<kVec>(x + vector, raw);
    gather<kVec>(lane.locate(in), out, pool, grad, static_cast<const T*>(nullptr), argmax, g);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) a[kHalo + i] = kRelu ? relu(raw[i]) : raw[i];
  exchange<kVec>(a, first, last);
  lrn_backward<kVec>(lrn, a, g, first, last, d);
#pragma unroll
  for (int i = 0; i < kVec; ++i) d[i] = kRelu && raw[i] <= 0.f ? 0.f : d[i];
  if (lane.stores(in.vectors())) store<kVec>(dx + vector, d);
}

template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    forward_any(ImageLayout in, ImageLayout out, PoolShape pool, Lrn lrn, const T* x, T* y, uint8_t* argmax) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
  if (i >= out.vectors()) return;
  const Coordinates at = out.locate(first, threadIdx.x);
  const int top = at.y * pool.stride_h - pool.pad_h, left = at.x * pool.stride_w - pool.pad_w;
  const int stride = in.channel_stride;
  Maximum<1> maximum;
  for (int row = 0; row < pool.kernel_h; ++row) {
    if (unsigned(top + row) >= unsigned(in.H)) continue;
    for (int column = 0; column < pool.kernel_w; ++column) {
      if (unsigned(left + column) >= unsigned(in.W)) continue;
      const T* p = x + in.offset(at.n, at.c, top + row, left + column);
      const float a = kRelu ? relu(float(*p)) : float(*p);
      const float value[1] = {a * powers(base_at<kRelu>(lrn, p, at.c, stride), lrn.beta).minus_beta};
      maximum.update(value, row * pool.kernel_w + column);
    }
  }
  y[i] = T(maximum.value[0]);
  argmax[i] = uint8_t(maximum.position[0]);
}

// The gradient of each normalised activation, in float.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pooled_gradient(ImageLayout in, ImageLayout out, PoolShape pool, const T* grad, const uint8_t* argmax, float* g) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, i = first + threadIdx.x;
  if (i >= in.vectors()) return;
  float sum[1];
  gather<1>(in.locate(first, threadIdx.x), out, pool, grad, static_cast<const T*>(nullptr), argmax, sum);
  g[i] = sum[0];
}

std::tuple<Tensor, Tensor> lrn_max_pool2d(const Tensor& input, std::optional<Tensor> bias, int64_t size, double alpha,
                                          double beta, double k, int64_t groups, IntList kernel, IntList stride,
                                          IntList padding, bool ceil_mode, bool relu) {
  const Operands given = operands("lrn_max_pool2d", "input", input);
  given.images("input", input);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  given.towers(size, groups, input.size(1));
  const IntList pooled = given.pooled(sizes_of(input), kernel, stride, padding, ceil_mode);
  const MemoryFormat format = memory_format_of(input);
  if (bias) {
    const Tensor sum = rounded(plus_bias(input, *bias), widened(*bias).scalar_type(), format);
    const auto [output, argmax] =
        lrn_max_pool2d(sum, std::nullopt, size, alpha, beta, k, groups, kernel, stride, padding, ceil_mode, relu);
    return {rounded(output, input.scalar_type(), format), argmax};
  }
  const Tensor x = in_format(input, format);
  Tensor output = empty(pooled, x.scalar_type(), x, format), argmax = empty(pooled, ScalarType::Byte, x, format);
  if (output.numel() == 0) return {output, argmax};
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  const PoolShape pool(kernel, stride, padding);
  const bool fast = lrn.fast && pool.kernel_h == 3 && pool.kernel_w == 3 && pool.stride_h == 2;
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int vector = fast ? vector_of<T>(format, lrn.group.value(), data<T>(x)) : 1;
    const ImageLayout in(sizes_of(x), format, vector), out(pooled, format, vector);
    for_bool(relu, [&](auto with_relu) {
      if (vector > 1) {
        const ImageLayout strips({pooled[0], pooled[1], divide_up(pooled[2], kLrnPoolRows), pooled[3]}, format, vector);
        device.launch(forward_fast<T, with_relu>, blocks_of_lanes(strips.vectors()), kThreads, in, out, strips, pool,
                      lrn, Divisor(lrn.group.value() / vector), data<T>(x), mutable_data<T>(output),
                      mutable_data<uint8_t>(argmax));
      } else {
        device.launch(forward_any<T, with_relu>, divide_up(out.vectors(), kThreads), kThreads, in, out, pool, lrn,
                      data<T>(x), mutable_data<T>(output), mutable_data<uint8_t>(argmax));
      }
    });
  });
  return {output, argmax};
}

std::tuple<Tensor, Tensor> lrn_max_pool2d_backward(const Tensor& grad, const Tensor& input, std::optional<Tensor> bias,
                                                   const Tensor& argmax, int64_t size, double alpha, double beta,
                                                   double k, int64_t groups, IntList kernel, IntList stride,
                                                   IntList padding, bool relu) {
  const Operands given = operands("lrn_max_pool2d_backward", "grad", grad);
  given.tensor("input", input, grad.scalar_type());
  given.dimensions("input", input, 4);
  given.map_bias(bias, input.scalar_type(), input.size(1));
  given.towers(size, groups, input.size(1));
  given.pool_gradient(grad, argmax, sizes_of(input), kernel, stride, padding);
  const MemoryFormat format = memory_format_of(input);
  if (bias) {
    const Tensor sum = rounded(plus_bias(input, *bias), widened(*bias).scalar_type(), format);
    const Tensor dx = std::get<0>(lrn_max_pool2d_backward(widened(grad), sum, std::nullopt, argmax, size, alpha, beta,
                                                          k, groups, kernel, stride, padding, relu));
    return {rounded(dx, input.scalar_type(), format), bias_gradient(dx, bias)};
  }
  const Tensor x = in_format(input, format), g = in_format(grad, format), argmaxes = in_format(argmax, format);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  const Tensor grad_bias = bias_gradient(grad_input, std::nullopt);
  if (x.numel() == 0) return {grad_input, grad_bias};
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  const PoolShape pool(kernel, stride, padding);
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int most = vector_of<T>(format, lrn.group.value(), data<T>(x), data<T>(g), data<uint8_t>(argmaxes));
    const int vector = lrn.fast ? most : 1;
    const ImageLayout in(sizes_of(x), format, vector), out(sizes_of(g), format, vector);
    for_bool(relu, [&](auto with_relu) {
      if (vector > 1) {
        device.launch(backward_fast<T, with_relu>, blocks_of_lanes(in.vectors()), kThreads, in, out, pool, lrn,
                      Divisor(lrn.group.value() / vector), data<T>(g), data<T>(x), data<uint8_t>(argmaxes),
                      mutable_data<T>(grad_input));
        return;
      }
      const int64_t blocks = divide_up(in.vectors(), kThreads);
      Tensor normalised = empty(sizes_of(x), ScalarType::Float, x, format);
      Tensor s = empty(sizes_of(x), ScalarType::Float, x, format);
      device.launch(pooled_gradient<T>, blocks, kThreads, in, out, pool, data<T>(g), data<uint8_t>(argmaxes),
                    mutable_data<float>(normalised));
      device.launch(lrn_bases<with_relu, T>, blocks, kThreads, in, lrn, data<T>(x), mutable_data<float>(s));
      device.launch(lrn_backward_any<with_relu, T, float>, blocks, kThreads, in, lrn, data<float>(normalised),
                    data<T>(x), data<float>(s), mutable_data<T>(grad_input));
    });
  });
  return {grad_input, grad_bias};
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("lrn_max_pool2d", TORCH_BOX(&lrn_max_pool2d));
  m.impl("lrn_max_pool2d_backward", TORCH_BOX(&lrn_max_pool2d_backward));
}

}  // namespace alexnet_kernels::cuda
