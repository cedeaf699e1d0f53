// Dropout over runs of consecutive elements, shared by dropout.cpp and linear_relu_dropout.cpp.
// An element is dropped when its Philox word is below threshold = round(p * 2^32), else multiplied by scale.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

namespace alexnet_kernels {

struct Dropout {
  uint64_t threshold;  // up to 2^32
  double scale;
  uint64_t seed, offset;
};

inline Dropout make_dropout(double p, double scale, int64_t seed, int64_t offset) {
  return {uint64_t(p * 4294967296.0 + 0.5), scale, uint64_t(seed), uint64_t(offset)};
}

namespace ALEXNET_ISA {

constexpr int kQuads = kVecBytes / 4;  // counters worked on together
using U32 = Vec<uint32_t>;

// The high and low halves of a * m, lane by lane.
inline void multiply(U32 a, uint32_t m, U32& high, U32& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  low = (U32)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
  high = (U32)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(int(m));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  low = (U32)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (U32)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kQuads; ++i) {
    const uint64_t product = uint64_t(a[i]) * m;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
#endif
}

// The words of 4 * kQuads elements from element 4 * quad on, in the elements' order.
inline void philox_words(const Dropout& d, uint64_t quad, uint32_t* words) {
  U32 c0, c1;
  for (int i = 0; i < kQuads; ++i) {
    c0[i] = uint32_t(quad + i);
    c1[i] = uint32_t((quad + i) >> 32);
  }
  U32 c2 = U32{} + uint32_t(d.offset), c3 = U32{} + uint32_t(d.offset >> 32);
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    U32 high0, low0, high1, low1;
    multiply(c0, Philox::kMultiplier0, high0, low0);
    multiply(c2, Philox::kMultiplier1, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low1;
    c3 = low0;
    k0 += Philox::kWeyl0;
    k1 += Philox::kWeyl1;
  }
  // Lane i of (c0, c1, c2, c3) belongs to elements 4 i ... 4 i + 3: transpose.
#if defined(__AVX512F__)
  const __m512i a = _mm512_unpacklo_epi32((__m512i)c0, (__m512i)c1), b = _mm512_unpackhi_epi32((__m512i)c0, (__m512i)c1);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)c2, (__m512i)c3), e = _mm512_unpackhi_epi32((__m512i)c2, (__m512i)c3);
  const __m512i q0 = _mm512_unpacklo_epi64(a, c), q1 = _mm512_unpackhi_epi64(a, c);
  const __m512i q2 = _mm512_unpacklo_epi64(b, e), q3 = _mm512_unpackhi_epi64(b, e);
  // q_r holds elements of counters r, r + 4, r + 8, r + 12, one in each 128-bit part.
  const __m512i s0 = _mm512_shuffle_i32x4(q0, q1, 0x44), s1 = _mm512_shuffle_i32x4(q0, q1, 0xEE);
  const __m512i s2 = _mm512_shuffle_i32x4(q2, q3, 0x44), s3 = _mm512_shuffle_i32x4(q2, q3, 0xEE);
  _mm512_storeu_si512(words, _mm512_shuffle_i32x4(s0, s2, 0x88));
  _mm512_storeu_si512(words + 16, _mm512_shuffle_i32x4(s0, s2, 0xDD));
  _mm512_storeu_si512(words + 32, _mm512_shuffle_i32x4(s1, s3, 0x88));
  _mm512_storeu_si512(words + 48, _mm512_shuffle_i32x4(s1, s3, 0xDD));
#else
  for (int i = 0; i < kQuads; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
#endif
}

template <class Count>
inline U32 load_words(const uint32_t* p, Count count) {
  U32 v{};
  if constexpr (std::is_same_v<Count, int>) {
    std::memcpy(&v, p, count * sizeof(uint32_t));
  } else {
    v = load_raw<U32>(p);
  }
  return v;
}

// Calls body(first, count, words) over [begin, end) of the elements' indices; body reads words[0 .. count).
template <class Body>
inline void for_words(const Dropout& d, uint64_t begin, uint64_t end, const Body& body) {
  constexpr uint64_t kSpan = 4 * kQuads;
  uint32_t words[kSpan];
  for (uint64_t first = begin; first < end;) {
    philox_words(d, first / 4, words);
    const uint64_t skip = first % 4, count = std::min(kSpan - skip, end - first);
    body(first - begin, int64_t(count), words + skip);
    first += count;
  }
}

// y[i] = dropout(relu(x[i]) or x[i]), i = 0 ... count - 1; element i has index begin + i. y may be x.
template <bool kRelu, class T>
inline void dropout_run(const Dropout& d, uint64_t begin, int64_t count, const T* x, T* y) {
  using A = acc_t<T>;
  const A scale = A(d.scale);
  if (d.threshold == 0) {
    for_lanes<A>(count, [&](int64_t i, auto lanes) {
      const Vec<A> v = load_n(x + i, lanes);
      store_n(y + i, (kRelu ? vrelu(v) : v) * scale, lanes);
    });
    return;
  }
  if (d.threshold >> 32) {
    std::memset((void*)y, 0, count * sizeof(T));
    return;
  }
  const uint32_t threshold = uint32_t(d.threshold);
  for_words(d, begin, begin + count, [&](int64_t first, int64_t n, const uint32_t* words) {
    if constexpr (std::is_same_v<A, double>) {
      for (int64_t i = 0; i < n; ++i) {
        const double v = x[first + i];
        y[first + i] = words[i] < threshold ? 0 : (kRelu && v <= 0 ? 0 : v) * scale;
      }
    } else {
      for_lanes<A>(n, [&](int64_t i, auto lanes) {
        const auto drop = load_words(words + i, lanes) < threshold;
        const Vec<A> v = load_n(x + first + i, lanes);
        store_n(y + first + i, drop ? Vec<A>{} : (kRelu ? vrelu(v) : v) * scale, lanes);
      });
    }
  });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels
