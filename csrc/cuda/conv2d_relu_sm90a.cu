// relu(conv2d(x, w) + bias) on Hopper's tensor cores, for stride 1: an implicit GEMM whose operands TMA copies.
//   x [N, H, W, groups C], w [groups K, R, S, C], bias [groups K], y [N, OH, OW, groups K]; bfloat16 or float16, sums
//   in float in a fixed order; C and K are multiples of 8, addresses of 16 bytes
//
// A tile of y is up to kRows pixels, a box {n, h, w} of them, times kColumns filters of one group. For kChunk channels
// at a time, its pixels of x and those around them are again a box, which stays in shared memory for all taps (r, s):
// row i of the implicit matrix is pixel i of the tile moved by (r, s). Outside of the image, and beyond a group's
// channels, TMA fills in zeros: padding takes no instruction. ldmatrix takes the rows, wherever they are, to registers;
// w has one box for every tap and chunk, which wgmma reads from shared memory. So x comes from L2 once for each chunk,
// not R S times.
//
//   warps 0 to 4 kWarpgroups - 1   consumers: warpgroup i multiplies rows 64 i to 64 i + 63 of the tile, and stores
//   warp 4 kWarpgroups             the producer: one lane starts all copies
//   three warps more               nothing: registers are given to whole warpgroups
//
//   x ring   chunks of tiles    full: 1 arrival and the bytes of the boxes; empty: all consumer warps are done
//   w ring   taps of chunks     the same
//
// Blocks are persistent: they take tiles blockIdx.x, blockIdx.x + gridDim.x, and so on. The producer runs ahead, so
// that the next tile is copied while the consumers store this one. Where all boxes of w fit into the ring and every
// tile takes the same (conv1), w is copied once.
#include <algorithm>
#include <limits>
#include <tuple>

#include "conv2d_relu.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "ring.cuh"
#include "tensor_core.cuh"

namespace alexnet_kernels::cuda {
namespace {

constexpr int kTerms = 16;  // of the sums, in one wgmma
constexpr int kMostXStages = 4, kMostWStages = 16;

// One kernel's tile. A pixel's or filter's chunk of channels is one row of 128 bytes or, for 48 channels, one of 64
// bytes and one of 32.
template <int kWarpgroups_, int kColumns_, int kChunk_, int kBuffers_ = 2>
struct Shape {
  static constexpr int kWarpgroups = kWarpgroups_, kColumns = kColumns_, kChunk = kChunk_;
  static constexpr int kBuffers = kBuffers_;  // of a tap's rows, in registers
  static constexpr int kRows = kWarpgroups * kWarpgroupRows;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;
  static_assert(kThreads <= 1024 && kRows <= 256 && kColumns <= 256 && kColumns % 32 == 0);

  static_assert(kChunk == 64 || kChunk == 48);
  static constexpr int kBoxes = kChunk == 64 ? 1 : 2;  // of an operand
  static constexpr int channels(int box) { return kChunk == 64 ? 64 : box == 0 ? 32 : 16; }
  static constexpr int channel(int box) { return box == 0 ? 0 : 32; }
  static_assert(channel(kBoxes - 1) + channels(kBoxes - 1) == kChunk);

  static constexpr int w_offset(int box) { return 2 * kColumns * channel(box); }
  static constexpr int kWBytes = 2 * kColumns * kChunk;
  static_assert(kWBytes % kAtom == 0 && w_offset(kBoxes - 1) % kAtom == 0);

