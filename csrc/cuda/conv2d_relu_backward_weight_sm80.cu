// weight_gradient_mma: the gradients of a convolution's weight and bias on tensor cores by mma.sync, for sm_80 and
// later.
//
// The gradient is a matrix product (implicit GEMM) that sums over the pixels of y. Its rows are the filters of one
// group and its columns the terms m = (r, s, c) of a filter, in the order in which w stores them: the left operand is
// g, whose rows are pixels, and the right one gathers x. Both are stored along the other dimension than mma sums over,
// so ldmatrix transposes them.
//
//   block     64, 96 or 128 filters x 128 terms, of one group and one split of the pixels; warps of 32 x 64
//   chunk     32 pixels: two steps of mma (m16n8k16)
//   part      16 bytes of a pixel's filters or terms, as cp.async copies and ldmatrix loads them
//   stage     a chunk of both operands in shared memory; four stages are a ring
//   split     a range of whole chunks; the sums of each are written apart, and add_splits adds them
//
// Threads. A thread copies the same part of a few pixels of every chunk, of each operand. So it locates its term (r, s,
// c) once, and follows its pixels by additions. Where C is a multiple of a part's elements, a part has one r and s, so
// that one comparison decides whether it lies in the image; what lies outside, beyond the split's last pixel and beyond
// the last filter or term is zero. Any other C or K, and memory that is not aligned, goes through registers element by
// element.
//
// The pipeline is that of conv2d_relu_sm80.cu. The bias's gradient, the sum of g, is a product with ones in the blocks
// of the first terms.
//
// Results do not depend on the order of blocks: each sums its chunks in ascending order.
#include "conv2d_relu_backward.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "tensor_core.cuh"

