// Hopper's asynchronous instructions (csrc/cuda/hopper.cuh) for the emulation, as the PTX ISA describes them and no
// kinder than it allows:
//
// A copy's destination is NaN from the start of the copy until it lands, at some later switch of fibers. Copies land in
// any order.
// A product's accumulators are NaN from its start until the wait that covers its group. The operands in shared memory
// are read in that wait, by each warp for its rows.
//
// A fault that hardware would not report is an error of the launch where the emulation can tell, and wrong values
// elsewhere. Not modelled: proxy fences, whose absence between ordinary stores to shared memory and copies or products
// isn't found.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <array>
#include <deque>

#include "cuda.h"
#include "tensor_map.h"

namespace emulation {

// The address to which a swizzle of rows of `span` bytes moves a 16-byte part. 16: none.
constexpr uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ (address >> 3 & (span - 16));
}

inline std::string at(const void* shared) {
  return " at " + std::to_string(shared_address(shared));
}

// A barrier in shared memory.
struct PhasedBarrier {
  uint64_t* state;
  int arrivals;      // of each phase
  int pending;       // arrivals that the phase waits for
  int64_t bytes;     // that the phase waits for; negative: bytes that came before they were expected
  unsigned phase;    // how many phases are complete
  unsigned thread;   // that initialised it
  unsigned created;  // the block's generation then
  bool published;
  std::vector<Thread*> waiting;
  char edges[2];  // of even and odd phases
};

class PhasedBarriers : public Unit {
 public:
  void init(uint64_t* state, int arrivals) {
    Block& block = Block::current();
    if (reinterpret_cast<uintptr_t>(state) % sizeof(*state) != 0 || !block.holds(state, sizeof(*state))) {
      block.fail("a barrier that is not 8 aligned bytes of dynamic shared memory");
    }
    if (arrivals < 1 || arrivals > kMost) block.fail("a barrier of " + std::to_string(arrivals) + " arrivals");
    for (const PhasedBarrier& b : all_) {
      if (b.state == state) block.fail("the barrier" + at(state) + " is initialised twice");
    }
    *state = kMagic + all_.size();
    all_.push_back({state, arrivals, arrivals, 0, 0, block.thread->number, block.generation(), false, {}, {}});
  }

  void publish() {
    for (PhasedBarrier& b : all_) {
      if (b.thread == Block::current().thread->number) b.published = true;
    }
  }

  // The barrier, for the current thread.
  PhasedBarrier& find(const uint64_t* state) {
    Block& block = Block::current();
    if (!block.holds(state, sizeof(*state)) || !intact(state)) {
      block.fail("the barrier" + at(state) + " was not initialised, or was overwritten");
    }
    PhasedBarrier& b = all_[*state - kMagic];
    if (b.thread != block.thread->number && b.created == block.generation()) {
      block.fail("the barrier" + at(state) + " is used before __syncthreads() by a thread that did not initialise it");
    }
    return b;
  }

  void arrive(PhasedBarrier& b, int bytes) {
    Block& block = Block::current();
    if (b.pending == 0) block.fail("more arrivals than a phase of the barrier" + at(b.state) + " expects");
    if (bytes < 0 || b.bytes + bytes > kMost) {
      block.fail("a phase of the barrier" + at(b.state) + " that expects too many bytes");
    }
    Block::release(&b.edges[b.phase % 2]);
    b.bytes += bytes;
    --b.pending;
    const unsigned before = b.phase;
    advance(b);
    block.preempt(b.phase != before);
  }

  void wait(PhasedBarrier& b, int parity) {
    Block& block = Block::current();
    if (parity != 0 && parity != 1) block.fail("a wait for the parity " + std::to_string(parity));
    block.preempt(false);
    if (b.phase % 2 == unsigned(parity)) {
      b.waiting.push_back(block.thread);
      block.wait(State::at_phase);
    }
    Block::acquire(&b.edges[parity]);
  }

  // A copy for the barrier has landed.
  void land(PhasedBarrier& b, int64_t bytes) {
    if (!intact(b.state)) return Block::current().report("the barrier" + at(b.state) + " was overwritten");
    b.bytes -= bytes;
    advance(b);
  }

