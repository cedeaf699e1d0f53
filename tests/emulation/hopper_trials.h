// A kernel that tests the emulation of Hopper's instructions (hopper.h): a pipeline of copies and products, correct or
// with one of the faults that the emulation has to show.
#pragma once

#include <map>
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/tensor_core.cuh"
#include "emulation/trials.h"

namespace trials {

namespace cuda = alexnet_kernels::cuda;

enum class Fault {
  none,
  full_wait,
  empty_wait,
  full_parity,
  empty_parity,
  early_arrival,
  fence,
  late_fence,
  commit,
  products_wait,
  last_wait,
  changed_registers,
  changed_left,
  few_bytes,
  many_bytes,
  few_arrivals,
  many_arrivals,
  publish,
  syncthreads,
  init,
  init_twice,
  overwritten_barrier,
  swizzle,
  stride,
  start,
  base_offset,
  beyond_shared,
  alignment,
  copy_beyond_shared,
  copy_at_the_end,
  no_map,
  half_a_warpgroup,
  lanes_differ,
  warps_differ,
  counts_differ,
  waits_differ,
  large_tensor,
};

// out[group][row][column] = the sum over taps t and channels of a group of box element `row` (of `in`, moved by t in
// dimension 1) times filter[t][column]: a convolution along one dimension.
struct Pipeline {
  int channels;               // of a group
  int taps, chunks, stages;   // steps of the loop: taps * chunks, of a box's row of channels each
  int warpgroups;             // that multiply; one warp copies for them
  std::array<int, 4> origin;  // of the box in dimensions 1 to 4
  int box_bytes, filter_bytes;
  bool halves;  // each half of the columns is a product of its own
};

template <class T, int kN, int kRowBytes>
void pipeline(cuda::TensorMap images, cuda::TensorMap filters, float* out, Pipeline p, Fault fault) {
  constexpr int kChannels = kRowBytes / 2, kProducts = kRowBytes / 32;
  unsigned char* shared = cuda::dynamic_shared();
  const int stage_bytes = p.box_bytes + p.filter_bytes, steps = p.taps * p.chunks;
  auto* full = reinterpret_cast<cuda::Barrier*>(shared + p.stages * stage_bytes);
  auto* empty = full + p.stages;
  auto* step_of = reinterpret_cast<int*>(empty + p.stages);  // an ordinary store that the barriers order
  const int thread = int(threadIdx.x), consumers = int(blockDim.x) - 32;
  if (thread == consumers) {
    for (int s = 0; s < p.stages; ++s) {
      if (fault == Fault::init) continue;
      cuda::init(full + s, 1);
      cuda::init(empty + s, consumers + (fault == Fault::many_arrivals ? -1 : fault == Fault::few_arrivals ? 1 : 0));
      if (fault == Fault::init_twice) cuda::init(full + s, 1);
    }
    if (fault != Fault::publish) cuda::publish_barriers();
    if (fault == Fault::no_map) images.opaque[0] = 0;
    cuda::prefetch(images);
  }
  if (fault != Fault::syncthreads) __syncthreads();
  if (fault == Fault::overwritten_barrier) {
    if (thread == 0) full[0].state = 0;
    __syncthreads();
  }
  if (thread >= consumers) {
    if (thread != consumers) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % p.stages, round = step / p.stages, tap = step / p.chunks;
      const int channel = step % p.chunks * kChannels;
      if (fault != Fault::empty_wait) cuda::wait(empty + stage, (round + (fault == Fault::empty_parity ? 0 : 1)) % 2);
      step_of[stage] = step;
      const int missing = fault == Fault::few_bytes ? 16 : fault == Fault::many_bytes ? -16 : 0;
      cuda::arrive_and_expect(full + stage, stage_bytes - missing);
      unsigned char* box = shared + stage * stage_bytes;
      unsigned char* filter = box + p.box_bytes;
      if (fault == Fault::alignment) box += kRowBytes;
      if (fault == Fault::copy_beyond_shared) box += 227 * 1024;
      cuda::load_box(box, images, full + stage, int(blockIdx.x) * p.channels + channel, p.origin[0] + tap, p.origin[1],
                     p.origin[2], p.origin[3]);
      cuda::load_box(filter, filters, full + stage, channel, 0, tap, int(blockIdx.x), 0);
    }
    if (fault == Fault::copy_at_the_end) {
      cuda::wait(empty, (steps + p.stages - 1) / p.stages % 2 == 0);
      cuda::load_box(shared, images, full, 0, 0, 0, 0, 0);
    }
    return;
  }
  const int box_row = thread / 32 * 16 + thread % 16, half = thread % 32 / 16;
  float d[kN / 2] = {};
  uint32_t left[2][kProducts][4];
  int last = -1;  // the stage of the products that are under way
  for (int step = 0; step < steps; ++step) {
    const int stage = step % p.stages, round = step / p.stages;
    if (fault != Fault::full_wait) cuda::wait(full + stage, (round + (fault == Fault::full_parity ? 1 : 0)) % 2);
    const unsigned char* box = shared + stage * stage_bytes;
    for (int i = 0; i < kProducts; ++i) {
      uint32_t address = cuda::shared_address(box) + box_row * kRowBytes + 32 * i + 16 * half;
      if (fault == Fault::start) address += 16;
      cuda::ldmatrix(left[step % 2][i], address ^ (address >> 3 & (kRowBytes - 16)));
    }
    uint64_t b = cuda::describe<kRowBytes>(box + p.box_bytes);
    if (fault == Fault::swizzle) b ^= uint64_t(kRowBytes == 128 ? 3 : 1) << 62;
    if (fault == Fault::stride) b += uint64_t(8) << 32;
    if (fault == Fault::base_offset) b |= uint64_t(1) << 49;
    if (fault == Fault::beyond_shared) b = cuda::describe<kRowBytes>(shared + p.stages * stage_bytes);
    if (fault == Fault::lanes_differ && thread == 37) b += 2;
    if (fault == Fault::warps_differ && thread / 32 == 1) b += 2;
    if (fault != Fault::fence && fault != Fault::late_fence) cuda::wgmma_fence();
    if (fault == Fault::late_fence && step == 0) cuda::wgmma_fence();
    if (fault == Fault::late_fence && step == 2) d[3] = 0.f;
    if (fault == Fault::changed_registers && step == 1) d[3] = 0.f;
    for (int i = 0; i < kProducts; ++i) {
      if (fault == Fault::counts_differ && thread / 32 == 1 && step == steps - 1 && i == kProducts - 1) continue;
      const uint32_t(&a)[4] = left[step_of[stage] % 2][i];
      if constexpr (kN >= 128) {
        if (p.halves) {
          const uint64_t other_half = b + kN / 2 * kRowBytes / 16;
          cuda::wgmma<T, kN / 2>(reinterpret_cast<float(&)[kN / 4]>(d), a, b + 2 * i);
          cuda::wgmma<T, kN / 2>(reinterpret_cast<float(&)[kN / 4]>(d[kN / 4]), a, other_half + 2 * i);
          continue;
        }
      }
      cuda::wgmma<T, kN>(d, a, b + 2 * i);
    }
    if (fault == Fault::changed_left && thread == 37) left[step % 2][0][1] ^= 1;
    if (fault != Fault::commit) cuda::wgmma_commit();
    if (fault == Fault::early_arrival) {
      cuda::arrive(empty + stage);
      cuda::wgmma_wait<0>();
    } else if (fault == Fault::late_fence || (fault == Fault::waits_differ && thread == 5)) {
      cuda::wgmma_wait<0>();
      cuda::arrive(empty + stage);
    } else {
      if (fault != Fault::products_wait) cuda::wgmma_wait<1>();
      if (last >= 0) cuda::arrive(empty + last);
      last = stage;
    }
  }
  if (fault != Fault::products_wait && fault != Fault::last_wait) cuda::wgmma_wait<0>();
  if (last >= 0) cuda::arrive(empty + last);
  const int row = thread / 32 * 16 + thread % 32 / 4, column = 2 * (thread % 4);
  float* mine = out + int64_t(blockIdx.x) * 64 * p.warpgroups * kN;
  for (int i = 0; i < kN / 2; ++i) mine[(row + 8 * (i / 2 % 2)) * kN + column + 8 * (i / 4) + i % 2] = d[i];
}