namespace alexnet_kernels::cuda {
namespace {

constexpr int kPartBytes = 16;
constexpr int kPartElements = 8;
constexpr int kRowBytes = 64;  // of a pixel's parts in a block of shared memory
constexpr int kParts = kRowBytes / kPartBytes;
constexpr int kChunk = 32;  // pixels
constexpr int kStep = 16;   // of one mma
constexpr int kBlockBytes = kChunk * kRowBytes;
constexpr int kStages = 4;
constexpr int kTerms = 128;  // of a tile
constexpr int kWarpFilters = 32, kWarpTerms = 64;
constexpr int kMmaRows = 16, kMmaColumns = 8;
constexpr int kMostFilters = 128;
constexpr int kResident = 2;  // blocks of a multiprocessor
static_assert(kParts == 4 && kChunk % kStep == 0);
static_assert(kTerms % kWarpTerms == 0 && kWarpTerms % (2 * kMmaColumns) == 0 && kWarpFilters % kMmaRows == 0);

// A block's division of its work.
template <int kFilters>
struct Tile {
  static constexpr int kThreads = kWarp * (kFilters / kWarpFilters) * (kTerms / kWarpTerms);
  static constexpr int kLeftParts = kFilters / kPartElements, kRightParts = kTerms / kPartElements;  // of a pixel
  // Pixels of which all threads copy the parts at once.
  static constexpr int kLeftPixels = kThreads / kLeftParts, kRightPixels = kThreads / kRightParts;
  static constexpr int kLeftPasses = kChunk / kLeftPixels, kRightPasses = (kChunk + kRightPixels - 1) / kRightPixels;
  static constexpr int kLeftBytes = kChunk * kFilters * 2;
  static constexpr int kStageBytes = kLeftBytes + kChunk * kTerms * 2;
  static constexpr int kShared = kStages * kStageBytes;
  // Of a chunk, through shared memory.
  static constexpr int kTraffic = kStageBytes + kThreads / kWarp * (kWarpFilters + kWarpTerms) * kChunk * 2;
  static_assert(kFilters % kWarpFilters == 0 && kThreads % kLeftParts == 0 && kThreads % kRightParts == 0);
  static_assert(kChunk % kLeftPixels == 0 && kLeftPixels % 8 == 0 && kRightPixels % 4 == 0);
  static_assert((kChunk % kRightPixels * kRightParts) % kWarp == 0, "warps take part in the last pass as a whole");
  static_assert(kShared <= 99 * 1024, "what sm_86, sm_89 and sm_120 have for a block");
};

// Where part `part` of a pixel is. A block of shared memory holds four parts of each pixel, 64 bytes, two of which span
// the 32 banks. Permuted, the same part of eight pixels, which ldmatrix reads at once, lies in all banks, and so do
// eight parts of one pixel, which eight lanes write.
__device__ __forceinline__ uint32_t place(int pixel, int part) {
  const int block = part / kParts, row = pixel ^ block % 2;
  return uint32_t(block * kBlockBytes + row * kRowBytes + (part % kParts ^ row / 2 % kParts) * kPartBytes);
}

// place(pixel + pixels, part) for place(pixel, part); `pixels` is a multiple of 4.
__device__ __forceinline__ uint32_t advance(uint32_t address, int pixels) {
  return (address ^ uint32_t(pixels / 2 % kParts * kPartBytes)) + uint32_t(pixels * kRowBytes);
}

// place(pixel, part + parts), less place(pixel, 0), for an address of a pixel and one of the first two parts of an even
// block; `parts` is even. In an odd block it stays there, so that it takes fewer than kParts.
__device__ __forceinline__ uint32_t move(uint32_t address, int parts) {
  const int blocks = parts / kParts;
  return (address ^ uint32_t(parts % kParts * kPartBytes) ^ uint32_t(blocks % 2 * kRowBytes)) +
         uint32_t(blocks * kBlockBytes);
}

// What some pixels more add to a pixel's position in y, in coordinates of x, and to its offset there.
struct Step {
  int h, w;
  uint32_t offset;
};

// The arguments of the kernel. Offsets are in elements, modulo 2^32: those of elements in a tensor are below 2^31.
template <class T>
struct Problem {
  const T *x, *g;
  float *sums, *bias_sums;  // [split, groups filters, terms], [split, groups filters]; the latter may be null
  int pixels;               // of y
  int split_pixels;         // a multiple of kChunk
  int H, W, C, S, filters;  // channels and filters of a group
  int groups;
  uint32_t all_filters;
  int terms;                   // R S C
  uint32_t pixel, row, image;  // offsets of the next pixel, row and image of x
  int stride[2], padding[2];
  Step steps[2];  // from a pass to the next one, and from a chunk's last pass to the next chunk
  // The ends of those coordinates, after which the next row or image begins, and what that adds to the offset.
  int last_h, last_w;
  uint32_t next_row, next_image;
  Divisor width, height;   // of y
  Divisor channels, taps;  // C and S
  Divisor term_tiles, filter_tiles, groups_of;
};

// A pixel of y: its window's first pixel, in coordinates and as an offset in x; perhaps outside the image.
template <class T>
struct Window {
  int h, w;
  uint32_t offset;

  __device__ __forceinline__ void locate(const Problem<T>& p, int pixel) {
    const int line = p.width.quotient(pixel), n = p.height.quotient(line);
    h = (line - n * p.height.value()) * p.stride[0] - p.padding[0];
    w = (pixel - line * p.width.value()) * p.stride[1] - p.padding[1];
    offset = uint32_t(n) * p.image + uint32_t(h) * p.row + uint32_t(w) * p.pixel;
  }
  __device__ __forceinline__ void advance(const Problem<T>& p, const Step& step) {
    w += step.w;
    h += step.h;
    offset += step.offset;
    if (w >= p.last_w) {
      w -= p.width.value() * p.stride[1];
      h += p.stride[0];
      offset += p.next_row;
    }
    if (h >= p.last_h) {
      h -= p.height.value() * p.stride[0];
      offset += p.next_image;
    }
  }
};

// A term of a group's filters: (r, s, c), and its offset from a window's first pixel.
template <class T>
struct Term {
  int m, r, s, c;
  uint32_t offset;