  // Registers of a thread: what a launch gives to each, of which the producer gives some up if consumers need more.
  static constexpr bool kMovesRegisters = kWarpgroups > 2;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters =
      ((kWarpgroups + 1) * kLaunchRegisters - kProducerRegisters) / kWarpgroups / 8 * 8;
  static_assert(!kMovesRegisters || (kConsumerRegisters > kLaunchRegisters && kConsumerRegisters < 256));
};

// AlexNet's conv1 (as blocks of pixels), conv2, conv3 and conv4, conv5; torchvision's conv1; few filters; few pixels.
using Shapes = std::tuple<Shape<4, 96, 48>, Shape<4, 128, 48, 1>, Shape<3, 192, 64>, Shape<3, 128, 64>,
                          Shape<4, 64, 48>, Shape<4, 64, 64>, Shape<1, 64, 48>, Shape<1, 64, 64>>;

// The tiles of a launch, and its shared memory.
struct Tiling {
  int n, h, w;                    // pixels of a tile's box
  int halo_h, halo_w;             // of its box of x
  int columns, groups;            // column tiles of a group; groups
  int along_n, along_h, along_w;  // boxes
  int x_stages, w_stages;
  int x_bytes;    // of a stage of x
  int x_offset;   // of the second box in it
  bool resident;  // w is copied once

  __host__ __device__ int count() const { return columns * groups * along_n * along_h * along_w; }
  __host__ __device__ int pixels() const { return n * h * w; }
  __host__ __device__ int halo() const { return n * halo_h * halo_w; }
};

// Tile i: the column tiles of a group, then the groups, then the boxes along w, h and n.
struct Tile {
  int n, h, w, group, column;  // of its first element

  __device__ __forceinline__ Tile(const Tiling& tiling, int columns, int index) {
    column = index % tiling.columns * columns;
    index /= tiling.columns;
    group = index % tiling.groups;
    index /= tiling.groups;
    w = index % tiling.along_w * tiling.w;
    index /= tiling.along_w;
    h = index % tiling.along_h * tiling.h;
    n = index / tiling.along_h * tiling.n;
  }
};

struct Geometry {
  int N, C, K, R, S, OH, OW, padding_h, padding_w;
};

template <int kBoxes>
struct Maps {
  TensorMap x[kBoxes], w[kBoxes];
};

// The producer's lane: copies the boxes of all tiles.
template <class Shape>
__device__ __forceinline__ void produce(Ring x, Ring w, const Maps<Shape::kBoxes>& maps, const Tiling& tiling,
                                        const Geometry& g) {
#pragma unroll
  for (int box = 0; box < Shape::kBoxes; ++box) {
    prefetch(maps.x[box]);
    prefetch(maps.w[box]);
  }
  for (int index = int(blockIdx.x); index < tiling.count(); index += int(gridDim.x)) {
    const Tile tile(tiling, Shape::kColumns, index);
    for (int c = 0; c < g.C; c += Shape::kChunk) {
      x.wait_empty();
      arrive_and_expect(x.full(), 2 * Shape::kChunk * tiling.halo());
#pragma unroll
      for (int box = 0; box < Shape::kBoxes; ++box) {
        load_box(x.stage() + box * tiling.x_offset, maps.x[box], x.full(), c + Shape::channel(box), tile.group,
                 tile.w - g.padding_w, tile.h - g.padding_h, tile.n);
      }
      x.advance();
      if (tiling.resident && index != int(blockIdx.x)) continue;
      for (int tap = 0; tap < g.R * g.S; ++tap) {
        w.wait_empty();
        arrive_and_expect(w.full(), Shape::kWBytes);
#pragma unroll
        for (int box = 0; box < Shape::kBoxes; ++box) {
          load_box(w.stage() + Shape::w_offset(box), maps.w[box], w.full(), c + Shape::channel(box), tap,
                   tile.group * g.K + tile.column, 0, 0);
        }
        w.advance();
      }
    }
  }
}

// A warp's rows of a chunk: 16 pixels, of which lane i gives ldmatrix the addresses of row i % 16, terms 8 (i / 16).
template <class Shape>
struct Rows {
  int first;  // this lane's pixel in the box of x, for tap (0, 0)
  int half;   // i / 16

  __device__ __forceinline__ Rows(const Tiling& tiling, int warp, int lane) : half(lane / 16) {
    // Rows beyond the tile's last pixel are any: they are not stored.
    const int pixel = std::min(16 * warp + lane % 16, tiling.pixels() - 1), line = pixel / tiling.w;
    first = (line / tiling.h * tiling.halo_h + line % tiling.h) * tiling.halo_w + pixel % tiling.w;
  }

