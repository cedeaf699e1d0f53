// Instruction sets of the CPU kernels.
//
// Every csrc/cpu/<op>.cpp is compiled once for each instruction set, with ALEXNET_ISA as the namespace of its kernels.
// The compilation for `generic` also defines ALEXNET_REGISTER: it holds the operator, which picks the kernels of the
// best instruction set that the processor supports. No code compiled for another set runs before that choice, so the
// library also loads on processors without AVX.
#pragma once

#include <cstdint>

#ifndef ALEXNET_ISA
#define ALEXNET_ISA generic
#endif

namespace alexnet_kernels::cpu {

// A kernel computes the tasks [begin, end) of its arguments. Its result does not depend on how tasks are split.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

enum class Isa : uint8_t { generic, avx2, avx512 };
Isa current_isa();

}  // namespace alexnet_kernels::cpu

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