  __device__ __forceinline__ Term(const Problem<T>& p, int m, int group) : m(m) {
    const int tap = p.channels.quotient(m);
    c = m - tap * p.C;
    r = p.taps.quotient(tap);
    s = tap - r * p.S;
    offset = uint32_t(r) * p.row + uint32_t(s) * p.pixel + uint32_t(group * p.C + c);
  }
  __device__ __forceinline__ void increment(const Problem<T>& p) {
    ++m, ++c, ++offset;
    if (c == p.C) {
      c = 0;
      ++s;
      offset += p.pixel - uint32_t(p.C);
    }
    if (s == p.S) {
      s = 0;
      ++r;
      offset += p.row - uint32_t(p.S) * p.pixel;
    }
  }
  __device__ __forceinline__ bool in_image(const Problem<T>& p, const Window<T>& window) const {
    return uint32_t(window.h + r) < uint32_t(p.H) && uint32_t(window.w + s) < uint32_t(p.W);
  }
};

// The bits of an element, or 0.
template <class T>
__device__ __forceinline__ uint32_t element(const T* p, bool valid) {
  return valid ? *reinterpret_cast<const uint16_t*>(p) : 0;
}

// Writes a part, word by word. load(i) are the bits of element i, in ascending order.
template <class Load>
__device__ __forceinline__ void copy_elements(unsigned char* to, const Load& load) {
#pragma unroll 1
  for (int i = 0; i < kPartElements; i += 2) {
    const uint32_t low = load(i);
    *reinterpret_cast<uint32_t*>(to + 2 * i) = low | load(i + 1) << 16;
  }
}

// Two ones.
template <class T>
constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;

template <class T, int kFilters, bool kVectors>
__global__ void __launch_bounds__(Tile<kMostFilters>::kThreads, kResident) weight_gradient(const Problem<T> p) {
  using Tile = Tile<kFilters>;
  constexpr int kDown = kWarpFilters / kMmaRows, kAcross = kWarpTerms / kMmaColumns;
  const int t = int(threadIdx.x), lane = t % kWarp, warp = t / kWarp;

  // Tiles of the same pixels follow each other, so that blocks that run together read the same parts of x and g.
  int tile = int(blockIdx.x), rest = p.filter_tiles.quotient(tile);
  const int first_filter = (tile - rest * p.filter_tiles.value()) * kFilters;
  tile = rest, rest = p.term_tiles.quotient(tile);
  const int first_term = (tile - rest * p.term_tiles.value()) * kTerms;
  const int split = p.groups_of.quotient(rest), group = rest - split * p.groups;
  const int64_t first_pixel = int64_t(split) * p.split_pixels;
  const int count = int(std::min<int64_t>(p.split_pixels, p.pixels - first_pixel));

  // What this thread copies: where to, from where, and how many pixels from its first one on.
  const int left_pixel = t / Tile::kLeftParts, left_part = t % Tile::kLeftParts;
  const int right_pixel = t / Tile::kRightParts, right_part = t % Tile::kRightParts;
  const int filter = first_filter + left_part * kPartElements;  // of this group
  const uint32_t left_to = place(left_pixel, left_part);
  const uint32_t right_to = Tile::kLeftBytes + place(right_pixel, right_part);
  uint32_t left_from = uint32_t(first_pixel + left_pixel) * p.all_filters + uint32_t(group * p.filters + filter);
  const Term<T> term(p, first_term + right_part * kPartElements, group);
  Window<T> window;
  window.locate(p, int(std::min<int64_t>(first_pixel + right_pixel, p.pixels - 1)));
  int left_pixels = filter < p.filters ? count - left_pixel : 0;
  int right_pixels = term.m < p.terms ? count - right_pixel : 0;
  unsigned char* const shared = dynamic_shared();
  const uint32_t shared_at = shared_address(shared);

  auto copy = [&](int stage) {
    const uint32_t to = uint32_t(stage * Tile::kStageBytes);
#pragma unroll
    for (int i = 0; i < Tile::kLeftPasses; ++i) {
      const uint32_t at = to + advance(left_to, i * Tile::kLeftPixels);
      const uint32_t from = left_from + uint32_t(i * Tile::kLeftPixels) * p.all_filters;
      const bool inside = i * Tile::kLeftPixels < left_pixels;
      if constexpr (kVectors) {
        copy_async(shared_at + at, p.g + from, inside);
      } else {
        copy_elements(shared + at, [&](int j) { return element(p.g + (from + j), inside && filter + j < p.filters); });
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kRightPasses; ++i) {
      const bool last = i + 1 == Tile::kRightPasses;
      if (last && Tile::kRightPasses * Tile::kRightPixels > kChunk && right_pixel + i * Tile::kRightPixels >= kChunk) {
        // A pixel of the next chunk.
      } else {
        const uint32_t at = to + advance(right_to, i * Tile::kRightPixels);
        const bool inside = i * Tile::kRightPixels < right_pixels;
        if constexpr (kVectors) {
          copy_async(shared_at + at, p.x + (window.offset + term.offset), inside && term.in_image(p, window));
        } else {
          Term<T> next = term;
          copy_elements(shared + at, [&](int) {
            const uint32_t bits =
                element(p.x + (window.offset + next.offset), inside && next.m < p.terms && next.in_image(p, window));
            next.increment(p);
            return bits;
          });
        }
      }
      window.advance(p, p.steps[last]);
    }
    left_from += uint32_t(kChunk) * p.all_filters;
    left_pixels -= kChunk;
    right_pixels -= kChunk;
  };

  // What this lane's addresses are for ldmatrix, in the first step: a pixel and a part of one matrix of mma's left
  // operand, and of two of its right ones.
  constexpr int kWarpsDown = kFilters / kWarpFilters;
  const int warp_filter = warp % kWarpsDown * kWarpFilters, warp_term = warp / kWarpsDown * kWarpTerms;
  const uint32_t left_at = shared_at + place(lane % 8 + lane / 16 * 8, warp_filter / kPartElements + lane / 8 % 2);
  const uint32_t right_at = shared_at + Tile::kLeftBytes + place(lane % 16, warp_term / kPartElements + lane / 16);
  const bool sums_bias = p.bias_sums != nullptr && first_term + warp_term == 0;
  constexpr uint32_t ones[] = {kOnes<T>, kOnes<T>};
  float sums[kDown][kAcross][4] = {}, bias[kDown][4] = {};

  auto multiply = [&](int stage) {
#pragma unroll
    for (int step = 0; step < kChunk / kStep; ++step) {
      // The permutation is the same in each step.
      const uint32_t at = uint32_t(stage * Tile::kStageBytes + step * kStep * kRowBytes);
      uint32_t left[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        ldmatrix_transposed(left[i], at + move(left_at, i * kMmaRows / kPartElements));
        if (sums_bias) mma<T>(bias[i], left[i], ones);
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t right[4];
        ldmatrix_transposed(right, at + move(right_at, j));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int i = 0; i < kDown; ++i) mma<T>(sums[i][j + k], left[i], {right[2 * k], right[2 * k + 1]});
        }
      }
    }
  };

