// What the kernels that test the emulation have in common.
#pragma once

#include <array>
#include <map>
#include <string>

#include "emulation/cuda.h"

namespace trials {

// The arguments of every kernel: `count` elements of `in`, and as many of `out` as the kernel needs.
struct Data {
  const float* in;
  float* out;
  int count;
  std::vector<int64_t> options;
};
using Kernel = void (*)(const Data&);

inline float* shared_floats() {
  return reinterpret_cast<float*>(emulation::Block::current().shared());
}

}  // namespace trials
