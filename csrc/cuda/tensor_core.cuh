// Instructions of tensor cores and of their operands' way to registers (PTX ISA, sm_80 and later): copies from global
// to shared memory that a thread does not wait for at once (cp.async), loads of 8 x 8 matrices from shared memory by a
// warp (ldmatrix), and matrix products of a warp (mma.sync). Addresses of shared memory are those of shared_address.
//
// For nvcc these are inline PTX; the tests' emulation (tests/emulation/tensor_core.h) models them: copies land late,
// and a missing wait shows.
#pragma once

#include "vector.cuh"

#if !defined(__CUDACC__)
#include "emulation/tensor_core.h"
#endif

namespace alexnet_kernels::cuda {

// Starts a copy of 16 bytes, or of 16 zeros, for which nothing is read. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global, bool valid) {
#if defined(__CUDACC__)
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
#else
  emulation::copy_async(shared, global, valid);
#endif
}

// Makes one group of the copies that this thread started since its last group, perhaps none.
__device__ __forceinline__ void copy_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::copy_commit();
#endif
}

// Waits until at most the last kGroups groups of this thread are under way. Other threads see the copies after a
// barrier that follows.
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  emulation::copy_wait(kGroups);
#endif
}

// Loads four matrices of 8 rows of 16 bytes. Lane l gives the address, a multiple of 16, of row l % 8 of matrix l / 8;
// it gets bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix(uint32_t (&matrix)[4], uint32_t shared) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared)
               : "memory");
#else
  emulation::ldmatrix(matrix, shared);
#endif
}

// The same, each matrix transposed, of elements of 16 bits: the lane gets elements 2 (l % 4) and 2 (l % 4) + 1 of
// column l / 4, one of each row.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t shared) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared)
               : "memory");
#else
  emulation::ldmatrix_transposed(matrix, shared);
#endif
}

// The bits of a float, rounded to the 10 bits of TF32's mantissa; ties go away from zero.
__device__ __forceinline__ uint32_t round_tf32(uint32_t v) {
#if defined(__CUDACC__)
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(__uint_as_float(v)));
  return v;
#else
  return emulation::round_tf32(v);
#endif
}

#if defined(__CUDACC__)
#define ALEXNET_MMA(shape, type)                                                  \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type            \
               ".f32"                                                             \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// d += A B^T by a warp: A of 16 rows of 32 bytes of T, as ldmatrix loads (rows 0 to 7, then 8 to 15) of the first 16
// bytes, then of the others; B of 8 such rows, the first 16 bytes, then the others; floats rounded by round_tf32.
// Element i of d is row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2, where l is the lane.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    ALEXNET_MMA("m16n8k16", "bf16");
  } else if constexpr (std::is_same_v<T, f16>) {
    ALEXNET_MMA("m16n8k16", "f16");
  } else {
    static_assert(std::is_same_v<T, float>);
    ALEXNET_MMA("m16n8k8", "tf32");
  }
#else
  emulation::mma<T>(d, a, b);
#endif
}

#undef ALEXNET_MMA

}  // namespace alexnet_kernels::cuda
