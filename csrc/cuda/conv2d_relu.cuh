// What the package's own convolution kernels share: their arguments, and where a warp's sums begin and end.
#pragma once

#include <cmath>
#include <string>

#include "vector.cuh"

namespace alexnet_kernels::cuda {

// The operator's last argument; alexnet_kernels/ops/conv2d_relu.py has the same numbers.
enum Algorithm : int64_t {
  kLibrary,  // torch's convolution
  kOwn,      // the best of the following that takes the call, else torch's convolution
  kMma,      // convolve_mma
  kWgmma,    // convolve_wgmma
};

// y = relu(conv2d(x, w) + bias) in channels_last: x [N, H, W, groups C], w [groups K, R, S, C], y [N, OH, OW, groups
// K], without gaps. y is 0 where the mask, which is like y, is at most 0. All sizes are positive; x, w and y have fewer
// than 2^31 elements.
struct Convolution {
  Tensor x, w, y;
  std::optional<Tensor> bias, mask;
  int N, H, W, C, groups, K, R, S, OH, OW;
  int stride[2], padding[2];
  bool relu;
};

// conv2d_relu_sm90a.cu: stride 1, bfloat16 and float16, C and K of multiples of 8, aligned addresses, on compute
// capability 9.0. Null once it is launched, else why it does not take the convolution.
const char* convolve_wgmma(const Convolution& c, const OnDevice& device);

// conv2d_relu_sm80.cu: any; float32 as TF32.
void convolve_mma(const Convolution& c, const OnDevice& device);

// Why no kernel of wgmma runs on the current device; empty if they do.
inline std::string why_no_wgmma() {
#ifdef ALEXNET_SM90A
  const int capability = compute_capability();
  if (capability == 90) return "";
  return "it runs on compute capability 9.0, not " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10);
#else
  return "this library was not built for compute capability 9.0a";
#endif
}

// Sums of mma.sync and wgmma: four threads of a warp hold a row, each elements 2 t and 2 t + 1 of every block of 8,
// where t = lane % 4. `vectors`: counts of elements and addresses are multiples of 16 bytes.

// What a thread's sums begin with: the bias, or zeros beyond the last filter and where there is no bias.
template <class T>
struct FirstSums {
  const T* bias;  // of the thread's pair in block 0
  int count;      // filters from there on; none without a bias
  bool vectors;

  // `bias` of the row's first filter, which `filters` follow.
  __device__ __forceinline__ FirstSums(const T* bias, int filters, bool vectors)
      : bias(bias + 2 * (threadIdx.x % 4)),
        count(bias == nullptr ? 0 : filters - 2 * int(threadIdx.x % 4)),
        vectors(vectors) {}

  // The pair of a block.
  __device__ __forceinline__ void load(int block, float (&pair)[2]) const {
    const int at = 8 * block;
    pair[0] = pair[1] = 0.f;
    if (vectors) {
      if (at < count) cuda::load<2>(bias + at, pair);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (at + i < count) pair[i] = float(bias[at + i]);
      }
    }
  }
};

// Of a row, max(sum, least): ReLU's least is 0, no ReLU's -infinity. NaN is kept. Then 0 where a mask is at most 0.
struct RowEpilogue {
  float least;
  int count;  // elements of the row to store
  bool vectors;

  // Stores kBlocks blocks, a multiple of 4, to y; sum(block, i) is element i = 0, 1 of this thread's pair. Nothing is
  // stored where y is null, as the four threads of a row have it alike. All lanes of the warp call it. `mask`: the
  // row's, or null.
  template <int kBlocks, class T, class Sum>
  __device__ __forceinline__ void store(T* y, const T* mask, const Sum& sum) const {
    mask == nullptr ? store_row<false, kBlocks>(y, mask, sum) : store_row<true, kBlocks>(y, mask, sum);
  }

 private:
  template <bool kMasked, int kBlocks, class T, class Sum>
  __device__ __forceinline__ void store_row(T* y, const T* mask, const Sum& sum) const {
    static_assert(kBlocks % 4 == 0);
    const int t = int(threadIdx.x) % 4;
#pragma unroll
    for (int block = 0; block < kBlocks; block += 4) {
      float value[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) value[j][i] = at_least(sum(block + j, i), least);
      }
      if constexpr (sizeof(T) == 2) {
        if (vectors) {
          store_vector<kMasked>(y, mask, 8 * (block + t), value);
          continue;
        }
      }
      if (y == nullptr) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 8 * (block + j) + 2 * t;
        if constexpr (kMasked) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (at + i < count && float(mask[at + i]) <= 0.f) value[j][i] = 0.f;
          }
        }
        if (vectors) {
          if (at < count) cuda::store<2>(y + at, value[j]);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (at + i < count) y[at + i] = T(value[j][i]);
          }
        }
      }
    }
  }

  // Transposes the 4 x 4 pairs of the row's threads and blocks, by exchanges with the neighbour and with the next but
  // one, and stores 16 bytes: block t of the four.
  template <bool kMasked, class T>
  __device__ __forceinline__ void store_vector(T* y, const T* mask, int at, const float (&value)[4][2]) const {
    const int t = int(threadIdx.x) % 4;
    uint32_t pair[4], from[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Pack<T, 2> two;
      cuda::store<2>(two.value, value[j]);
      pair[j] = reinterpret_cast<const uint32_t&>(two);
    }
    const bool odd = t % 2 != 0, high = t / 2 != 0;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? pair[j] : pair[j + 1], 1);
      from[j] = odd ? other : pair[j];
      from[j + 1] = odd ? pair[j + 1] : other;
    }
    // Now from[2 a + b] is the pair of thread 2 (t / 2) + b in block 2 a + t % 2.
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? from[b] : from[2 + b], 2);
      pair[b] = high ? other : from[b];
      pair[2 + b] = high ? from[2 + b] : other;
    }
    if (y == nullptr || at >= count) return;
    Packed<T, 8> row{{pair[0], pair[1], pair[2], pair[3]}};
    if constexpr (kMasked) {
      Packed<T, 8> gate;
      gate.load(mask + at);
      clear_unless_positive(row, gate);
    }
    *reinterpret_cast<Pack<uint32_t, 4>*>(y + at) = {row.word[0], row.word[1], row.word[2], row.word[3]};
  }
};

// RowEpilogue's least.
inline float least_of(const Convolution& c) {
  return c.relu ? 0.f : -INFINITY;
}

}  // namespace alexnet_kernels::cuda
