// Crops, mirrors, shifts colours, subtracts the mean, scales, casts and lays out a batch of images in one pass.
//   out[n, c, y, x] = (image[n, top + y, left + x', c] + shift[n, c] - mean) * scale[c],  x' = mirrored ? w - 1 - x : x
//   images uint8 [N, H, W, C]; crops int64 [N, 2]; flips bool [N]; shift [N, C], scale [C], mean (see Mean) float
//   out [N, C, h, w] in either memory format; float, double, bfloat16 or float16
// Pixels count from the first of the first image. A thread takes as many consecutive ones as 16 bytes of the output
// hold elements, of three channels: it loads words of the image, stores 16 bytes to each plane in NCHW, and the threads
// of a warp exchange their vectors in shared memory in channels_last. Pixels that are not consecutive in one row of an
// image, and images of other channels, go one by one.
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

// The mean has shape [C] (colour), [C, h, w] (crop: subtracted after mirroring) or [C, H, W] (image: cropped and
// mirrored with the image).
enum class Mean : int { none, colour, crop, image };

struct AugmentArgs {
  int C, H, W, h, w;
  int64_t count;       // pixels of all crops
  LongDivisor pixels;  // of a crop
  Divisor width;
  bool channels_last;
  Mean mean_kind;
  const uint8_t* images;
  const int64_t* crops;
  const bool* flips;                  // may be null
  const float *shift, *mean, *scale;  // may be null
};

// A pixel of a crop: (y, x), number `within`, of the crop of image n. The op asserts on the device that crops are
// inside their image; until it does, a crop outside is moved inside.
struct Pixel {
  __device__ __forceinline__ Pixel(const AugmentArgs& a, int64_t pixel)
      : n(a.pixels.quotient(pixel)),
        within(int(pixel - n * a.pixels.value())),
        y(a.width.quotient(within)),
        x(within - y * a.w),
        row(inside(a.crops[2 * n], a.H - a.h) + y),
        left(inside(a.crops[2 * n + 1], a.W - a.w)),
        flip(a.flips != nullptr && a.flips[n]) {}

  // The pixel's place in the image, and that of the first of `count` pixels in its row.
  __device__ __forceinline__ int source(const AugmentArgs& a, int count = 1) const {
    return row * a.W + left + (flip ? a.w - count - x : x);
  }

  int64_t n;
  int within, y, x;
  int row, left;  // the pixel's row in the image, and the crop's first column
  bool flip;

 private:
  static __device__ __forceinline__ int inside(int64_t begin, int last) {
    return int(min(max(begin, int64_t(0)), int64_t(last)));
  }
};

// mean: the mean of the channel or of its pixel, if there is one.
__device__ __forceinline__ float offset_of(const AugmentArgs& a, int64_t n, int c, float mean) {
  return mean - (a.shift != nullptr ? a.shift[n * a.C + c] : 0.f);
}
__device__ __forceinline__ float scale_of(const AugmentArgs& a, int c) {
  return a.scale != nullptr ? a.scale[c] : 1.f;
}

// Calls body(c, value) for every channel of a pixel.
template <class Body>
__device__ __forceinline__ void each_channel(const AugmentArgs& a, const Pixel& p, const Body& body) {
  const int source = p.source(a);
  const uint8_t* from = a.images + (p.n * a.H * a.W + source) * a.C;
#pragma unroll 1
  for (int c = 0; c < a.C; ++c) {
    float mean = 0.f;
    if (a.mean_kind == Mean::colour) mean = a.mean[c];
    if (a.mean_kind == Mean::crop) mean = a.mean[c * int(a.pixels.value()) + p.within];
    if (a.mean_kind == Mean::image) mean = a.mean[c * a.H * a.W + source];
    body(c, (float(from[c]) - offset_of(a, p.n, c, mean)) * scale_of(a, c));
  }
}

// One pixel a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) augment_pixels(AugmentArgs a, T* out) {
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= a.count) return;
  const Pixel p(a, pixel);
  each_channel(a, p, [&](int c, float value) {
    out[a.channels_last ? pixel * a.C + c : (p.n * a.C + c) * a.pixels.value() + p.within] = T(value);
  });
}

constexpr int kColours = 3;

