// The gradients of a convolution's filters and bias on Hopper's tensor cores, for stride 1: an implicit GEMM whose
// operands TMA copies.
//   x [N, H, W, groups C], g [N, OH, OW, groups K], dw [groups K, R, S, C], db [groups K]; bfloat16 or float16, sums in
//   float in a fixed order; C and K are multiples of 8, addresses of 16 bytes
//
// The terms of the sums are the pixels of g. The rows of the matrix product are pairs of a tap (r, s) and a channel,
// its columns filters: dw[k, (r, s, c)] = sum over p of x[p moved by (r, s), c] g[p, k].
//
// A block computes a tile of it, for some of the pixels: kUnits units, which are 16 channels of one tap each, all of
// the same 64 channels of a group, times kColumns filters. A box {n, h, w} of pixels at a time, its filters of g and
// its channels of x, with the pixels around them that its taps reach, are copied to shared memory once, for all units.
// Outside of the image, and beyond a group's channels or filters, TMA fills in zeros.
//   - x, moved by a tap, is in general no matrix that wgmma takes from shared memory. ldmatrix takes its rows, wherever
//     they are, to registers, and transposes them, since the terms have to follow each other there.
//   - g is read by wgmma from shared memory, transposed too: in a box a pixel's filters follow each other.
//
//   warps 0 to 4 kWarpgroups - 1   consumers: each multiplies kTiles units
//   warp 4 kWarpgroups             the producer: one lane starts all copies
//   three warps more               where the bias is asked for: add g over the pixels
//
//   ring   boxes    full: 1 arrival and the bytes of the boxes; empty: all warps that read it are done
//
// Pixels of a box beyond the image take x from a row of zeros: what x has there, which may not be finite, does not
// count. So do those beyond the box, which fill up the last 16 terms; their g is set to zero once.
//
// The pixels are split over blocks as far as there are multiprocessors. Each split writes its sums, in float, to a
// workspace; add_splits adds them in a fixed order.
#include <limits>
#include <tuple>

#include "conv2d_relu_backward.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "ring.cuh"
#include "tensor_core.cuh"

namespace alexnet_kernels::cuda {
namespace {

constexpr int kTerms = 16;     // pixels, in one wgmma
constexpr int kUnit = 16;      // channels of one tap: the rows of a warp
constexpr int kChannels = 64;  // of a box of x
constexpr int kPixelBytes = 2 * kChannels;
constexpr int kMostPixels = 256, kMostExtent = 254;  // of a box
constexpr int kMostStages = 8;

// One kernel's tile.
template <int kWarpgroups_, int kTiles_, int kColumns_>
struct Shape {
  static constexpr int kWarpgroups = kWarpgroups_, kTiles = kTiles_, kColumns = kColumns_;
  static constexpr int kWarps = 4 * kWarpgroups;
  static constexpr int kUnits = kWarps * kTiles;
  static constexpr int kConsumers = kWarpgroups * kWarpgroup;
  static constexpr int kThreads = kConsumers + kWarpgroup;

  // g has boxes of so many filters.
  static constexpr int kPart = kColumns % 64 == 0 ? 64 : 32;
  static constexpr int kParts = kColumns / kPart;
  static constexpr int kPartBytes = 2 * kPart;
  static_assert(kColumns % kPart == 0 && kColumns / 2 <= 3 * kWarp, "a thread adds two filters' g");

