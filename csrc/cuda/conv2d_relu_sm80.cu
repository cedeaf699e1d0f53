// convolve_mma: convolution, bias and ReLU on tensor cores by mma.sync, for sm_80 and later.
//
// The convolution is a matrix product that gathers its left operand (implicit GEMM). Its rows are the pixels of y, its
// columns the filters of one group, and it sums over k = (r, s, c), in the order in which w stores a filter.
//
//   block     128 pixels x 64, 96 or 128 filters, of one group; warps of 64 x 32, two of them one below the other
//   chunk     64 bytes of the sum: two steps of mma, which is m16n8k16 for 16 bits and m16n8k8 with TF32 for float
//   part      16 bytes of a row of a chunk, as cp.async copies and ldmatrix loads them
//   stage     a chunk of both operands in shared memory; four stages are a ring
//
// Threads. Thread t copies part t % 4 of every kRowsOfPass-th row, from row t / 4 on, of both operands. It locates its
// pixels once, and follows the filter's position (r, s, c) of its part from chunk to chunk by additions. Where C is a
// multiple of a part's elements, a part has one r and s, so that one comparison decides whether it lies in the image;
// what lies outside, beyond the sum and beyond the last pixel or filter is zero. Any other C, and memory that is not
// aligned, goes through registers element by element.
//
// Pipeline. In each iteration a thread waits until its copies of the oldest chunk have landed, and at the barrier for
// those of the others. The same barrier tells that all have read the chunk before that one, whose stage is free for the
// chunk kStages - 1 ahead. The warps then multiply. So three chunks are under way during a multiplication.
//
// Results do not depend on the order of blocks: each sums its chunks in ascending order.
#include "conv2d_relu.cuh"
#include "divisor.cuh"
#include "launch.cuh"
#include "tensor_core.cuh"

namespace alexnet_kernels::cuda {
namespace {

constexpr int kPartBytes = 16;
constexpr int kChunkBytes = 64;
constexpr int kParts = kChunkBytes / kPartBytes;
template <class T>
constexpr int kChunk = kChunkBytes / int(sizeof(T));  // elements
constexpr int kStepBytes = 32;                        // of a row of either operand of mma
constexpr int kStages = 4;
constexpr int kRows = 128;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kMmaRows = 16, kMmaColumns = 8;
constexpr int kMostColumns = 128;
constexpr int kResident = 2;  // blocks of a multiprocessor
static_assert(kParts == 4 && kChunkBytes % kStepBytes == 0 && kStepBytes == 2 * kPartBytes);
static_assert(kRows % kWarpRows == 0 && kWarpRows % kMmaRows == 0 && kWarpColumns % (2 * kMmaColumns) == 0);

// A block's division of its work.
template <int kColumns>
struct Tile {
  static constexpr int kThreads = kWarp * (kRows / kWarpRows) * (kColumns / kWarpColumns);
  static constexpr int kRowsOfPass = kThreads / kParts;  // rows of which all threads copy the parts at once
  static constexpr int kLeftPasses = (kRows + kRowsOfPass - 1) / kRowsOfPass;
  static constexpr int kRightPasses = kColumns / kRowsOfPass;
  static constexpr int kLeftBytes = kRows * kChunkBytes;
  static constexpr int kStageBytes = kLeftBytes + kColumns * kChunkBytes;
  static constexpr int kShared = kStages * kStageBytes;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTraffic = kStageBytes + kWarps * (kWarpRows + kWarpColumns) * kChunkBytes;  // of a chunk
  static_assert(kColumns % kWarpColumns == 0 && kColumns % kRowsOfPass == 0);
  static_assert(kRowsOfPass % 8 == 0, "the permutation of a thread's parts is the same in each of its rows");
  static_assert((kRows % kRowsOfPass * kParts) % kWarp == 0, "warps take part in the last pass as a whole");
  static_assert(kShared <= 99 * 1024, "what sm_86, sm_89 and sm_120 have for a block");
};

// Where part `part` of a row of a stage is. Two rows of 64 bytes span the 32 banks, so that the same part of eight
// rows, which ldmatrix reads at once, would lie in two groups of four banks; permuted, it lies in all eight. Eight
// lanes that write the parts of two rows write to all of them in any case.
__device__ __forceinline__ uint32_t place(int row, int part) {
  return uint32_t(row * kChunkBytes + (part ^ row / 2 % kParts) * kPartBytes);
}

// The arguments of the kernel. Offsets are in elements, modulo 2^32: those of elements in a tensor are below 2^31.
template <class T>
struct Problem {
  const T *x, *w, *bias, *mask;
  T* y;
  int rows;                 // pixels of y
  int H, W, C, S, filters;  // channels and filters of a group
  int groups;
  uint32_t sum;         // R S C
  uint32_t pixel, row;  // offsets of the next pixel and of the next row of x
  int stride[2], padding[2];
  // What a chunk adds to the position (r, s, c), and to the offset of that position in x.
  int chunk_r, chunk_s, chunk_c;
  uint32_t chunk_offset;
  Divisor width, height;       // of y
  Divisor channels, taps;      // C and S
  Divisor tiles, group_tiles;  // tiles of columns, of all groups and of one
  float least;
  bool vectors;
};

// The position in the sum of a thread's part: k, and (r, s, c), and that one's offset in x.
template <class T>
struct Position {
  uint32_t k;
  int r, s, c;
  uint32_t offset;

