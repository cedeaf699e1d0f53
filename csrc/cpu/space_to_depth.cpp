// space_to_depth moves blocks of pixels into channels, with zero padding and a cast; depth_to_space is its inverse. A
// convolution of few channels with stride `block` becomes one of block^2 times as many channels with stride 1.
//   space [N, C, H, W] of any dtype, depth [N, block^2 C, OH, OW] in channels_last: channel (dy block + dx) C + c of
//   pixel (Y, X) is space[c, Y block + dy - pad_h, X block + dx - pad_w], or 0 outside the image
// A task is one row of depth (space_to_depth) or one row of space (depth_to_space) of one image.
#include <vector>

#include "vec.h"

namespace alexnet_kernels::cpu {

struct SpaceToDepthArgs {
  DType from, to;
  bool channels_last;  // space; depth always is
  int64_t C, H, W, OH, OW, block, pad_h, pad_w;
  const void* input;
  void* output;
};

namespace ALEXNET_ISA {
namespace {

// The offset of channel c of pixel (y, x) of image n in space.
inline int64_t space_offset(const SpaceToDepthArgs& a, int64_t n, int64_t c, int64_t y, int64_t x) {
  return a.channels_last ? ((n * a.H + y) * a.W + x) * a.C + c : ((n * a.C + c) * a.H + y) * a.W + x;
}

template <class From, class To>
void to_depth(const SpaceToDepthArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<To>;
  const From* input = static_cast<const From*>(a.input);
  const int64_t part = a.block * a.C, depth = a.block * part;  // elements of a row of a block, of a block
  // The columns of a padded row that come from the image.
  const int64_t first = a.pad_w, last = std::min(a.pad_w + a.W, a.OW * a.block);
  std::vector<To> row(a.OW * part, To(0));
  const std::vector<To> zeros(a.OW * part, To(0));
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.OH, Y = task % a.OH;
    To* out = static_cast<To*>(a.output) + task * a.OW * depth;
    for (int64_t dy = 0; dy < a.block; ++dy) {
      const int64_t y = Y * a.block + dy - a.pad_h;
      const bool inside = y >= 0 && y < a.H;
      if (inside && a.channels_last) {
        const From* from = input + space_offset(a, n, 0, y, 0);
        To* to = row.data() + first * a.C;
        if constexpr (std::is_same_v<acc_t<From>, A>) {
          for_lanes<A>((last - first) * a.C,
                       [&](int64_t i, auto count) { store_n(to + i, load_n(from + i, count), count); });
        } else {
          for (int64_t i = 0; i < (last - first) * a.C; ++i) to[i] = To(A(from[i]));
        }
      } else if (inside) {
        for (int64_t x = first; x < last; ++x) {
          for (int64_t c = 0; c < a.C; ++c) row[x * a.C + c] = To(A(input[space_offset(a, n, c, y, x - a.pad_w)]));
        }
      }
      const To* values = inside ? row.data() : zeros.data();
      for (int64_t X = 0; X < a.OW; ++X) {
        std::memcpy((void*)(out + X * depth + dy * part), values + X * part, part * sizeof(To));
      }
    }
  }
}

template <class From, class To>
void to_space(const SpaceToDepthArgs& a, int64_t begin, int64_t end) {
  const From* input = static_cast<const From*>(a.input);
  To* output = static_cast<To*>(a.output);
  const int64_t depth = a.block * a.block * a.C;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task / a.H, y = task % a.H;
    const int64_t Y = (y + a.pad_h) / a.block, dy = (y + a.pad_h) % a.block;
    for (int64_t x = 0; x < a.W; ++x) {
      const int64_t X = (x + a.pad_w) / a.block, dx = (x + a.pad_w) % a.block;
      for (int64_t c = 0; c < a.C; ++c) {
        const bool inside = Y < a.OH && X < a.OW;  // pixels beyond the last block are zero
        output[space_offset(a, n, c, y, x)] =
            inside ? To(acc_t<To>(input[((n * a.OH + Y) * a.OW + X) * depth + (dy * a.block + dx) * a.C + c])) : To(0);
      }
    }
  }
}

}  // namespace

void space_to_depth(const SpaceToDepthArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.from, [&](auto from) {
    for_dtype(a.to, [&](auto to) { to_depth<decltype(from), decltype(to)>(a, begin, end); });
  });
}
void depth_to_space(const SpaceToDepthArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.from, [&](auto from) {
    for_dtype(a.to, [&](auto to) { to_space<decltype(from), decltype(to)>(a, begin, end); });
  });
}

}  // namespace ALEXNET_ISA
}  // namespace alexnet_kernels::cpu

#ifdef ALEXNET_REGISTER
#include "operator.h"

namespace alexnet_kernels::cpu {
ALEXNET_DECLARE_KERNEL(space_to_depth, SpaceToDepthArgs)
ALEXNET_DECLARE_KERNEL(depth_to_space, SpaceToDepthArgs)

namespace {

Tensor space_to_depth(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("space_to_depth", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  Tensor output = empty({x.size(0), block * block * x.size(1), size[0], size[1]}, dtype, x, MemoryFormat::ChannelsLast);
  SpaceToDepthArgs a{dtype_of(x),
                     dtype_of(output),
                     format == MemoryFormat::ChannelsLast,
                     x.size(1),
                     x.size(2),
                     x.size(3),
                     size[0],
                     size[1],
                     block,
                     padding[0],
                     padding[1],
                     x.const_data_ptr(),
                     output.mutable_data_ptr()};
  if (output.numel() > 0) run(pick_space_to_depth(), a, x.size(0) * size[0], output.numel() * 8);
  return output;
}

Tensor depth_to_space(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("depth_to_space", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size, input.size(1));
  const Tensor x = in_format(input, MemoryFormat::ChannelsLast);
  const int64_t channels = x.size(1) / (block * block);
  Tensor output = empty({x.size(0), channels, size[0], size[1]}, dtype, x, MemoryFormat::ChannelsLast);
  SpaceToDepthArgs a{dtype_of(x),
                     dtype_of(output),
                     true,
                     channels,
                     size[0],
                     size[1],
                     x.size(2),
                     x.size(3),
                     block,
                     padding[0],
                     padding[1],
                     x.const_data_ptr(),
                     output.mutable_data_ptr()};
  if (output.numel() > 0) run(pick_depth_to_space(), a, x.size(0) * size[0], output.numel() * 8);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_kernels, CPU, m) {
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
}

}  // namespace alexnet_kernels::cpu
#endif