  // Registers of a thread: what a launch gives to each, of which the producer gives some up.
  static constexpr int kLaunchRegisters = std::min(65536 / kThreads / 8 * 8, 248);
  static constexpr int kProducerRegisters = 32;
  static constexpr int kConsumerRegisters =
      std::min(((kWarpgroups + 1) * kLaunchRegisters - kProducerRegisters) / kWarpgroups / 8 * 8, 240);
  static constexpr bool kMovesRegisters = kConsumerRegisters > kLaunchRegisters;
};

// AlexNet's conv1 (as blocks of pixels), conv2, conv3 and conv4, conv5; torchvision's conv1; few filters or pixels.
using Shapes =
    std::tuple<Shape<2, 4, 96>, Shape<2, 2, 128>, Shape<3, 1, 192>, Shape<3, 3, 64>, Shape<4, 2, 64>, Shape<1, 1, 64>>;

// The tiles of a launch, and its shared memory.
struct Tiling {
  int n, h, w;                                   // pixels of a box
  int halo_h, halo_w;                            // of its box of x
  int along_n, along_h, along_w;                 // boxes
  int units, columns, channels, groups, splits;  // tiles: blocks of units, of filters, of channels; groups
  int steps;                                     // of 16 pixels, in a box
  int stages, x_bytes, part_bytes;               // of x and of a part of g in a stage

  __host__ __device__ int boxes() const { return along_n * along_h * along_w; }
  __host__ __device__ int pixels() const { return n * h * w; }
  __host__ __device__ int halo() const { return n * halo_h * halo_w; }
  __host__ __device__ int tiles() const { return units * columns * channels * groups; }
};

struct Geometry {
  int N, C, K, R, S, OH, OW, padding_h, padding_w;
};

// Units of a block of channels of C: for each tap, the 16 channels one after the other.
__host__ __device__ __forceinline__ int units_of_tap(int C, int channel) {
  return (min(C - channel, kChannels) + kUnit - 1) / kUnit;
}

// What a block computes.
struct Task {
  Task() = default;
  int unit, column, channel, group;  // the first ones, of the group
  int unit_count, units_of_tap;      // of its channels
  int row;                           // of the first tap
  int box, last;                     // the boxes of its split
  int split;

  // Tiles of the same pixels follow each other, so that blocks that run together read the same part of x and g.
  template <class Shape>
  __device__ __forceinline__ Task(const Tiling& tiling, const Geometry& g, Shape, int index) {
    unit = index % tiling.units * Shape::kUnits;
    index /= tiling.units;
    column = index % tiling.columns * Shape::kColumns;
    index /= tiling.columns;
    channel = index % tiling.channels * kChannels;
    index /= tiling.channels;
    group = index % tiling.groups;
    split = index / tiling.groups;
    units_of_tap = cuda::units_of_tap(g.C, channel);
    unit_count = g.R * g.S * units_of_tap;
    row = unit / units_of_tap / g.S;
    box = int(int64_t(tiling.boxes()) * split / tiling.splits);
    // The last channels may have fewer units: a block that has none has no boxes either. An early exit would have ptxas
    // limit the consumers' registers to those of the launch.
    last = unit < unit_count ? int(int64_t(tiling.boxes()) * (split + 1) / tiling.splits) : box;
  }
};

// The first pixel of box i: the boxes along w, then along h and n.
struct Box {
  int n, h, w;

  __device__ __forceinline__ Box(const Tiling& tiling, int index) {
    w = index % tiling.along_w * tiling.w;
    index /= tiling.along_w;
    h = index % tiling.along_h * tiling.h;
    n = index / tiling.along_h * tiling.n;
  }
};

// Where a box's pixel is in its box of x, for tap (0, 0), and which pixel of an image it is: 16, 8 and 8 bits.
struct Place {
  uint32_t bits;

  static constexpr uint32_t kNowhere = 0xffff;

