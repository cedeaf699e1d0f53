// What CuTe, NVIDIA's library of layouts, says about the operands of Hopper's instructions. Prints a JSON object a
// line, for tests/test_emulation_hopper.py. Compiled by the host's compiler; CuTe also prints that host code has no
// shared memory: its addresses begin at 0.
#include <cstdio>
#include <string>
#include <vector>

#include "cute/tensor.hpp"
// After the tensor.
#include "cute/atom/copy_traits_sm90_tma.hpp"
#include "cute/atom/mma_atom.hpp"
#include "cute/atom/mma_traits_sm90_gmma.hpp"

namespace {

using namespace cute;
namespace GMMA = cute::SM90::GMMA;

template <class T>
constexpr bool kBf16 = std::is_same_v<T, cute::bfloat16_t>;

template <class List>
std::string json(const List& list) {
  std::string text = "[";
  for (const auto value : list) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + "]";
}

template <class T, int kRowBytes>
auto atom() {
  if constexpr (kRowBytes == 128) return GMMA::Layout_K_SW128_Atom<T>{};
  if constexpr (kRowBytes == 64) return GMMA::Layout_K_SW64_Atom<T>{};
  if constexpr (kRowBytes == 32) return GMMA::Layout_K_SW32_Atom<T>{};
}
template <class T, int kRowBytes, int kRows>
auto matrix() {
  return tile_to_shape(atom<T, kRowBytes>(), Shape<Int<kRows>, Int<kRowBytes / 2>>{});
}

template <class T, int kN, auto kMajorOfB = GMMA::Major::K>
auto instruction() {
  constexpr auto kMajor = GMMA::Major::K;
  if constexpr (kBf16<T>) {
    if constexpr (kN == 64) return SM90_64x64x16_F32BF16BF16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 96) return SM90::GMMA::MMA_64x96x16_F32BF16BF16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 128) return SM90_64x128x16_F32BF16BF16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 192) return SM90_64x192x16_F32BF16BF16_SS<kMajor, kMajorOfB>{};
  } else {
    if constexpr (kN == 64) return SM90_64x64x16_F32F16F16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 96) return SM90::GMMA::MMA_64x96x16_F32F16F16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 128) return SM90_64x128x16_F32F16F16_SS<kMajor, kMajorOfB>{};
    if constexpr (kN == 192) return SM90_64x192x16_F32F16F16_SS<kMajor, kMajorOfB>{};
  }
}

template <class Fragment>
void print_descriptors(const char* operand, bool bf16, int row_bytes, int rows, const Fragment& fragment) {
  for (int tile = 0; tile < size<1>(fragment); ++tile) {
    for (int step = 0; step < size<2>(fragment); ++step) {
      const cute::GmmaDescriptor descriptor = *(fragment.data() + fragment.layout()(0, tile, step));
      std::printf(
          "{\"kind\": \"descriptor\", \"operand\": \"%s\", \"bf16\": %d, \"row_bytes\": %d, \"rows\": %d, \"tile\": "
          "%d, \"step\": %d, \"bits\": %llu}\n",
          operand, bf16, row_bytes, rows, tile, step, static_cast<unsigned long long>(descriptor.desc_));
    }
  }
}

// Descriptors as CuTe's kernels make them: of A in `kTiles` tiles of 64 rows, and of B.
template <class T, int kN, int kRowBytes, int kTiles>
void descriptors() {
  const auto mma = make_tiled_mma(instruction<T, kN>());
  const auto slice = mma.get_slice(0);
  const Tensor a = make_tensor(make_smem_ptr(static_cast<T*>(nullptr)), matrix<T, kRowBytes, 64 * kTiles>());
  const Tensor b = make_tensor(make_smem_ptr(static_cast<T*>(nullptr)), matrix<T, kRowBytes, kN>());
  print_descriptors("a", kBf16<T>, kRowBytes, 64 * kTiles, slice.make_fragment_A(slice.partition_A(a)));
  print_descriptors("b", kBf16<T>, kRowBytes, kN, slice.make_fragment_B(slice.partition_B(b)));
}

template <class T, int kRowBytes>
void swizzle() {
  const auto layout = as_position_independent_swizzle_layout(matrix<T, kRowBytes, 64>());
  std::vector<int> bytes;
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < kRowBytes / 2; ++k) bytes.push_back(2 * int(layout(row, k)));
  }
  std::printf("{\"kind\": \"swizzle\", \"bf16\": %d, \"row_bytes\": %d, \"bytes\": %s}\n", kBf16<T>, kRowBytes,
              json(bytes).c_str());
}