// The bytes of kPixels pixels that are consecutive in an image.
template <int kPixels>
struct Colours {
  static constexpr int kBytes = kColours * kPixels, kLoads = (kBytes + 6) / 4;

  // From the words that hold bytes from p on.
  __device__ __forceinline__ void load(const uint8_t* p) {
    const int before = int(reinterpret_cast<uintptr_t>(p) % 4);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(p - before);
    uint32_t loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = 4 * i < before + kBytes ? words[i] : 0;
#pragma unroll
    for (int i = 0; i < kLoads - 1; ++i) word[i] = __funnelshift_r(loaded[i], loaded[i + 1], 8 * before);
  }

  // Reverses the order of the pixels.
  __device__ __forceinline__ void mirror() {
    uint32_t mirrored[kLoads - 1] = {};
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      const int from = (kPixels - 1 - i / kColours) * kColours + i % kColours, to = 4 * (i % 4);
      mirrored[i / 4] = __byte_perm(mirrored[i / 4], word[from / 4], (0x3210 & ~(0xf << to)) | (4 + from % 4) << to);
    }
#pragma unroll
    for (int i = 0; i < kLoads - 1; ++i) word[i] = mirrored[i];
  }

  // Channel c of pixel i: the low byte of the float 2^23.
  __device__ __forceinline__ float value(int i, int c) const {
    const int at = i * kColours + c;
    return __uint_as_float(__byte_perm(word[at / 4], 0x4b000000, 0x7650 + at % 4)) - 8388608.f;
  }

  uint32_t word[kLoads - 1];
};

// Images of three channels in whole words. In NCHW, planes are a multiple of vectors.
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) augment_colours(AugmentArgs a, T* out) {
  constexpr int kPixels = kVector<T>;
  using Vector = Pack<T, kPixels>;
  __shared__ Pack<uint32_t, 4> staged[kChannelsLast ? kThreads * kColours : 1];
  const int64_t first = int64_t(blockIdx.x) * kThreads * kPixels, pixel = first + int(threadIdx.x) * kPixels;
  if (pixel < a.count) {
    const Pixel p(a, pixel);
    T* own = kChannelsLast ? reinterpret_cast<T*>(staged[threadIdx.x * kColours].value)
                           : out + (p.n * kColours * a.pixels.value() + p.within);
    if (p.x + kPixels <= a.w) {
      const int source = p.source(a, kPixels);
      Colours<kPixels> colours;
      colours.load(a.images + (p.n * a.H * a.W + source) * kColours);
      if (p.flip) colours.mirror();
      float v[kColours][kPixels];
#pragma unroll
      for (int c = 0; c < kColours; ++c) {
        const float scale = scale_of(a, c);
        if (a.mean_kind <= Mean::colour) {
          const float offset = offset_of(a, p.n, c, a.mean_kind == Mean::colour ? a.mean[c] : 0.f);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) v[c][i] = (colours.value(i, c) - offset) * scale;
        } else {
          const bool image = a.mean_kind == Mean::image;
          const float* from = a.mean + (image ? c * a.H * a.W + source : c * int(a.pixels.value()) + p.within);
          float mean[kPixels];
#pragma unroll
          for (int i = 0; i < kPixels; ++i) mean[i] = from[i];
#pragma unroll
          for (int i = 0; i < kPixels / 2; ++i) {
            const float left = mean[i], right = mean[kPixels - 1 - i];
            mean[i] = image && p.flip ? right : left;
            mean[kPixels - 1 - i] = image && p.flip ? left : right;
          }
          const float shift = offset_of(a, p.n, c, 0.f);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            v[c][i] = (colours.value(i, c) - (mean[i] + shift)) * scale;
          }
        }
      }
      const int64_t step = kChannelsLast ? kPixels : a.pixels.value();
      T* to = own;
#pragma unroll
      for (int c = 0; c < kColours; ++c, to += step) {
        if constexpr (kChannelsLast) {
          float part[kPixels];
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            part[i] = v[(c * kPixels + i) % kColours][(c * kPixels + i) / kColours];
          }
          store<kPixels>(to, part);
        } else {
          Vector vector;
          store<kPixels>(vector.value, v[c]);
#if defined(__CUDA_ARCH__)
          // The compiler splits stores to addresses that differ by a variable.
          const auto& words = reinterpret_cast<const uint4&>(vector);
          asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                       "r"(words.w)
                       : "memory");
#else
          *reinterpret_cast<Vector*>(to) = vector;
#endif
        }
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPixels && pixel + i < a.count; ++i) {
        each_channel(a, Pixel(a, pixel + i), [&](int c, float value) {
          own[kChannelsLast ? i * kColours + c : c * a.pixels.value() + i] = T(value);
        });
      }
    }
  }
  if constexpr (kChannelsLast) {
    __syncwarp();
    const int lane = int(threadIdx.x % kWarp), of_warp = int(threadIdx.x - lane) * kColours;
#pragma unroll
    for (int i = 0; i < kColours; ++i) {
      const int vector = of_warp + i * kWarp + lane;
      const int64_t at = first * kColours + vector * kPixels, end = a.count * kColours;
      if (at + kPixels <= end) {
        *reinterpret_cast<Pack<uint32_t, 4>*>(out + at) = staged[vector];
      } else {
#pragma unroll 1
        for (int j = 0; at + j < end; ++j) out[at + j] = reinterpret_cast<const T*>(staged[vector].value)[j];
      }
    }
  }
}