  __device__ __forceinline__ static Place of(const Tiling& tiling, int pixel) {
    if (pixel >= tiling.pixels()) return {kNowhere};
    const int line = pixel / tiling.w, w = pixel % tiling.w, h = line % tiling.h;
    const int at = (line / tiling.h * tiling.halo_h + h) * tiling.halo_w + w;
    return {uint32_t(at) << 16 | uint32_t(h) << 8 | uint32_t(w)};
  }
  __device__ __forceinline__ uint32_t pixel() const { return bits >> 16; }
  // In a box of which so many rows and columns, at most kMostExtent, are in the image.
  __device__ __forceinline__ bool inside(int rows, int columns) const {
    return int(bits >> 8 & 0xff) < rows && int(bits & 0xff) < columns;
  }
};
static_assert(kMostExtent < 0xff, "kNowhere is in no box");
static_assert(kSharedBytes / kPixelBytes < 1 << 16);

template <class Shape>
struct Maps {
  TensorMap x, g;
};

// The producer's lane: copies the boxes.
template <class Shape>
__device__ __forceinline__ void produce(Ring ring, const Maps<Shape>& maps, const Tiling& tiling, const Geometry& g,
                                        const Task& task) {
  prefetch(maps.x);
  prefetch(maps.g);
  for (int index = task.box; index < task.last; ++index) {
    const Box box(tiling, index);
    ring.wait_empty();
    arrive_and_expect(ring.full(), kPixelBytes * tiling.halo() + 2 * Shape::kColumns * tiling.pixels());
    load_box(ring.stage(), maps.x, ring.full(), task.channel, task.group, box.w - g.padding_w,
             box.h - g.padding_h + task.row, box.n);
#pragma unroll 1
    for (int part = 0; part < Shape::kParts; ++part) {
      load_box(ring.stage() + tiling.x_bytes + part * tiling.part_bytes, maps.g, ring.full(),
               task.column + part * Shape::kPart, task.group, box.w, box.h, box.n);
    }
    ring.advance();
  }
}

// Three warps: add g over the pixels, two filters a thread. A box's sum is added to those of the others as a whole.
template <class T, class Shape>
__device__ __forceinline__ void add_bias(Ring ring, const Tiling& tiling, const Geometry& g, const Task& task,
                                         float* partial) {
  const int pair = int(threadIdx.x) - Shape::kConsumers - kWarp, column = 2 * pair;
  const int part = column / Shape::kPart, byte = column % Shape::kPart * 2;
  float total[2] = {};
  for (int index = task.box; index < task.last; ++index) {
    ring.wait_full();
    if (column < Shape::kColumns) {
      const unsigned char* const rows = ring.stage() + tiling.x_bytes + part * tiling.part_bytes;
      float sum[2] = {};
#pragma unroll 4
      for (int pixel = 0; pixel < tiling.pixels(); ++pixel) {
        const int row = pixel * Shape::kPartBytes;
        // TMA's permutation of the row's 16-byte parts.
        const int at = row + (byte ^ row / 128 % (Shape::kPartBytes / 16) * 16);
        float values[2];
        load<2>(reinterpret_cast<const T*>(rows + at), values);
        sum[0] += values[0], sum[1] += values[1];
      }
      total[0] += sum[0], total[1] += sum[1];
    }
    ring.advance();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ring.hand_back_previous();
  }
  if (column >= Shape::kColumns) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int k = task.column + column + i;
    if (k < g.K) partial[(int64_t(task.split) * tiling.groups + task.group) * g.K + k] = total[i];
  }
}

// Consumer warps: multiply all boxes, and store the sums.
template <class T, class Shape>
__device__ __forceinline__ void consume(Ring ring, const Tiling& tiling, const Geometry& g, const Task* shared_task,
                                        const Place* places, uint32_t zeros, float* partial) {
  // The shuffle tells the compiler that all lanes of a warp have the same number.
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarp, 0), lane = int(threadIdx.x) % kWarp;

  int box = shared_task->box;
  const int last = shared_task->last;

