// Local response normalisation of neighbouring channels, shared by local_response_norm.cu and lrn_max_pool2d.cu.
//   b[i] = a[i] * s[i]^-beta,  s[i] = k + alpha/n * sum_{j in window(i)} a[j]^2     Krizhevsky et al. 2012, section 3.3
// window(i) = [i - n/2, i + (n-1)/2], cut at the ends of the tower.
//
// The fast kernels take the paper's window of 5 channels and beta = 3/4 in channels_last. The lanes of a warp hold
// consecutive vectors of channels. The halo of a vector, two channels on each side, comes from the neighbouring lanes
// by shuffle. Lanes 0 and 31 supply halo values and do not store: 30 of 32 lanes store, and consecutive warps overlap
// by two vectors.
#pragma once

#include "image_layout.cuh"

namespace alexnet_kernels::cuda {

struct Lrn {
  Lrn(int64_t size, double alpha, double beta, double k, int64_t groups, int64_t channels)
      : before(int(std::min(size / 2, channels))),
        after(int(std::min((size - 1) / 2, channels))),
        alpha_over_n(float(alpha / double(size))),
        beta(float(beta)),
        k(float(k)),
        group(channels / groups),
        // k > 1e-30 keeps s out of the subnormal numbers, which approximate_rsqrt flushes to zero.
        fast(size == 5 && beta == 0.75 && alpha >= 0 && k > 1e-30) {}

  int before, after;  // channels of a window before and after its centre
  float alpha_over_n, beta, k;
  Divisor group;  // channels of a tower
  bool fast;
};

constexpr int kHalo = 2;  // channels of the fast kernels' window on each side of its centre
constexpr int kStoringLanes = kWarp - 2;

// One MUFU instruction each, accurate to two units in the last place; subnormal numbers become zero.
__device__ __forceinline__ float approximate_rsqrt(float v) {
#if defined(__CUDA_ARCH__)
  asm("rsqrt.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
#else
  return rsqrtf(v);
#endif
}
__device__ __forceinline__ float approximate_sqrt(float v) {
#if defined(__CUDA_ARCH__)
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
#else
  return sqrtf(v);
#endif
}

// s^-beta and 1 / s. For beta = 3/4, with r = s^(-1/2): s^-beta = r sqrt(r), 1 / s = r^2.
struct Powers {
  float minus_beta, inverse;
};
__device__ __forceinline__ Powers fast_powers(float s) {
  const float root = approximate_rsqrt(s);
  return {root * approximate_sqrt(root), root * root};
}
__device__ __forceinline__ Powers powers(float s, float beta) {
  if (beta == 0.75f) {
    const float root = rsqrtf(s);
    return {root * sqrtf(root), root * root};
  }
  return {powf(s, -beta), 1.f / s};
}

// The vector of a lane, in an array of `count` vectors of which each warp stores kStoringLanes.
class Lane {
 public:
  __device__ __forceinline__ Lane()
      : lane_(int(threadIdx.x % kWarp)), index_(int(threadIdx.x / kWarp) * kStoringLanes + lane_ - 1) {}
  // The first vector that the block stores. The lane's vector is index_ after it: -1 ... kStoringLanes * kWarps.
  __device__ __forceinline__ int64_t block_first() const { return int64_t(blockIdx.x) * (kStoringLanes * kWarps); }
  __device__ __forceinline__ int64_t vector() const { return block_first() + index_; }
  // The coordinates of the lane's vector, which must be valid.
  __device__ __forceinline__ Coordinates locate(const ImageLayout& images) const {
    const int64_t base = max(block_first() - 1, int64_t(0));
    return images.locate(base, int(vector() - base));
  }
  __device__ __forceinline__ bool valid(int64_t count) const { return vector() >= 0 && vector() < count; }
  __device__ __forceinline__ bool stores(int64_t count) const {
    return lane_ > 0 && lane_ < kWarp - 1 && vector() < count;
  }
  // vector() modulo the vectors of a tower, by 32-bit arithmetic.
  __device__ __forceinline__ int in_tower(const Divisor& tower) const {
    return tower.remainder(tower.remainder(int(blockIdx.x)) * (kStoringLanes * kWarps) + index_ + tower.value());
  }

 private:
  int lane_, index_;
};
inline int64_t blocks_of_lanes(int64_t vectors) {
  return divide_up(vectors, kStoringLanes * kWarps);
}

// Fills the halo of `row`, whose middle holds the lane's channels, from the neighbouring lanes: four shuffles. The halo
// beyond the tower is zero: first, last tell whether the vector begins or ends its tower. Every lane of the warp must
// call it.
template <int kVec>
__device__ __forceinline__ void exchange(float (&row)[kVec + 2 * kHalo], bool first, bool last) {
#pragma unroll
  for (int i = 0; i < kHalo; ++i) {
    const float before = __shfl_up_sync(0xffffffffu, row[kVec + i], 1);
    const float after = __shfl_down_sync(0xffffffffu, row[kHalo + i], 1);
    // kVec >= kHalo: no element that is still to be sent is overwritten.
    row[i] = first ? 0.f : before;
    row[kHalo + kVec + i] = last ? 0.f : after;
  }
}

// The sums over windows of five, 2 additions each plus one for each pair of neighbours.
template <int kCount>
__device__ __forceinline__ void window_sums(const float (&v)[kCount + 2 * kHalo], float (&sums)[kCount]) {
  static_assert(kHalo == 2);
  float pairs[kCount + 2];
#pragma unroll
  for (int i = 0; i < kCount + 2; ++i) pairs[i] = v[i] + v[i + 1];
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = pairs[i] + pairs[i + 2] + v[i + 4];
}

// s of kCount consecutive channels, from their activations with halo.
template <int kCount>
__device__ __forceinline__ void bases(const Lrn& lrn, const float (&a)[kCount + 2 * kHalo], float (&s)[kCount]) {
  float squares[kCount + 2 * kHalo], sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount + 2 * kHalo; ++i) squares[i] = a[i] * a[i];
  window_sums<kCount>(squares, sums);
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = lrn.k + lrn.alpha_over_n * sums[i];
}

// dx[i] = g[i] s[i]^-beta - 2 beta alpha/n a[i] * sum_{j: i in window(j)} g[j] a[j] s[j]^(-beta-1)
// a has a halo; g and dx do not. Every lane of the warp must call it.
template <int kVec>
__device__ __forceinline__ void lrn_backward(const Lrn& lrn, const float (&a)[kVec + 2 * kHalo], const float (&g)[kVec],
                                             bool first, bool last, float (&dx)[kVec]) {
  float s[kVec], terms[kVec + 2 * kHalo];
  bases<kVec>(lrn, a, s);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const Powers p = fast_powers(s[i]);
    dx[i] = g[i] * p.minus_beta;
    terms[kHalo + i] = dx[i] * a[kHalo + i] * p.inverse;
  }
  exchange<kVec>(terms, first, last);
  const float factor = -2.f * 0.75f * lrn.alpha_over_n;
  float sums[kVec];
  window_sums<kVec>(terms, sums);
#pragma unroll
  for (int i = 0; i < kVec; ++i) dx[i] += factor * a[kHalo + i] * sums[i];
}

