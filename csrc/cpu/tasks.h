// How the CPU kernels split their work into tasks. A task is what one call of a kernel does for one index of its range.
#pragma once

#include <cstdint>

namespace alexnet_kernels::cpu {

// Memory traffic that pays for waking one more thread.
constexpr int64_t kBytesPerThread = 1 << 15;

constexpr int64_t kDropoutTaskElements = 1 << 14;
constexpr int64_t kElementwiseTaskElements = 1 << 13;
constexpr int64_t kSgdTaskElements = 1 << 15;
constexpr int64_t kLinearTaskOutputs = 12;
// NCHW: the tile of 256 channels by this many pixels fits the L2 cache.
constexpr int64_t kLrnTaskPixels = 128;
constexpr int64_t kLrnPoolTaskChannels = 16;
// Of a part of the batch, which is read twice: the second read hits the cache.
constexpr int64_t kBatchNormPartBytes = 1 << 17;
// The most pixels that are summed in float.
constexpr int64_t kBatchNormPartPixels = 1 << 12;

}  // namespace alexnet_kernels::cpu