  const int chunks = (count + kChunk - 1) / kChunk;
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < chunks) copy(i);
    copy_commit();
  }
  int read = 0, written = kStages - 1;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_wait<kStages - 2>();
    __syncthreads();
    if (chunk + kStages - 1 < chunks) copy(written);
    copy_commit();
    multiply(read);
    written = read;
    read = read + 1 == kStages ? 0 : read + 1;
  }

  const int64_t first_row = (int64_t(split) * p.groups + group) * p.filters;
#pragma unroll
  for (int i = 0; i < 2 * kDown; ++i) {  // this thread's rows
    const int row = first_filter + warp_filter + i * (kMmaRows / 2) + lane / 4;
    const bool inside = row < p.filters;
    if (sums_bias && inside && lane % 4 == 0) p.bias_sums[first_row + row] = bias[i / 2][i % 2 * 2];
    float* const to = p.sums + (first_row + row) * p.terms;
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      const float* const pair = &sums[i / 2][j][i % 2 * 2];
      const float* const next = &sums[i / 2][j + 1][i % 2 * 2];
      const int at = first_term + warp_term + j * kMmaColumns;
      if constexpr (kVectors) {
        // The thread exchanges a pair with its neighbour, so that it has four terms of one block.
        const bool odd = lane % 2 != 0;
        float other[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) other[k] = __shfl_xor_sync(0xffffffffu, odd ? pair[k] : next[k], 1);
        const float four[4] = {odd ? other[0] : pair[0], odd ? other[1] : pair[1], odd ? next[0] : other[0],
                               odd ? next[1] : other[1]};
        const int term_at = at + odd * kMmaColumns + lane % 4 / 2 * 4;
        if (inside && term_at < p.terms) store<4>(to + term_at, four);
      } else {
        const int term_at = at + lane % 4 * 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          if (inside && term_at + k < p.terms) to[term_at + k] = pair[k];
          if (inside && term_at + kMmaColumns + k < p.terms) to[term_at + kMmaColumns + k] = next[k];
        }
      }
    }
  }
}

