// Kernel launches on torch's current stream of a tensor's device.
//
// The tests compile the same files with the host's compiler for an emulation of CUDA's threads on the CPU
// (tests/emulation/cuda.h). They register the operators in another namespace, for CPU tensors.
#pragma once

#include "common/operands.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

// Defined in libtorch_cuda.so. Weak, so that the library loads in a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define ALEXNET_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CUDA, m)
#define ALEXNET_CUDA_DEVICE CUDA
#else
#include "emulation/cuda.h"

#define ALEXNET_CUDA_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels_emulated, CPU, m)
#define ALEXNET_CUDA_DEVICE CPU
#endif

namespace alexnet_kernels::cuda {

inline Operands operands(const char* op, const char* name, const Tensor& first) {
  return Operands(op, name, first, DeviceType::ALEXNET_CUDA_DEVICE);
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Makes the tensor's device the current one during its lifetime, and launches on torch's stream of that device.
class OnDevice {
 public:
#if defined(__CUDACC__)
  explicit OnDevice(const Tensor& t) : guard_(t.get_device()) {
    const int32_t index = t.get_device();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "alexnet_kernels: this torch has no CUDA");
    // torch's guard sets the device of its own CUDA runtime; this library links another copy statically.
    int current = -1;
    check_cuda(cudaGetDevice(&current), "cudaGetDevice");
    if (current != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#else
  explicit OnDevice(const Tensor&) {}

 private:
#endif
  cudaStream_t stream_ = nullptr;

 public:
  // Runs kernel(args...) in `blocks` blocks of `threads` threads.
  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), int64_t blocks, int threads, const Args&... args) const {
    launch_with_shared(kernel, blocks, threads, 0, args...);
  }

  // The same with `shared` bytes of dynamic shared memory.
  template <class... Params, class... Args>
  void launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads, int shared,
                          const Args&... args) const {
    STD_TORCH_CHECK(blocks < (int64_t(1) << 31),
                    "alexnet_kernels: the tensor is too large for one launch of 2^31 - 1 blocks");
#if defined(__CUDACC__)
    constexpr int kDefault = 48 * 1024;  // more needs the kernel's consent
    if (shared > kDefault) {
      // Always the same limit: another thread may launch the kernel with more at the same time.
      const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
                 "cudaFuncSetAttribute");
    }
    kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, stream_>>>(static_cast<Params>(args)...);
    check_cuda(cudaGetLastError(), "alexnet_kernels: launching a CUDA kernel");
#else
    check_cuda(emulation::launch<Params...>(dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, kernel,
                                            static_cast<Params>(args)...),
               "alexnet_kernels: launching a CUDA kernel");
#endif
  }
};

// 90 for an H100.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) + device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// The block's dynamic shared memory, aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
#else
  return reinterpret_cast<unsigned char*>(emulation::Block::current().shared());
#endif
}

// An address in shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
#if defined(__CUDACC__)
  return uint32_t(__cvta_generic_to_shared(p));
#else
  return emulation::shared_address(p);
#endif
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace alexnet_kernels::cuda