  __device__ __forceinline__ Position(const Problem<T>& p, int first) : k(uint32_t(first)) {
    const int tap = p.channels.quotient(first);
    c = first - tap * p.C;
    r = p.taps.quotient(tap);
    s = tap - r * p.S;
    offset = uint32_t(r) * p.row + uint32_t(s) * p.pixel + uint32_t(c);
  }
  __device__ __forceinline__ void advance(const Problem<T>& p) {
    k += uint32_t(kChunk<T>);
    offset += p.chunk_offset;
    c += p.chunk_c;
    s += p.chunk_s;
    r += p.chunk_r;
    carry(p);
  }
  __device__ __forceinline__ void increment(const Problem<T>& p) {
    ++k, ++c, ++offset;
    carry(p);
  }

 private:
  __device__ __forceinline__ void carry(const Problem<T>& p) {
    if (c >= p.C) {
      c -= p.C;
      ++s;
      offset += p.pixel - uint32_t(p.C);
    }
    if (s >= p.S) {
      s -= p.S;
      ++r;
      offset += p.row - uint32_t(p.S) * p.pixel;
    }
  }
};

// A pixel of y: its window's first pixel, in coordinates and as an offset in x; perhaps outside the image.
struct Window {
  int h, w;
  uint32_t offset;
};

template <class T>
__device__ __forceinline__ Window locate(const Problem<T>& p, int64_t row) {
  if (row >= p.rows) return {INT_MIN / 2, 0, 0};  // no r brings that into an image
  const int line = p.width.quotient(int(row)), n = p.height.quotient(line);
  const int h = (line - n * p.height.value()) * p.stride[0] - p.padding[0];
  const int w = (int(row) - line * p.width.value()) * p.stride[1] - p.padding[1];
  return {h, w, (uint32_t(n) * uint32_t(p.H) + uint32_t(h)) * p.row + uint32_t(w) * p.pixel};
}

template <class T>
__device__ __forceinline__ bool in_image(const Problem<T>& p, const Window& window, const Position<T>& at) {
  return uint32_t(window.h + at.r) < uint32_t(p.H) && uint32_t(window.w + at.s) < uint32_t(p.W);
}

// The bits of an element, or 0.
template <class T>
__device__ __forceinline__ uint32_t element(const T* p, bool valid) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  return valid ? *reinterpret_cast<const Bits*>(p) : 0;
}

// Copies parts of kPasses rows, kRowsOfPass apart, to shared memory, word by word. load(pass, position) are the bits of
// an element.
template <int kPasses, int kRowsOfPass, class T, class Load>
__device__ __forceinline__ void copy_elements(const Problem<T>& p, Position<T> at, unsigned char* to,
                                              const Load& load) {
  constexpr int kWord = 4;  // bytes
#pragma unroll 1
  for (int i = 0; i < kPartBytes; i += kWord) {
    uint32_t words[kPasses] = {};
#pragma unroll
    for (int j = 0; j < kWord; j += int(sizeof(T))) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) words[pass] |= load(pass, at) << 8 * j;
      at.increment(p);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      *reinterpret_cast<uint32_t*>(to + pass * kRowsOfPass * kChunkBytes + i) = words[pass];
    }
  }
}