  // This lane gives ldmatrix the addresses of pixel lane % 8 + 8 (lane / 16), and of half lane / 8 % 2 of a unit's
  // channels. of_unit: what the unit adds to the 16-byte part of the box that the pixel's first one is.
  const int term = lane % 8 + lane / 16 * 8;
  uint32_t of_unit[Shape::kTiles];
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
    // A warp without a unit multiplies the last one, too.
    const Task& task = *shared_task;
    const int unit = min(task.unit + i * Shape::kWarps + warp, task.unit_count - 1);
    const int tap = unit / task.units_of_tap, r = tap / g.S - task.row, s = tap % g.S;
    of_unit[i] = uint32_t((r * tiling.halo_w + s) * (kPixelBytes / 16) + unit % task.units_of_tap * 2 + lane / 8 % 2);
  }
  float sum[Shape::kTiles][Shape::kColumns / 2];
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
#pragma unroll
    for (float& v : sum[i]) v = 0;
    settle(sum[i]);
  }

  // The rows of the next product are loaded while one runs; when it has been started, the one before it is waited for.
  uint32_t a[2][4];
  int at = 0, rows = 0, columns = 0;
  uint32_t pixel = 0;
  bool inside = false, ended = false;  // ended: the step before was the last of its box
  auto enter = [&] {
    const Box first(tiling, box);
    rows = min(g.OH - first.h, tiling.h), columns = min(g.OW - first.w, tiling.w);
    ring.wait_full();
  };
  auto locate = [&] {
    const Place place = places[at * kTerms + term];
    pixel = place.pixel() * (kPixelBytes / 16);
    inside = place.inside(rows, columns);
  };
  auto load = [&](uint32_t(&next)[4], int i) {
    const uint32_t part = pixel + of_unit[i];
    // TMA's permutation of the row's 16-byte parts.
    const uint32_t address = shared_address(ring.stage()) + 16 * (part ^ part / (kPixelBytes / 16) % 8);
    ldmatrix_transposed(next, inside ? address : zeros);
  };
  auto hand_back = [&] {
    if (ended && lane == 0) ring.hand_back_previous();
  };
  auto step = [&](auto parity, bool first) {
    const uint64_t b = describe_transposed<Shape::kPartBytes>(
        ring.stage() + tiling.x_bytes + at * (kTerms * Shape::kPartBytes), tiling.part_bytes);
#pragma unroll
    for (int i = 0; i < Shape::kTiles; ++i) {
      wgmma_fence();
      wgmma<T, Shape::kColumns, true>(sum[i], a[(parity + i) % 2], b);
      wgmma_commit();
      wgmma_wait<1>();
      if (i == 0 && !first) hand_back();
      if (i + 1 < Shape::kTiles) load(a[(parity + i + 1) % 2], i + 1);
    }
    ended = ++at == tiling.steps;
    if (ended) {
      at = 0;
      ++box;
      ring.advance();
    }
    if (box == last) return;
    if (ended) enter();
    locate();
    load(a[(parity + Shape::kTiles) % 2], 0);
  };
  using Even = std::integral_constant<int, 0>;
  using Odd = std::integral_constant<int, Shape::kTiles % 2>;
  if (const int count = (last - box) * tiling.steps; count > 0) {
    enter();
    locate();
    load(a[0], 0);
    step(Even(), true);
    for (int i = 1; i < count; i += 2) {
      step(Odd(), false);
      if (i + 1 < count) step(Even(), false);
    }
    wgmma_wait<0>();
    hand_back();
  }
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) settle(sum[i]);

  // Store this thread's two rows of each unit. The task is read anew: it would take registers from the sums.
  const Task task = *shared_task;
  const int length = g.R * g.S * g.C;  // of a filter
  int at_row[Shape::kTiles][2];        // in the filter; negative: not stored
#pragma unroll
  for (int i = 0; i < Shape::kTiles; ++i) {
    const int unit = task.unit + i * Shape::kWarps + warp, tap = unit / task.units_of_tap;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int c = task.channel + unit % task.units_of_tap * kUnit + lane / 4 + 8 * j;
      at_row[i][j] = unit < task.unit_count && c < g.C ? tap * g.C + c : -1;
    }
  }
  const int filter = task.column + 2 * (lane % 4);
  float* to = partial + ((int64_t(task.split) * tiling.groups + task.group) * g.K + filter) * length;
