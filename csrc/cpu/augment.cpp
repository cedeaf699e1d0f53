// Crops, mirrors, shifts colours, subtracts the mean, scales, casts and lays out a batch of images in one pass.
//   out[n, c, y, x] = (image[n, top + y, left + x', c] + shift[n, c] - mean) * scale[c],  x' = mirrored ? w - 1 - x : x
//   images uint8 [N, H, W, C]; crops int64 [N, 2]; flips bool [N]; shift, scale, mean float [N, C], [C], see Mean
//   out [N, C, h, w] in either memory format
// A task is one output row of one image.
#include <vector>

#include "vec.h"

namespace alexnet_kernels::cpu {

// The mean has shape [C] (colour), [C, h, w] (crop: subtracted after mirroring) or [C, H, W] (image: cropped and
// mirrored with the image).
enum class Mean : uint8_t { none, colour, crop, image };

struct AugmentArgs {
  DType dtype;
  bool channels_last;
  Mean mean_kind;
  int64_t C, H, W, h, w;
  const uint8_t* images;
  const int64_t* crops;
  const bool* flips;                  // may be null
  const float *shift, *mean, *scale;  // may be null
  void* output;
};

namespace ALEXNET_ISA {
namespace {

template <class T>
void augment(const AugmentArgs& a, int64_t begin, int64_t end) {
  const int64_t count = a.w * a.C;
  std::vector<uint8_t> row(count);
  std::vector<float> offset(count), scale(count, 1.f), values(count);
  for (int64_t i = 0; i < count && a.scale; ++i) scale[i] = a.scale[i % a.C];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.h, y = task % a.h;
    const int64_t top = a.crops[2 * n], left = a.crops[2 * n + 1];
    const bool flip = a.flips && a.flips[n];
    const uint8_t* from = a.images + ((n * a.H + top + y) * a.W + left) * a.C;
    for (int64_t x = 0; x < a.w; ++x) {
      const int64_t source = flip ? a.w - 1 - x : x;
      for (int64_t c = 0; c < a.C; ++c) row[x * a.C + c] = from[source * a.C + c];
    }
    // The subtracted values are the same for all rows of an image, unless the mean has pixels.
    if (y == 0 || task == begin || a.mean_kind >= Mean::crop) {
      for (int64_t x = 0; x < a.w; ++x) {
        const int64_t source = flip ? a.w - 1 - x : x;
        for (int64_t c = 0; c < a.C; ++c) {
          float m = 0;
          if (a.mean_kind == Mean::colour) m = a.mean[c];
          if (a.mean_kind == Mean::crop) m = a.mean[(c * a.h + y) * a.w + x];
          if (a.mean_kind == Mean::image) m = a.mean[(c * a.H + top + y) * a.W + left + source];
          offset[x * a.C + c] = m - (a.shift ? a.shift[n * a.C + c] : 0.f);
        }
      }
    }
    for_lanes<float>(count, [&](int64_t i, auto lanes) {
      const Vec<float> v = (load_n(&row[i], lanes) - load_n(&offset[i], lanes)) * load_n(&scale[i], lanes);
      store_n(&values[i], v, lanes);
    });
    T* output = static_cast<T*>(a.output);
    if (a.channels_last) {
      T* to = output + task * count;
      if constexpr (std::is_same_v<T, double>) {
        for (int64_t i = 0; i < count; ++i) to[i] = values[i];
      } else {
        for_lanes<float>(count, [&](int64_t i, auto lanes) { store_n(to + i, load_n(&values[i], lanes), lanes); });
      }
    } else {
      for (int64_t c = 0; c < a.C; ++c) {
        T* to = output + ((n * a.C + c) * a.h + y) * a.w;
        for (int64_t x = 0; x < a.w; ++x) to[x] = T(values[x * a.C + c]);
      }
    }
  }
}

}  // namespace

void augment_images(const AugmentArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto t) { augment<decltype(t)>(a, begin, end); });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(augment_images, AugmentArgs)

namespace {

Tensor as(const Tensor& t, ScalarType type) {
  return in_format(t.scalar_type() == type ? t : torch::stable::to(t, type), MemoryFormat::Contiguous);
}

Tensor augment(const Tensor& images, const Tensor& crops, IntList size, std::optional<Tensor> flips,
               std::optional<Tensor> color_shift, std::optional<Tensor> mean, std::optional<Tensor> scale,
               ScalarType dtype, bool channels_last) {
  operands("augment", "images", images).augment(images, crops, size, flips, color_shift, mean, scale);
  const Tensor x = in_format(images, MemoryFormat::Contiguous), at = as(crops, ScalarType::Long);
  const int64_t N = x.size(0);
  AugmentArgs a{};
  a.channels_last = channels_last;
  a.H = x.size(1), a.W = x.size(2), a.C = x.size(3), a.h = size[0], a.w = size[1];
  a.images = static_cast<const uint8_t*>(x.const_data_ptr());
  a.crops = static_cast<const int64_t*>(at.const_data_ptr());
  for (int64_t i = 0; i < 2 * N; ++i) {
    const int64_t last = i % 2 ? a.W - a.w : a.H - a.h;
    STD_TORCH_CHECK(a.crops[i] >= 0 && a.crops[i] <= last, "augment: crops[", i / 2, "][", i % 2, "] is ", a.crops[i],
                    "; a crop inside the image begins at 0 to ", last);
  }
  std::vector<Tensor> kept;  // keeps the memory alive until the kernel has run
  auto data = [&](const std::optional<Tensor>& t, ScalarType type) -> const void* {
    if (!t) return nullptr;
    kept.push_back(as(*t, type));
    return kept.back().const_data_ptr();
  };
  a.flips = static_cast<const bool*>(data(flips, ScalarType::Bool));
  a.shift = static_cast<const float*>(data(color_shift, ScalarType::Float));
  a.mean = static_cast<const float*>(data(mean, ScalarType::Float));
  a.scale = static_cast<const float*>(data(scale, ScalarType::Float));
  if (mean) {
    const bool whole = mean->dim() == 3 && mean->size(1) == a.H && mean->size(2) == a.W;
    a.mean_kind = mean->dim() == 1 ? Mean::colour : whole ? Mean::image : Mean::crop;
  }
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor output = empty({N, a.C, a.h, a.w}, dtype, x, format);
  a.dtype = dtype_of(output);
  a.output = output.mutable_data_ptr();
  if (output.numel() > 0) run(pick_augment_images(), a, N * a.h, output.numel() * 8);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("augment", TORCH_BOX(&augment));
}

}  // namespace alexnet_kernels::cpu
#endif
