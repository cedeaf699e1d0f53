// Instruction sets of the CPU kernels.
//
// Every csrc/cpu/<op>.cpp is compiled once for each instruction set, with ALEXNET_ISA naming the namespace its kernels
// live in. The compilation for `generic` also defines ALEXNET_REGISTER: it holds the operator itself, which picks the
// kernels of the best instruction set that the processor has. Nothing else runs before that choice, so the library
// loads on processors older than the compiler flags of its fastest kernels.
#pragma once

#include <cstdint>

#ifndef ALEXNET_ISA
#define ALEXNET_ISA generic
#endif

namespace alexnet_kernels {

enum class DType : uint8_t { f32, f64, bf16, f16 };

// A kernel works on the tasks [begin, end) of its arguments; the result never depends on how tasks are split.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

enum class Isa : uint8_t { generic, avx2, avx512 };
Isa current_isa();
const char* isa_name(Isa isa);

}  // namespace alexnet_kernels

#if defined(__x86_64__)
#define ALEXNET_DECLARE_KERNEL(name, Args)                                           \
  namespace generic {                                                                \
  void name(const Args&, int64_t, int64_t);                                          \
  }                                                                                  \
  namespace avx2 {                                                                   \
  void name(const Args&, int64_t, int64_t);                                          \
  }                                                                                  \
  namespace avx512 {                                                                 \
  void name(const Args&, int64_t, int64_t);                                          \
  }                                                                                  \
  inline Kernel<Args> pick_##name() {                                                \
    static const Kernel<Args> kernel = current_isa() == Isa::avx512 ? avx512::name   \
                                       : current_isa() == Isa::avx2 ? avx2::name     \
                                                                    : generic::name; \
    return kernel;                                                                   \
  }
#else
#define ALEXNET_DECLARE_KERNEL(name, Args)  \
  namespace generic {                       \
  void name(const Args&, int64_t, int64_t); \
  }                                         \
  inline Kernel<Args> pick_##name() {       \
    return generic::name;                   \
  }
#endif
