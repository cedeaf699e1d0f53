// cp.async, ldmatrix and mma.sync (csrc/cuda/tensor_core.cuh) in the emulation.
//
// A copy's destination is NaN from its start on. The source is read and the data lands when the thread waits for the
// copy's group or, in other orders than 0, where the thread meets others before that, in any order. What hardware
// leaves undefined ends the launch with an error: addresses that are not aligned or not in dynamic shared memory, warps
// of fewer than 32 lanes, threads that end with copies that they never waited for.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "emulation/cuda.h"

namespace emulation {

constexpr uint32_t kPart = 16;  // bytes of a copy, and of a row of a matrix

struct alignas(kPart) Part {
  uint64_t word[2];
};

// The copies that the threads of a block have started and not waited for.
class Copies : public Unit {
 public:
  Copies() : threads_(Block::current().threads()) {
    for (size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].random = settings().order * 2654435761u + uint32_t(i) * 40503u;
    }
  }

  void start(Part* to, const Part* from) {
    Mine& mine = threads_[thread().number];
    mine.copies.push_back({to, from, mine.groups});
  }
  void commit() { ++threads_[thread().number].groups; }
  // Lands the copies of all groups but the last `left`.
  void wait(int64_t left) {
    Mine& mine = threads_[thread().number];
    land([&](const Copy& copy) { return copy.group + left < mine.groups; });
  }

  void meet() override {
    Mine& mine = threads_[thread().number];
    if (settings().order == 0 || mine.copies.empty()) return;
    land([&](const Copy&) {
      mine.random = mine.random * 1664525u + 1013904223u;
      return mine.random >> 30 == 0;
    });
  }
  std::string finish() override {
    for (const Mine& mine : threads_) {
      if (!mine.copies.empty()) return "a thread ends before its copies do";
    }
    return {};
  }

 private:
  struct Copy {
    Part* to;
    const Part* from;  // null for zeros
    int64_t group;
  };
  struct Mine {
    std::vector<Copy> copies;
    int64_t groups = 0;
    uint32_t random = 0;
  };

  template <class Lands>
  void land(const Lands& lands) {
    std::vector<Copy>& copies = threads_[thread().number].copies;
    size_t kept = 0;
    for (const Copy copy : copies) {
      if (lands(copy)) {
        Block::ignore(false);
        *copy.to = copy.from == nullptr ? Part{} : *copy.from;
        Block::ignore(true);
      } else {
        copies[kept++] = copy;
      }
    }
    copies.resize(kept);
  }

  std::vector<Mine> threads_;
};

// Ends the launch if a thread does what hardware does not do.
inline void require(bool condition, const char* otherwise) {
  if (condition) return;
  Block::ignore(true);
  Block::current().fail(otherwise);
}
inline void require_whole_warp(const char* otherwise) {
  require(Block::current().size.count() - thread().number / kWarp * kWarp >= kWarp, otherwise);
}

inline Part* shared_part(uint32_t address) {
  return reinterpret_cast<Part*>(Block::current().shared() + address);
}

inline void copy_async(uint32_t shared, const void* global, bool valid) {
  Part* to = shared_part(shared);
  require(shared % kPart == 0, "cp.async to an address that is no multiple of 16");
  require(Block::current().holds(to, kPart), "cp.async to an address outside dynamic shared memory");
  require(reinterpret_cast<uintptr_t>(global) % kPart == 0, "cp.async from an address that is no multiple of 16");
  *to = {~uint64_t(0), ~uint64_t(0)};
  const Ignored ignored;
  Block::current().unit<Copies>().start(to, valid ? static_cast<const Part*>(global) : nullptr);
}
inline void copy_commit() {
  const Ignored ignored;
  Block::current().unit<Copies>().commit();
}
inline void copy_wait(int groups) {
  const Ignored ignored;
  Block::current().unit<Copies>().wait(groups);
}

inline char matrices[2];  // whose addresses identify the collectives

