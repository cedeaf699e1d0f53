// Local response normalisation and max-pooling in one pass, forward and backward, optionally with the ReLU before them.
// The normalised activations are not stored.
//   input, grad_input [N, C, H, W]; output, grad [N, C, OH, OW]; argmax as in max_pool2d.cu; all in one memory format;
//   float, bfloat16 or float16; computed, and compared, in float
// Fast kernels, of 3 x 3 windows two apart in channels_last (lrn.cuh): one launch each way, of backward with a bias a
// second one that adds the sums of its blocks. General kernels: forward, one output a thread; backward in three
// kernels; a bias is added before them by torch's operators.
#include "bias.cuh"
#include "lrn.cuh"
#include "pool.cuh"

namespace alexnet_kernels::cuda {
namespace {

// The outputs of a block in forward: `rows` x `columns` of one image. Its lanes hold the vectors of 2 columns + 1
// pixels of a row of the input.
struct Tile {
  Tile(const ImageLayout& out, int64_t vectors_per_pixel) : pixel(vectors_per_pixel) {
    // The width that takes the fewest warps in all.
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int c = 1; c <= out.W; ++c) {
      const int64_t needed = divide_up((2 * c + 1) * vectors_per_pixel, kStoringLanes);
      if (needed > kLrnPoolWarps) break;
      if (needed * divide_up(out.W, c) > least) continue;
      least = needed * divide_up(out.W, c), columns = c, warps = int(needed);
    }
    if (columns == 0) return;
    across = Divisor(divide_up(out.W, columns));
    while (rows > 1 && out.N * across.value() * divide_up(out.H, rows) < kLrnPoolBlocks) --rows;
    down = Divisor(divide_up(out.H, rows));
  }
  int64_t blocks(int64_t images) const { return images * down.value() * across.value(); }

  int rows = kLrnPoolRows, columns = 0, warps = 0;  // columns 0: a pixel has too many channels
  Divisor across, down, pixel;                      // tiles of an image; vectors of a pixel
};

// A lane normalises a vector of one column from top to bottom and takes the maximum of each three rows; a row that two
// windows share stays in registers. The maxima of a row of windows go through shared memory to the threads that take
// the maximum of three columns. So only pixels at the edges of tiles are normalised twice.
template <class T, bool kRelu>
__global__ void __launch_bounds__(kLrnPoolWarps* kWarp, 2)
    forward_fast(ImageLayout in, ImageLayout out, Tile tile, PoolShape pool, Lrn lrn, Divisor tower, const T* x,
                 Bias bias, T* y, uint8_t* argmax) {
  constexpr int kVec = kVector<T>, kWords = kVec / 4, kPositions = kLrnPoolWarps * kWarp;
  // Two rows of windows: one is written while the other is read.
  __shared__ Pack<float, 4> values[kWords][2 * kPositions];
  __shared__ uint32_t places[kWords][2 * kPositions];
  const int tile_row = tile.across.quotient(int(blockIdx.x)), image = tile.down.quotient(tile_row);
  const int top = (tile_row - image * tile.down.value()) * tile.rows;
  const int left = (int(blockIdx.x) - tile_row * tile.across.value()) * tile.columns;
  const int columns = min(tile.columns, out.W - left), vectors = tile.pixel.value();
  const Lane lane;
  const int position = lane.position();
  const bool exists = position >= 0 && position < (2 * columns + 1) * vectors;
  const int column = tile.pixel.quotient(max(position, 0)), vector = max(position, 0) - column * vectors;
  const int in_tower = tower.remainder(vector);
  const bool first = in_tower == 0, last = in_tower == tower.value() - 1;
  const int pixel_x = 2 * left - pool.pad_w + column;
  const bool loads = exists && unsigned(pixel_x) < unsigned(in.W);
  const bool writes = exists && lane.stores();
  float shift[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) shift[i] = bias.at<T>(vector * kVec + i);
  int row = 2 * top - pool.pad_h;
  x += in.offset(image, vector * kVec, row, pixel_x);
  const int ends = min(top + tile.rows, out.H);

  auto load_row = [&](int at) {
    Packed<T, kVec> raw = {};
    if (loads && unsigned(row + at) < unsigned(in.H)) raw.load(x + at * in.row_stride);
    return raw;
  };
  // b / gain of the row `at`, which all lanes of the block have in common.
  auto normalise = [&](const Packed<T, kVec>& raw, int at, float(&b)[kVec]) {
    if (unsigned(row + at) >= unsigned(in.H)) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) b[i] = minus_infinity();
      return;
    }
    float a[kVec], t[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      a[i] = raw[i] + shift[i];
      if (kRelu) a[i] = relu(a[i]);
    }
    bases<kVec>(lrn, a, first, last, t);
#pragma unroll
    for (int i = 0; i < kVec; ++i) b[i] = a[i] * fast_powers(t[i]).minus_beta;
  };

  // The output of a thread: channels of one column.
  const int ow = tile.pixel.quotient(int(threadIdx.x)), channels = int(threadIdx.x) - ow * vectors;
  const int from = 2 * ow * vectors + channels;
  const int64_t to = out.offset(image, channels * kVec, top, left + ow);
  y += to, argmax += to;

  float shared[kVec];
  normalise(load_row(0), 0, shared);
  Packed<T, kVec> next[2] = {load_row(1), load_row(2)};
  int buffer = 0;
