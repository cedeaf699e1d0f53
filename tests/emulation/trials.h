// Kernels that test the emulation: each of its features, and the faults that it and the sanitizers have to report.
#pragma once

#include "cuda/divisor.cuh"
#include "emulation/tensor_core_trials.h"
#include "emulation/trial.h"

namespace trials {

// out[i] = the sum of `in` over the block, through shared memory. Without kBarrier, reads race with writes.
template <bool kBarrier>
void block_sum(const Data& d) {
  float* shared = shared_floats();
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  shared[threadIdx.x] = i < d.count ? d.in[i] : 0.f;
  if (kBarrier) __syncthreads();
  float sum = 0;
  for (unsigned j = 0; j < blockDim.x; ++j) sum += shared[j];
  if (i < d.count) d.out[i] = sum;
}

// The same as a tree, in one block. Without kBarrier, the emulation's default order still gives the right sum.
template <bool kBarrier>
void tree_sum(const Data& d) {
  float* shared = shared_floats();
  const int size = int(blockDim.x), i = (2 * size - 2 - int(threadIdx.x)) % size;
  shared[i] = d.in[i];
  __syncthreads();
  for (int left = size, half = 0; left > 1; left = half) {
    half = (left + 1) / 2;
    if (i + half < left) shared[i] += shared[i + half];
    if (kBarrier) __syncthreads();
  }
  __syncthreads();
  d.out[i] = shared[0];
}

// out[i] = the sum of `in` over the warp, whose values rotate through shared memory; one block. Without kSync, a lane
// overwrites a value that its neighbour has not read.
template <bool kSync>
void warp_sum(const Data& d) {
  float* shared = shared_floats();
  const int i = int(threadIdx.x), first = i / 32 * 32, lanes = std::min(32, int(blockDim.x) - first);
  float passing = d.in[i], sum = 0;
  for (int step = 0; step < lanes; ++step) {
    sum += passing;
    shared[i] = passing;
    __syncwarp();
    passing = shared[first + (i - first + 1) % lanes];
    if (kSync) __syncwarp();
  }
  d.out[i] = sum;
}

// Options: mask, the lane, distance or bits, width. Lanes outside the mask get -1.
enum class Shuffle { by_index, up, down, by_xor };
template <Shuffle kKind, class T>
void shuffle(const Data& d) {
  const unsigned mask = unsigned(d.options[0]), lane = threadIdx.x % 32;
  const int operand = int(d.options[1]), width = int(d.options[2]);
  const T value = T(d.in[threadIdx.x]);
  d.out[threadIdx.x] = -1.f;
  if (!(mask >> lane & 1)) return;
  T result{};
  if (kKind == Shuffle::by_index) result = __shfl_sync(mask, value, operand, width);
  if (kKind == Shuffle::up) result = __shfl_up_sync(mask, value, unsigned(operand), width);
  if (kKind == Shuffle::down) result = __shfl_down_sync(mask, value, unsigned(operand), width);
  if (kKind == Shuffle::by_xor) result = __shfl_xor_sync(mask, value, operand, width);
  d.out[threadIdx.x] = float(result);
}

// Rows of `out`: the ballot's low and high half, any, all; __syncthreads_count, __syncthreads_or.
inline void votes(const Data& d) {
  const unsigned mask = unsigned(d.options[0]), i = threadIdx.x;
  const bool yes = d.in[i] > 0.f;
  if (mask >> i % 32 & 1) {
    const unsigned ballot = __ballot_sync(mask, yes);
    d.out[i] = float(ballot & 0xffff);
    d.out[d.count + i] = float(ballot >> 16);
    d.out[2 * d.count + i] = float(__any_sync(mask, yes));
    d.out[3 * d.count + i] = float(__all_sync(mask, yes));
  }
  d.out[4 * d.count + i] = float(__syncthreads_count(yes));
  d.out[5 * d.count + i] = float(__syncthreads_or(yes));
}

// out: sum, maximum, the first block to run (counted from 1), a counter, and a 1 at each index that the counter
// returned.
inline void atomics(const Data& d) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(d.out, d.in[i]);
  atomicMax(d.out + 1, d.in[i]);
  atomicCAS(d.out + 2, 0.f, float(blockIdx.x + 1));
  const int index = int(atomicAdd(d.out + 3, 1.f));
  atomicExch(d.out + 4 + index, atomicAdd(d.out + 4 + index, 0.f) + 1.f);
}

// Options: the divisor, then one dividend a thread. Whether D's quotients are exact.
template <class D>
void divisions(const Data& d) {
  const int64_t divisor = d.options[0], n = d.options[1 + threadIdx.x];
  const D by(divisor);
  d.out[threadIdx.x] = float(by.value() == divisor && by.quotient(n) == n / divisor);
}

// The six indices of each thread, ordered by block and thread.
inline void indices(const Data& d) {
  const dim3 t = threadIdx, b = blockIdx;
  const size_t block = (size_t(b.z) * gridDim.y + b.y) * gridDim.x + b.x;
  const size_t thread = (size_t(t.z) * blockDim.y + t.y) * blockDim.x + t.x;
  float* out = d.out + 6 * (block * blockDim.count() + thread);
  for (unsigned index : {b.x, b.y, b.z, t.x, t.y, t.z}) *out++ = float(index);
}

