// Kernels that test the emulation of cp.async, ldmatrix and mma.sync, and faults that it and the sanitizers have to
// report.
#pragma once

#include "cuda/tensor_core.cuh"
#include "emulation/trial.h"

namespace trials {

namespace cuda = alexnet_kernels::cuda;

// Thread t copies parts 2 t and 2 t + 1 of four elements of `in` to shared memory, as two groups; of every third part
// zeros. Then the threads store all elements that were copied, the last one first; or, of the first groups only, -1 for
// the others.
enum class Copying {
  right,
  first_group,
  without_wait,
  waiting_for_too_few,
  without_barrier,
  never_waiting,
  never_committing,
  to_misaligned,
  from_misaligned,
  outside,
};
template <Copying kKind>
void copies(const Data& d) {
  const int t = int(threadIdx.x), pairs = d.count / 8;
  if (t < pairs) {
    for (int part = 2 * t; part < 2 * t + 2; ++part) {
      const uint32_t to = 16 * part + (kKind == Copying::to_misaligned ? 8 : 0) +
                          (kKind == Copying::outside && part == 2 * pairs - 1 ? 64 : 0);
      cuda::copy_async(to, d.in + 4 * part + (kKind == Copying::from_misaligned), part % 3 != 2);
      if (kKind != Copying::never_committing) cuda::copy_commit();
    }
  }
  constexpr bool kTooFew = kKind == Copying::waiting_for_too_few || kKind == Copying::first_group;
  constexpr bool kNone = kKind == Copying::without_wait || kKind == Copying::never_waiting;
  if (!kNone) cuda::copy_wait<kTooFew ? 1 : 0>();
  if (kKind != Copying::without_barrier) __syncthreads();
  const int at = 8 * pairs - 1 - t;
  if (at >= 0) d.out[t] = kKind == Copying::first_group && at / 4 % 2 ? -1.f : shared_floats()[at];
  __syncthreads();
  if (kKind != Copying::never_waiting) cuda::copy_wait<0>();
}

// Copies a part of each thread to two places in turn, three rounds under way. out: rounds x 4 x threads elements, each
// round's read by the next thread.
template <bool kBarrier>
void ring_of_copies(const Data& d) {
  constexpr int kStages = 3;
  const int t = int(threadIdx.x), threads = int(blockDim.x), rounds = d.count / (4 * threads);
  auto start = [&](int round) {
    if (round < rounds) cuda::copy_async(16 * (round % kStages * threads + t), d.in + 4 * (round * threads + t), true);
    cuda::copy_commit();
  };
  for (int round = 0; round < kStages - 1; ++round) start(round);
  for (int round = 0; round < rounds; ++round) {
    cuda::copy_wait<kStages - 2>();
    if (kBarrier) __syncthreads();
    start(round + kStages - 1);
    const int neighbour = (t + 1) % threads;
    for (int i = 0; i < 4; ++i) {
      d.out[4 * (round * threads + t) + i] = shared_floats()[4 * (round % kStages * threads + neighbour) + i];
    }
  }
}

// A warp's rows of four words, of the lanes in `in`, go to shared memory; lane l loads with the address of row
// options[l].
enum class Loading { right, transposed, without_barrier, misaligned, outside, without_a_lane };
template <Loading kKind>
void matrices(const Data& d) {
  const int t = int(threadIdx.x), lane = t % 32, first = t - lane;
  for (int i = 0; i < 4; ++i) shared_floats()[4 * t + i] = d.in[4 * t + i];
  if (kKind != Loading::without_barrier) __syncwarp();
  uint32_t words[4];
  uint32_t address = 16 * uint32_t(first + d.options[lane]);
  if (kKind == Loading::misaligned && lane == 5) address += 8;
  if (kKind == Loading::outside && lane == 5) address += 16 * blockDim.x;
  if (kKind == Loading::without_a_lane && lane == 5) return;
  kKind == Loading::transposed ? cuda::ldmatrix_transposed(words, address) : cuda::ldmatrix(words, address);
  __syncwarp();
  std::memcpy(d.out + 4 * t, words, 16);
}

// A warp's d += A B^T. `in` of a warp: A [16, k], B [8, k], D [16, 8] with k elements in 32 bytes of T, rounded to T;
// floats with kRound to TF32. out: D.
template <class T, bool kRound>
void product(const Data& d) {
  constexpr int kSum = 32 / int(sizeof(T)), kPair = 4 / int(sizeof(T)), kNumbers = 24 * kSum + 128;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const float* const in = d.in + warp * kNumbers;
  auto word = [&](int row, int column) {
    T pair[kPair];
    for (int i = 0; i < kPair; ++i) pair[i] = T(in[row * kSum + column + i]);
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    return kRound ? cuda::round_tf32(bits) : bits;
  };
  uint32_t a[4], b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) a[i] = word(lane / 4 + i % 2 * 8, kPair * (lane % 4) + i / 2 * kSum / 2);
  for (int i = 0; i < 2; ++i) b[i] = word(16 + lane / 4, kPair * (lane % 4) + i * kSum / 2);
  auto place = [&](int i) { return (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2; };
  for (int i = 0; i < 4; ++i) sums[i] = in[24 * kSum + place(i)];
  cuda::mma<T>(sums, a, b);
  for (int i = 0; i < 4; ++i) d.out[warp * 128 + place(i)] = sums[i];
}

inline void roundings(const Data& d) {
  uint32_t bits;
  std::memcpy(&bits, d.in + threadIdx.x, 4);
  bits = cuda::round_tf32(bits);
  std::memcpy(d.out + threadIdx.x, &bits, 4);
}

inline const std::map<std::string, Kernel>& tensor_core_kernels() {
  static const std::map<std::string, Kernel> all = {
      {"copies", copies<Copying::right>},
      {"copies first group", copies<Copying::first_group>},
      {"copies without wait", copies<Copying::without_wait>},
      {"copies waiting for too few", copies<Copying::waiting_for_too_few>},
      {"copies without barrier", copies<Copying::without_barrier>},
      {"copies never waiting", copies<Copying::never_waiting>},
      {"copies never committing", copies<Copying::never_committing>},
      {"copies to misaligned", copies<Copying::to_misaligned>},
      {"copies from misaligned", copies<Copying::from_misaligned>},
      {"copies outside", copies<Copying::outside>},
      {"ring_of_copies", ring_of_copies<true>},
      {"ring_of_copies without barrier", ring_of_copies<false>},
      {"matrices", matrices<Loading::right>},
      {"matrices transposed", matrices<Loading::transposed>},
      {"matrices without barrier", matrices<Loading::without_barrier>},
      {"matrices misaligned", matrices<Loading::misaligned>},
      {"matrices outside", matrices<Loading::outside>},
      {"matrices without a lane", matrices<Loading::without_a_lane>},
      {"product bf16", product<cuda::bf16, false>},
      {"product fp16", product<cuda::f16, false>},
      {"product tf32", product<float, true>},
      {"product tf32 without rounding", product<float, false>},
      {"roundings", roundings},
  };
  return all;
}

}  // namespace trials
