// Hopper's asynchronous instructions (PTX ISA, sm_90a): barriers in shared memory that count arrivals and bytes, copies
// of boxes of a tensor by the Tensor Memory Accelerator (TMA), and matrix products of a warpgroup (wgmma).
//
// For nvcc these are inline PTX; the tests' emulation (tests/emulation/hopper.h) models them: copies land late,
// products are done when they are waited for, and a missing wait, fence or arrival shows.
#pragma once

#include "tensor_map.cuh"
#include "vector.cuh"

#if !defined(__CUDACC__)
#include "emulation/hopper.h"
#endif

namespace alexnet_kernels::cuda {

constexpr int kWarpgroup = 128;  // threads

// A barrier in shared memory. Its phases, numbered from 0, complete one after the other: each when as many threads have
// arrived as `init` said and the bytes that they expect have been copied.
struct alignas(8) Barrier {
  uint64_t state;
};

// By one thread, before any other uses the barrier; then `publish_barriers` by that thread and __syncthreads by all.
__device__ __forceinline__ void init(Barrier* barrier, int arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  emulation::init(&barrier->state, arrivals);
#endif
}

// Lets TMA see the barriers that this thread initialised.
__device__ __forceinline__ void publish_barriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  emulation::publish_barriers();
#endif
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  emulation::arrive(&barrier->state, 0);
#endif
}

// Arrives, and has the phase wait for so many bytes more.
__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  emulation::arrive(&barrier->state, bytes);
#endif
}

// Waits until the phase of this parity has completed: 0 for phases 0, 2, 4 and so on. The phase before the first one,
// of parity 1, counts as complete. A wait that never ends is an error of the launch, not a hang.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
#if defined(__CUDACC__)
  constexpr int kMostTries = 1 << 22;  // of some 20 ns or more each
  const uint32_t address = shared_address(barrier);
  for (int tries = 0;; ++tries) {
    uint32_t complete;
    asm volatile(
        "{\n"
        "  .reg .pred complete;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "  selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(address), "r"(parity)
        : "memory");
    if (complete) return;
    if (tries == kMostTries) __trap();
  }
#else
  emulation::wait(&barrier->state, parity);
#endif
}

// Has the description of a tensor fetched before its first use.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  emulation::prefetch(&map);
#endif
}

// Starts a copy of the box whose first element has the coordinates c0 (the fastest) to c4, to shared memory. Elements
// outside the tensor are zeros. All bytes of the box count for the barrier's phase.
__device__ __forceinline__ void load_box(void* shared, const TensorMap& map, Barrier* barrier, int c0, int c1, int c2,
                                         int c3, int c4) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
#else
  emulation::load_box(shared, &map, &barrier->state, {c0, c1, c2, c3, c4});
#endif
}

// The description of a matrix in shared memory as wgmma takes it: rows of kRowBytes = 32, 64 or 128 bytes, one after
// the other, whose 16-byte parts are permuted as TMA does in the mode of that size (swizzle). `matrix` is the address
// of the first row, a multiple of 1024 bytes, plus the bytes to skip in every row.
template <int kRowBytes>
__device__ __forceinline__ uint64_t describe(const void* matrix) {
  static_assert(kRowBytes == 32 || kRowBytes == 64 || kRowBytes == 128);
  constexpr uint64_t kMode = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16;
  constexpr uint64_t kLeading = 1;  // ignored in these modes
  return uint64_t(shared_address(matrix) >> 4 & 0x3fff) | kLeading << 16 | kEightRows << 32 | kMode << 62;
}

// The same of a matrix whose rows lie across: a term of the sums has the rows' elements one after the other, kRowBytes
// of them, and the next term those of the next kRowBytes. `next`: bytes from there to the next kRowBytes / 2 rows.
template <int kRowBytes>
__device__ __forceinline__ uint64_t describe_transposed(const void* matrix, int next) {
  constexpr uint64_t kLeading = uint64_t(0x3fff) << 16;
  return (describe<kRowBytes>(matrix) & ~kLeading) | uint64_t(next >> 4) << 16;
}

