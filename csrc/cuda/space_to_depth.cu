// space_to_depth moves blocks of pixels into channels, with zero padding and a cast; depth_to_space is its inverse. A
// convolution of few channels with stride `block` becomes one of block^2 times as many channels with stride 1.
//   space [N, C, H, W], depth [N, block^2 C, OH, OW] in channels_last: channel (dy block + dx) C + c of pixel (Y, X) is
//   space[c, Y block + dy - pad_h, X block + dx - pad_w], or 0 outside the image; float, bfloat16 or float16
// In channels_last a row of a block is a run of `block C` elements, consecutive in both tensors: channel dy run + r of
// pixel (Y, X) of depth is element X run + r - pad_w C of row Y block + dy - pad_h of space, which has W C elements.
#include "image_layout.cuh"

namespace alexnet_kernels::cuda {
namespace {

// Images as rows of C W elements, which begin `pad` elements and pad_h rows after the blocks.
struct Rows {
  Rows(const IntList& image, int64_t block, const IntList& padding)
      : height(int(image[2])),
        length(int(image[1] * image[3])),
        pad_h(int(padding[0])),
        pad(int(std::min<int64_t>(padding[1] * image[1], std::numeric_limits<int>::max()))),
        C(image[1]),
        block(block),
        run(block * image[1]) {}

  int height, length, pad_h, pad;
  Divisor C, block, run;
};

// kCount consecutive elements as words, zero until loaded.
template <class T, int kCount>
struct Elements {
  static constexpr int kPerWord = 4 / int(sizeof(T));
  template <int kWords>
  struct alignas(4 * kWords) Words {
    uint32_t word[kWords];
  };

  // Loads elements [i, i + kLoad) from p, which is aligned to them.
  template <int kLoad>
  __device__ __forceinline__ void load(int i, const T* p) {
    if constexpr (kLoad < kPerWord) {
      word[i / kPerWord] |= uint32_t(*reinterpret_cast<const uint16_t*>(p)) << (i % kPerWord * 16);
    } else {
      const auto words = *reinterpret_cast<const Words<kLoad / kPerWord>*>(p);
#pragma unroll
      for (int j = 0; j < kLoad / kPerWord; ++j) word[i / kPerWord + j] = words.word[j];
    }
  }

  __device__ __forceinline__ T operator[](int i) const {
    Pack<T, kCount> pack;
    memcpy(&pack, word, sizeof(pack));
    return pack.value[i];
  }

  // Stores all elements. A copy keeps their bits.
  template <class To>
  __device__ __forceinline__ void store(To* p) const {
    Pack<T, kCount> pack;
    memcpy(&pack, word, sizeof(pack));
    if constexpr (!std::is_same_v<T, To>) {
      float v[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] = float(pack.value[i]);
      cuda::store<kCount>(p, v);
    } else if constexpr (kCount < kPerWord) {
      *p = pack.value[0];
    } else {
      constexpr int kWords = kCount / kPerWord;
      Words<kWords> words;
#pragma unroll
      for (int i = 0; i < kWords; ++i) words.word[i] = word[i];
      *reinterpret_cast<Words<kWords>*>(p) = words;
    }
  }