  // The fragments of the rows moved by `tap` pixels.
  __device__ __forceinline__ void load(uint32_t (&a)[Shape::kChunk / kTerms][4], const unsigned char* stage,
                                       const Tiling& tiling, int tap) const {
    const int pixel = first + tap;
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box) {
      const int bytes = 2 * Shape::channels(box), parts = bytes / 16;
      const uint32_t row = shared_address(stage + box * tiling.x_offset) + pixel * bytes;
      // TMA's permutation of the row's 16-byte parts.
      const int permuted = pixel * bytes / 128 % parts;
#pragma unroll
      for (int i = 0; i < parts / 2; ++i) {
        ldmatrix(a[Shape::channel(box) / kTerms + i], row + 16 * ((2 * i + half) ^ permuted));
      }
    }
  }
};

// Starts the products of a tap: 64 rows of x by all columns.
template <class T, class Shape>
__device__ __forceinline__ void multiply(float (&sum)[Shape::kColumns / 2],
                                         const uint32_t (&a)[Shape::kChunk / kTerms][4], const unsigned char* stage) {
  constexpr int kRowBytes[] = {2 * Shape::channels(0), 2 * Shape::channels(Shape::kBoxes - 1)};
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Shape::kChunk / kTerms; ++i) {
    const int channel = kTerms * i;
    if (channel < Shape::channels(0)) {
      wgmma<T, Shape::kColumns>(sum, a[i], describe<kRowBytes[0]>(stage + 2 * channel));
    } else {
      const unsigned char* second = stage + Shape::w_offset(Shape::kBoxes - 1);
      wgmma<T, Shape::kColumns>(sum, a[i],
                                describe<kRowBytes[1]>(second + 2 * (channel - Shape::channel(Shape::kBoxes - 1))));
    }
  }
  wgmma_commit();
}

