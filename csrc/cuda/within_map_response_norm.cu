// Response normalisation inside each map, the second normalisation of the original cuda-convnet network.
//   b[y, x] = a[y, x] * s[y, x]^-beta,  s[y, x] = k + alpha/n^2 * sum of a^2 over the n x n window around (y, x)
//   dx[p] = g[p] s[p]^-beta - 2 beta alpha/n^2 a[p] * sum over q, p in window(q), of g[q] a[q] s[q]^(-beta-1)
//   input, grad, output, grad_input [N, C, H, W] in one memory format; float, bfloat16 or float16; computed in float;
//   the window is [i - n/2, i + (n-1)/2] on both axes, cut at the edges
// A thread computes a vector of channels of a strip of kWithinMapRows pixels of one column. Their windows share the
// sums along rows: a window of 5 loads 8 x 5 vectors for four pixels. Backward is two kernels: the first stores the
// terms of the window sums in float, the second sums them and computes s again.
#include "lrn.cuh"

namespace alexnet_kernels::cuda {
namespace {

// Vertically adjacent outputs of a thread, whose windows share rows.
constexpr int kWithinMapRows = 4;

struct WithinMap {
  WithinMap(int64_t size, double alpha, double beta, double k, int64_t height, int64_t width)
      : before(int(std::min(size / 2, std::max(height, width)))),
        after(int(std::min((size - 1) / 2, std::max(height, width)))),
        alpha_over_n(float(alpha / (double(size) * double(size)))),
        beta(float(beta)),
        k(float(k)),
        // k as in lrn.cuh.
        fast(beta == 0.75 && alpha >= 0 && k > 1e-30) {}

  int before, after;  // pixels of a window before and after its centre, along each axis
  float alpha_over_n, beta, k;
  bool fast;
};

// The pixels of a thread: `rows` of one column, from `top` down.
struct Strip {
  Coordinates top;
  int rows;
  int64_t first;    // offset of the top pixel
  int row, column;  // offset of the next row, of the next column
};
// strips: the layout with kWithinMapRows rows as one. False for threads beyond the last strip.
__device__ __forceinline__ bool find_strip(const ImageLayout& images, const ImageLayout& strips, Strip& strip) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x >= strips.vectors()) return false;
  strip.top = strips.locate(first, threadIdx.x);
  strip.top.y *= kWithinMapRows;
  strip.rows = min(kWithinMapRows, images.H - strip.top.y);
  strip.first = images.offset(strip.top.n, strip.top.c, strip.top.y, strip.top.x);
  strip.row = int(images.offset(0, 0, 1, 0)), strip.column = int(images.offset(0, 0, 0, 1));
  return true;
}

// The sums of elements or, with kSquares, of squares over the window [i - before, i + after] of each pixel of the
// strip.
template <bool kSquares, int kVec, class T>
__device__ __forceinline__ void window_sums(const ImageLayout& images, const Strip& strip, int before, int after,
                                            const T* p, float (&sums)[kWithinMapRows][kVec]) {
#pragma unroll
  for (int j = 0; j < kWithinMapRows; ++j) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[j][i] = 0.f;
  }
  const int top = -min(before, strip.top.y), left = -min(before, strip.top.x);
  const int bottom = min(kWithinMapRows + after, images.H - strip.top.y),
            right = min(after + 1, images.W - strip.top.x);
  p += strip.first;
#pragma unroll 1
  for (int y = top; y < bottom; ++y) {
    float line[kVec] = {};
#pragma unroll 5
    for (int x = left; x < right; ++x) {
      float v[kVec];
      load<kVec>(p + y * strip.row + x * strip.column, v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) line[i] += kSquares ? v[i] * v[i] : v[i];
    }
#pragma unroll
    for (int j = 0; j < kWithinMapRows; ++j) {
      if (y < j - before || y > j + after) continue;
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[j][i] += line[i];
    }
  }
}

