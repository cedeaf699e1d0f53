// Local response normalisation of neighbouring channels, shared by local_response_norm.cu and lrn_max_pool2d.cu.
//   b[i] = a[i] * s[i]^-beta,  s[i] = k + alpha/n * sum_{j in window(i)} a[j]^2     Krizhevsky et al. 2012, section 3.3
// window(i) = [i - n/2, i + (n-1)/2], cut at the ends of the tower.
//
// The fast kernels take the paper's window of 5 channels and beta = 3/4 in channels_last. A lane holds a vector of
// channels of one pixel, its neighbours hold the channels before and after: what a window reaches outside the vector
// comes by shuffle. A warp's lanes hold consecutive vectors, and its first and last lane lend theirs to the windows of
// the others only: neighbouring warps overlap by two vectors.
#pragma once

#include "images.cuh"

namespace alexnet_kernels {

struct Lrn {
  Lrn(int64_t size, double alpha, double beta, double k, int64_t groups, int64_t channels)
      : before(int(std::min(size / 2, channels))),
        after(int(std::min((size - 1) / 2, channels))),
        alpha_over_n(float(alpha / double(size))),
        beta(float(beta)),
        k(float(k)),
        group(channels / groups),
        // Then no base is subnormal, which approximate_rsqrt takes for zero.
        fast(size == 5 && beta == 0.75 && alpha >= 0 && k > 1e-30) {}

  int before, after;  // channels of a window before and after its own
  float alpha_over_n, beta, k;
  Divisor group;  // channels of a tower
  bool fast;
};

constexpr int kReach = 2;  // of the fast kernels' window on each side
constexpr int kWarp = 32, kStored = kWarp - 2, kWarps = kThreads / kWarp;

// One instruction each, within two units in the last place, for numbers that aren't subnormal.
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

// s^-beta and 1 / s. beta = 3/4 needs square roots only.
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

// A lane's vector in an array of `count` vectors, kStored of which a warp stores.
class Lane {
 public:
  __device__ __forceinline__ Lane()
      : lane_(int(threadIdx.x % kWarp)), ahead_(int(threadIdx.x / kWarp) * kStored + lane_ - 1) {}
  // The first vector that the block stores, and how far after it the lane's is: -1 ... kStored * kWarps.
  __device__ __forceinline__ int64_t block_first() const { return int64_t(blockIdx.x) * (kStored * kWarps); }
  __device__ __forceinline__ int ahead() const { return ahead_; }
  __device__ __forceinline__ int64_t vector() const { return block_first() + ahead_; }
  // The place of the lane's vector, which exists. The long division is the same for the whole block.
  __device__ __forceinline__ Place locate(const Images& images) const {
    const int64_t base = max(block_first() - 1, int64_t(0));
    return images.locate(base, int(vector() - base));
  }
  __device__ __forceinline__ bool exists(int64_t count) const { return vector() >= 0 && vector() < count; }
  __device__ __forceinline__ bool stores(int64_t count) const {
    return lane_ > 0 && lane_ < kWarp - 1 && vector() < count;
  }
  // vector() modulo the vectors of a tower, in 32 bits.
  __device__ __forceinline__ int in_tower(const Divisor& tower) const {
    return tower.remainder(tower.remainder(int(blockIdx.x)) * (kStored * kWarps) + ahead_ + tower.value());
  }

 private:
  int lane_, ahead_;
};
inline int64_t blocks_of_lanes(int64_t vectors) {
  return divide_up(vectors, kStored * kWarps);
}

// Fills `row`, whose middle holds the lane's channels, with the kReach channels before and after them; zero beyond the
// tower. Every lane of the warp must call it.
template <int kVec>
__device__ __forceinline__ void exchange(float (&row)[kVec + 2 * kReach], bool first, bool last) {
#pragma unroll
  for (int i = 0; i < kReach; ++i) {
    const float before = __shfl_up_sync(0xffffffffu, row[kVec + i], 1);
    const float after = __shfl_down_sync(0xffffffffu, row[kReach + i], 1);
    // row[kVec + i] is read by the next lane before row[kReach + kVec + i] is written: kVec >= kReach.
    row[i] = first ? 0.f : before;
    row[kReach + kVec + i] = last ? 0.f : after;
  }
}

// The sums over windows of five: pairs are added once.
template <int kCount>
__device__ __forceinline__ void window_sums(const float (&v)[kCount + 2 * kReach], float (&sums)[kCount]) {
  static_assert(kReach == 2);
  float pairs[kCount + 2];
#pragma unroll
  for (int i = 0; i < kCount + 2; ++i) pairs[i] = v[i] + v[i + 1];
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = pairs[i] + pairs[i + 2] + v[i + 4];
}

// s for each of kCount consecutive channels, from theirs and their neighbours' activations.
template <int kCount>
__device__ __forceinline__ void bases(const Lrn& lrn, const float (&a)[kCount + 2 * kReach], float (&s)[kCount]) {
  float squares[kCount + 2 * kReach], sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount + 2 * kReach; ++i) squares[i] = a[i] * a[i];
  window_sums<kCount>(squares, sums);
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = lrn.k + lrn.alpha_over_n * sums[i];
}

// dx[i] = g[i] s[i]^-beta - 2 beta alpha/n a[i] * sum_{j: i in window(j)} g[j] a[j] s[j]^(-beta-1)
// a: the lane's activations and their neighbours'; g and dx: the lane's alone. Every lane of the warp must call it.
template <int kVec>
__device__ __forceinline__ void lrn_backward(const Lrn& lrn, const float (&a)[kVec + 2 * kReach],
                                             const float (&g)[kVec], bool first, bool last, float (&dx)[kVec]) {
  float s[kVec], terms[kVec + 2 * kReach];
  bases<kVec>(lrn, a, s);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const Powers p = fast_powers(s[i]);
    dx[i] = g[i] * p.minus_beta;
    terms[kReach + i] = dx[i] * a[kReach + i] * p.inverse;
  }
  exchange<kVec>(terms, first, last);
  const float factor = -2.f * 0.75f * lrn.alpha_over_n;
  float sums[kVec];
  window_sums<kVec>(terms, sums);
#pragma unroll
  for (int i = 0; i < kVec; ++i) dx[i] += factor * a[kReach + i] * sums[i];
}

// The general kernels take any window and beta, and any memory format: a thread holds one channel of one pixel.
// The channels [low, high) around channel c that the window [c - before, c + after] has, cut at the ends of its tower.
struct Span {
  int low, high;
};
__device__ __forceinline__ Span span_of(const Lrn& lrn, int c, int before, int after) {
  const int tower = lrn.group.quotient(c) * lrn.group.value();
  return {max(c - before, tower), min(c + after + 1, tower + lrn.group.value())};
}

// s of channel c, whose activation is at `p`; neighbouring channels are `stride` elements apart.
template <bool kRelu, class T>
__device__ __forceinline__ float base_at(const Lrn& lrn, const T* p, int c, int stride) {
  const Span span = span_of(lrn, c, lrn.before, lrn.after);
  float sum = 0.f;
  for (int j = span.low; j < span.high; ++j) {
    const float a = kRelu ? relu(float(p[int64_t(j - c) * stride])) : float(p[int64_t(j - c) * stride]);
    sum += a * a;
  }
  return lrn.k + lrn.alpha_over_n * sum;
}

// Backward in two steps: lrn_bases stores s in float, lrn_backward_any gathers the terms of the windows over a channel.
template <bool kRelu, class T>
__global__ void __launch_bounds__(kThreads) lrn_bases(Images images, Lrn lrn, const T* x, float* s) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x >= images.vectors()) return;
  const Place at = images.locate(first, threadIdx.x);
  const int64_t i = first + threadIdx.x;
  s[i] = base_at<kRelu>(lrn, x + i, at.c, images.channels_last ? 1 : images.pixels.value());
}

// G: the storage type of g, x's or float.
template <bool kRelu, class T, class G>
__global__ void __launch_bounds__(kThreads)
    lrn_backward_any(Images images, Lrn lrn, const G* g, const T* x, const float* s, T* dx) {
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x >= images.vectors()) return;
  const Place at = images.locate(first, threadIdx.x);
  const int stride = images.channels_last ? 1 : images.pixels.value();
  const Span span = span_of(lrn, at.c, lrn.after, lrn.before);
  const int64_t i = first + threadIdx.x;
  float sum = 0.f;
  for (int c = span.low; c < span.high; ++c) {
    const int64_t j = i + int64_t(c - at.c) * stride;
    const float a = kRelu ? relu(float(x[j])) : float(x[j]);
    const Powers p = powers(s[j], lrn.beta);
    sum += float(g[j]) * a * p.minus_beta * p.inverse;
  }
  const float raw = float(x[i]), a = kRelu ? relu(raw) : raw;
  const float d = float(g[i]) * powers(s[i], lrn.beta).minus_beta - 2.f * lrn.beta * lrn.alpha_over_n * a * sum;
  dx[i] = T(kRelu && raw <= 0.f ? 0.f : d);
}

}  // namespace alexnet_kernels
