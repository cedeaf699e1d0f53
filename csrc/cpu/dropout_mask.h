// Dropout of consecutive elements, shared by dropout.cpp and linear_relu_dropout.cpp.
// An element is dropped when its Philox word is below threshold = round(p * 2^32), else multiplied by scale.
#pragma once

#include "common/philox.h"
#include "vec.h"

namespace alexnet_kernels::cpu {

struct Dropout {
  uint64_t threshold;  // up to 2^32
  double scale;
  uint64_t seed, offset;
};

inline Dropout make_dropout(double p, double scale, int64_t seed, int64_t offset) {
  return {uint64_t(p * 4294967296.0 + 0.5), scale, uint64_t(seed), uint64_t(offset)};
}

// The index of element i of row r.
inline uint64_t index_of(int64_t base, int64_t row_stride, int64_t r, int64_t i) {
  return uint64_t(base) + uint64_t(r) * uint64_t(row_stride) + uint64_t(i);
}

namespace ALEXNET_ISA {

constexpr int kQuads = kVecBytes / 8;  // counters of one vector, each word in the low half of a 64-bit lane
using U32 = Vec<uint32_t>;
using U64 = Vec<uint64_t>;

// The 64-bit products of the lanes' low halves and m (vpmuludq).
inline U64 multiply_low(U64 a, uint32_t m) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// The words of elements 4 * quad ... 4 * (quad + kQuads) - 1, in order.
inline void philox_words(const Dropout& d, uint64_t quad, uint32_t* words) {
  U64 c0;
  for (int i = 0; i < kQuads; ++i) c0[i] = quad + i;
  // The high half of each lane is garbage: only low halves are read.
  U64 c1 = c0 >> 32, c2 = U64{} + d.offset, c3 = c2 >> 32;
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    const U64 p0 = multiply_low(c0, Philox::kMultiplier0), p1 = multiply_low(c2, Philox::kMultiplier1);
    c0 = (p1 >> 32) ^ c1 ^ uint64_t(k0);
    c2 = (p0 >> 32) ^ c3 ^ uint64_t(k1);
    c1 = p1;
    c3 = p0;
    k0 += Philox::kWeyl0;
    k1 += Philox::kWeyl1;
  }
  const U64 first = (c0 & 0xffffffffu) | (c1 << 32), second = (c2 & 0xffffffffu) | (c3 << 32);
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(words, _mm512_permutex2var_epi64((__m512i)first, low, (__m512i)second));
  _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64((__m512i)first, high, (__m512i)second));
#elif defined(__AVX2__)
  const __m256i even = _mm256_unpacklo_epi64((__m256i)first, (__m256i)second);
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)first, (__m256i)second);
  _mm256_storeu_si256((__m256i*)words, _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256((__m256i*)(words + 8), _mm256_permute2x128_si256(even, odd, 0x31));
#else
  for (int i = 0; i < kQuads; ++i) {
    const uint64_t pair[2] = {first[i], second[i]};
    for (int j = 0; j < 4; ++j) words[4 * i + j] = uint32_t(pair[j / 2] >> (j % 2 * 32));
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

// Calls body(first, n, words) over `count` elements, the first of which has index `begin`; `first` counts from there.
// Indices wrap around at 2^64.
template <class Body>
inline void for_words(const Dropout& d, uint64_t begin, int64_t count, const Body& body) {
  constexpr int64_t kSpan = 4 * kQuads;
  uint32_t words[kSpan];
  for (int64_t first = 0; first < count;) {
    const uint64_t index = begin + uint64_t(first);
    philox_words(d, index / 4, words);
    const int64_t skip = int64_t(index % 4), n = std::min(kSpan - skip, count - first);
    body(first, n, words + skip);
    first += n;
  }
}

// y[i] = dropout(x[i]), or dropout(relu(x[i])) with kRelu; element i < count has index begin + i. y may be x.
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
  for_words(d, begin, count, [&](int64_t first, int64_t n, const uint32_t* words) {
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
}  // namespace alexnet_kernels::cpu
