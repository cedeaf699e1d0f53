// Local response normalisation of neighbouring channels, shared by local_response_norm.cu and lrn_max_pool2d.cu.
//   b[i] = a[i] * s[i]^-beta,  s[i] = k + alpha/n * sum_{j in window(i)} a[j]^2     Krizhevsky et al. 2012, section 3.3
// window(i) = [i - n/2, i + (n-1)/2], cut at the ends of the tower.
//
// The fast kernels take the paper's window of 5 channels and beta = 3/4 in channels_last. The lanes of a warp hold
// consecutive vectors of channels. What a vector needs of the two channels on each side comes from the neighbouring
// lanes by shuffle. Lanes 0 and 31 supply it and do not store: 30 of 32 lanes store, and consecutive warps overlap by
// two vectors. They compute with t = n/alpha s, t[i] = n/alpha k + sum_j a[j]^2, and gain = (n/alpha)^beta:
//   b[i] = gain a[i] t[i]^-beta
//   dx[i] = d[i] - 2 beta a[i] sum_{j: i in window(j)} d[j] a[j] / t[j],  d[i] = gain g[i] t[i]^-beta
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
        least(float(k * double(size) / alpha)),
        gain(float(std::pow(double(size) / alpha, beta))),
        group(channels / groups),
        fast(size == 5 && beta == 0.75 && alpha_over_n > 1e-12f && alpha_over_n < 1e12f && least > 1e-18f &&
             least < 1e30f) {}

  int before, after;  // channels of a window before and after its centre
  float alpha_over_n, beta, k;
  float least, gain;  // the least t: n/alpha k; (n/alpha)^beta
  Divisor group;      // channels of a tower
  // In these ranges t is a normal number, which approximate_rsqrt takes, and b[i] is finite for every finite a.
  bool fast;
};

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

// s^-beta and 1 / s. For beta = 3/4, with t = s^(-1/2): s^-beta = t sqrt(t), 1 / s = t^2.
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

// The vector of a lane, in an array of which each warp stores kStoringLanes vectors and each step of a block kStep.
constexpr int kStep = kStoringLanes * kWarps;
class Lane {
 public:
  __device__ __forceinline__ Lane(int64_t step = blockIdx.x)
      : lane_(int(threadIdx.x % kWarp)), position_(int(threadIdx.x / kWarp) * kStoringLanes + lane_ - 1), step_(step) {}
  // The lane's vector is position() after the first one that the step stores: -1 ... kStep.
  __device__ __forceinline__ int position() const { return position_; }
  __device__ __forceinline__ int64_t vector() const { return step_ * kStep + position_; }
  __device__ __forceinline__ bool valid(int64_t count) const { return vector() >= 0 && vector() < count; }
  __device__ __forceinline__ bool stores(int64_t count) const { return stores() && vector() < count; }
  __device__ __forceinline__ bool stores() const { return lane_ > 0 && lane_ < kWarp - 1; }
  // The remainder of the vector in the block's first step, by 32-bit arithmetic: of a tower's or a pixel's vectors.
  __device__ __forceinline__ int remainder(const Divisor& vectors) const {
    return vectors.remainder(vectors.remainder(int(blockIdx.x)) * kStep + position_ + vectors.value());
  }

 private:
  int lane_, position_;
  int64_t step_;
};
inline int64_t steps_of_lanes(int64_t vectors) {
  return divide_up(vectors, kStep);
}

// The sums over the windows of five channels of a lane's vector: of two pairs of channels, (0, 1), (2, 3), ..., and of
// one channel, which `add` adds. Two windows share two pairs. Beyond the tower a pair is `outside`, a channel 0: first,
// last tell whether the vector begins or ends its tower. Four shuffles; every lane of the warp must call it.
template <int kVec, class Add>
__device__ __forceinline__ void window_sums(const float (&v)[kVec], const float (&own_pairs)[kVec / 2], float outside,
                                            bool first, bool last, float (&sums)[kVec], const Add& add) {
  constexpr unsigned kAll = 0xffffffffu;
  const float pair_before = __shfl_up_sync(kAll, own_pairs[kVec / 2 - 1], 1);
  const float before = __shfl_up_sync(kAll, v[kVec - 1], 1);
  const float pair_after = __shfl_down_sync(kAll, own_pairs[0], 1), after = __shfl_down_sync(kAll, v[0], 1);
  float pairs[kVec / 2 + 2], all[kVec + 2];
  pairs[0] = first ? outside : pair_before;
  pairs[kVec / 2 + 1] = last ? outside : pair_after;
  all[0] = first ? 0.f : before;
  all[kVec + 1] = last ? 0.f : after;
#pragma unroll
  for (int i = 0; i < kVec; ++i) all[i + 1] = v[i];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) pairs[i + 1] = own_pairs[i];
#pragma unroll
  for (int i = 0; i <= kVec / 2; ++i) pairs[i] += pairs[i + 1];  // of channels 2 i - 2 ... 2 i + 1
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    sums[i] = add(pairs[i / 2], all[i + 3]);
    sums[i + 1] = add(pairs[i / 2 + 1], all[i]);
  }
}

// t of a lane's vector, from a. Every lane of the warp must call it.
template <int kVec>
__device__ __forceinline__ void bases(const Lrn& lrn, const float (&a)[kVec], bool first, bool last, float (&t)[kVec]) {
  const float half = 0.5f * lrn.least;
  float pairs[kVec / 2];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) pairs[i] = a[2 * i] * a[2 * i] + half + a[2 * i + 1] * a[2 * i + 1];
  window_sums<kVec>(a, pairs, half, first, last, t, [](float sum, float v) { return sum + v * v; });
}

// The gradient dx of a lane's vector, from a and g. Every lane of the warp must call it.
template <int kVec>
__device__ __forceinline__ void lrn_backward(const Lrn& lrn, const float (&a)[kVec], const float (&g)[kVec], bool first,
                                             bool last, float (&dx)[kVec]) {
  float t[kVec], terms[kVec], pairs[kVec / 2], sums[kVec];
  bases<kVec>(lrn, a, first, last, t);
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const Powers p = fast_powers(t[i]);
    dx[i] = g[i] * (lrn.gain * p.minus_beta);
    terms[i] = dx[i] * (a[i] * p.inverse);
  }
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) pairs[i] = terms[2 * i] + terms[2 * i + 1];
  window_sums<kVec>(terms, pairs, 0.f, first, last, sums, [](float sum, float v) { return sum + v; });
#pragma unroll
  for (int i = 0; i < kVec; ++i) dx[i] -= 2.f * 0.75f * a[i] * sums[i];
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