// The division of the work into tiles of so many filters, and splits.
struct Division {
  int filters = 0, splits = 0;
  double work = 0;
};

// The division with the least work for the multiprocessor that has the most blocks, in bytes through shared memory. The
// products take less time: on sm_80 almost as long, on sm_90 half. From L2, of which some 24 bytes come in a clock
// where shared memory moves 128, the copies of a chunk may take longer; the sums of a block are written there and read
// again.
template <int kFilters>
void consider(const WeightGradient& c, int64_t multiprocessors, Division& best) {
  using Tile = Tile<kFilters>;
  constexpr double kL2 = 128. / 24;
  constexpr double kChunkTraffic = std::max<double>(Tile::kTraffic, Tile::kStageBytes * kL2);
  constexpr double kTileTraffic = kFilters * kTerms * 4 * 2 * kL2;
  constexpr int kFirstChunks = 2;    // as long as the first copies take
  constexpr double kAlone = 1. / 3;  // a block that shares its multiprocessor with no other one takes longer
  const int64_t pixels = int64_t(c.N) * c.OH * c.OW, chunks = divide_up(pixels, kChunk);
  const int64_t tiles = divide_up(c.K, kFilters) * c.groups * divide_up(int64_t(c.R) * c.S * c.C, kTerms);
  // More splits than fill the device a few times gain nothing.
  const int64_t most = std::min<int64_t>(chunks, divide_up(8 * multiprocessors, tiles));
  for (int64_t wanted = divide_up(pixels, 1 << 30); wanted <= most; ++wanted) {
    const int64_t of_split = divide_up(chunks, wanted), splits = divide_up(chunks, of_split);
    const int64_t blocks = divide_up(tiles * splits, multiprocessors);
    const double work = (double(blocks) + double(blocks % kResident) * kAlone) *
                        (double(of_split + kFirstChunks) * kChunkTraffic + kTileTraffic);
    if (best.splits == 0 || work < best.work) best = {kFilters, int(splits), work};
  }
}

Step step_of(const WeightGradient& c, int pixels) {
  const int w = pixels % c.OW * c.stride[1], h = pixels / c.OW % c.OH * c.stride[0], n = pixels / c.OW / c.OH;
  const uint32_t pixel = uint32_t(c.groups * c.C), row = pixel * uint32_t(c.W);
  return {h, w, uint32_t(n) * row * uint32_t(c.H) + uint32_t(h) * row + uint32_t(w) * pixel};
}