  std::string finish() override {
    for (const PhasedBarrier& b : all_) {
      if (b.pending != b.arrivals || b.bytes != 0) return "the block ends in the middle of a phase" + describe(b);
    }
    return {};
  }
  std::string waits_for() const override {
    std::string text;
    for (const PhasedBarrier& b : all_) {
      if (!b.waiting.empty()) text += "; a phase that does not complete" + describe(b);
    }
    return text;
  }

 private:
  static constexpr uint64_t kMagic = 0x7265697272616200;
  static constexpr int kMost = (1 << 20) - 1;  // arrivals and bytes of a phase

  bool intact(const uint64_t* state) const {
    return *state - kMagic < all_.size() && all_[*state - kMagic].state == state;
  }

  static std::string describe(const PhasedBarrier& b) {
    return ": phase " + std::to_string(b.phase) + " of the barrier" + at(b.state) + " waits for " +
           std::to_string(b.pending) + " of " + std::to_string(b.arrivals) + " arrivals and for " +
           std::to_string(b.bytes) + " bytes";
  }

  // Completes the phase if nothing is left to wait for.
  void advance(PhasedBarrier& b) {
    if (b.pending > 0 || b.bytes > 0) return;
    if (b.bytes < 0) {
      return Block::current().report("more bytes than a phase of the barrier" + at(b.state) + " expects");
    }
    ++b.phase;
    b.pending = b.arrivals;
    for (Thread* thread : b.waiting) Block::current().wake(*thread);
    b.waiting.clear();
  }

  std::deque<PhasedBarrier> all_;
};

inline void init(uint64_t* state, int arrivals) {
  const Ignored ignored;
  Block::current().unit<PhasedBarriers>().init(state, arrivals);
}
inline void publish_barriers() {
  const Ignored ignored;
  Block::current().unit<PhasedBarriers>().publish();
}
inline void arrive(uint64_t* state, int bytes) {
  const Ignored ignored;
  auto& barriers = Block::current().unit<PhasedBarriers>();
  barriers.arrive(barriers.find(state), bytes);
}
inline void wait(uint64_t* state, int parity) {
  const Ignored ignored;
  auto& barriers = Block::current().unit<PhasedBarriers>();
  barriers.wait(barriers.find(state), parity);
}

inline TiledMap tiled_map(const void* map) {
  TiledMap tiled;
  std::memcpy(&tiled, map, sizeof(tiled));
  if (tiled.magic != kTensorMapMagic || reinterpret_cast<uintptr_t>(map) % alignof(CUtensorMap) != 0) {
    Block::current().fail("a tensor map that cuTensorMapEncodeTiled did not write");
  }
  return tiled;
}
inline void prefetch(const void* map) {
  const Ignored ignored;
  tiled_map(map);
}

// Copies the box that begins at `start` to shared memory.
inline void copy_box(char* shared, uint32_t address, const TiledMap& map, const std::array<int, 5>& start) {
  const int row = map.elements(0) * kElementBytes;
  const int64_t first = std::max(0, -start[0]);
  const int64_t end = std::min<int64_t>(map.elements(0), int64_t(map.last[0]) + 1 - start[0]);
  char line[256 * kElementBytes];
  std::array<int, 5> i{};
  for (uint32_t to = address; i[4] < map.elements(4);) {
    std::memset(line, 0, row);
    const char* from = map.address;
    bool inside = first < end;
    for (int d = 1; d < 5; ++d) {
      const int64_t index = int64_t(start[d]) + i[d] * map.step[d];
      inside = inside && 0 <= index && index <= int64_t(map.last[d]);
      from += index * int64_t(map.stride[d - 1]);
    }
    if (inside) {
      std::memcpy(line + first * kElementBytes, from + (start[0] + first) * kElementBytes,
                  (end - first) * kElementBytes);
    }
    for (int part = 0; part < row; part += 16, to += 16) {
      std::memcpy(shared + (swizzled(to, map.swizzle) - address), line + part, 16);
    }
    for (int d = 1; d < 5 && ++i[d] == map.elements(d) && d < 4; ++d) i[d] = 0;
  }
}