template <bool kTransposed>
void load_matrices(uint32_t (&matrix)[4], uint32_t shared) {
  require_whole_warp("ldmatrix by a warp of fewer than 32 lanes");
  struct Rows {
    uint32_t word[4];
  };
  struct Row {
    Part part;
    uint32_t address;
  };
  // The lane itself reads its row, for the sanitizers.
  require(shared % kPart == 0, "ldmatrix from an address that is no multiple of 16");
  require(Block::current().holds(shared_part(shared), kPart), "ldmatrix from an address outside dynamic shared memory");
  const Part part = *shared_part(shared);
  const Rows rows = Block::current().collective<Rows>(
      0xffffffffu, &matrices[kTransposed], Row{part, shared}, [](unsigned l, const Row* const* in) {
        auto bytes = [&](unsigned i, unsigned row) { return reinterpret_cast<const char*>(&in[8 * i + row]->part); };
        Rows mine;
        for (unsigned i = 0; i < 4; ++i) {
          char* const to = reinterpret_cast<char*>(&mine.word[i]);
          if (kTransposed) {
            for (unsigned j = 0; j < 2; ++j) std::memcpy(to + 2 * j, bytes(i, 2 * (l % 4) + j) + 2 * (l / 4), 2);
          } else {
            std::memcpy(to, bytes(i, l / 4) + 4 * (l % 4), 4);
          }
        }
        if (l % 8 == 0) {
          // The eight rows that are read at once, each from four of the 32 banks.
          unsigned banks = 0;
          for (unsigned row = l; row < l + 8; ++row) banks |= 1u << in[row]->address / kPart % 8;
          settings().conflicts += 8 - __builtin_popcount(banks);
        }
        return mine;
      });
  for (int i = 0; i < 4; ++i) matrix[i] = rows.word[i];
}
inline void ldmatrix(uint32_t (&matrix)[4], uint32_t shared) {
  load_matrices<false>(matrix, shared);
}
inline void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t shared) {
  load_matrices<true>(matrix, shared);
}

inline uint32_t round_tf32(uint32_t v) {
  if ((v & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  return (v + 0x1000u) & ~0x1fffu;
}

// The values that a register holds, as mma takes them: of a float, TF32's bits only.
inline void unpack(c10::BFloat16, uint32_t v, float* out) {
  out[0] = __uint_as_float(v << 16);
  out[1] = __uint_as_float(v & 0xffff0000u);
}
inline void unpack(c10::Half, uint32_t v, float* out) {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (unsigned i = 0; i < all.size(); ++i) all[i] = float(c10::Half(uint16_t(i), c10::Half::from_bits()));
    return all;
  }();
  out[0] = values[v & 0xffff];
  out[1] = values[v >> 16];
}
inline void unpack(float, uint32_t v, float* out) {
  *out = __uint_as_float(v & ~0x1fffu);
}

template <class T>
inline char products;

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  require_whole_warp("mma by a warp of fewer than 32 lanes");
  constexpr int kRows = 16, kColumns = 8, kSum = 32 / int(sizeof(T)), kPair = 4 / int(sizeof(T));
  struct Operands {
    const uint32_t *a, *b;
    const float* d;
  };
  struct Result {
    float d[4];
  };
  const Result result = Block::current().collective<Result>(
      0xffffffffu, &products<T>, Operands{a, b, d}, [](unsigned lane, const Operands* const* in) {
        typedef float Columns __attribute__((vector_size(4 * kColumns)));
        static thread_local Columns sum[kRows];
        if (lane == 0) {  // for all lanes
          float left[kRows][kSum];
          Columns right[kSum];
          for (unsigned l = 0; l < kWarp; ++l) {
            for (unsigned i = 0; i < 4; ++i) {
              unpack(T(), in[l]->a[i], &left[l / 4 + 8 * (i % 2)][kPair * (l % 4) + kSum / 2 * (i / 2)]);
              sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = in[l]->d[i];
            }
            for (unsigned i = 0; i < 2; ++i) {
              float pair[kPair];
              unpack(T(), in[l]->b[i], pair);
              for (int j = 0; j < kPair; ++j) right[kPair * (l % 4) + kSum / 2 * i + j][l / 4] = pair[j];
            }
          }
          for (int row = 0; row < kRows; ++row) {
            Columns total = sum[row];
            for (int k = 0; k < kSum; ++k) total += left[row][k] * right[k];
            sum[row] = total;
          }
        }
        Result mine;
        for (unsigned i = 0; i < 4; ++i) mine.d[i] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
        return mine;
      });
  for (int i = 0; i < 4; ++i) d[i] = result.d[i];
}

}  // namespace emulation