// Consumer warps: multiply and store all tiles.
template <class T, class Shape>
__device__ __forceinline__ void consume(Ring x, Ring w, const Tiling& tiling, const Geometry& g, const T* bias,
                                        const T* mask, T* y, float least) {
  // The shuffle tells the compiler that all lanes of a warp have the same number.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0), lane = int(threadIdx.x) % kWarp;
  const int taps = g.R * g.S, steps = taps * ((g.C + Shape::kChunk - 1) / Shape::kChunk);
  const Rows<Shape> rows(tiling, warp, lane);

  for (int index = int(blockIdx.x); index < tiling.count(); index += int(gridDim.x)) {
    const Tile tile(tiling, Shape::kColumns, index);
    const int filter = tile.group * g.K + tile.column, filters = g.K - tile.column;

    // Begin with the bias.
    float sum[Shape::kColumns / 2];
    const FirstSums<T> begin(bias == nullptr ? nullptr : bias + filter, filters, true);
#pragma unroll
    for (int block = 0; block < Shape::kColumns / 8; ++block) {
      float pair[2];
      begin.load(block, pair);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[4 * block + i] = pair[i % 2];
    }
    settle(sum);

    // Multiply. With two buffers the rows of the next tap are loaded while the products of this one run, and a step's
    // stages are handed back when the next step's products have been started. With one, the other warpgroups' products
    // run meanwhile.
    uint32_t a[Shape::kBuffers][Shape::kChunk / kTerms][4];
    int r = 0, s = 0;
    bool ended = false;  // the step to hand back is the last of its chunk
    auto hand_back = [&] {
      if (lane != 0) return;
      if (!tiling.resident) w.hand_back_previous();
      if (ended) x.hand_back_previous();
    };
    auto step = [&](auto buffer, bool first, bool last) {
      w.wait_full();
      multiply<T, Shape>(sum, a[buffer], w.stage());
      if constexpr (Shape::kBuffers == 2) {
        wgmma_wait<1>();
        if (!first) hand_back();
      }
      w.advance();
      if (++s == g.S) s = 0, ++r;
      ended = r == g.R;
      if (ended) {
        r = 0;
        x.advance();
      }
      if constexpr (Shape::kBuffers == 1) {
        wgmma_wait<0>();
        hand_back();
      }
      if (last) return;
      if (ended) x.wait_full();
      rows.load(a[Shape::kBuffers - 1 - buffer], x.stage(), tiling, r * tiling.halo_w + s);
    };
    using First = std::integral_constant<int, 0>;
    using Other = std::integral_constant<int, Shape::kBuffers - 1>;
    x.wait_full();
    rows.load(a[0], x.stage(), tiling, 0);
    step(First(), true, steps == 1);
    for (int i = 1; i < steps; i += 2) {
      step(Other(), false, i + 1 == steps);
      if (i + 1 < steps) step(First(), false, i + 2 == steps);
    }
    wgmma_wait<0>();
    settle(sum);
    if (Shape::kBuffers == 2) hand_back();
    if (tiling.resident) w.rewind();

    // Store this thread's two rows.
    const RowEpilogue row{least, filters, true};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int pixel = 16 * warp + lane / 4 + 8 * i, line = pixel / tiling.w;
      const int n = line / tiling.h, image = tile.n + n, oh = tile.h + line % tiling.h, ow = tile.w + pixel % tiling.w;
      const bool inside = n < tiling.n && image < g.N && oh < g.OH && ow < g.OW;
      const int64_t at = (int64_t(image) * g.OH + oh) * g.OW + ow;
      const int64_t offset = at * (g.K * tiling.groups) + filter;
      row.store<Shape::kColumns / 8>(inside ? y + offset : nullptr, mask == nullptr ? nullptr : mask + offset,
                                     [&](int block, int j) { return sum[4 * block + 2 * i + j]; });
    }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    convolve(const __grid_constant__ Maps<Shape::kBoxes> maps, Tiling tiling, Geometry geometry, const T* bias,
             const T* mask, T* y, float least) {
  unsigned char* const shared = dynamic_shared();
  const int x_bytes = tiling.x_stages * tiling.x_bytes, w_bytes = tiling.w_stages * Shape::kWBytes;
  auto* const barriers = reinterpret_cast<Barrier*>(shared + x_bytes + w_bytes);
  const Ring x(shared, tiling.x_bytes, tiling.x_stages, barriers);
  const Ring w(shared + x_bytes, Shape::kWBytes, tiling.w_stages, barriers + 2 * tiling.x_stages);
  if (threadIdx.x == 0) {
    x.initialise(Shape::kConsumers / kWarp);
    w.initialise(Shape::kConsumers / kWarp);
    publish_barriers();
  }
  __syncthreads();
  if (__shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0) < Shape::kWarpgroups) {
    if constexpr (Shape::kMovesRegisters) take_registers<Shape::kConsumerRegisters>();
    consume<T, Shape>(x, w, tiling, geometry, bias, mask, y, least);
  } else {
    if constexpr (Shape::kMovesRegisters) give_up_registers<Shape::kProducerRegisters>();
    if (threadIdx.x == Shape::kConsumers) produce<Shape>(x, w, maps, tiling, geometry);
  }
}

// Divides shared memory into stages; false if there is not enough.
template <class Shape>
bool divide_shared(const Convolution& c, Tiling& tiling) {
  constexpr int kMemory = kSharedBytes - 2 * (kMostXStages + kMostWStages) * int(sizeof(Barrier));
  tiling.halo_h = tiling.h + c.R - 1, tiling.halo_w = tiling.w + c.S - 1;
  if (tiling.halo_h > kMostBox || tiling.halo_w > kMostBox) return false;
  if (int64_t(tiling.n) * tiling.halo_h * tiling.halo_w * Shape::kChunk > kMemory) return false;
  tiling.x_bytes = 0;
  for (int box = 0; box < Shape::kBoxes; ++box) {
    tiling.x_offset = tiling.x_bytes;
    tiling.x_bytes += round_up(2 * Shape::channels(box) * tiling.halo(), kAtom);
  }
  const int64_t boxes = int64_t(c.R) * c.S * divide_up(c.C, Shape::kChunk);
  tiling.resident = tiling.columns * tiling.groups == 1 && boxes <= kMostWStages &&
                    boxes * Shape::kWBytes + 2 * tiling.x_bytes <= kMemory;
  // Few stages suffice for x, which serves many steps.
  tiling.x_stages = c.R * c.S > 1 ? 2 : kMostXStages;
  if (tiling.resident) {
    tiling.w_stages = int(boxes);
    tiling.x_stages = std::min(kMostXStages, (kMemory - tiling.w_stages * Shape::kWBytes) / tiling.x_bytes);
  } else {
    tiling.w_stages = std::min(kMostWStages, (kMemory - tiling.x_stages * tiling.x_bytes) / Shape::kWBytes);
  }
  return tiling.x_stages >= 2 && tiling.w_stages >= (tiling.resident ? 1 : 3);
}