inline void load_box(void* shared, const void* map, uint64_t* state, const std::array<int, 5>& start) {
  const Ignored ignored;
  Block& block = Block::current();
  const TiledMap tiled = tiled_map(map);
  auto& barriers = block.unit<PhasedBarriers>();
  PhasedBarrier& barrier = barriers.find(state);
  if (!barrier.published) block.fail("a copy for the barrier" + at(state) + ", which was not published");
  if (tiled.rank != 5) block.fail("a copy of 5 dimensions by a tensor map of " + std::to_string(tiled.rank));
  if (tiled.swizzle != 16 && tiled.box[0] * kElementBytes != tiled.swizzle) {
    block.fail("the emulation copies rows of the swizzle's span only");
  }
  // The swizzle's pattern repeats after so many bytes. wgmma takes matrices that begin with it.
  const uint32_t repeat = tiled.swizzle == 16 ? 128 : 8 * tiled.swizzle, address = shared_address(shared);
  size_t bytes = kElementBytes;
  for (int d = 0; d < 5; ++d) bytes *= tiled.elements(d);
  if (!block.holds(shared, bytes)) block.fail("a copy beyond dynamic shared memory");
  if (address % repeat != 0) {
    block.fail("a copy" + at(shared) + ", which is not a multiple of " + std::to_string(repeat));
  }
  std::memset(shared, 0xff, bytes);
  block.start([=, &barriers, &barrier] {
    copy_box(static_cast<char*>(shared), address, tiled, start);
    barriers.land(barrier, int64_t(bytes));
  });
}

// A matrix in shared memory, as wgmma's descriptors describe it.
struct Matrix {
  uint32_t start, leading, stride, span;
  const char* shared = Block::current().shared();
  size_t bytes = Block::current().shared_bytes();

  explicit Matrix(uint64_t descriptor)
      : start(descriptor % (1 << 14) * 16),
        leading((descriptor >> 16) % (1 << 14) * 16),
        stride((descriptor >> 32) % (1 << 14) * 16) {
    static constexpr uint32_t kSpans[] = {16, 128, 64, 32};
    span = kSpans[descriptor >> 62];
    constexpr uint64_t kFields = 0x3fff | uint64_t(0x3fff) << 16 | uint64_t(0x3fff) << 32 | uint64_t(3) << 62;
    if ((descriptor & ~kFields) != 0) {
      Block::current().fail("a descriptor of a matrix with a base offset or with reserved bits");
    }
  }

  // Eight elements: half `part` of the 16 of a row.
  const char* eight(uint32_t row, uint32_t part) const {
    const uint32_t first = start + row / 8 * stride;
    return checked(span == 16 ? first + row % 8 * 16 + part * leading
                              : swizzled(first + row % 8 * span + part * 16, span));
  }
  // Of a transposed matrix: elements `row` to row + 7, a multiple of 8, of a term.
  const char* eight_of_term(uint32_t term, uint32_t row) const {
    const uint32_t rows = span / kElementBytes;
    const uint32_t first = start + row / rows * leading + term / 8 * stride;
    return checked(swizzled(first + term % 8 * span + row % rows * kElementBytes, span));
  }

 private:
  const char* checked(uint32_t at) const {
    if (at + 16 > bytes) Block::current().fail("a product of a matrix beyond dynamic shared memory");
    return shared + at;
  }
};

// A warp's rows of the left operand, as its lanes hold them in registers.
struct Fragments {
  uint32_t word[16][8];

  void set(unsigned lane, const uint32_t* registers) {
    for (unsigned i = 0; i < 4; ++i) word[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = registers[i];
  }
  // Eight elements: half `part` of the 16 of a row.
  const char* eight(uint32_t row, uint32_t part) const { return reinterpret_cast<const char*>(word[row] + 4 * part); }
};

// Vectors of the compiler's, for instruction sets that it need not assume.
typedef uint16_t Bits16 __attribute__((vector_size(16)));
typedef uint32_t Bits32 __attribute__((vector_size(32)));
typedef float Eight __attribute__((vector_size(32)));

template <class T>
__attribute__((always_inline)) inline void decode(const char* from, float* to) {
  Bits16 packed;
  std::memcpy(&packed, from, sizeof(packed));
  const Bits32 bits = __builtin_convertvector(packed, Bits32);
  Bits32 result;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    result = bits << 16;
  } else {
    const Bits32 magnitude = (bits & 0x7fff) << 13;
    result = Bits32(Eight(magnitude) * 0x1p112f);  // corrects the exponent, and subnormal numbers
    result |= Bits32(magnitude >= (0x1f << 23)) & 0x7f800000u;
    result |= (bits & 0x8000) << 16;
  }
  std::memcpy(to, &result, sizeof(result));
}