  uint32_t word[(kCount + kPerWord - 1) / kPerWord] = {};
};

// space in channels_last. A thread stores kVec channels of one pixel of depth, in groups of four that are of one run,
// and loads kLoad elements at a time.
template <class From, class To, int kVec, int kLoad>
__global__ void __launch_bounds__(kThreads)
    to_depth(ImageLayout space, ImageLayout depth, Rows rows, const From* x, To* y) {
  constexpr int kGroup = kVec < 4 ? kVec : 4;
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= depth.vectors()) return;
  const Coordinates at = depth.locate(first, threadIdx.x);
  x += space.offset(at.n, 0, 0, 0);
  const int top = at.y * rows.block.value() - rows.pad_h, left = at.x * rows.run.value() - rows.pad;
  Elements<From, kVec> v;
#pragma unroll
  for (int i = 0; i < kVec; i += kGroup) {
    const int dy = rows.run.quotient(at.c + i), element = left + at.c + i - dy * rows.run.value();
    const bool inside = unsigned(top + dy) < unsigned(rows.height);
    const From* p = x + ((top + dy) * rows.length + element);
#pragma unroll
    for (int j = 0; j < kGroup; j += kLoad) {
      if (inside && unsigned(element + j) < unsigned(rows.length)) v.template load<kLoad>(i + j, p + j);
    }
  }
  v.store(y + vector * kVec);
}

// space in NCHW, of three channels, in blocks of 4 x 4. A thread computes two runs of a pixel, 24 channels, from six
// rows of four elements. The threads of a warp exchange them in shared memory to store consecutive vectors. units:
// depth's layout in vectors of 24 channels.
constexpr int kColours = 3, kColourBlock = 4, kUnit = 2 * kColourBlock * kColours;

template <class From, class To, int kLoad>
__global__ void __launch_bounds__(kThreads)
    colours_to_depth(ImageLayout space, ImageLayout units, Rows rows, int pad_w, const From* x, To* y) {
  constexpr int kVectors = kUnit / kVector<To>;
  __shared__ Pack<uint32_t, 4> staged[kThreads * kVectors];
  const int64_t first = int64_t(blockIdx.x) * kThreads;
  if (first + threadIdx.x < units.vectors()) {
    const Coordinates at = units.locate(first, threadIdx.x);
    const int top = at.y * kColourBlock - rows.pad_h + at.c / (kUnit / 2), left = at.x * kColourBlock - pad_w;
    const From* corner = x + space.offset(at.n, 0, top, left);
    Pack<From, kUnit> v;
#pragma unroll
    for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
      for (int c = 0; c < kColours; ++c) {
        Elements<From, kColourBlock> row;
        const From* p = corner + (c * space.channel_stride + dy * space.row_stride);
#pragma unroll
        for (int dx = 0; dx < kColourBlock; dx += kLoad) {
          const bool inside = unsigned(top + dy) < unsigned(space.H) && unsigned(left + dx) < unsigned(space.W);
          if (inside) row.template load<kLoad>(dx, p + dx);
        }
#pragma unroll
        for (int dx = 0; dx < kColourBlock; ++dx) v.value[(dy * kColourBlock + dx) * kColours + c] = row[dx];
      }
    }
#pragma unroll
    for (int i = 0; i < kUnit; i += kVector<To>) {
      float part[kVector<To>];
#pragma unroll
      for (int j = 0; j < kVector<To>; ++j) part[j] = float(v.value[i + j]);
      store<kVector<To>>(reinterpret_cast<To*>(staged[threadIdx.x * kVectors + i / kVector<To>].value), part);
    }
  }
  __syncwarp();
  const int lane = int(threadIdx.x % kWarp), of_warp = int(threadIdx.x - lane) * kVectors;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = of_warp + i * kWarp + lane;
    const int64_t vector = first * kVectors + at;
    if (vector < units.vectors() * kVectors) reinterpret_cast<Pack<uint32_t, 4>*>(y)[vector] = staged[at];
  }
}

// space in NCHW: elements of the planes, one at a time.
template <class From, class To, int kVec>
__global__ void __launch_bounds__(kThreads)
    planes_to_depth(ImageLayout space, ImageLayout depth, Rows rows, int pad_w, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= depth.vectors()) return;
  const Coordinates at = depth.locate(first, threadIdx.x);
  x += space.offset(at.n, 0, 0, 0);
  const int top = at.y * rows.block.value() - rows.pad_h, left = at.x * rows.block.value() - pad_w;
  Elements<From, kVec> v;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int pixel = rows.C.quotient(at.c + i), c = at.c + i - pixel * rows.C.value();
    const int dy = rows.block.quotient(pixel), row = top + dy, column = left + pixel - dy * rows.block.value();
    const bool inside = unsigned(row) < unsigned(space.H) && unsigned(column) < unsigned(space.W);
    if (inside) v.template load<1>(i, x + (c * space.channel_stride + row * space.row_stride + column));
  }
  v.store(y + vector * kVec);
}

// A thread stores kVec elements of a row of space, and loads kLoad elements of a run at a time. Pixels beyond the last
// block are zero. space: its layout with rows as channels.
template <class From, class To, int kVec, int kLoad>
__global__ void __launch_bounds__(kThreads)
    to_space(ImageLayout depth, ImageLayout space, Rows rows, const From* x, To* y) {
  const int64_t first = int64_t(blockIdx.x) * kThreads, vector = first + threadIdx.x;
  if (vector >= space.vectors()) return;
  const Coordinates at = space.locate(first, threadIdx.x);
  const unsigned row = unsigned(at.y) + unsigned(rows.pad_h);
  const int Y = rows.block.quotient(int(row)), dy = int(row) - Y * rows.block.value();
  x += depth.offset(at.n, dy * rows.run.value(), Y, 0);
  Elements<From, kVec> v;
#pragma unroll
  for (int i = 0; i < kVec; i += kLoad) {
    const unsigned element = unsigned(at.c + i) + unsigned(rows.pad);
    const int X = rows.run.quotient(int(element)), r = int(element) - X * rows.run.value();
    const bool inside = row < unsigned(depth.H) * unsigned(rows.block.value()) &&
                        element < unsigned(depth.W) * unsigned(rows.run.value());
    if (inside) v.template load<kLoad>(i, x + (X * depth.C + r));
  }
  v.store(y + vector * kVec);
}