#pragma unroll
  for (int block = 0; block < Shape::kColumns / 8; ++block) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      if (filter + 8 * block + k < g.K) {
#pragma unroll
        for (int i = 0; i < Shape::kTiles; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (at_row[i][j] >= 0) to[at_row[i][j]] = sum[i][4 * block + 2 * j + k];
          }
        }
      }
      to += k == 0 ? length : 7 * length;
    }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    weight_gradient(const __grid_constant__ Maps<Shape> maps, Tiling tiling, Geometry geometry, float* partial,
                    float* partial_bias) {
  const Task task(tiling, geometry, Shape(), int(blockIdx.x));
  const bool with_bias = partial_bias != nullptr && task.unit == 0 && task.channel == 0;
  unsigned char* const shared = dynamic_shared();
  const int bytes = tiling.x_bytes + Shape::kParts * tiling.part_bytes;
  unsigned char* const zeros = shared + tiling.stages * bytes;
  auto* const places = reinterpret_cast<Place*>(zeros + 16);
  auto* const barriers = reinterpret_cast<Barrier*>(places + kMostPixels);
  auto* const shared_task = reinterpret_cast<Task*>(barriers + 2 * kMostStages);
  const Ring ring(shared, bytes, tiling.stages, barriers);
  const int t = int(threadIdx.x);
  if (t == 0) {
    ring.initialise(Shape::kWarps + (with_bias ? 3 : 0));
    publish_barriers();
    *shared_task = task;
  }
  if (t < 4) reinterpret_cast<uint32_t*>(zeros)[t] = 0;
  for (int i = t; i < tiling.steps * kTerms; i += Shape::kThreads) places[i] = Place::of(tiling, i);
  const int filled = tiling.pixels() * Shape::kPartBytes;
  for (int i = 0; i < tiling.stages * Shape::kParts; ++i) {
    unsigned char* const g =
        shared + i / Shape::kParts * bytes + tiling.x_bytes + i % Shape::kParts * tiling.part_bytes;
    for (int at = filled + 4 * t; at < tiling.part_bytes; at += 4 * Shape::kThreads) {
      *reinterpret_cast<uint32_t*>(g + at) = 0;
    }
  }
  publish_shared();
  __syncthreads();
  if (__shfl_sync(0xffffffffu, t / kWarpgroup, 0) < Shape::kWarpgroups) {
    if constexpr (Shape::kMovesRegisters) take_registers<Shape::kConsumerRegisters>();
    consume<T, Shape>(ring, tiling, geometry, shared_task, places, shared_address(zeros), partial);
  } else {
    if constexpr (Shape::kMovesRegisters) give_up_registers<Shape::kProducerRegisters>();
    if (t >= Shape::kConsumers + kWarp) {
      if (with_bias) add_bias<T, Shape>(ring, tiling, geometry, task, partial_bias);
    } else if (t == Shape::kConsumers) {
      produce<Shape>(ring, maps, tiling, geometry, task);
    }
  }
}

// Shared memory besides the stages.
constexpr int kOther =
    16 + kMostPixels * int(sizeof(Place)) + 2 * kMostStages * int(sizeof(Barrier)) + int(sizeof(Task));

// Rows of taps that the units of a block span.
int rows_of_taps(const WeightGradient& c, int units) {
  int most = 1;
  for (int channel = 0; channel < c.C; channel += kChannels) {
    const int of_tap = units_of_tap(c.C, channel), count = c.R * c.S * of_tap;
    for (int unit = 0; unit < count; unit += units) {
      const int last = std::min(unit + units, count) - 1;
      most = std::max(most, last / of_tap / c.S - unit / of_tap / c.S + 1);
    }
  }
  return most;
}

// Divides shared memory into stages; false if there is not enough.
template <class Shape>
bool divide_shared(const WeightGradient& c, int rows, Tiling& tiling) {
  tiling.halo_h = tiling.h + rows - 1, tiling.halo_w = tiling.w + c.S - 1;
  if (tiling.halo_h > kMostBox || tiling.halo_w > kMostBox) return false;
  if (int64_t(tiling.n) * tiling.halo_h * tiling.halo_w * kPixelBytes > kSharedBytes) return false;
  tiling.steps = int(divide_up(tiling.pixels(), kTerms));
  tiling.x_bytes = round_up(kPixelBytes * tiling.halo(), kAtom);
  tiling.part_bytes = tiling.steps * kTerms * Shape::kPartBytes;
  static_assert(kTerms * Shape::kPartBytes % kAtom == 0);
  const int bytes = tiling.x_bytes + Shape::kParts * tiling.part_bytes;
  tiling.stages = std::min(kMostStages, (kSharedBytes - kOther) / bytes);
  return tiling.stages >= 2;
}