// Vectors imply beta = 3/4.
template <int kVec>
__device__ __forceinline__ Powers powers_of(const WithinMap& norm, float sum) {
  const float s = norm.k + norm.alpha_over_n * sum;
  return kVec > 1 ? fast_powers(s) : powers(s, norm.beta);
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    within_map_forward(ImageLayout images, ImageLayout strips, WithinMap norm, const T* x, T* y) {
  Strip strip;
  if (!find_strip(images, strips, strip)) return;
  float sums[kWithinMapRows][kVec];
  window_sums<true>(images, strip, norm.before, norm.after, x, sums);
#pragma unroll
  for (int j = 0; j < kWithinMapRows; ++j) {
    if (j >= strip.rows) continue;
    const int64_t at = strip.first + j * strip.row;
    float a[kVec];
    load<kVec>(x + at, a);
#pragma unroll
    for (int i = 0; i < kVec; ++i) a[i] *= powers_of<kVec>(norm, sums[j][i]).minus_beta;
    store<kVec>(y + at, a);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads)
    within_map_terms(ImageLayout images, ImageLayout strips, WithinMap norm, const T* grad, const T* x, float* terms) {
  Strip strip;
  if (!find_strip(images, strips, strip)) return;
  float sums[kWithinMapRows][kVec];
  window_sums<true>(images, strip, norm.before, norm.after, x, sums);
#pragma unroll
  for (int j = 0; j < kWithinMapRows; ++j) {
    if (j >= strip.rows) continue;
    const int64_t at = strip.first + j * strip.row;
    float a[kVec], g[kVec];
    load<kVec>(x + at, a);
    load<kVec>(grad + at, g);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const Powers p = powers_of<kVec>(norm, sums[j][i]);
      g[i] *= a[i] * p.minus_beta * p.inverse;
    }
    store<kVec>(terms + at, g);
  }
}

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) within_map_backward(ImageLayout images, ImageLayout strips, WithinMap norm,
                                                                const T* grad, const T* x, const float* terms, T* dx) {
  Strip strip;
  if (!find_strip(images, strips, strip)) return;
  float direct[kWithinMapRows][kVec], sums[kWithinMapRows][kVec];
  window_sums<true>(images, strip, norm.before, norm.after, x, direct);
  window_sums<false>(images, strip, norm.after, norm.before, terms, sums);
  const float factor = -2.f * norm.beta * norm.alpha_over_n;
#pragma unroll
  for (int j = 0; j < kWithinMapRows; ++j) {
    if (j >= strip.rows) continue;
    const int64_t at = strip.first + j * strip.row;
    float a[kVec], g[kVec];
    load<kVec>(x + at, a);
    load<kVec>(grad + at, g);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      g[i] = g[i] * powers_of<kVec>(norm, direct[j][i]).minus_beta + factor * a[i] * sums[j][i];
    }
    store<kVec>(dx + at, g);
  }
}

// Calls body with a value of the storage type, the vector size as a constant, the layout and the layout of strips.
template <class Body>
void for_strips(const Tensor& x, const Tensor& grad, MemoryFormat format, bool fast, const Body& body) {
  for_dtype(x, [&](auto t) {
    using T = decltype(t);
    const int most = fast ? vector_of<T>(format, x.size(1), data<T>(x), data<T>(grad)) : 1;
    for_vector<T>(most, [&](auto vector) {
      const ImageLayout images(sizes_of(x), format, vector);
      const ImageLayout strips({x.size(0), x.size(1), divide_up(x.size(2), kWithinMapRows), x.size(3)}, format, vector);
      body(t, vector, images, strips);
    });
  });
}

Tensor within_map_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k) {
  const Operands given = operands("within_map_response_norm", "input", input);
  given.images("input", input);
  given.positive("size", size);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  Tensor output = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return output;
  const OnDevice device(x);
  const WithinMap norm(size, alpha, beta, k, x.size(2), x.size(3));
  for_strips(x, x, format, norm.fast, [&](auto t, auto vector, const ImageLayout& images, const ImageLayout& strips) {
    using T = decltype(t);
    device.launch(within_map_forward<T, vector>, divide_up(strips.vectors(), kThreads), kThreads, images, strips, norm,
                  data<T>(x), mutable_data<T>(output));
  });
  return output;
}

Tensor within_map_response_norm_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha,
                                         double beta, double k) {
  const Operands given = operands("within_map_response_norm_backward", "grad", grad);
  given.images("input", input);
  given.alike("grad", grad, input);
  given.positive("size", size);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format), g = in_format(grad, format);
  Tensor grad_input = empty(sizes_of(x), x.scalar_type(), x, format);
  if (x.numel() == 0) return grad_input;
  const OnDevice device(x);
  const WithinMap norm(size, alpha, beta, k, x.size(2), x.size(3));
  Tensor terms = empty(sizes_of(x), ScalarType::Float, x, format);
  for_strips(x, g, format, norm.fast, [&](auto t, auto vector, const ImageLayout& images, const ImageLayout& strips) {
    using T = decltype(t);
    const int64_t blocks = divide_up(strips.vectors(), kThreads);
    device.launch(within_map_terms<T, vector>, blocks, kThreads, images, strips, norm, data<T>(g), data<T>(x),
                  mutable_data<float>(terms));
    device.launch(within_map_backward<T, vector>, blocks, kThreads, images, strips, norm, data<T>(g), data<T>(x),
                  data<float>(terms), mutable_data<T>(grad_input));
  });
  return grad_input;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("within_map_response_norm", TORCH_BOX(&within_map_response_norm));
  m.impl("within_map_response_norm_backward", TORCH_BOX(&within_map_response_norm_backward));
}

}  // namespace alexnet_kernels::cuda
