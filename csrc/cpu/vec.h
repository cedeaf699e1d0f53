// Vectors of the instruction set being compiled. Vec<float> and Vec<double> fill one register; load and store convert
// from and to the storage types. Arithmetic, comparison and `mask ? a : b` come from the compiler's vector extensions.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace alexnet_kernels::cpu {
namespace ALEXNET_ISA {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// The type a storage type is computed in.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, int kCount>
struct VecOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kCount)));
};
template <class A>
constexpr int kLanes = kVecBytes / int(sizeof(A));
template <class A>
using Vec = typename VecOf<A, kLanes<A>>::type;
// Integers as wide as a lane: the type of a comparison of two Vec<A>.
template <class A>
using lane_int_t = std::conditional_t<sizeof(A) == 2, int16_t, std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
template <class A>
using IntVec = Vec<lane_int_t<A>>;

template <class A>
inline Vec<A> splat(A value) {
  return Vec<A>{} + value;
}

template <class V, class P>
inline V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// Unsigned integers of 1 or 2 bytes to lanes of 4 or 8 bytes (vpmovzx), and back. Compilers do not select these
// instructions for __builtin_convertvector.
template <class Wide, class Narrow>
inline Vec<Wide> widen(const Narrow* p) {
  [[maybe_unused]] constexpr int from = sizeof(Narrow), to = sizeof(Wide);
#if defined(__AVX512F__)
  if constexpr (from == 2 && to == 4) return (Vec<Wide>)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  if constexpr (from == 1 && to == 4) return (Vec<Wide>)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (from == 1 && to == 8) return (Vec<Wide>)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__AVX2__)
  if constexpr (from == 2 && to == 4) return (Vec<Wide>)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (from == 1 && to == 4) return (Vec<Wide>)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (from == 1 && to == 8) return (Vec<Wide>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load_raw<int>(p)));
#else
  Vec<Wide> v;
  for (int i = 0; i < int(sizeof(v) / to); ++i) v[i] = p[i];
  return v;
#endif
}

template <class Narrow, class V>
inline void narrow(Narrow* p, V v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) {
    __m256i words = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    if constexpr (sizeof(Narrow) == 1) words = _mm256_packus_epi16(words, words);
    // packus works on 128-bit halves: the first quarter of each half holds its four lanes.
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    const __m128i all = sizeof(Narrow) == 2 ? _mm_unpacklo_epi64(low, high) : _mm_unpacklo_epi32(low, high);
    __builtin_memcpy(p, &all, sizeof(Narrow) * 8);
    return;
  }
#endif
  constexpr int n = int(sizeof(v) / sizeof(v[0]));
  const auto values = __builtin_convertvector(v, typename VecOf<Narrow, n>::type);
  __builtin_memcpy(p, &values, sizeof(values));
}

template <class T>
inline Vec<acc_t<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    return (Vec<float>)(widen<uint32_t>(reinterpret_cast<const uint16_t*>(p)) << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = float(p[i]);
    return v;
#endif
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    return __builtin_convertvector(widen<int32_t>(p), Vec<float>);
  } else {
    return load_raw<Vec<T>>(p);
  }
}

template <class T>
inline void store(T* p, Vec<acc_t<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    auto bits = (Vec<uint32_t>)v;
    auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    auto is_nan = (v != v);
    Vec<uint32_t> nan = Vec<uint32_t>{} + 0x7fc0u;
    rounded = is_nan ? nan : rounded;
    narrow(reinterpret_cast<uint16_t*>(p), rounded);
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = f16(v[i]);
#endif
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}

// The first `count` lanes; the others are zero.
template <class T>
inline Vec<acc_t<T>> load_partial(const T* p, int count) {
  alignas(64) T lanes[kLanes<acc_t<T>>];
  std::memset((void*)lanes, 0, sizeof(lanes));
  std::memcpy((void*)lanes, p, count * sizeof(T));
  return load(lanes);
}

template <class T>
inline void store_partial(T* p, Vec<acc_t<T>> v, int count) {
  alignas(64) T lanes[kLanes<acc_t<T>>];
  store(lanes, v);
  std::memcpy((void*)p, lanes, count * sizeof(T));
}

// Positions in a pooling window are stored as bytes.
template <class A>
inline IntVec<A> load_bytes(const uint8_t* p) {
  return widen<lane_int_t<A>>(p);
}
template <class A>
inline void store_bytes(uint8_t* p, IntVec<A> v) {
  narrow(p, v);
}

// Calls body(offset, count) over [0, n), a vector at a time. Full vectors pass the count as a compile-time constant.
template <class A, class Body>
inline void for_lanes(int64_t n, const Body& body) {
  constexpr int step = kLanes<A>;
  int64_t i = 0;
  for (; i + step <= n; i += step) body(i, std::integral_constant<int, step>{});
  if (i < n) body(i, int(n - i));
}

// Prefetches the cache line kBytes after p. The hardware prefetcher of Zen 4 detects the rows of windows late: with
// this prefetch, max_pool2d of large images takes two thirds of the time, half in bfloat16.
template <int kBytes = 2048>
inline void prefetch(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kBytes);
}

template <class T, class Count>
inline Vec<acc_t<T>> load_n(const T* p, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    return load_partial(p, count);
  } else {
    return load(p);
  }
}
template <class T, class Count>
inline void store_n(T* p, Vec<acc_t<T>> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    store_partial(p, v, count);
  } else {
    store(p, v);
  }
}
template <class A, class Count>
inline IntVec<A> load_bytes_n(const uint8_t* p, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    uint8_t lanes[kLanes<A>] = {};
    std::memcpy(lanes, p, count);
    return load_bytes<A>(lanes);
  } else {
    return load_bytes<A>(p);
  }
}
template <class A, class Count>
inline void store_bytes_n(uint8_t* p, IntVec<A> v, Count count) {
  if constexpr (std::is_same_v<Count, int>) {
    uint8_t lanes[kLanes<A>];
    store_bytes<A>(lanes, v);
    std::memcpy(p, lanes, count);
  } else {
    store_bytes<A>(p, v);
  }
}

inline Vec<float> vsqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
inline Vec<double> vsqrt(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// 1 / sqrt(v) within the error of a division, also for 0 and infinity.
template <class V>
inline V vrsqrt(V v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float>>) {
    const V guess = (V)_mm512_rsqrt14_ps((__m512)v);
    const V better = guess * (1.5f - 0.5f * v * guess * guess);  // Newton step; NaN where the guess is 0 or infinite
    return better != better ? guess : better;
  }
#endif
  return 1 / vsqrt(v);
}

// ReLU as in torch: NaN is kept.
template <class V>
inline V vrelu(V v) {
  return v <= V{} ? V{} : v;
}

// Whether any lane of a comparison is true.
template <class V>
inline bool any(V mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t words[sizeof(V) / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof(V));
  for (uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// Calls body with a value of the storage type that `dtype` names.
template <class Body>
inline void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu
