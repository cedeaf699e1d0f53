// For the operators at the end of each CPU file: tensors, and running a kernel on torch's threads.
#pragma once

#include <algorithm>

#include "common/operands.h"
#include "isa.h"
#include "tasks.h"

namespace alexnet_kernels::cpu {

inline Operands operands(const char* op, const char* name, const Tensor& first) {
  return Operands(op, name, first, DeviceType::CPU);
}

// Runs a kernel over its tasks on torch's threads, one thread for every kBytesPerThread of the `bytes` that it moves.
template <class Args>
inline void run(Kernel<Args> kernel, const Args& args, int64_t tasks, int64_t bytes) {
  if (tasks == 0) return;
  const int64_t grain = std::max<int64_t>(1, tasks * kBytesPerThread / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// linear_relu_dropout.cpp: scale times grad where output is positive, else 0.
Tensor relu_dropout_backward(const Tensor& grad, const Tensor& output, double scale);

}  // namespace alexnet_kernels::cpu