// out[i] = the initial contents of shared memory, in the last block; then fills it.
inline void fresh_shared(const Data& d) {
  const int count = int(d.options[0]);
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    if (blockIdx.x == gridDim.x - 1) d.out[i] = shared_floats()[i];
    shared_floats()[i] = 1.f;
  }
}

// Faults, for which hardware hangs or computes wrong values.
inline void divergent_barrier(const Data&) {
  if (threadIdx.x < 7) __syncthreads_count(1);
}
inline void divergent_shuffle(const Data& d) {
  if (threadIdx.x != 3) d.out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
}
inline void mixed_collectives(const Data& d) {
  d.out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(0xffffffffu, 1.f, 0) : __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
inline void mixed_masks(const Data& d) {
  d.out[threadIdx.x] = __shfl_sync(threadIdx.x % 2 ? 0xffffffffu : 0x55555555u, 1.f, 0);
}
inline void outside_mask(const Data& d) {
  d.out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 0);
}
inline void barrier_or_shuffle(const Data&) {
  threadIdx.x < 40 ? __syncthreads() : __syncwarp();
}

// Copies. With kPast, accesses one element beyond the array.
template <int kPast>
void read(const Data& d) {
  const int i = int(threadIdx.x);
  d.out[i] = d.in[i + kPast];
}
template <int kPast>
void write(const Data& d) {
  const int i = int(threadIdx.x);
  d.out[i + kPast] = d.in[i];
}
template <int kPast>
void dynamic_shared(const Data& d) {
  float* shared = shared_floats();
  shared[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = shared[threadIdx.x + kPast];
}
constexpr int kStatic = 77;  // threads of static_shared
template <int kPast>
void static_shared(const Data& d) {
  __shared__ float shared[kStatic];
  shared[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = shared[threadIdx.x + kPast];
}

struct alignas(16) Four {
  float value[4];
};
// Copies four elements a thread; with kPast, at unaligned addresses.
template <int kPast>
void vectors(const Data& d) {
  const int i = 4 * int(threadIdx.x);
  if (i + 4 + kPast > d.count) return;
  *reinterpret_cast<Four*>(d.out + i + kPast) = *reinterpret_cast<const Four*>(d.in + i + kPast);
}
// Writes four elements a thread; with kPast, two threads write the same elements.
template <int kPast>
void overlapping_vectors(const Data& d) {
  const int i = 4 * (int(threadIdx.x) / (1 + kPast));
  if (i + 4 > d.count) return;
  *reinterpret_cast<Four*>(d.out + i) = *reinterpret_cast<const Four*>(d.in + i);
}

inline const std::map<std::string, Kernel>& kernels() {
  static const std::map<std::string, Kernel> all = {
      {"block_sum", block_sum<true>},
      {"block_sum without barrier", block_sum<false>},
      {"tree_sum", tree_sum<true>},
      {"tree_sum without barrier", tree_sum<false>},
      {"warp_sum", warp_sum<true>},
      {"warp_sum without syncwarp", warp_sum<false>},
      {"shuffle", shuffle<Shuffle::by_index, float>},
      {"shuffle up", shuffle<Shuffle::up, float>},
      {"shuffle down", shuffle<Shuffle::down, float>},
      {"shuffle xor", shuffle<Shuffle::by_xor, float>},
      {"shuffle double", shuffle<Shuffle::by_index, double>},
      {"votes", votes},
      {"atomics", atomics},
      {"divisions", divisions<alexnet_kernels::cuda::Divisor>},
      {"long divisions", divisions<alexnet_kernels::cuda::LongDivisor>},
      {"indices", indices},
      {"fresh_shared", fresh_shared},
      {"divergent_barrier", divergent_barrier},
      {"divergent_shuffle", divergent_shuffle},
      {"mixed_collectives", mixed_collectives},
      {"mixed_masks", mixed_masks},
      {"outside_mask", outside_mask},
      {"barrier_or_shuffle", barrier_or_shuffle},
      {"read", read<0>},
      {"read past the end", read<1>},
      {"read before the start", read<-1>},
      {"write", write<0>},
      {"write past the end", write<1>},
      {"dynamic_shared", dynamic_shared<0>},
      {"dynamic_shared past the end", dynamic_shared<1>},
      {"static_shared", static_shared<0>},
      {"static_shared past the end", static_shared<1>},
      {"vectors", vectors<0>},
      {"vectors misaligned", vectors<1>},
      {"overlapping_vectors", overlapping_vectors<0>},
      {"overlapping_vectors twice", overlapping_vectors<1>},
  };
  return all;
}

inline void run(const std::string& trial, const Data& data, dim3 grid, dim3 block, size_t shared) {
  Kernel kernel = nullptr;
  for (const auto* all : {&kernels(), &tensor_core_kernels()}) {
    const auto found = all->find(trial);
    if (found != all->end()) kernel = found->second;
  }
  if (kernel == nullptr) throw std::invalid_argument("no such trial: " + trial);
  const cudaError_t error = emulation::launch(grid, block, shared, [&] { kernel(data); });
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace trials