template <class T, int kColumns, bool kVectors>
__global__ void __launch_bounds__(Tile<kMostColumns>::kThreads, kResident) convolve(const Problem<T> p) {
  using Tile = Tile<kColumns>;
  constexpr int kSteps = kChunkBytes / kStepBytes;
  constexpr int kDown = kWarpRows / kMmaRows, kAcross = kWarpColumns / kMmaColumns;
  const int t = int(threadIdx.x), lane = t % kWarp, warp = t / kWarp;

  // Tiles of the same pixels follow each other, so that blocks that run together read the same part of x.
  const int tile = int(blockIdx.x), row_tile = p.tiles.quotient(tile), column_tile = tile - row_tile * p.tiles.value();
  const int group = p.group_tiles.quotient(column_tile);
  const int first_filter = (column_tile - group * p.group_tiles.value()) * kColumns;
  const int64_t first_row = int64_t(row_tile) * kRows;

  // What this thread copies.
  const int copied_row = t / kParts, copied_part = t % kParts;
  Window windows[Tile::kLeftPasses];
#pragma unroll
  for (int i = 0; i < Tile::kLeftPasses; ++i) {
    windows[i] = locate(p, first_row + copied_row + i * Tile::kRowsOfPass);
    windows[i].offset += uint32_t(group * p.C);
  }
  const T* const filter = p.w + (int64_t(group * p.filters + first_filter) + copied_row) * p.sum;
  Position<T> at(p, copied_part * kVector<T>);
  const uint32_t copied_to = place(copied_row, copied_part);
  unsigned char* const shared = dynamic_shared();
  const uint32_t shared_at = shared_address(shared);

  auto copy = [&](int stage) {
    const uint32_t to = uint32_t(stage * Tile::kStageBytes) + copied_to;
    if constexpr (kVectors) {
#pragma unroll
      for (int i = 0; i < Tile::kLeftPasses; ++i) {
        if ((i + 1) * Tile::kRowsOfPass > kRows && copied_row + i * Tile::kRowsOfPass >= kRows) break;
        copy_async(shared_at + to + i * Tile::kRowsOfPass * kChunkBytes, p.x + (windows[i].offset + at.offset),
                   at.k < p.sum && in_image(p, windows[i], at));
      }
#pragma unroll
      for (int i = 0; i < Tile::kRightPasses; ++i) {
        const bool valid = at.k < p.sum && first_filter + copied_row + i * Tile::kRowsOfPass < p.filters;
        copy_async(shared_at + to + Tile::kLeftBytes + i * Tile::kRowsOfPass * kChunkBytes,
                   filter + at.k + int64_t(i * Tile::kRowsOfPass) * p.sum, valid);
      }
    } else {
      copy_elements<Tile::kLeftPasses, Tile::kRowsOfPass>(p, at, shared + to, [&](int i, const Position<T>& from) {
        return element(p.x + (windows[i].offset + from.offset), from.k < p.sum && in_image(p, windows[i], from));
      });
      copy_elements<Tile::kRightPasses, Tile::kRowsOfPass>(
          p, at, shared + to + Tile::kLeftBytes, [&](int i, const Position<T>& from) {
            const int row = i * Tile::kRowsOfPass;
            return element(filter + from.k + int64_t(row) * p.sum,
                           from.k < p.sum && first_filter + copied_row + row < p.filters);
          });
    }
    at.advance(p);
  };

  // What this lane's addresses are for ldmatrix, in the first step: the row and part of a matrix of mma's left operand,
  // and of two of its right ones.
  const int warp_row = warp % (kRows / kWarpRows) * kWarpRows;
  const int warp_column = warp / (kRows / kWarpRows) * kWarpColumns;
  const uint32_t left_at = shared_at + place(warp_row + lane % 16, lane / 16);
  const uint32_t right_at = shared_at + Tile::kLeftBytes + place(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const int first = first_filter + warp_column;  // filter of the warp
  const FirstSums<T> begin(p.bias == nullptr ? nullptr : p.bias + group * p.filters + first, p.filters - first,
                           p.vectors);
  float sums[kDown][kAcross][4];
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
    float pair[2];
    begin.load(j, pair);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = pair[k % 2];
    }
  }

  auto multiply = [&](int stage) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // Parts of later steps differ in the higher bit, whatever the permutation.
      const uint32_t left_stage = (left_at ^ uint32_t(step * kStepBytes)) + uint32_t(stage * Tile::kStageBytes);
      const uint32_t right_stage = (right_at ^ uint32_t(step * kStepBytes)) + uint32_t(stage * Tile::kStageBytes);
      uint32_t right[kAcross][2];
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t two[4];
        ldmatrix(two, right_stage + j * kMmaColumns * kChunkBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          right[j + i / 2][i % 2] = std::is_same_v<T, float> ? round_tf32(two[i]) : two[i];
        }
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        uint32_t left[4];
        ldmatrix(left, left_stage + i * kMmaRows * kChunkBytes);
        if constexpr (std::is_same_v<T, float>) {
#pragma unroll
          for (uint32_t& v : left) v = round_tf32(v);
        }
