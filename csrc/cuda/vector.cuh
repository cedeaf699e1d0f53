// Vectors of consecutive elements: loads and stores of 16 bytes a thread (LDG.128, STG.128), converted to and from
// float.
#pragma once

#include "runtime.cuh"

namespace alexnet_kernels::cuda {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

// kCount consecutive elements, aligned for accesses of at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};

// Elements in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

template <int kCount, class T>
__device__ __forceinline__ void load(const T* p, float (&out)[kCount]) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(p);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = float(pack.value[i]);
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* p, const float (&in)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#if defined(__CUDA_ARCH__)
    // One instruction (cvt.rn.bf16x2, cvt.rn.f16x2) rounds two values.
    if constexpr (kCount % 2 == 0 && std::is_same_v<T, bf16>) {
      if (i % 2 == 0) reinterpret_cast<__nv_bfloat162*>(pack.value)[i / 2] = __floats2bfloat162_rn(in[i], in[i + 1]);
      continue;
    }
    if constexpr (kCount % 2 == 0 && std::is_same_v<T, f16>) {
      if (i % 2 == 0) reinterpret_cast<__half2*>(pack.value)[i / 2] = __floats2half2_rn(in[i], in[i + 1]);
      continue;
    }
#endif
    pack.value[i] = T(in[i]);
  }
  *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
}

// kCount consecutive elements as they are in memory, in words where they fill some: the compiler splits a Pack that two
// branches define into single elements.
template <class T, int kCount>
struct Packed {
  static constexpr int kPerWord = int(sizeof(T)) * kCount % 4 == 0 ? 4 / int(sizeof(T)) : 1;
  using Word = std::conditional_t<int(sizeof(T)) * kCount % 4 == 0, uint32_t, T>;

  __device__ __forceinline__ void load(const T* p) {
    const auto pack = *reinterpret_cast<const Pack<Word, kCount / kPerWord>*>(p);
#pragma unroll
    for (int i = 0; i < kCount / kPerWord; ++i) word[i] = pack.value[i];
  }
  // Element i: of bytes as a number, of others as a float.
  __device__ __forceinline__ auto operator[](int i) const {
    if constexpr (!std::is_same_v<Word, uint32_t>) {
      if constexpr (sizeof(T) == 1) {
        return int(word[i]);
      } else {
        return float(word[i]);
      }
    } else if constexpr (sizeof(T) == 1) {
      return int(__byte_perm(word[i / 4], 0, 0x4440 + i % 4));
    } else if constexpr (std::is_same_v<T, bf16>) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else if constexpr (sizeof(T) == 2) {
      return float(T(uint16_t(word[i / 2] >> (16 * (i % 2))), T::from_bits()));
    } else {
      return __uint_as_float(word[i]);
    }
  }

  Word word[kCount / kPerWord];
};

// Clears the elements of `given` where those of `gate` are at most 0.
template <class T, int kCount>
__device__ __forceinline__ void clear_unless_positive(Packed<T, kCount>& given, const Packed<T, kCount>& gate) {
#pragma unroll
  for (int i = 0; i < kCount / Packed<T, kCount>::kPerWord; ++i) {
#if defined(__CUDA_ARCH__)
    if constexpr (Packed<T, kCount>::kPerWord == 2) {
      using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
      given.word[i] &= __hgtu2_mask(reinterpret_cast<const Pair&>(gate.word[i]), Pair{});
      continue;
    }
#endif
    constexpr int kPerWord = Packed<T, kCount>::kPerWord;
#pragma unroll
    for (int j = 0; j < kPerWord; ++j) {
      if (gate[i * kPerWord + j] > 0.f || gate[i * kPerWord + j] != gate[i * kPerWord + j]) continue;
      if constexpr (kPerWord == 2) {
        given.word[i] &= j == 0 ? 0xffff0000u : 0xffffu;
      } else {
        given.word[i] = {};
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void load_bytes(const uint8_t* p, int (&out)[kCount]) {
  const auto pack = *reinterpret_cast<const Pack<uint8_t, kCount>*>(p);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = pack.value[i];
}

template <int kCount>
__device__ __forceinline__ void store_bytes(uint8_t* p, const int (&in)[kCount]) {
  Pack<uint8_t, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = uint8_t(in[i]);
  *reinterpret_cast<Pack<uint8_t, kCount>*>(p) = pack;
}

// Bytes that are packed in words.
template <int kWords>
__device__ __forceinline__ void store_words(uint8_t* p, const uint32_t (&in)[kWords]) {
  Pack<uint32_t, kWords> pack;
#pragma unroll
  for (int i = 0; i < kWords; ++i) pack.value[i] = in[i];
  *reinterpret_cast<Pack<uint32_t, kWords>*>(p) = pack;
}

// max(v, least). NaN is kept. One instruction.
__device__ __forceinline__ float at_least(float v, float least) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(least));
  return v;
#else
  return v <= least ? least : v;
#endif
}

// ReLU as in torch.
__device__ __forceinline__ float relu(float v) {
  return at_least(v, 0.f);
}

// Whether every pointer is aligned to 16 bytes. Null pointers count as aligned.
template <class... Pointers>
bool aligned(const Pointers*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// Calls body with a value of the storage type.
template <class Body>
auto for_dtype(const Tensor& t, const Body& body) -> decltype(body(float{})) {
  switch (dtype_of(t)) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: STD_TORCH_CHECK(false, "alexnet_kernels: the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Calls body with std::true_type or std::false_type.
template <class Body>
void for_bool(bool value, const Body& body) {
  value ? body(std::true_type{}) : body(std::false_type{});
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace alexnet_kernels::cuda
