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
        channel_stride(channels_last ? 1 : int(size[2] * size[3])),
        row_stride(channels_last ? int(size[3] * size[1]) : W),
        column_stride(channels_last ? C : 1),
        vector_(vector),
        elements_(size[1] * size[2] * size[3]),
        vectors_(size[1] / vector * size[2] * size[3]),
        count_(N * vectors_),
        per_image_(std::max<int64_t>(1, vectors_)),
        inner_(std::max<int64_t>(1, channels_last ? size[1] / vector : size[2] * size[3])),
        width_(std::max<int64_t>(1, size[3])) {
    STD_TORCH_CHECK(elements_ < (int64_t(1) << 31) && size[2] * size[3] < (int64_t(1) << 31),
                    "alexnet_kernels: the CUDA kernels take images of fewer than 2^31 elements");
  }

  __host__ __device__ int64_t vectors() const { return count_; }

  // The coordinates of vector first + index; neither is negative.
  __device__ __forceinline__ Coordinates locate(int64_t first, int index) const {
    const int64_t vector = first + uint32_t(index), n = per_image_.quotient(vector);
    // The difference is below 2^31: its low 32 bits are enough.
    const int at = int(uint32_t(vector) - uint32_t(n) * uint32_t(vectors_));
    const int outer = inner_.quotient(at), inner = at - outer * inner_.value();
    const int pixel = channels_last ? outer : inner, c = channels_last ? inner * vector_ : outer;
    const int y = width_.quotient(pixel);
    return {n, c, y, pixel - y * W};
  }

  // The offset of channel c of pixel (y, x) of image n.
  __device__ __forceinline__ int64_t offset(int64_t n, int c, int y, int x) const {
    return n * elements_ + (y * row_stride + x * column_stride + c * channel_stride);
  }

  int64_t N;
  int C, H, W;
  bool channels_last;
  int channel_stride, row_stride, column_stride;

 private:
  int vector_;
  int64_t elements_, vectors_;  // of an image
  int64_t count_;               // vectors of all images
  LongDivisor per_image_;
  Divisor inner_, width_;  // inner: vectors of a pixel, or pixels of a plane
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
