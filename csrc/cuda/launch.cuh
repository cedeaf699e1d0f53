// The launch constants of the CUDA kernels: threads of a block, and the work of a thread or a block.
#pragma once

namespace alexnet_kernels::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// LRN and max-pooling, forward. The most warps of a block, and the outputs of a column that a block computes, fewer
// where blocks would be fewer than two for each multiprocessor.
constexpr int kLrnPoolWarps = 16;
constexpr int kLrnPoolRows = 7;
constexpr int kLrnPoolBlocks = 264;

// Pools, backward: the most blocks, four for each of 132 multiprocessors, whose sums of the bias's gradient are added.
constexpr int64_t kBiasBlocks = 528;

// Batch normalisation. Blocks of a launch, unless there are more groups of columns than that; bytes that the columns of
// a block take at one pixel, a cache line; vectors whose loads a thread issues together; channels of a block that
// combines parts, which leaves kThreads / kCombineChannels lanes for each.
constexpr int kPartitionBlocks = 2048;
constexpr int kPartitionBytes = 128;
template <int kVec>
constexpr int kVectorsInFlight = kVec == 1 ? 8 : 4;
constexpr int kCombineChannels = 4;

// SGD. Elements of a thread, and of an access: 16 bytes of float, 8 of other types; tensors of a launch, whose
// descriptors fit 4 kB of kernel arguments; resident blocks of a multiprocessor, which limits a thread to 40 registers.
constexpr int kSgdElements = 8;
constexpr int kSgdGroup = 4;
constexpr int kSgdTensors = 64;
constexpr int kSgdBlocks = 6;

}  // namespace alexnet_kernels::cuda