template <class T, int kFilters, bool kVectors>
void launch(Problem<T> p, const WeightGradient& c, int splits, const OnDevice& device) {
  using Tile = Tile<kFilters>;
  p.steps[0] = step_of(c, Tile::kRightPixels);
  p.steps[1] = step_of(c, kChunk - (Tile::kRightPasses - 1) * Tile::kRightPixels);
  const int64_t filter_tiles = divide_up(p.filters, kFilters), term_tiles = divide_up(p.terms, kTerms);
  p.filter_tiles = Divisor(filter_tiles);
  p.term_tiles = Divisor(term_tiles);
  device.launch_with_shared(weight_gradient<T, kFilters, kVectors>, filter_tiles * term_tiles * p.groups * splits,
                            Tile::kThreads, Tile::kShared, p);
}

template <class T>
void run(const WeightGradient& c, const OnDevice& device) {
  Problem<T> p{};
  p.x = data<T>(c.x);
  p.g = data<T>(c.g);
  p.pixels = c.N * c.OH * c.OW;
  p.H = c.H, p.W = c.W, p.C = c.C, p.S = c.S;
  p.filters = c.K;
  p.groups = c.groups;
  p.all_filters = uint32_t(c.groups * c.K);
  p.terms = c.R * c.S * c.C;
  p.pixel = uint32_t(c.groups * c.C);
  p.row = p.pixel * uint32_t(c.W);
  p.image = p.row * uint32_t(c.H);
  for (const int d : {0, 1}) p.stride[d] = c.stride[d], p.padding[d] = c.padding[d];
  p.last_w = c.OW * c.stride[1] - c.padding[1];
  p.last_h = c.OH * c.stride[0] - c.padding[0];
  p.next_row = uint32_t(c.stride[0]) * p.row - uint32_t(c.OW * c.stride[1]) * p.pixel;
  p.next_image = p.image - uint32_t(c.OH * c.stride[0]) * p.row;
  p.width = Divisor(c.OW);
  p.height = Divisor(c.OH);
  p.channels = Divisor(c.C);
  p.taps = Divisor(c.S);
  p.groups_of = Divisor(c.groups);

  const bool vectors = c.C % kPartElements == 0 && c.K % kPartElements == 0 && aligned(p.x, p.g);
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  Division division;
  if (vectors) {
    consider<128>(c, multiprocessors, division);
    consider<96>(c, multiprocessors, division);
  }
  consider<64>(c, multiprocessors, division);
  const int splits = division.splits;
  p.split_pixels = int(divide_up(divide_up(p.pixels, kChunk), splits)) * kChunk;

  const int64_t filters = int64_t(c.groups) * c.K, elements = filters * p.terms;
  const Tensor partials = empty({splits * (elements + (c.db ? filters : 0))}, ScalarType::Float, c.x);
  p.sums = mutable_data<float>(partials);
  p.bias_sums = c.db ? p.sums + splits * elements : nullptr;
  if (!vectors) {
    launch<T, 64, false>(p, c, splits, device);
  } else if (division.filters == 128) {
    launch<T, 128, true>(p, c, splits, device);
  } else if (division.filters == 96) {
    launch<T, 96, true>(p, c, splits, device);
  } else {
    launch<T, 64, true>(p, c, splits, device);
  }
  Tensor dw = c.dw;
  add_splits(device, p.sums, splits, elements, dw);
  if (c.db) {
    Tensor db = *c.db;
    add_splits(device, p.bias_sums, splits, filters, db);
  }
}

}  // namespace

void weight_gradient_mma(const WeightGradient& c, const OnDevice& device) {
  c.x.scalar_type() == ScalarType::BFloat16 ? run<bf16>(c, device) : run<f16>(c, device);
}

}  // namespace alexnet_kernels::cuda