struct Choice {
  double clocks = std::numeric_limits<double>::infinity();  // no tiles fit
  Tiling tiling{};
};

// An estimate of the clocks that the launch takes, for choosing between tiles and kernels: waves of blocks, each bound
// by the tensor cores (N / 2 clocks for 64 x N x 16), by shared memory (128 bytes a clock) or by L2, and what the
// blocks take besides, the sums of all splits among it.
template <class Shape>
double clocks(const WeightGradient& c, const Tiling& tiling, int multiprocessors) {
  constexpr double kBlockClocks = 2000, kBytesPerClock = 128, kL2BytesPerClock = 24;
  constexpr double kProduct = Shape::kColumns / 2.;
  constexpr double kReadG = Shape::kColumns * 2. * kTerms / kBytesPerClock;
  constexpr double kReadX = kWarpgroupRows * 2. * kTerms / kBytesPerClock;
  // Where eight rows of ldmatrix are not consecutive pixels, two of them share banks.
  const double read = kReadX * (1 + std::min(7, tiling.w) / double(tiling.w)) + kReadG;
  const double products = double(tiling.steps) * Shape::kWarpgroups * Shape::kTiles * std::max(kProduct, read);
  const double copies =
      (double(kPixelBytes) * tiling.halo() + 2. * Shape::kColumns * tiling.pixels()) / kL2BytesPerClock;
  const double sums = 2. * sizeof(float) * tiling.splits * c.groups * c.K * c.R * c.S * c.C;
  return divide_up(int64_t(tiling.tiles()) * tiling.splits, multiprocessors) *
             (divide_up(tiling.boxes(), tiling.splits) * std::max(products, copies) + kBlockClocks) +
         sums / (kL2BytesPerClock * multiprocessors);
}

// The tiles that take the fewest clocks.
template <class Shape>
Choice tile(const WeightGradient& c, int multiprocessors) {
  Choice best;
  const int rows = rows_of_taps(c, Shape::kUnits);
  Tiling tiling{};
  tiling.units = int(divide_up(c.R * c.S * units_of_tap(c.C, 0), Shape::kUnits));
  tiling.columns = int(divide_up(c.K, Shape::kColumns));
  tiling.channels = int(divide_up(c.C, kChannels));
  tiling.groups = c.groups;
  for (int w = std::min(c.OW, kMostExtent); w > 0; w = next_smaller(c.OW, w)) {
    for (int h = std::min({c.OH, kMostPixels / w, kMostExtent}); h > 0; h = next_smaller(c.OH, h)) {
      const int n = int(divide_up(c.N, divide_up(c.N, std::min(c.N, kMostPixels / (w * h)))));
      tiling.n = n, tiling.h = h, tiling.w = w;
      tiling.along_n = int(divide_up(c.N, n));
      tiling.along_h = int(divide_up(c.OH, h)), tiling.along_w = int(divide_up(c.OW, w));
      if (!divide_shared<Shape>(c, rows, tiling)) continue;
      for (int waves = 1; waves <= 3; ++waves) {
        tiling.splits = std::clamp(waves * multiprocessors / tiling.tiles(), 1, tiling.boxes());
        const double taken = clocks<Shape>(c, tiling, multiprocessors);
        if (taken < best.clocks) best = {taken, tiling};
      }
    }
  }
  return best;
}