Tensor as(const Tensor& t, ScalarType type) {
  return in_format(t.scalar_type() == type ? t : torch::stable::to(t, type), MemoryFormat::Contiguous);
}

Tensor augment(const Tensor& images, const Tensor& crops, IntList size, std::optional<Tensor> flips,
               std::optional<Tensor> color_shift, std::optional<Tensor> mean, std::optional<Tensor> scale,
               ScalarType dtype, bool channels_last) {
  operands("augment", "images", images).augment(images, crops, size, flips, color_shift, mean, scale);
  const OnDevice device(images);
  const Tensor x = in_format(images, MemoryFormat::Contiguous), at = as(crops, ScalarType::Long);
  const int64_t N = x.size(0);
  AugmentArgs a{};
  a.H = int(x.size(1)), a.W = int(x.size(2)), a.C = int(x.size(3)), a.h = int(size[0]), a.w = int(size[1]);
  STD_TORCH_CHECK(int64_t(a.C) * a.H * a.W < (int64_t(1) << 31), "augment: images of 2^31 elements or more");
  const int64_t pixels = int64_t(a.h) * a.w;
  a.count = N * pixels;
  a.pixels = LongDivisor(pixels), a.width = Divisor(a.w);
  a.channels_last = channels_last;
  a.images = data<uint8_t>(x);
  a.crops = data<int64_t>(at);
  std::vector<Tensor> kept;  // keeps the memory alive until the launch
  auto values = [&](const std::optional<Tensor>& t, ScalarType type) -> const void* {
    if (!t) return nullptr;
    kept.push_back(as(*t, type));
    return kept.back().const_data_ptr();
  };
  a.flips = static_cast<const bool*>(values(flips, ScalarType::Bool));
  a.shift = static_cast<const float*>(values(color_shift, ScalarType::Float));
  a.mean = static_cast<const float*>(values(mean, ScalarType::Float));
  a.scale = static_cast<const float*>(values(scale, ScalarType::Float));
  if (mean) {
    const bool whole = mean->dim() == 3 && mean->size(1) == a.H && mean->size(2) == a.W;
    a.mean_kind = mean->dim() == 1 ? Mean::colour : whole ? Mean::image : Mean::crop;
  }
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = empty({N, a.C, a.h, a.w}, dtype, x, format);
  if (output.numel() == 0) return output;
  auto launch = [&](auto t) {
    using T = decltype(t);
    T* out = mutable_data<T>(output);
    const bool whole_words = reinterpret_cast<uintptr_t>(a.images) % 4 == 0 && x.numel() % 4 == 0;
    if (a.C == kColours && whole_words && (channels_last || pixels % kVector<T> == 0)) {
      const int64_t blocks = divide_up(a.count, kThreads * kVector<T>);
      for_bool(channels_last, [&](auto last) { device.launch(augment_colours<T, last>, blocks, kThreads, a, out); });
    } else {
      device.launch(augment_pixels<T>, divide_up(a.count, kThreads), kThreads, a, out);
    }
  };
  dtype == ScalarType::Double ? launch(double{}) : for_dtype(output, launch);
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("augment", TORCH_BOX(&augment));
}

}  // namespace alexnet_kernels::cuda