// A right operand: [column][term].
template <class T, int kN, bool kTransposed>
__attribute__((always_inline)) inline void decode(const Matrix& b, float (*columns)[16]) {
  if constexpr (kTransposed) {
    for (uint32_t i = 0; i < 2 * kN; ++i) {
      float eight[8];
      decode<T>(b.eight_of_term(i % 16, i / 16 * 8), eight);
      for (uint32_t j = 0; j < 8; ++j) columns[i / 16 * 8 + j][i % 16] = eight[j];
    }
  } else {
    for (uint32_t i = 0; i < 2 * kN; ++i) decode<T>(b.eight(i / 2, i % 2), columns[i / 2] + i % 2 * 8);
  }
}

// c[column][row] += the sum of a[row][k] b[column][k] over k < 16, for the 16 rows of a warp.
template <class T, int kN, bool kTransposed>
__attribute__((always_inline)) inline void multiply(const Fragments& a, const Matrix& b, float (*c)[16]) {
  float rows[16][16];
  alignas(32) float transposed[16][16];
  for (uint32_t i = 0; i < 32; ++i) decode<T>(a.eight(i / 2, i % 2), rows[i / 2] + i % 2 * 8);
  for (int i = 0; i < 256; ++i) transposed[i % 16][i / 16] = rows[i / 16][i % 16];
  float all_columns[kN][16];
  decode<T, kN, kTransposed>(b, all_columns);
  constexpr int kColumns = 4;
  for (int n = 0; n < kN; n += kColumns) {
    const float(*columns)[16] = all_columns + n;
    Eight sums[kColumns][2];
    std::memcpy(sums, c + n, sizeof(sums));
    for (int k = 0; k < 16; ++k) {
      Eight row[2];
      std::memcpy(row, transposed[k], sizeof(row));
      for (int i = 0; i < kColumns; ++i) {
        sums[i][0] += row[0] * columns[i][k];
        sums[i][1] += row[1] * columns[i][k];
      }
    }
    std::memcpy(c + n, sums, sizeof(sums));
  }
}
template <class T, int kN, bool kTransposed>
void multiply_anywhere(const Fragments& a, const Matrix& b, float (*c)[16]) {
  multiply<T, kN, kTransposed>(a, b, c);
}
#if defined(__x86_64__)
template <class T, int kN, bool kTransposed>
__attribute__((target("avx2,fma"))) void multiply_avx2(const Fragments& a, const Matrix& b, float (*c)[16]) {
  multiply<T, kN, kTransposed>(a, b, c);
}
#endif
using Multiply = void (*)(const Fragments&, const Matrix&, float (*)[16]);
template <class T, int kN, bool kTransposed>
Multiply fastest_multiply() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return multiply_avx2<T, kN, kTransposed>;
#endif
  return multiply_anywhere<T, kN, kTransposed>;
}

class Products : public Unit {
 public:
  void fence() {
    const Place at = place();
    at.lane.fenced = true;
    for (Accumulators& acc : at.warp.accumulators) {
      const float* registers = acc.registers[at.number];
      if (registers == nullptr || acc.in_flight[at.number] > 0) continue;
#if defined(__SANITIZE_ADDRESS__)
      if (__asan_region_is_poisoned(const_cast<float*>(registers), acc.bytes())) continue;  // their scope has ended
#endif
      std::memcpy(acc.of(at.number), registers, acc.bytes());
    }
  }

  // `registers` are kN / 2, and `a` 4.
  void start(Multiply multiply, int columns, const uint32_t* a, uint64_t b, float* registers) {
    const Place at = place();
    Matrix{b};  // checks it
    if (!at.lane.fenced) fail(kUnfenced);
    at.lane.left.push_back({a, {a[0], a[1], a[2], a[3]}});
    const int which = find(at, registers, columns / 2);
    Accumulators& acc = at.warp.accumulators[which];
    if (acc.in_flight[at.number]++ > 0 && !is_nan(registers, acc.count)) fail(kChanged);
    std::memset(registers, 0xff, acc.bytes());
    append(at, {multiply, columns, b, which});
  }