// Options of the pipeline: whether bf16, kN, kRowBytes, groups, channels of a group, taps, stages, warpgroups, four
// sizes of `in` (dimensions 1 to 4), four of the box, four coordinates of its origin, halves. The input's dimension 0
// are the channels of all groups and as many as fill 16 bytes. `in` has the input, then the filters
// [group][tap][kN][channels, filled to 16 bytes].
struct Options {
  int64_t bf16, columns, row_bytes, groups, channels, taps, stages, warpgroups, size[4], box[4], origin[4], halves;
};

template <class T, int kN, int kRowBytes>
void run_pipeline(const Data& data, const Options& o, Fault fault) {
  std::vector<T> values(data.in, data.in + data.count);
  const auto filled = [](int64_t channels) { return uint64_t(channels + 7) / 8 * 8; };
  // Each operand has memory of its own, aligned to 16 bytes.
  const uint64_t all_channels = filled(o.groups * o.channels), channels = filled(o.channels);
  uint64_t pixels = 1, rows = 1;
  for (int i = 0; i < 4; ++i) pixels *= o.size[i], rows *= o.box[i];
  const std::vector<T> images(values.begin(), values.begin() + all_channels * pixels);
  const std::vector<T> filters(values.begin() + images.size(), values.end());
  if (filters.size() != channels * o.groups * o.taps * kN || rows != uint64_t(64 * o.warpgroups)) {
    throw std::invalid_argument("operands that do not fit the options");
  }
  cuda::Boxes image_boxes{images.data(), {all_channels}, {2 * all_channels}, {kRowBytes / 2}, o.bf16 != 0};
  for (int i = 0; i < 4; ++i) {
    image_boxes.size[i + 1] = o.size[i];
    image_boxes.box[i + 1] = o.box[i];
    if (i > 0) image_boxes.stride[i] = image_boxes.stride[i - 1] * o.size[i - 1];
  }
  if (fault == Fault::large_tensor) image_boxes.size[4] += 1;
  const cuda::Boxes filter_boxes{filters.data(),
                                 {uint64_t(o.channels), kN, uint64_t(o.taps), uint64_t(o.groups), 1},
                                 {2 * channels, 2 * channels * kN, 2 * channels * kN * o.taps, 16},
                                 {kRowBytes / 2, kN, 1, 1, 1},
                                 o.bf16 != 0};
  Pipeline p{int(o.channels),       int(o.taps),       int(o.channels + kRowBytes / 2 - 1) / (kRowBytes / 2),
             int(o.stages),         int(o.warpgroups), {},
             int(rows) * kRowBytes, kN * kRowBytes,    o.halves != 0};
  for (int i = 0; i < 4; ++i) p.origin[i] = int(o.origin[i]);
  const size_t shared = p.stages * (p.box_bytes + p.filter_bytes + 2 * sizeof(cuda::Barrier) + sizeof(int));
  const unsigned threads = cuda::kWarpgroup * p.warpgroups + 32;
  const cudaError_t error = emulation::launch(
      unsigned(o.groups), fault == Fault::half_a_warpgroup ? threads - 64 : threads, shared, pipeline<T, kN, kRowBytes>,
      cuda::encode(image_boxes), cuda::encode(filter_boxes), data.out, p, fault);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

inline Fault fault_named(const std::string& name) {
  static const std::map<std::string, Fault> all = {
      {"none", Fault::none},
      {"no wait for full stages", Fault::full_wait},
      {"no wait for empty stages", Fault::empty_wait},
      {"wrong parity of full stages", Fault::full_parity},
      {"wrong parity of empty stages", Fault::empty_parity},
      {"arrival before the wait", Fault::early_arrival},
      {"no fence", Fault::fence},
      {"no fence after a change", Fault::late_fence},
      {"no commit", Fault::commit},
      {"no wait for products", Fault::products_wait},
      {"no last wait for products", Fault::last_wait},
      {"change of accumulators under way", Fault::changed_registers},
      {"change of the left operand under way", Fault::changed_left},
      {"too few bytes", Fault::few_bytes},
      {"too many bytes", Fault::many_bytes},
      {"too few arrivals", Fault::few_arrivals},
      {"too many arrivals", Fault::many_arrivals},
      {"no publish_barriers", Fault::publish},
      {"no __syncthreads after init", Fault::syncthreads},
      {"no init", Fault::init},
      {"two inits", Fault::init_twice},
      {"overwritten barrier", Fault::overwritten_barrier},
      {"wrong swizzle", Fault::swizzle},
      {"wrong stride", Fault::stride},
      {"wrong start", Fault::start},
      {"base offset", Fault::base_offset},
      {"matrix beyond shared memory", Fault::beyond_shared},
      {"misaligned copy", Fault::alignment},
      {"copy beyond shared memory", Fault::copy_beyond_shared},
      {"copy at the end", Fault::copy_at_the_end},
      {"no tensor map", Fault::no_map},
      {"half a warpgroup", Fault::half_a_warpgroup},
      {"lanes differ", Fault::lanes_differ},
      {"warps differ", Fault::warps_differ},
      {"counts differ", Fault::counts_differ},
      {"waits differ", Fault::waits_differ},
      {"tensor map larger than the tensor", Fault::large_tensor},
  };
  const auto found = all.find(name);
  if (found == all.end()) throw std::invalid_argument("no such fault: " + name);
  return found->second;
}

template <class T, int kN>
void run_pipeline(const Data& data, const Options& o, Fault fault) {
  switch (o.row_bytes) {
    case 32: return run_pipeline<T, kN, 32>(data, o, fault);
    case 64: return run_pipeline<T, kN, 64>(data, o, fault);
    case 128: return run_pipeline<T, kN, 128>(data, o, fault);
    default: throw std::invalid_argument("rows of 32, 64 or 128 bytes");
  }
}
template <class T>
void run_pipeline(const Data& data, const Options& o, Fault fault) {
  switch (o.columns) {
    case 64: return run_pipeline<T, 64>(data, o, fault);
    case 96: return run_pipeline<T, 96>(data, o, fault);
    case 128: return run_pipeline<T, 128>(data, o, fault);
    case 192: return run_pipeline<T, 192>(data, o, fault);
    default: throw std::invalid_argument("64, 96, 128 or 192 columns");
  }
}
inline void run_pipeline(const std::string& fault, const Data& data) {
  Options options;
  if (data.options.size() != sizeof(options) / sizeof(int64_t)) throw std::invalid_argument("21 options");
  std::memcpy(&options, data.options.data(), sizeof(options));
  options.bf16 ? run_pipeline<cuda::bf16>(data, options, fault_named(fault))
               : run_pipeline<cuda::f16>(data, options, fault_named(fault));
}

// The same with operands that fill a box but for its last dimension, for the sanitizers.
inline void run_pipeline(const std::string& fault) {
  const std::vector<int64_t> options{1, 64, 128, 1, 64, 3, 2, 1, 8, 4, 1, 1, 8, 4, 1, 2, 0, 0, 0, 0, 0};
  const std::vector<float> in(64 * (32 + 3 * 64), 1.f);
  std::vector<float> out(64 * 64);
  run_pipeline(fault, {in.data(), out.data(), int(in.size()), options});
}

}  // namespace trials