// The general kernels take any window, beta and memory format. A thread computes one channel of one pixel.

// The channels [low, high) of the window [c - before, c + after], cut at the ends of its tower.
struct ChannelRange {
  int low, high;
};
__device__ __forceinline__ ChannelRange window_of(const Lrn& lrn, int c, int before, int after) {
  const int tower = lrn.group.quotient(c) * lrn.group.value();
  return {max(c - before, tower), min(c + after + 1, tower + lrn.group.value())};
}

// s of channel c, whose activation is at `p`; consecutive channels are `stride` elements apart.
template <bool kRelu, class T>
__device__ __forceinline__ float base_at(const Lrn& lrn, const T* p, int c, int stride) {
  const ChannelRange window = window_of(lrn, c, lrn.before, lrn.after);
  float sum = 0.f;
  for (int j = window.low; j < window.high; ++j) {
    const float a = kRelu ? relu(float(p[int64_t(j - c) * stride])) : float(p[int64_t(j - c) * stride]);
    sum += a * a;
  }
  return lrn.k + lrn.alpha_over_n * sum;
}

// Backward in two kernels: lrn_bases stores s in float, lrn_backward_any sums the terms of the windows that contain a
// channel.
template <bool kRelu, class T>
__global__ void __launch_bounds__(kThreads) lrn_bases(ImageLayout images, Lrn lrn, const T* x, float* s) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x >= images.vectors()) return;
  const Coordinates at = images.locate(first, threadIdx.x);
  const int64_t i = first + threadIdx.x;
  s[i] = base_at<kRelu>(lrn, x + i, at.c, images.channel_stride);
}

// G: the storage type of g, T or float.
template <bool kRelu, class T, class G>
__global__ void __launch_bounds__(kThreads)
    lrn_backward_any(ImageLayout images, Lrn lrn, const G* g, const T* x, const float* s, T* dx) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x >= images.vectors()) return;
  const Coordinates at = images.locate(first, threadIdx.x);
  const int stride = images.channel_stride;
  const ChannelRange window = window_of(lrn, at.c, lrn.after, lrn.before);
  const int64_t i = first + threadIdx.x;
  float sum = 0.f;
  for (int c = window.low; c < window.high; ++c) {
    const int64_t j = i + int64_t(c - at.c) * stride;
    const float a = kRelu ? relu(float(x[j])) : float(x[j]);
    const Powers p = powers(s[j], lrn.beta);
    sum += float(g[j]) * a * p.minus_beta * p.inverse;
  }
  const float raw = float(x[i]), a = kRelu ? relu(raw) : raw;
  const float d = float(g[i]) * powers(s[i], lrn.beta).minus_beta - 2.f * lrn.beta * lrn.alpha_over_n * a * sum;
  dx[i] = T(kRelu && raw <= 0.f ? 0.f : d);
}

}  // namespace alexnet_kernels::cuda
