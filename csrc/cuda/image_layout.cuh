// Images [N, C, H, W] as one array of vectors of channels, a thread for each.
#pragma once

#include "common/pool.h"
#include "vector.cuh"

namespace alexnet_kernels {

constexpr int kThreads = 256;  // of a block

// Division by a number that is known before the launch, as a multiplication (Granlund, Montgomery 1994):
// n / d = (high 32 bits of n * multiplier + n) >> shift, for 0 <= n < 2^31.
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

// A vector's place: channels c, c + 1, ... of pixel (y, x) of image n.
struct Place {
  int64_t n;
  int c, y, x;
};

// Images whose vectors hold `vector` channels each (one in NCHW), in the order of their memory.
struct Images {
  Images(const IntList& size, MemoryFormat format, int vector)
      : N(size[0]),
        C(int(size[1])),
        H(int(size[2])),
        W(int(size[3])),
        channels_last(format == MemoryFormat::ChannelsLast),
        vectors_per_pixel(std::max<int64_t>(1, size[1] / vector)),
        width(std::max<int64_t>(1, size[3])),
        pixels(std::max<int64_t>(1, size[2] * size[3])),
        vectors_per_image(size[1] / vector * size[2] * size[3]) {
    STD_TORCH_CHECK(vectors_per_image + kThreads < (int64_t(1) << 31) && size[2] * size[3] < (int64_t(1) << 31),
                    "alexnet_kernels: the CUDA kernels take images of fewer than 2^31 elements");
  }

  __host__ __device__ int64_t vectors() const { return N * vectors_per_image; }

  // Vector `first + ahead`, where `first` is the same for a whole block: the long division is then shared.
  __device__ __forceinline__ Place locate(int64_t first, int ahead) const {
    int64_t n = first / vectors_per_image;
    const int at = int(first - n * vectors_per_image) + ahead;
    return at < vectors_per_image ? place(n, at) : locate_far(n, at);
  }

  // The offset of channel c of pixel (y, x) of image n.
  __device__ __forceinline__ int64_t offset(int64_t n, int c, int y, int x) const {
    const int within = channels_last ? (y * W + x) * C + c : (c * H + y) * W + x;
    return n * (int64_t(C) * H * W) + within;
  }

  int64_t N;
  int C, H, W;
  bool channels_last;
  Divisor vectors_per_pixel, width, pixels;
  int64_t vectors_per_image;

 private:
  __device__ __forceinline__ Place locate_far(int64_t n, int at) const {
    const int images = at / int(vectors_per_image);
    return place(n + images, at - images * int(vectors_per_image));
  }
  __device__ __forceinline__ Place place(int64_t n, int at) const {
    int c, pixel;
    if (channels_last) {
      pixel = vectors_per_pixel.quotient(at);
      c = (at - pixel * vectors_per_pixel.value()) * (C / vectors_per_pixel.value());
    } else {
      c = pixels.quotient(at);
      pixel = at - c * pixels.value();
    }
    const int y = width.quotient(pixel);
    return {n, c, y, pixel - y * W};
  }
};

// How many channels a vector holds: 16 bytes of them, or one where the channels of a tower don't divide into such
// vectors or where memory isn't aligned to them.
template <class T, class... Pointers>
int vector_of(MemoryFormat format, int64_t channels, const Pointers*... p) {
  return format == MemoryFormat::ChannelsLast && channels % kVector<T> == 0 && aligned(p...) ? kVector<T> : 1;
}

// Calls body with the constant kVector<T> or 1.
template <class T, class Body>
void for_vector(int vector, const Body& body) {
  if (vector == kVector<T>) return body(std::integral_constant<int, kVector<T>>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace alexnet_kernels