#pragma unroll
        for (int j = 0; j < kAcross; ++j) mma<T>(sums[i][j], left, right[j]);
      }
    }
  };

  const int chunks = int((p.sum + kChunk<T> - 1) / kChunk<T>);
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

  const RowEpilogue epilogue{p.least, p.filters - first, p.vectors};
#pragma unroll
  for (int i = 0; i < 2 * kDown; ++i) {  // this thread's rows
    const int64_t row = first_row + warp_row + i * (kMmaRows / 2) + lane / 4;
    const int64_t at = row * p.groups * p.filters + group * p.filters + first;
    T* const to = row < p.rows ? p.y + at : nullptr;
    epilogue.store<kAcross>(to, p.mask == nullptr ? nullptr : p.mask + at,
                            [&](int block, int j) { return sums[i / 2][block][i % 2 * 2 + j]; });
  }
}

template <class T, int kColumns, bool kVectors>
void launch(Problem<T> p, const OnDevice& device) {
  const int64_t group_tiles = divide_up(p.filters, kColumns), tiles = group_tiles * p.groups;
  STD_TORCH_CHECK(tiles < (int64_t(1) << 31), "conv2d_relu: too many filters");
  p.group_tiles = Divisor(int(group_tiles));
  p.tiles = Divisor(int(tiles));
  device.launch_with_shared(convolve<T, kColumns, kVectors>, divide_up(p.rows, kRows) * tiles, Tile<kColumns>::kThreads,
                            Tile<kColumns>::kShared, p);
}

// The columns of a tile with the least work for the multiprocessor that has the most tiles. The work of a tile is what
// it moves through shared memory, which takes at least as long as the products: on sm_80 as long, on sm_90 twice.
int tile_columns(int64_t row_tiles, int filters, int groups) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  int best = 0;
  int64_t least = 0;
  auto consider = [&](int columns, int64_t traffic) {
    const int64_t work = divide_up(row_tiles * groups * divide_up(filters, columns), multiprocessors) * traffic;
    if (best == 0 || work < least) best = columns, least = work;
  };
  consider(128, Tile<128>::kTraffic);
  consider(96, Tile<96>::kTraffic);
  consider(64, Tile<64>::kTraffic);
  return best;
}

template <class T>
Problem<T> problem_of(const Convolution& c) {
  Problem<T> p{};
  p.x = data<T>(c.x);
  p.w = data<T>(c.w);
  p.bias = c.bias ? data<T>(*c.bias) : nullptr;
  p.mask = c.mask ? data<T>(*c.mask) : nullptr;
  p.y = mutable_data<T>(c.y);
  p.rows = c.N * c.OH * c.OW;
  p.H = c.H, p.W = c.W, p.C = c.C, p.S = c.S;
  p.filters = c.K;
  p.groups = c.groups;
  p.sum = uint32_t(c.R * c.S * c.C);
  p.pixel = uint32_t(c.groups * c.C);
  p.row = p.pixel * uint32_t(c.W);
  for (const int d : {0, 1}) p.stride[d] = c.stride[d], p.padding[d] = c.padding[d];
  const int chunk = kChunk<T>;
  p.chunk_c = chunk % c.C;
  p.chunk_s = chunk / c.C % c.S;
  p.chunk_r = chunk / c.C / c.S;
  p.chunk_offset = uint32_t(p.chunk_r) * p.row + uint32_t(p.chunk_s) * p.pixel + uint32_t(p.chunk_c);
  p.width = Divisor(c.OW);
  p.height = Divisor(c.OH);
  p.channels = Divisor(c.C);
  p.taps = Divisor(c.S);
  p.least = least_of(c);
  p.vectors = c.K % kVector<T> == 0 && aligned(p.y, p.bias, p.mask);
  return p;
}

}  // namespace

void convolve_mma(const Convolution& c, const OnDevice& device) {
  for_dtype(c.x, [&](auto t) {
    using T = decltype(t);
    const Problem<T> p = problem_of<T>(c);
    if (c.C % kVector<T> != 0 || !aligned(p.x, p.w)) return launch<T, 64, false>(p, device);
    switch (tile_columns(divide_up(p.rows, kRows), p.filters, p.groups)) {
      case 128: return launch<T, 128, true>(p, device);
      case 96: return launch<T, 96, true>(p, device);
      default: return launch<T, 64, true>(p, device);
    }
  });
}

}  // namespace alexnet_kernels::cuda