template <class Shape>
int shared_bytes(const Tiling& tiling) {
  return tiling.x_stages * tiling.x_bytes + tiling.w_stages * Shape::kWBytes +
         2 * (tiling.x_stages + tiling.w_stages) * int(sizeof(Barrier));
}

// An estimate of the clocks that the launch takes, for choosing between tiles and kernels: waves of tiles, each bound
// by the tensor cores (N / 2 clocks for 64 x N x 16) or by shared memory (128 bytes a clock), and what a tile takes
// besides.
template <class Shape>
double clocks(const Convolution& c, const Tiling& tiling, int multiprocessors) {
  constexpr double kTileClocks = 1000, kBytesPerClock = 128;
  constexpr double kProduct = Shape::kColumns / 2.;
  constexpr double kReadW = Shape::kColumns * 2. * kTerms / kBytesPerClock;
  constexpr double kReadX = kWarpgroupRows * 2. * kTerms / kBytesPerClock;
  // Where eight rows of ldmatrix are not consecutive pixels, two of them share banks.
  const double read = kReadX * (1 + std::min(7, tiling.w) / double(tiling.w)) + kReadW;
  const double steps = double(c.R) * c.S * divide_up(c.C, Shape::kChunk);
  return divide_up(tiling.count(), multiprocessors) *
         (steps * Shape::kWarpgroups * (Shape::kChunk / kTerms) * std::max(kProduct, read) + kTileClocks);
}

struct Choice {
  double clocks = std::numeric_limits<double>::infinity();  // no tiles fit
  Tiling tiling{};
};

// The tiles that take the fewest clocks: boxes of at most kRows pixels. Extents are as equal as possible, 9 rows of 27
// for 27 x 27 and 256.
template <class Shape>
Choice tile(const Convolution& c, int multiprocessors) {
  Choice best;
  for (int w = std::min(c.OW, Shape::kRows); w > 0; w = next_smaller(c.OW, w)) {
    for (int h = std::min(c.OH, Shape::kRows / w); h > 0; h = next_smaller(c.OH, h)) {
      const int n = int(divide_up(c.N, divide_up(c.N, std::min(c.N, Shape::kRows / (w * h)))));
      Tiling tiling{};
      tiling.n = n, tiling.h = h, tiling.w = w;
      tiling.columns = int(divide_up(c.K, Shape::kColumns)), tiling.groups = c.groups;
      tiling.along_n = int(divide_up(c.N, n));
      tiling.along_h = int(divide_up(c.OH, h)), tiling.along_w = int(divide_up(c.OW, w));
      if (!divide_shared<Shape>(c, tiling)) continue;
      const double taken = clocks<Shape>(c, tiling, multiprocessors);
      if (taken < best.clocks) best = {taken, tiling};
    }
  }
  return best;
}

Boxes boxes_of_x(const Convolution& c, const Tiling& tiling, int channels) {
  const uint64_t pixel = 2 * uint64_t(c.groups) * c.C;
  return {c.x.const_data_ptr(),
          {uint64_t(c.C), uint64_t(c.groups), uint64_t(c.W), uint64_t(c.H), uint64_t(c.N)},
          {2 * uint64_t(c.C), pixel, pixel * c.W, pixel * c.W * c.H},
          {uint32_t(channels), 1, uint32_t(tiling.halo_w), uint32_t(tiling.halo_h), uint32_t(tiling.n)},
          c.x.scalar_type() == ScalarType::BFloat16};
}