#pragma unroll 1
  for (int oh = top; oh < ends; ++oh) {
    PackedMaximum<kVec> maximum;
#pragma unroll
    for (int i = 0; i < kVec; ++i) maximum.value[i] = shared[i];
#pragma unroll
    for (int w = 0; w < kWords; ++w) maximum.position[w] = 0;
#pragma unroll
    for (int r = 1; r < 3; ++r) {
      normalise(next[r - 1], r, shared);
      uint32_t at[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) at[w] = 0x01010101u * (3 * r);
      maximum.update(shared, at);
    }
    x += 2 * in.row_stride, row += 2;
    if (oh + 1 < ends) next[0] = load_row(1), next[1] = load_row(2);
    if (writes) {
      if (!loads) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) maximum.value[i] = minus_infinity();
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        Pack<float, 4> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.value[i] = maximum.value[4 * w + i];
        values[w][buffer + position] = quad;
        places[w][buffer + position] = maximum.position[w];
      }
    }
    __syncthreads();
    if (int(threadIdx.x) < columns * vectors) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        float value[kVec];
        uint32_t at[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const Pack<float, 4> quad = values[w][buffer + from + j * vectors];
#pragma unroll
          for (int i = 0; i < 4; ++i) (j == 0 ? maximum.value : value)[4 * w + i] = quad.value[i];
          (j == 0 ? maximum.position : at)[w] = places[w][buffer + from + j * vectors] + 0x01010101u * j;
        }
        if (j > 0) maximum.merge(value, at);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) maximum.value[i] *= lrn.gain;
      store<kVec>(y, maximum.value);
      store_words<kWords>(argmax, maximum.position);
    }
    y += out.row_stride, argmax += out.row_stride;
    buffer ^= kPositions;
  }
}

