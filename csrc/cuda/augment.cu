// Crops, mirrors, shifts colours, subtracts the mean, scales, casts and lays out a batch of images in one pass.
//   out[n, c, y, x] = (image[n, top + y, left + x', c] + shift[n, c] - mean) * scale[c],  x' = mirrored ? w - 1 - x : x
//   images uint8 [N, H, W, C]; crops int64 [N, 2]; flips bool [N]; shift [N, C], scale [C], mean (see Mean) float
//   out [N, C, h, w] in either memory format; float, double, bfloat16 or float16
// A thread computes up to 16 bytes of consecutive elements of one image, in the memory order of the output. Loads are
// of single elements: bytes of the image, floats of the mean, shift and scale.
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

// The mean has shape [C] (colour), [C, h, w] (crop: subtracted after mirroring) or [C, H, W] (image: cropped and
// mirrored with the image).
enum class Mean : int { none, colour, crop, image };

struct AugmentArgs {
  int C, H, W, h, w;
  int64_t count;  // elements of a crop
  Divisor channels, width, pixels;
  bool channels_last;
  Mean mean_kind;
  const uint8_t* images;
  const int64_t* crops;
  const bool* flips;                  // may be null
  const float *shift, *mean, *scale;  // may be null
};

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) augment_images(AugmentArgs a, int blocks_per_image, T* out) {
  const int image = int(blockIdx.x) / blocks_per_image;
  const int64_t n = image;
  const int first = ((int(blockIdx.x) - image * blocks_per_image) * kThreads + int(threadIdx.x)) * kVec;
  if (first >= a.count) return;
  const int top = int(a.crops[2 * n]), left = int(a.crops[2 * n + 1]);
  const bool flip = a.flips != nullptr && a.flips[n];
  float v[kVec];
  // The channel of each element, its pixel in the crop, and its pixel in the image.
  int channel[kVec], crop[kVec], source[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int at = first + i;
    crop[i] = a.channels_last ? a.channels.quotient(at) : a.pixels.remainder(at);
    channel[i] = a.channels_last ? at - crop[i] * a.C : a.pixels.quotient(at);
    const int y = a.width.quotient(crop[i]), x = crop[i] - y * a.w;
    const int row = top + y, column = left + (flip ? a.w - 1 - x : x);
    // The op asserts on the device that crops are inside their image; until it does, no pixel outside is read.
    const bool inside = unsigned(row) < unsigned(a.H) && unsigned(column) < unsigned(a.W);
    source[i] = inside ? row * a.W + column : 0;
    v[i] = float(a.images[(n * a.H * a.W + source[i]) * a.C + channel[i]]);
  }
  if (a.mean_kind == Mean::colour) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] -= a.mean[channel[i]];
  } else if (a.mean_kind == Mean::crop) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] -= a.mean[channel[i] * a.pixels.value() + crop[i]];
  } else if (a.mean_kind == Mean::image) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] -= a.mean[channel[i] * a.H * a.W + source[i]];
  }
  if (a.shift != nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] += a.shift[n * a.C + channel[i]];
  }
  if (a.scale != nullptr) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] *= a.scale[channel[i]];
  }
  store<kVec>(out + n * a.count + first, v);
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
  a.count = int64_t(a.C) * a.h * a.w;
  STD_TORCH_CHECK(int64_t(a.C) * a.H * a.W < (int64_t(1) << 31), "augment: images of 2^31 elements or more");
  a.channels = Divisor(a.C), a.width = Divisor(a.w), a.pixels = Divisor(int64_t(a.h) * a.w);
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
    for_vector<T>(a.count % kVector<T> == 0 ? kVector<T> : 1, [&](auto vector) {
      const int64_t blocks = divide_up(a.count, kThreads * int(vector));
      device.launch(augment_images<T, vector>, N * blocks, kThreads, a, int(blocks), mutable_data<T>(output));
    });
  };
  dtype == ScalarType::Double ? launch(double{}) : for_dtype(output, launch);
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("augment", TORCH_BOX(&augment));
}

}  // namespace alexnet_kernels::cuda