// Calls body with the elements of a load as a constant: the most that divides every one of `offsets` and keeps p
// aligned, up to `most`.
template <int kMostLoaded, class From, class Body>
void for_load(const From* p, std::initializer_list<int64_t> offsets, const Body& body) {
  auto fits = [&](int64_t count) {
    return reinterpret_cast<uintptr_t>(p) % (count * sizeof(From)) == 0 &&
           std::all_of(offsets.begin(), offsets.end(), [&](int64_t offset) { return offset % count == 0; });
  };
  if constexpr (kMostLoaded >= 4) {
    if (fits(4)) return body(std::integral_constant<int, 4>{});
    if (fits(2)) return body(std::integral_constant<int, 2>{});
  }
  body(std::integral_constant<int, 1>{});
}

Tensor space_to_depth(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("space_to_depth", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size);
  const MemoryFormat format = memory_format_of(input);
  const Tensor x = in_format(input, format);
  const IntList to{x.size(0), block * block * x.size(1), size[0], size[1]};
  Tensor output = empty(to, dtype, x, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const OnDevice device(x);
  const Rows rows(sizes_of(x), block, padding);
  const bool planes = format == MemoryFormat::Contiguous && x.size(1) > 1;
  for_dtype(x, [&](auto from) {
    using From = decltype(from);
    for_dtype(output, [&](auto t) {
      using T = decltype(t);
      const int most = planes || rows.run.value() % 4 == 0 ? vector_of<T>(MemoryFormat::ChannelsLast, to[1]) : 1;
      for_vector<T>(most, [&](auto vector) {
        const ImageLayout space(sizes_of(x), format, 1), depth(to, MemoryFormat::ChannelsLast, vector);
        const int64_t blocks = divide_up(depth.vectors(), kThreads);
        if (planes && x.size(1) == kColours && block == kColourBlock) {
          // Every thread has vectors: 48 channels are a multiple of them.
          if constexpr (vector > 1) {
            const ImageLayout units(to, MemoryFormat::ChannelsLast, kUnit);
            for_load<vector>(data<From>(x), {x.size(3), padding[1]}, [&](auto load) {
              device.launch(colours_to_depth<From, T, load>, divide_up(units.vectors(), kThreads), kThreads, space,
                            units, rows, int(padding[1]), data<From>(x), mutable_data<T>(output));
            });
          }
          return;
        }
        if (planes) {
          device.launch(planes_to_depth<From, T, vector>, blocks, kThreads, space, depth, rows, int(padding[1]),
                        data<From>(x), mutable_data<T>(output));
          return;
        }
        for_load<vector>(data<From>(x), {rows.length, rows.pad, rows.run.value()}, [&](auto load) {
          device.launch(to_depth<From, T, vector, load>, blocks, kThreads, space, depth, rows, data<From>(x),
                        mutable_data<T>(output));
        });
      });
    });
  });
  return output;
}

Tensor depth_to_space(const Tensor& input, int64_t block, IntList padding, IntList size, ScalarType dtype) {
  const Operands given = operands("depth_to_space", "input", input);
  given.images("input", input);
  given.blocks(block, padding, size, input.size(1));
  const Tensor x = in_format(input, MemoryFormat::ChannelsLast);
  const IntList to{x.size(0), x.size(1) / (block * block), size[0], size[1]};
  Tensor output = empty(to, dtype, x, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  const OnDevice device(x);
  const Rows rows(to, block, padding);
  for_dtype(x, [&](auto from) {
    using From = decltype(from);
    for_dtype(output, [&](auto t) {
      using T = decltype(t);
      for_vector<T>(vector_of<T>(MemoryFormat::ChannelsLast, to[1] * to[3]), [&](auto vector) {
        const ImageLayout depth(sizes_of(x), MemoryFormat::ChannelsLast, 1),
            space({to[0], to[1] * to[3], to[2], 1}, MemoryFormat::ChannelsLast, vector);
        for_load<vector>(data<From>(x), {rows.pad, rows.run.value()}, [&](auto load) {
          device.launch(to_space<From, T, vector, load>, divide_up(space.vectors(), kThreads), kThreads, depth, space,
                        rows, data<From>(x), mutable_data<T>(output));
        });
      });
    });
  });
  return output;
}

}  // namespace

ALEXNET_CUDA_OPERATORS(m) {
  m.impl("space_to_depth", TORCH_BOX(&space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&depth_to_space));
}

}  // namespace alexnet_kernels::cuda