// Lets TMA and wgmma see what this thread wrote to shared memory.
__device__ __forceinline__ void publish_shared() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// The registers of this thread from now on, a multiple of 8. All warps of a warpgroup ask for the same; those that ask
// for more wait until others have given up as many.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Before the first wgmma, and before one that takes registers that other instructions wrote.
__device__ __forceinline__ void wgmma_fence() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emulation::wgmma_fence();
#endif
}

// Makes one group of the products that were started since the last group.
__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emulation::wgmma_commit();
#endif
}

// Waits until at most kGroups groups are under way.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#else
  emulation::wgmma_wait(kGroups);
#endif
}

#if defined(__CUDACC__)
// The registers and operands of an accumulator.
#define ALEXNET_REGISTERS_32                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ALEXNET_REGISTERS_48 \
  ALEXNET_REGISTERS_32       \
  ", "                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ALEXNET_REGISTERS_64 \
  ALEXNET_REGISTERS_48       \
  ", "                       \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ALEXNET_REGISTERS_96                                                                        \
  ALEXNET_REGISTERS_64                                                                              \
  ", "                                                                                              \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ALEXNET_OPERANDS_4(d, i) "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3])
#define ALEXNET_OPERANDS_16(d, i)                                                           \
  ALEXNET_OPERANDS_4(d, i), ALEXNET_OPERANDS_4(d, (i) + 4), ALEXNET_OPERANDS_4(d, (i) + 8), \
      ALEXNET_OPERANDS_4(d, (i) + 12)
#define ALEXNET_OPERANDS_32(d) ALEXNET_OPERANDS_16(d, 0), ALEXNET_OPERANDS_16(d, 16)
#define ALEXNET_OPERANDS_48(d) ALEXNET_OPERANDS_32(d), ALEXNET_OPERANDS_16(d, 32)
#define ALEXNET_OPERANDS_64(d) ALEXNET_OPERANDS_48(d), ALEXNET_OPERANDS_16(d, 48)
#define ALEXNET_OPERANDS_96(d) ALEXNET_OPERANDS_64(d), ALEXNET_OPERANDS_16(d, 64), ALEXNET_OPERANDS_16(d, 80)
#define ALEXNET_WGMMA(kColumns, type, count, a0, a1, a2, a3, b_operand, transposed)                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type " {" ALEXNET_REGISTERS_##count \
               "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_operand ", 1, 1, 1, " transposed ";"                        \
               : ALEXNET_OPERANDS_##count(d)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(kTransposed)))
#endif

// After the wait for products: keeps the compiler from reading their results before it.
template <int kCount>
__device__ __forceinline__ void settle([[maybe_unused]] float (&d)[kCount]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Starts d += A B^T by a warpgroup: A [64, 16] in registers and B [kN, 16] in shared memory, of T (bf16 or f16), d in
// float. Neither a nor d may change before the products were waited for.
//   d[i]   row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2
//   a[i]   the same row for i % 2, terms 8 (i / 2) + 2 (lane % 4) and the next
// kTransposed: b is of describe_transposed.
template <class T, int kN, bool kTransposed = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kN == 64 || kN == 96 || kN == 128 || kN == 192);
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, bf16>) {
    if constexpr (kN == 64) ALEXNET_WGMMA(64, "bf16", 32, "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 96) ALEXNET_WGMMA(96, "bf16", 48, "%48", "%49", "%50", "%51", "%52", "%53");
    if constexpr (kN == 128) ALEXNET_WGMMA(128, "bf16", 64, "%64", "%65", "%66", "%67", "%68", "%69");
    if constexpr (kN == 192) ALEXNET_WGMMA(192, "bf16", 96, "%96", "%97", "%98", "%99", "%100", "%101");
  } else {
    if constexpr (kN == 64) ALEXNET_WGMMA(64, "f16", 32, "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 96) ALEXNET_WGMMA(96, "f16", 48, "%48", "%49", "%50", "%51", "%52", "%53");
    if constexpr (kN == 128) ALEXNET_WGMMA(128, "f16", 64, "%64", "%65", "%66", "%67", "%68", "%69");
    if constexpr (kN == 192) ALEXNET_WGMMA(192, "f16", 96, "%96", "%97", "%98", "%99", "%100", "%101");
  }
#else
  emulation::wgmma<T, kN, kTransposed>(d, a, b);
#endif
}

#undef ALEXNET_WGMMA

}  // namespace alexnet_kernels::cuda
