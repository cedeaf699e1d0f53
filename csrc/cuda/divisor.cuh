// Division by a number that is known before the launch.
#pragma once

#include "runtime.cuh"

namespace alexnet_kernels::cuda {

// n / d for 0 <= n < 2^31 by one multiplication (Granlund, Montgomery 1994): with the constants of d,
// n / d = (high 32 bits of n * multiplier + n) >> shift.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t d) : divisor_(int(d)) {
    while ((int64_t(1) << shift_) < d) ++shift_;
    multiplier_ = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift_) - d)) / d + 1);
  }
  __host__ __device__ int value() const { return divisor_; }
  __device__ __forceinline__ int quotient(int n) const {
    return int((__umulhi(uint32_t(n), multiplier_) + uint32_t(n)) >> shift_);
  }
  __device__ __forceinline__ int remainder(int n) const { return n - quotient(n) * divisor_; }

 private:
  int divisor_ = 1;
  int shift_ = 0;
  uint32_t multiplier_ = 1;
};

// n / d for 0 <= n < 2^63 and 1 <= d <= 2^62: the same with 64 bits.
class LongDivisor {
 public:
  LongDivisor() = default;
  explicit LongDivisor(int64_t d) : divisor_(d) {
    while ((int64_t(1) << shift_) < d) ++shift_;
    // The quotient of (2^shift - d) 2^64 and d by long division: one bit a step.
    uint64_t remainder = (uint64_t(1) << shift_) - uint64_t(d), quotient = 0;
    for (int bit = 0; bit < 64; ++bit) {
      remainder *= 2, quotient *= 2;
      if (remainder >= uint64_t(d)) remainder -= uint64_t(d), ++quotient;
    }
    multiplier_ = quotient + 1;
  }
  __host__ __device__ int64_t value() const { return divisor_; }
  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    return int64_t((__umul64hi(uint64_t(n), multiplier_) + uint64_t(n)) >> shift_);
  }

 private:
  int64_t divisor_ = 1;
  int shift_ = 0;
  uint64_t multiplier_ = 1;
};

}  // namespace alexnet_kernels::cuda