Boxes boxes_of(const Tensor& images, int channels, int groups, uint32_t box_channels, int box_h, int box_w, int box_n) {
  const uint64_t N = images.size(0), H = images.size(2), W = images.size(3), pixel = 2 * uint64_t(groups) * channels;
  return {images.const_data_ptr(),
          {uint64_t(channels), uint64_t(groups), W, H, N},
          {2 * uint64_t(channels), pixel, pixel * W, pixel * W * H},
          {box_channels, 1, uint32_t(box_w), uint32_t(box_h), uint32_t(box_n)},
          images.scalar_type() == ScalarType::BFloat16};
}

template <class T, class Shape>
void run(const WeightGradient& c, const Tiling& tiling, const OnDevice& device) {
  const Maps<Shape> maps{encode(boxes_of(c.x, c.C, c.groups, kChannels, tiling.halo_h, tiling.halo_w, tiling.n)),
                         encode(boxes_of(c.g, c.K, c.groups, Shape::kPart, tiling.h, tiling.w, tiling.n))};
  const Geometry geometry{c.N, c.C, c.K, c.R, c.S, c.OH, c.OW, c.padding[0], c.padding[1]};
  const int64_t filters = int64_t(c.groups) * c.K, weights = filters * c.R * c.S * c.C;
  const Tensor partials = empty({tiling.splits * (weights + filters)}, ScalarType::Float, c.x);
  float* const partial = mutable_data<float>(partials);
  float* const partial_bias = partial + tiling.splits * weights;
  const int shared = tiling.stages * (tiling.x_bytes + Shape::kParts * tiling.part_bytes) + kOther;
  device.launch_with_shared(weight_gradient<T, Shape>, int64_t(tiling.tiles()) * tiling.splits, Shape::kThreads, shared,
                            maps, tiling, geometry, partial, c.db ? partial_bias : nullptr);
  Tensor dw = c.dw;
  add_splits(device, partial, tiling.splits, weights, dw);
  if (c.db) {
    Tensor db = *c.db;
    add_splits(device, partial_bias, tiling.splits, filters, db);
  }
}

// The kernel that takes the fewest clocks, and its tiles.
template <class T>
struct Plan {
  void (*run)(const WeightGradient&, const Tiling&, const OnDevice&) = nullptr;  // null: none fits
  Tiling tiling{};

  Plan(const WeightGradient& c, int multiprocessors) {
    Choice best;
    auto consider = [&](auto shape) {
      using Shape = decltype(shape);
      const Choice choice = tile<Shape>(c, multiprocessors);
      if (choice.clocks < best.clocks) best = choice, run = cuda::run<T, Shape>;
    };
    std::apply([&](auto... shapes) { (consider(shapes), ...); }, Shapes());
    tiling = best.tiling;
  }

  static const Plan& of(const WeightGradient& c, int multiprocessors) {
    const std::array<int, 9> key{c.N, c.C, c.groups, c.K, c.R, c.S, c.OH, c.OW, multiprocessors};
    return planned<Plan>(key, [&] { return Plan(c, multiprocessors); });
  }
};

template <class T>
const char* run_plan(const WeightGradient& c, const OnDevice& device) {
  const Plan<T>& plan = Plan<T>::of(c, device_attribute(cudaDevAttrMultiProcessorCount));
  if (plan.run == nullptr) return "the filters are too large for shared memory";
  plan.run(c, plan.tiling, device);
  return nullptr;
}

}  // namespace

const char* weight_gradient_wgmma(const WeightGradient& c, const OnDevice& device) {
  const ScalarType type = c.x.scalar_type();
  if (type != ScalarType::BFloat16 && type != ScalarType::Half) return "it takes bfloat16 and float16";
  if (c.stride[0] != 1 || c.stride[1] != 1) return "it takes stride 1";
  if (c.C % 8 != 0 || c.K % 8 != 0) return "a group's channels and filters must be multiples of 8";
  if (!aligned(c.x.const_data_ptr(), c.g.const_data_ptr())) return "the tensors must be aligned to 16 bytes";
  return type == ScalarType::BFloat16 ? run_plan<bf16>(c, device) : run_plan<f16>(c, device);
}

}  // namespace alexnet_kernels::cuda
