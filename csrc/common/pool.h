// The geometry of 2-d pooling, as torch defines it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace alexnet_kernels {

struct Pool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;

  int64_t area() const { return kernel_h * kernel_w; }
};

// The argmax of a window whose maximum ReLU sets to zero: no position of windows of fewer than 256 pixels.
constexpr uint8_t kNowhere = 255;

// The number of windows along one axis. With ceil_mode the last window may reach past the end, but it starts inside the
// input or its leading padding.
inline int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, bool ceil_mode) {
  const int64_t span = size + 2 * pad - kernel;  // negative where the window is larger than the padded input
  int64_t windows = span / stride - (span % stride < 0) + 1;
  if (ceil_mode && span % stride != 0 && windows * stride < size + pad) ++windows;
  return windows;
}

// The windows [first, last) along one axis that contain position `at`.
struct Windows {
  int64_t first, last;
};
inline Windows windows_over(int64_t at, int64_t kernel, int64_t stride, int64_t pad, int64_t count) {
  const int64_t p = at + pad;
  return {p < kernel ? 0 : (p - kernel) / stride + 1, std::min(p / stride + 1, count)};
}

}  // namespace alexnet_kernels