// Descriptors of B, of kTerms terms of which each has its rows' elements one after the other, kRowBytes at a time, and
// where the elements are: [term][row].
template <class T, int kN, int kRowBytes, int kTerms>
void transposed() {
  using Atom = std::conditional_t<kRowBytes == 128, GMMA::Layout_MN_SW128_Atom<T>, GMMA::Layout_MN_SW64_Atom<T>>;
  const auto layout = tile_to_shape(Atom{}, Shape<Int<kN>, Int<kTerms>>{}, Step<_2, _1>{});
  const Tensor b = make_tensor(make_smem_ptr(static_cast<T*>(nullptr)), layout);
  const auto slice = make_tiled_mma(instruction<T, kN, GMMA::Major::MN>()).get_slice(0);
  const auto fragment = slice.make_fragment_B(slice.partition_B(b));
  std::vector<uint64_t> bits;
  for (int step = 0; step < size<2>(fragment); ++step) {
    const cute::GmmaDescriptor descriptor = *(fragment.data() + fragment.layout()(0, 0, step));
    bits.push_back(descriptor.desc_);
  }
  std::vector<int> bytes;
  const auto places = as_position_independent_swizzle_layout(layout);
  for (int term = 0; term < kTerms; ++term) {
    for (int row = 0; row < kN; ++row) bytes.push_back(2 * int(places(row, term)));
  }
  std::printf(
      "{\"kind\": \"transposed\", \"bf16\": %d, \"rows\": %d, \"row_bytes\": %d, \"terms\": %d, \"bits\": %s, "
      "\"bytes\": %s}\n",
      kBf16<T>, kN, kRowBytes, kTerms, json(bits).c_str(), json(bytes).c_str());
}

template <class T, int kN>
void fragments() {
  using Traits = MMA_Traits<decltype(instruction<T, kN>())>;
  const typename Traits::CLayout layout;
  std::vector<int> elements;
  for (int thread = 0; thread < size<0>(layout); ++thread) {
    for (int i = 0; i < size<1>(layout); ++i) elements.push_back(layout(thread, i));
  }
  const typename Traits::Shape_MNK shape;
  std::printf(
      "{\"kind\": \"accumulators\", \"bf16\": %d, \"shape\": [%d, %d, %d], \"a\": %d, \"b\": %d, \"threads\": %d, "
      "\"elements\": %s}\n",
      kBf16<T>, int(get<0>(shape)), int(get<1>(shape)), int(get<2>(shape)), int(size<1>(typename Traits::ALayout{})),
      int(size<1>(typename Traits::BLayout{})), int(size(typename Traits::ThrID{})), json(elements).c_str());
}

// The left operand in registers, of a product that takes it from there.
void left() {
  const MMA_Traits<SM90::GMMA::MMA_64x96x16_F32BF16BF16_RS<SM90::GMMA::Major::K, SM90::GMMA::Major::K>>::ALayout layout;
  std::vector<int> elements;
  for (int thread = 0; thread < size<0>(layout); ++thread) {
    for (int i = 0; i < size<1>(layout); ++i) elements.push_back(layout(thread, i));
  }
  std::printf("{\"kind\": \"left\", \"elements\": %s}\n", json(elements).c_str());
}

alignas(16) char memory[16];  // whose address stands for a tensor's

// The arguments of cuTensorMapEncodeTiled for boxes of 8 x 8 x 1 x 1 pixels of a tensor [n, z, y, x, channels].
template <class T, int kRowBytes>
void tensor_map() {
  const auto shape = make_shape(make_shape(13, 9, 3, 5), 200);
  const auto stride = make_stride(make_stride(200, 200 * 13, 200 * 13 * 9, 200 * 13 * 9 * 3), Int<1>{});
  const Tensor tensor = make_tensor(make_gmem_ptr(reinterpret_cast<const T*>(memory)), make_layout(shape, stride));
  const auto tile = Shape<Shape<_8, _8, _1, _1>, Int<kRowBytes / 2>>{};
  make_tma_copy(SM90_TMA_LOAD{}, tensor, matrix<T, kRowBytes, 64>(), tile, Int<1>{});
}

template <class T>
void all() {
  swizzle<T, 32>();
  swizzle<T, 64>();
  swizzle<T, 128>();
  fragments<T, 64>();
  fragments<T, 96>();
  fragments<T, 128>();
  fragments<T, 192>();
  descriptors<T, 64, 32, 1>();
  descriptors<T, 96, 64, 2>();
  descriptors<T, 128, 128, 2>();
  descriptors<T, 192, 128, 3>();
  descriptors<T, 192, 64, 1>();
  descriptors<T, 128, 32, 2>();
  transposed<T, 64, 128, 48>();
  transposed<T, 96, 64, 32>();
  transposed<T, 128, 128, 32>();
  transposed<T, 192, 128, 176>();
  tensor_map<T, 32>();
  tensor_map<T, 64>();
  tensor_map<T, 128>();
}

}  // namespace

// The driver's functions, of which this one prints its arguments.
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill fill) {
  std::printf(
      "{\"kind\": \"tensor map\", \"type\": %d, \"rank\": %u, \"offset\": %td, \"sizes\": %s, \"strides\": %s, "
      "\"box\": %s, \"steps\": %s, \"interleave\": %d, \"swizzle\": %d, \"fill\": %d}\n",
      int(type), rank, static_cast<char*>(address) - memory, json(std::vector<uint64_t>(sizes, sizes + rank)).c_str(),
      json(std::vector<uint64_t>(strides, strides + rank - 1)).c_str(),
      json(std::vector<uint32_t>(box, box + rank)).c_str(), json(std::vector<uint32_t>(steps, steps + rank)).c_str(),
      int(interleave), int(swizzle), int(fill));
  return CUDA_SUCCESS;
}

int main() {
  left();
  std::printf("{\"kind\": \"constants\", \"k_major\": %d, \"mn_major\": %d, \"scale_one\": %d}\n", int(GMMA::Major::K),
              int(GMMA::Major::MN), int(GMMA::ScaleIn::One));
  all<cute::bfloat16_t>();
  all<cute::half_t>();
  return 0;
}