// A lane computes a vector of the four pixels of a block.
template <class T, bool kRelu>
__global__ void __launch_bounds__(kThreads)
    backward_fast(ImageLayout in, ImageLayout out, ImageLayout blocks, PoolShape pool, Lrn lrn, Divisor pixel,
                  Divisor tower, int64_t steps, const T* grad, const T* x, Bias bias, const uint8_t* argmax, T* dx,
                  float* partial) {
  constexpr int kVec = kVector<T>;
  float shift[kVec], bias_grad[kVec] = {};
  const int in_pixel = Lane().remainder(pixel), in_tower = tower.remainder(in_pixel);
  const bool first = in_tower == 0, last = in_tower == tower.value() - 1;
#pragma unroll
  for (int i = 0; i < kVec; ++i) shift[i] = bias.at<T>(in_pixel * kVec + i);
  for (int64_t step = blockIdx.x; step < steps; step += gridDim.x) {
    const Lane lane(step);
    const bool exists = lane.valid(blocks.vectors());
    const Coordinates at = blocks.locate(exists ? lane.vector() : 0, 0);
    const int top = 2 * at.y - pool.pad_h, left = 2 * at.x - pool.pad_w;
    const int64_t corner = in.offset(at.n, at.c, top, left);
    const T* from = x + corner;
    T* to = dx + corner;
    Packed<T, kVec> raw[2][2] = {};
    bool inside[2][2];
    for_pixels([&](auto r, auto s) {
      inside[r][s] = exists && unsigned(top + r) < unsigned(in.H) && unsigned(left + s) < unsigned(in.W);
      if (inside[r][s]) raw[r][s].load(from + (r * in.row_stride + s * in.column_stride));
    });
    float g[2][2][kVec];
    gather_block<kVec>(at, exists, out, grad, argmax, g);
    for_pixels([&](auto r, auto s) {
      float a[kVec], d[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        a[i] = raw[r][s][i] + shift[i];
        if (kRelu) a[i] = relu(a[i]);
      }
      lrn_backward<kVec>(lrn, a, g[r][s], first, last, d);
      if (!lane.stores() || !inside[r][s]) return;
#pragma unroll
      for (int i = 0; i < kVec; ++i) d[i] = kRelu && a[i] <= 0.f ? 0.f : d[i];
      store<kVec>(to + (r * in.row_stride + s * in.column_stride), d);
#pragma unroll
      for (int i = 0; i < kVec; ++i) bias_grad[i] += d[i];
    });
  }
  if (partial != nullptr) {
    store_bias_sums<kStep, kVec>(bias_grad, Lane().stores() ? Lane().position() : -1, pixel.value(), partial);
  }
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
  gather<1>(in.locate(first, threadIdx.x), out, pool, grad, argmax, sum);
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
  const Tensor x = in_format(input, format);
  Tensor output = empty(pooled, x.scalar_type(), x, format), argmax = empty(pooled, ScalarType::Byte, x, format);
  if (output.numel() == 0) return {output, argmax};
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  const PoolShape pool(kernel, stride, padding);
  const bool done = for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int vector = vector_of<T>(format, lrn.group.value(), data<T>(x));
    if (vector == 1 || !lrn.fast || !pool.three_by_two()) return false;
    const ImageLayout in(sizes_of(x), format, vector), out(pooled, format, vector);
    const Tile tile(out, x.size(1) / vector);
    if (tile.columns == 0) return false;
    const std::optional<Tensor> b = contiguous(bias);
    for_bool(relu, [&](auto with_relu) {
      device.launch(forward_fast<T, with_relu>, tile.blocks(x.size(0)), tile.warps * kWarp, in, out, tile, pool, lrn,
                    Divisor(lrn.group.value() / vector), data<T>(x), Bias(b), mutable_data<T>(output),
                    mutable_data<uint8_t>(argmax));
    });
    return true;
  });
  if (done) return {output, argmax};
  if (bias) {
    const Tensor sum = rounded(plus_bias(x, *bias), widened(*bias).scalar_type(), format);
    const auto [wide, positions] =
        lrn_max_pool2d(sum, std::nullopt, size, alpha, beta, k, groups, kernel, stride, padding, ceil_mode, relu);
    return {rounded(wide, x.scalar_type(), format), positions};
  }
  const ImageLayout in(sizes_of(x), format, 1), out(pooled, format, 1);
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    for_bool(relu, [&](auto with_relu) {
      device.launch(forward_any<T, with_relu>, divide_up(out.vectors(), kThreads), kThreads, in, out, pool, lrn,
                    data<T>(x), mutable_data<T>(output), mutable_data<uint8_t>(argmax));
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
  const Tensor x = in_format(input, format), g = in_format(grad, format), argmaxes = in_format(argmax, format);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return {grad_input, bias_gradient(grad_input, bias)};
  const OnDevice device(x);
  const Lrn lrn(size, alpha, beta, k, groups, x.size(1));
  const PoolShape pool(kernel, stride, padding);
  std::optional<Tensor> grad_bias;
  const bool done = for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int vector = vector_of<T>(format, lrn.group.value(), data<T>(x), data<T>(g), data<uint8_t>(argmaxes));
    if (vector == 1 || !lrn.fast || !pool.three_by_two()) return false;
    const ImageLayout in(sizes_of(x), format, vector), out(sizes_of(g), format, vector);
    const ImageLayout blocks(blocks_of_pixels(sizes_of(x), padding), format, vector);
    const int64_t steps = steps_of_lanes(blocks.vectors()), per_pixel = x.size(1) / vector;
    const std::optional<Tensor> b = contiguous(bias);
    const BiasSums sums(bias, blocks_of_steps(steps, kStep, per_pixel), kStep, per_pixel, vector);
    for_bool(relu, [&](auto with_relu) {
      device.launch(backward_fast<T, with_relu>, sums.blocks(), kThreads, in, out, blocks, pool, lrn,
                    Divisor(per_pixel), Divisor(lrn.group.value() / vector), steps, data<T>(g), data<T>(x), Bias(b),
                    data<uint8_t>(argmaxes), mutable_data<T>(grad_input), sums.partial());
    });
    grad_bias = sums.combine<T>(device);
    return true;
  });
  if (done) return {grad_input, grad_bias ? *grad_bias : bias_gradient(grad_input, bias)};
  if (bias) {
    const Tensor sum = rounded(plus_bias(x, *bias), widened(*bias).scalar_type(), format);
    const Tensor dx = std::get<0>(lrn_max_pool2d_backward(widened(g), sum, std::nullopt, argmaxes, size, alpha, beta, k,
                                                          groups, kernel, stride, padding, relu));
    return {rounded(dx, x.scalar_type(), format), bias_gradient(dx, bias)};
  }
  const ImageLayout in(sizes_of(x), format, 1), out(sizes_of(g), format, 1);
  const int64_t thread_blocks = divide_up(in.vectors(), kThreads);
  Tensor normalised = empty(sizes_of(x), ScalarType::Float, x, format);
  Tensor s = empty(sizes_of(x), ScalarType::Float, x, format);
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    for_bool(relu, [&](auto with_relu) {
      device.launch(pooled_gradient<T>, thread_blocks, kThreads, in, out, pool, data<T>(g), data<uint8_t>(argmaxes),
                    mutable_data<float>(normalised));
      device.launch(lrn_bases<with_relu, T>, thread_blocks, kThreads, in, lrn, data<T>(x), mutable_data<float>(s));
      device.launch(lrn_backward_any<with_relu, T, float>, thread_blocks, kThreads, in, lrn, data<float>(normalised),
                    data<T>(x), data<float>(s), mutable_data<T>(grad_input));
    });
  });
  return {grad_input, bias_gradient(grad_input, bias)};
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("lrn_max_pool2d", TORCH_BOX(&lrn_max_pool2d));
  m.impl("lrn_max_pool2d_backward", TORCH_BOX(&lrn_max_pool2d_backward));
}

}  // namespace alexnet_kernels::cuda