// Beyond the last filter of a group a box has those of the next one, or zeros; their columns are not stored.
Boxes boxes_of_w(const Convolution& c, int channels, int columns) {
  const uint64_t taps = uint64_t(c.R) * c.S, filters = uint64_t(c.groups) * c.K, tap = 2 * uint64_t(c.C);
  return {c.w.const_data_ptr(),
          {uint64_t(c.C), taps, filters, 1, 1},
          {tap, tap * taps, tap * taps * filters, tap * taps * filters},
          {uint32_t(channels), 1, uint32_t(columns), 1, 1},
          c.w.scalar_type() == ScalarType::BFloat16};
}

template <class T, class Shape>
void run(const Convolution& c, const Tiling& tiling, int multiprocessors, const OnDevice& device) {
  Maps<Shape::kBoxes> maps;
  for (int box = 0; box < Shape::kBoxes; ++box) {
    maps.x[box] = encode(boxes_of_x(c, tiling, Shape::channels(box)));
    maps.w[box] = encode(boxes_of_w(c, Shape::channels(box), Shape::kColumns));
  }
  const Geometry geometry{c.N, c.C, c.K, c.R, c.S, c.OH, c.OW, c.padding[0], c.padding[1]};
  device.launch_with_shared(convolve<T, Shape>, std::min(tiling.count(), multiprocessors), Shape::kThreads,
                            shared_bytes<Shape>(tiling), maps, tiling, geometry, c.bias ? data<T>(*c.bias) : nullptr,
                            c.mask ? data<T>(*c.mask) : nullptr, mutable_data<T>(c.y), least_of(c));
}

// The kernel that takes the fewest clocks, and its tiles.
template <class T>
struct Plan {
  void (*run)(const Convolution&, const Tiling&, int, const OnDevice&) = nullptr;  // null: none fits
  Tiling tiling{};

  Plan(const Convolution& c, int multiprocessors) {
    Choice best;
    auto consider = [&](auto shape) {
      using Shape = decltype(shape);
      const Choice choice = tile<Shape>(c, multiprocessors);
      if (choice.clocks < best.clocks) best = choice, run = cuda::run<T, Shape>;
    };
    std::apply([&](auto... shapes) { (consider(shapes), ...); }, Shapes());
    tiling = best.tiling;
  }

  static const Plan& of(const Convolution& c, int multiprocessors) {
    const std::array<int, 11> key{c.N, c.C, c.groups, c.K, c.R, c.S, c.OH, c.OW, c.H, c.W, multiprocessors};
    return planned<Plan>(key, [&] { return Plan(c, multiprocessors); });
  }
};

template <class T>
const char* run_plan(const Convolution& c, const OnDevice& device) {
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const Plan<T>& plan = Plan<T>::of(c, multiprocessors);
  if (plan.run == nullptr) return "the filters are too large for shared memory";
  plan.run(c, plan.tiling, multiprocessors, device);
  return nullptr;
}

}  // namespace

const char* convolve_wgmma(const Convolution& c, const OnDevice& device) {
  const ScalarType type = c.x.scalar_type();
  if (type != ScalarType::BFloat16 && type != ScalarType::Half) return "it takes bfloat16 and float16";
  if (c.stride[0] != 1 || c.stride[1] != 1) return "it takes stride 1";
  if (c.C % 8 != 0 || c.K % 8 != 0) return "a group's channels and filters must be multiples of 8";
  if (!aligned(c.x.const_data_ptr(), c.w.const_data_ptr(), c.y.const_data_ptr(),
               c.bias ? c.bias->const_data_ptr() : nullptr, c.mask ? c.mask->const_data_ptr() : nullptr)) {
    return "the tensors must be aligned to 16 bytes";
  }
  return type == ScalarType::BFloat16 ? run_plan<bf16>(c, device) : run_plan<f16>(c, device);
}

}  // namespace alexnet_kernels::cuda
