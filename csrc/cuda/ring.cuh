// What the kernels for Hopper share: the ring of stages between the warp that copies and those that multiply, and the
// division of extents into boxes.
#pragma once

#include <array>
#include <map>

#include "hopper.cuh"

namespace alexnet_kernels::cuda {

constexpr int kWarpgroupRows = 64;  // of one wgmma
constexpr int kAtom = 1024;         // bytes after which the permutation of 128-byte rows repeats: boxes begin there
constexpr int kSharedBytes = 227 * 1024;

// Stages of shared memory that are filled and emptied in turn. Fill i uses stage i % stages; it completes phase
// i / stages of the stage's barrier `full`, and emptying it that of `empty`.
class Ring {
 public:
  __device__ __forceinline__ Ring(unsigned char* stages, int bytes, int count, Barrier* barriers)
      : stages_(stages), bytes_(bytes), count_(count), barriers_(barriers) {}

  __device__ __forceinline__ void initialise(int consumers) const {
#pragma unroll 1
    for (int stage = 0; stage < count_; ++stage) {
      init(barriers_ + 2 * stage, 1);
      init(barriers_ + 2 * stage + 1, consumers);
    }
  }
  __device__ __forceinline__ unsigned char* stage() const { return stages_ + at_ * bytes_; }
  __device__ __forceinline__ Barrier* full() const { return barriers_ + 2 * at_; }
  // Of the stage before: by one lane of each consumer warp.
  __device__ __forceinline__ void hand_back_previous() const {
    arrive(barriers_ + 2 * (at_ == 0 ? count_ - 1 : at_ - 1) + 1);
  }
  __device__ __forceinline__ void wait_full() const { wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const { wait(barriers_ + 2 * at_ + 1, parity_ ^ 1); }
  __device__ __forceinline__ void advance() {
    if (++at_ == count_) at_ = 0, parity_ ^= 1;
  }
  // Of a ring that is filled once: the next pass finds the same phases.
  __device__ __forceinline__ void rewind() { at_ = parity_ = 0; }

 private:
  unsigned char* stages_;
  int bytes_, count_;
  Barrier* barriers_;
  int at_ = 0, parity_ = 0;
};

inline int round_up(int a, int b) {
  return int(divide_up(a, b)) * b;
}

// The largest extent below one that divides `whole` into more parts, the last of which may be smaller; 0 after 1.
inline int next_smaller(int whole, int extent) {
  return extent == 1 ? 0 : int(divide_up(whole, divide_up(whole, extent - 1)));
}

// make(), a Plan that depends on nothing but the key. Planning takes 10 us or more, so that each thread keeps its last
// plans.
template <class Plan, size_t kCount, class Make>
const Plan& planned(const std::array<int, kCount>& key, const Make& make) {
  constexpr size_t kMost = 256;
  static thread_local std::map<std::array<int, kCount>, Plan> plans;
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  if (plans.size() == kMost) plans.clear();
  return plans.emplace(key, make()).first->second;
}

}  // namespace alexnet_kernels::cuda