  void commit() {
    const Place at = place();
    append(at, {});
    at.lane.fenced = false;
  }

  void wait(int groups) {
    struct Operand {
      size_t started, done;
      int groups;
      bool operator==(const Operand&) const = default;
    };
    Block::ignore(true);
    const Place at = place();
    const Operand mine{at.lane.started, at.lane.done, groups};
    Block::ignore(false);  // the collective does it
    static char which;
    Block::current().collective<int>(0xffffffffu, &which, mine, [&](unsigned l, const Operand* const* in) {
      for (unsigned i = 0; i < kWarp && l == 0; ++i) {
        if (in[i] == nullptr || !(*in[i] == mine)) {
          fail("lanes of a warp wait for different products");
        }
      }
      if (l == 0) complete(at, groups);
      return 0;
    });
  }

  std::string finish() override {
    for (const Warpgroup& group : groups_) {
      for (const Warp& warp : group.warps) {
        for (const Lane& lane : warp.lanes) {
          if (lane.started != group.log.size()) return kDifferent;
          for (size_t i = lane.done; i < lane.started; ++i) {
            if (group.log[i].multiply != nullptr) return "a thread ends with products that it did not wait for";
          }
        }
      }
    }
    return {};
  }

 private:
  static constexpr const char* kDifferent = "lanes or warps of a warpgroup start different products";
  static constexpr const char* kChanged = "accumulators are changed while a product is under way";

  // The registers of a warp that hold the accumulators of a product.
  struct Accumulators {
    int count;  // of a lane
    float* registers[kWarp];
    int in_flight[kWarp];  // products under way
    // Of each lane: the result of the products that are complete, while others are under way; else what the last of
    // them, or the last fence, found in the registers.
    std::vector<float> values;

    float* of(unsigned lane) { return values.data() + lane * size_t(count); }
    size_t bytes() const { return size_t(count) * sizeof(float); }
  };
  // A product, or the end of a group, where there is nothing to multiply.
  struct Operation {
    Multiply multiply;
    int columns;
    uint64_t b;
    int accumulators;
    bool operator==(const Operation&) const = default;
  };
  // The registers of the left operand, and what they held when the product was started.
  struct Left {
    const uint32_t* registers;
    std::array<uint32_t, 4> values;
  };
  struct Lane {
    size_t started = 0, done = 0;  // operations of the log
    std::deque<Left> left;         // of the products under way
    bool fenced = false;           // since the last group or wait
  };
  struct Warp {
    Lane lanes[kWarp];
    std::vector<Accumulators> accumulators;
  };
  struct Warpgroup {
    Warp warps[4];
    std::vector<Operation> log;  // what each of its threads has to do
  };
  struct Place {
    Warpgroup& group;
    Warp& warp;
    Lane& lane;
    unsigned number, warp_number;  // of the lane and the warp
  };

  static void fail(const char* what) { Block::current().fail(what); }

  static bool is_nan(const float* registers, int count) {
    static constexpr std::array<uint32_t, 128> kNan = [] {
      std::array<uint32_t, 128> all{};
      all.fill(0xffffffffu);
      return all;
    }();
    return std::memcmp(registers, kNan.data(), size_t(count) * sizeof(float)) == 0;
  }

  Place place() {
    Block& block = Block::current();
    const unsigned thread = block.thread->number, group = thread / 128;
    if (block.threads() < 128 * (group + 1)) fail("wgmma in a warpgroup of less than 128 threads");
    while (groups_.size() <= group) groups_.emplace_back();
    Warp& warp = groups_[group].warps[thread / kWarp % 4];
    return {groups_[group], warp, warp.lanes[thread % kWarp], thread % kWarp, thread / kWarp % 4};
  }

