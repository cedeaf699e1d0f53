// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the random numbers of dropout.
// The key is the seed. The counter is (index / 4, offset), 64 bits each; element `index` takes output word index % 4.
// constexpr: CUDA kernels call it too.
#pragma once

#include <cstdint>

namespace alexnet_kernels {

struct Philox {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  static constexpr int kRounds = 10;
};

struct Words4 {
  uint32_t word[4];
};

constexpr Words4 philox(uint64_t seed, uint64_t offset, uint64_t quad) {
  uint32_t c0 = uint32_t(quad), c1 = uint32_t(quad >> 32), c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    const uint64_t p0 = uint64_t(Philox::kMultiplier0) * c0, p1 = uint64_t(Philox::kMultiplier1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += Philox::kWeyl0, k1 += Philox::kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace alexnet_kernels
