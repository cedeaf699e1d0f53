// The launch constants of the CUDA kernels: threads of a block, and the work of a thread or a block.
#pragma once

namespace alexnet_kernels::cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Vertically adjacent outputs of a thread. Neighbouring outputs share the rows of their windows.
constexpr int kLrnPoolRows = 4;

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