  // The index of the accumulators in these registers of the lane, whose contents the product may take.
  int find(const Place& at, float* registers, int count) {
    auto& all = at.warp.accumulators;
    for (Accumulators& acc : all) {
      if (acc.registers[at.number] != registers) continue;
      if (acc.count == count) {
        if (acc.in_flight[at.number] == 0 && std::memcmp(registers, acc.of(at.number), acc.bytes()) != 0)
          fail(kUnfenced);
        return int(&acc - all.data());
      }
      if (acc.in_flight[at.number] > 0) fail(kChanged);
      acc.registers[at.number] = nullptr;
    }
    size_t i = 0;
    while (i < all.size() && (all[i].count != count || all[i].registers[at.number] != nullptr)) ++i;
    if (i == all.size()) all.push_back({count, {}, {}, std::vector<float>(kWarp * size_t(count))});
    all[i].registers[at.number] = registers;
    std::memcpy(all[i].of(at.number), registers, all[i].bytes());
    return int(i);
  }
  static constexpr const char* kUnfenced = "a product without wgmma_fence() after its registers were written";

  void append(const Place& at, const Operation& operation) {
    if (at.lane.started == at.group.log.size()) at.group.log.push_back(operation);
    if (!(at.group.log[at.lane.started++] == operation)) fail(kDifferent);
  }

  // Completes the warp's groups but the last ones.
  void complete(const Place& at, int groups) {
    const std::vector<Operation>& log = at.group.log;
    size_t end = at.lane.started;
    for (int left = groups; end > at.lane.done; --end) {
      if (log[end - 1].multiply == nullptr && left-- == 0) break;
    }
    std::vector<Fragments> left;
    for (size_t o = at.lane.done; o < end; ++o) {
      if (log[o].multiply == nullptr) continue;
      left.emplace_back();
      for (unsigned l = 0; l < kWarp; ++l) {
        std::deque<Left>& mine = at.warp.lanes[l].left;
        if (std::memcmp(mine.front().registers, mine.front().values.data(), 16) != 0) {
          fail("the left operand is changed while its product is under way");
        }
        left.back().set(l, mine.front().values.data());
        mine.pop_front();
      }
    }
    for (size_t i = 0; i < at.warp.accumulators.size(); ++i) {
      Accumulators& acc = at.warp.accumulators[i];
      alignas(64) float matrix[256][16];  // [column][row]
      int products = 0, all = 0;
      for (size_t o = at.lane.done; o < end; ++o) {
        const Operation& operation = log[o];
        if (operation.multiply == nullptr) continue;
        const Fragments& a = left[all++];
        if (operation.accumulators != int(i)) continue;
        if (products++ == 0) exchange<true>(acc, matrix);
        operation.multiply(a, Matrix(operation.b), matrix);
      }
      if (products == 0) continue;
      exchange<false>(acc, matrix);
      for (unsigned l = 0; l < kWarp; ++l) {
        if ((acc.in_flight[l] -= products) > 0) continue;
        if (!is_nan(acc.registers[l], acc.count)) fail(kChanged);
        std::memcpy(acc.registers[l], acc.of(l), acc.bytes());
      }
    }
    for (Lane& lane : at.warp.lanes) lane.done = end, lane.fenced = false;
  }

  // Copies the values of all lanes to the matrix, or back.
  template <bool kToMatrix>
  static void exchange(Accumulators& acc, float (*matrix)[16]) {
    for (unsigned l = 0; l < kWarp; ++l) {
      for (int i = 0; i < acc.count; ++i) {
        float& in_matrix = matrix[8 * (i / 4) + 2 * (l % 4) + i % 2][l / 4 + 8 * (i / 2 % 2)];
        float& in_lane = acc.of(l)[i];
        kToMatrix ? in_matrix = in_lane : in_lane = in_matrix;
      }
    }
  }

  std::deque<Warpgroup> groups_;
};

inline void wgmma_fence() {
  const Ignored ignored;
  Block::current().unit<Products>().fence();
}
inline void wgmma_commit() {
  const Ignored ignored;
  Block::current().unit<Products>().commit();
}
inline void wgmma_wait(int groups) {
  Block::ignore(true);
  auto& products = Block::current().unit<Products>();
  Block::ignore(false);
  products.wait(groups);
}
template <class T, int kN, bool kTransposed>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  const Ignored ignored;
  static const Multiply multiply = fastest_multiply<T, kN, kTransposed>();
  Block::current().unit<Products>().start(multiply, kN, a, b, d);
}

}  // namespace emulation
