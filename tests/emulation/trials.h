// Kernels that try the emulation itself: each feature once, and the faults it is there to find.
#pragma once

#include <string>

#include "emulation/cuda.h"

namespace trials {

// out[i] = the sum of its block's in, through shared memory. Without `barrier` it reads what may not be written yet.
inline void block_sum(const float* in, float* out, int count, bool barrier) {
  float* shared = reinterpret_cast<float*>(emulation::Block::current().shared());
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  shared[threadIdx.x] = i < count ? in[i] : 0.f;
  if (barrier) __syncthreads();
  float sum = 0;
  for (unsigned j = 0; j < blockDim.x; ++j) sum += shared[j];
  if (i < count) out[i] = sum;
}

inline void shuffles(const float* in, float* out, int count) {
  const unsigned all = 0xffffffffu;
  const int i = int(threadIdx.x);
  const float v = in[i];
  out[i] = __shfl_sync(all, v, 5);
  out[count + i] = __shfl_up_sync(all, v, 2);
  out[2 * count + i] = __shfl_down_sync(all, v, 3);
  out[3 * count + i] = __shfl_xor_sync(all, v, 8);
  out[4 * count + i] = __shfl_xor_sync(all, v, 1, 4);
  out[5 * count + i] = __shfl_down_sync(all, v, 1, 8);
  out[6 * count + i] = float(__ballot_sync(all, v > 10.f) & 0xffff);
  out[7 * count + i] = float(2 * __any_sync(all, v > 30.f) + __all_sync(all, v >= 0.f));
}

inline void votes(const float* in, float* out) {
  const int i = int(threadIdx.x);
  const int many = __syncthreads_count(in[i] > 3.f), some = __syncthreads_or(in[i] > 1e6f);
  out[i] = float(many + 1000 * some);
}

inline void atomics(const float* in, float* out) {
  atomicAdd(out, in[threadIdx.x]);
  atomicMax(out + 1, in[threadIdx.x]);
  if (atomicCAS(out + 2, 0.f, 1.f) == 0.f) atomicExch(out + 3, float(blockIdx.x + 1));
}

inline void indices(float* out) {
  const dim3 t = threadIdx, b = blockIdx;
  const unsigned thread = (t.z * blockDim.y + t.y) * blockDim.x + t.x, block = (b.z * gridDim.y + b.y) * gridDim.x + b.x;
  out[block * unsigned(blockDim.count()) + thread] = float(100 * (b.x + 10 * b.y) + t.x + 10 * t.y);
}

// The faults. Hardware hangs or goes on with wrong values.
inline void divergent_barrier() {
  if (threadIdx.x < 7) __syncthreads();
}
inline void divergent_shuffle(float* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
}
inline void mixed_collectives(float* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_sync(0xffffffffu, 1.f, 0) : __shfl_xor_sync(0xffffffffu, 1.f, 1);
}
inline void outside_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 0);
}
inline void read_shared(float* out) {
  out[threadIdx.x] = reinterpret_cast<float*>(emulation::Block::current().shared())[threadIdx.x];
}

// `settings`: blocks, threads, bytes of shared memory (and the other dimensions of both for "indices").
inline void run(const std::string& trial, const float* in, float* out, int count, const int* settings, int given) {
  dim3 grid{unsigned(settings[0])}, block{unsigned(settings[1])};
  const size_t shared = size_t(settings[2]);
  if (given > 3) grid = {grid.x, unsigned(settings[3]), unsigned(settings[4])};
  if (given > 5) block = {block.x, unsigned(settings[5]), unsigned(settings[6])};
  std::function<void()> kernel;
  if (trial == "block_sum") kernel = [=] { block_sum(in, out, count, true); };
  if (trial == "block_sum_without_barrier") kernel = [=] { block_sum(in, out, count, false); };
  if (trial == "shuffles") kernel = [=] { shuffles(in, out, count); };
  if (trial == "votes") kernel = [=] { votes(in, out); };
  if (trial == "atomics") kernel = [=] { atomics(in, out); };
  if (trial == "indices") kernel = [=] { indices(out); };
  if (trial == "divergent_barrier") kernel = [=] { divergent_barrier(); };
  if (trial == "divergent_shuffle") kernel = [=] { divergent_shuffle(out); };
  if (trial == "mixed_collectives") kernel = [=] { mixed_collectives(out); };
  if (trial == "outside_mask") kernel = [=] { outside_mask(out); };
  if (trial == "read_shared") kernel = [=] { read_shared(out); };
  if (!kernel) throw std::invalid_argument("no such trial: " + trial);
  const cudaError_t error = emulation::launch(grid, block, shared, kernel);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace trials
