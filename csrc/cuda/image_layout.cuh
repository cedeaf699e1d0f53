// ImageLayout [N, C, H, W] as one array of vectors of channels. Most kernels assign one vector to a thread.
#pragma once

#include "divisor.cuh"
#include "launch.cuh"
#include "vector.cuh"

namespace alexnet_kernels::cuda {

// The coordinates of a vector's first element: channel c of pixel (y, x) of image n.
struct Coordinates {
  int64_t n;
  int c, y, x;
};

// The memory layout of images without gaps. Vectors hold `vector` channels of one pixel (1 in NCHW), in memory order.
struct ImageLayout {
  ImageLayout(const IntList& size, MemoryFormat format, int vector)
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

  // The coordinates of vector first + index. `first` must be uniform in a block: its 64-bit division is then computed
  // once.
  __device__ __forceinline__ Coordinates locate(int64_t first, int index) const {
    int64_t n = first / vectors_per_image;
    const int at = int(first - n * vectors_per_image) + index;
    return at < vectors_per_image ? coordinates(n, at) : later_image(n, at);
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
  __device__ __forceinline__ Coordinates later_image(int64_t n, int at) const {
    const int images = at / int(vectors_per_image);
    return coordinates(n + images, at - images * int(vectors_per_image));
  }
  __device__ __forceinline__ Coordinates coordinates(int64_t n, int at) const {
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

// The channels of a vector: 16 bytes of them in channels_last, or 1 where `channels` (of a tower) is not a multiple of
// that or a pointer is not aligned to 16 bytes.
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

}  // namespace alexnet_kernels::cuda
